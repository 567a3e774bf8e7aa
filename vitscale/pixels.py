"""From an image's bytes to the pixels of a cut: decoded only where and as finely as the cut needs, resized, written where they are wanted.

Where it stands: `images.py` says what is cut of an image of some size; the stream gives the bytes and takes the pixels. What an image
shows, and which bytes are one, is for `data_tools.images.decode` to say, which is Pillow.

Invariants
- With scale 1 the pixels are `decode(data).crop(region).resize(size)` of Pillow, bit for bit; with scale 2, 4 or 8 the same of the image as
  libjpeg decodes it at that part of its size (Pillow's `draft`).
- That holds for each of the three ways there are, so machines may differ in them: `_pixels.c` (regions by libjpeg-turbo, and a resize that
  is Pillow's in integers), simplejpeg (whole images) with that resize, and Pillow alone. Only plain JPEGs (`plain_jpeg`) go by the first
  two; what is none, and any that they say a word against, is Pillow's to show or to refuse.
- Damage behind the last row of a region is not looked at.

Everything long here releases the GIL. No torch.
"""

import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, features
from PIL import __version__ as pillow_version

from data_tools.images import decode, too_many_scans

try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment]

try:
    from vitscale import _pixels as _native
except ImportError:
    _native = None  # type: ignore[assignment]

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
ImageBytes = bytes | bytearray | memoryview
Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Region = tuple[int, int, int, int]  # left, top, right, bottom
OrderRule = Callable[[int, int, int, int], bool]  # width, height, new width, new height: whether Pillow resizes along x first

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Cut(NamedTuple):
    """What is taken of an image: the region is resized to `size`, and the output is the window of it whose upper left corner is `at`."""

    region: Region
    size: tuple[int, int]
    """Width and height."""
    interpolation: Interpolation
    at: tuple[int, int] = (0, 0)
    mirrored: bool = False


def cut_pixels(data: ImageBytes, out: Pixels, cut_of: Callable[[int, int], Cut], scale_of: Callable[[Cut], int] | None = None) -> None:
    """Fill `out` with the cut that `cut_of` makes for the image's width and height.

    Args:
        data: the image's bytes.
        out: contiguous.
        cut_of: pure; called again if the image turns out not to be what its header said.
        scale_of: to which part of its size (1, 2, 4, 8) a JPEG may be decoded for a cut; only 1 if not given.

    Raises what `data_tools.images.decode` raises where the bytes are no image.
    """
    if size := plain_jpeg(data):
        cut = cut_of(*size)
        if _cut_jpeg(data, out, size, cut, scale_of(cut) if scale_of else 1):
            return
    image = decode(bytes(data))
    cut = cut_of(*image.size)
    _resize(image, out, cut.region, _whole(cut.region), cut)


def path_in_use() -> str:
    """In a few words, how JPEGs are decoded and resized here."""
    resize = f"{'native' if _native else 'Pillow'} resize"
    if _region_decoder:
        return f"native, libjpeg-turbo {_native.LIBJPEG_TURBO}"
    if simplejpeg:
        return f"simplejpeg {simplejpeg.__version__}, {resize}"
    return f"Pillow {pillow_version}, {resize}"


# ------------------------------------------------------------------------------------------------------------------ plain JPEGs

