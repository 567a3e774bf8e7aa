"""What there is to pack: the listing of sources, with a key and labels for every image, and the reading of its bytes.

Where it stands: `pack.py` asks for a `Listing`, `plan.py` puts it in order, then `read_image` and `table_images` give the bytes. All that
can be refused without reading an image (labels, columns, class names) is refused here, before any tar is written.

Invariants:
- the listing is sorted and depends on names and contents only, not on the file system's order;
- keys are unique, and a key depends on its own image's name, unless names collide;
- memory holds some rows of the listing at a time, which lies in files, and never the images of a table.

Left to others: whether bytes are a good image, which sample goes where.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import tarfile
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
import xxhash

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.images import MAX_IMAGE_BYTES, Reject
from data_tools.keys import clean_keys, hashed_key, key_hashes, repeated
from data_tools.labels import (
    Classes,
    ClassMap,
    Found,
    Lists,
    check_scores,
    merge_duplicates,
    number_labels,
    read_class_map,
    settle_classes,
    starts_of,
)

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")  # tables as text, which must be named one by one: in a folder they are notes beside images
# Any other file in a class folder is looked into, so that no image is lost for its name.
NO_IMAGE_SUFFIXES = (".txt", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".npy", ".log", ".db", ".ini")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
BYTES_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "class_name", "target")
SCORE_COLUMNS = ("scores", "score")
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")  # of a sample in a tar
KEY_COLUMNS = ("key", "__key__", "id", "image_id")
ROWS = 65_536  # rows turned into Python objects at a time

# What an image's own path can be at fault for. Other errors are the machine's and end the run.
PATH_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True)
class Origin:
    """One folder of class folders, or one table."""

    prefix: str  # in front of the names of its samples, where there are several sources
    root: Path  # where relative paths start
    table: Path | None = None
    image_column: str | None = None  # set if the image bytes lie in the table


LISTING_SCHEMA = pa.schema(
    [
        pa.field("place", pa.int64()),  # number in the listing
        pa.field("origin", pa.int32()),  # number in `origins`
        pa.field("row", pa.int64()),  # in the origin's table, -1 in a folder
        pa.field("path", pa.large_binary()),  # from the origin's root; null where the bytes lie in a table
        pa.field("key", pa.large_string()),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("scores", pa.list_(pa.float32())),  # as long as labels, or empty
    ]
)
_RAW_SCHEMA = pa.schema(
    [
        *(LISTING_SCHEMA.field(name) for name in ("place", "origin", "row", "path", "key")),  # keys as they came
        pa.field("names", pa.list_(pa.large_string())),
        pa.field("numbers", pa.list_(pa.int64())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Listing:
    """All candidates, in order, in a file."""

    origins: tuple[Origin, ...]
    file: Path
    num_samples: int
    class_names: tuple[str, ...] | None
    num_classes: int
    digest: str
    """Of the names, labels and keys of all candidates and of the classes, wherever they lie."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The candidates from first to last, of LISTING_SCHEMA."""
        return read_batches(self.file)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow stream file. They are read, not mapped, so that memory holds one of them."""
    with pa.OSFile(str(file)) as opened:
        yield from pa.ipc.open_stream(opened)


@dataclass(frozen=True)
class _Part:
    """Candidates of one origin, or some of them, before labels are numbers and keys unique."""

    row: np.ndarray
    path: pa.Array
    raw_key: pa.Array
    label_lengths: np.ndarray
    labels: pa.Array  # int64 or large_string
    score_lengths: np.ndarray
    scores: pa.Array


def list_sources(config: PackConfig, sibling: Dataset | None, folder: Path) -> Listing:
    """Lists and checks all sources, in files in `folder`. `sibling` is another split of the same output, whose classes are then used."""
    origins, num_samples, found = _write_raw(config, folder / "raw.arrows")
    if not num_samples:
        raise PackError(f"no images in {', '.join(config.sources)}; give a folder of class folders or a table with rows")
    classes = settle_classes(found, config, sibling)
    attempts = _part_keys(folder, num_samples)
    listing = folder / "listing.arrows"
    digests = [xxhash.xxh3_128() for _ in LISTING_SCHEMA.names]  # one a column, so that it does not matter where batches end
    with pa.OSFile(str(listing), "wb") as file, pa.ipc.new_stream(file, LISTING_SCHEMA) as writer:
        for batch in read_batches(folder / "raw.arrows"):
            finished = _finished(batch, origins, classes, attempts)
            writer.write_batch(finished)
            for digest, column in zip(digests, finished.columns, strict=True):
                digest.update("".join(f"{value!r}\n" for value in column.to_pylist()).encode())
    told = repr([classes.names, classes.number, *(of_column.hexdigest() for of_column in digests)])
    for name in ("raw.arrows", "hashes", "attempts"):
        (folder / name).unlink()
    return Listing(tuple(origins), listing, num_samples, classes.names, classes.number, xxhash.xxh3_128_hexdigest(told.encode()))


def _write_raw(config: PackConfig, file: Path) -> tuple[list[Origin], int, Found]:
    """Writes all candidates as they come, and says what there is."""
    origins: list[Origin] = []
    names: set[str] = set()
    class_folders: set[str] = set()
    kinds: set[pa.DataType] = set()
    largest, place = None, 0
    class_map = read_class_map(config.class_map) if config.class_map is not None else None
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, _RAW_SCHEMA) as writer:
        for text in config.sources:
            source = Path(text)
            prefix = f"{source.resolve().name}/" if len(config.sources) > 1 else ""
            tables = _tables(source)
            if not tables:
                _check_class_folders(source, config)
                class_folders.update(entry.name for entry in _entries(source) if entry.is_dir())
            listed = [_list_tar(table, prefix, config) if is_tar(table) else _list_table(table, prefix, config) for table in tables]
            listed = listed or [(Origin(prefix, source), _list_folder(source))]
            for origin, parts in listed:
                for part in parts:
                    if class_map is not None:
                        part = _mapped(part, origin, class_map)
                    if len(part.labels):
                        kinds.add(part.labels.type)
                        if pa.types.is_large_string(part.labels.type):
                            names.update(pc.unique(part.labels).to_pylist())
                        else:
                            largest = max(pc.max(part.labels).as_py(), -1 if largest is None else largest)
                    if len(kinds) > 1:
                        raise PackError("some sources have numbers as labels and some have names; give all of them names or all numbers")
                    batch = _raw_batch(part, len(origins), place)
                    place += len(batch)
                    for start in range(0, len(batch), ROWS):
                        writer.write_batch(batch.slice(start, ROWS))
                origins.append(origin)
    if class_map is not None:
        return origins, place, class_map.found
    named = bool(class_folders) or pa.large_string() in kinds
    return origins, place, Found(frozenset(names | class_folders) if named else None, largest)


def _mapped(part: _Part, origin: Origin, class_map: ClassMap) -> _Part:
    """The part with the classes of the map as its labels."""

    def source_of(number: int) -> str:
        return source_name(origin, part.row[number].item(), part.path[number].as_py())

    lists = class_map.apply(part.label_lengths, part.labels, part.score_lengths, part.scores, source_of)
    return _Part(part.row, part.path, part.raw_key, *lists)


def _raw_batch(part: _Part, origin: int, place: int) -> pa.RecordBatch:
    size = len(part.row)
    lists = pa.ListArray.from_arrays(pa.array(starts_of([part.label_lengths]), pa.int32()), part.labels)
    named = pa.types.is_large_string(part.labels.type)
    columns = [
        pa.array(np.arange(place, place + size)),
        pa.array(np.full(size, origin, dtype=np.int32)),
        pa.array(part.row),
        part.path,
        part.raw_key,
        lists if named else pa.nulls(size, pa.list_(pa.large_string())),
        pa.nulls(size, pa.list_(pa.int64())) if named else lists,
        pa.ListArray.from_arrays(pa.array(starts_of([part.score_lengths]), pa.int32()), part.scores),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_RAW_SCHEMA)


def _part_keys(folder: Path, num_samples: int) -> np.ndarray:
    """How often each sample's key had to be made anew because another sample had the same one."""
    with (folder / "hashes").open("wb") as file:
        for batch in read_batches(folder / "raw.arrows"):
            key_hashes(clean_keys(batch["key"]), seed=0).tofile(file)
    hashes = np.memmap(folder / "hashes", np.uint64, "r+")
    attempts = np.memmap(folder / "attempts", np.uint8, "w+", shape=(num_samples,))
    while len(places := repeated(hashes)):
        attempts[places] += 1
        for batch in read_batches(folder / "raw.arrows"):
            first = batch["place"][0].as_py()
            low, high = np.searchsorted(places, (first, first + len(batch)))
            for place in places[low:high].tolist():
                fresh = _fresh_key(batch, place - first, int(attempts[place]))
                hashes[place] = key_hashes(pa.array([fresh], pa.large_string()), seed=0)[0]
    return attempts


