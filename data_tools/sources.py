"""What there is to pack: the listing of sources, with a key and labels for every image.

Where it stands: `pack.py` asks for a `Listing`, `plan.py` puts it in order, then `origins.read_images` and `table_images` give the bytes.
Formats are read by `tables.py` and `tars.py`. All that can be refused without reading an image (labels, columns, class names) is refused
before any tar is written.

Invariants:
- the listing is sorted and depends on names and contents only, not on the file system's order;
- keys are unique, and a key depends on its own image's name, unless names collide;
- memory holds some rows of the listing at a time, which lies in files, and never the images of a table.

Left to others: whether bytes are a good image, which sample goes where.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_tools.config import PackConfig, PackError
from data_tools.images import Reject
from data_tools.keys import clean_keys, hashed_key, key_hashes, repeated
from data_tools.labels import (
    Classes,
    ClassMap,
    Found,
    Lists,
    Sibling,
    check_scores,
    merge_duplicates,
    number_labels,
    read_class_map,
    settle_classes,
    starts_of,
)
from data_tools.origins import ROWS, Origin, Part, printable, source_name
from data_tools.storage import Location, Missing, Url, entries, exists, in_turn, location, walk
from data_tools.tables import LIST_SUFFIXES, TABLE_SUFFIXES, list_table, row_images
from data_tools.tars import is_tar, list_tar, tar_images

# Any other file in a class folder is looked into, so that no image is lost for its name.
NO_IMAGE_SUFFIXES = (".txt", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".npy", ".log", ".db", ".ini")
HIDDEN = (".", "__MACOSX")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}

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


def list_sources(config: PackConfig, sibling: Sibling | None, folder: Path) -> Listing:
    """Lists and checks all sources, in files in `folder`. `sibling` is another split of the same output, whose classes are then used."""
    class_folders: set[str] = set()
    return make_listing(_listed(config, class_folders), class_folders, config, sibling, folder)


def make_listing(
    listed: Iterable[tuple[Origin, Iterable[Part]]], class_names: set[str], config: PackConfig, sibling: Sibling | None, folder: Path
) -> Listing:
    """The listing of the candidates of these origins. Raises PackError where their labels are none of the classes.

    Args:
        listed: the origins, each with its candidates.
        class_names: that are there even if no candidate has them; looked at after the last origin.
        config: tells the classes, where it is not left to the candidates.
        sibling: another split, whose classes are then used.
        folder: for the listing's files.
    """
    origins, num_samples, found = _write_raw(listed, class_names, config.class_map, folder / "raw.arrows")
    if not num_samples:
        raise PackError(f"no images in {', '.join(config.sources)}; give a folder of class folders or a table with rows")
    classes = settle_classes(found, config, sibling)
    unlike = _names_like_others_numbers(classes) if found.names is None and config.class_map is None else {}
    attempts = _part_keys(folder, num_samples)
    listing = folder / "listing.arrows"
    digests = [xxhash.xxh3_128() for _ in LISTING_SCHEMA.names]  # one a column, so that it does not matter where batches end
    with pa.OSFile(str(listing), "wb") as file, pa.ipc.new_stream(file, LISTING_SCHEMA) as writer:
        for batch in read_batches(folder / "raw.arrows"):
            finished = _finished(batch, origins, classes, attempts)
            if unlike:
                _check_meaning(finished, origins, unlike)
            writer.write_batch(finished)
            for digest, column in zip(digests, finished.columns, strict=True):
                digest.update("".join(f"{value!r}\n" for value in column.to_pylist()).encode())
    told = repr([classes.names, classes.number, *(of_column.hexdigest() for of_column in digests)])
    for name in ("raw.arrows", "hashes", "attempts"):
        (folder / name).unlink()
    return Listing(tuple(origins), listing, num_samples, classes.names, classes.number, xxhash.xxh3_128_hexdigest(told.encode()))


def _listed(config: PackConfig, class_folders: set[str]) -> Iterator[tuple[Origin, Iterable[Part]]]:
    """The origins of all sources with their candidates; names of class folders are added to `class_folders`."""
    for number, text in enumerate(config.sources):
        source = location(text)
        prefix = f"{config.source_names[number]}/" if len(config.sources) > 1 else ""
        tables = _tables(source)
        if not tables:
            _check_class_folders(source, config)
            class_folders.update(entry.name for entry in _entries(source) if entry.is_dir())
            yield Origin(prefix, source), _list_folder(source, config.requests)
        for table in tables:
            yield list_tar(table, prefix, config) if is_tar(table) else list_table(table, prefix, config)


def _write_raw(
    listed: Iterable[tuple[Origin, Iterable[Part]]], class_names: set[str], map_file: str | None, file: Path
) -> tuple[list[Origin], int, Found]:
    """Writes all candidates as they come, and says what there is."""
    origins: list[Origin] = []
    names: set[str] = set()
    kinds: set[pa.DataType] = set()
    largest, place = None, 0
    class_map = read_class_map(map_file) if map_file is not None else None
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, _RAW_SCHEMA) as writer:
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
    named = bool(class_names) or pa.large_string() in kinds
    return origins, place, Found(frozenset(names | class_names) if named else None, largest)


def _mapped(part: Part, origin: Origin, class_map: ClassMap) -> Part:
    """The part with the classes of the map as its labels."""

    def source_of(number: int) -> str:
        return source_name(origin, part.row[number].item(), part.path[number].as_py())

    lists = class_map.apply(part.label_lengths, part.labels, part.score_lengths, part.scores, source_of)
    return Part(part.row, part.path, part.raw_key, *lists)


def _raw_batch(part: Part, origin: int, place: int) -> pa.RecordBatch:
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


def _names_like_others_numbers(classes: Classes) -> dict[int, str]:
    """Names of classes that look like the numbers of other ones, by those numbers."""
    names = enumerate(classes.names or ())
    return {int(name): name for number, name in names if name.isascii() and name.isdecimal() and len(name) < 10 and int(name) != number}


def _check_meaning(batch: pa.RecordBatch, origins: list[Origin], unlike: dict[int, str]) -> None:
    """Raises PackError where text that was read as a number may as well be a class's name. Other tables tell the one from the other."""
    of_text = [origin.table is not None and origin.table.suffix.lower() in (".csv", ".tsv") for origin in origins]
    rows = np.flatnonzero(np.array(of_text, bool)[batch["origin"].to_numpy()])
    labels = batch["labels"].take(pa.array(rows))
    wrong = np.flatnonzero(np.isin(labels.flatten().to_numpy(), list(unlike)))
    if len(wrong):
        row = int(rows[np.searchsorted(_starts(labels), wrong[0], side="right") - 1])
        label, source = labels.flatten()[int(wrong[0])].as_py(), origins[batch["origin"][row].as_py()]
        raise PackError(
            f"label {label} of {source_name(source, batch['row'][row].as_py(), batch['path'][row].as_py())} may be class number {label} or "
            f"the class named {unlike[label]!r}, which has another number; give JSONL, where {label} is the number and "
            f'"{unlike[label]}" the name'
        )


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


