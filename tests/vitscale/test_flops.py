"""What a model costs, exactly: parameters against the model's own, FLOPs against those that torch counts in real passes.

Attention runs as plain products here, because torch's counter leaves the fused CPU kernel out.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.vitscale.models import random_images, random_vit
from vitscale.config import OptimizerConfig, ViTConfig
from vitscale.flops import (
    branch_flops,
    checkpoint_bytes,
    computed_share,
    embed_flops,
    forward_flops,
    parameters,
    peak_flops,
    train_flops,
)
from vitscale.model import parameter_shapes
from vitscale.omissions import draw_path, keyed_uniform
from vitscale.recipes import vit

SMALL = ViTConfig(depth=2, width=64, mlp_dim=160, num_heads=4, patch_size=8, image_size=(24, 40), num_classes=7)
COSTED = {
    "cls": SMALL,
    "mean": replace(SMALL, pool="mean"),
    "map": replace(SMALL, pool="map"),
    "representation": replace(SMALL, representation_size=48),
    "relative": replace(SMALL, position="relative", num_classes=0, activation="gelu_tanh"),
    "qk-norm": replace(SMALL, qk_norm=True, depth=3),
    "wide": replace(SMALL, image_size=(16, 72), position="sincos", pool="map", representation_size=40, qk_norm=True),
    "dinov2": replace(SMALL, registers=3, layer_scale=1e-5, mlp="swiglu", class_position=False),
    "registers-map": replace(SMALL, registers=2, pool="map", pre_norm=True, activation="quick_gelu"),
    "mae": replace(SMALL, pool="mean_with_cls", pool_norm=True),
    "patch-dropout": replace(SMALL, patch_dropout=0.4),
    "patch-dropout-map": replace(SMALL, patch_dropout=0.9, pool="map", qk_norm=True),
}
KEYS = torch.randint(-(2**63), 2**63 - 1, (16,), generator=torch.Generator().manual_seed(2))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def counted_training(config: ViTConfig, batch_size: int = 1, *, images_learn: bool = False, every: int = 0, keeps: str = "nothing") -> int:
    """FLOPs of a forward and a backward pass in training."""
    model = random_vit(config, checkpoint_every_n_blocks=every, checkpoint_keeps=keeps).train()
    images = random_images(config, batch_size).requires_grad_(images_learn)
    with counting() as counter:
        logits = model(images, KEYS[:batch_size])
        logits.backward(torch.ones_like(logits))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------------------------


def count_parameters(config: ViTConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


@pytest.mark.parametrize(
    ("variant", "tokens", "parameters"),
    [
        ("b16", 197, 86_567_656),
        ("b32", 50, 88_224_232),
        ("l16", 197, 304_326_632),
        ("l32", 50, 306_535_400),
        ("h14", 257, 632_045_800),
    ],
)
def test_sizes_are_the_published_ones(variant: str, tokens: int, parameters: int) -> None:
    config = vit(variant, num_classes=1000)
    assert config.num_tokens == tokens
    assert count_parameters(config) == parameters


def test_headless_h14() -> None:
    assert count_parameters(vit("h14")) == 630_764_800


@pytest.mark.parametrize(("variant", "millions"), [("g14", 1011), ("G14", 1843)])
def test_the_scaling_studys_largest_have_its_parameters(variant: str, millions: int) -> None:
    """arXiv 2106.04560, table 2."""
    config = vit(variant)
    assert count_parameters(config) == parameters(config)
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("position", get_args(get_type_hints(ViTConfig)["position"]))
@pytest.mark.parametrize("case", COSTED)
def test_parameters_are_those_of_the_model(case: str, position: str) -> None:
    config = replace(COSTED[case], position=position)
    assert parameters(config) == count_parameters(config)
    assert checkpoint_bytes(config, OptimizerConfig("sgd", momentum=0)) == 4 * parameters(config)
    assert checkpoint_bytes(config, OptimizerConfig(average_decay=0.99)) == 16 * parameters(config)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Model FLOPs
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*COSTED, "ti16"])
def test_flops_are_those_that_torch_counts(case: str) -> None:
    """Training's are three forward passes where the images learn too; they do not, so that the patch embedding's gradient is not run."""
    config = COSTED[case] if case in COSTED else vit("ti16", num_classes=1000)
    with counting() as forward:
        random_vit(config)(random_images(config, 1))
    assert forward.get_total_flops() == forward_flops(config)
    assert counted_training(config, images_learn=True) == train_flops(config)
    assert counted_training(config) == train_flops(config) - embed_flops(config)
    if not config.patch_dropout:
        assert train_flops(config) == 3 * forward_flops(config)


@pytest.mark.parametrize(
    ("variant", "side", "gflops"), [("b16", 224, 35.1), ("l16", 224, 123.1), ("h14", 224, 334.6), ("h14", 392, 1090), ("h14", 518, 2033)]
)
def test_published_flops(variant: str, side: int, gflops: float) -> None:
    assert forward_flops(vit(variant, num_classes=1000, image_size=(side, side))) / 1e9 == pytest.approx(gflops, rel=2e-3)


def test_dropped_branches_are_not_counted_in_expectation() -> None:
    config = replace(SMALL, depth=5, drop_path_rate=0.6)
    without = replace(config, drop_path_rate=0.0)
    dropped = 0.3 * 5 * 3 * sum(branch_flops(config, config.num_tokens))  # of rates from 0 to 0.6 the mean is 0.3
    assert train_flops(config) == pytest.approx(train_flops(without) - dropped, rel=1e-9)
    assert forward_flops(config) == forward_flops(without)


@pytest.mark.parametrize(("rate", "batch"), [(0.05, 32), (0.3, 1), (0.3, 7), (0.6, 64), (0.45, 256), (0.9, 12)])
def test_the_share_computed_is_that_of_draws(rate: float, batch: int) -> None:
    draws = 1500
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (draws, batch))
    shares = []
    for keys_B in keys:
        rows_2R, scales = draw_path(rate, keyed_uniform(keys_B, np.array([[0], [1]])))
        shares.append((scales if rows_2R is None else rows_2R).shape[1] / batch)
    assert np.mean(shares) == pytest.approx(computed_share(rate, batch), abs=5 * np.std(shares) / math.sqrt(draws) + 1e-9)
    assert 1 - rate <= computed_share(rate, batch) <= 1


def test_peaks_of_devices() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("cpu", "fp32") is None
