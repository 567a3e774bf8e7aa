"""Images as bytes: which are accepted, how they are encoded anew where that is asked for, and how they are decoded, in packing, in training
and wherever else somebody looks at one.

Where it stands: `shards.py` has each image judged here before it is stored; the stream of `vitscale` decodes here. The rules for odd images
are the table in docs/data.md.

Invariants: what needs no change is stored as it came; what is encoded anew shows what `decode` showed of the original, but upright and
perhaps smaller; the bytes depend on the image, the rules and `encoders()` alone.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from data_tools.config import MAX_PIXELS

PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ACCEPTED = "accepted: jpeg, png, webp"
MAX_IMAGE_BYTES = 2**30
MAX_SCANS = 256  # of a JPEG: encoders write some ten, and a file of thousands takes minutes to decode
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what `decode` raises on bytes that are none


@dataclass(frozen=True)
class Reject:
    """Why one image is left out: a reason of a few words for counting, and a detail for a person."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """What is asked of an image that is to be stored; the settings of `PackConfig`, where they are described."""

    decode: bool = True
    max_pixels: int = MAX_PIXELS
    min_side: int = 1
    max_side: int | None = None
    quality: int = 92
    normalize: bool = False


@dataclass(frozen=True)
class Stored:
    """An image as it goes into a tar."""

    data: bytes
    extension: str
    width: int
    height: int


def decode(image_bytes: bytes) -> Image.Image:
    """An RGB image by the rules of docs/data.md: the first picture, upright or not, without alpha, of 16 bits the upper eight.

    Raises OSError or ValueError where the bytes are none, SyntaxError on some broken PNGs.
    """
    if too_many_scans(image_bytes):
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
    return _rgb(Image.open(io.BytesIO(image_bytes)))


def too_many_scans(data: bytes) -> bool:
    """Whether a JPEG was made to take for ever; no scan's own bytes look like the beginning of another one."""
    return data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def prepare_image(data: bytes, rules: Rules) -> Stored | Reject:
    """The image as it is to be stored: as it came, unless the rules ask for another one."""
    if (rules.max_side is not None or rules.normalize) and isinstance(extension := _recognized(data), str):
        try:
            with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[extension]]) as image:
                if fault := _size_fault(image.size, rules.max_pixels, rules.min_side):
                    return fault
                if _must_change(image, data, extension, rules):
                    return _encoded_anew(image, data, extension, rules)
                if rules.decode:
                    image.load()
                    return Stored(data, extension, *image.size)
        except Image.DecompressionBombError:
            pass  # named below
        except Exception as error:  # Pillow raises nearly anything on hostile bytes
            return _damaged(error)
    judged = inspect_image(data, rules.max_pixels, rules.decode, rules.min_side)
    return judged if isinstance(judged, Reject) else Stored(data, *judged)


def inspect_image(data: bytes, max_pixels: int, decode: bool = True, min_side: int = 1) -> tuple[str, int, int] | Reject:
    """The extension (from the content), width and height of an image that decodes in full, or whose header and end are sound."""
    extension = _recognized(data)
    if isinstance(extension, Reject):
        return extension
    try:
        if not decode:
            size = image_size(extension, data)
            if size is None:
                return Reject("damaged", "the header tells no size, or the end of the image is missing")
            return _size_fault(size, max_pixels, min_side) or (extension, *size)
        with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[extension]]) as image:
            if fault := _size_fault(image.size, max_pixels, min_side):
                return fault
            image.load()
            return extension, *image.size
    except Image.DecompressionBombError as error:
        return Reject("too many pixels", str(error))
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        return _damaged(error)


