"""Datasets of any size without pixels: all files but the tars, written directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools import dataset as fmt


def write_dataset(
    path: Path,
    *,
    labels: list[list[int]] | tuple[np.ndarray, np.ndarray],
    shard_sizes: list[int],
    num_classes: int,
    scores: list[list[float]] | None = None,
    sizes: np.ndarray | None = None,
    shapes: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: list[str] | None = None,
    rejects: list[dict[str, str]] | None = None,
    rows: int = 7,
    max_labels: int | None = None,
    name: str = "synthetic",
    compression: str | None = None,
) -> Path:
    """Writes a split of sum(shard_sizes) samples into `path`; `labels` are lists, or values and starts. `rows`: of the index's batches."""
    path.mkdir(parents=True)
    count = sum(shard_sizes)
    if isinstance(labels, tuple):
        values, starts = labels
    else:
        values, starts = np.array([label for row in labels for label in row], np.int32), np.cumsum([0, *map(len, labels)])
    nothing = pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.float32()))
    columns = [
        pa.array(np.arange(count) * 1024),
        pa.array(np.ones(count, np.int32) if sizes is None else sizes.astype(np.int32)),
        pa.array(np.arange(count, dtype=np.uint64)),
        pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), pa.array(values.astype(np.int32))),
        nothing if scores is None else pa.array(scores, pa.list_(pa.float32())),
    ]
    table = pa.Table.from_arrays(columns, schema=fmt.INDEX_SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path / "index.arrow"), fmt.INDEX_SCHEMA, options=options) as writer:
        for first in range(0, count, rows):
            writer.write_table(table.slice(first, rows).combine_chunks())
    names = [fmt.shard_name("train", number) for number in range(len(shard_sizes))]
    firsts = np.cumsum([0, *shard_sizes[:-1]])
    tars = [1024 * (2 * size + 1) for size in shard_sizes]
    manifest = {"name": names, "samples": shard_sizes, "bytes": tars, "checksum": [""] * len(names), "first_sample": firsts}
    pq.write_table(pa.table(manifest, fmt.MANIFEST_SCHEMA), path / "manifest.parquet")
    files = ["index.arrow", "manifest.parquet"]
    if shapes is not None:
        (path / "samples").mkdir()
        for folder in range(0, len(shard_sizes), fmt.SHARDS_PER_FOLDER):
            files.append(fmt.samples_name(folder))
            with pq.ParquetWriter(path / files[-1], fmt.SAMPLES_SCHEMA) as writer:
                for shard in range(folder, min(folder + fmt.SHARDS_PER_FOLDER, len(shard_sizes))):
                    stretch = slice(int(firsts[shard]), int(firsts[shard]) + shard_sizes[shard])
                    numbers = range(stretch.start, stretch.stop)
                    rows_of = {
                        "key": [f"key-{number}" for number in numbers],
                        "hash": np.arange(stretch.start, stretch.stop, dtype=np.uint64),
                        "width": shapes[0][stretch].astype(np.int32),
                        "height": shapes[1][stretch].astype(np.int32),
                        "source": [f"{number}.jpg" for number in numbers],
                    }
                    writer.write_table(pa.table(rows_of, fmt.SAMPLES_SCHEMA), row_group_size=max(1, shard_sizes[shard]))
    if class_names is not None:
        (path / "classes.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
        files.append("classes.txt")
    if rejects:
        pq.write_table(pa.Table.from_pylist(rejects, fmt.REJECTS_SCHEMA), path / "rejects.parquet")
        files.append("rejects.parquet")
    header: dict[str, Any] = {
        "format": fmt.FORMAT,
        "format_version": fmt.FORMAT_VERSION,
        "name": name,
        "split": "train",
        "num_samples": count,
        "num_shards": len(shard_sizes),
        "num_rejects": len(rejects or []),
        "num_classes": num_classes,
        "max_labels": max_labels if max_labels is not None else max(1, int(np.diff(starts).max(initial=1))),
        "made": {},
        "files": {file: fmt.file_entry(path / file) for file in files},
    }
    header["content_hash"] = fmt.header_hash(header)
    (path / "dataset.json").write_text(json.dumps(header))
    return path
