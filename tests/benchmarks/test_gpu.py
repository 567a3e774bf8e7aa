"""The script that measures a GPU runs here with tiny shapes, so that it is whole when a GPU is at hand; nothing here judges a time."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu import TARGETS, judged

ROOT = Path(__file__).parents[2]
ROWS = ("product", "attention cudnn", "attention math", "h14 as they come", "stall")
FAULTS = ("rehearsed failure", "rehearsed hang", "rehearsed recovery", "rehearsed death")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rehearsal of the rows that need neither a GPU nor a compiler."""
    folder = tmp_path_factory.mktemp("results")
    command = ["benchmarks/gpu.sh", "--rehearse", "--results", str(folder), "--only", *ROWS, *FAULTS]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def lines(results: Path) -> dict[str, dict[str, Any]]:
    (file,) = results.glob("*.jsonl")
    head, *found = map(json.loads, file.read_text().splitlines())
    assert head["rehearsal"]
    assert head["machine"]["device"] == "cpu"
    return {line["row"]: line for line in found}


def needs(*packages: str) -> set[str]:
    """The packages and what they need, as installed here says; those of an extra too, as in vitscale[train]."""
    found: set[tuple[str, frozenset[str]]] = set()
    open_ones = [Requirement(package) for package in packages]
    while open_ones:
        one = open_ones.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in found:
            continue
        found.add((name, extras))
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # what other systems need
            told = map(Requirement, importlib.metadata.requires(name) or [])
            open_ones += [of for of in told if of.marker is None or any(of.marker.evaluate({"extra": extra}) for extra in ("", *extras))]
    return {name for name, _ in found}


def test_an_image_gets_all_that_it_lacks() -> None:
    """The packages that performance.md wants of it are there; whatever else the script imports comes as a wheel."""
    of_image = needs("torch", "numpy", "pyarrow", "transformers") | {"timm", "torchvision"}
    brought = {line for line in (ROOT / "benchmarks" / "wheels.txt").read_text().splitlines() if not line.startswith("#")}
    lacked = needs("vitscale[train,float8]", "pytest", "pytest-timeout") - of_image - {"vitscale"}
    assert {"deepspeed", "psutil", "torchao"} <= lacked, "what is installed tells what it needs"
    assert lacked <= brought


def test_the_manual_has_these_targets() -> None:
    told = (ROOT / "docs" / "performance.md").read_text()
    for what, *bars, _ in TARGETS:
        assert f"| {' | '.join([what, *('' if bar is None else f'{bar:g}' for bar in bars)])} |" in told


def test_rows_are_measured_or_say_why_not(lines: dict[str, dict[str, Any]]) -> None:
    assert list(lines) == [*ROWS, *FAULTS], "one after the other, each once"
    assert {name for name, line in lines.items() if "error" in line} == {"attention cudnn", *FAULTS} - {"rehearsed recovery"}
    assert lines["product"]["tflops"] == pytest.approx(2 * 64**3 / lines["product"]["ms"] / 1e9)
    assert lines["h14 as they come"]["contestants"]["transformers"]["images_per_second"] > 0
    assert 0 < lines["stall"]["stall"] <= lines["stall"]["durable"]


def test_a_row_that_fails_hangs_or_takes_its_process_with_it_costs_only_itself(lines: dict[str, dict[str, Any]]) -> None:
    assert lines["rehearsed failure"]["error"] == "ValueError: as rehearsed"
    assert lines["rehearsed hang"]["error"] == "no end within 3 seconds"
    assert lines["rehearsed death"]["error"] == "its process ended with status 7"
    assert lines["rehearsed recovery"]["ms"] > 0


def test_the_table_holds_what_was_measured_against_the_targets(results: Path, lines: dict[str, dict[str, Any]]) -> None:
    (summary,) = results.glob("*.json")
    targets = {of["what"]: of for of in json.loads(summary.read_text())["targets"]}
    stall = targets["checkpoint stall H/14, s"]
    assert stall["measured"] == lines["stall"]["stall"]
    assert targets["H/14 at 224, bf16, images/s"]["verdict"] == "not measured"
    (table,) = results.glob("*.txt")
    assert all(name in table.read_text() for name in [*lines, *targets])


@pytest.mark.parametrize(
    ("value", "bars", "verdict"),
    [
        (429, (430, 500, 550), "below"), (430, (430, 500, 550), "floor"), (560, (430, 500, 550), "moonshot"),
        (101, (100, 70, 60), "below"), (65, (100, 70, 60), "target"), (1.5, (None, None, 1.4), "moonshot"),
    ],
)  # fmt: skip
def test_less_is_better_where_bars_fall(value: float, bars: tuple[float | None, ...], verdict: str) -> None:
    assert judged(value, bars) == verdict
