"""Overlays: other labels for samples, or their removal, as small Parquet files beside tars that never change.

    DATASET/overlay/0000-NAME-HASH.parquet      HASH: the first 16 hexadecimal digits of the file's SHA-256

Where it stands: `amend.py` and `dedup.py` write them; `Dataset` reads all of them, in the order of their numbers, and gives labels as they
say. A removed sample (a *tombstone*) keeps its number: training puts another in its place, evaluation leaves it out.

Invariants: of several rows on a sample the last that has labels gives its labels, and the last that speaks of removal says whether it is
removed; a file that is not what its name says is an error, for a removal must not be lost in silence; memory takes a bit a sample where any
is removed, and the new labels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.errors import UserError
from data_tools.stage import copied
from data_tools.storage import Location, Url, walk

FOLDER = "overlay"
FORMAT_VERSION = 1
FILE_NAME = re.compile(r"(\d{4})-([A-Za-z0-9_-]{1,60})-([0-9a-f]{16})\.parquet")
SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),  # ascending; each once in a file
        pa.field("key", pa.string(), nullable=False),  # for people: the number is what counts
        pa.field("removed", pa.bool_()),  # true: removed; false: there again, if an earlier overlay removed it; null: says nothing of it
        pa.field("labels", pa.list_(pa.int32())),  # null: as they were
        pa.field("scores", pa.list_(pa.float32())),  # as long as labels, or empty: all 1; null where labels is
        pa.field("reason", pa.string(), nullable=False),
    ]
)


class OverlayError(UserError):
    """An overlay that is damaged, of another dataset, or not there."""


@dataclass(frozen=True)
class LabelLists:
    """Labels and scores of some samples: those of row i are labels[label_starts[i] : label_starts[i + 1]], and so on."""

    label_starts: np.ndarray
    labels: np.ndarray
    score_starts: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.label_starts) - 1

    def take(self, rows: np.ndarray) -> LabelLists:
        """Some of the rows, in any order."""
        return LabelLists(*_taken(self.label_starts, self.labels, rows), *_taken(self.score_starts, self.scores, rows))

    def append(self, other: LabelLists) -> LabelLists:
        """The rows of both."""
        label_starts = np.concatenate([self.label_starts, self.label_starts[-1] + other.label_starts[1:]])
        score_starts = np.concatenate([self.score_starts, self.score_starts[-1] + other.score_starts[1:]])
        return LabelLists(
            label_starts, np.concatenate([self.labels, other.labels]), score_starts, np.concatenate([self.scores, other.scores])
        )


@dataclass(frozen=True)
class Overlay:
    """What all overlays of a dataset say together."""

    names: tuple[str, ...]
    """Of the files, in their order; each holds a hash of the file, so these name what was used."""
    num_removed: int
    """Samples that they remove."""
    bits: np.ndarray | None
    """A bit a sample (uint8, lowest first), set where it is removed; None where none is."""
    samples: np.ndarray
    """Those with other labels than in the index: int64, ascending."""
    lists: LabelLists
    """Their labels and scores."""
    num_outside: int = 0
    """Samples that count as removed, though no overlay removes them, because they are not in the part in use."""

    def within(self, outside: np.ndarray) -> Overlay:
        """The same of a part of the dataset, given the bits of the samples outside it."""
        bits = outside if self.bits is None else self.bits | outside
        return replace(self, bits=bits, num_outside=int(np.bitwise_count(bits).sum(dtype=np.int64)) - self.num_removed)

    def removed(self, samples: np.ndarray) -> np.ndarray:
        """Whether each of the samples is removed (bool)."""
        if self.bits is None:
            return np.zeros(len(samples), dtype=bool)
        set_bits: np.ndarray = self.bits[samples >> 3] >> (samples & 7).astype(np.uint8) & 1
        return set_bits.astype(bool)

    def is_removed(self, sample: int) -> bool:
        """Whether one sample is removed."""
        return self.bits is not None and bool(self.bits[sample >> 3] >> (sample & 7) & 1)

    def rows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the samples have other labels (places), and their rows in `lists`."""
        at = np.searchsorted(self.samples, samples)
        found = np.flatnonzero(self.samples[np.minimum(at, len(self.samples) - 1)] == samples) if len(self.samples) else at[:0]
        return found, at[found]


_ZERO = np.zeros(1, dtype=np.int64)
_NO_LISTS = LabelLists(_ZERO, np.zeros(0, dtype=np.int32), _ZERO, np.zeros(0, dtype=np.float32))


def overlay_names(dataset: Location) -> tuple[str, ...]:
    """The names of a dataset's overlays, in their order; on the web, which cannot be listed, none. Raises OverlayError where a file in
    their folder is none."""
    found = files_beside(dataset)
    for name in found:
        if not FILE_NAME.fullmatch(name):
            folder = dataset / FOLDER
            raise OverlayError(
                f"{folder / name} is no overlay by its name; `vitscale data overlay` writes them: move the file out of {folder}"
            )
    return tuple(found)


def files_beside(dataset: Location) -> list[str]:
    """The names of all files in the folder of a dataset's overlays, but hidden ones."""
    folder = dataset / FOLDER
    if isinstance(folder, Url):
        files = [] if folder.on_web else [name for name in walk(folder) if "/" not in name]
    else:
        files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in files if not name.startswith("."))


