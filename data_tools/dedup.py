"""`vitscale data dedup`: pictures that stand in a dataset twice, or in an evaluation set too, and their removal by an overlay.

Where it stands: reads images through `Dataset`, writes through `amend.write_overlay`; the tars stay as they are. The paper removes what its
test sets contain from what it pre-trains on (section 4.1, after Kolesnikov et al., arXiv 1912.11370).

Each image gets two perceptual hashes (PDQ, 256 bits, of the picture and of its mirror image), kept in files, so that another search decodes
nothing. Two pictures are near duplicates where at most `distance` bits differ. To find such pairs among many the bits are cut into bands,
and faiss looks up all hashes that agree with a picture's in any band but for a bit or two (Norouzi et al., arXiv 1307.2982; `bands` tells
how many, and up to which distance that misses nothing).

Invariants: of near duplicates the one with most pixels stays, then the one with the lowest number; every removed sample has a witness that
stays (or is in an evaluation set) within the distance, so no chain of small differences removes what is unlike everything left; the result
depends on the dataset and the settings alone; memory holds one block of the search and some 40 bytes a sample.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools import dataset as fmt
from data_tools.amend import keys_of, removals, write_overlay
from data_tools.dataset import Dataset, DatasetError, SampleError
from data_tools.errors import UserError
from data_tools.images import decode
from data_tools.processes import in_processes
from data_tools.progress import Update, no_update
from data_tools.storage import Location

SIDE = 128  # pixels to which a picture is squashed before it is hashed, so that its own size does not matter
BITS, BANDS = 256, 16
MAX_DISTANCE = 3 * BANDS - 1  # more would look up too many values of each band
BLOCK = 2**24  # hashes searched in at a time: some 8 GB
BATCH = 4096  # pictures looked up at a time
PROBED = 2**15  # with fewer hashes than this comparing all is faster than looking up bands

# A picture's row in the file of hashes. PDQ's quality is 0 to 100: how much there is to tell it by; NOT_READ where there is no picture.
ROW = np.dtype([("hash", np.uint8, BITS // 8), ("mirrored", np.uint8, BITS // 8), ("quality", np.uint8)])
NOT_READ = 255
IMAGES_A_PROCESS = 1_000  # fewer are not worth the start of a process


class DedupError(UserError):
    """A search that cannot be made as asked. Nothing has been removed."""


@dataclass(frozen=True)
class Found:
    """What is to go: a row a sample."""

    samples: np.ndarray
    """int64, ascending."""
    witness: np.ndarray
    """int64: the sample that it is a copy of, in `source`."""
    source: np.ndarray
    """int64: 0 is the dataset itself, n the n-th evaluation set."""
    distance: np.ndarray
    """uint8: bits that differ; 0 is not yet the same file."""
    same_file: np.ndarray
    """bool: the same bytes."""


@dataclass(frozen=True)
class Deduplicated:
    """What `dedup` looked at and found."""

    path: str
    content_hash: str
    samples: int
    """That are not removed already."""
    unreadable: int
    plain: int
    """With too little in them to be told apart from each other."""
    same_file: int
    near: int
    other_labels: int
    """Of those two, copies whose labels are not those of the one that stays."""
    leaked: dict[str, int]
    """Removed for being in an evaluation set too."""
    overlay: str | None
    """The overlay that removes them; None where there is nothing to remove, or it was not asked for."""


def dedup(
    path: Path, against: tuple[Location, ...] = (), *, inside: bool = True, distance: int = 31, min_quality: int = 50, mirror: bool = True,
    name: str = "dedup", listing: Path | None = None, dry_run: bool = False, work: Path | None = None, jobs: int = 0,
    progress: Update = no_update, block: int = BLOCK,
) -> Deduplicated:  # fmt: skip
    """Removes from a dataset what is in it twice, and what is in evaluation sets too. Raises DedupError, DatasetError.

    Args:
        against: directories, or URLs, of splits that nothing of the dataset may be in.
        inside: also look for copies inside the dataset.
        distance: bits that may differ; 31 is what PDQ's authors advise.
        min_quality: PDQ's quality; where both of two pictures have less, they are too plain for their hashes to say anything.
        mirror: a mirrored copy is a copy.
        listing: CSV or Parquet file that gets a row for each removed sample.
        dry_run: writes the listing only.
        work: folder for the hashes, which are used again by the next search; None: `.dedup` in the dataset.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise DedupError(f"distance={distance} must be in 0..{MAX_DISTANCE} of {BITS} bits; 31 is usual")
    if listing is not None and listing.suffix.lower() not in (".csv", ".parquet"):
        raise DedupError(f"list={listing} must end in .csv or .parquet")
    datasets = [Dataset.open(path), *(Dataset.open(other) for other in against)]
    if repeated := [other for other in datasets[1:] if other.content_hash == datasets[0].content_hash]:
        raise DedupError(f"{repeated[0].path} is the dataset itself; against={path} would remove all of it")
    folder = work or path / ".dedup"
    folder.mkdir(parents=True, exist_ok=True)
    rows = hash_datasets(datasets, folder, jobs, progress)
    found = Search(datasets, rows, distance, min_quality, mirror, block).run(inside)
    there = ~datasets[0].overlay.removed(np.arange(datasets[0].num_samples))
    overlay = None
    if listing is not None:
        _write_listing(listing, found, datasets)
    if len(found.samples) and not dry_run:
        overlay = write_overlay(datasets[0], name, removals(found.samples, _reasons(found, datasets)))
    quality = rows[0]["quality"][there]
    own = found.source == 0
    return Deduplicated(
        path=str(path),
        content_hash=datasets[0].content_hash,
        samples=int(there.sum()),
        unreadable=int((quality == NOT_READ).sum()),
        plain=int((quality < min_quality).sum()),
        same_file=int((own & found.same_file).sum()),
        near=int((own & ~found.same_file).sum()),
        other_labels=int((own & _other_labels(found, datasets[0])).sum()),
        leaked={str(other.path): int((found.source == number).sum()) for number, other in enumerate(datasets) if number},
        overlay=str(overlay) if overlay is not None else None,
    )


