"""What tests of runs share: a start without its ranks, and runs of several layouts to compare."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import with_engine
from vitscale import checkpoint
from vitscale.config import OptimizerConfig, TrainConfig, to_dict
from vitscale.resolve import resolve
from vitscale.run import locked, open_run, read_metrics
from vitscale.weights import TensorReader


def begin(config: TrainConfig, world_size: int = 1) -> TrainConfig:
    """What a start does before its ranks."""
    config = resolve(config, world_size)
    with locked(Path(config.out)):
        open_run(config, world_size)
    log(config, {"step": 1, "samples_seen": config.global_batch_size, "loss": 1.0})  # from the first step on a run is bound to its settings
    return config


def log(config: TrainConfig, *lines: dict) -> None:
    with (Path(config.out) / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def last_start(config: TrainConfig) -> dict:
    return json.loads((Path(config.out) / "run.json").read_text())["starts"][-1]


STOP = 7  # where interrupted runs stop; they go on for STEPS more
TOLERANCE = 1e-5


def variant(
    config: TrainConfig, folder: Path, name: str, *, optimizer: str = "adamw", accumulate: int = 1, world_size: int = 1, **engine: Any
):
    """A resolved config of its own run directory."""
    config = with_engine(config, **engine)
    if optimizer == "sgd":
        config = dataclasses.replace(config, optimizer=OptimizerConfig("sgd", peak_lr=0.05, grad_clip=0.3, average_decay=0.9))
    micro = config.global_batch_size // (world_size * accumulate)
    return resolve(dataclasses.replace(config, out=str(folder / name), micro_batch_size=micro), world_size)


def case(config: TrainConfig, *, stop_at: int | None = None, copy_of: str | None = None) -> dict[str, Any]:
    return {"config": to_dict(config), "stop_at": stop_at, "copy_of": copy_of}


def losses_of(result: dict[str, Any], first: int, last: int) -> np.ndarray:
    return np.array([result["losses"][str(step)] for step in range(first + 1, last + 1)])


def losses(run: Path) -> dict[int, float]:
    """Of each step, which stands in metrics.jsonl once."""
    lines = [line for line in read_metrics(run) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step stands in metrics.jsonl twice"
    return found


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of the newest durable checkpoint, by kind and name."""
    folder, faults = checkpoint.newest_durable(run)
    assert folder
    assert not faults
    description = checkpoint.describe(folder)
    reader = TensorReader(description)
    return {(tensor.kind, tensor.name): reader.whole(tensor.name, tensor.kind) for tensor in description.tensors}


def check_alike(run: Path, whole: Path) -> None:
    """Losses of all steps and the last weights, with the optimizer's state, to the bit."""
    assert losses(run) == losses(whole)
    ours, theirs = state(run), state(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
