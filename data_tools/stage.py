"""A dataset's index on a disk of this machine: training looks into it at random, which a shared file system does not like.

Where it stands: `Dataset.open` maps the copy in place of the index where it is told a folder; the tars stay where they are.

Invariants: a copy bears its SHA-256 as its name and is there whole or not at all; of processes that start at once one copies, and others
wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from data_tools.durable import fsync
from data_tools.errors import UserError

BLOCK = 1 << 23


class StageError(UserError):
    """A copy that cannot be made."""


def staged(file: Path, entry: dict[str, Any], folder: Path) -> Path:
    """The copy of a file in `folder`, made if it is not there yet. Raises StageError.

    Args:
        entry: what dataset.json says of the file: `bytes`, `sha256`.
    """
    copy = folder / f"{entry['sha256']}{file.suffix}"
    if _is_whole(copy, entry):
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{copy.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(copy, entry):
                _copy(file, entry, copy)
    except OSError as error:
        raise StageError(f"{file} cannot be copied to {folder}: {error.strerror or error}; give another stage, or none") from None
    return copy


def _is_whole(copy: Path, entry: dict[str, Any]) -> bool:
    return copy.is_file() and copy.stat().st_size == entry["bytes"]


def _copy(file: Path, entry: dict[str, Any], copy: Path) -> None:
    for left in copy.parent.glob(f".{copy.name}.*.partial"):  # by a start that was killed; nobody else holds the lock
        left.unlink()
    free = shutil.disk_usage(copy.parent).free
    if free < entry["bytes"]:
        raise StageError(f"{copy.parent} has {free:,} bytes free, and {file} has {entry['bytes']:,}; give another stage, or none")
    beside = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.partial")
    try:
        digest = hashlib.sha256()
        with file.open("rb") as source, beside.open("wb") as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != entry["sha256"]:
            raise StageError(f"{file} was changed: its SHA-256 is not dataset.json's; restore it, `vitscale data repair` can")
        beside.rename(copy)
        fsync(copy.parent)
    finally:
        beside.unlink(missing_ok=True)
