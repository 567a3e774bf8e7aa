"""Files of a dataset on a disk of this machine: its index, which training looks into at random, and all but the tars of one that lies in
object storage.

Where it stands: `Dataset` maps the copy of the index in place of the index where it is told a folder, or where the dataset is a URL; the
tars stay where they are (`ranges.py`).

    FOLDER/SHA-256.arrow            an index
    FOLDER/CONTENT_HASH/...         the other files of a dataset in object storage, with their names, as they are asked for

Invariants: a copy is there whole or not at all, and has the SHA-256 that it was asked for with; of processes that start at once one copies,
and others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from data_tools.durable import fsync
from data_tools.errors import UserError
from data_tools.storage import Location, Url, sequential

BLOCK = 1 << 26  # of an object as many as eight ranges, four of them at once


class StageError(UserError):
    """A copy that cannot be made."""


def default_folder() -> Path:
    """Where copies go if nobody says where: $VITSCALE_CACHE, or a folder in the user's home."""
    return Path(os.environ.get("VITSCALE_CACHE") or Path.home() / ".cache" / "vitscale")


def staged(place: Location, entry: dict[str, Any], folder: Path, *, check: bool = False) -> Path:
    """The copy of an index in `folder`; see `copied`."""
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):  # it becomes a file's name
        raise StageError(f"dataset.json says that {place} has the SHA-256 {entry['sha256']!r}, which is none; restore it")
    return copied(place, entry, folder / f"{entry['sha256']}{place.suffix}", check=check)


def copied(place: Location, entry: dict[str, Any], copy: Path, *, check: bool = False) -> Path:
    """A copy of a file, made if it is not there yet. Raises StageError, StorageError.

    Args:
        place: where it lies.
        entry: `sha256` or the first digits of it, and `bytes` where they are known.
        copy: where it goes.
        check: make it anew where the bytes of the one that is there are not those; else its size is enough.
    """
    if _is_whole(copy, entry, check):
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (copy.parent / f"{copy.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(copy, entry, check):
                _copy(place, entry, copy)
    except OSError as error:
        raise StageError(f"{place} cannot be copied to {copy.parent}: {error.strerror or error}; {_instead(place)}") from None
    return copy


def _instead(place: Location) -> str:
    return "give another stage" if isinstance(place, Url) else "give another stage, or none"


def _is_whole(copy: Path, entry: dict[str, Any], check: bool) -> bool:
    if not copy.is_file() or copy.stat().st_size != entry.get("bytes", copy.stat().st_size):
        return False
    if not check:
        return True
    with copy.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(entry["sha256"])


def _copy(place: Location, entry: dict[str, Any], copy: Path) -> None:
    for left in copy.parent.glob(f".{copy.name}.*.partial"):  # by a start that was killed; nobody else holds the lock
        left.unlink()
    free = shutil.disk_usage(copy.parent).free
    if free < entry.get("bytes", 0):
        raise StageError(f"{copy.parent} has {free:,} bytes free, and {place} has {entry['bytes']:,}; {_instead(place)}")
    beside = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.partial")
    try:
        digest = hashlib.sha256()
        with sequential(place) as source, beside.open("wb") as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if not digest.hexdigest().startswith(entry["sha256"]):
            raise StageError(f"{place} was changed: its SHA-256 is not dataset.json's; restore it, `vitscale data repair` can")
        beside.rename(copy)
        fsync(copy.parent)
    finally:
        beside.unlink(missing_ok=True)
