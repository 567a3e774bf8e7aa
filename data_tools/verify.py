"""`vitscale data verify`: every byte of a dataset against the checksums that it was packed with, and what a damaged one holds.

Where it stands: `dataset.py` says what the files are; here all of them are read. A dataset in which `verify` finds nothing is bit for bit
the one whose name is its content hash. Where a tar is damaged, its samples are looked at one by one, so that one knows which are lost.

Left to others: mending (`repair.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools import dataset as fmt
from data_tools import overlay
from data_tools.dataset import Dataset, DatasetError, SampleError
from data_tools.images import decode as decode_image
from data_tools.peer_indices import DALI, ENERGON, index_file, kinds_beside, wrong_indices
from data_tools.progress import Update, no_update
from data_tools.stage import StageError
from data_tools.storage import Location, Missing, RemoteFile, Url, sequential, walk

STRANGER = "is not a file of this dataset"


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of a dataset, or with one sample in it."""

    file: str
    what: str
    sample: int | None = None
    key: str | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` looked at and found."""

    path: str
    content_hash: str
    files: int
    samples: int
    bytes: int
    decoded: int
    problems: tuple[Problem, ...]


def verify(path: Location, *, jobs: int = 0, decode: bool = False, share: float = 1.0, progress: Update = no_update) -> Report:
    """Reads a split in full, where it lies. Raises DatasetError where dataset.json itself is damaged or missing, StorageError.

    Args:
        path: a directory, or a URL. On the web, which cannot be listed, overlays and files that belong to nothing are not looked for; in
            object storage the indices of other readers are not compared.
        jobs: threads; 0 takes the cores there are.
        decode: also decode every image, as training does.
        share: of the tars that are read, drawn by their names; the tables are always read in full.
        progress: called with bytes read and bytes in all, from any thread.
    """
    if not 0 < share <= 1:
        raise DatasetError(f"share={share:g} must lie in (0, 1]; 1 reads all tars")
    header = fmt.read_header(path)
    there = _listed(path)
    problems = [problem for name, entry in sorted(header["files"].items()) if (problem := check_file(path, name, entry))]
    damaged = {problem.file for problem in problems}
    overlays, faults = _check_overlays(path, header)
    problems += faults
    tables_read = sum(entry["bytes"] for entry in header["files"].values())
    counts = {"files": len(header["files"]) + overlays, "samples": 0, "bytes": tables_read, "decoded": 0}
    if "manifest.parquet" not in damaged:
        manifest = pq.read_table(pa.BufferReader(_bytes(path / "manifest.parquet"))).to_pylist()
        chosen = [shard for shard in manifest if xxhash.xxh3_64_intdigest(shard["name"].encode()) < share * 2**64]
        indices = kinds_beside(path / shard["name"] for shard in manifest) if isinstance(path, Path) else ()
        problems += _strangers(there, header, manifest, indices if isinstance(path, Path) else (DALI, ENERGON))
        dataset = None if damaged else Dataset.open(path, overlays=(), check_shards=False)  # what is removed must be sound too
        total = tables_read + sum(shard["bytes"] for shard in chosen)
        with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
            for shard, (found, decoded) in zip(
                chosen, pool.map(lambda s: _check_shard(path, s, dataset, decode, indices), chosen), strict=True
            ):
                problems += found
                counts["files"] += 1
                counts["samples"] += shard["samples"]
                counts["bytes"] += shard["bytes"]
                counts["decoded"] += decoded
                progress(counts["bytes"], total)
    return Report(path=str(path), content_hash=header["content_hash"], problems=tuple(problems), **counts)


def check_file(path: Location, name: str, entry: dict[str, Any]) -> Problem | None:
    """What is wrong with a file that dataset.json names."""
    size = _size(path / name)
    if size is None:
        return Problem(name, "is missing")
    if size != entry["bytes"]:
        return Problem(name, f"has {size} bytes, dataset.json says {entry['bytes']}")
    if fmt.file_entry(path / name) != entry:
        return Problem(name, "does not have the SHA-256 in dataset.json")
    return None


def _size(file: Location) -> int | None:
    """None where it is missing."""
    if isinstance(file, Url):
        try:
            return RemoteFile(file).size
        except Missing:
            return None
    return file.stat().st_size if file.is_file() else None


def _bytes(file: Location) -> bytes:
    with sequential(file) as opened:
        return opened.read()


def _listed(path: Location) -> Iterable[str]:
    """All files of a dataset, as paths from its folder."""
    if isinstance(path, Url):
        return [] if path.on_web else walk(path)
    return (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink())


def _check_overlays(path: Location, header: dict[str, Any]) -> tuple[int, list[Problem]]:
    """How many files lie among the overlays, and what is wrong with them."""
    files = overlay.files_beside(path)
    problems = []
    for file in files:
        name = f"{overlay.FOLDER}/{file}"
        if not overlay.FILE_NAME.fullmatch(file):
            problems.append(Problem(name, "is no overlay by its name"))
            continue
        with TemporaryDirectory() as copies:
            try:
                here = overlay.overlay_file(path, file, Path(copies))
                for _ in overlay.read_overlay(here, header["content_hash"], header["num_samples"], header["num_classes"]):
                    pass
            except (overlay.OverlayError, StageError) as error:
                problems.append(Problem(name, str(error)))
    return len(files), problems


def _strangers(there: Iterable[str], header: dict[str, Any], manifest: list[dict[str, Any]], indices: tuple[str, ...]) -> list[Problem]:
    """Files that belong to nothing; overlays are looked at apart, and beside tars that others made there may be anything."""
    if header["made"].get("by") != fmt.BY_PACK:
        return []
    known = {"dataset.json", *header["files"], *(shard["name"] for shard in manifest)}
    known |= {index_file(Path(shard["name"]), kind).as_posix() for shard in manifest for kind in indices}
    others = (".nv-meta/", ".repairing/", ".dedup/")  # of `energon prepare`, `data repair`, `data dedup`
    return [
        Problem(name, STRANGER)
        for name in sorted(there)
        if name not in known and not name.startswith(others) and Path(name).parent != Path(overlay.FOLDER)
    ]


def _check_shard(
    path: Location, shard: dict[str, Any], dataset: Dataset | None, decode: bool, indices: tuple[str, ...]
) -> tuple[list[Problem], int]:  # fmt: skip
    """What is wrong with a tar, and how many images were decoded."""
    name = shard["name"]
    file = path.below(name) if isinstance(path, Url) else path / name
    size = _size(file)
    if size is None:
        return [Problem(name, "is missing")], 0
    problems = [Problem(name, f"has {size} bytes, the manifest says {shard['bytes']}")] if size != shard["bytes"] else []
    if not problems and fmt.tar_checksum(file) != shard["checksum"]:
        problems.append(Problem(name, "does not have the xxh3_128 in the manifest"))
    if not problems and isinstance(file, Path):  # of a damaged tar nothing can be said of its indices
        wrong = wrong_indices(file, indices)
        problems += [Problem(index_file(Path(name), kind).as_posix(), what) for kind, what in wrong.items()]
    sound = not any(problem.file == name for problem in problems)
    decoded = 0
    if dataset is not None and (not sound or decode):
        for sample in range(shard["first_sample"], shard["first_sample"] + shard["samples"]):
            try:
                image = dataset.read(sample)
            except SampleError as error:
                problems.append(Problem(name, error.reason, sample, error.key))
                continue
            if decode:
                try:
                    decode_image(image)
                    decoded += 1
                except Exception as error:  # Pillow raises nearly anything on hostile bytes
                    problems.append(Problem(name, f"does not decode: {type(error).__name__}: {error}", sample, dataset.key(sample)))
    return problems, decoded
