"""Memory by formula against counts: torch's saved tensors, and the storages of real DeepSpeed engines on two ranks."""

import gc
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_on_ranks
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, ViTConfig
from vitscale.engine import Engine, deepspeed_config
from vitscale.flops import parameters
from vitscale.memory import Layout, activations, block_elements, embed_elements, moments, peak, tensor_sizes
from vitscale.model import ViT, parameter_shapes
from vitscale.objective import compute_loss
from vitscale.optim import split_by_decay
from vitscale.recipes import vit

ADAMW = OptimizerConfig()
SMALL = ViTConfig(depth=2, width=32, mlp_dim=80, num_heads=4, patch_size=4, image_size=(16, 24), num_classes=10)


def models() -> list[ViTConfig]:
    """Every option that has tensors or activations of its own."""
    pools, positions = ("cls", "mean", "map"), ("learned_1d", "learned_2d", "relative", "sincos", "none")
    crossed = [
        replace(SMALL, pool=pool, position=position, dropout=0.1 * (number % 2), representation_size=24 * (number % 3 == 0))
        for number, (pool, position) in enumerate(itertools.product(pools, positions))
    ]
    return [*crossed, SMALL, replace(SMALL, depth=3, width=48, mlp_dim=96, num_heads=3, num_classes=7, image_size=(20, 20))]


@pytest.mark.parametrize("model", [*models(), vit("ti16", num_classes=1000), vit("h14", num_classes=18_291)])
def test_tensors_are_those_of_the_model(model: ViTConfig) -> None:
    shapes = parameter_shapes(model)
    groups = split_by_decay({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    kernels, others = tensor_sizes(model)
    assert sorted(kernels) == sorted(p.numel() for p in groups[0])
    assert sorted(others) == sorted(p.numel() for p in groups[1])
    assert sum(kernels) + sum(others) == parameters(model)
    assert block_elements(model) == sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks.0."))
    embed = [s for name, s in shapes.items() if name.startswith(("patch_embed", "cls_token", "pos_embed"))]
    assert embed_elements(model) == sum(map(math.prod, embed))


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "softmax"), ("bf16", "sigmoid")])
def test_activations_are_what_autograd_keeps(precision: str, kind: str) -> None:
    """To the byte, for every option, uncheckpointed and with every block or every other one checkpointed."""
    for number, (model, every) in enumerate(itertools.product(models(), (0, 1, 2))):
        batch = 2 + number % 3
        engine = EngineConfig(precision=precision, checkpoint_every_n_blocks=every)  # type: ignore[arg-type]
        layout = Layout(engine, 1, batch, keeps="nothing" if every else "everything", device="cpu")
        assert activations(model, layout).total == saved(model, every, batch, precision, kind), (model, every, batch)


def saved(model: ViTConfig, every: int, batch: int, precision: str, kind: str) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters apart, each counted once."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = ViT(model, every).to(dtype)
    storages: dict[int, Tensor] = {}
    keys = torch.arange(batch)  # checkpointed blocks keep them, but they are the batch's
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


def storages() -> dict[int, int]:
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta and t.untyped_storage().nbytes()}


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
        memory = list(moments(WIDE, optimizer(average), layout))[-1]
        passing = next(m for m in moments(WIDE, optimizer(average), layout) if m.moment == "update").gradients
        standing = {("bf16", 1): 4 * parameters(WIDE)}.get((precision, stage), 4 * parameters(WIDE) // 2 if stage == 3 else 0)
        formula = memory.total - memory.inputs - passing + standing
        assert found == pytest.approx(formula, rel=0.005), (stage, precision, average)


def test_settings_of_deepspeed_are_the_engines() -> None:
    for stage in (0, 1, 2, 3):
        for on_gpu in (False, True):
            config = EngineConfig(zero_stage=stage, precision="fp32")
            given = deepspeed_config(config, 1.0, 1, 1, on_gpu=on_gpu)["zero_optimization"]
            ours = Layout(config, 2, 1, device="cuda" if on_gpu else "cpu").zero
            assert {name: ours[name] for name in given.keys() & ours.keys()} == {name: given[name] for name in given.keys() & ours.keys()}


# ---------------------------------------------------------------------------------------------------------------------------------------


def test_the_facts_of_vit_h14() -> None:
    """Stage 1 in bf16: 6 bytes a parameter and 12 / N. Activations: a token, layer and width 32 bytes eager, 20 compiled, 2 without."""
    model = vit("h14", num_classes=18_291)
    P, tokens = parameters(model), 64 * model.num_tokens
    rest = list(moments(model, ADAMW, Layout(EngineConfig(), 64, 64)))[-1]
    assert rest.weights + rest.optimizer + rest.gradients - 2 * P == pytest.approx((6 + 12 / 64) * P)
    for layout, facts in (
        (Layout(EngineConfig(), 64, 64), 32),
        (Layout(EngineConfig(), 64, 64, compiled=True), 20),
        (Layout(EngineConfig(), 64, 64, keeps="nothing"), 2),
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
        engine = EngineConfig(zero_stage=stage, precision="bf16" if stage else "fp32")
        layout = Layout(
            engine, draw.choice((2, 8, 64)), draw.choice((1, 16, 128)), draw.choice((1, 4)), compiled=draw.choice((False, True))
        )
        for memory in moments(model, ADAMW, layout):
            assert memory.total == sum(memory.kinds().values())
            assert min(memory.kinds().values()) >= 0
        top = peak(model, ADAMW, layout).total
        assert peak(model, ADAMW, replace(layout, world_size=2 * layout.world_size)).total <= top
        assert peak(model, ADAMW, replace(layout, micro_batch_size=2 * layout.micro_batch_size)).total >= top
        assert activations(model, replace(layout, keeps="nothing")).total <= activations(model, layout).total
        assert peak(model, OptimizerConfig(average_decay=0.9), layout).total > top
