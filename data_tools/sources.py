"""What there is to pack: the listing of sources, with a key and labels for every image, and the reading of its bytes.

Where it stands: `pack.py` asks for a `Listing`, plans shards from it, then asks `Images` for the bytes. All that can be
refused without reading an image (labels, columns, class names) is refused here, before anything is written.

Invariants:
- the listing is sorted and depends on names and contents only, not on the file system's order;
- keys are unique, and a key depends on its own image's name, unless names collide;
- memory holds the listing (names and labels as flat arrays), never the images of a table.

Left to others: whether bytes are a good image, which sample goes where.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.keys import unique_keys
from data_tools.labels import Lists, check_scores, merge_duplicates, number_labels, starts_of

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
# Any other file in a class folder is looked into, so that no image is lost for its name.
NO_IMAGE_SUFFIXES = (".txt", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".npy", ".log", ".db", ".ini")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
BYTES_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "class_name", "target")
SCORE_COLUMNS = ("scores", "score")
KEY_COLUMNS = ("key", "__key__", "id", "image_id")
MAX_IMAGE_BYTES = 2**30
ROWS = 65_536  # rows turned into Python objects at a time

# What an image's own path can be at fault for. Other errors are the machine's and end the run.
PATH_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True)
class Reject:
    """Why one image is left out: a reason of a few words for counting, and a detail for a person."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Origin:
    """One folder of class folders, or one table."""

    prefix: str  # in front of the names of its samples, where there are several sources
    root: Path  # where relative paths start
    table: Path | None = None
    image_column: str | None = None  # set if the image bytes lie in the table


@dataclass(frozen=True)
class Listing:
    """All candidates, in order. `scores` has lists as long as those of `labels`, or empty ones."""

    origins: tuple[Origin, ...]
    origin: np.ndarray  # int32, number in origins
    row: np.ndarray  # int64, row in the origin's table, -1 in a folder
    path: pa.LargeBinaryArray  # from the origin's root; null where the bytes lie in a table
    key: pa.LargeStringArray
    labels: Lists
    scores: Lists
    class_names: tuple[str, ...] | None
    num_classes: int

    def __len__(self) -> int:
        return len(self.origin)

    def source(self, row: int) -> str:
        """The sample's name for people: a path, or a table's name and row."""
        return _source(self.origins[self.origin[row]], int(self.row[row]), self.path[row].as_py())


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


def list_sources(config: PackConfig, sibling: Dataset | None) -> Listing:
    """Lists and checks all sources. `sibling` is another split of the same output, whose classes are then used."""
    origins: list[Origin] = []
    parts: list[_Part] = []
    origin_of: list[np.ndarray] = []
    class_folders: set[str] = set()
    for text in config.sources:
        source = Path(text)
        prefix = f"{source.resolve().name}/" if len(config.sources) > 1 else ""
        tables = _tables(source)
        if not tables:
            _check_class_folders(source, config)
            class_folders.update(entry.name for entry in _entries(source) if entry.is_dir())
        listed = [_list_table(table, prefix, config) for table in tables] or [(Origin(prefix, source), _list_folder(source))]
        for origin, found in listed:
            for part in found:
                parts.append(part)
                origin_of.append(np.full(len(part.row), len(origins), dtype=np.int32))
            origins.append(origin)
    if not sum(len(part.row) for part in parts):
        raise PackError(f"no images in {', '.join(config.sources)}; give a folder of class folders or a table with rows")

    origin_rows = np.concatenate(origin_of)
    rows = np.concatenate([part.row for part in parts])
    path = pa.concat_arrays([part.path for part in parts])

    def source_of(number: int) -> str:
        return _source(origins[origin_rows[number]], int(rows[number]), path[number].as_py())

    if len({part.labels.type for part in parts if len(part.labels)}) > 1:
        raise PackError("some sources have numbers as labels and some have names; give all of them names or all numbers")
    labels = pa.concat_arrays([part.labels for part in parts if len(part.labels)] or [parts[0].labels])
    label_starts = starts_of([part.label_lengths for part in parts])
    class_names, num_classes, ids = number_labels(labels, label_starts, class_folders, config, sibling, source_of)
    score_starts = starts_of([part.score_lengths for part in parts])
    scores = pa.concat_arrays([part.scores for part in parts]).to_numpy(zero_copy_only=False)
    check_scores(label_starts, score_starts, scores, source_of)
    merged_labels, merged_scores = merge_duplicates(Lists(label_starts, ids), Lists(score_starts, scores))

    raw_keys = pa.concat_arrays([part.raw_key for part in parts])
    keys = unique_keys(raw_keys, lambda number: f"{origin_rows[number]}\0{rows[number]}\0{source_of(number)}")
    return Listing(tuple(origins), origin_rows, rows, path, keys, merged_labels, merged_scores, class_names, num_classes)


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
        if source.suffix.lower() not in TABLE_SUFFIXES:
            raise PackError(f"{source} is not a table by its name; these are: {', '.join(TABLE_SUFFIXES)}")
        return [source]
    if not source.is_dir():
        raise PackError(f"source {source} does not exist; give a folder or a table")
    entries = _entries(source)
    tables = [source / entry.name for entry in entries if entry.name.lower().endswith(TABLE_SUFFIXES)]
    if tables and len(tables) < len(entries):
        other = next(entry.name for entry in entries if source / entry.name not in tables)
        raise PackError(f"{source} holds tables and also {other}; name the tables or the folder of class folders")
    return tables


