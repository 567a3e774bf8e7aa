"""`vitscale data overlay`: writes what `overlay.py` describes, from a list of changes or of keys.

Where it stands: the verb and `dedup.py` write through `write_overlay`; a running training takes a new overlay up at its next start.

Invariants: an overlay appears whole or not at all, and is never changed or written over; the same change asked for twice is one overlay.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data_tools import dataset as fmt
from data_tools import overlay as form
from data_tools.dataset import Dataset
from data_tools.durable import fsync
from data_tools.errors import UserError
from data_tools.progress import Update, no_update
from data_tools.tables import LABEL_COLUMNS, SCORE_COLUMNS, dates_as_text

ROWS = 2**20  # rows written, and keys looked through, at a time


class AmendError(UserError):
    """Changes that do not fit the dataset. Nothing has been written."""


@dataclass(frozen=True)
class Changes:
    """What is said of some samples: a row each, in any order."""

    samples: np.ndarray
    """int64."""
    removed: pa.Array
    """bool; null: nothing is said of removal."""
    labels: pa.Array
    """list of int32; null: as they were."""
    scores: pa.Array
    """list of float32, as long as `labels` or empty; null where those are."""
    reasons: pa.Array
    """string."""


def removals(samples: np.ndarray, reasons: pa.Array, *, removed: bool = True) -> Changes:
    """Changes that only remove samples, or bring removed ones back."""
    none = pa.nulls(len(samples))
    gone = pa.array(np.full(len(samples), removed))
    return Changes(samples, gone, none.cast(pa.list_(pa.int32())), none.cast(pa.list_(pa.float32())), reasons)


@dataclass(frozen=True)
class Amended:
    """An overlay, and what its rows do."""

    path: str
    removed: int
    restored: int
    relabelled: int
    reason: str
    """The most frequent one."""


def list_overlays(dataset: Path) -> list[Amended]:
    """The overlays of a dataset, in their order."""
    files = [dataset / form.FOLDER / name for name in form.overlay_names(dataset)]
    return [Amended(str(file), *form.counts(file)) for file in files]


def amend(
    dataset: Dataset, name: str, *, file: Path | None = None, remove: tuple[str, ...] = (), restore: tuple[str, ...] = (),
    reason: str = "", skip_unknown: bool = False,
) -> tuple[Amended | None, int]:  # fmt: skip
    """Writes an overlay of a file's changes and of keys to remove or restore, or none where nothing would change.

    Also returns how many keys the dataset does not have.

    Raises AmendError where changes contradict each other or do not fit, or where keys are unknown and `skip_unknown` is not set.
    """
    parts = [read_changes(file, dataset, reason, skip_unknown)] if file is not None else []
    for keys, gone in ((remove, True), (restore, False)):
        if keys:
            found = _known(dataset, pa.array(keys, pa.large_string()), skip_unknown)
            parts.append(removals(found, pa.array([reason] * len(keys), pa.string()), removed=gone))
    changes = _joined(parts)
    known = _taken(changes, np.flatnonzero(changes.samples >= 0))
    unknown = len(changes.samples) - len(known.samples)
    said = (form.overlay_names(dataset.folder), dataset.content_hash, dataset.num_samples, dataset.num_classes)
    there = form.read_overlays(dataset.folder, *said)  # which may be more than when the dataset was opened
    already = pc.equal(known.removed, pa.array(there.removed(known.samples)))
    same = pc.and_(pc.or_kleene(already, known.removed.is_null()).fill_null(False), known.labels.is_null())
    if len(known.samples) and pc.all(same).as_py():
        return None, unknown
    path = write_overlay(dataset, name, known)
    return Amended(str(path), *form.counts(path)), unknown


def find_samples(dataset: Dataset, keys: pa.Array, progress: Update = no_update) -> np.ndarray:
    """The numbers of the samples with these keys (int64), -1 where there is none. Reads all keys of the dataset once.

    `progress` is called with how many were looked at, and of how many.
    """
    wanted = keys.cast(pa.large_string())
    found = np.full(len(wanted), -1, dtype=np.int64)
    first_places = pc.index_in(wanted, value_set=wanted).to_numpy()  # a key that stands twice is found at its first place
    for first, batch in all_keys(dataset):
        places = pc.index_in(batch.cast(pa.large_string()), value_set=wanted)
        hits = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        found[places.drop_null().to_numpy()] = first + hits
        progress(first + len(batch), dataset.num_samples)
    of_each: np.ndarray = found[first_places]
    return of_each


def all_keys(dataset: Dataset) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """The keys of all samples, about a million at a time, each with the number of its first sample."""
    first = 0
    for number in range(0, len(dataset.shard_names), fmt.SHARDS_PER_FOLDER):
        with pq.ParquetFile(dataset.table(fmt.samples_name(number))) as file:
            pending: list[int] = []
            rows = 0
            for group in range(file.num_row_groups):
                pending.append(group)
                rows += file.metadata.row_group(group).num_rows
                if rows >= ROWS or group == file.num_row_groups - 1:
                    yield first, file.read_row_groups(pending, columns=["key"])["key"]
                    first, pending, rows = first + rows, [], 0


def keys_of(dataset: Dataset, samples: np.ndarray) -> pa.Array:
    """The keys of samples in any order, each shard's read once."""
    order = np.argsort(samples, kind="stable")
    shards = np.searchsorted(dataset.first_samples, samples[order], side="right") - 1
    parts = [pa.array([], pa.string())]
    for shard, start, end in zip(*_runs(shards), strict=True):
        keys = dataset.shard_keys(int(shard))
        parts.append(keys.take(pa.array(samples[order[start:end]] - int(dataset.first_samples[shard]))))
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(back))


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of values that stand in runs: each run's value, start and end."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return values[starts], starts, np.append(starts, len(values))[1:]


