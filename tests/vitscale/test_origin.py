"""Where a checkpoint comes from, as an export says it (`origin.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vitscale.exports import SMALL, evaluated, exported
from tests.vitscale.models import random_vit
from vitscale.checkpoint import describe
from vitscale.errors import CheckpointError
from vitscale.origin import origin_of


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
    step = evaluated(tmp_path / "run")
    assert origin_of(describe(step), "average")["results"]["eval_top1"] == 0.81
    assert "results" not in origin_of(describe(step), "weight")
    assert "results" not in origin_of(describe(step).evaluated_by("paper", 1.0), "average")
