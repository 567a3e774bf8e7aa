"""What is frozen does not change by a bit, under any ZeRO stage and world size, and what is trained is trained as plain torch does it.

The reference for a frozen backbone is a linear layer on features that were computed once, which knows nothing of a backbone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_on_ranks
from tests.runs import STOP, TOLERANCE, case, check_alike, losses_of, state, variant
from tests.vitscale.models import random_vit, write_checkpoint
from tests.vitscale.plain import plain_torch
from vitscale import checkpoint
from vitscale.check import check_config
from vitscale.config import ConfigError, EngineConfig, InitConfig, OptimizerConfig, TrainConfig, ViTConfig, frozen
from vitscale.engine import Engine
from vitscale.flops import head_flops, moment_elements, train_flops
from vitscale.model import ViT
from vitscale.optim import build_optimizer

MODEL = ViTConfig(depth=2, width=16, mlp_dim=20, num_heads=2, patch_size=4, image_size=(8, 8), num_classes=3)
STEPS, MICROS, BATCH = 5, 2, 6  # images a micro-batch, of all ranks
STAGES = {"whole1": 1, "whole3": 3, "part1": 1, "rest1": 1, "rest3": 3}  # of the runs of a test, by their names
OPTIMIZERS = {
    "adamw": OptimizerConfig("adamw", peak_lr=0.1, weight_decay=0.5, grad_clip=0.1, average_decay=0.5, freeze="backbone"),
    "sgd": OptimizerConfig("sgd", peak_lr=0.3, weight_decay=0.1, grad_clip=0.0, freeze="backbone"),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(3, (BATCH,), generator=generator)) for _ in range(STEPS * MICROS)
    ]


def linear_layer(name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that is trained on the backbone's features."""
    backbone, head, optimizer = random_vit(MODEL).eval(), random_vit(MODEL).head, OPTIMIZERS[name]
    kinds = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=optimizer.peak_lr, betas=optimizer.betas, eps=optimizer.eps),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=optimizer.peak_lr, momentum=optimizer.momentum),
    }
    updates = kinds[name]([{"params": [head.weight], "weight_decay": optimizer.weight_decay}, {"params": [head.bias], "weight_decay": 0.0}])
    with torch.no_grad():
        of_each = [(backbone.pool(backbone.tokens(images)), labels) for images, labels in batches()]
    for step in range(STEPS):
        updates.zero_grad()
        for features, labels in of_each[step * MICROS : (step + 1) * MICROS]:
            (nn.functional.cross_entropy(head(features), labels) / MICROS).backward()
        if optimizer.grad_clip:
            nn.utils.clip_grad_norm_(head.parameters(), optimizer.grad_clip)
        updates.step()
    return head.weight.detach(), head.bias.detach()


