"""Where candidates come from (`Origin`), what is known of some of them before labels are numbers and keys unique (`Part`), and the reading
of images that are files or objects of their own.

Where it stands: the readers of formats (`tables.py`, `tars.py`) and of folders bring origins and their parts, `sources.py` makes a listing
of them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa

from data_tools.images import MAX_IMAGE_BYTES, Reject
from data_tools.storage import STORES, WEB, Location, Missing, StorageError, Url, in_turn, is_url, read_object

R = TypeVar("R")
ROWS = 65_536  # rows turned into Python objects at a time

# What an image's own path can be at fault for. Other errors are the machine's and end the run.
PATH_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True)
class Origin:
    """One folder of class folders, or one table."""

    prefix: str  # in front of the names of its samples, where there are several sources
    root: Location  # where relative paths start
    table: Location | None = None
    image_column: str | None = None  # set if the image bytes lie in the table


@dataclass(frozen=True)
class Part:
    """Candidates of one origin, or some of them, before labels are numbers and keys unique."""

    row: np.ndarray
    path: pa.Array
    raw_key: pa.Array
    label_lengths: np.ndarray
    labels: pa.Array  # int64 or large_string
    score_lengths: np.ndarray
    scores: pa.Array


def read_images(wanted: Iterable[tuple[str | bytes | None, Origin] | Callable[[], R]], requests: int) -> Iterator[bytes | Reject | R]:
    """Images that are files or objects of their own, each named by its path and its origin, and others that are to be had by a call; in
    order. Objects are read ahead."""
    found = (locate(*one) if isinstance(one, tuple) else one for one in wanted)

    def read(place: str | Url | Reject | Callable[[], R], room: Callable[[int], None]) -> bytes | Reject | R:
        if isinstance(place, Url):
            return _read_object(place, room)
        return _read_file(place) if isinstance(place, str) else place if isinstance(place, Reject) else place()

    return in_turn(found, lambda place: isinstance(place, Url), read, requests)


def locate(path: str | bytes | None, origin: Origin) -> str | Url | Reject:
    """Where an image lies: the path of a file here, or a URL. What comes from elsewhere names no file of this machine: a remote table's
    paths stay on its own side, or below an image_root that is a folder here."""
    if path is None:
        return Reject("missing", "neither bytes nor a path (null)")
    text, root = os.fsdecode(path), origin.root
    if "://" in text:
        if not is_url(text):
            return Reject(
                "missing", f"{text.partition('://')[0]}:// is no place that images are read from; {', '.join((*STORES, *WEB))} are"
            )
        try:
            return Url(text)
        except (StorageError, ValueError) as error:
            return Reject("missing", str(error))
    if isinstance(root, Url):
        try:
            return root.below(text)
        except (StorageError, ValueError) as error:
            return Reject("missing", str(error))
    if isinstance(origin.table, Url) and (text.startswith("/") or ".." in text.split("/")):
        return Reject("missing", f"the path leads out of image_root={root}, and the table is not of this machine")
    return os.path.join(root, text)


def _read_object(url: Url, room: Callable[[int], None]) -> bytes | Reject:
    try:
        data = read_object(url, MAX_IMAGE_BYTES, room)
    except Missing as error:
        return Reject("missing", error.why)
    return data if isinstance(data, bytes) else Reject("too large", f"{data} bytes, the limit is {MAX_IMAGE_BYTES}")


def _read_file(path: str) -> bytes | Reject:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that a pipe does not hang
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return Reject("missing", "not a plain file")
            if status.st_size > MAX_IMAGE_BYTES:
                return Reject("too large", f"{status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}")
            return _read_all(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return Reject("missing", str(error.strerror))
    except ValueError as error:  # a null character in the path
        return Reject("missing", str(error))


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size + 1)
    while more := os.read(descriptor, 1 << 20):  # the system gave less than was asked for, or the file grows
        data += more
    return data


def source_name(origin: Origin, row: int, path: bytes | None) -> str:
    """A sample's name for people: a path, or a table's name and row."""
    if path is None:
        assert origin.table is not None
        return f"{origin.prefix}{origin.table.name}#{row}"
    return origin.prefix + printable(path)


def printable(path: bytes) -> str:
    """Bytes of a path as text, for people and for keys."""
    return path.decode("utf-8", "backslashreplace")