def _list_table(table: Path, prefix: str, config: PackConfig) -> tuple[Origin, Iterator[_Part]]:
    with _reading(table):
        schema = _schema(table)
    image = _choose(table, schema, "image_column", config.image_column, BYTES_COLUMNS + PATH_COLUMNS)
    label = _choose(table, schema, "label_column", config.label_column, LABEL_COLUMNS)
    if image is None or label is None:
        raise PackError(
            f"{table} has no column for the {'image' if image is None else 'label'} among {', '.join(schema.names)}; "
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
    with pa.memory_map(str(table)) as mapped:
        return _ipc_reader(mapped, None).schema


def _batches(table: Path, columns: list[str], parquet_rows: int) -> Iterator[pa.RecordBatch]:
    """The table from front to back. In memory: a row group of Parquet, a record batch of a compressed Arrow table."""
    if table.suffix.lower() == ".parquet":
        with _reading(table), pq.ParquetFile(table) as file:
            yield from file.iter_batches(parquet_rows, columns=columns)
        return
    with _reading(table), pa.memory_map(str(table)) as mapped:
        numbers = [_ipc_reader(mapped, None).schema.names.index(name) for name in columns]
        reader = _ipc_reader(mapped, pa.ipc.IpcReadOptions(included_fields=numbers))
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


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
    except (pa.ArrowException, OSError) as error:
        raise PackError(f"{table} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None


# ---------------------------------------------------------------------------------------------------------- images


class Images:
    """Reads images of a listing.

    A row of a table cannot be read by itself without reading its whole row group. So tables are read from front to back
    once, either in the order wanted (`spool` None, rows must rise) or into `spool`, a temporary file that needs room
    for all images of the tables and from which they are then read in any order.
    """

    def __init__(self, listing: Listing, spool: BinaryIO | None) -> None:
        self._listing = listing
        self._spool = spool
        self._rejects: dict[int, Reject] = {}
        if spool is not None:
            self._spans = np.zeros((len(listing), 2), dtype=np.int64)
            for row, image in self._table_images():
                if isinstance(image, Reject):
                    self._rejects[row] = image
                else:
                    self._spans[row] = spool.tell(), len(image)
                    spool.write(image)
            spool.flush()

    def read(self, rows: Iterable[int]) -> Iterator[bytes | Reject]:
        """The images of the rows, in that order."""
        listing, table_images = self._listing, self._table_images()
        for row in rows:
            origin = listing.origins[listing.origin[row]]
            if origin.image_column is None:
                yield _image_of(listing.path[row].as_py(), origin.root)
            elif self._spool is None:
                yield next(image for number, image in table_images if number == row)
            elif row in self._rejects:
                yield self._rejects[row]
            else:
                offset, size = self._spans[row].tolist()
                yield os.pread(self._spool.fileno(), size, offset)

    def _table_images(self) -> Iterator[tuple[int, bytes | Reject]]:
        """All images that lie in tables, with their rows in the listing."""
        for number, origin in enumerate(self._listing.origins):
            if origin.table is None or origin.image_column is None:
                continue
            rows = np.flatnonzero(self._listing.origin == number)
            yield from zip(rows.tolist(), _cells(origin), strict=True)


def needs_spool(listing: Listing) -> bool:
    """Whether any image lies in a table."""
    return any(origin.image_column is not None for origin in listing.origins)


def _cells(origin: Origin) -> Iterator[bytes | Reject]:
    for batch in _batches(origin.table, [origin.image_column], 64):  # type: ignore[arg-type, list-item]
        for cell in batch.column(0):
            value = cell.as_py()
            if isinstance(value, dict):  # Hugging Face: bytes, or else a path
                value = value.get("path") if value.get("bytes") is None else value["bytes"]
            yield value if isinstance(value, bytes) else _image_of(value, origin.root)


def _image_of(path: str | bytes | None, root: Path) -> bytes | Reject:
    if path is None:
        return Reject("missing", "neither bytes nor a path (null)")
    file = root / os.fsdecode(path)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return Reject("missing", "not a plain file")
        if status.st_size > MAX_IMAGE_BYTES:
            return Reject("too large", f"{status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}")
        return file.read_bytes()
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return Reject("missing", str(error.strerror))
    except ValueError as error:  # a null character in the path
        return Reject("missing", str(error))


def _source(origin: Origin, row: int, path: bytes | None) -> str:
    if path is None:
        assert origin.table is not None
        return f"{origin.prefix}{origin.table.name}#{row}"
    return origin.prefix + _printable(path)


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