def read_changes(file: Path, dataset: Dataset, reason: str = "", skip_unknown: bool = False) -> Changes:
    """Changes from a table (CSV, TSV, JSONL, Parquet), which is read whole. A sample that the dataset does not have is -1.

    Columns: `key` (or `sample`, its number); `removed` (bool); `label` or `labels` (class names or numbers, one or a list); `score` or
    `scores`; `reason`. With neither `removed` nor labels each row removes a sample. Raises AmendError.
    """
    table = _read_table(file, names=dataset.class_names is not None)
    size, there = len(table), set(table.column_names)
    if len(there) < len(table.column_names):
        raise AmendError(f"{file} has a column twice among {', '.join(table.column_names)}; leave one")
    if "sample" in there:
        samples = _numbers(table["sample"], file, dataset)
        if "key" in there:
            keys = _column(table["key"], pa.string(), f"key of {file}", "text")
            if wrong := np.flatnonzero(
                pc.not_equal(keys, keys_of(dataset, samples)).fill_null(False).to_numpy(zero_copy_only=False)
            ).tolist():
                raise AmendError(
                    f"{file} has the key {keys[wrong[0]].as_py()!r} for sample {samples[wrong[0]]}, which {dataset.path} calls "
                    f"{dataset.key(int(samples[wrong[0]]))!r}; leave out the column `sample`, or `key`"
                )
    elif "key" in there:
        samples = _known(dataset, _column(table["key"], pa.large_string(), f"key of {file}", "text"), skip_unknown)
    else:
        raise AmendError(f"{file} has no column `key` (or `sample`) among {', '.join(table.column_names)}; it names the samples to change")
    label = next((name for name in ("labels", "label") if name in there), None)
    score = next((name for name in ("scores", "score") if name in there), None)
    if label is None and "removed" not in there:
        meant = (*LABEL_COLUMNS, *SCORE_COLUMNS, "removed")
        if (other := next((name for name in table.column_names if name.strip().lower() in meant), None)) is not None:
            raise AmendError(
                f"{file} has a column {other!r} but none called `removed`, `label` or `labels`; name it so, or leave it out to remove all "
                "that is listed"
            )
    removed, labels = pa.nulls(size, pa.bool_()), pa.nulls(size, pa.list_(pa.int32()))
    scores = pa.nulls(size, pa.list_(pa.float32()))
    if "removed" in there:
        removed = _column(table["removed"], pa.bool_(), f"removed of {file}", "true, false or nothing")
    elif label is None:
        removed = pa.array(np.ones(size, dtype=bool))
    if label is not None:
        column = table[label].combine_chunks()
        if file.suffix.lower() in (".csv", ".tsv"):
            column = _names_or_numbers(column, f"{label} of {file}", dataset)
        labels = _labels(column, f"{label} of {file}", dataset)
        scores = _scores(table[score].combine_chunks() if score is not None else pa.nulls(size, pa.float32()), labels, f"{score} of {file}")
    reasons = pa.array([reason] * size, pa.string())
    if "reason" in there:
        reasons = pc.fill_null(_column(table["reason"], pa.string(), f"reason of {file}", "text"), reason)
    return Changes(samples, removed, labels, scores, reasons)