# ------------------------------------------------------------------------------------------------------------------ hashes


def perceptual_hash(image_bytes: bytes) -> tuple[bytes, bytes, int]:
    """PDQ hash of a picture and of its mirror image (32 bytes each), and its quality. Raises what decoding raises."""
    import pdqhash

    with Image.open(io.BytesIO(image_bytes)) as opened:
        if opened.format == "JPEG" and opened.mode in ("L", "RGB"):
            opened.draft("L", (2 * SIDE, 2 * SIDE))  # decodes brightness alone, at a fraction of the size: three times as fast
            grey = opened.convert("L")
        else:
            grey = decode(image_bytes).convert("L")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    (plain, quality), (mirrored, _) = (pdqhash.compute(np.repeat(of[..., None], 3, axis=2)) for of in (small, small[:, ::-1]))
    return np.packbits(plain.astype(np.uint8)).tobytes(), np.packbits(mirrored.astype(np.uint8)).tobytes(), min(int(quality), 100)


def _hashed(image_bytes: bytes) -> tuple[bytes, bytes, int] | None:
    try:
        return perceptual_hash(image_bytes)
    except Exception:  # Pillow raises nearly anything on hostile bytes; `data verify --decode` names such images
        return None


def hash_datasets(datasets: list[Dataset], folder: Path, jobs: int, progress: Update) -> list[np.ndarray]:
    """The hashes of all datasets (ROW), mapped from files in `folder`; those that are there already are not made again."""
    _need("pdqhash", "faiss")
    todo = []
    for dataset in datasets:
        sizes = {_rows_file(folder, dataset): dataset.num_samples * ROW.itemsize, _done_file(folder, dataset): len(dataset.shard_names)}
        if any(not file.is_file() or file.stat().st_size != size for file, size in sizes.items()):
            for file, size in sizes.items():
                with file.open("wb") as opened:
                    opened.truncate(size)
        done = np.fromfile(_done_file(folder, dataset), np.uint8)
        todo += [(dataset, shard) for shard in np.flatnonzero(done == 0).tolist()]
    total = sum(int(dataset.shard_sizes[shard]) for dataset, shard in todo)
    hashed = 0

    def tell(images: int, _: int) -> None:
        nonlocal hashed
        hashed += images
        progress(hashed, total)

    processes = min(jobs or len(os.sched_getaffinity(0)), max(1, total // IMAGES_A_PROCESS))
    if processes > 1:
        in_processes(processes, partial(_hash_shard, folder), todo, tell)
    else:
        for item in todo:
            _hash_shard(folder, item, lambda number: tell(1, number))
    return [np.memmap(_rows_file(folder, dataset), ROW, "r", shape=(dataset.num_samples,)) for dataset in datasets]


def _rows_file(folder: Path, dataset: Dataset) -> Path:
    return folder / f"pdq-{SIDE}-{dataset.content_hash[:16]}.rows"


def _done_file(folder: Path, dataset: Dataset) -> Path:
    return folder / f"pdq-{SIDE}-{dataset.content_hash[:16]}.done"


def _hash_shard(folder: Path, item: tuple[Dataset, int], tell: Callable[[int], None]) -> None:
    """Writes the rows of one shard's samples to their place, and then that they are there.

    A shard of which not all could be read is hashed again by the next search, as a repair may have brought it back.
    """
    dataset, shard = item
    packed = Dataset.open(dataset.path, overlays=(), check_shards=False)  # what is removed may be brought back
    first, size = int(dataset.first_samples[shard]), int(dataset.shard_sizes[shard])
    rows = np.zeros(size, ROW)
    whole = True
    for number in range(size):
        try:
            hashed = _hashed(packed.read(first + number))
        except SampleError:
            hashed, whole = None, False
        except OSError:  # the machine's fault, unless the tar is given up
            if not dataset.overlay.is_removed(first + number):
                raise
            hashed, whole = None, False
        if hashed is None:
            rows[number]["quality"] = NOT_READ
        else:
            rows[number] = np.frombuffer(hashed[0], np.uint8), np.frombuffer(hashed[1], np.uint8), hashed[2]
        tell(0)
    for file, at, data in (
        (_rows_file(folder, dataset), first * ROW.itemsize, rows.tobytes()),
        (_done_file(folder, dataset), shard, b"\1" if whole else b"\0"),
    ):
        descriptor = os.open(file, os.O_WRONLY)
        try:
            os.pwrite(descriptor, data, at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------------ search


class Search:
    """The search through hashes: who is whose copy. `run` fills one row a sample: who the witness is, in which set, how far."""

    def __init__(self, datasets: list[Dataset], rows: list[np.ndarray], distance: int, min_quality: int, mirror: bool, block: int) -> None:
        self.datasets, self.rows, self.distance, self.min_quality, self.mirror, self.block = (
            datasets,
            rows,
            distance,
            min_quality,
            mirror,
            block,
        )
        size = datasets[0].num_samples
        self.alive = ~datasets[0].overlay.removed(np.arange(size))
        self.before = self.alive.copy()
        self.witness = np.full(size, -1, dtype=np.int64)
        self.source = np.zeros(size, dtype=np.uint8)
        self.far = np.zeros(size, dtype=np.uint8)
        self.same_file = np.zeros(size, dtype=bool)

    def run(self, inside: bool) -> Found:
        """First what evaluation sets have too, then the same files, then near duplicates."""
        for number in range(1, len(self.datasets)):
            self._leaks(number)
        if inside:
            self._same_files()
            self._near()
            self._pass_on()
        samples = np.flatnonzero(self.before & ~self.alive)
        return Found(samples, self.witness[samples], self.source[samples].astype(np.int64), self.far[samples], self.same_file[samples])

    def _leaks(self, number: int) -> None:
        """Marks what the n-th evaluation set has too."""
        other, rows = self.datasets[number], self.rows[number]
        there = ~other.overlay.removed(np.arange(other.num_samples))
        telling, mine_telling = self._telling(rows), self._telling(self.rows[0])
        read, mine_read = rows["quality"] != NOT_READ, self.rows[0]["quality"] != NOT_READ
        for indexed, asked in ((there & read, mine_telling), (there & telling, mine_read & ~mine_telling)):
            candidates = np.flatnonzero(indexed)
            for start in range(0, len(candidates), self.block):
                some = candidates[start : start + self.block]
                index = _index(rows["hash"][some], self.distance)
                for batch in self._batches(np.flatnonzero(asked & self.alive)):
                    match, far = self._nearest(index, batch)
                    found = match >= 0
                    self._remove(batch[found], some[match[found]], number, far[found])
        mine, theirs = _files(self.datasets[0]), _files(other)
        order = np.flatnonzero(there)
        order = order[np.argsort(theirs[order], kind="stable")]
        at = order[np.minimum(np.searchsorted(theirs[order], mine), max(len(order) - 1, 0))] if len(order) else np.zeros(0, np.int64)
        same = np.flatnonzero(theirs[at] == mine) if len(order) else at
        same = same[self.alive[same] | (self.source[same] == number)]
        alike = (self.rows[0]["hash"][same] == rows["hash"][at[same]]).all(axis=1)
        damaged = (self.rows[0]["quality"][same] == NOT_READ) | (rows["quality"][at[same]] == NOT_READ)  # whose file is known all the same
        same = same[alike | damaged]
        self._remove(same, at[same], number, np.zeros(len(same), np.uint8), same_file=True)

    def _same_files(self) -> None:
        files = _files(self.datasets[0])
        order = np.flatnonzero(self.alive)
        order = order[np.argsort(files[order], kind="stable")]  # the lowest number first among the same
        again = np.zeros(len(order), dtype=bool)
        again[1:] = files[order[1:]] == files[order[:-1]]
        again[1:] &= (self.rows[0]["hash"][order[1:]] == self.rows[0]["hash"][order[:-1]]).all(axis=1)
        firsts = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
        self._remove(order[again], order[firsts[again]], 0, np.zeros(int(again.sum()), np.uint8), same_file=True)

    def _near(self) -> None:
        """Goes through the samples from the largest picture to the smallest; one that is like none of those kept is kept."""
        telling = self._telling(self.rows[0])
        order = np.flatnonzero(self.alive & telling)
        order = order[np.argsort(-_pixels(self.datasets[0])[order], kind="stable")]
        plain = np.flatnonzero(self.alive & ~telling & (self.rows[0]["quality"] != NOT_READ))  # copies of others, but nobody's originals
        for start in range(0, len(order), self.block):
            kept: list[np.ndarray] = []
            index = _index(np.zeros((0, BITS // 8), np.uint8), self.distance, size=min(self.block, len(order)))
            for batch in self._batches(order[start : start + self.block]):
                new = batch[self.alive[batch]]
                new = self._drop_known(index, new, kept)
                new = self._drop_inside(new)
                index.add(np.ascontiguousarray(self.rows[0]["hash"][new]))
                kept.append(new)
            for batch in self._batches(np.concatenate([order[start + self.block :], plain])):
                self._drop_known(index, batch[self.alive[batch]], kept)

    def _pass_on(self) -> None:
        """Gives copies of a file that is gone itself by now the witness of that file, which stays."""
        copies = np.flatnonzero(self.before & ~self.alive & self.same_file & (self.source == 0))
        copies = copies[~self.alive[self.witness[copies]]]
        file = self.witness[copies]
        self._remove(copies, self.witness[file], 0, self.far[file])

    def _drop_known(self, index: Any, batch: np.ndarray, kept: list[np.ndarray]) -> np.ndarray:
        """Removes from a batch what is like one of those kept, and returns the rest."""
        if not kept or not len(batch):
            return batch
        match, far = self._nearest(index, batch)
        found = match >= 0
        self._remove(batch[found], np.concatenate(kept)[match[found]], 0, far[found])
        return batch[~found]

    def _drop_inside(self, batch: np.ndarray) -> np.ndarray:
        """Removes from a batch what is like one before it that stays, and returns the rest."""
        if len(batch) < 2:
            return batch
        index = _index(self.rows[0]["hash"][batch], self.distance, size=0)
        stays = np.ones(len(batch), dtype=bool)
        edges: dict[int, list[tuple[int, int]]] = {}
        for queries in self._queries(batch):
            lims, distances, matches = index.range_search(queries, self.distance + 1)
            owner = np.repeat(np.arange(len(batch)), np.diff(lims).astype(np.int64))
            earlier = matches < owner
            for late, far, early in zip(owner[earlier].tolist(), distances[earlier].tolist(), matches[earlier].tolist(), strict=True):
                edges.setdefault(late, []).append((int(far), early))
        for late in sorted(edges):
            witnesses = [(far, early) for far, early in edges[late] if stays[early]]
            if witnesses:
                far, early = min(witnesses)
                stays[late] = False
                self._remove(batch[late : late + 1], batch[early : early + 1], 0, np.array([far], np.uint8))
        return batch[stays]

    def _nearest(self, index: Any, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a batch the nearest of those in the index (place, or -1) and how far it is; the first of equally near ones."""
        match, far = np.full(len(batch), -1, dtype=np.int64), np.full(len(batch), 255, dtype=np.uint8)
        for queries in self._queries(batch):
            lims, distances, matches = index.range_search(queries, self.distance + 1)
            owner = np.repeat(np.arange(len(batch)), np.diff(lims).astype(np.int64))
            order = np.lexsort((matches, distances, owner))
            first = np.ones(len(order), dtype=bool)
            first[1:] = owner[order[1:]] != owner[order[:-1]]
            best = order[first]
            better = (distances[best] < far[owner[best]]) | ((distances[best] == far[owner[best]]) & (matches[best] < match[owner[best]]))
            best = best[better]
            match[owner[best]], far[owner[best]] = matches[best], distances[best].astype(np.uint8)
        return match, far

    def _queries(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        for name in ("hash", "mirrored") if self.mirror else ("hash",):
            yield np.ascontiguousarray(self.rows[0][name][batch])

    def _batches(self, order: np.ndarray) -> Iterator[np.ndarray]:
        yield from (order[start : start + BATCH] for start in range(0, len(order), BATCH))

    def _telling(self, rows: np.ndarray) -> np.ndarray:
        """Whether there is enough in each picture to tell others by it."""
        telling: np.ndarray = (rows["quality"] >= self.min_quality) & (rows["quality"] != NOT_READ)
        return telling

    def _remove(self, samples: np.ndarray, witness: np.ndarray, source: int, far: np.ndarray, *, same_file: bool = False) -> None:
        self.alive[samples] = False
        self.witness[samples], self.source[samples], self.far[samples], self.same_file[samples] = witness, source, far, same_file


def bands(size: int, distance: int) -> tuple[int, int, int]:
    """Number of bands, bits of each, and bits that may differ in one, for a search among `size` hashes.

    A band has about as many values as there are hashes, so that few have the same by chance. Of bands * (flips + 1) - 1 differing bits one
    band has at most `flips`, so up to that distance nothing is missed: 31 up to 65,536 hashes, 19 at 16 M; of pairs further apart some are
    (`benchmarks/dedup.py` measures how many).
    """
    bits = max(BITS // BANDS, math.ceil(math.log2(max(size, 2))))
    return BITS // bits, bits, max(1, distance // BANDS)


def _index(hashes: np.ndarray, distance: int, size: int | None = None) -> Any:
    """A faiss index of hashes, for about `size` of them (None: those given), whose range_search gives those below a distance."""
    import faiss

    index: Any = faiss.IndexBinaryFlat(BITS)
    if (size := len(hashes) if size is None else size) > PROBED:
        count, bits, flips = bands(size, distance)
        index = faiss.IndexBinaryMultiHash(BITS, count, bits)
        index.nflip = flips
    index.add(np.ascontiguousarray(hashes))
    return index


def _files(dataset: Dataset) -> np.ndarray:
    """The hash of each sample's bytes (uint64); among 303 M two are the same by chance once in 400 times, so PDQ's is looked at too."""
    files = np.zeros(dataset.num_samples, np.uint64)
    for first, hashes in dataset.hash_batches():
        files[first : first + len(hashes)] = hashes
    return files


def _pixels(dataset: Dataset) -> np.ndarray:
    """How many pixels each sample has."""
    pixels = np.zeros(dataset.num_samples, dtype=np.int64)
    first = 0
    for number in range(0, len(dataset.shard_names), fmt.SHARDS_PER_FOLDER):
        with pq.ParquetFile(dataset.table(fmt.samples_name(number))) as file:
            for batch in file.iter_batches(columns=["width", "height"]):
                pixels[first : first + len(batch)] = batch["width"].to_numpy().astype(np.int64) * batch["height"].to_numpy()
                first += len(batch)
    return pixels


# ------------------------------------------------------------------------------------------------------------------ what is told


def _other_labels(found: Found, dataset: Dataset) -> np.ndarray:
    """Whether the labels of each sample are others than its witness's (bool); of leaks not looked at."""
    other = np.zeros(len(found.samples), dtype=bool)
    own = np.flatnonzero(found.source == 0)
    for start in range(0, len(own), BATCH):
        some = own[start : start + BATCH]
        mine, its = (np.sort(dataset.labels(of[some])[0], axis=1) for of in (found.samples, found.witness))
        other[some] = (mine != its).any(axis=1)
    return other


def _witness_keys(found: Found, datasets: list[Dataset]) -> pa.Array:
    keys = np.empty(len(found.samples), dtype=object)
    for number, dataset in enumerate(datasets):
        of_it = found.source == number
        keys[of_it] = keys_of(dataset, found.witness[of_it]).to_pylist()
    return pa.array(keys, pa.string())


def _reasons(found: Found, datasets: list[Dataset]) -> pa.Array:
    names = ["", *(f" in {dataset.name}/{dataset.split}" for dataset in datasets[1:])]
    return pa.array(
        [
            f"{'same file as' if same else 'near duplicate of'} {key}{names[source]}" + ("" if same else f", {far} bits of {BITS} differ")
            for key, source, far, same in zip(
                _witness_keys(found, datasets).to_pylist(),
                found.source.tolist(),
                found.distance.tolist(),
                found.same_file.tolist(),
                strict=True,
            )
        ],
        pa.string(),
    )


def _write_listing(file: Path, found: Found, datasets: list[Dataset]) -> None:
    """The removals as a table that `vitscale data overlay` takes, perhaps after a person has struck some out."""
    import pyarrow.csv

    sources = pa.array([str(dataset.path) for dataset in datasets]).take(pa.array(found.source))
    table = pa.table(
        {
            "key": keys_of(datasets[0], found.samples),
            "removed": pa.array(np.ones(len(found.samples), dtype=bool)),
            "reason": _reasons(found, datasets),
            "copy_of": _witness_keys(found, datasets),
            "dataset": sources,
            "distance": found.distance,
            "same_file": found.same_file,
            "other_labels": _other_labels(found, datasets[0]),
        }
    )
    beside = file.with_name(f".{file.name}.partial")
    try:
        if file.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(table, beside)
        else:
            pq.write_table(table, beside, compression="zstd")
        beside.replace(file)
    except OSError as error:
        raise DedupError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _need(*packages: str) -> None:
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DatasetError(f"{package} is not installed; `pip install 'vitscale[dedup]'` brings it")
