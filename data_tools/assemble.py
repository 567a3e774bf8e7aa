"""The dataset directory from its shards: index, tables, manifest, and dataset.json, which is written last.

Where it stands: `pack.py` calls `assemble` when all shards are there, `index.py` when all tars are read; `dataset.py` says what the files
hold.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools import dataset as fmt
from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.images import ACCEPTED, encoders
from data_tools.shards import Piece
from data_tools.sources import Listing
from data_tools.storage import Location, Url

INDEX_ROWS = 2**17  # rows of a record batch of the index, or a shard more: small to hold ...
INDEX_BATCHES = 128  # ... but no more batches than about this, because each costs those who open it


@dataclass(frozen=True)
class PackResult:
    """What became of one split. `reasons` counts the rejects by reason; rejects.parquet names each."""

    split: str
    path: Location
    samples: int
    shards: int
    rejects: int
    reasons: dict[str, int]
    classes: int
    empty_classes: tuple[str, ...]  # names or numbers of those that no sample of the split has
    bytes: int  # of all tars
    content_hash: str


def assemble(
    folder: Path,
    split: str,
    pieces: Iterable[Piece],
    planned: int,
    listing: Listing,
    config: PackConfig,
    *,
    shard_names: Sequence[str] | None = None,
    told: dict[str, Any] | None = None,
) -> None:
    """Writes all files of a split into `folder`, which holds its tars already. Raises PackError where no sample is left.

    Args:
        folder: what else lies in it goes away.
        split: its name.
        pieces: of its shards, in their order.
        planned: samples, rejected ones counted.
        listing: tells the classes.
        config: tells the dataset's name.
        shard_names: of the tars, if they are not `pack`'s own.
        told: what dataset.json says of how the dataset was made, if `pack` did not make it.
    """
    for left in (*folder.iterdir(), *folder.glob("shards/*/.*.partial")):  # by a start that was killed
        if left.is_dir() and left.name != "shards":
            shutil.rmtree(left)
        elif left.is_file():
            left.unlink()
    manifest: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    example = ""
    max_labels, num_samples, num_rejects = 1, 0, 0
    with IndexWriter(folder, index_rows(planned)) as index, SamplesWriter(folder) as samples, RejectsWriter(folder) as rejects:
        for number, piece in enumerate(pieces):
            index.write(piece.rows.select(fmt.INDEX_SCHEMA.names))
            samples.write(number, piece.rows.select(fmt.SAMPLES_SCHEMA.names))
            rejects.write(piece.rejects)
            counts = {"samples": len(piece.rows), "bytes": piece.bytes, "first_sample": num_samples}
            manifest.append(
                {"name": shard_names[number] if shard_names else fmt.shard_name(split, number), "checksum": piece.checksum, **counts}
            )
            num_samples += len(piece.rows)
            num_rejects += len(piece.rejects)
            reasons.update(reject["reason"] for reject in piece.rejects)
            if piece.rejects and not example:
                example = "{source}: {reason}, {detail}".format(**piece.rejects[0])
            labels = piece.rows["labels"].combine_chunks()
            max_labels = max(max_labels, *labels.value_lengths().to_pylist(), 1)
    if not num_samples:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise PackError(f"no usable image is left for {split}: {found} (first: {example}); {ACCEPTED}")

    write_parquet(folder / "manifest.parquet", manifest, fmt.MANIFEST_SCHEMA)
    if listing.class_names is not None:
        (folder / "classes.txt").write_text("\n".join(listing.class_names) + "\n", encoding="utf-8")
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tar")
    header: dict[str, Any] = {
        "format": fmt.FORMAT,
        "format_version": fmt.FORMAT_VERSION,
        "name": config.dataset_name,
        "split": split,
        "num_samples": num_samples,
        "num_shards": len(manifest),
        "num_rejects": num_rejects,
        "num_classes": listing.num_classes,
        "max_labels": max_labels,
        "made": made(config, listing.digest) if told is None else told,
        "files": {path.relative_to(folder).as_posix(): fmt.file_entry(path) for path in others},
    }
    header["content_hash"] = fmt.header_hash(header)
    (folder / "dataset.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def result_of(folder: Path, url: Url | None = None) -> PackResult:
    """What became of a split that is in place; or of one that is elsewhere, but for its tars and the names of its samples."""
    header = fmt.read_header(folder)
    dataset = Dataset.open(folder) if url is None else Dataset(folder, header)
    rejects = folder / "rejects.parquet"
    reasons = Counter(pq.read_table(rejects, columns=["reason"])["reason"].to_pylist()) if rejects.is_file() else Counter()
    used = dataset.used_classes()
    return PackResult(
        split=dataset.split,
        path=folder if url is None else url,
        samples=dataset.num_samples,
        shards=len(dataset.shard_names),
        rejects=header["num_rejects"],
        reasons=dict(reasons.most_common()),
        classes=dataset.num_classes,
        empty_classes=tuple(dataset.class_names[i] if dataset.class_names else str(i) for i in np.flatnonzero(~used)),
        bytes=int(dataset.shard_bytes.sum()),
        content_hash=dataset.content_hash,
    )


# Where things lay, where they go and who does the work must not change the content hash.
NOT_TOLD = ("sources", "out", "name", "split", "image_root", "class_map", "class_names", "jobs", "task", "work", "requests")


def made(config: PackConfig, listing: str | None) -> dict[str, Any]:
    """What dataset.json says of how a dataset was made, and of which listing."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_TOLD}
    settings["samples_per_shard"] = config.shard_samples
    if config.encodes:
        settings["encoders"] = encoders()
    return {"by": fmt.BY_PACK, "sources": config.source_names, "listing": listing, **settings}


