"""Files and folders that are there whole or not at all, whatever ends the process or the machine."""

import os
from collections.abc import Mapping
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(beside: Path, file: Path) -> None:
    """Gives a finished file, which lies beside, its name, in place of what bears it."""
    fsync(beside)
    beside.rename(file)
    fsync(file.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Gives a file new contents in one step."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        if isinstance(content, bytes):
            beside.write_bytes(content)
        else:
            beside.write_text(content, encoding="utf-8")
        fsync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def publish_folder(hidden: Path, folder: Path) -> None:
    """Gives a finished folder its name in one step; nothing may bear it. Raises OSError."""
    publish_folders({hidden: folder})


def publish_folders(names: Mapping[Path, Path]) -> None:
    """Gives finished folders their names, all or none of them; what takes long is done before the first. Raises OSError."""
    for hidden in names:
        for path in [*hidden.rglob("*"), hidden]:
            fsync(path)
    named: list[Path] = []
    try:
        for hidden, folder in names.items():
            hidden.rename(folder)
            named.append(hidden)
    except BaseException:
        for hidden in named:
            names[hidden].rename(hidden)
        raise
    for folder in {folder.parent for folder in names.values()}:
        fsync(folder)
