"""What is printed of a report (`evaluation_tables.py`): of the fields that `ProbeReport` has."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from launch.evaluation_tables import report_lines, summary
from launch.question import EvaluateFlags
from vitscale.probes import FewShot, Linear, Neighbours
from vitscale.probing import ProbeReport

FLAGS = EvaluateFlags("run", "data/val")
FEW = FewShot(5, 0.5, 0.4, 0.6, (0.4, 0.6), 0)
LINEAR = Linear("lbfgs", 0.1, ((1.0, 0.5), (0.1, 0.7), (0.01, 0.6)), 13, 0.5, 0.4, 0.6, 0.9, at_edge=False)


def probed(protocol: Any, result: Any, **rest: Any) -> dict[str, Any]:
    about = {"checkpoint": "run", "data": "data/val", "eval_protocol": "timm"}
    return about | asdict(replace(ProbeReport(protocol, 16, 5, 1310, 37, 0, 0, (result,)), **rest))


@pytest.mark.parametrize(
    ("protocol", "result", "line"),
    [
        ("fewshot", FEW, "  5 shots: top-1 50.00% [40.00%, 60.00%], by seed 40.00%, 60.00%"),
        ("fewshot", replace(FEW, shots=1, top1_of_seeds=(0.5,)), "   1 shot: top-1 50.00% [40.00%, 60.00%]"),
        ("knn", Neighbours(20, 0.5, 0.4, 0.6, 0.9), " 20 neighbours: top-1 50.00% [40.00%, 60.00%], top-5 90.00%"),
        ("linear", LINEAR, "linear head by lbfgs: top-1 50.00% [40.00%, 60.00%], top-5 90.00%"),
    ],
)
def test_a_result_is_a_line(protocol: str, result: Any, line: str) -> None:
    report = probed(protocol, result)
    by, of, *results = report_lines(report, FLAGS)
    assert results[0] == line
    assert by == f"run by {protocol} on data/val, the timm protocol:"
    assert of.startswith("16 features of 1,310 training and 37 test samples of 5 classes; in brackets 95% intervals, ")
    assert of.endswith(
        "Student's t of other draws of shots, on these test samples:" if result == FEW else "Wilson's of other test samples:"
    )


def test_a_summary_is_one_line_of_what_there_is() -> None:
    head = {"protocol": "head", "top1": 0.5, "top5": 0.9, "loss": 1.25, "real_top1": None, "mean_average_precision": 0.25}
    assert summary(head) == "top-1 50.00%, top-5 90.00%, loss 1.2500, mean average precision 25.00%"
    assert summary({"top1": "?", "loss": 2}) == "loss 2.0000", "as another version may write it"
    assert summary({}) == "no figure"
    shots = probed("fewshot", FEW)
    shots["results"] = [*shots["results"], {"shots": 10, "top1": 0.75}]
    assert summary(shots) == "5 shots: top-1 50.00%; 10 shots: top-1 75.00%"
    assert summary(probed("knn", Neighbours(20, 0.5, 0.4, 0.6, 0.9))) == "20 neighbours: top-1 50.00%, top-5 90.00%"
    assert summary(probed("linear", LINEAR)) == "linear head by lbfgs: top-1 50.00%, top-5 90.00%"
    for odd in (None, [], [5], "no"):
        assert summary({"protocol": "knn", "results": odd}) == "no figure"
    assert summary({"protocol": "fewshot", "results": [{"top1": 0.5}]}) == "no figure", "of which it is not known"


def test_lines_say_what_to_beware_of() -> None:
    _, of, few = report_lines(probed("fewshot", replace(FEW, shots=40, short_classes=5), skipped=2, removed=1), FLAGS)
    assert "5 classes, 2 more could not be read, overlays remove 1; in brackets" in of
    assert few.endswith("(all there are of 5 classes with fewer samples)")
    report = probed("fewshot", FEW)
    report["results"] = [*report["results"], asdict(replace(FEW, shots=10, top1_of_seeds=(0.5,)))]
    _, of, _, _ = report_lines(report, FLAGS)
    assert of.endswith("other draws of shots, on these test samples; where all samples are drawn, Wilson's of other test samples:")
    assert report_lines(probed("linear", LINEAR), FLAGS)[3] == "L2 penalty 0.1, the best of 3 on 13 training samples held out (70.00%)"
    assert report_lines(probed("linear", replace(LINEAR, at_edge=True)), FLAGS)[3].endswith("; it ends the grid: one beyond may be better")
