"""Where a checkpoint comes from, as an export says it (`origin.py`)."""

from pathlib import Path

from tests.vitscale.exports import evaluated
from vitscale.checkpoint import describe
from vitscale.origin import origin_of


def test_results_are_told_of_the_weights_and_views_that_had_them(tmp_path: Path) -> None:
    """A run evaluates its average where it keeps one, by its own preprocessing; other weights have other results."""
    step = evaluated(tmp_path / "run")
    assert origin_of(describe(step), "average")["results"]["eval_top1"] == 0.81
    assert "results" not in origin_of(describe(step), "weight")
    assert "results" not in origin_of(describe(step).evaluated_by("paper", 1.0), "average")
