"""An OUT in object storage: whose it is while it is packed, and how a dataset comes to lie there.

Where it stands: `pack.py` works in a local folder as ever; where OUT is a URL it puts each tar there through `keep`, and the rest through
`publish`.

    OUT/SPLIT/.packing.json     which pack writes here; goes away when dataset.json is there
    OUT/SPLIT/shards/...        tars, each put before its piece is written
    OUT/SPLIT/...               the tables, put when all tars are there, and dataset.json last

Invariants:
- nothing is written below OUT/SPLIT but by the one pack whose name stands in .packing.json, and that is only ever created;
- dataset.json is created, never replaced, so a dataset that is there stays as it is, and one without it is not finished.

Left to others: what a dataset holds, and the work that is kept to go on with.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools import dataset as fmt
from data_tools.config import PackError
from data_tools.labels import Sibling
from data_tools.storage import BLOCK, Missing, StorageError, Url, delete, entries, exists, put, put_new, read_object, sequential, walk

CLAIM = ".packing.json"
_MOST = 1 << 30  # bytes: more than a dataset.json or a classes.txt has


def header(folder: Url) -> dict[str, Any] | None:
    """dataset.json of a split, its own hash checked; None where there is none."""
    try:
        return fmt.parse_header(_read(folder / "dataset.json"), folder / "dataset.json")
    except Missing:
        return None


def splits_in(out: Url) -> list[Url]:
    """The finished splits in OUT."""
    try:
        folders, _ = entries(out)
    except Missing:
        return []
    return [out / name for name in folders if not name.startswith(".") and header(out / name) is not None]


def sibling(out: Url) -> Sibling | None:
    """What another split in OUT says of the classes."""
    for folder in splits_in(out):
        said = header(folder)
        assert said is not None
        names = fmt.parse_classes(_checked(folder, "classes.txt", said)) if "classes.txt" in said["files"] else None
        return Sibling(folder, names, said["num_classes"])
    return None


def check_free(folder: Url, ours: str | None) -> None:
    """Raises PackError where a split is there, or is another pack's than the one with our name."""
    try:
        folders, objects = entries(folder)
    except Missing:
        return
    if "dataset.json" not in objects and CLAIM in objects:
        if ours is not None and _read(folder / CLAIM) == _claim(ours):
            return
        raise PackError(f"{folder} is being packed with another --work ({folder / CLAIM}); give that one to go on, or remove {folder}")
    if folders or objects:
        raise PackError(f"{folder} exists and is not overwritten; give another OUT, or move it away")


def claim(folder: Url, ours: str) -> None:
    """Makes a split that is free ours. Raises PackError where another pack was faster."""
    if not put_new(folder / CLAIM, _claim(ours)):
        raise PackError(f"{folder} is being packed with another --work ({folder / CLAIM}); give that one to go on, or remove {folder}")


def release(folder: Url) -> None:
    """Says that nobody writes to a split any more."""
    if exists(folder / CLAIM):
        delete(folder / CLAIM)


def withdraw(folder: Url, ours: str) -> None:
    """Removes what our pack, which cannot succeed, has put; the claim goes last."""
    with suppress(Missing):
        if _read(folder / CLAIM) == _claim(ours):
            for path in walk(folder):
                if path != CLAIM:
                    delete(folder / path)
            release(folder)


def keep(tar: Path, url: Url) -> None:
    """Moves a tar to its place, for good."""
    put(url, tar)
    tar.unlink()


def lost(folder: Path, url: Url) -> str | None:
    """The name of a tar that is not in its place as the manifest in the local folder has it; None if all are."""
    there = walk(url / "shards")
    manifest = pq.read_table(folder / "manifest.parquet", columns=["name", "bytes"])
    named = zip(manifest["name"].to_pylist(), manifest["bytes"].to_pylist(), strict=True)
    return next((name for name, size in named if there.get(name.removeprefix("shards/")) != size), None)


def publish(folder: Path, url: Url) -> None:
    """Puts all that lies in a local folder beside the tars, and then dataset.json, which makes a dataset of it."""
    finished = (folder / "dataset.json").read_bytes()
    said = header(url)
    if said is None:
        for name in json.loads(finished)["files"]:
            put(url / name, folder / name)
    if not put_new(url / "dataset.json", finished):
        raise PackError(f"{url} exists and is not overwritten; give another OUT, or move it away")


def fetch(url: Url, said: dict[str, Any], folder: Path) -> Path:
    """Copies what tells of a split (not its tars and names of samples) into a local folder, checked."""
    folder.mkdir()
    for name, entry in said["files"].items():
        if not name.startswith("samples/"):
            with sequential(url / name) as there, (folder / name).open("wb") as here:
                shutil.copyfileobj(there, here, BLOCK)
            _check(fmt.file_entry(folder / name), entry, url / name)
    (folder / "dataset.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def _claim(name: str) -> bytes:
    return json.dumps({"pack": name}).encode()


def _read(url: Url) -> bytes:
    data = read_object(url, _MOST)
    assert isinstance(data, bytes)
    return data


def _checked(folder: Url, name: str, said: dict[str, Any]) -> bytes:
    data = _read(folder / name)
    _check(fmt.bytes_entry(data), said["files"][name], folder / name)
    return data


def _check(found: dict[str, Any], told: dict[str, Any], url: Url) -> None:
    if found != told:
        raise StorageError(f"{url} is not as dataset.json has it; restore it, or pack again to another OUT")
