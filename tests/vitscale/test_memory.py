"""Memory by formula against counts: torch's saved tensors, and the storages of real DeepSpeed engines on two ranks."""

import gc
import itertools
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor

from benchmarks.memory import Case, planned, storages
from tests.distributed import run_on_ranks
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, ViTConfig
from vitscale.engine import Engine
from vitscale.flops import is_kernel, parameters, tensor_sizes
from vitscale.memory import Layout, activations, moments, peak
from vitscale.model import Block, ViT, parameter_shapes
from vitscale.objective import compute_loss
from vitscale.optim import split_by_decay
from vitscale.recipes import vit
from vitscale.zero import BLOCKS_ARE_LEAVES, deepspeed_config

ADAMW = OptimizerConfig()
SMALL = ViTConfig(depth=2, width=32, mlp_dim=80, num_heads=4, patch_size=4, image_size=(16, 24), num_classes=10)


def models() -> list[ViTConfig]:
    """Every option that has tensors or activations of its own."""
    pools, positions = ("cls", "mean", "map"), ("learned_1d", "learned_2d", "relative", "sincos", "none")
    crossed = [
        replace(SMALL, pool=pool, position=position, dropout=0.1 * (number % 2), representation_size=24 * (number % 3 == 0))
        for number, (pool, position) in enumerate(itertools.product(pools, positions))
    ]
    left_out = [replace(model, patch_dropout=0.4, qk_norm=True) for model in crossed[:12:4] if model.position != "relative"]
    several = [
        replace(SMALL, qk_norm=True, pool=pool, position=position) for pool, position in (("cls", "learned_1d"), ("map", "relative"))
    ]
    shapes = [replace(SMALL, depth=3, width=48, mlp_dim=96, num_heads=3, num_classes=7, image_size=(20, 20))]
    shapes += [replace(SMALL, num_classes=21_841, mlp_dim=32), replace(SMALL, image_size=(64, 48), mlp_dim=256)]
    return [*crossed, *left_out, *several, *shapes, *others(), SMALL]


def others() -> list[ViTConfig]:
    """Forms that the field's other ViTs have."""
    dinov2 = replace(SMALL, registers=3, layer_scale=1e-5, mlp="swiglu", position="learned_1d", class_position=False)
    clip = replace(SMALL, pre_norm=True, activation="quick_gelu", layer_norm_eps=1e-5)
    mae = replace(SMALL, pool="mean_with_cls", pool_norm=True, dropout=0.1)
    pooled = [replace(dinov2, pool=pool, pool_norm=pool != "map") for pool in ("cls", "mean", "map")]
    return [dinov2, clip, mae, *pooled, replace(dinov2, dropout=0.1, patch_dropout=0.5), replace(clip, pool="map", pool_norm=True)]


@pytest.mark.parametrize("model", [*models(), vit("ti16", num_classes=1000), vit("h14", num_classes=18_291)])
def test_tensors_are_those_of_the_model(model: ViTConfig) -> None:
    shapes = parameter_shapes(model)
    assert list(tensor_sizes(model).items()) == [(name, math.prod(shape)) for name, shape in shapes.items()]
    kernels, _ = split_by_decay({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert [p.shape for p in kernels] == [shapes[name] for name in tensor_sizes(model) if is_kernel(name)]


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "softmax"), ("bf16", "sigmoid")])
def test_activations_are_what_autograd_keeps(precision: str, kind: str) -> None:
    """To the byte, for every option, uncheckpointed and with every block or every other one checkpointed."""
    for number, (model, every) in enumerate(itertools.product(models(), (0, 1, 2))):
        batch = max((1, 3, 8)[number % 3], 1 + (model.position == "relative"))  # of one, with a bias, torch copies less
        engine = EngineConfig(precision=precision, checkpoint_every_n_blocks=every)  # type: ignore[arg-type]
        layout = Layout(engine, 1, batch, device="cpu")
        assert activations(model, layout).total == saved(model, every, batch, precision, kind), (model, every, batch)


