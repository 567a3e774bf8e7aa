"""Evaluation preprocessing by name: each pixel against a definition written out here, as whole matrices of weights in float64.

TensorFlow's own pixels were compared once by hand (docs/numerics.md); what it gave for one image is kept here as checksums.
"""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.vitscale.models import random_vit, write_checkpoint
from tests.vitscale.pictures import png
from vitscale import images, protocols
from vitscale.check import check_config
from vitscale.checkpoint import describe
from vitscale.config import ConfigError, PreprocessConfig, TrainConfig, ViTConfig, from_dict, to_dict
from vitscale.errors import CheckpointError
from vitscale.export import export

Pixels, Floats = npt.NDArray[np.uint8], npt.NDArray[np.float64]
SIDES = st.integers(1, 40)

# Height and width, xxh3_64 of big_vision's view and of the paper's, as TensorFlow 2.21 computes them of `pattern`.
TENSORFLOW = [
    ((375, 500), "98161e7377445292", "4aac62651857fe1f"),
    ((500, 333), "33772b58d7dbac99", "433148d31984c451"),
    ((100, 64), "a3aed23461f73c72", "8ce52c7fe60acf57"),
    ((853, 1280), "37521e8f3fabc2dd", "c3a6390d34aeaf61"),
]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pattern(height: int, width: int) -> Pixels:
    """An image that any library can be given without a file: 251 grey levels in an order that no resize is smooth on."""
    row, column, channel = np.ogrid[0:height, 0:width, 0:3]
    return ((row * row * 7 + column * 31 + row * column + channel * 83) % 251).astype(np.uint8)


def covered(side: int, new: int, start: int, count: int) -> Floats:
    """The share of each output pixel (count) that each source pixel (side) covers."""
    i, s = np.arange(start, start + count)[:, None], np.arange(side)
    return np.clip(np.minimum((i + 1) * side / new, s + 1) - np.maximum(i * side / new, s), 0, None) / (side / new)


def between(side: int, new: int) -> Floats:
    """The weights of the two source pixels around the middle of each output pixel: a tent of width 1, and at the edge what is beyond it."""
    middle = ((np.arange(new) + 0.5) * side / new - 0.5).clip(0, side - 1)
    return np.clip(1 - np.abs(middle[:, None] - np.arange(side)), 0, None)


def weighted(pixels: Pixels, rows: Floats, columns: Floats) -> Floats:
    return np.tensordot(rows, np.tensordot(columns, pixels.astype(np.float64), (1, 1)), (1, 1))


