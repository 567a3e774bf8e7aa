"""Where a checkpoint comes from, as an export says it (`origin.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vitscale.exports import SMALL, exported
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale.checkpoint import describe
from vitscale.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "value"),
    [("results", 5), ("results", {"eval_top1": "high"}), ("datasets", [1]), ("left_out", 5), ("versions", [1]), ("samples_seen", -1)],
)
def test_an_origin_that_is_none_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    values = json.loads((out / "vitscale.json").read_text())
    values["origin"][name] = value
    (out / "vitscale.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"origin.{name} is "):
        describe(out)


def test_results_are_told_of_the_weights_and_views_that_had_them(tmp_path: Path) -> None:
    """A run evaluates its average where it keeps one, by its own preprocessing; other weights have other results."""
    from vitscale.config import OptimizerConfig, TrainConfig, to_dict
    from vitscale.origin import origin_of

    run = tmp_path / "run"
    step = write_checkpoint(run / "checkpoints/step-00000002", random_vit(SMALL), average=random_vit(SMALL, seed=1)).path
    config = TrainConfig(out=str(run), recipe="r", model=SMALL, optimizer=OptimizerConfig(average_decay=0.9))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    dataset = {"path": "d", "name": "d", "hash": "h", "samples": 9}
    (run / "run.json").write_text(
        json.dumps({"format_version": 1, "dataset": dataset, "held_out": dataset, "total_steps": 2, "starts": []})
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 2, "eval_top1": 0.81, "eval_top5": 0.9, "eval_loss": 1.0, "eval_samples": 9}) + "\n"
    )
    assert origin_of(describe(step), "average")["results"]["eval_top1"] == 0.81
    assert "results" not in origin_of(describe(step), "weight")
    assert "results" not in origin_of(describe(step).evaluated_by("paper", 1.0), "average")
