"""Calibration runs here with few images, so that it is whole when a GPU is at hand; nothing here judges a rate."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vitscale.gpus import gpu
from vitscale.roofline import assumed, calibrated

ROOT = Path(__file__).parents[2]


def test_a_plan_takes_what_it_writes(tmp_path: Path) -> None:
    """Float8 emulated, and a step of the engine beside the plan's."""
    file = tmp_path / "rates.json"
    words = f"--model ti16 --batch 2 --repeats 1 --precision bf16 --float8 --compare --out {file}".split()
    done = subprocess.run([sys.executable, "-m", "benchmarks.calibrate", *words], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(file.read_text())
    assert {"products", "float8", "attention", "memory", "launch"} <= set(told["rates"])
    rates = calibrated(assumed(gpu("h200"), "bf16"), file, "bf16", gpu("h200"))
    assert (rates.products, rates.float8, rates.measured) == (told["rates"]["products"], told["rates"]["float8"], ()), "no H200's"
    assert told["compared"]["predicted_seconds"] > 0
