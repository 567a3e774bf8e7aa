"""The dataset directory: its schemas, its errors, and `Dataset`, which reads it.

Where it stands: `assemble.py` writes what this module describes, and `repair.py` writes it again; the stream of `vitscale` and whatever
looks at a dataset read it through `Dataset`.

Invariants:
- a sample is named by its number: 0..num_samples-1, shards in manifest order, samples in the order of the tar;
- `dataset.json` is written last and holds the hash of every other file (the tars' through `manifest.parquet`) and of
  itself, so one string, `content_hash`, names the whole directory;
- no image leaves `read` without its xxh3_64 having been compared;
- nothing here grows with the number of samples, but for a bit a sample where an overlay removes any: the index is memory-mapped, keys are
  read a shard at a time.

Left to others: decoding, the order of samples, what to do about a `SampleError`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools.cache import Cache
from data_tools.errors import UserError
from data_tools.holdout import Part
from data_tools.overlay import LabelLists, Overlay, overlay_file, overlay_names, read_overlays
from data_tools.ranges import TarRanges
from data_tools.stage import copied, default_folder, staged
from data_tools.storage import Location, Missing, RemoteFile, Url, location, read_object, sequential, walk

FORMAT = "vitscale-dataset"
FORMAT_VERSION = 1
BY_PACK, BY_INDEX = "vitscale pack", "vitscale data index"  # who made a dataset; `made.by` in dataset.json
SHARDS_PER_FOLDER = 1000
_FRESH_READS = 3  # of bytes that came from far away with another hash, before they are taken for damaged where they lie
HASHED = ("manifest.parquet", "classes.txt")  # whenever a dataset is opened
MOST_HEADER = 1 << 28  # bytes; more than a dataset.json has

INDEX_SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),  # of the image's bytes in its tar
        pa.field("size", pa.int32(), nullable=False),
        pa.field("hash", pa.uint64(), nullable=False),  # xxh3_64 of the image's bytes
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),  # as long as labels, or empty: all 1
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # path from the dataset's folder, with slashes
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("checksum", pa.string(), nullable=False),  # xxh3_128 of the whole tar, hexadecimal
        pa.field("first_sample", pa.int64(), nullable=False),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("hash", pa.uint64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
REJECTS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # one of a few, for counting
        pa.field("detail", pa.string(), nullable=False),  # free text, for a person
    ]
)


class DatasetError(UserError):
    """A directory that is not a dataset, or one whose files do not agree with each other."""


class SampleError(Exception):
    """One sample whose image cannot be had. The dataset's other samples are still good."""

    def __init__(self, sample: int, shard: str, key: str, reason: str) -> None:
        super().__init__(sample, shard, key, reason)
        self.sample, self.shard, self.key, self.reason = sample, shard, key, reason

    def __str__(self) -> str:
        return f"sample {self.sample} (key {self.key}, {self.shard}): {self.reason}"


class RemovedError(SampleError):
    """One sample that an overlay removes, so that nothing shall see its image."""


@dataclass(frozen=True)
class IndexBatch:
    """What index and overlays say of some samples; the labels of the i-th of them are `labels[starts[i] : starts[i + 1]]`."""

    samples: np.ndarray  # int64 (n,), ascending
    sizes: np.ndarray  # int32 (n,), bytes of the image
    starts: np.ndarray  # int64 (n + 1,), from 0
    labels: np.ndarray  # int32 (m,)
    scores: np.ndarray  # float32 (m,), 1 where the sample has none
    scored: np.ndarray  # bool (m,), whether it has


class Place(NamedTuple):
    """Where an image lies, by the index; nothing of it is checked, so an index that is damaged may say anything."""

    shard: int
    start: int
    """Of the image's bytes in its tar."""
    end: int
    hash: int
    """xxh3_64 of the image's bytes."""


