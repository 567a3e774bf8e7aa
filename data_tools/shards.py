"""One shard: a stretch of the plan becomes a tar and a *piece*, the rows that the dataset's tables get for it.

Where it stands: `pack.py` calls `write_shard` in any process and any order; `assemble.py` puts the pieces together.

Invariants: a shard depends on nothing but its stretch of the plan and its images; the piece is written last and at once, so where it is
there, the tar is there, whole and on disk; image bytes are stored as they came, unless the settings ask for others (`images.py`).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from data_tools import dataset as fmt
from data_tools.config import PackConfig
from data_tools.durable import fsync, put_in_place
from data_tools.images import Reject, Rules, prepare_image
from data_tools.origins import Origin, source_name
from data_tools.tar import TarWriter

PIECE_SCHEMA = pa.schema([*fmt.INDEX_SCHEMA, *(fmt.SAMPLES_SCHEMA.field(name) for name in ("key", "width", "height", "source"))])

Tell = Callable[[bool], None]  # called for each image: whether it was rejected


@dataclass(frozen=True)
class Piece:
    """A written shard: a row a sample of PIECE_SCHEMA, and what the manifest and the list of rejects say of it."""

    rows: pa.Table
    bytes: int
    checksum: str
    rejects: list[dict[str, str]]


def write_shard(
    tar_file: Path,
    piece_file: Path,
    planned: pa.Table,
    images: Iterable[bytes | Reject],
    origins: tuple[Origin, ...],
    config: PackConfig,
    tell: Tell,
    keep: Callable[[Path], None] | None = None,
) -> None:
    """Writes the tar of the planned samples, whose images come in their order, and then its piece. `keep` may take the tar elsewhere
    before."""
    columns: dict[str, list[Any]] = {name: [] for name in PIECE_SCHEMA.names}
    rejects: list[dict[str, str]] = []
    tar_file.parent.mkdir(parents=True, exist_ok=True)
    piece_file.parent.mkdir(parents=True, exist_ok=True)
    rules = Rules(config.check_images == "decode", config.max_pixels, config.min_side, config.max_side, config.quality, config.normalize)
    token = secrets.token_hex(4)  # another share may be at the same shard; both write the same
    beside = tar_file.with_name(f".{tar_file.name}.{token}.partial")
    with beside.open("wb") as file:
        tar = TarWriter(file.fileno())
        for sample, image in zip(planned.to_pylist(), images, strict=True):
            key, source = sample["key"], source_name(origins[sample["origin"]], sample["row"], sample["path"])
            stored = image if isinstance(image, Reject) else prepare_image(image, rules)
            if isinstance(stored, Reject):
                rejects.append({"source": source, "key": key, **asdict(stored)})
                tell(True)
                continue
            data, labels, scores = stored.data, sample["labels"], sample["scores"]
            offset = tar.add(f"{key}.{stored.extension}", data)
            tar.add(f"{key}.json", label_json(labels, scores))
            if config.write_cls and labels:
                tar.add(f"{key}.cls", str(labels[0]).encode())
            told = (offset, len(data), xxhash.xxh3_64_intdigest(data), labels, scores, key, stored.width, stored.height, source)
            for column, value in zip(columns.values(), told, strict=True):
                column.append(value)
            tell(False)
        tar.finish()
        os.fsync(file.fileno())
    beside.rename(tar_file)
    fsync(tar_file.parent)
    if keep is not None:
        keep(tar_file)
    said = {"bytes": tar.bytes, "checksum": tar.checksum, "rejects": rejects}
    table = pa.Table.from_pydict(columns, PIECE_SCHEMA.with_metadata({"shard": json.dumps(said)}))
    beside = piece_file.with_name(f".{piece_file.name}.{token}.partial")
    with pa.OSFile(str(beside), "wb") as opened, pa.ipc.new_file(opened, table.schema) as writer:
        writer.write_table(table)
    put_in_place(beside, piece_file)


def label_json(labels: list[int], scores: list[float]) -> bytes:
    """The member KEY.json of a sample."""
    return json.dumps({"labels": labels, "scores": scores}).encode()


def read_piece(piece_file: Path) -> Piece:
    """What `write_shard` left."""
    with pa.OSFile(str(piece_file)) as file:
        rows = pa.ipc.open_file(file).read_all()
    said = json.loads(rows.schema.metadata[b"shard"])
    return Piece(rows.replace_schema_metadata(None), said["bytes"], said["checksum"], said["rejects"])