def test_activations_of_what_training_leaves_out() -> None:
    """Patch dropout to the byte, apart from the indices of what is kept; stochastic depth in the mean of many batches' draws."""
    for dropout, rate in ((0.5, 0.0), (0.0, 0.6), (0.25, 0.3)):
        model = replace(SMALL, depth=4, image_size=(32, 32), patch_dropout=dropout, drop_path_rate=rate)
        layout = Layout(EngineConfig(precision="fp32"), 1, 8, device="cpu")
        counts = [saved(model, 0, 8, "fp32", "softmax", first_key=8 * batch) for batch in range(20 if rate else 1)]
        assert activations(model, layout).total == pytest.approx(sum(counts) / len(counts), rel=0.03 if rate else 0.002), (dropout, rate)


def saved(model: ViTConfig, every: int, batch: int, precision: str, kind: str, first_key: int = 0) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters apart, each counted once."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = ViT(model, EngineConfig(checkpoint_every_n_blocks=every).keeps).to(dtype)
    storages: dict[int, Tensor] = {}
    keys = first_key + torch.arange(batch)  # checkpointed blocks keep them, but they are the batch's
    own = {t.untyped_storage().data_ptr() for t in (keys, *net.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    images = torch.randn(batch, 3, *model.image_size).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net(images, keys)
        labels, scores = torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, 1)
        loss = compute_loss(logits, labels, scores, ObjectiveConfig(kind))  # type: ignore[arg-type]
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for where, tensor in storages.items() if where not in own)


# ---------------------------------------------------------------------------------------------------------------------------------------

WIDE = ViTConfig(
    depth=1, width=384, mlp_dim=1536, num_heads=4, patch_size=4, image_size=(4, 4), num_classes=10, pool="mean", position="none"
)
# (stage, precision, whether an average is kept)
CASES = [
    (0, "fp32", True),
    (1, "fp32", False),
    (1, "bf16", True),
    (2, "fp32", False),
    (2, "bf16", False),
    (3, "fp32", False),
    (3, "bf16", True),
]


def at_rest(payload: dict[str, Any]) -> list[int]:
    """On a rank: bytes of all tensors that each case's engine holds between steps, each storage once."""
    found = []
    for stage, precision, average in payload["cases"]:
        gc.collect()
        before = storages()
        layout = layout_of(stage, precision, 2)
        engine = Engine(ViT(WIDE), layout.engine, optimizer(average), micro_batch_size=1, grad_accum_steps=1)
        for _ in range(2):
            engine.backward(engine.forward(torch.randn(1, 3, 4, 4), torch.arange(1)).float().sum())
            engine.step(1e-4)
        gc.collect()
        found.append(sum(size for where, size in storages().items() if where not in before))
        engine.close()
        del engine
    return found


def layout_of(stage: int, precision: str, world_size: int) -> Layout:
    zero = {"zero_optimization": {"reduce_bucket_size": 300_000, "allgather_bucket_size": 300_000}} if stage else {}
    engine = EngineConfig(zero_stage=stage, precision=precision, deepspeed=zero)  # type: ignore[arg-type]
    return Layout(engine, world_size, 1, device="cpu")


def optimizer(average: bool) -> OptimizerConfig:
    return OptimizerConfig(average_decay=0.99 * average)


def test_at_rest_engines_hold_what_the_formulas_say(tmp_path: Path) -> None:
    """Weights, masters, moments, averages, standing gradients and buckets on two ranks, within 0.5% (padding, scalars)."""
    measured = run_on_ranks("tests.vitscale.test_memory:at_rest", 2, {"cases": CASES}, tmp_path)
    for (stage, precision, average), found in zip(CASES, measured, strict=True):
        layout = layout_of(stage, precision, 2)
        rest = next(moments(WIDE, optimizer(average), layout))
        assert found == pytest.approx(rest.total, rel=0.005), (stage, precision, average)