class Located(NamedTuple):
    """Where images lie, as `Place` has it of one."""

    shards: np.ndarray  # int64 (n,)
    offsets: np.ndarray  # int64 (n,), of the image's bytes in its tar
    sizes: np.ndarray  # int64 (n,)
    hashes: np.ndarray  # uint64 (n,), xxh3_64 of the image's bytes

    def place(self, row: int) -> Place:
        """Where the row-th of them lies."""
        start = int(self.offsets[row])
        return Place(int(self.shards[row]), start, start + int(self.sizes[row]), int(self.hashes[row]))


@dataclass(frozen=True)
class SampleRow:
    """What `samples/*.parquet` says of a sample."""

    key: str
    width: int
    height: int
    source: str


def shard_name(split: str, shard: int) -> str:
    """The tar's path from the dataset's folder."""
    return f"shards/{shard // SHARDS_PER_FOLDER:03d}/{split}-{shard:06d}.tar"


def samples_name(shard: int) -> str:
    """The file of `samples/` that holds this shard's rows: one row group a shard."""
    return f"samples/{shard // SHARDS_PER_FOLDER:03d}.parquet"


def header_hash(header: dict[str, Any]) -> str:
    """The content hash: SHA-256 over dataset.json without the field itself, in canonical form."""
    rest = {name: value for name, value in header.items() if name != "content_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_entry(path: Location) -> dict[str, Any]:
    """What dataset.json says of one file."""
    digest = hashlib.sha256()
    size = 0
    with sequential(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def bytes_entry(data: bytes) -> dict[str, Any]:
    """The same of a file's bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def tar_checksum(tar: Location) -> str:
    """What the manifest says of a tar's bytes: their xxh3_128, hexadecimal."""
    digest = xxhash.xxh3_128()
    with sequential(tar) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def splits_in(path: Path) -> list[Path]:
    """The dataset directories right below `path`; what a killed `pack` left has a hidden name."""
    return sorted(file.parent for file in path.glob("*/dataset.json") if not file.parent.name.startswith("."))


def read_header(path: Location) -> dict[str, Any]:
    """dataset.json of one split, its own hash checked."""
    if isinstance(path, Url):
        try:
            return parse_header(_small_object(path / "dataset.json"), path / "dataset.json")
        except Missing as error:
            raise DatasetError(f"{path} is not a dataset: {error}; give what `vitscale pack` wrote there") from None
    check_on_disk(path)
    file = path / "dataset.json"
    if not path.exists():
        raise DatasetError(f"{path} does not exist; a dataset is a directory that `vitscale pack` wrote")
    if not file.is_file():
        splits = ", ".join(str(split) for split in splits_in(path))
        hint = f"open one of its splits: {splits}" if splits else f"`vitscale pack {path} OUT` makes one of images or tables in it"
        raise DatasetError(f"{path} is not a dataset: it has no dataset.json; {hint}")
    return parse_header(file.read_bytes(), file)


def check_on_disk(path: Location) -> Path:
    """The path of a dataset that is to be changed. Raises DatasetError for a URL, also for one that was taken for a path."""
    if url := re.match(r"([a-z0-9]+):/+(?=[^/])", str(path)):  # a Path has one slash left
        place = f"{url[1]}://{str(path)[url.end() :]}"
        raise DatasetError(f"{place} is not changed where it is; copy it to a disk, as with `aws s3 sync {place} DIR`, and give that")
    assert isinstance(path, Path)
    return path


def _small_object(url: Url) -> bytes:
    data = read_object(url, MOST_HEADER)
    if isinstance(data, int):
        raise DatasetError(f"{url} has {data:,} bytes, more than any dataset.json; give what `vitscale pack` wrote there")
    return data


def parse_header(data: bytes, file: Location) -> dict[str, Any]:
    """A dataset.json that lies in `file`, its own hash checked."""
    try:
        header = json.loads(data)
    except ValueError as error:
        raise DatasetError(f"{file} is damaged: {error}; restore it or pack again") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DatasetError(f'{file} does not say "format": "{FORMAT}"; give a directory that `vitscale pack` wrote')
    if header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version")
        raise DatasetError(f"{file} has format_version {version}; this program reads {FORMAT_VERSION}")
    if header.get("content_hash") != header_hash(header):
        raise DatasetError(f"{file} was changed: its content_hash does not fit it; restore it or pack again")
    return header


class _Column:
    """A column of fixed width over all record batches of a mapped index, gathered from in one step however many batches there are."""

    def __init__(self, file: Path, mapped: pa.Buffer, batches: list[pa.RecordBatch], name: str) -> None:
        dtype = np.dtype(INDEX_SCHEMA.field(name).type.to_pandas_dtype())
        self._values = np.frombuffer(mapped, dtype, count=mapped.size // dtype.itemsize)
        starts = np.zeros(len(batches), dtype=np.int64)  # of each batch's rows, counted in values from the start of the file
        for number, batch in enumerate(batches):
            column = batch.column(name)
            if len(column):
                place = column.buffers()[1].address - mapped.address + column.offset * dtype.itemsize
                starts[number], odd = divmod(place, dtype.itemsize)
                if odd or not 0 <= place <= mapped.size - len(column) * dtype.itemsize:
                    raise DatasetError(f"{file} is compressed or damaged, and cannot be mapped; restore it or pack again")
        self._starts = starts

    def take(self, batches: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The values in some rows of some batches."""
        values: np.ndarray = self._values[self._starts[batches] + rows]
        return values


class Dataset:
    """One split, open for reading. Safe for threads, for `fork` (where nothing lies in object storage: storage.py), and for `pickle` (which
    opens it anew from its path).

    `path` is where it lies, a folder or a URL. `name, split, num_samples, num_classes, class_names, content_hash, max_labels` are
    dataset.json's; `shard_names` and `shard_sizes` (int64, samples a shard) and `first_samples` (int64) are the manifest's. `overlay` is
    what the overlays in use say; labels are given as they say, and a sample that they remove is not read. Opened as one of the two `Part`s
    that a held-out share makes, it keeps its numbering, and what is in the other counts as removed.
    """

    def __init__(
        self, path: Location, header: dict[str, Any], overlays: tuple[str, ...] | None = None, stage: Path | None = None,
        cache: Cache | None = None, check_index: bool = False, part: Part | None = None,
    ) -> None:  # fmt: skip
        """For `open`, which has checked the files."""
        self.path = path
        self._stage, self._cache, self._part = stage, cache, part
        self._entries: dict[str, dict[str, Any]] = header["files"]
        copies = stage or default_folder()
        self._folder = copies / header["content_hash"][:16] if isinstance(path, Url) else path  # of all files but index and tars
        self.name: str = header["name"]
        self.split: str = header["split"]
        self.num_samples: int = header["num_samples"]
        self.num_classes: int = header["num_classes"]
        self.max_labels: int = header["max_labels"]
        self.content_hash: str = header["content_hash"]
        self.class_names = _read_classes(self.table("classes.txt")) if "classes.txt" in self._entries else None
        manifest = pq.read_table(self.table("manifest.parquet"))
        self.shard_names: tuple[str, ...] = tuple(manifest["name"].to_pylist())
        self.shard_sizes: np.ndarray = manifest["samples"].to_numpy()
        self.shard_bytes: np.ndarray = manifest["bytes"].to_numpy()
        self.first_samples: np.ndarray = manifest["first_sample"].to_numpy()
        # The mapped index as numpy views, a few hundred record batches at most.
        if stage is None and isinstance(path, Path):
            index = path / "index.arrow"
        else:
            index = staged(path / "index.arrow", self._entries["index.arrow"], copies, check=check_index)
        mapped = pa.memory_map(str(index)).read_buffer()
        reader = pa.ipc.open_file(mapped)
        if not reader.schema.equals(INDEX_SCHEMA):
            raise DatasetError(f"{path / 'index.arrow'} has columns {reader.schema.names}, not {INDEX_SCHEMA.names}")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._batches = [_views(batch) for batch in batches]
        self._columns = {name: _Column(index, mapped, batches, name) for name in ("offset", "size", "hash")}
        rows = [len(batch["offset"]) for batch in self._batches]
        if sum(rows) != self.num_samples or int(self.shard_sizes.sum()) != self.num_samples:
            raise DatasetError(
                f"{path}: dataset.json says {self.num_samples} samples, index.arrow {sum(rows)}, manifest.parquet "
                f"{self.shard_sizes.sum()}; restore the files or pack again"
            )
        self._batch_starts = np.cumsum([0, *rows[:-1]])
        names = overlay_names(path) if overlays is None else overlays
        for name in names:
            overlay_file(path, name, self._folder)
        self.overlay: Overlay = read_overlays(self._folder, names, self.content_hash, self.num_samples, self.num_classes)
        if part:
            self.overlay = self.overlay.within(part.outside(self.hash_batches(), self.num_samples))
        self.max_labels = max(self.max_labels, int(np.diff(self.overlay.lists.label_starts).max(initial=0)))
        self._tars = TarRanges(path, self.shard_names, self.shard_bytes, self.content_hash, cache)
        self._keys = functools.lru_cache(16)(_read_keys)

    @classmethod
    def open_checked(
        cls, path: str | Location, *, stage: Path | None = None, cache: Cache | None = None, check_shards: bool = True,
        part: Part | None = None,
    ) -> Dataset:  # fmt: skip
        """Opens a split with its labels known to be as they were packed, where hashing the index takes seconds (below 1 GiB)."""
        path = location(str(path))
        index = read_header(path)["files"]["index.arrow"]
        return cls.open(path, stage=stage, cache=cache, check_index=index["bytes"] < 2**30, check_shards=check_shards, part=part)

    @classmethod
    def open(
        cls, path: str | Location, *, overlays: tuple[str, ...] | None = None, stage: Path | None = None, cache: Cache | None = None,
        check_index: bool = False, check_shards: bool = True, part: Part | None = None,
    ) -> Dataset:  # fmt: skip
        """Opens a split where it lies: a directory, or a URL (s3://, gs://, az://, https://).

        Raises DatasetError, OverlayError, StageError, StorageError.

        `overlays` are the names of those to use, as `overlay.names` has them; None takes all there are (on the web, where nothing can be
        listed, none), () gives it as it was packed. `stage` is a folder on this machine's own disk that the index is copied to, if it is
        not there yet, and mapped from; of a URL all files but the tars go there, when they are needed (None: `stage.default_folder`).
        Tars are read through `cache`. Of a `part` all other samples count as removed; to tell which, all hashes of the index are read.

        Always checked: dataset.json, the hashes of manifest.parquet and classes.txt, and the sizes of all other files; what is copied is
        hashed then. `check_index` also hashes index.arrow and samples/ (of a URL: the copy of the index), over 10 GB at 300 M samples, so
        not by default; a damaged offset or hash in the index is found by `read` in any case, a damaged label only here.
        `check_shards=False` spares a `stat` a tar, or a listing of the bucket.
        """
        path = location(str(path))
        header = read_header(path)
        there = walk(path) if isinstance(path, Url) and check_shards and not path.on_web else None
        for name, entry in header["files"].items():
            size = _size(path, name, there, entry["bytes"])
            if size != entry["bytes"]:
                found = f"has {size} bytes" if size is not None else "is missing"
                raise DatasetError(f"{path / name} {found}, dataset.json says {entry['bytes']}; restore it or pack again")
            if isinstance(path, Path) and (check_index or name in HASHED) and file_entry(path / name) != entry:
                raise DatasetError(f"{path / name} was changed: its SHA-256 is not dataset.json's; restore it or pack again")
        try:
            dataset = cls(path, header, overlays, stage, cache, check_index, part)
        except UserError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # all of which pyarrow raises on damaged bytes
            raise DatasetError(f"{path} cannot be read: {error}; run again with check_index to find the file") from None
        if check_shards:
            dataset._check_shards(there)
        return dataset

    def table(self, name: str) -> Path:
        """A file of the dataset that is no tar, on this machine: where the dataset is a URL, a copy, made now if it is not there yet."""
        if isinstance(self.path, Path):
            return self.path / name
        return copied(self.path / name, self._entries[name], self._folder / name, check=name in HASHED)

    @property
    def is_local(self) -> bool:
        """Whether its tars lie in a file system of this machine, and not in object storage."""
        return not isinstance(self.path, Url)

    @property
    def path_hides_overlays(self) -> bool:
        """Whether it lies where nothing can be listed, so that overlays are not seen."""
        return isinstance(self.path, Url) and self.path.on_web

    @property
    def folder(self) -> Path:
        """Where it lies, for who changes it there. Raises DatasetError where that is object storage."""
        return check_on_disk(self.path)

    def locate(self, samples: np.ndarray) -> Located:
        """Where the images of n samples lie (int64), over a million of them a second; the numbers may be in any order.

        Removed samples too. Raises IndexError for a number that is none.
        """
        samples = self._in_range(samples)
        shards = np.searchsorted(self.first_samples, samples, side="right") - 1  # "right" passes over empty shards
        batches = np.searchsorted(self._batch_starts, samples, side="right") - 1
        rows = samples - self._batch_starts[batches]
        offsets, sizes, hashes = (self._columns[name].take(batches, rows) for name in ("offset", "size", "hash"))
        return Located(shards, offsets, sizes.astype(np.int64), hashes)

    def read_range(self, shard: int, start: int, end: int, *, fresh: bool = False) -> bytes:
        """The bytes [start, end) of a tar, or as many of them as there are; nothing is known of them. Raises OSError, StorageError. Safe
        for threads.

        What does not have the index's hash may have been spoiled on its way, or in the cache: `fresh` reads past that. (`read` does.)
        """
        return self._tars.read(shard, start, end, fresh=fresh)

    def read(self, sample: int) -> bytes:
        """The image's bytes as they were packed. Raises SampleError where they are damaged or removed, OSError and StorageError."""
        self._check_sample(sample)
        if self.overlay.is_removed(sample):
            raise RemovedError(sample, self.shard_of(sample), self.key_or_not(sample), "an overlay removes it")
        place = self.locate(np.array([sample])).place(0)
        data = self.read_range(place.shard, place.start, place.end)  # an OSError is the machine's, not the sample's, and goes on up
        return bytes(self.checked(sample, data, place))

    def checked(self, sample: int, data: bytes | memoryview, place: Place) -> bytes | memoryview:
        """The sample's bytes as they were packed: `data`, or what is there where `data` was spoiled on its way or in the cache.

        Raises SampleError where its bytes are damaged, OSError and StorageError.
        """
        start, size = place.start, place.end - place.start
        if not (start >= 0 and size >= 0):
            raise self._sample_error(sample, f"the index says offset {start} and size {size}")
        for fresh_reads in range(1 + (0 if self.is_local and self._cache is None else _FRESH_READS)):
            if fresh_reads:  # the shard is asked of the sample: the place's may be counted through several datasets
                data = self.read_range(self._shard_number(sample), start, place.end, fresh=True)
            if len(data) == size and xxhash.xxh3_64_intdigest(data) == place.hash:
                return data
        if len(data) != size:
            raise self._sample_error(sample, f"{len(data)} bytes at offset {start} where the index says {size}")
        raise self._sample_error(sample, f"the {size} bytes at offset {start} do not have the index's xxh3_64")

    def labels(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and scores of n samples, each (n, max_labels): int32 padded with -1, and float32 padded with 0.

        A label without a score has score 1.
        """
        samples = self._in_range(samples)
        labels = np.full((len(samples), self.max_labels), -1, dtype=np.int32)
        scores = np.zeros((len(samples), self.max_labels), dtype=np.float32)
        changed, rows = self.overlay.rows(samples)
        as_packed = np.ones(len(samples), dtype=bool)
        as_packed[changed] = False
        batch_of = np.searchsorted(self._batch_starts, samples, side="right") - 1
        damaged = f"{self.path / 'index.arrow'} is damaged, as `vitscale data verify` tells: "
        for number in np.unique(batch_of[as_packed]):
            wanted = np.flatnonzero((batch_of == number) & as_packed)
            try:
                _fill(labels, scores, wanted, _lists(self._batches[number]), samples[wanted] - self._batch_starts[number])
            except (IndexError, ValueError) as error:
                raise DatasetError(f"{damaged}its lists of labels do not fit ({error}); restore it") from None
        _fill(labels, scores, changed, self.overlay.lists, rows)
        if labels.size and not -1 <= labels.min() <= labels.max() < self.num_classes:
            raise DatasetError(f"{damaged}it has labels beyond its {self.num_classes} classes; restore it")
        return labels, scores

    def hash_batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """The xxh3_64 of all images' bytes, of some hundred thousand samples at a time, each time with the first one's number."""
        for first, batch in zip(self._batch_starts.tolist(), self._batches, strict=True):
            yield first, batch["hash"]

    def index_batches(self, rows: int = 2**17) -> Iterator[IndexBatch]:
        """All samples that are not removed, in order, at most `rows` at a time. Raises DatasetError where the index is damaged."""
        for first, batch in zip(self._batch_starts.tolist(), self._batches, strict=True):
            for start in range(0, len(batch["size"]), rows):
                stretch = slice(start, min(start + rows, len(batch["size"])))
                yield self._index_batch(first + start, batch, stretch)

    def _index_batch(self, first_sample: int, batch: dict[str, np.ndarray], rows: slice) -> IndexBatch:
        sizes, lists = batch["size"][rows], self._checked_lists(first_sample, batch, rows)
        samples = np.arange(first_sample, first_sample + len(sizes))
        changed, of_overlay = self.overlay.rows(samples)
        if len(changed):
            places = np.arange(len(samples))
            places[changed] = len(samples) + np.arange(len(changed))
            lists = lists.append(self.overlay.lists.take(of_overlay)).take(places)
        if self.overlay.bits is not None:
            kept = np.flatnonzero(~self.overlay.removed(samples))
            samples, sizes, lists = samples[kept], sizes[kept], lists.take(kept)
        scores = np.ones(len(lists.labels), np.float32)
        scored = np.repeat(np.diff(lists.score_starts) > 0, np.diff(lists.label_starts))
        scores[scored] = lists.scores
        return IndexBatch(samples, sizes, lists.label_starts, lists.labels, scores, scored)

    def _checked_lists(self, first_sample: int, batch: dict[str, np.ndarray], rows: slice) -> LabelLists:
        label_starts, score_starts = (
            batch[name][rows.start : rows.stop + 1].astype(np.int64) for name in ("labels_starts", "scores_starts")
        )
        labels = batch["labels"][label_starts[0] : label_starts[-1]]
        counts, given = np.diff(label_starts), np.diff(score_starts)
        damaged = f"{self.path / 'index.arrow'} is damaged at samples {first_sample} and after: "
        if batch["size"][rows].min() < 0:
            raise DatasetError(f"{damaged}a size is negative; restore it or pack again")
        if not (counts.min() >= 0 and counts.max() <= self.max_labels) or ((given != counts) & (given != 0)).any():
            raise DatasetError(
                f"{damaged}not every sample has 0 to {self.max_labels} labels, and a score for each or none; restore it or pack again"
            )
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise DatasetError(f"{damaged}labels {labels.min()} to {labels.max()}, of {self.num_classes} classes; restore it or pack again")
        scores = batch["scores"][score_starts[0] : score_starts[-1]]
        return LabelLists(label_starts - label_starts[0], labels, score_starts - score_starts[0], scores)

    @property
    def num_kept(self) -> int:
        """How many samples no overlay removes, in the part in use."""
        return self.num_samples - self.overlay.num_removed - self.overlay.num_outside

    def shard_counts(self) -> np.ndarray:
        """Samples of each shard that are not removed (int64)."""
        counts = self.shard_sizes.copy()
        if self.overlay.bits is not None:
            for start in range(0, self.num_samples, 2**24):
                samples = np.arange(start, min(start + 2**24, self.num_samples))
                gone = samples[self.overlay.removed(samples)]
                shards = np.searchsorted(self.first_samples, gone, side="right") - 1
                counts -= np.bincount(shards, minlength=len(counts))
        return counts

    def shapes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Widths and heights (int32) of what is not removed, shard by shard, from samples/*.parquet; nothing where those were left out."""
        for first in range(0, len(self.shard_names), SHARDS_PER_FOLDER):
            if samples_name(first) not in self._entries:
                return
            path = self.table(samples_name(first))
            try:
                with pq.ParquetFile(path) as file:
                    for shard in range(first, min(first + SHARDS_PER_FOLDER, len(self.shard_names))):
                        rows = file.read_row_group(shard - first, columns=["width", "height"])
                        if len(rows) != self.shard_sizes[shard]:
                            raise DatasetError(
                                f"{path} has {len(rows)} samples of {self.shard_names[shard]}, not {self.shard_sizes[shard]}"
                            )
                        kept = np.flatnonzero(~self.overlay.removed(int(self.first_samples[shard]) + np.arange(len(rows))))
                        yield rows["width"].to_numpy()[kept], rows["height"].to_numpy()[kept]
            except (pa.ArrowException, OSError, IndexError) as error:
                raise DatasetError(f"{path} cannot be read: {error}; restore it or pack again") from None

    def rejects(self) -> Iterator[dict[str, str]]:
        """The rows of rejects.parquet, if there is one: source, key, reason, detail."""
        if "rejects.parquet" in self._entries:
            path = self.table("rejects.parquet")
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=2**14):
                        yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise DatasetError(f"{path} cannot be read: {error}; restore it or pack again") from None

    def used_classes(self) -> np.ndarray:
        """For each class whether any sample that is not removed has it (bool). Reads the whole column."""
        used = np.zeros(self.num_classes, dtype=bool)
        for batch in self.index_batches():
            used[batch.labels] = True
        return used

    def score_range(self) -> tuple[float, float]:
        """The smallest and the largest score of any label; a label without a score has 1. Reads the whole column."""
        found = [float(of) for batch in self.index_batches() if len(batch.scores) for of in (batch.scores.min(), batch.scores.max())]
        return min(found, default=1.0), max(found, default=1.0)

    def class_name(self, label: int) -> str:
        """The class's name, or its number where the classes have no names."""
        return self.class_names[label] if self.class_names else str(label)

    def row(self, sample: int) -> SampleRow:
        """What samples/*.parquet says of the sample. Reads its shard's row group."""
        shard = self._shard_number(sample)
        with pq.ParquetFile(self.table(samples_name(shard))) as file:
            rows = file.read_row_group(shard % SHARDS_PER_FOLDER, columns=["key", "width", "height", "source"])
        return SampleRow(**rows.slice(sample - int(self.first_samples[shard]), 1).to_pylist()[0])

    def key(self, sample: int) -> str:
        """The sample's key, from samples/*.parquet."""
        shard = self._shard_number(sample)
        key: str = self.shard_keys(shard)[sample - int(self.first_samples[shard])].as_py()
        return key

    def shard_keys(self, shard: int) -> pa.Array:
        """The keys of all samples of one shard."""
        return self._keys(str(self.table(samples_name(shard))), shard % SHARDS_PER_FOLDER)

    def shard_of(self, sample: int) -> str:
        """The name of the tar that holds the sample, as in `shard_names`."""
        return self.shard_names[self._shard_number(sample)]

    def __len__(self) -> int:
        return self.num_samples

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.content_hash, self.overlay.names, self._stage, self._cache, self._part)

    def _shard_number(self, sample: int) -> int:
        self._check_sample(sample)
        # "right" passes over empty shards, which begin where the next one begins.
        return int(np.searchsorted(self.first_samples, sample, side="right")) - 1

    def _in_range(self, samples: np.ndarray) -> np.ndarray:
        samples = np.asarray(samples, dtype=np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= self.num_samples):
            raise IndexError(f"samples {samples.min()}..{samples.max()} are not all in 0..{self.num_samples - 1}")
        return samples

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} is not in 0..{self.num_samples - 1}")

    def _check_shards(self, there: dict[str, int] | None) -> None:
        for number, (name, size) in enumerate(zip(self.shard_names, self.shard_bytes.tolist(), strict=True)):
            if (found := _size(self.path, name, there, size)) != size:
                first = self.first_samples[number]
                if self.overlay.removed(np.arange(first, first + self.shard_sizes[number])).all():
                    continue  # a shard that is lost and given up
                says = f"has {found} bytes" if found is not None else "is missing"
                raise DatasetError(f"{self.path / name} {says}, the manifest says {size}; copy this shard again")

    def _sample_error(self, sample: int, reason: str) -> SampleError:
        return SampleError(sample, self.shard_of(sample), self.key_or_not(sample), reason)

    def key_or_not(self, sample: int) -> str:
        """The sample's key, or "?" where it cannot be read."""
        shard = self._shard_number(sample)
        name = samples_name(shard)
        try:
            if isinstance(self.path, Url) and not (self._folder / name).is_file():  # for a word to people not the whole file is fetched
                keys = _read_keys(RemoteFile(self.path / name, self._entries[name]["bytes"]), shard % SHARDS_PER_FOLDER)
                return str(keys[sample - int(self.first_samples[shard])])
            return self.key(sample)
        except (OSError, LookupError, pa.ArrowException, UserError):  # a damaged samples file must not hide the first damage
            return "?"


def _size(path: Location, name: str, there: dict[str, int] | None, told: int) -> int | None:
    """The size of a dataset's file, None where it is missing; of a URL what was listed, for the rest shows when it is read."""
    if isinstance(path, Url):
        return told if there is None or name.startswith("../") else there.get(name)
    file = path / name
    return file.stat().st_size if file.is_file() else None


def _reopen(
    path: Location, content_hash: str, overlays: tuple[str, ...], stage: Path | None, cache: Cache | None, part: Part | None
) -> Dataset:  # fmt: skip
    dataset = Dataset.open(path, overlays=overlays, stage=stage, cache=cache, check_shards=False, part=part)
    if dataset.content_hash != content_hash:
        raise DatasetError(f"{path} is now dataset {dataset.content_hash}, it was {content_hash}; start again")
    return dataset


def _read_classes(path: Path) -> tuple[str, ...]:
    return parse_classes(path.read_bytes())


def parse_classes(data: bytes) -> tuple[str, ...]:
    """The class names in the bytes of a classes.txt."""
    return tuple(data.decode().removesuffix("\n").split("\n"))


def _read_keys(path: str | RemoteFile, row_group: int) -> pa.Array:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=["key"])["key"].combine_chunks()


def _views(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Numpy views of a mapped batch of the index; nothing is copied."""
    batch.validate()  # that the views lie inside the file; costs nothing
    views = {name: batch.column(name).to_numpy() for name in ("offset", "size", "hash")}
    for name in ("labels", "scores"):
        column = batch.column(name)
        views[name], views[name + "_starts"] = column.values.to_numpy(), column.offsets.to_numpy()
    return views


def _lists(batch: dict[str, np.ndarray]) -> LabelLists:
    """Labels and scores of all rows of a batch of the index."""
    parts = []
    for name in ("labels", "scores"):
        starts = batch[name + "_starts"]
        parts += [starts - starts[0] if starts[0] else starts, batch[name][starts[0] : starts[-1]]]
    return LabelLists(*parts)


def _fill(labels: np.ndarray, scores: np.ndarray, places: np.ndarray, lists: LabelLists, rows: np.ndarray) -> None:
    """Writes the labels and scores of some rows of `lists` to some places of two padded arrays."""
    columns = np.arange(labels.shape[1])
    for starts, values, out in ((lists.label_starts, lists.labels, labels), (lists.score_starts, lists.scores, scores)):
        filled = columns < (starts[rows + 1] - starts[rows])[:, None]
        block = out[places]
        block[filled] = values[(starts[rows][:, None] + columns)[filled]]
        if out is scores:  # those without a score
            block[~filled & (labels[places] >= 0)] = 1
        out[places] = block
