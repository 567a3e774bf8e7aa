"""Where an export's weights come from: what a run's directory says of a checkpoint; of an export or an import, what that said.

Names, no paths: a folder is given away, and where the data lay is nobody's business there.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from vitscale.checkpoint import AVERAGE, WEIGHT, Description, step_of
from vitscale.config import TrainConfig
from vitscale.run import read_config, read_metrics, read_record, trained_datasets

REPORTED = ("eval_top1", "eval_top5", "eval_loss", "eval_samples")  # of a line of metrics.jsonl


def origin_of(description: Description, kind: str, *, results: bool = True) -> dict[str, Any]:
    """What is known of a checkpoint's making, as JSON holds it.

    With `results` also what its run measured of it; raises RunError where metrics.jsonl, which tells, is damaged.
    """
    if description.exported:
        return description.origin
    origin: dict[str, Any] = {"step": description.step, "samples_seen": description.samples_seen, "weights": kind}
    run = description.path.parent.parent
    try:
        config, record = read_config(run), read_record(run)
    except (UserError, OSError):  # a step's folder that was copied out of its run
        return origin
    start: dict[str, Any] = next(reversed(record.get("starts", [])), {})
    origin |= {
        "recipe": config.recipe,
        "seed": config.seed,
        "datasets": [_named(of) for of in trained_datasets(record)],
        "commit": start.get("commit", ""),
        "versions": start.get("versions", {}),
        "training": _training(config),
    }
    if config.init:
        origin["initialised_from"] = _name_of(config.init.checkpoint)
        origin["initial"] = record.get("initial", {})  # which runs of before did not note
    metrics = read_metrics(run) if results else []
    lines = [line for line in metrics if line.get("step") == description.step and "eval_top1" in line]
    evaluated = AVERAGE if config.optimizer.average_decay else WEIGHT
    if lines and (kind, description.preprocess) == (evaluated, config.preprocess):  # else they are another model's
        origin["results"] = {name: lines[-1][name] for name in REPORTED if name in lines[-1]}
        origin["evaluated_on"] = _named(record["held_out"]) if record.get("held_out") else {}
    return origin


def _training(config: TrainConfig) -> dict[str, Any]:
    return {
        "objective": asdict(config.objective),
        "optimizer": asdict(config.optimizer),
        "schedule": asdict(config.schedule),
        "mix": asdict(config.mix),
        "global_batch_size": config.global_batch_size,
        "epochs": config.epochs,
        "steps": config.steps,
        "precision": config.engine.precision,
    }


def _named(of: dict[str, Any]) -> dict[str, Any]:
    """A dataset as run.json identifies it, called by the last two names of its path: `train` alone says little."""
    named: dict[str, Any] = {name: of[name] for name in ("name", "hash", "names_hash", "samples") if name in of}
    return named | ({"name": "/".join(Path(of["path"]).parts[-2:])} if "path" in of else {})


def _name_of(checkpoint: str) -> str:
    """What a CHECKPOINT is called, without where it lies."""
    path = Path(checkpoint)
    return f"{path.parent.parent.name}@{step_of(path)}" if path.parent.name == "checkpoints" else path.name