def _tables(source: Location) -> list[Location]:
    """The tables that a source stands for; none for a folder of class folders."""
    if _is_file(source):
        suffixes = (*TABLE_SUFFIXES, *LIST_SUFFIXES, ".tar")
        if source.suffix.lower() not in suffixes:
            raise PackError(f"{source} is neither a table nor a tar by its name; these are: {', '.join(suffixes)}")
        return [source]
    if isinstance(source, Path) and not source.is_dir():
        raise PackError(f"source {source} does not exist; give a folder or a table")
    try:
        there = _entries(source)
    except Missing:
        raise PackError(f"source {source} does not exist; give a folder or a table") from None
    tables = [source / entry.name for entry in there if entry.name.lower().endswith((*TABLE_SUFFIXES, ".tar"))]
    if tables and len(tables) < len(there):
        other = next(entry.name for entry in there if source / entry.name not in tables)
        raise PackError(f"{source} holds tables and also {other}; name the tables or the folder of class folders")
    return tables


def _is_file(source: Location) -> bool:
    """Whether a source is a file of its own; an object is known to be one by its name, since a folder may begin like it."""
    if isinstance(source, Path):
        return source.is_file()
    return source.on_web or (source.suffix.lower() in (*TABLE_SUFFIXES, *LIST_SUFFIXES, ".tar") and exists(source))


