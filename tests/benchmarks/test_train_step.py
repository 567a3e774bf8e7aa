"""The benchmark of the training step runs unattended on a CPU and reports what it says; nothing here judges a time."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitscale.config import ViTConfig
from vitscale.flops import train_flops

ROOT = Path(__file__).parents[2]
MODEL = ViTConfig(depth=2, width=32, mlp_dim=48, num_heads=2, patch_size=16, image_size=(32, 48), num_classes=5)
TINY = [
    "--depth", "2", "--width", "32", "--mlp-dim", "48", "--num-heads", "2", "--image-size", "32", "48", "--num-classes", "5",
    "--batch", "4", "--warmup", "1", "--steps", "3", "--repeats", "2",
]  # fmt: skip


def bench(results: Path, *flags: str) -> dict[str, Any]:
    """Runs it as a user does and reads what it saved."""
    command = [sys.executable, "benchmarks/train_step.py", *TINY, "--save", "--results", str(results), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = results.glob("*.json")
    result: dict[str, Any] = json.loads(file.read_text())
    assert file.name == f"{result['date'][:10]}-train-step-cpu-ti16.json"
    assert all(name in done.stdout for name in result["contestants"])
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp32")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    flags = ("--contestants", "vitscale", "torch", "transformers", "--engine.zero-stage", "1", "--lines", str(folder / "lines"))
    return bench(folder, *flags)


@pytest.fixture
def lines(result: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]


def test_every_contestant_ran(result: dict[str, Any]) -> None:
    assert result["contestants"].keys() == {"vitscale", "torch", "transformers"}
    for contestant in result["contestants"].values():
        assert "error" not in contestant
        rates = contestant["images_per_second_of_each_repeat"]
        assert len(rates) == 2
        assert min(rates) > 0
        assert contestant["images_per_second"] == pytest.approx(sum(rates) / 2)
        assert contestant["spread"] == pytest.approx((max(rates) - min(rates)) / contestant["images_per_second"])
        assert contestant["attention"] == ["scaled_dot_product_flash_attention_for_cpu"]
        unknown = ("mfu_of_datasheet", "mfu_of_measured", "peak_bytes")
        assert [contestant[key] for key in unknown] == [None] * 3, "a CPU's peak is not known, and contestants share its memory"


def test_flops_and_sizes_are_the_models(result: dict[str, Any]) -> None:
    assert result["train_flops_per_image"] == train_flops(MODEL)
    assert result["parameters"] == 3 * 256 * 32 + 32 + 8 * 32 + 2 * (4 * 32 + 4 * 32 * 33 + 2 * 32 * 48 + 48 + 32) + 2 * 32 + 5 * 33
    for contestant in result["contestants"].values():
        assert contestant["tflops_per_second"] * 1e12 == pytest.approx(contestant["images_per_second"] * train_flops(MODEL))


def test_ratios_are_those_of_steps_made_in_turn(result: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    times = {name: [ms for line in lines if line["contestant"] == name for ms in line["step_ms"]] for name in result["contestants"]}
    assert {len(of) for of in times.values()} == {6}
    for peer in ("torch", "transformers"):
        of_rounds = sorted(theirs / ours for theirs, ours in zip(times[peer], times["vitscale"], strict=True))
        found = result["ratios"][peer]
        assert found["ratio"] == pytest.approx(statistics.median(of_rounds))
        assert (found["low"], found["high"]) == pytest.approx((of_rounds[1], of_rounds[-2]))


def test_the_report_says_what_was_run_and_where(result: dict[str, Any]) -> None:
    settings = result["settings"]
    assert (settings["model"], settings["batch"], settings["steps"], settings["repeats"]) == ("ti16", 4, 3, 2)
    assert (settings["engine"]["precision"], settings["engine"]["zero_stage"]) == ("fp32", 1)
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["versions"].keys() >= {"torch", "deepspeed"}
    assert str(ROOT) not in json.dumps(result), "results are published"


def test_bf16_with_activation_checkpointing(tmp_path: Path) -> None:
    flags = (
        "--engine.precision",
        "bf16",
        "--engine.checkpoint-every-n-blocks",
        "2",
        "--contestants",
        "vitscale",
        "torch",
        "--repeats",
        "1",
    )
    found = bench(tmp_path, *flags)["contestants"]
    assert found.keys() == {"vitscale", "torch"}
    assert all("error" not in contestant for contestant in found.values())
