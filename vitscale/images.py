"""Images to pixels: the random training crop, the central evaluation crop. Pure functions of an image's bytes; `pixels.py` does the work.

Every random choice is a function of a key, so a sample at a position looks the same under every split of the work. The keys of a
micro-batch are drawn from at once (`draws`), since numpy costs as much for one as for hundreds.
"""

import math

import numpy as np
import numpy.typing as npt

from data_tools.images import decode as decoded
from vitscale import keyed, protocols
from vitscale.augment import randaugment
from vitscale.config import Decode, PreprocessConfig
from vitscale.pixels import Cut, ImageBytes, Pixels, Region, cut_pixels

Draws = npt.NDArray[np.float64]  # in [0, 1)

_CROP_ATTEMPTS = 10


def draws(keys: npt.ArrayLike) -> Draws:
    """(n,) keys -> (n, 41): for each sample the flip's number, then four for each attempt at a crop."""
    return keyed.uniform(np.asarray(keys, dtype=np.uint64)[:, None], np.arange(1 + 4 * _CROP_ATTEMPTS))


def training_view(
    data: ImageBytes,
    size: tuple[int, int],
    sample_key: int,
    sample_draws: Draws,
    config: PreprocessConfig,
    decode: Decode = "exact",
    out: Pixels | None = None,
) -> Pixels:
    """A random crop, resized, perhaps mirrored (Szegedy et al., arXiv 1409.4842; big_vision's inception_crop), then RandAugment.

    Args:
        data: the image's bytes.
        size: height and width of the view.
        sample_draws: the key's row of `draws`.
        decode: "fast" decodes JPEGs at 1/2, 1/4 or 1/8 where the crop has that many times the view's pixels along both sides.
        out: where to write; contiguous.

    Raises what `data_tools.images.decode` raises where the bytes are no image.
    """
    out = np.empty((*size, 3), np.uint8) if out is None else out

    def cut(width: int, height: int) -> Cut:
        region = random_crop(width, height, sample_draws, config)
        return Cut(region, (size[1], size[0]), config.interpolation, mirrored=bool(sample_draws[0] < config.flip))

    cut_pixels(data, out, cut, decoding_scale if decode == "fast" else None)
    if config.randaugment_layers:
        out[:] = randaugment(out, sample_key, config.randaugment_layers, config.randaugment_magnitude)
    return out


def decoding_scale(cut: Cut) -> int:
    """The largest of 1, 2, 4, 8 that leaves the crop no smaller than the view; 1 for views of less than 8 pixels."""
    (left, top, right, bottom), (width, height) = cut.region, cut.size
    if min(width, height) < 8:
        return 1
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or (right - left >= scale * width and bottom - top >= scale * height))


def random_crop(width: int, height: int, sample_draws: Draws, config: PreprocessConfig) -> Region:
    """A box of `crop_scale` of the area and `crop_ratio` width over height that fits the image.

    Ten draws, as torchvision's RandomResizedCrop: log-uniform ratio, uniform area; if none fits, the largest central box of a legal ratio.
    """
    if config.crop_scale == (1.0, 1.0):
        return 0, 0, width, height
    (low, high), (narrow, wide) = config.crop_scale, config.crop_ratio
    for attempt in range(_CROP_ATTEMPTS):
        area_draw, ratio_draw, left_draw, top_draw = sample_draws[1 + 4 * attempt : 5 + 4 * attempt].tolist()
        area = width * height * (low + (high - low) * area_draw)
        ratio = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(1, w), top + max(1, h)


def evaluation_view(data: ImageBytes, size: tuple[int, int], config: PreprocessConfig, out: Pixels | None = None) -> Pixels:
    """What `eval_protocol` shows: for timm, to the pixel, the central crop, `eval_crop` of the resized image's tighter side; with 1, the
    whole image, squashed.

    Always exact. Raises as `training_view`.
    """
    out = np.empty((*size, 3), np.uint8) if out is None else out
    match config.eval_protocol:
        case "big_vision":
            out[:] = protocols.big_vision_view(np.asarray(decoded(bytes(data))), size, config.eval_crop)
            return out
        case "paper":
            out[:] = protocols.paper_view(np.asarray(decoded(bytes(data))), size)
            return out

    def cut(width: int, height: int) -> Cut:
        resized = resized_for_crop(width, height, size, config.eval_crop)
        at = round((resized[0] - size[1]) / 2), round((resized[1] - size[0]) / 2)
        return Cut((0, 0, width, height), resized, config.interpolation, at)

    cut_pixels(data, out, cut)
    return out


def resized_for_crop(width: int, height: int, size: tuple[int, int], eval_crop: float) -> tuple[int, int]:
    """Width and height that an image is resized to before its central crop of `size` (height, width).

    As timm/data/transforms_factory.py, transforms_imagenet_eval: torchvision's Resize of the short side for squares, ResizeKeepRatio else.
    """
    if eval_crop == 1:
        return size[1], size[0]
    target_h, target_w = math.floor(size[0] / eval_crop), math.floor(size[1] / eval_crop)
    if target_h == target_w:
        short, long = sorted((width, height))
        long = int(target_h * long / short)
        return (target_h, long) if width <= height else (long, target_h)
    ratio = min(height / target_h, width / target_w)
    return round(width / ratio), round(height / ratio)