def train_heads(payload: dict[str, Any]) -> dict[str, Any]:
    """Of each stage, precision and optimizer: how far the head is from the linear layer's, what else changed, and what is kept for it."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for stage, precision, name in payload["cases"]:
        model = random_vit(MODEL)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        config = EngineConfig(zero_stage=stage, precision=precision)
        engine = Engine(model, config, OPTIMIZERS[name], micro_batch_size=BATCH // ranks, grad_accum_steps=MICROS)
        for images, labels in batches():
            mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
            logits = engine.forward(images[mine])
            engine.backward(nn.functional.cross_entropy(logits.float(), labels[mine]))
            engine.step(OPTIMIZERS[name].peak_lr)
        with engine.evaluation():
            engine.forward(images[mine])
        after = {key: engine.gather(key, checkpoint.WEIGHT) for key in before}
        average = {key: engine.gather(key, checkpoint.AVERAGE) for key in before} if OPTIMIZERS[name].average_decay else after
        expected = dict(zip(("head.weight", "head.bias"), linear_layer(name), strict=True))
        shares: list[Any] = [None] * ranks
        dist.all_gather_object(shares, engine.shares())
        found[f"{stage} {precision} {name}"] = {
            "apart": max(float((after[key] - weight).abs().max()) for key, weight in expected.items()),
            "moved": float((after["head.weight"] - before["head.weight"]).abs().max()),
            "changed": [key for key in before if key not in expected and not torch.equal(after[key], before[key])],
            "average_changed": [key for key in before if key not in expected and not torch.equal(average[key], before[key])],
            "kinds": {kind: sorted(names) for kind, names in engine.kinds.items()},
            "uncovered": [key for key, p in before.items() if sum(of_rank[key][1] for of_rank in shares) != p.numel()],
            "with_gradient": [key for key, p in engine.parameters.items() if p.grad is not None and key not in expected],
        }
        engine.close()
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_head_is_trained_as_a_linear_layer_on_features(tmp_path: Path, world_size: int) -> None:
    everything = sorted(name for name, _ in ViT(MODEL).named_parameters())
    cases = [(stage, "fp32", name) for stage in (0, 1, 2, 3) for name in OPTIMIZERS] + [(stage, "bf16", "adamw") for stage in (1, 2, 3)]
    found = run_on_ranks("tests.vitscale.test_freeze:train_heads", world_size, {"cases": cases}, tmp_path)
    assert len(found) == len(cases)
    for of, result in found.items():
        assert result["moved"] > 0.1, of
        assert result["apart"] < (2e-6 if "fp32" in of else 0.1), of
        assert not result["changed"] + result["average_changed"] + result["uncovered"] + result["with_gradient"], of
        assert result["kinds"].pop("weight") == everything, of
        assert result["kinds"].pop("average", everything) == everything, of
        assert all(names == ["head.bias", "head.weight"] for names in result["kinds"].values()), of
        assert set(result["kinds"]) == ({"exp_avg", "exp_avg_sq"} if "adamw" in of else {"momentum_buffer"}), of


@pytest.mark.parametrize(("freeze", "blocks"), [("backbone", 0), ("nothing", 2)])
def test_whole_runs_are_plain_torchs_and_go_on_bitwise(config: TrainConfig, tmp_path: Path, freeze: str, blocks: int) -> None:
    """Stages 1 and 3 on two ranks, with averages: against plain torch, and stopped and gone on with at the same and at the other stage."""
    optimizer = dataclasses.replace(config.optimizer, average_decay=0.9, freeze=freeze, freeze_blocks=blocks)  # type: ignore[arg-type]
    source = write_checkpoint(tmp_path / "source", random_vit(dataclasses.replace(config.model, num_classes=7)))
    init = InitConfig(str(source.path), "weight", "timm", str(source.path))
    config = dataclasses.replace(config, optimizer=optimizer, init=init, steps=10)
    runs = {name: variant(config, tmp_path, name, world_size=2, zero_stage=stage) for name, stage in STAGES.items()}
    first = {name: case(runs[name], stop_at=STOP if name == "part1" else None) for name in ("whole1", "whole3", "part1")}
    results = run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": first}, tmp_path)
    second = {name: case(runs[name], copy_of=str(tmp_path / "part1")) for name in ("rest1", "rest3")}
    results |= run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": second}, tmp_path)
    check_alike(tmp_path / "rest1", tmp_path / "whole1")
    plain = plain_torch(runs["whole1"])
    for name in ("whole1", "whole3"):
        np.testing.assert_allclose(losses_of(results[name], 0, 10), plain.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(losses_of(results["rest3"], STOP, 10), plain.losses[STOP:], rtol=TOLERANCE)
    still = frozen(plain.start, optimizer)
    assert 0 < len(still) < len(plain.start)
    for name in ("whole1", "whole3", "rest3"):
        for (kind, of), tensor in state(tmp_path / name).items():
            if of in still:
                assert torch.equal(tensor, plain.start[of]), (name, kind, of)
            elif kind == checkpoint.WEIGHT:
                assert not torch.equal(tensor, plain.start[of]), (name, of)


def test_what_a_setting_freezes_by_name() -> None:
    names = {name for name, _ in ViT(dataclasses.replace(MODEL, representation_size=8, pool="map")).named_parameters()}
    head = {"head.weight", "head.bias", "pre_logits.fc.weight", "pre_logits.fc.bias"}
    assert frozen(names, OptimizerConfig()) == set()
    assert frozen(names, OptimizerConfig(freeze="backbone")) == names - head
    first = frozen(names, OptimizerConfig(freeze_blocks=1))
    assert first == {name for name in names if name.startswith(("blocks.0.", "patch_embed.", "pos_embed"))}
    rest = {name for name in names if name.startswith(("norm.", "attn_pool."))}
    assert frozen(names, OptimizerConfig(freeze_blocks=2)) == names - head - rest


def test_moments_are_kept_of_what_is_trained_alone() -> None:
    for optimizer in (OptimizerConfig(freeze="backbone"), OptimizerConfig("muon", freeze_blocks=1), OptimizerConfig("sgd")):
        of_group = build_optimizer(ViT(MODEL), optimizer).param_groups
        kept = sum(p.numel() * len(optimizer.moments(muon=group.get("muon", False))) for group in of_group for p in group["params"])
        assert moment_elements(MODEL, optimizer) == kept


@pytest.mark.parametrize("pool", ["cls", "map"])
@pytest.mark.parametrize(
    "optimizer", [OptimizerConfig(freeze_blocks=1), OptimizerConfig(freeze_blocks=2), OptimizerConfig(freeze="backbone")]
)
def test_flops_are_those_that_autograd_runs(optimizer: OptimizerConfig, pool: str) -> None:
    """But for the gradient of what the head is given, where it alone is trained."""
    model_config = dataclasses.replace(MODEL, pool=pool)
    model = random_vit(model_config).train()
    for name in frozen([name for name, _ in model.named_parameters()], optimizer):
        model.get_parameter(name).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 8, 8)).sum().backward()
    less = head_flops(model_config) if optimizer.freeze == "backbone" else 0
    assert train_flops(model_config, optimizer) == counter.get_total_flops() + less
    assert train_flops(model_config, optimizer) < train_flops(model_config)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OptimizerConfig(freeze_blocks=4), "freeze_blocks=4 of the model's 3 blocks; 3 freezes all of them"),
        (OptimizerConfig("muon", freeze="backbone"), "all of them are frozen; adamw and sgd"),
        (OptimizerConfig(freeze="backbone"), "a random backbone; --init CHECKPOINT"),
        (OptimizerConfig(freeze_blocks=-1), "must be a number of at least 0"),
    ],
)
def test_what_leaves_nothing_to_train_is_refused(config: TrainConfig, optimizer: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(config, optimizer=optimizer), 1)
