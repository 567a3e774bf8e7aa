"""What is printed of a report (`evaluation_tables.py`)."""

from typing import Any

import pytest

from launch.evaluation_tables import headline, report_lines
from launch.question import EvaluateFlags

FLAGS = EvaluateFlags("run", "data/val")
RIGHT = {"top1": 0.5, "low": 0.4, "high": 0.6, "top5": 0.9}
FEW = {"shots": 5, "top1_of_seeds": [0.4, 0.6], "short_classes": 0} | RIGHT
LINEAR = {"solver": "lbfgs", "chosen": 0.1, "grid": [[1.0, 0.5], [0.1, 0.7], [0.01, 0.6]], "held_out": 13, "at_edge": False} | RIGHT


def probed(protocol: str, *results: dict[str, Any], **rest: Any) -> dict[str, Any]:
    of = {"checkpoint": "run", "data": "data/val", "eval_protocol": "timm", "protocol": protocol, "results": list(results)}
    counts = {"width": 16, "num_classes": 5, "train_samples": 1310, "test_samples": 37, "skipped": 0, "removed": 0}
    return of | counts | rest


@pytest.mark.parametrize(
    ("protocol", "result", "line"),
    [
        ("fewshot", FEW, "  5 shots: top-1 50.00% [40.00%, 60.00%], by seed 40.00%, 60.00%"),
        ("fewshot", FEW | {"shots": 1, "top1_of_seeds": [0.5]}, "   1 shot: top-1 50.00% [40.00%, 60.00%]"),
        ("knn", {"k": 20} | RIGHT, " 20 neighbours: top-1 50.00% [40.00%, 60.00%], top-5 90.00%"),
        ("linear", LINEAR, "linear head by lbfgs: top-1 50.00% [40.00%, 60.00%], top-5 90.00%"),
    ],
)
def test_a_result_is_a_line(protocol: str, result: dict[str, Any], line: str) -> None:
    report = probed(protocol, result)
    assert headline(report)[0] == line
    by, of, *results = report_lines(report, FLAGS)
    assert by == f"run by {protocol} on data/val, the timm protocol:"
    assert of.startswith("16 features of 1,310 training and 37 test samples of 5 classes; in brackets 95% intervals, ")
    assert results == headline(report)


def test_lines_say_what_to_beware_of() -> None:
    short = FEW | {"shots": 40, "short_classes": 5}
    _, of, few = report_lines(probed("fewshot", short, skipped=2, removed=1), FLAGS)
    assert "5 classes, 2 more could not be read, overlays remove 1; in brackets" in of
    assert few.endswith("(all there are of 5 classes with fewer samples)")
    assert headline(probed("linear", LINEAR))[1] == "L2 penalty 0.1, the best of 3 on 13 training samples held out (70.00%)"
    assert headline(probed("linear", LINEAR | {"at_edge": True}))[1].endswith("; it ends the grid: one beyond may be better")