def _fresh_key(batch: pa.RecordBatch, number: int, attempt: int) -> str:
    """A key for a sample whose own is another's too, from what names the sample."""
    origin, row, path = (batch[name][number].as_py() for name in ("origin", "row", "path"))  # no two samples have the same
    return hashed_key(batch["key"][number].as_py(), f"{origin}\0{row}\0{path!r}\0{attempt - 1}")


def _finished(batch: pa.RecordBatch, origins: list[Origin], classes: Classes, attempts: np.ndarray) -> pa.RecordBatch:
    """A batch of the listing from a raw one: labels are numbers and checked, keys are unique."""

    def source_of(number: int) -> str:
        return source_name(origins[batch["origin"][number].as_py()], batch["row"][number].as_py(), batch["path"][number].as_py())

    column = batch["names"] if batch["numbers"].null_count == len(batch) else batch["numbers"]
    label_starts, score_starts = _starts(column), _starts(batch["scores"])
    ids = number_labels(column.flatten(), label_starts, classes, source_of)
    scores = batch["scores"].flatten().to_numpy(zero_copy_only=False)
    check_scores(label_starts, score_starts, scores, source_of)
    labels, merged = merge_duplicates(Lists(label_starts, ids), Lists(score_starts, scores))
    keys = clean_keys(batch["key"])
    first = batch["place"][0].as_py()
    again = np.asarray(attempts[first : first + len(batch)])
    if again.any():
        fresh = [_fresh_key(batch, number, int(again[number])) for number in np.flatnonzero(again).tolist()]
        keys = pc.replace_with_mask(keys, pa.array(again > 0), pa.array(fresh, pa.large_string()))
    lists = [pa.ListArray.from_arrays(pa.array(of.starts, pa.int32()), pa.array(of.values)) for of in (labels, merged)]
    columns = [batch["place"], batch["origin"], batch["row"], batch["path"], keys, *lists]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)