_FRAMES = (0xC0, 0xC1, 0xC2)  # sequential and progressive, Huffman
_OTHERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # tables, restart interval, comments, application segments
_SAMPLINGS = frozenset({b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11"})  # grey, 4:4:4, 4:2:2, 4:4:0, 4:2:0


def plain_jpeg(data: ImageBytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of which region decoders are known to show what Pillow shows, as far as headers tell; None of all else.

    That is 8 bits, one or three components of the usual samplings, markers in good order up to the first scan, an end marker, and nothing
    that Pillow, which looks into application segments, stumbles over.
    """
    view = memoryview(data)
    end = len(view)
    if bytes(view[:2]) != b"\xff\xd8" or b"\xff\xd9" not in bytes(view[-1024:]):
        return None
    at, size, progressive = 2, None, False
    while at + 4 <= end and view[at] == 0xFF:
        marker, length = view[at + 1], view[at + 2] << 8 | view[at + 3]
        if marker == 0xDA:
            return None if progressive and too_many_scans(bytes(view)) else size
        body, at = view[at + 4 : at + 2 + length], at + 2 + length
        if length < 2 or at > end:
            return None
        if marker in _FRAMES:
            progressive = marker == 0xC2
            if size or length < 11 or body[0] != 8 or length != 8 + 3 * body[5] or bytes(body[7::3]) not in _SAMPLINGS:
                return None
            size = body[3] << 8 | body[4], body[1] << 8 | body[2]
            if not 0 < size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 2**32):
                return None
        elif marker not in _OTHERS or (marker >= 0xE0 and _is_odd(marker, bytes(body))):
            return None
    return None


def _is_odd(marker: int, body: bytes) -> bool:
    """Whether an application segment is one that Pillow, which looks into it, may stumble over and refuse the image."""
    if marker == 0xE0:
        return len(body) < 7 and body[:4] == b"JFIF"
    if marker == 0xE1:
        return body[:6] == b"Exif\0\0" and _is_odd_exif(body[6:])
    if marker == 0xE2:
        return len(body) < 14 and body[:12] == b"ICC_PROFILE\0"
    if marker == 0xED:
        return body[:14] == b"Photoshop 3.0\0" and body[-6:-2] == b"8BIM"
    return marker == 0xEE and len(body) < 7 and body[:5] == b"Adobe"


def _is_odd_exif(tiff: bytes) -> bool:
    """Whether the first directory goes on in another segment, or has a resolution, of which Pillow makes a number, that is no fraction."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    first = int.from_bytes(tiff[4:8], order) + 2
    end = first + 12 * int.from_bytes(tiff[first - 2 : first], order)
    resolution, fraction = (0x011A).to_bytes(2, order), (5).to_bytes(2, order) + (1).to_bytes(4, order)
    return end > len(tiff) or any(tiff[at : at + 2] == resolution and tiff[at + 2 : at + 8] != fraction for at in range(first, end, 12))


def _cut_jpeg(data: ImageBytes, out: Pixels, size: tuple[int, int], cut: Cut, scale: int) -> bool:
    """Whether `out` is filled; if not, the image is to be decoded by Pillow."""
    left, top, right, bottom = cut.region
    region = left // scale, top // scale, -(-right // scale), -(-bottom // scale)
    box = left / scale - region[0], top / scale - region[1], right / scale - region[0], bottom / scale - region[1]
    if _region_decoder:
        filled: bool = _region_decoder(out, data, *size, scale, region, box, *_native_cut(cut, region))
        return filled
    pixels = _decode_scaled(data, size, scale)
    if pixels is None:
        return False
    _resize(pixels, out, region, box, cut)
    return True


def _decode_scaled(data: ImageBytes, size: tuple[int, int], scale: int) -> Pixels | Image.Image | None:
    """A whole JPEG of that size, at 1/scale of it; None where there is only the long way."""
    wanted = -(-size[0] // scale), -(-size[1] // scale)
    if simplejpeg:
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data, min_width=wanted[0], min_height=wanted[1])
        except ValueError:
            return None
        return pixels if pixels.shape == (wanted[1], wanted[0], 3) else None
    if scale == 1:
        return None
    image = Image.open(io.BytesIO(data))
    image.draft(None, (size[0] // scale, size[1] // scale))
    return image.convert("RGB") if image.size == wanted else None


# ----------------------------------------------------------------------------------------------------------------------- resize


def _resize(source: Pixels | Image.Image, out: Pixels, region: Region, box: tuple[float, float, float, float], cut: Cut) -> None:
    """Fill `out` with the cut's window of the source's region, of which the box is resized."""
    if _native:
        _native.resize(out, np.asarray(source), region, box, *_native_cut(cut, region))
        return
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    resized = np.asarray(image.crop(region).resize(cut.size, _RESAMPLING[cut.interpolation], box=box))
    height, width = out.shape[:2]
    window = resized[cut.at[1] : cut.at[1] + height, cut.at[0] : cut.at[0] + width]
    out[:] = window[:, ::-1] if cut.mirrored else window


def _whole(region: Region) -> tuple[float, float, float, float]:
    return 0.0, 0.0, float(region[2] - region[0]), float(region[3] - region[1])


def _native_cut(cut: Cut, region: Region, rows_first: OrderRule | None = None) -> tuple[Any, ...]:
    """The last arguments of both native functions."""
    first = (rows_first or _rows_first)(region[2] - region[0], region[3] - region[1], *cut.size)
    return cut.size, cut.at, cut.interpolation == "bicubic", cut.mirrored, first


def _rows_first_always(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Pillow up to 12.2 resizes along x, then along y."""
    return True


def _rows_first_unless_very_tall(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Pillow 12.3 does so too, unless an image that shrinks along y is over a hundred times as high as wide."""
    return new_height >= height or height <= 100 * width


def _rows_first_unless_tall(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Pillow 13 does so too, unless there is much more to lose along y than along x."""
    return new_height >= height or 2 * (width - new_width) >= height - new_height


def _equals_pillow(rows_first: OrderRule) -> bool:
    """Whether the native resize with that rule gives what the Pillow that is installed gives, on a few sizes."""
    sizes = (40, 30, 16, 16), (30, 40, 16, 16), (23, 24, 16, 16), (24, 23, 16, 17), (9, 40, 30, 12), (40, 9, 12, 30), (2, 210, 9, 50)
    for width, height, new_width, new_height in sizes:
        noise = np.arange(width * height * 3, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(11)  # a multiplicative hash
        pixels, region = noise.astype(np.uint8).reshape(height, width, 3), (0, 0, width, height)
        for interpolation in INTERPOLATIONS:
            cut, out = Cut(region, (new_width, new_height), interpolation), np.empty((new_height, new_width, 3), np.uint8)
            _native.resize(out, pixels, region, _whole(region), *_native_cut(cut, region, rows_first))
            if not np.array_equal(out, np.asarray(Image.fromarray(pixels).resize(cut.size, _RESAMPLING[interpolation]))):
                return False
    return True


# ------------------------------------------------------------------------------------------------------------------- which way

_rows_first: OrderRule = _rows_first_always
if _native:
    equal = [rule for rule in (_rows_first_unless_tall, _rows_first_unless_very_tall, _rows_first_always) if _equals_pillow(rule)]
    if equal:
        _rows_first = equal[0]
    else:
        _native = None  # type: ignore[assignment]  # a Pillow that resizes in another way; what is here must be the same everywhere
if not features.check("libjpeg_turbo"):
    simplejpeg = None  # type: ignore[assignment]  # other libjpegs decode to other pixels
_region_decoder = getattr(_native, "decode_resize", None) if features.check("libjpeg_turbo") else None