def index_rows(samples: int) -> int:
    """About how many rows a record batch of the index has in a split of that many samples."""
    return max(INDEX_ROWS, samples // INDEX_BATCHES)


class IndexWriter(ExitStack):
    """index.arrow, in record batches of about `rows`."""

    def __init__(self, folder: Path, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._writer = self.enter_context(pa.ipc.new_file(str(folder / "index.arrow"), fmt.INDEX_SCHEMA))
        self._pending: list[pa.Table] = []
        self.callback(self._flush)  # before the writer is closed

    def write(self, rows: pa.Table) -> None:
        """Appends the rows of one shard."""
        self._pending.append(rows.cast(fmt.INDEX_SCHEMA))
        if sum(map(len, self._pending)) >= self._rows:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending = []


class SamplesWriter(ExitStack):
    """samples/*.parquet: a file for each folder of shards, a row group for each shard."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def write(self, shard: int, rows: pa.Table) -> None:
        """Appends the rows of one shard."""
        if shard % fmt.SHARDS_PER_FOLDER == 0:
            self.close()
            path = self._folder / fmt.samples_name(shard)
            path.parent.mkdir(exist_ok=True)
            self._writer = self.enter_context(pq.ParquetWriter(path, fmt.SAMPLES_SCHEMA, compression="zstd"))
        self._writer.write_table(rows.cast(fmt.SAMPLES_SCHEMA), row_group_size=max(1, len(rows)))


class RejectsWriter(ExitStack):
    """rejects.parquet, if there is any."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file = folder / "rejects.parquet"
        self._writer: pq.ParquetWriter | None = None

    def write(self, rejects: list[dict[str, str]]) -> None:
        """Appends the rows of one shard."""
        if rejects:
            if self._writer is None:
                self._writer = self.enter_context(pq.ParquetWriter(self._file, fmt.REJECTS_SCHEMA, compression="zstd"))
            self._writer.write_table(pa.Table.from_pylist(rejects, fmt.REJECTS_SCHEMA))


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """A small table, as all of a dataset are written."""
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")