def overlay_file(dataset: Location, name: str, folder: Path) -> Path:
    """An overlay of a dataset, or a copy in a folder of this machine where that is a URL. Raises StageError, StorageError."""
    if isinstance(dataset, Path):
        return dataset / FOLDER / name
    told = FILE_NAME.fullmatch(name)
    assert told is not None, name
    return copied(dataset / FOLDER / name, {"sha256": told[3]}, folder / FOLDER / name, check=True)


def read_overlays(dataset: Path, names: tuple[str, ...], content_hash: str, num_samples: int, num_classes: int) -> Overlay:
    """Reads and checks the overlays with these names. Raises OverlayError."""
    if not names:
        return Overlay((), 0, None, _ZERO[:0], _NO_LISTS)
    bits = np.zeros(-(-num_samples // 8), dtype=np.uint8)  # costs memory only where it is written to
    samples, lists = np.zeros(0, dtype=np.int64), _NO_LISTS
    for name in names:
        parts = [samples]
        for batch in read_overlay(dataset / FOLDER / name, content_hash, num_samples, num_classes):
            numbers = batch["sample"].to_numpy()
            speaks = batch["removed"].is_valid().to_numpy(zero_copy_only=False)
            gone = pc.fill_null(batch["removed"], False).to_numpy(zero_copy_only=False)
            np.bitwise_and.at(bits, numbers[speaks] >> 3, ~_bit(numbers[speaks]))
            np.bitwise_or.at(bits, numbers[gone] >> 3, _bit(numbers[gone]))
            labelled = batch.filter(batch["labels"].is_valid())
            parts.append(labelled["sample"].to_numpy())
            lists = lists.append(_lists_of(labelled))
        samples, lists = _last_of_each(np.concatenate(parts), lists)
    num_removed = int(np.bitwise_count(bits).sum(dtype=np.int64))
    return Overlay(names, num_removed, bits if num_removed else None, samples, lists)


def read_overlay(file: Path, content_hash: str, num_samples: int, num_classes: int) -> Iterator[pa.RecordBatch]:
    """The rows of one overlay, of SCHEMA, after everything about them was checked. Raises OverlayError."""
    told = FILE_NAME.fullmatch(file.name)
    assert told is not None, file
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise OverlayError(f"{file} cannot be read ({error.strerror}); restore it") from None
    if not digest.startswith(told[3]):
        raise OverlayError(f"{file} was changed: its SHA-256 begins with {digest[:16]}, not as its name says; restore it")
    with pq.ParquetFile(file) as parquet:
        said = json.loads((parquet.schema_arrow.metadata or {}).get(b"vitscale", b"{}"))
        if said.get("dataset") != content_hash:
            raise OverlayError(f"{file} was made for another dataset ({said.get('dataset')}); move it out of {file.parent}")
        if not parquet.schema_arrow.equals(SCHEMA, check_metadata=False) or said.get("format_version") != FORMAT_VERSION:
            raise OverlayError(f"{file} has format version {said.get('format_version')}; this program reads {FORMAT_VERSION}")
        last = -1
        for batch in parquet.iter_batches():
            batch.validate(full=True)
            numbers = np.concatenate([[last], batch["sample"].to_numpy()])
            labels, scores = _lists_of(batch.filter(batch["labels"].is_valid())), batch["labels"].flatten().to_numpy()
            unequal = np.diff(labels.score_starts) != np.diff(labels.label_starts)
            if (
                (np.diff(numbers) <= 0).any()
                or numbers[-1] >= num_samples
                or not ((scores >= 0) & (scores < num_classes)).all()
                or (unequal & (np.diff(labels.score_starts) > 0)).any()
            ):
                raise OverlayError(
                    f"{file} does not fit the dataset: samples not ascending, labels or scores that cannot be; write it again"
                )
            last = int(numbers[-1])
            yield batch


def counts(file: Path) -> tuple[int, int, int, str]:
    """Of an overlay's rows: how many remove a sample, bring one back, give other labels; and the most frequent reason."""
    table = pq.read_table(file, columns=["removed", "labels", "reason"])
    reasons = pc.value_counts(table["reason"])
    top = max(reasons.to_pylist(), key=lambda row: row["counts"], default={"values": ""})["values"]
    gone = table["removed"]
    return (
        pc.sum(gone, min_count=0).as_py(),
        pc.sum(pc.invert(gone), min_count=0).as_py(),
        len(table) - table["labels"].null_count,
        top,
    )


def _bit(samples: np.ndarray) -> np.ndarray:
    bit: np.ndarray = np.left_shift(1, samples & 7).astype(np.uint8)
    return bit


def _lists_of(batch: pa.RecordBatch) -> LabelLists:
    starts = []
    for name in ("labels", "scores"):
        lengths = pc.fill_null(pc.list_value_length(batch[name]), 0).to_numpy().astype(np.int64)
        starts.append(np.concatenate([_ZERO, np.cumsum(lengths)]))
    return LabelLists(starts[0], batch["labels"].flatten().to_numpy(), starts[1], batch["scores"].flatten().to_numpy())


def _last_of_each(samples: np.ndarray, lists: LabelLists) -> tuple[np.ndarray, LabelLists]:
    order = np.argsort(samples, kind="stable")
    last = np.append(np.diff(samples[order]) > 0, True)[: len(order)]
    return samples[order[last]], lists.take(order[last])


def _taken(starts: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = starts[rows + 1] - starts[rows]
    new_starts = np.concatenate([_ZERO, np.cumsum(lengths)])
    places = np.repeat(starts[rows] - new_starts[:-1], lengths) + np.arange(new_starts[-1])
    return new_starts, values[places]
