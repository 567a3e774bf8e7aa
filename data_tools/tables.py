"""Tables as sources: Parquet, Arrow files and streams, CSV, TSV and JSONL.

Where it stands: `sources.py` asks for the candidates of a table (`list_table`) and, where its images lie in it, for those (`row_images`).
Memory holds a row group of Parquet, or a record batch of a compressed Arrow table.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from data_tools.config import PackConfig, PackError
from data_tools.images import Reject
from data_tools.origins import ROWS, Origin, Part, read_images
from data_tools.storage import Location, RemoteFile, Url, location, sequential

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")  # tables as text, which must be named one by one: in a folder they are notes beside images
BYTES_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "class_name", "target")
SCORE_COLUMNS = ("scores", "score")
KEY_COLUMNS = ("key", "__key__", "id", "image_id")


def list_table(table: Location, prefix: str, config: PackConfig) -> tuple[Origin, Iterator[Part]]:
    """The table as an origin, and its candidates. Raises PackError for columns that are missing or no such thing."""
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
    root = location(config.image_root) if config.image_root is not None else table.parent
    origin = Origin(prefix, root, table, None if by_path else image)
    columns = [label, *([score] if score else []), *([key] if key else []), *([image] if by_path else [])]

    def parts() -> Iterator[Part]:
        row = 0
        for batch in _batches(table, list(dict.fromkeys(columns)), ROWS, label if config.class_map is not None else None):
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
            yield Part(
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


def row_images(origin: Origin, requests: int) -> Iterator[bytes | Reject]:
    """All images that lie in a table, row by row."""

    def wanted() -> Iterator[Callable[[], bytes] | tuple[str | None, Origin]]:
        for column in _image_cells(origin):
            for cell in column:
                value = cell.as_py()
                if isinstance(value, dict):  # Hugging Face: bytes, or else a path
                    value = value.get("path") if value.get("bytes") is None else value["bytes"]
                yield functools.partial(bytes, value) if isinstance(value, bytes) else (value, origin)

    return read_images(wanted(), requests)


def row_sizes(origin: Origin) -> Iterator[int | str | None]:
    """Of each image that `row_images` gives its bytes, of which only the lengths are looked at, or else its path."""
    for column in _image_cells(origin):
        paths: list[Any] = [None] * len(column)
        if pa.types.is_struct(column.type):
            names = {field.name for field in column.type}
            if "path" in names:
                paths = pc.struct_field(column, "path").to_pylist()
            column = pc.struct_field(column, "bytes") if "bytes" in names else pa.nulls(len(column), pa.binary())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            paths = [path if text is None else text for path, text in zip(paths, column.to_pylist(), strict=True)]
            column = pa.nulls(len(column), pa.binary())
        lengths = pc.binary_length(column.cast(pa.large_binary())).to_pylist()
        yield from (path if length is None else length for path, length in zip(paths, lengths, strict=True))


def _image_cells(origin: Origin) -> Iterator[pa.Array]:
    """The column with the images of a table, some rows at a time."""
    assert origin.table is not None and origin.image_column is not None  # noqa: PT018
    for batch in _batches(origin.table, [origin.image_column], 64):
        yield batch.column(0)


def _choose(table: Location, schema: pa.Schema, setting: str, given: str | None, usual: tuple[str, ...]) -> str | None:
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


def _schema(table: Location) -> pa.Schema:
    if table.suffix.lower() == ".parquet":
        with pq.ParquetFile(_by_ranges(table)) as file:
            return file.schema_arrow
    if table.suffix.lower() in LIST_SUFFIXES:
        return _text_reader(table).schema
    with _mapped(table) as mapped:
        return _ipc_reader(mapped, None).schema


def _batches(table: Location, columns: list[str], parquet_rows: int, as_text: str | None = None) -> Iterator[pa.RecordBatch]:
    """The table from front to back. In memory: a row group of Parquet, a record batch of a compressed Arrow table."""
    for batch in _unchecked_batches(table, columns, parquet_rows, as_text):
        with _reading(table):
            batch.validate(full=True)  # offsets of a damaged table may point anywhere, and using them ends the process
        yield batch


def _unchecked_batches(table: Location, columns: list[str], parquet_rows: int, as_text: str | None) -> Iterator[pa.RecordBatch]:
    if table.suffix.lower() == ".parquet":
        with _reading(table), pq.ParquetFile(_by_ranges(table)) as file:
            yield from file.iter_batches(parquet_rows, columns=columns)
        return
    if table.suffix.lower() in LIST_SUFFIXES:
        with _reading(table):
            for batch in _text_reader(table, as_text):
                yield batch.select(columns)
        return
    with _reading(table), _mapped(table) as mapped:
        numbers = [_ipc_reader(mapped, None).schema.names.index(name) for name in columns]
        reader = _ipc_reader(mapped, pa.ipc.IpcReadOptions(included_fields=numbers))
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _text_reader(table: Location, as_text: str | None = None) -> Any:
    """A CSV, TSV or JSONL file in batches; types are those of the first megabyte, but names stay text whatever they look like.

    A CSV's column `as_text` does too, for a class map may tell 01 from 1.
    """
    if table.suffix.lower() == ".jsonl":
        reader = pa.json.open_json(_in_a_row(table))
        texts = dates_as_text(reader.schema)
        return reader if texts is None else pa.json.open_json(_in_a_row(table), parse_options=texts)
    names = {name: pa.string() for name in (*BYTES_COLUMNS, *PATH_COLUMNS, *KEY_COLUMNS, *([as_text] if as_text else []))}
    parsing = pa.csv.ParseOptions(delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
    converting = pa.csv.ConvertOptions(column_types=names, strings_can_be_null=True, null_values=[""])  # NA may be a country, nan a word
    return pa.csv.open_csv(_in_a_row(table), parse_options=parsing, convert_options=converting)


def dates_as_text(schema: pa.Schema) -> pa.json.ParseOptions | None:
    """How to read JSON again in which texts were taken for dates, which no column holds here; None where none was."""

    def text(kind: pa.DataType) -> pa.DataType:
        return pa.list_(text(kind.value_type)) if pa.types.is_list(kind) else pa.string() if pa.types.is_timestamp(kind) else kind

    fields = [pa.field(field.name, text(field.type)) for field in schema if text(field.type) != field.type]
    return pa.json.ParseOptions(explicit_schema=pa.schema(fields)) if fields else None


def _ipc_reader(mapped: pa.NativeFile, options: pa.ipc.IpcReadOptions | None) -> Any:
    mapped.seek(0)
    if mapped.read(6) == b"ARROW1":
        return pa.ipc.open_file(mapped, options=options)
    mapped.seek(0)
    return pa.ipc.open_stream(mapped, options=options)


def _by_ranges(table: Location) -> Path | pa.PythonFile:
    """For Parquet, which asks for its footer and for the columns that are read."""
    return pa.PythonFile(RemoteFile(table), "r") if isinstance(table, Url) else table


def _in_a_row(table: Location) -> Path | pa.PythonFile:
    """For what is read from front to back."""
    return pa.PythonFile(sequential(table), "r") if isinstance(table, Url) else table


def _mapped(table: Location) -> pa.NativeFile:
    return pa.PythonFile(sequential(table), "r") if isinstance(table, Url) else pa.memory_map(str(table))


@contextmanager
def _reading(table: Location) -> Iterator[None]:
    """Makes one line of what pyarrow says of a damaged table."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PackError(f"{table} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None
