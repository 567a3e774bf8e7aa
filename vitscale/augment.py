"""RandAugment (Cubuk et al., arXiv 1909.13719): pixels to pixels on the CPU, after crop, resize and flip, before normalisation.

`images.training_view` calls it. Every draw is a function of the sample's key and the layer, so a sample at a position looks the same under
every split of the work. Pillow only; mixing of samples is `mixing.py`'s, on the device.

Operations and magnitudes are big_vision's (google-research/big_vision, pp/autoaugment.py at commit 0127fb6, after the TPU models' file of
that name), which "How to train your ViT?" (arXiv 2106.10270) and "Better plain ViT baselines" (arXiv 2205.01580) train with; timm and
torchvision have other lists. At 224 pixels they do what that code does, but for roundings, with what it does not mean to do
(`_CONTRAST_GREY`, solarize): the published results have it. docs/stream.md, "Augmentation", has the table.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from vitscale import keyed
from vitscale.keyed import Purpose

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)

OPS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "color", "contrast", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add",
)  # fmt: skip
FILL = (128, 128, 128)  # what comes in from outside the image, and what cut-out leaves
_SIDE = 224  # big_vision moves and cuts out by pixels of this side; at others they are scaled with it
_CONTRAST_GREY = (196, 196, 196)  # not the mean grey: its histogram is summed without its values, which leaves 224 x 224 / 256


class Draw(NamedTuple):
    """What is drawn for one layer."""

    op: str
    sign: int
    """-1 or 1: which way to rotate, shear or translate."""
    center: tuple[float, float]
    """Of the cut-out, down and across, as shares of the sides."""


def randaugment(pixels: Pixels, key: int, layers: int, magnitude: float) -> Pixels:
    """The pixels after `layers` operations in turn, each drawn evenly from `OPS`, all of the same magnitude."""
    if layers == 0:
        return pixels
    image = Image.fromarray(pixels)
    for layer in range(layers):
        image = apply(image, draw(key, layer), magnitude)
    return np.asarray(image)


def draw(key: int, layer: int) -> Draw:
    """What a sample's key draws for a layer."""
    op, sign, down, across = keyed.uniform(keyed.key(Purpose.RANDAUGMENT, np.uint64(key), layer), np.arange(4)).tolist()  # type: ignore[arg-type]
    return Draw(OPS[int(op * len(OPS))], 1 if sign < 0.5 else -1, (down, across))


def apply(image: Image.Image, drawn: Draw, magnitude: float) -> Image.Image:
    """One operation on an RGB image."""
    level = magnitude / 10
    match drawn.op:
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "rotate":
            return image.rotate(drawn.sign * 30 * level, fillcolor=FILL)
        case "posterize":  # bits that stay; of none or more than there are, TensorFlow makes 1
            bits = int(4 * level)
            return ImageOps.posterize(image, bits if 1 <= bits <= 8 else 1)
        case "solarize":
            threshold = int(256 * level) % 256  # as TensorFlow reads it: at a magnitude of 10 every pixel is inverted
            return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)
        case "solarize_add":
            return image.point([min(255, value + int(110 * level)) if value < 128 else value for value in range(256)] * 3)
        case "color":
            return ImageEnhance.Color(image).enhance(1.8 * level + 0.1)
        case "contrast":
            return Image.blend(Image.new("RGB", image.size, _CONTRAST_GREY), image, 1.8 * level + 0.1)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1)
        case "shear_x":
            slope = drawn.sign * 0.3 * level
            return _affine(image, (1, slope, -slope / 2, 0, 1, 0))  # the middle of the first pixel stays
        case "shear_y":
            slope = drawn.sign * 0.3 * level
            return _affine(image, (1, 0, 0, slope, 1, -slope / 2))
        case "translate_x":
            return _affine(image, (1, 0, drawn.sign * 100 * level * image.width / _SIDE, 0, 1, 0))
        case "translate_y":
            return _affine(image, (1, 0, 0, 0, 1, drawn.sign * 100 * level * image.height / _SIDE))
        case "cutout":
            return _cutout(image, drawn.center, int(40 * level * min(image.size) / _SIDE))
    raise ValueError(f"no operation is called {drawn.op!r}")


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Each pixel from the nearest one at (a x + b y + c, d x + e y + f), origin at the upper left corner."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=FILL)


def _cutout(image: Image.Image, center: tuple[float, float], half: int) -> Image.Image:
    """A square of twice `half` a side (arXiv 1708.04552) around a pixel of the image; what of it lies outside is lost."""
    row, column = math.floor(center[0] * image.height), math.floor(center[1] * image.width)
    image = image.copy()
    image.paste(FILL, (max(0, column - half), max(0, row - half), min(image.width, column + half), min(image.height, row + half)))
    return image
