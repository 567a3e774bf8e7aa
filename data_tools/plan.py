"""The plan of a pack: which sample stands where. A pure function of the listing and the settings, made in files.

Where it stands: `sources.py` lists, here samples are dealt to splits and put in order, `shards.py` writes stretches of that order.

The samples of a split are cut into buckets: stretches of the order, each small enough to be sorted in memory. A shuffled order sorts by a
hash of the key, so the top bits of the hash tell the bucket; a kept order is the listing's own, so the place does. Images that lie in
tables are copied to files by bucket (`Spill`) in one pass over the tables, and are then read in any order.

Invariants: memory holds a bucket; the order depends on keys, seed and settings alone.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.config import PackConfig
from data_tools.durable import fsync, replace_file
from data_tools.images import Reject
from data_tools.keys import key_hashes
from data_tools.origins import ROWS
from data_tools.sources import LISTING_SCHEMA, Listing, in_table, read_batches, table_images

MAX_BUCKETS = 256  # files open at once, for each split
SPLIT_SEED = 0x73706C6974  # "split": whether a key is in val must not hang on the shuffle's seed
_SPAN = struct.Struct("<qq")
_ROUTED_SCHEMA = LISTING_SCHEMA.append(pa.field("hash", pa.uint64()))


@dataclass(frozen=True)
class Plan:
    """The order of one split: buckets as files of LISTING_SCHEMA, and where each begins in the order."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """Of each bucket, and the number of samples in all."""

    def __len__(self) -> int:
        return self.starts[-1]

    def rows(self, first: int, end: int) -> pa.Table:
        """The samples [first, end) of the order."""
        pieces = []
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:], strict=True):
            low, high = max(first, start), min(end, stop)
            if low < high:
                pieces.append(pa.ipc.open_file(pa.memory_map(str(file))).read_all().slice(low - start, high - low))
        return pa.concat_tables(pieces) if pieces else LISTING_SCHEMA.empty_table()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All samples, in their order."""
        for file in self.files:
            with pa.memory_map(str(file)) as mapped:
                reader = pa.ipc.open_file(mapped)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

    def buckets(self, first: int, end: int) -> range:
        """Numbers of the buckets that the samples [first, end) lie in."""
        touched = [i for i in range(len(self.files)) if max(first, self.starts[i]) < min(end, self.starts[i + 1])]
        return range(touched[0], touched[-1] + 1) if touched else range(0)


def make_plans(listing: Listing, config: PackConfig, splits: tuple[str, ...], folder: Path) -> tuple[dict[str, Plan], Path]:
    """The order of each split, and a file with the bucket of every place in the listing (`bucket_number`, uint16)."""
    count = _buckets(listing)
    routes = folder / "routes"
    with ExitStack() as stack:
        told = stack.enter_context(routes.open("wb"))
        writers = []
        for split in splits:
            for number in range(count):
                file = stack.enter_context(pa.OSFile(str(folder / f"{split}-{number:03d}.arrows"), "wb"))
                writers.append(stack.enter_context(pa.ipc.new_stream(file, _ROUTED_SCHEMA)))
        for batch in listing.batches():
            hashes, bucket = _route(batch, config, listing.num_samples, count)
            bucket.astype(np.uint16).tofile(told)
            order = np.argsort(bucket, kind="stable")
            columns = [*batch.columns, pa.array(hashes)]
            routed = pa.RecordBatch.from_arrays(columns, schema=_ROUTED_SCHEMA).take(pa.array(order))
            cuts = np.searchsorted(bucket[order], np.arange(len(writers) + 1))
            for number, writer in enumerate(writers):
                if cuts[number] < cuts[number + 1]:
                    writer.write_batch(routed.slice(cuts[number], cuts[number + 1] - cuts[number]))
    return {split: _sorted_plan(split, count, folder) for split in splits}, routes


def bucket_number(split: int, bucket: int, listing: Listing) -> int:
    """How `routes` names a bucket of the split with that number."""
    return split * _buckets(listing) + bucket