def _recognized(data: bytes) -> str | Reject:
    """The extension of bytes that may be an accepted image."""
    if not data:
        return Reject("empty", "0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        return Reject("too large", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    if too_many_scans(data):
        return Reject("damaged", f"a JPEG of more than {MAX_SCANS} scans")
    return _extension(data)


def _size_fault(size: tuple[int, int], max_pixels: int, min_side: int) -> Reject | None:
    if size[0] * size[1] > max_pixels:
        return Reject("too many pixels", f"{size[0]} x {size[1]}, max_pixels is {max_pixels}")
    if min(size) < min_side:
        return Reject("too small", f"{size[0]} x {size[1]}, min_side is {min_side}")
    return None


def _damaged(error: Exception) -> Reject:
    said = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))  # an address is another one in each run
    return Reject("damaged", f"{type(error).__name__}: {said}")


# ------------------------------------------------------------------------------------------------------------ encoding anew

# What brings a picture with that EXIF orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DRAFT = 2  # a JPEG that shrinks a lot is decoded at 1/2, 1/4 or 1/8, but to no less than this many times the size that is wanted


def encoders() -> str:
    """The versions that the bytes of an image that is encoded anew depend on."""
    libraries = {
        "pil": "Pillow",
        "libjpeg_turbo": "libjpeg-turbo",
        "jpg": "libjpeg",
        "webp": "libwebp",
        "zlib_ng": "zlib-ng",
        "zlib": "zlib",
    }
    return ", ".join(f"{name} {version}" for feature, name in libraries.items() if (version := features.version(feature)))


def _must_change(image: Image.Image, data: bytes, extension: str, rules: Rules) -> bool:
    """Whether the rules ask for another image than the one that came."""
    if rules.max_side is not None and max(image.size) > rules.max_side:
        return True
    if not rules.normalize:
        return False
    if image.mode not in ("RGB", "L", "1") or "transparency" in image.info:  # CMYK, palette, alpha, 16-bit grey
        return True
    if extension == "png" and data[24] == 16:  # bits a sample, of which Pillow keeps eight
        return True
    if extension != "jpg" and getattr(image, "is_animated", False):  # any reader shows the first picture of a JPEG of several
        return True
    if extension == "png":
        image.load()
    return _orientation(image) in UPRIGHT


def _encoded_anew(image: Image.Image, data: bytes, extension: str, rules: Rules) -> Stored:
    """The picture as `decode` shows it, but upright and with no side over `max_side`, in the format that it came in.

    What was lossless stays so. An ICC profile for RGB goes along, since the colours are not converted; other metadata do not.
    """
    profile = image.info.get("icc_profile") or b""
    keeps_profile = profile[16:20] == b"RGB " and image.mode != "CMYK"
    box, wanted = None, _fitting(image.size, rules.max_side)
    if extension == "jpg" and (drafted := image.draft(None, (DRAFT * wanted[0], DRAFT * wanted[1]))):
        box = drafted[1]
    pixels = _rgb(image)
    if pixels.size != wanted:
        pixels = pixels.resize(wanted, Image.Resampling.LANCZOS, box=box)
    if (orientation := _orientation(image)) in UPRIGHT:
        pixels = pixels.transpose(UPRIGHT[orientation])
    pixels.info = {}
    options: dict[str, object] = {"icc_profile": profile if keeps_profile else None}
    if extension == "webp" and _lossless_webp(data):
        options["lossless"] = True
    elif extension != "png":
        options["quality"] = rules.quality
    file = io.BytesIO()
    pixels.save(file, PILLOW_NAMES[extension], **options)
    return Stored(file.getvalue(), extension, *pixels.size)


def _fitting(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """The size with its longer side at most `max_side` and the same proportions."""
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    width, height = (max(1, (side * max_side + longer // 2) // longer) for side in size)
    return width, height


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or none that can be read.

    A PNG must be loaded by now: Pillow would load it here, and what is wrong with its pixels would be taken for bad EXIF.
    """
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # metadata may be anything, and the picture is good without them
        return 1
    return found if isinstance(found, int) else 1


def _lossless_webp(data: bytes) -> bool:
    """Whether the (first) picture of a WebP is stored without loss; RFC 9649."""
    at = 12
    while at + 8 <= len(data):
        kind = data[at : at + 4]
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame holds chunks of its own behind 16 bytes
    return False


# ------------------------------------------------------------------------------------------------------------------ headers


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