def test_steps_take_what_the_formulas_say(tmp_path: Path) -> None:
    """Peaks of real steps on two ranks, every allocation of torch counted: stages, precisions and micro-batches as drawn."""
    draw = random.Random(0)
    drawn = [
        Case("narrow", 2, stage, precision, draw.choice((0, 1, 2)), draw.choice(("nothing", "products")),
             accumulate=draw.choice((1, 2)), batch=draw.choice((1, 4, 8)))
        for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    ]  # fmt: skip
    measured = run_on_ranks("benchmarks.memory:walk", 2, {"cases": [asdict(case) for case in drawn]}, tmp_path)
    for case, found in zip(drawn, measured, strict=True):
        plan = planned(case)
        for kind in ("rest", "activations", "peak"):
            assert found[kind] == pytest.approx(plan[kind], rel=0.04), (case, kind, plan)


# ---------------------------------------------------------------------------------------------------------------------------------------


def test_defaults_are_deepspeeds_own() -> None:
    """What it makes of the settings that the engine hands over is what the plan takes them for."""
    for stage, on_gpu in itertools.product((0, 1, 2, 3), (False, True)):
        engine = EngineConfig(zero_stage=stage, precision="fp32", deepspeed={"zero_optimization": {"stage3_max_live_parameters": 5}})
        given = deepspeed_config(engine, 1.0, 1, 1, on_gpu=on_gpu)["zero_optimization"]
        own = {name.removeprefix("stage3_"): value for name, value in DeepSpeedZeroConfig(**given).model_dump(by_alias=True).items()}
        for name, value in Layout(engine, 2, 1, device="cuda" if on_gpu else "cpu").zero.items():
            assert own[name] == value, (stage, name)
    assert BLOCKS_ARE_LEAVES["classes"] == [f"{Block.__module__}.{Block.__name__}"]


def test_the_facts_of_vit_h14() -> None:
    """Stage 1 in bf16: 4 bytes a parameter, 12 / N, and 4 where micro-batches add up. Of activations 32 eager, 20 compiled, 2 without."""
    model = vit("h14", num_classes=18_291)
    P, tokens = parameters(model), 64 * model.num_tokens
    for micro_batches, sums in ((1, 0), (2, 4)):
        assert next(moments(model, ADAMW, Layout(EngineConfig(), 64, 64, micro_batches))).total == pytest.approx((4 + sums + 12 / 64) * P)
    for layout, facts in (
        (Layout(EngineConfig(compile="none"), 64, 64), 32),
        (Layout(EngineConfig(), 64, 64), 20),
        (Layout(EngineConfig(checkpoint_every_n_blocks=1), 64, 64), 2),
    ):
        per_block = activations(model, layout).blocks[0] / (tokens * model.width)
        assert per_block == pytest.approx(facts, rel=0.02)


def test_properties_over_random_layouts() -> None:
    """Kinds add up to the whole; more ranks never hold more; larger micro-batches never hold less; recomputing never holds more."""
    draw = random.Random(0)
    for _ in range(200):
        width = 16 * draw.randint(1, 80)
        model = ViTConfig(
            depth=draw.randint(1, 40), width=width, mlp_dim=width * draw.randint(1, 4), num_heads=4, patch_size=14, image_size=(224, 224),
            num_classes=draw.randint(1, 20_000), pool=draw.choice(("cls", "mean", "map")), dropout=draw.choice((0.0, 0.1)),
        )  # fmt: skip
        stage = draw.choice((0, 1, 2, 3))
        engine = EngineConfig(zero_stage=stage, precision="bf16" if stage else "fp32", compile=draw.choice(("none", "blocks")))
        layout = Layout(engine, draw.choice((2, 8, 64)), draw.choice((1, 16, 128)), draw.choice((1, 4)))
        for memory in moments(model, ADAMW, layout):
            assert memory.total == sum(memory.kinds().values())
            assert min(memory.kinds().values()) >= 0
        top = peak(model, ADAMW, layout).total
        assert peak(model, ADAMW, replace(layout, world_size=2 * layout.world_size)).total <= top
        assert peak(model, ADAMW, replace(layout, micro_batch_size=2 * layout.micro_batch_size)).total >= top
        assert (
            activations(model, replace(layout, engine=replace(engine, checkpoint_every_n_blocks=1))).total
            <= activations(model, layout).total
        )
        assert peak(model, OptimizerConfig(average_decay=0.9), layout).total > top