def _buckets(listing: Listing) -> int:
    """How many buckets each split has."""
    return min(MAX_BUCKETS, -(-listing.num_samples // ROWS))


def _route(batch: pa.RecordBatch, config: PackConfig, num_samples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What each sample is sorted by, and its bucket; those of the second split come after those of the first."""
    if config.shuffle_seed is None:
        hashes = batch["place"].to_numpy().astype(np.uint64)
        bucket = hashes.astype(np.int64) * count // num_samples
    else:
        hashes = key_hashes(batch["key"], config.shuffle_seed)
        bucket = ((hashes >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)
    if config.val_fraction:
        in_val = key_hashes(batch["key"], SPLIT_SEED) < np.uint64(config.val_fraction * 2**64)
        bucket = bucket + in_val * count
    return hashes, bucket


def _sorted_plan(split: str, count: int, folder: Path) -> Plan:
    files, starts = [], [0]
    for number in range(count):
        routed = folder / f"{split}-{number:03d}.arrows"
        table = pa.Table.from_batches(read_batches(routed), _ROUTED_SCHEMA)
        table = table.take(pc.sort_indices(table, [("hash", "ascending"), ("place", "ascending")])).drop_columns("hash")
        file = folder / f"{split}-{number:03d}.arrow"
        with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_file(opened, LISTING_SCHEMA) as writer:
            writer.write_table(table, max_chunksize=ROWS)
        routed.unlink()
        files.append(file)
        starts.append(starts[-1] + len(table))
    return Plan(tuple(files), tuple(starts))


# --------------------------------------------------------------------------------------------------------- spilled images


class Spill:
    """Images that lie in tables, copied to a file a bucket; `fill` again after a kill goes on with the table that it was at.

    FOLDER/spans        for each place of the listing offset and size in its bucket's file (int64; size < 0: a reject, as JSON)
    FOLDER/NNN.images   the bytes
    FOLDER/done.json    the tables that are copied, and how long the files were then
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._spans = os.open(folder / "spans", os.O_RDWR | os.O_CREAT, 0o666)
        self._files: dict[int, int] = {}

    def fill(self, listing: Listing, routes: Path, wanted: frozenset[int], requests: int) -> None:
        """Copies the images of the wanted buckets from all tables that have not been copied."""
        done_file = self.folder / "done.json"
        done: dict[str, Any] = json.loads(done_file.read_text()) if done_file.is_file() else {}
        if done.get("wanted") != sorted(wanted):
            done = {"wanted": sorted(wanted), "tables": 0, "sizes": {}}
        sizes = {int(bucket): size for bucket, size in done["sizes"].items()}
        for copied in self.folder.glob("*.images"):
            os.truncate(copied, sizes.get(int(copied.stem), 0))
        bucket_of = np.memmap(routes, np.uint16, "r")
        tables = [(number, origin) for number, origin in enumerate(listing.origins) if in_table(origin)]
        first_place = _first_places(listing)
        with ExitStack() as stack:
            files: dict[int, BinaryIO] = {}
            for done_tables, (number, origin) in enumerate(tables):
                if done_tables < done["tables"] or number not in first_place:  # copied, or without a row
                    continue
                place = first_place[number]
                for image in table_images(origin, requests):
                    bucket = int(bucket_of[place])
                    if bucket in wanted:
                        if bucket not in files:
                            files[bucket] = stack.enter_context((self.folder / f"{bucket:03d}.images").open("ab"))
                        data = json.dumps([image.reason, image.detail]).encode() if isinstance(image, Reject) else image
                        size = -len(data) if isinstance(image, Reject) else len(data)
                        os.pwrite(self._spans, _SPAN.pack(sizes.get(bucket, 0), size), place * _SPAN.size)
                        files[bucket].write(data)
                        sizes[bucket] = sizes.get(bucket, 0) + len(data)
                    place += 1
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                os.fsync(self._spans)
                fsync(self.folder)
                replace_file(done_file, json.dumps({"wanted": sorted(wanted), "tables": done_tables + 1, "sizes": sizes}))

    def __reduce__(self) -> tuple[Any, ...]:
        return Spill, (self.folder,)  # opened anew in another process

    def read(self, place: int, bucket: int) -> bytes | Reject:
        """The image of a place of the listing, which lies in that bucket."""
        if bucket not in self._files:
            self._files[bucket] = os.open(self.folder / f"{bucket:03d}.images", os.O_RDONLY)
        offset, size = _SPAN.unpack(os.pread(self._spans, _SPAN.size, place * _SPAN.size))
        data = os.pread(self._files[bucket], abs(size), offset)
        return Reject(*json.loads(data)) if size < 0 else data


def _first_places(listing: Listing) -> dict[int, int]:
    """Where the candidates of each origin begin in the listing."""
    first: dict[int, int] = {}
    for batch in listing.batches():
        for origin, place in _changes(batch):
            first.setdefault(origin, place)
    return first


def _changes(batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    origins, places = batch["origin"].to_numpy(), batch["place"].to_numpy()
    for index in np.flatnonzero(np.diff(origins, prepend=-1)).tolist():
        yield int(origins[index]), int(places[index])
