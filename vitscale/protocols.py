"""Evaluation preprocessing of the paper's code and of big_vision, as TensorFlow computes it: a decoded image to what the model sees.

`images.evaluation_view` comes here for every `eval_protocol` but timm's, which Pillow computes. TensorFlow's two ways to resize differ from
Pillow's of those names: `bilinear` looks at four pixels however much it shrinks, and `area` weighs each pixel by how much of it is covered.
Both work along one side and then the other, in fp32 and in TensorFlow's order (tensorflow/core/kernels/image, resize_area_op.cc and
resize_bilinear_op.cc), so that its very pixels come out. Only what the crop shows is computed.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Float32 = npt.NDArray[np.float32]


class Taps(NamedTuple):
    """What makes up each of n pixels along one side."""

    source: npt.NDArray[np.int64]
    """Source pixels (n, k)."""
    weight: Float32
    """Of each (n, k); 0 where a pixel needs fewer."""
    total: np.float32
    """What the weights of one sum to."""


def big_vision_view(pixels: Pixels, size: tuple[int, int], eval_crop: float) -> Pixels:
    """big_vision's `resize_small(size / eval_crop)|central_crop(size)` with its defaults: area, and whole numbers cut off.

    Of two sides of `size` (height, width) that differ, the one decides that needs the larger image; big_vision itself has squares only.
    """
    sides = pixels.shape[:2]
    factor = max(np.float32(math.floor(wanted / eval_crop)) / np.float32(side) for wanted, side in zip(size, sides, strict=True))
    rows, columns = (
        area_taps(side, new := int(np.round(np.float32(side) * factor)), (new - wanted) // 2, wanted)
        for wanted, side in zip(size, sides, strict=True)
    )
    return np.minimum(area(pixels, rows, columns), 255).astype(np.uint8)


def paper_view(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The whole image, squashed to `size` (vision_transformer, vit_jax/input_pipeline.py: `tf.image.resize`), rounded to 8 bits.

    The paper's code goes on with the fractions, which are at most half a grey level.
    """
    return np.rint(bilinear(bilinear(pixels, size[1], axis=1), size[0], axis=0)).astype(np.uint8)


def area_taps(side: int, new: int, start: int, count: int) -> Taps:
    """TensorFlow's `area` from `side` to `new` pixels, of the `count` pixels from `start` on: each pixel's part inside the new one."""
    scale = np.float32(side) / np.float32(new)
    low, high = (np.arange(first, first + count, dtype=np.float32)[:, None] * scale for first in (start, start + 1))
    first, end = np.floor(low).astype(np.int64), np.ceil(high).astype(np.int64)
    index = first + np.arange((end - first).max())
    begins = np.where(index + 1 > high, scale, index + 1 - low)  # of the pixel in which the new one begins
    goes_on = np.where(index + 1 > high, high - index, 1)
    weight = np.where(index < end, np.where(index < low, begins, goes_on), 0).astype(np.float32)
    return Taps(index.clip(0, side - 1), weight, scale)


def area(pixels: Pixels, rows: Taps, columns: Taps) -> Float32:
    """The weighted means, across and then down."""
    top, bottom = int(rows.source.min()), int(rows.source.max()) + 1
    across = np.zeros((bottom - top, len(columns.source), pixels.shape[2]), np.float32)
    for source_n, weight_n in zip(columns.source.T, columns.weight.T, strict=True):
        across += pixels[top:bottom, source_n] * weight_n[:, None]
    down = np.zeros((len(rows.source), *across.shape[1:]), np.float32)
    for source_n, weight_n in zip(rows.source.T, rows.weight.T, strict=True):
        down += across[source_n - top] * weight_n[:, None, None]
    return down * np.float32(1 / (rows.total * columns.total))


def bilinear(pixels: npt.NDArray[Any], new: int, axis: int) -> Float32:
    """TensorFlow's `bilinear` along one axis: between the two pixels next to the new one's middle, with half-pixel centres."""
    side = pixels.shape[axis]
    middle = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(side) / np.float32(new)) - np.float32(0.5)
    below, above = (
        np.take(pixels, edge(middle).astype(np.int64).clip(0, side - 1), axis).astype(np.float32) for edge in (np.floor, np.ceil)
    )
    share = (middle - np.floor(middle)).reshape(-1, *[1] * (2 - axis))
    between: Float32 = below + (above - below) * share
    return between
