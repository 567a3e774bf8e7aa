"""Where shards end that are to have no more than so many bytes: planned from the sizes of the images, before any is read.

Where it stands: `pack.py` asks for this where `shard_bytes` is set; `plan.py` has the order, `shards.py` writes what is planned here.

Invariants:
- a shard ends before the sample with which its tar would have more than `shard_bytes`, headers, padding, labels and end included; a sample
  that is larger alone has a shard of its own;
- the sizes are those of the images as they lie in the sources, so a shard whose images are rejected or encoded anew comes out smaller or,
  where that makes them larger, larger; an image that cannot be found counts as empty;
- memory holds some rows, and a number for each shard: the sizes lie in a file.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_tools.config import PackConfig
from data_tools.origins import PATH_ERRNOS, Origin, locate
from data_tools.plan import Plan
from data_tools.shards import label_json
from data_tools.sources import Listing, in_table
from data_tools.storage import Missing, RemoteFile, Url
from data_tools.tables import row_sizes
from data_tools.tar import BLOCK
from data_tools.tars import is_tar, tar_sizes

LOOKERS = 16  # threads that ask for the sizes of files, which on a network takes the time of a round trip
END = 2 * BLOCK  # of a tar


def planned_ends(listing: Listing, plans: dict[str, Plan], config: PackConfig, folder: Path) -> dict[str, list[int]]:
    """Where each shard of each split ends in the split's order. Writes the sizes of all images into `folder` on the way."""
    assert config.shard_bytes is not None
    sizes = _image_sizes(listing, folder / "sizes")
    most_samples = config.shard_samples or listing.num_samples
    return {
        split: shard_ends(_tar_sizes(plan, sizes, config.write_cls), config.shard_bytes - END, most_samples)
        for split, plan in plans.items()
    }


def digest_of(listing: str, ends: dict[str, list[int]]) -> str:
    """A listing's digest that also stands for where shards end."""
    return xxhash.xxh3_128_hexdigest(json.dumps([listing, ends], sort_keys=True).encode())


def shard_ends(sizes: Iterable[np.ndarray], most_bytes: int, most_samples: int) -> list[int]:
    """Where each shard ends, for samples of these sizes (in pieces), filled in their order to at most so many bytes and samples."""
    ends: list[int] = []
    first = held_samples = held_bytes = 0
    for piece in sizes:
        totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(piece, dtype=np.int64)])
        at = 0
        while at < len(piece):
            fitting = int(np.searchsorted(totals, totals[at] + (most_bytes - held_bytes), side="right")) - 1
            end = min(max(fitting, at if held_samples else at + 1), at + most_samples - held_samples, len(piece))
            held_samples += end - at
            held_bytes += int(totals[end] - totals[at])
            if end < len(piece):
                ends.append(first + end)
                held_samples = held_bytes = 0
            at = end
        first += len(piece)
    return [*ends, first] if held_samples else ends


def _tar_sizes(plan: Plan, sizes: np.ndarray, write_cls: bool) -> Iterator[np.ndarray]:
    """What each sample of a split takes in a tar, in the split's order, in pieces."""
    for batch in plan.batches():
        images = sizes[batch["place"].to_numpy()]
        taken = BLOCK + _blocks(images) + BLOCK + _blocks(_json_lengths(batch))
        if write_cls:
            taken += 2 * BLOCK * (pc.list_value_length(batch["labels"]).to_numpy() > 0)
        yield taken


def _blocks(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // BLOCK) * BLOCK


def _json_lengths(batch: pa.RecordBatch) -> np.ndarray:
    """The length of each sample's JSON; of one that is sure to fit into one block, the block's."""
    longest = 28 + sum(
        digits * pc.list_value_length(batch[name]).to_numpy().astype(np.int64) for name, digits in (("labels", 12), ("scores", 26))
    )
    lengths = np.full(len(batch), BLOCK, np.int64)
    for row in np.flatnonzero(longest > BLOCK).tolist():
        lengths[row] = len(label_json(batch["labels"][row].as_py(), batch["scores"][row].as_py()))
    return lengths


# ------------------------------------------------------------------------------------------------------------------ images


def _image_sizes(listing: Listing, file: Path) -> np.ndarray:
    """The size of each image in bytes, by its place in the listing, in a file that is mapped."""
    sizes = np.memmap(file, np.int64, "w+", shape=(listing.num_samples,))
    in_cells = {number: _cell_sizes(origin) for number, origin in enumerate(listing.origins) if in_table(origin)}
    with ThreadPoolExecutor(LOOKERS) as pool:
        for batch in listing.batches():
            origins = batch["origin"].to_numpy()
            taken = np.zeros(len(batch), np.int64)
            for number in np.unique(origins).tolist():
                rows = np.flatnonzero(origins == number)
                if number in in_cells:  # the listing has an origin's rows in their order, and all of them
                    taken[rows] = np.fromiter(itertools.islice(in_cells[number], len(rows)), np.int64, len(rows))
                else:
                    origin = listing.origins[number]
                    paths = batch["path"].take(pa.array(rows)).to_pylist()
                    pieces = [paths[start::LOOKERS] for start in range(LOOKERS)]
                    for start, found in enumerate(
                        pool.map(lambda piece, origin=origin: [_file_size(path, origin) for path in piece], pieces)
                    ):
                        taken[rows[start::LOOKERS]] = found
            first = batch["place"][0].as_py()
            sizes[first : first + len(batch)] = taken
    return sizes


def _file_size(path: str | bytes | None, origin: Origin) -> int:
    """Bytes of an image that is a file or an object of its own; 0 for what cannot be found, and is rejected when its turn comes."""
    place = locate(path, origin)
    try:
        if isinstance(place, Url):
            return RemoteFile(place).size
        status = os.stat(place) if isinstance(place, str) else None
    except (Missing, ValueError):  # or a null character in the path
        return 0
    except OSError as error:
        if error.errno not in PATH_ERRNOS:
            raise
        return 0
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else 0


def _cell_sizes(origin: Origin) -> Iterator[int]:
    """The sizes of all images that lie in a table or a tar, row by row."""
    assert origin.table is not None
    if is_tar(origin.table):
        return tar_sizes(origin.table)
    return (of if isinstance(of, int) else _file_size(of, origin) for of in row_sizes(origin))