def _starts(lists: pa.ListArray) -> np.ndarray:
    """Where each row's list starts in the flattened values, and where the last one ends."""
    offsets: np.ndarray = lists.offsets.to_numpy().astype(np.int64)
    starts: np.ndarray = offsets - offsets[0]
    return starts


# --------------------------------------------------------------------------------------------------------- folders


def _check_class_folders(root: Path, config: PackConfig) -> None:
    folders = [entry.name for entry in _entries(root) if entry.is_dir()]
    if folders and SPLIT_NAMES.issuperset(folders) and config.class_names is None:
        commands = "; ".join(f"vitscale pack {root / name} {config.out} --split {name}" for name in folders)
        raise PackError(
            f"{root} holds {', '.join(folders)}, which look like splits, not classes; run {commands} (if they are "
            "classes, name them in a class_names file)"
        )
    for entry in _entries(root):
        if not entry.is_dir():
            raise PackError(f"{root / entry.name} lies in no class folder; move it into {root}/CLASS/ or out of {root}")
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise PackError(f"class folder {entry.name!r} in {root} is not UTF-8; rename it") from None


def _list_folder(root: Path) -> Iterator[_Part]:
    for folder in _entries(root):
        paths = [f"{folder.name}/{path}" for path in _files(root / folder.name, frozenset())]
        raw_keys = [_printable(os.fsencode(os.path.splitext(path)[0])) for path in paths]
        yield _Part(
            row=np.full(len(paths), -1, dtype=np.int64),
            path=pa.array([os.fsencode(path) for path in paths], pa.large_binary()),
            raw_key=pa.array(raw_keys, pa.large_string()),
            label_lengths=np.ones(len(paths), dtype=np.int64),
            labels=pa.array([folder.name] * len(paths), pa.large_string()),
            score_lengths=np.zeros(len(paths), dtype=np.int64),
            scores=pa.array([], pa.float32()),
        )


