"""Which parameters decay, and what the learning rate is at a step, against formulas written out here."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitscale.check import check_config
from vitscale.config import ConfigError, OptimizerConfig, ScheduleConfig, ViTConfig
from vitscale.exchange import choose_owners, cut
from vitscale.model import ViT
from vitscale.muon import orthogonalize
from vitscale.optim import build_optimizer, learning_rate, param_groups, split_by_decay
from vitscale.recipes import tiny_digits

TINY = {"depth": 2, "width": 16, "mlp_dim": 32, "num_heads": 2, "patch_size": 4, "image_size": (8, 8), "num_classes": 3}

BODY_KERNELS = {"patch_embed.proj.weight"} | {
    f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}
BODY_OTHERS = {"patch_embed.proj.bias", "norm.weight", "norm.bias"} | {
    f"blocks.{i}.{name}" for i in (0, 1) for name in (
        "norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias",
    )
}  # fmt: skip
HEAD_KERNELS, HEAD_OTHERS = {"head.weight"}, {"head.bias"}
CLS = {"cls_token"}
MAP_KERNELS = {f"attn_pool.{name}.weight" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")}
MAP_OTHERS = {"attn_pool.latent", "attn_pool.norm.weight", "attn_pool.norm.bias"} | {
    f"attn_pool.{name}.bias" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")
}
POS = {
    "learned_1d": {"pos_embed"},
    "learned_2d": {"pos_embed_rows", "pos_embed_columns"},
    "relative": {"blocks.0.attn.rel_pos_bias", "blocks.1.attn.rel_pos_bias"},
    "sincos": set[str](),
    "none": set[str](),
}
CASES = {
    **{
        position: ({"position": position}, BODY_KERNELS | HEAD_KERNELS, BODY_OTHERS | HEAD_OTHERS | CLS | names)
        for position, names in POS.items()
    },
    "mean": ({"pool": "mean"}, BODY_KERNELS | HEAD_KERNELS, BODY_OTHERS | HEAD_OTHERS | POS["learned_1d"]),
    "map": ({"pool": "map"}, BODY_KERNELS | HEAD_KERNELS | MAP_KERNELS, BODY_OTHERS | HEAD_OTHERS | MAP_OTHERS | POS["learned_1d"]),
    "representation": (
        {"representation_size": 8},
        BODY_KERNELS | HEAD_KERNELS | {"pre_logits.fc.weight"},
        BODY_OTHERS | HEAD_OTHERS | {"pre_logits.fc.bias"} | CLS | POS["learned_1d"],
    ),
    "headless": ({"num_classes": 0}, BODY_KERNELS, BODY_OTHERS | CLS | POS["learned_1d"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_kernels_alone_decay(case: str, optimizer: str) -> None:
    changes, kernels, others = CASES[case]
    model = ViT(ViTConfig(**TINY | changes))  # type: ignore[arg-type]
    built = build_optimizer(model, OptimizerConfig(optimizer, weight_decay=0.3))  # type: ignore[arg-type]
    name_of = {id(p): name for name, p in model.named_parameters()}
    decay = {name_of[id(p)]: group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay == dict.fromkeys(kernels, 0.3) | dict.fromkeys(others, 0.0)
    assert sum(len(group["params"]) for group in built.param_groups) == len(decay), "each parameter once"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layers_decay_towards_the_embeddings(optimizer: str) -> None:
    """BEiT's scales: 0.5 to the power of how many layers lie above, of which the head and the last norm are one."""
    model = ViT(ViTConfig(**TINY))  # type: ignore[arg-type]
    groups = param_groups(dict(model.named_parameters()), OptimizerConfig(optimizer, layer_decay=0.5))  # type: ignore[arg-type]
    name_of = {id(p): name for name, p in model.named_parameters()}
    scale = {name_of[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    expected = {"patch_embed": 0.125, "cls_token": 0.125, "pos_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "norm": 1.0, "head": 1.0}
    assert scale == {name: next(s for start, s in expected.items() if f"{name}.".startswith(f"{start}.")) for name in name_of.values()}
    assert all(group["params"] for group in groups)


@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8), ranks=st.integers(1, 5), data=st.data())
def test_a_matrix_goes_to_a_rank_that_holds_most_of_it(shapes: list[tuple[int, int]], ranks: int, data: st.DataObject) -> None:
    """However weights are cut over ranks, q, k and v apart: a matrix's stretches cover it once, and its owner holds of it."""
    matrices = []
    for rows, columns in shapes:
        parts = data.draw(st.sampled_from([1, 3]))
        size = parts * rows * columns
        bounds = [0, *sorted(data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))), size]
        shares = [(low, high - low) for low, high in pairwise(bounds)]
        of_weight = cut((parts * rows, columns), parts, shares, everywhere=False, tensor=0, begin=0)
        assert len(of_weight) == parts
        for matrix in of_weight:
            covered = [e for stretch in matrix.held for e in range(stretch.start, stretch.start + stretch.length)]
            assert covered == list(range(rows * columns))
        matrices += of_weight
    for matrix, owner in zip(matrices, choose_owners(matrices), strict=True):
        assert 2 * matrix.held[owner].length > max(stretch.length for stretch in matrix.held)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_work_is_divided_where_all_hold_alike(ranks: int) -> None:
    """As under stage 3, in the shapes of a ViT: no rank has more than a matrix above the mean."""
    D = 16
    shapes = [((3 * D, D), 3), ((D, D), 1), ((4 * D, D), 1), ((D, 4 * D), 1)] * 8
    matrices = []
    for shape, parts in shapes:
        size = math.prod(shape)
        shares = [(rank * size // ranks, (rank + 1) * size // ranks - rank * size // ranks) for rank in range(ranks)]
        matrices += cut(shape, parts, shares, everywhere=False, tensor=0, begin=0)
    cost = [m.rows * m.columns * min(m.rows, m.columns) for m in matrices]
    load = [sum(c for c, owner in zip(cost, choose_owners(matrices), strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) <= sum(cost) / ranks + max(cost)


def test_singular_values_become_about_one() -> None:
    x_KRC = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for found in (orthogonalize(x_KRC), orthogonalize(x_KRC.mT).mT):
        values = torch.linalg.svdvals(found)
        assert 0.6 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(x_KRC, full_matrices=False)
        torch.testing.assert_close(found, u @ torch.diag_embed(torch.linalg.svdvals(found).new_ones(3, 24)) @ v, atol=0.2, rtol=0)


def test_split_keeps_the_order_of_the_model() -> None:
    """DeepSpeed lays parameters out in this order; a checkpoint does not depend on it, a repeated run's bits do."""
    parameters = dict(ViT(ViTConfig(**TINY)).named_parameters())  # type: ignore[arg-type]
    kernels, others = split_by_decay(parameters)
    position = {id(p): i for i, p in enumerate(parameters.values())}
    for part in (kernels, others):
        order = [position[id(p)] for p in part]
        assert order == sorted(order)


def test_decay_is_decoupled_and_scaled_by_the_learning_rate() -> None:
    """Without a gradient AdamW multiplies a kernel by 1 - lr x decay, and leaves the rest as it is."""
    model = ViT(ViTConfig(**TINY))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    built = build_optimizer(model, OptimizerConfig(peak_lr=1.0, weight_decay=0.25))
    for group in built.param_groups:
        group["lr"] = 0.5
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    built.step()
    assert all((p == (0.875 if name.endswith("weight") and p.ndim > 1 else 1.0)).all() for name, p in model.named_parameters())


@pytest.mark.parametrize(("name", "momentum"), [("adamw", 0.7), ("sgd", 0.7), ("sgd", 0.0)])
def test_settings_arrive_and_moments_bear_their_names(name: str, momentum: float) -> None:
    model = ViT(ViTConfig(**TINY))  # type: ignore[arg-type]
    config = OptimizerConfig(name, peak_lr=0.02, betas=(0.8, 0.95), eps=1e-6, momentum=momentum)  # type: ignore[arg-type]
    built = build_optimizer(model, config)
    for group in built.param_groups:
        assert group["lr"] == 0.02
        if name == "adamw":
            assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-6, False)
        else:
            assert (group["momentum"], group["nesterov"], group["dampening"]) == (momentum, False, 0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    built.step()
    state = next(iter(built.state.values()), {})  # SGD without momentum keeps none
    assert {key for key, value in state.items() if torch.is_tensor(value) and value.ndim} == set(config.moments())


# ---------------------------------------------------------------------------------------------------------------------------------------
# The schedule
# ---------------------------------------------------------------------------------------------------------------------------------------

PEAK, TOTAL, WARM = 2e-3, 1000, 100


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig("constant", warmup_steps=WARM), {0: 0, 1: 2e-5, 50: 1e-3, 99: 1.98e-3, 100: 2e-3, 999: 2e-3}),
        (ScheduleConfig("linear", warmup_steps=WARM), {0: 0, 50: 1e-3, 100: 2e-3, 101: 2e-3 * 899 / 900, 550: 1e-3, 1000: 0}),
        (ScheduleConfig("linear", warmup_steps=WARM, end_lr=1e-4), {50: 1e-3, 100: 2e-3, 550: 1.05e-3, 1000: 1e-4}),
        (ScheduleConfig("linear"), {0: 2e-3, 250: 1.5e-3, 999: 2e-6, 1000: 0}),
        (
            ScheduleConfig("cosine", warmup_steps=WARM),
            {0: 0, 50: 1e-3, 100: 2e-3, 250: 1e-3 * (1 + math.sqrt(3) / 2), 400: 1.5e-3, 550: 1e-3, 700: 0.5e-3, 1000: 0},
        ),
        (ScheduleConfig("cosine", end_lr=2e-4), {0: 2e-3, 500: 1.1e-3, 1000: 2e-4}),
        (
            ScheduleConfig("rsqrt", warmup_steps=WARM, timescale=300),
            {0: 0, 50: 1e-3, 100: 2e-3, 400: 2e-3 / math.sqrt(2), 1000: 1e-3},
        ),
        (
            ScheduleConfig("rsqrt", warmup_steps=WARM, timescale=300, cooldown_steps=200),
            {50: 1e-3, 400: 2e-3 / math.sqrt(2), 800: 2e-3 / math.sqrt(1 + 7 / 3), 900: 1e-3 / math.sqrt(1 + 8 / 3), 1000: 0},
        ),
        (ScheduleConfig("constant", warmup_steps=WARM, cooldown_steps=100), {50: 1e-3, 500: 2e-3, 900: 2e-3, 950: 1e-3, 1000: 0}),
    ],
    ids=["constant", "linear", "linear-to", "linear-cold", "cosine", "cosine-to", "rsqrt", "rsqrt-cooldown", "constant-cooldown"],
)  # fmt: skip
def test_learning_rate_at_chosen_steps(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert learning_rate(step, TOTAL, PEAK, schedule) == pytest.approx(rate, rel=1e-9, abs=1e-15), step


@pytest.mark.parametrize("kind", ["linear", "cosine", "rsqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 37, 1000, 5000])
def test_learning_rate_rises_then_never_rises_again(kind: str, warmup: int) -> None:
    """Also where the warm-up is as long as the run or longer: a rate is never negative and never above the peak."""
    schedule = ScheduleConfig(kind, warmup_steps=warmup, timescale=50)  # type: ignore[arg-type]
    rates = [learning_rate(step, TOTAL, PEAK, schedule) for step in range(TOTAL)]
    turn = min(warmup, TOTAL)
    assert all(0 <= rate <= PEAK for rate in rates)
    assert rates[:turn] == sorted(rates[:turn])
    assert rates[turn:] == sorted(rates[turn:], reverse=True)
    if warmup < TOTAL:
        assert rates[turn] == PEAK


def test_muon_does_not_take_two_matrices_for_one() -> None:
    config = tiny_digits()
    swiglu = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp="swiglu"))
    check_config(swiglu, 1)
    with pytest.raises(ConfigError, match="mlp=swiglu has two in one; adamw works"):
        check_config(dataclasses.replace(swiglu, optimizer=OptimizerConfig("muon")), 1)
