"""What the loop does at odd moments, on one rank: an infinite loss, and a stop between two checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_on_ranks
from tests.runs import losses
from vitscale import checkpoint, stopping
from vitscale import train as loop
from vitscale.config import GuardConfig, TrainConfig, from_dict, to_dict
from vitscale.ending import Cause, Ended
from vitscale.resolve import resolve
from vitscale.run import open_run

STEPS = 12


def begun(payload: dict[str, Any], name: str) -> TrainConfig:
    config: TrainConfig = from_dict(TrainConfig, payload["config"])
    config = dataclasses.replace(config, out=str(Path(payload["folder"]) / name))
    Path(config.out).mkdir()
    open_run(config, 1)
    return config


def infinite_losses(payload: dict[str, Any]) -> list[float]:
    """Of a run whose loss is too large for fp32 in its third step, and the gradient is not."""
    config, compute_loss, calls = begun(payload, "infinite"), loop.compute_loss, iter(range(1, 1000))
    micro_batches = config.global_batch_size // config.micro_batch_size
    loop.compute_loss = lambda *args: compute_loss(*args) + (torch.inf if next(calls) == 3 * micro_batches else 0.0)
    try:
        loop.train(config)
    finally:
        loop.compute_loss = compute_loss
    newest, _ = checkpoint.newest_durable(Path(config.out))
    assert newest is not None
    assert checkpoint.describe(newest).state.updates == STEPS
    return list(losses(Path(config.out)).values())


def corrupt_at_a_stop(payload: dict[str, Any]) -> list[Any]:
    """How a run ends whose ranks differ in the step after which it stops, which is one without a checkpoint of its own."""
    config, compare_ranks = begun(payload, "corrupt"), loop.compare_ranks
    loop.compare_ranks = lambda engine, step: Ended(Cause.CORRUPT, "rank 1 holds other weights") if step == 5 else None
    heard = stopping.why
    stopping.why = lambda sums: "TERM" if (Path(config.out) / "metrics.jsonl").exists() and 3 in losses(Path(config.out)) else heard(sums)
    try:
        loop.train(config)
    except Ended as ended:
        return [ended.cause, [checkpoint.step_of(folder) for folder in checkpoint.committed(Path(config.out))]]
    finally:
        loop.compare_ranks, stopping.why = compare_ranks, heard
    return ["", []]


def both(payload: dict[str, Any]) -> list[Any]:
    return [infinite_losses(payload), corrupt_at_a_stop(payload)]


def test_the_loop_at_odd_moments(config: TrainConfig, tmp_path: Path) -> None:
    config = resolve(dataclasses.replace(config, steps=STEPS, checkpoint_every=3, guard=GuardConfig(compare_every=0)), 1)
    infinite, corrupt = run_on_ranks("tests.vitscale.test_train:both", 1, {"config": to_dict(config), "folder": str(tmp_path)}, tmp_path)
    assert len(infinite) == STEPS
    assert infinite[2] > 1e38
    assert max(infinite[:2] + infinite[3:]) < 10, "and it goes on"
    assert corrupt == [Cause.CORRUPT, [3]], "what differs is not saved at a stop either"
