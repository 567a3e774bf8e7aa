"""Whole runs agree: between plain torch and every ZeRO stage, world size and split of a batch; and between a run and its continuation.

A process group a world size walks all cases through `train.train`; each case is a run directory of its own, and losses are read from its
metrics.jsonl. A spy on the engine sums a hash of every image that goes into a step, so that equal sums mean equal sets of images.
"""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash

from tests.distributed import run_on_ranks
from tests.runs import STOP, TOLERANCE, case, losses_of, variant
from tests.vitscale.plain import plain_torch
from vitscale import checkpoint
from vitscale.config import OptimizerConfig, TrainConfig, from_dict
from vitscale.engine import Engine
from vitscale.finding import find_checkpoint
from vitscale.flops import checkpoint_bytes
from vitscale.run import open_run, read_metrics
from vitscale.train import train

STEPS = 20
STAGES = (0, 1, 2, 3)


# ---------------------------------------------------------------------------------------------------------------------------------------
# On the ranks
# ---------------------------------------------------------------------------------------------------------------------------------------


def walk(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs each case: {name: {"config", "stop_at", "copy_of"}} to {name: {"losses", "images"}}, by step."""
    results = {}
    for name, asked in payload["cases"].items():
        config: TrainConfig = from_dict(TrainConfig, asked["config"])
        if dist.get_rank() == 0:
            if asked["copy_of"]:
                shutil.copytree(asked["copy_of"], config.out)
            Path(config.out).mkdir(exist_ok=True)
            open_run(config, dist.get_world_size())
        dist.barrier()
        with _spy_on_images() as images:
            train(config, stop_at=asked["stop_at"])
        sums = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size())]
        counts = torch.tensor([_fold(images), len(images)])
        dist.all_gather(sums, counts)
        losses = {line["step"]: line["loss"] for line in read_metrics(Path(config.out)) if "loss" in line}
        results[name] = {"losses": losses, "images": [sum(int(s[0]) for s in sums) % 2**63, sum(int(s[1]) for s in sums)]}
    return results


class _spy_on_images:  # noqa: N801 - used as a function
    """Collects a hash of every image that the engine's forward is given in training."""

    def __enter__(self) -> list[int]:
        seen: list[int] = []
        self.forward = Engine.forward

        def forward(engine: Engine, images_BCHW: torch.Tensor, sample_keys_B: torch.Tensor | None = None) -> torch.Tensor:
            seen.extend(xxhash.xxh3_64_intdigest(np.ascontiguousarray(image.numpy())) for image in images_BCHW)
            return self.forward(engine, images_BCHW, sample_keys_B)

        Engine.forward = forward  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: object) -> None:
        Engine.forward = self.forward  # type: ignore[method-assign]


def _fold(hashes: list[int]) -> int:
    return sum(hashes) % 2**62  # a sum, so that it does not depend on who saw an image


# ---------------------------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_stage_is_plain_torch(config: TrainConfig, tmp_path: Path, world_size: int) -> None:
    """At other world sizes than test_options.py, over more steps, and on the same images."""
    configs = {
        f"stage {stage}, {accumulate} micro-batches": variant(
            config, tmp_path, f"{stage}{accumulate}", accumulate=accumulate, world_size=world_size, zero_stage=stage,
        )
        for stage, accumulate in itertools.product(STAGES, (1, 2))
    }  # fmt: skip
    payload = {"cases": {name: case(of, stop_at=STEPS) for name, of in configs.items()}}
    results = run_on_ranks("tests.vitscale.test_zero:walk", world_size, payload, tmp_path)
    expected = plain_torch(configs["stage 0, 1 micro-batches"], STEPS)
    assert min(expected.losses[-3:]) < 0.95 * expected.losses[0], "the runs must learn, or equal losses would say little"
    assert max(expected.norms) > 1.5 * config.optimizer.grad_clip > 0, "clipping must bind, or it would not be tested"
    for name, result in results.items():
        np.testing.assert_allclose(losses_of(result, 0, STEPS), expected.losses, rtol=TOLERANCE, err_msg=name)
    assert len({tuple(r["images"]) for r in results.values()}) == 1, "every case must have seen the same images"


