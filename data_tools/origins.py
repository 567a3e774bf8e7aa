"""Where candidates come from (`Origin`), what is known of some of them before labels are numbers and keys unique (`Part`), and the reading
of an image that is a file of its own.

Where it stands: the readers of formats (`tables.py`, `tars.py`) and of folders bring origins and their parts, `sources.py` makes a listing
of them.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.images import MAX_IMAGE_BYTES, Reject

ROWS = 65_536  # rows turned into Python objects at a time

# What an image's own path can be at fault for. Other errors are the machine's and end the run.
PATH_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True)
class Origin:
    """One folder of class folders, or one table."""

    prefix: str  # in front of the names of its samples, where there are several sources
    root: Path  # where relative paths start
    table: Path | None = None
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


def read_image(path: str | bytes | None, root: Path) -> bytes | Reject:
    """An image that is a file of its own."""
    if path is None:
        return Reject("missing", "neither bytes nor a path (null)")
    try:
        descriptor = os.open(os.path.join(root, os.fsdecode(path)), os.O_RDONLY | os.O_NONBLOCK)  # so that a pipe does not hang
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
