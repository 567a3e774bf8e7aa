"""One shard: a stretch of the plan becomes a tar and a *piece*, the rows that the dataset's tables get for it.

Where it stands: `pack.py` calls `write_shard` in any process and any order; `assemble.py` puts the pieces together.

Invariants: a shard depends on nothing but its stretch of the plan and its images; the piece is written last and at once, so where it is
there, the tar is there, whole and on disk; image bytes are stored as they came.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from PIL import Image

from data_tools import dataset as fmt
from data_tools.config import PackConfig
from data_tools.durable import fsync
from data_tools.sources import MAX_IMAGE_BYTES, Origin, Reject, source_name
from data_tools.tar import TarWriter

PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ACCEPTED = "accepted: jpeg, png, webp"
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
) -> None:
    """Writes the tar of the planned samples, whose images come in their order, and then its piece."""
    columns: dict[str, list[Any]] = {name: [] for name in PIECE_SCHEMA.names}
    rejects: list[dict[str, str]] = []
    tar_file.parent.mkdir(parents=True, exist_ok=True)
    piece_file.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # another share may be at the same shard; both write the same
    beside = tar_file.with_name(f".{tar_file.name}.{token}.partial")
    with beside.open("wb") as file:
        tar = TarWriter(file.fileno())
        for sample, image in zip(planned.to_pylist(), images, strict=True):
            key, source = sample["key"], source_name(origins[sample["origin"]], sample["row"], sample["path"])
            judged = image if isinstance(image, Reject) else inspect_image(image, config.max_pixels, config.check_images == "decode")
            if isinstance(judged, Reject):
                rejects.append({"source": source, "key": key, **asdict(judged)})
                tell(True)
                continue
            assert isinstance(image, bytes)  # as it was judged
            extension, width, height = judged
            labels, scores = sample["labels"], sample["scores"]
            offset = tar.add(f"{key}.{extension}", image)
            tar.add(f"{key}.json", json.dumps({"labels": labels, "scores": scores}).encode())
            if config.write_cls and labels:
                tar.add(f"{key}.cls", str(labels[0]).encode())
            told = (offset, len(image), xxhash.xxh3_64_intdigest(image), labels, scores, key, width, height, source)
            for column, value in zip(columns.values(), told, strict=True):
                column.append(value)
            tell(False)
        tar.finish()
        os.fsync(file.fileno())
    beside.rename(tar_file)
    fsync(tar_file.parent)
    said = {"bytes": tar.bytes, "checksum": tar.checksum, "rejects": rejects}
    table = pa.Table.from_pydict(columns, PIECE_SCHEMA.with_metadata({"shard": json.dumps(said)}))
    beside = piece_file.with_name(f".{piece_file.name}.{token}.partial")
    with pa.OSFile(str(beside), "wb") as opened, pa.ipc.new_file(opened, table.schema) as writer:
        writer.write_table(table)
    fsync(beside)
    beside.rename(piece_file)
    fsync(piece_file.parent)


def read_piece(piece_file: Path) -> Piece:
    """What `write_shard` left."""
    with pa.OSFile(str(piece_file)) as file:
        rows = pa.ipc.open_file(file).read_all()
    said = json.loads(rows.schema.metadata[b"shard"])
    return Piece(rows.replace_schema_metadata(None), said["bytes"], said["checksum"], said["rejects"])


def inspect_image(data: bytes, max_pixels: int, decode: bool = True) -> tuple[str, int, int] | Reject:
    """The extension (from the content), width and height of an image that decodes in full, or whose header and end are sound."""
    if not data:
        return Reject("empty", "0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        return Reject("too large", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    extension = _extension(data)
    if isinstance(extension, Reject):
        return extension
    try:
        if not decode:
            size = image_size(extension, data)
            if size is None:
                return Reject("damaged", "the header tells no size, or the end of the image is missing")
            if size[0] * size[1] > max_pixels:
                return Reject("too many pixels", f"{size[0]} x {size[1]}, max_pixels is {max_pixels}")
            return extension, *size
        with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[extension]]) as image:
            width, height = image.size
            if width * height > max_pixels:
                return Reject("too many pixels", f"{width} x {height}, max_pixels is {max_pixels}")
            image.load()
    except Image.DecompressionBombError as error:
        return Reject("too many pixels", str(error))
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        return Reject("damaged", f"{type(error).__name__}: {error}")
    return extension, width, height


def image_size(extension: str, data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them, or None where there is no such header or the image's end is missing.

    Some writers leave a little behind the end, so it is looked for in the last kilobyte. Sources: ITU-T T.81 (B.2.2), RFC 2083, RFC 9649.
    """
    if extension == "png":
        sound = data[12:16] == b"IHDR" and b"IEND\xaeB`\x82" in data[-1024:]
        return struct.unpack(">II", data[16:24]) if sound else None  # type: ignore[return-value]
    if extension == "webp":
        if int.from_bytes(data[4:8], "little") + 8 > len(data) or len(data) < 30:
            return None
        if data[12:16] == b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if data[12:16] == b"VP8L" and data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        width, height = struct.unpack("<HH", data[26:30])
        return (width & 0x3FFF, height & 0x3FFF) if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a" else None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return (width, height) if width and height and b"\xff\xd9" in data[-1024:] else None
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])  # fill bytes may stand before a marker
    return None


def _extension(data: bytes) -> str | Reject:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    others = {b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff", b"\0\0\x01\0": "ico", b"8BPS": "psd"}
    for magic, name in others.items():
        if data.startswith(magic):
            return Reject("unsupported format", f"{name} ({ACCEPTED})")
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"avis"):
        return Reject("unsupported format", f"{data[8:12].decode()} ({ACCEPTED})")
    return Reject("not an image", f"begins with {data[:8]!r} ({ACCEPTED})")