def _files(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Sorted relative paths of all files below; links are followed, except back to a folder above."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from (f"{entry.name}/{path}" for path in _files(folder / entry.name, above | {here}))
        else:
            yield entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What counts in a folder, sorted: not hidden, and not a file whose suffix says that it is no image."""
    with os.scandir(folder) as entries:
        return sorted(
            (
                entry
                for entry in entries
                if not entry.name.startswith((".", "__MACOSX")) and (entry.is_dir() or not entry.name.lower().endswith(NO_IMAGE_SUFFIXES))
            ),
            key=lambda entry: os.fsencode(entry.name),
        )


# ---------------------------------------------------------------------------------------------------------- tables


def _tables(source: Path) -> list[Path]:
    """The tables that a source stands for; none for a folder of class folders."""
    if source.is_file():
        suffixes = (*TABLE_SUFFIXES, *LIST_SUFFIXES, ".tar")
        if source.suffix.lower() not in suffixes:
            raise PackError(f"{source} is neither a table nor a tar by its name; these are: {', '.join(suffixes)}")
        return [source]
    if not source.is_dir():
        raise PackError(f"source {source} does not exist; give a folder or a table")
    entries = _entries(source)
    tables = [source / entry.name for entry in entries if entry.name.lower().endswith((*TABLE_SUFFIXES, ".tar"))]
    if tables and len(tables) < len(entries):
        other = next(entry.name for entry in entries if source / entry.name not in tables)
        raise PackError(f"{source} holds tables and also {other}; name the tables or the folder of class folders")
    return tables


def _list_table(table: Path, prefix: str, config: PackConfig) -> tuple[Origin, Iterator[_Part]]:
    with _reading(table):
        schema = _schema(table)
        columns_there = ", ".join(schema.names)  # which may be damaged too
    image = _choose(table, schema, "image_column", config.image_column, BYTES_COLUMNS + PATH_COLUMNS)
    label = _choose(table, schema, "label_column", config.label_column, LABEL_COLUMNS)
    if image is None or label is None:
        raise PackError(
            f"{table} has no column for the {'image' if image is None else 'label'} among {columns_there}; "
            f"give {'image' if image is None else 'label'}_column"
        )
    score = _choose(table, schema, "score_column", config.score_column, SCORE_COLUMNS)
    if config.score_column is None and score and _is_list(schema.field(score)) != _is_list(schema.field(label)):
        score = None  # a column of that name that means something else
    key = _choose(table, schema, "key_column", config.key_column, KEY_COLUMNS)
    image_type = schema.field(image).type
    by_path = pa.types.is_string(image_type) or pa.types.is_large_string(image_type)
    has_bytes = pa.types.is_binary(image_type) or pa.types.is_large_binary(image_type)
    if pa.types.is_struct(image_type):
        has_bytes = any(image_type.get_field_index(name) >= 0 for name in ("bytes", "path"))
    if not by_path and not has_bytes:
        raise PackError(f"image_column={image} of {table} is {image_type}; it must hold bytes, paths, or a struct of bytes and path")
    root = Path(config.image_root) if config.image_root is not None else table.parent
    origin = Origin(prefix, root, table, None if by_path else image)
    columns = [label, *([score] if score else []), *([key] if key else []), *([image] if by_path else [])]

    def parts() -> Iterator[_Part]:
        row = 0
        for batch in _batches(table, list(dict.fromkeys(columns)), ROWS):
            numbers = np.arange(row, row + len(batch), dtype=np.int64)
            paths = batch.column(image).to_pylist() if by_path else [None] * len(batch)
            keys = batch.column(key).to_pylist() if key else [None] * len(batch)
            raw_keys = [
                str(given) if given is not None
                else os.path.splitext(path)[0] if path is not None
                else f"{table.stem}-{number:09d}"
                for given, path, number in zip(keys, paths, numbers.tolist(), strict=True)
            ]  # fmt: skip
            score_lengths, scores = np.zeros(len(batch), dtype=np.int64), pa.array([], pa.float32())
            with _reading(table):  # of numbers that do not fit 64 bits
                label_lengths, labels = _flat(batch.column(label), f"label_column={label} of {table}", row)
                if score:
                    score_lengths, scores = _flat_scores(batch.column(score), f"score_column={score} of {table}")
            yield _Part(
                row=numbers,
                path=pa.array([None if path is None else os.fsencode(path) for path in paths], pa.large_binary()),
                raw_key=pa.array(raw_keys, pa.large_string()),
                label_lengths=label_lengths,
                labels=labels,
                score_lengths=score_lengths,
                scores=scores,
            )
            row += len(batch)

    return origin, parts()


def _list_tar(tar: Path, prefix: str, config: PackConfig) -> tuple[Origin, Iterator[_Part]]:
    """Samples of a WebDataset tar: labels in a member `json` (`labels` and `scores`, or `label`) or `cls`."""

    def parts() -> Iterator[_Part]:
        samples = tar_samples(tar)
        first = 0
        while chunk := list(itertools.islice(((s["__key__"], *_labels_of(s, tar, config)) for s in samples), ROWS)):
            keys, labels, scores = zip(*chunk, strict=True)
            flat = [label for of in labels for label in of]
            kinds = {type(label) for label in flat}
            if not kinds <= {int} and not kinds <= {str}:
                raise PackError(f"{tar} has labels of {', '.join(sorted(kind.__name__ for kind in kinds))}; give all ints or all names")
            try:
                values = pa.array(flat, pa.large_string() if str in kinds else pa.int64())
                weights = pa.array([score for of in scores for score in of], pa.float32())
            except (pa.ArrowException, OverflowError, TypeError) as error:
                raise PackError(f"{tar} has labels or scores that are no such numbers: {error}") from None
            yield _Part(
                row=np.arange(first, first + len(chunk), dtype=np.int64),
                path=pa.nulls(len(chunk), pa.large_binary()),
                raw_key=pa.array(keys, pa.large_string()),
                label_lengths=np.array([len(of) for of in labels], dtype=np.int64),
                labels=values,
                score_lengths=np.array([len(of) for of in scores], dtype=np.int64),
                scores=weights,
            )
            first += len(chunk)

    return Origin(prefix, tar.parent, tar), parts()


def tar_samples(tar: Path) -> Iterator[dict[str, Any]]:
    """The samples of a WebDataset tar, by the webdataset library's own rules; its decoders, which unpickle, are not used."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        _check_end(tar)
        with tar.open("rb") as file:
            yield from group_by_keys(tar_file_expander([{"url": str(tar), "stream": file}]))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise PackError(f"{tar} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None


def _check_end(tar: Path) -> None:
    """Raises TarError unless a tar ends in zeros or with its file: readers take a damaged header for the end, and what follows is lost."""
    with tarfile.open(tar, "r:") as opened, tar.open("rb") as file:
        for _ in opened:
            pass
        file.seek(opened.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"the header at byte {opened.offset} is damaged")


def _labels_of(sample: dict[str, Any], tar: Path, config: PackConfig) -> tuple[list[Any], list[Any]]:
    where = f"sample {sample['__key__']} of {tar}"
    try:
        told = json.loads(sample["json"]) if "json" in sample else {}
        if not isinstance(told, dict):
            raise PackError(f"{where} has a json that is no object; an object with `labels` works")
        names = LABEL_COLUMNS if config.label_column is None else (config.label_column,)
        name = next((name for name in names if name in told), None)
        if name is None and "cls" in sample:
            return [int(sample["cls"])], []
    except ValueError as error:
        raise PackError(f"{where} has a damaged label: {error}") from None
    if name is None:
        raise PackError(f"{where} has no label: neither a `cls` nor a `json` with {' or '.join(names)}; give label_column")
    labels = told[name] if isinstance(told[name], list) else [told[name]]
    scores = told.get(config.score_column or "scores") or []
    if not isinstance(scores, list):
        scores = [scores]
    return labels, scores


def is_tar(table: Path | None) -> bool:
    """Whether a source is a tar."""
    return table is not None and table.suffix.lower() == ".tar"


def _choose(table: Path, schema: pa.Schema, setting: str, given: str | None, usual: tuple[str, ...]) -> str | None:
    if given is not None and given not in schema.names:
        raise PackError(f"{setting}={given} is not a column of {table}; its columns are {', '.join(schema.names)}")
    return given if given is not None else next((name for name in usual if name in schema.names), None)


def _is_list(field: pa.Field) -> bool:
    kind = pa.types
    return bool(kind.is_list(field.type) or kind.is_large_list(field.type) or kind.is_fixed_size_list(field.type))


def _flat(column: pa.Array, what: str, first_row: int) -> tuple[np.ndarray, pa.Array]:
    """Labels of a batch: how many in each row, and all of them, as int64 or large_string."""
    lengths = np.ones(len(column), dtype=np.int64)
    if column.null_count:
        row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise PackError(f"{what} is null in row {row}; give a label, or an empty list for none")
    if _is_list(pa.field("", column.type)):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        column = column.flatten()
        if column.null_count:
            raise PackError(f"{what} has null inside a list, near row {first_row}; leave such labels out of the list")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
        if column.null_count:
            raise PackError(f"{what} has null in its dictionary, near row {first_row}; give a label, or an empty list for none")
    if pa.types.is_integer(column.type):
        return lengths, column.cast(pa.int64())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return lengths, column.cast(pa.large_string())
    raise PackError(f"{what} is {column.type}; labels are ints or strings, or lists of them")


def _flat_scores(column: pa.Array, what: str) -> tuple[np.ndarray, pa.Array]:
    """Scores of a batch, a null row being one without scores. A null inside a list becomes NaN, which is refused."""
    if _is_list(pa.field("", column.type)):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        column = column.flatten()
    else:
        lengths = column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        column = column.drop_null()
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise PackError(f"{what} is {column.type}; scores are numbers, or lists of them")
    return lengths, pc.fill_null(column.cast(pa.float32(), safe=False), float("nan"))


def _schema(table: Path) -> pa.Schema:
    if table.suffix.lower() == ".parquet":
        return pq.read_schema(table)
    if table.suffix.lower() in LIST_SUFFIXES:
        return _text_reader(table).schema
    with pa.memory_map(str(table)) as mapped:
        return _ipc_reader(mapped, None).schema


def _batches(table: Path, columns: list[str], parquet_rows: int) -> Iterator[pa.RecordBatch]:
    """The table from front to back. In memory: a row group of Parquet, a record batch of a compressed Arrow table."""
    for batch in _unchecked_batches(table, columns, parquet_rows):
        with _reading(table):
            batch.validate(full=True)  # offsets of a damaged table may point anywhere, and using them ends the process
        yield batch


def _unchecked_batches(table: Path, columns: list[str], parquet_rows: int) -> Iterator[pa.RecordBatch]:
    if table.suffix.lower() == ".parquet":
        with _reading(table), pq.ParquetFile(table) as file:
            yield from file.iter_batches(parquet_rows, columns=columns)
        return
    if table.suffix.lower() in LIST_SUFFIXES:
        with _reading(table):
            for batch in _text_reader(table):
                yield batch.select(columns)
        return
    with _reading(table), pa.memory_map(str(table)) as mapped:
        numbers = [_ipc_reader(mapped, None).schema.names.index(name) for name in columns]
        reader = _ipc_reader(mapped, pa.ipc.IpcReadOptions(included_fields=numbers))
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _text_reader(table: Path) -> Any:
    """A CSV, TSV or JSONL file in batches; types are those of the first megabyte, but names stay text whatever they look like."""
    if table.suffix.lower() == ".jsonl":
        return pa.json.open_json(table)
    names = {name: pa.string() for name in (*BYTES_COLUMNS, *PATH_COLUMNS, *KEY_COLUMNS)}
    parsing = pa.csv.ParseOptions(delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
    return pa.csv.open_csv(
        table, parse_options=parsing, convert_options=pa.csv.ConvertOptions(column_types=names, strings_can_be_null=True)
    )


def _ipc_reader(mapped: pa.MemoryMappedFile, options: pa.ipc.IpcReadOptions | None) -> Any:
    mapped.seek(0)
    if mapped.read(6) == b"ARROW1":
        return pa.ipc.open_file(mapped, options=options)
    mapped.seek(0)
    return pa.ipc.open_stream(mapped, options=options)


@contextmanager
def _reading(table: Path) -> Iterator[None]:
    """Makes one line of what pyarrow says of a damaged table."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PackError(f"{table} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None


# ---------------------------------------------------------------------------------------------------------- images


def in_table(origin: Origin) -> bool:
    """Whether the images of an origin lie in its table. A row cannot be read without its whole row group, so they are read in a stretch."""
    return origin.image_column is not None or is_tar(origin.table)


def table_images(origin: Origin) -> Iterator[bytes | Reject]:
    """All images that lie in a table or a tar, row by row."""
    if is_tar(origin.table):
        assert origin.table is not None
        for sample in tar_samples(origin.table):
            image = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
            yield image if image is not None else Reject("missing", f"no member of the sample is {', '.join(IMAGE_MEMBERS)}")
        return
    for column in image_cells(origin):
        for cell in column:
            value = cell.as_py()
            if isinstance(value, dict):  # Hugging Face: bytes, or else a path
                value = value.get("path") if value.get("bytes") is None else value["bytes"]
            yield value if isinstance(value, bytes) else read_image(value, origin.root)


def image_cells(origin: Origin) -> Iterator[pa.Array]:
    """The column with the images of a table, some rows at a time."""
    for batch in _batches(origin.table, [origin.image_column], 64):  # type: ignore[arg-type, list-item]
        yield batch.column(0)


def read_image(path: str | bytes | None, root: Path) -> bytes | Reject:
    """An image that is a file of its own."""
    if path is None:
        return Reject("missing", "neither bytes nor a path (null)")
    try:
        descriptor = os.open(os.path.join(root, os.fsdecode(path)), os.O_RDONLY | os.O_NONBLOCK)  # so that a pipe does not hang
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return Reject("missing", "not a plain file")
            if status.st_size > MAX_IMAGE_BYTES:
                return Reject("too large", f"{status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}")
            return _read_all(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return Reject("missing", str(error.strerror))
    except ValueError as error:  # a null character in the path
        return Reject("missing", str(error))


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size + 1)
    while more := os.read(descriptor, 1 << 20):  # the system gave less than was asked for, or the file grows
        data += more
    return data


def source_name(origin: Origin, row: int, path: bytes | None) -> str:
    """A sample's name for people: a path, or a table's name and row."""
    if path is None:
        assert origin.table is not None
        return f"{origin.prefix}{origin.table.name}#{row}"
    return origin.prefix + _printable(path)


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
