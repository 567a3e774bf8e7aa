"""Images as bytes: which are accepted, and how they are decoded, in packing, in training and wherever else somebody looks at one.

Where it stands: `shards.py` judges each image here before it is stored; the stream of `vitscale` decodes here.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ACCEPTED = "accepted: jpeg, png, webp"
MAX_IMAGE_BYTES = 2**30


@dataclass(frozen=True)
class Reject:
    """Why one image is left out: a reason of a few words for counting, and a detail for a person."""

    reason: str
    detail: str


def decode(image_bytes: bytes) -> Image.Image:
    """An RGB image. Raises OSError or ValueError where the bytes are none, SyntaxError on some broken PNGs."""
    image: Image.Image = Image.open(io.BytesIO(image_bytes))
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


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