# ---------------------------------------------------------------------------------------------------------------------------------------
# big_vision
# ---------------------------------------------------------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 24), st.sampled_from([0.5, 0.875, 1.0]))
def test_big_vision_resizes_the_short_side_by_area_and_cuts_the_middle_out(height: int, width: int, size: int, eval_crop: float) -> None:
    pixels = noise(height, width)
    view = protocols.big_vision_view(pixels, (size, size), eval_crop)
    short = math.floor(size / eval_crop)
    exact = [Fraction(side * short, min(height, width)) for side in (height, width)]
    news = [round(side) for side in exact]  # to even where it is a half, as TensorFlow
    firsts = [(new - size) // 2 for new in news]
    if any(abs(side - new) > Fraction(49, 100) for side, new in zip(exact, news, strict=True)):
        return  # fp32 decides
    rows, columns = (covered(side, new, first, size) for side, new, first in zip((height, width), news, firsts, strict=True))
    wanted = weighted(pixels, rows, columns)
    assert view.shape == (size, size, 3)
    assert ((view == np.floor(wanted + 1e-3)) | (view == np.floor(wanted - 1e-3))).all()


def test_big_vision_at_the_recipes_size() -> None:
    pixels = noise(375, 500)
    view = protocols.big_vision_view(pixels, (224, 224), 0.875)
    wanted = weighted(pixels, covered(375, 256, 16, 224), covered(500, 341, 58, 224))
    assert np.abs(view - np.floor(wanted)).max() <= 1
    assert (view == np.floor(wanted)).mean() > 0.999


def test_area_of_a_whole_factor_is_the_mean_cut_off() -> None:
    pixels = noise(32, 48)
    means = pixels.reshape(16, 2, 24, 2, 3).astype(int).sum((1, 3)) // 4
    assert (protocols.big_vision_view(pixels, (16, 16), 1.0) == means[:, 4:20]).all()


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_sides_that_differ_are_both_filled(size: tuple[int, int]) -> None:
    for height, width in ((50, 20), (20, 50), (33, 33), (5, 400)):
        assert protocols.big_vision_view(noise(height, width), size, 0.875).shape == (*size, 3)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The paper
# ---------------------------------------------------------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 24), st.integers(1, 24))
def test_the_papers_code_squashes_by_bilinear_without_antialias(height: int, width: int, new_height: int, new_width: int) -> None:
    pixels = noise(height, width)
    view = protocols.paper_view(pixels, (new_height, new_width))
    wanted = weighted(pixels, between(height, new_height), between(width, new_width))
    assert np.abs(view - wanted).max() <= 0.5 + 1e-3


def test_without_antialias_most_pixels_of_a_large_image_are_not_looked_at() -> None:
    pixels = noise(64, 64)
    seen = protocols.paper_view(pixels, (8, 8))
    pixels[np.arange(64) % 8 < 3] = 0  # the middle of 8 lies between the 4th and the 5th
    assert (protocols.paper_view(pixels, (8, 8)) == seen).all()
    assert (images.evaluation_view(png(Image.fromarray(pixels)), (8, 8), PreprocessConfig(eval_crop=1.0)) != seen).any()


# ---------------------------------------------------------------------------------------------------------------------------------------
# TensorFlow's pixels
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "big_vision", "paper"), TENSORFLOW)
def test_pixels_are_those_of_tensorflow(size: tuple[int, int], big_vision: str, paper: str) -> None:
    """Of tensorflow 2.21, for `pattern`: resize_small(256)|central_crop(224), and tf.image.resize to 224 x 224 rounded."""
    pixels = pattern(*size)
    ours = protocols.big_vision_view(pixels, (224, 224), 0.875), protocols.paper_view(pixels, (224, 224))
    assert tuple(xxhash.xxh3_64_hexdigest(np.ascontiguousarray(view)) for view in ours) == (big_vision, paper)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Where they are used
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_view_is_its_protocols_and_training_is_the_same_under_all() -> None:
    pixels = noise(60, 50)
    data = png(Image.fromarray(pixels))
    timm, big_vision, paper = (PreprocessConfig(eval_protocol=name) for name in ("timm", "big_vision", "paper"))  # type: ignore[arg-type]
    views = [images.evaluation_view(data, (32, 32), config) for config in (timm, big_vision, paper)]
    assert (views[0] == images.evaluation_view(data, (32, 32), PreprocessConfig())).all(), "timm's is what it was"
    assert (views[1] == protocols.big_vision_view(pixels, (32, 32), 0.875)).all()
    assert (views[2] == protocols.paper_view(pixels, (32, 32))).all()
    training = [images.training_view(data, (32, 32), 7, images.draws([7])[0], config) for config in (timm, big_vision, paper)]
    assert (training[0] == training[1]).all()
    assert (training[0] == training[2]).all()


def test_the_papers_protocol_has_no_crop(config: TrainConfig) -> None:
    paper = replace(config.preprocess, eval_protocol="paper")
    with pytest.raises(ConfigError, match=r"eval_crop=0.875 means nothing under eval_protocol=paper.*--preprocess.eval-crop 1"):
        check_config(replace(config, preprocess=paper), 1)
    check_config(replace(config, preprocess=replace(paper, eval_crop=1.0)), 1)


def test_a_checkpoint_of_before_evaluates_as_timm() -> None:
    written = to_dict(PreprocessConfig(eval_crop=0.9))
    for new in ("eval_protocol", "randaugment_layers", "randaugment_magnitude"):
        del written[new]
    assert from_dict(PreprocessConfig, written) == PreprocessConfig(eval_crop=0.9)


@pytest.mark.parametrize("protocol", ["big_vision", "paper"])
def test_timm_gets_no_model_that_is_evaluated_otherwise_unless_told(tmp_path: Path, protocol: str) -> None:
    model = ViTConfig(depth=1, width=32, mlp_dim=64, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=3)
    preprocess = PreprocessConfig(eval_protocol=protocol, eval_crop=1.0)  # type: ignore[arg-type]
    description = write_checkpoint(tmp_path / "step", random_vit(model), preprocess=preprocess)
    with pytest.raises(CheckpointError, match=f"does not evaluate by {protocol}'s protocol.*--eval-protocol timm"):
        export(description, "weight", tmp_path / "out", to="timm", headless=False)
    assert not (tmp_path / "out").exists()
    assert describe(export(description, "weight", tmp_path / "plain", to="safetensors", headless=False)).preprocess == preprocess
    told = export(description.evaluated_by("timm"), "weight", tmp_path / "timm", to="timm", headless=False)
    assert describe(told).preprocess == replace(preprocess, eval_protocol="timm")
    assert description.evaluated_by(None) == description