def write_overlay(dataset: Dataset, name: str, changes: Changes) -> Path:
    """Writes an overlay of these changes behind those that are there, and returns its path. Raises AmendError."""
    if not form.FILE_NAME.fullmatch(f"0000-{name}-{'0' * 16}.parquet"):
        raise AmendError(f"name={name!r} must be 1 to 60 of A-Z a-z 0-9 _ -; takedown-2026-11 would work")
    changes = _each_once(_taken(changes, np.argsort(changes.samples, kind="stable")), dataset)
    if not len(changes.samples):
        raise AmendError(f"there is nothing to change in {dataset.path}; no key of the list is in it")
    folder = dataset.folder / form.FOLDER
    folder.mkdir(exist_ok=True)
    hidden = folder / f".{secrets.token_hex(8)}.partial"
    try:
        schema = form.SCHEMA.with_metadata(
            {"vitscale": json.dumps({"format_version": form.FORMAT_VERSION, "dataset": dataset.content_hash})}
        )
        with pq.ParquetWriter(hidden, schema, compression="zstd") as writer:
            for start in range(0, len(changes.samples), ROWS):
                some = _taken(changes, np.arange(start, min(start + ROWS, len(changes.samples))))
                columns = [pa.array(some.samples), keys_of(dataset, some.samples), some.removed, some.labels, some.scores, some.reasons]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        fsync(hidden)
        with hidden.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        with _alone(folder):
            names = form.overlay_names(dataset.path)
            if names and names[-1].endswith(f"-{name}-{digest}.parquet"):  # asked for twice
                return folder / names[-1]
            path = folder / f"{int(names[-1][:4]) + 1 if names else 0:04d}-{name}-{digest}.parquet"
            if not form.FILE_NAME.fullmatch(path.name):
                raise AmendError(f"{folder} has the overlay {names[-1]}, and no number is above that; put many changes into one list")
            hidden.rename(path)
            fsync(folder)
            fsync(dataset.folder)
    finally:
        hidden.unlink(missing_ok=True)
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two writers must not take the same number."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _known(dataset: Dataset, keys: pa.Array, skip_unknown: bool) -> np.ndarray:
    """The samples with these keys. Raises AmendError where there is none, or lets -1 stand."""
    samples = find_samples(dataset, keys)
    unknown = np.flatnonzero(samples < 0)
    if len(unknown) and not skip_unknown:
        raise AmendError(
            f"{dataset.path} has no sample with the key {keys[int(unknown[0])].as_py()!r} ({len(unknown)} of the list's keys); correct it, "
            "or give --skip-unknown where the list is for several splits"
        )
    return samples


def _each_once(changes: Changes, dataset: Dataset) -> Changes:
    """Rows sorted by sample, of which those that say the same are one. Raises AmendError where two rows differ."""
    again = np.flatnonzero(np.diff(changes.samples) == 0) + 1
    for row in again.tolist():
        for column in (changes.removed, changes.labels, changes.scores):
            if column[row].as_py() != column[row - 1].as_py():
                raise AmendError(f"the changes say two things of {dataset.key(int(changes.samples[row]))}; leave one of them")
    return _taken(changes, np.delete(np.arange(len(changes.samples)), again)) if len(again) else changes


def _taken(changes: Changes, rows: np.ndarray) -> Changes:
    at = pa.array(rows)
    return Changes(
        changes.samples[rows], *(column.take(at) for column in (changes.removed, changes.labels, changes.scores, changes.reasons))
    )


def _joined(parts: list[Changes]) -> Changes:
    columns = [pa.concat_arrays([getattr(part, name) for part in parts]) for name in ("removed", "labels", "scores", "reasons")]
    return Changes(np.concatenate([part.samples for part in parts]), *columns)


def _read_table(file: Path, *, names: bool) -> pa.Table:
    """The table; labels in one of text are text, which `_labels` makes sense of, where classes have names."""
    try:
        match file.suffix.lower():
            case ".parquet":
                return pq.read_table(file)
            case ".jsonl":
                table = pa.json.read_json(file)
                if (texts := dates_as_text(table.schema)) is not None:
                    table = pa.json.read_json(file, parse_options=texts)
                return table
            case ".csv" | ".tsv" as kind:
                parsing = pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",")
                texts = {name: pa.string() for name in ("key", "reason", *(("label", "labels") if names else ()))}
                types = texts | {"removed": pa.bool_()}
                options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
                return pa.csv.read_csv(file, parse_options=parsing, convert_options=options)
            case ".txt":
                return pa.table({"key": pa.array(file.read_text(encoding="utf-8").split(), pa.string())})
    except FileNotFoundError:
        raise AmendError(f"{file} does not exist; give a CSV, TSV, JSONL or Parquet table, or a .txt file with a key a line") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise AmendError(f"{file} cannot be read: {str(error).splitlines()[0]}; write it again") from None
    raise AmendError(f"{file} is no table by its name; .csv, .tsv, .jsonl and .parquet are, and .txt with a key a line")