@pytest.mark.parametrize("optimizer", [
    pytest.param("adamw", marks=pytest.mark.timeout(1800)), pytest.param("sgd", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
])  # fmt: skip
def test_a_run_goes_on_at_any_stage_and_world_size(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    """Stopped at stage a and world size b, resumed at stage c and world size d: all pairs over {0,1,2,3} x {1,2}, and world size 3 once."""
    last = STOP + STEPS
    layouts = [*itertools.product(STAGES, (1, 2)), (2, 3)]

    def of(layout: tuple[int, int], name: str) -> TrainConfig:
        return variant(config, tmp_path, name, optimizer=optimizer, world_size=layout[1], zero_stage=layout[0])

    whole: dict[tuple[int, int], Any] = {}
    for world_size in (1, 2, 3):
        here = [layout for layout in layouts if layout[1] == world_size]
        cases = {f"whole{a}{b}": case(of((a, b), f"{optimizer}-whole{a}{b}")) for a, b in here}
        cases |= {f"part{a}{b}": case(of((a, b), f"{optimizer}-part{a}{b}"), stop_at=STOP) for a, b in here}
        results = run_on_ranks("tests.vitscale.test_zero:walk", world_size, {"cases": cases}, tmp_path)
        whole |= {(a, b): results[f"whole{a}{b}"] for a, b in here}
    for world_size in (1, 2, 3):
        cases = {}
        for (a, b), (c, d) in itertools.product(layouts, layouts):
            if d != world_size or (3 in (b, d) and (a, b) == (c, d)):
                continue
            name = f"{a}{b}-{c}{d}"
            cases[name] = case(of((c, d), f"{optimizer}-{name}"), copy_of=str(tmp_path / f"{optimizer}-part{a}{b}"))
        results = run_on_ranks("tests.vitscale.test_zero:walk", world_size, {"cases": cases}, tmp_path)
        for name, result in results.items():
            (a, b), (c, d) = ((int(digit) for digit in layout) for layout in name.split("-"))
            losses, expected = losses_of(result, STOP, last), losses_of(whole[a, b], STOP, last)
            np.testing.assert_allclose(losses, expected, rtol=TOLERANCE, err_msg=f"{optimizer} {name}")
            if (a, b) == (c, d):
                assert losses.tolist() == expected.tolist(), f"{optimizer} {name} must be bitwise the uninterrupted run"
            assert result["losses"].keys() == whole[a, b]["losses"].keys()
        assert len({tuple(r["images"]) for r in results.values()}) == 1, "every continuation must have seen the same images"


def test_a_run_with_muon_goes_on_and_keeps_the_moments_of_each_kind(config: TrainConfig, tmp_path: Path) -> None:
    """Stopped at stage 1 on two ranks; gone on with there, bitwise, and at stage 3. Its checkpoint has the size that is foretold."""
    muon = OptimizerConfig("muon", peak_lr=3e-3, weight_decay=0.1, grad_clip=0.3, layer_decay=0.8, average_decay=0.9)
    config = dataclasses.replace(config, optimizer=muon)
    first, there, after = (
        variant(config, tmp_path, name, world_size=2, zero_stage=stage) for name, stage in (("a", 1), ("b", 1), ("c", 3))
    )
    whole = variant(config, tmp_path, "whole", world_size=2, zero_stage=1)
    cases = {"whole": case(whole, stop_at=STOP + 4), "a": case(first, stop_at=STOP)}
    cases |= {name: case(of, stop_at=STOP + 4, copy_of=first.out) for name, of in (("b", there), ("c", after))}
    results = run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": cases}, tmp_path)
    expected = losses_of(results["whole"], STOP, STOP + 4)
    assert losses_of(results["b"], STOP, STOP + 4).tolist() == expected.tolist()
    np.testing.assert_allclose(losses_of(results["c"], STOP, STOP + 4), expected, rtol=1e-4)
    tensors = checkpoint.describe(find_checkpoint(first.out)).tensors
    assert sum(4 * math.prod(tensor.shape) for tensor in tensors) == checkpoint_bytes(first.model, muon)
    kinds = {name: {t.kind for t in tensors if t.name == name} for name in ("blocks.0.mlp.fc1.weight", "head.weight")}
    assert kinds["blocks.0.mlp.fc1.weight"] == {"weight", "momentum_buffer", "average"}
    assert kinds["head.weight"] == {"weight", "exp_avg", "exp_avg_sq", "average"}
