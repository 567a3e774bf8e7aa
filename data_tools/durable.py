"""Files and folders that are there whole or not at all, whatever ends the process or the machine."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Gives a file new contents in one step."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)


def publish_folder(hidden: Path, folder: Path) -> None:
    """Gives a finished folder its name in one step; nothing may bear it. Raises OSError."""
    for path in [*hidden.rglob("*"), hidden]:
        fsync(path)
    hidden.rename(folder)
    fsync(folder.parent)
