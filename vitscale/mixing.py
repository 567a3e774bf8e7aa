"""mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): pairs of samples mixed on the device, images and targets alike.

transfer.py draws a `Mix` for each micro-batch and sends it along; train.py mixes the normalised images with it, objective.py the targets.
Samples 2j and 2j+1 of a micro-batch are a pair, and both are mixed: each keeps its own share and takes the rest from the other.
The stream keeps positions 2j and 2j+1 of the run side by side (an even micro-batch is `check.check_config`'s to ask for), and all draws
come from the key of the first, so what is mixed does not depend on ranks or micro-batches. Evaluation never comes here.

What is drawn is computed on the host from keys that are there anyway; the device is never waited for.

Axes: B batch, P pairs, C channels, H height, W width, K classes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitscale import keyed
from vitscale.config import MixConfig
from vitscale.keyed import Purpose

Float64 = npt.NDArray[np.float64]


class Mix(NamedTuple):
    """How the samples of a micro-batch are mixed, a row a sample; the same for both of a pair."""

    share_B: Tensor
    """Of the targets, what is the sample's own, in [0, 1]; fp32."""
    outside_B: Tensor
    """Of the pixels outside the box, what is the sample's own; fp32. Inside the box all is the other's."""
    box_B4: Tensor
    """Top, bottom, left, right in pixels; empty for mixup."""

    def images(self, images_BCHW: Tensor) -> Tensor:
        """The mixed images, in the precision of theirs."""
        height, width = images_BCHW.shape[-2:]
        rows_1H, columns_1W = (torch.arange(side, device=images_BCHW.device)[None] for side in (height, width))
        top_B1, bottom_B1, left_B1, right_B1 = self.box_B4[:, :, None].unbind(1)
        inside_BHW = ((rows_1H >= top_B1) & (rows_1H < bottom_B1))[:, :, None] & ((columns_1W >= left_B1) & (columns_1W < right_B1))[
            :, None
        ]
        own_BHW = self.outside_B[:, None, None].masked_fill(inside_BHW, 0.0)
        return mix_pairs(images_BCHW, own_BHW[:, None].to(images_BCHW.dtype))

    def targets(self, targets_BK: Tensor) -> Tensor:
        """The mixed targets."""
        return mix_pairs(targets_BK, self.share_B[:, None].to(targets_BK.dtype))


def mix_pairs(x: Tensor, own: Tensor) -> Tensor:
    """`own` x + (1 - own) x of the other, along the first axis; exactly x where own is 1, and exactly the other's where it is 0."""
    other = x.reshape(-1, 2, *x.shape[1:]).flip(1).view_as(x)
    return torch.lerp(other, x, own)


def draw_mix(keys_B: npt.NDArray[np.int64], image_size: tuple[int, int], config: MixConfig) -> tuple[np.ndarray, ...] | None:
    """The fields of a `Mix` as arrays, which the samples of these keys draw; None where mixing is off."""
    if not config.is_on:
        return None
    draws_6P = keyed.uniform(keyed.key(Purpose.MIXING, keys_B.view(np.uint64)[::2]), np.arange(6)[:, None])  # type: ignore[arg-type]
    mixed_P, cut_P = draws_6P[0] < config.prob, draws_6P[1] < config.cutmix_share
    alpha_P = np.where(cut_P, config.cutmix_alpha, config.mixup_alpha)
    lam_P = np.where(mixed_P, symmetric_beta(draws_6P[2], draws_6P[3], alpha_P), 1.0)
    box_P4 = random_box(draws_6P[4], draws_6P[5], lam_P, image_size) * cut_P[:, None]
    area_P = (box_P4[:, 1] - box_P4[:, 0]) * (box_P4[:, 3] - box_P4[:, 2])
    share_P = np.where(cut_P, 1 - area_P / (image_size[0] * image_size[1]), lam_P)
    outside_P = np.where(cut_P, 1.0, lam_P)
    return share_P.astype(np.float32).repeat(2), outside_P.astype(np.float32).repeat(2), box_P4.repeat(2, axis=0)


def symmetric_beta(u: Float64, v: Float64, alpha: Float64) -> Float64:
    """Numbers distributed as Beta(alpha, alpha), of any alpha > 0, from two uniform ones each.

    Twice the number less 1 is t / sqrt(2 alpha + t^2) of a Student's t with 2 alpha degrees of freedom, which the polar method gives in
    closed form (Bailey, Mathematics of Computation 62, 1994). Nothing is rejected, and what is near 0 keeps its digits.
    """
    power, cosine = u ** (1 / alpha), np.cos(2 * np.pi * v)
    rest = power / (cosine**2 * (1 - power) + power)  # 1 - (2 x - 1)^2
    smaller = rest / (2 * (1 + np.sqrt(1 - rest)))
    numbers: Float64 = np.where(cosine < 0, smaller, 1 - smaller)
    return numbers


def random_box(down: Float64, across: Float64, lam: Float64, image_size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """CutMix's boxes (P, 4), top, bottom, left, right: 1 - lam of the area, around a pixel of the image, cut off at its edges."""
    height, width = image_size
    sides = np.sqrt(1 - lam)
    edges = []
    for center, side in ((down, height), (across, width)):
        middle, length = (center * side).astype(np.int64), (sides * side).astype(np.int64)
        edges += [np.clip(middle - length // 2, 0, side), np.clip(middle + (length + 1) // 2, 0, side)]  # odd ones too, as timm
    return np.stack(edges, axis=1)
