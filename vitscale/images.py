"""Images to pixels: the random training crop, the central evaluation crop. Pure functions, Pillow only; `data_tools.images` decodes.

Every random choice is a function of a key, so a sample at a position looks the same under every split of the work.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitscale import keyed, protocols
from vitscale.augment import randaugment
from vitscale.config import PreprocessConfig

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10


def training_view(image: Image.Image, size: tuple[int, int], sample_key: int, config: PreprocessConfig) -> Pixels:
    """A random resized crop (Szegedy et al., arXiv 1409.4842; big_vision's inception_crop), perhaps mirrored, then RandAugment."""
    box = random_crop(image.width, image.height, sample_key, config)
    view = image.resize((size[1], size[0]), _RESAMPLING[config.interpolation], box=box)
    pixels = np.asarray(view)
    pixels = pixels[:, ::-1] if keyed.uniform(sample_key, 0) < config.flip else pixels
    return randaugment(pixels, sample_key, config.randaugment_layers, config.randaugment_magnitude)


def random_crop(width: int, height: int, sample_key: int, config: PreprocessConfig) -> Box:
    """A box of `crop_scale` of the area and `crop_ratio` width over height that fits the image.

    Ten draws, as torchvision's RandomResizedCrop: log-uniform ratio, uniform area; if none fits, the largest central box of a legal ratio.
    """
    if config.crop_scale == (1.0, 1.0):
        return 0, 0, width, height
    (low, high), (narrow, wide) = config.crop_scale, config.crop_ratio
    draws = keyed.uniform(sample_key, np.arange(1, 1 + 4 * _CROP_ATTEMPTS)).reshape(_CROP_ATTEMPTS, 4)  # type: ignore[arg-type]
    for area_draw, ratio_draw, left_draw, top_draw in draws.tolist():
        area = width * height * (low + (high - low) * area_draw)
        ratio = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(1, w), top + max(1, h)


def evaluation_view(image: Image.Image, size: tuple[int, int], config: PreprocessConfig) -> Pixels:
    """What `eval_protocol` shows: for timm, to the pixel, the central crop, `eval_crop` of the resized image's tighter side; with 1, the
    whole image, squashed.
    """
    match config.eval_protocol:
        case "big_vision":
            return protocols.big_vision_view(np.asarray(image), size, config.eval_crop)
        case "paper":
            return protocols.paper_view(np.asarray(image), size)
    resized = image.resize(resized_for_crop(image.width, image.height, size, config.eval_crop), _RESAMPLING[config.interpolation])
    left, top = round((resized.width - size[1]) / 2), round((resized.height - size[0]) / 2)
    return np.asarray(resized.crop((left, top, left + size[1], top + size[0])))


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