def _numbers(column: pa.ChunkedArray, file: Path, dataset: Dataset) -> np.ndarray:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise AmendError(f"sample of {file} is {column.type} with {column.null_count} nulls; it must hold the samples' numbers")
    samples: np.ndarray = column.to_numpy().astype(np.int64)
    if len(samples) and not 0 <= samples.min() <= samples.max() < dataset.num_samples:
        raise AmendError(f"sample of {file} goes from {samples.min()} to {samples.max()}; {dataset.path} has 0..{dataset.num_samples - 1}")
    return samples


def _column(column: pa.ChunkedArray, kind: pa.DataType, what: str, rule: str) -> pa.Array:
    array = column.combine_chunks()
    try:
        if kind == pa.bool_() and not (pa.types.is_boolean(array.type) or pa.types.is_null(array.type)):
            raise pa.ArrowInvalid("")
        return array.cast(kind)
    except pa.ArrowException:
        raise AmendError(f"{what} is {array.type}; it must be {rule}") from None


def _listed(column: pa.Array) -> tuple[pa.Array, np.ndarray, pa.Array]:
    """Which rows say something (bool), how many values they have, and all values."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return valid, pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64), column.flatten()
    return valid, valid.astype(np.int64), column.drop_null()


def _as_lists(valid: np.ndarray, lengths: np.ndarray, values: pa.Array) -> pa.Array:
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), values, mask=pa.array(~valid))


def _names_or_numbers(column: pa.Array, what: str, dataset: Dataset) -> pa.Array:
    """The labels of a table of text: names if all of them are, else numbers if all look like it. Raises AmendError where both would do."""
    if not pa.types.is_string(column.type) or dataset.class_names is None:
        return column
    names, numbers = {name: number for number, name in enumerate(dataset.class_names)}, {}
    for text in pc.unique(column.drop_null()).to_pylist():
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            return column
        numbers[text] = int(text)
    unlike = [text for text, number in numbers.items() if names.get(text, number) != number]
    if not unlike:
        return column if numbers.keys() <= names.keys() else column.cast(pa.int64())
    if all(text in names and number >= dataset.num_classes for text, number in numbers.items()):
        return column
    raise AmendError(
        f"{what} has {unlike[0]}, which may be class number {numbers[unlike[0]]} or the class of that name, number "
        f'{names[unlike[0]]}; give JSONL, where {numbers[unlike[0]]} is the number and "{unlike[0]}" the name'
    )


def _labels(column: pa.Array, what: str, dataset: Dataset) -> pa.Array:
    valid, lengths, values = _listed(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    numbers = values
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        if dataset.class_names is None:
            raise AmendError(f"{what} has names, and the classes of {dataset.path} have none; give numbers")
        numbers = pc.index_in(values, value_set=pa.array(dataset.class_names, values.type))
    elif not (pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        raise AmendError(f"{what} is {column.type}; labels are class names or numbers, one or a list")
    good = pc.fill_null(pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, dataset.num_classes)), False)
    if not pc.all(good, min_count=0).as_py():
        bad: Any = values.filter(pc.invert(good))[0].as_py()
        raise AmendError(f"{what} has {bad!r}, which is none of the {dataset.num_classes} classes of {dataset.path}; correct it")
    lists = _as_lists(valid, lengths, numbers.cast(pa.int32()))
    for row in np.flatnonzero(lengths > 1).tolist():
        of_row = lists[row].as_py()
        if len(set(of_row)) < len(of_row):
            raise AmendError(f"{what} has a label twice in row {row}: {of_row}; give each once")
    return lists


def _scores(column: pa.Array, labels: pa.Array, what: str) -> pa.Array:
    valid, lengths, values = _listed(column)
    wanted = pc.fill_null(pc.list_value_length(labels), 0).to_numpy()
    unequal = np.flatnonzero((lengths > 0) & (lengths != wanted))
    if len(unequal):
        row = int(unequal[0])
        raise AmendError(f"{what} has {lengths[row]} for {wanted[row]} labels in row {row}; give one each, or none")
    try:
        numbers = pc.cast(values, pa.float32(), safe=False)
    except pa.ArrowException:
        raise AmendError(f"{what} is {column.type}; scores are numbers, one or a list") from None
    if not pc.all(pc.fill_null(pc.is_finite(numbers), False), min_count=0).as_py():
        raise AmendError(f"{what} has a score that is not a finite number; correct it")
    return _as_lists(labels.is_valid().to_numpy(zero_copy_only=False), np.where(valid, lengths, 0), numbers)