def _check_class_folders(root: Location, config: PackConfig) -> None:
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


def _list_folder(root: Location, requests: int) -> Iterator[Part]:
    """The images of each class folder; the lists of folders in object storage are asked for ahead."""
    classes = _entries(root)
    listed = in_turn(classes, lambda _: isinstance(root, Url), lambda folder, _: _below(root / folder.name), min(requests, len(classes)))
    for folder, files in zip(classes, listed, strict=True):
        paths = [f"{folder.name}/{path}" for path in files]
        raw_keys = [printable(os.fsencode(os.path.splitext(path)[0])) for path in paths]
        yield Part(
            row=np.full(len(paths), -1, dtype=np.int64),
            path=pa.array([os.fsencode(path) for path in paths], pa.large_binary()),
            raw_key=pa.array(raw_keys, pa.large_string()),
            label_lengths=np.ones(len(paths), dtype=np.int64),
            labels=pa.array([folder.name] * len(paths), pa.large_string()),
            score_lengths=np.zeros(len(paths), dtype=np.int64),
            scores=pa.array([], pa.float32()),
        )


def _below(folder: Location) -> list[str]:
    return _objects(walk(folder)) if isinstance(folder, Url) else list(_files(folder, frozenset()))


def _objects(sizes: dict[str, int]) -> list[str]:
    """What `_files` gives, of all the objects below a place. Objects of no bytes that stand for folders are none."""
    folders = {path.rpartition("/")[0] for path in sizes}
    parts = [path.split("/") for path, size in sizes.items() if size or path not in folders]
    seen = (of for of in parts if not any(part.startswith(HIDDEN) for part in of) and not of[-1].lower().endswith(NO_IMAGE_SUFFIXES))
    return ["/".join(of) for of in sorted(seen, key=lambda of: [part.encode() for part in of])]


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


class _Entry(NamedTuple):
    """What a folder in object storage holds; as os.DirEntry."""

    name: str
    folder: bool

    def is_dir(self) -> bool:
        return self.folder


def _entries(folder: Location) -> list[_Entry | os.DirEntry[str]]:
    """What counts in a folder, sorted: not hidden, and not a file whose suffix says that it is no image."""
    if isinstance(folder, Url):
        folders, objects = entries(folder)
        return _that_count([*(_Entry(name, True) for name in folders), *(_Entry(name, False) for name in objects)])
    with os.scandir(folder) as scanned:
        return _that_count(scanned)


def _that_count(there: Iterable[_Entry | os.DirEntry[str]]) -> list[_Entry | os.DirEntry[str]]:
    seen = (entry for entry in there if not entry.name.startswith(HIDDEN))
    return sorted(
        (entry for entry in seen if entry.is_dir() or not entry.name.lower().endswith(NO_IMAGE_SUFFIXES)),
        key=lambda entry: os.fsencode(entry.name),
    )


# ---------------------------------------------------------------------------------------------------------- images


def in_table(origin: Origin) -> bool:
    """Whether the images of an origin lie in its table. A row cannot be read without its whole row group, so they are read in a stretch."""
    return origin.image_column is not None or is_tar(origin.table)


def table_images(origin: Origin, requests: int) -> Iterator[bytes | Reject]:
    """All images that lie in a table or a tar, row by row; `requests` at once to object storage, where rows have paths after all."""
    if is_tar(origin.table):
        assert origin.table is not None
        return tar_images(origin.table)
    return row_images(origin, requests)
