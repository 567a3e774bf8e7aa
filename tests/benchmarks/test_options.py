"""The benchmark of the step's settings runs on a CPU and reports what it says; nothing here judges a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vitscale.flops import train_flops
from vitscale.recipes import vit

ROOT = Path(__file__).parents[2]


def test_every_row_is_whole(tmp_path: Path) -> None:
    tiny = ["--model", "ti16", "--depth", "2", "--image-size", "32", "32", "--batch", "8", "--seconds", "0", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.options", *tiny, "--save", "--results", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert file.name == f"{result['date'][:10]}-options-cpu-ti16.json"
    assert str(ROOT) not in json.dumps(result), "results are published"
    rows = {(row["setting"], row["against"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 16
    printed = done.stdout.splitlines()
    for (setting, against), row in rows.items():
        assert any(line.startswith(setting) and against in line and f"{row['ratio']:.3f}" in line for line in printed), setting
        assert row["ratio"] > 0
        if "ms" in row:
            assert min(row["ms"]) > 0
            assert row["low"] <= row["ratio"] <= row["high"]
    apart = [float(row["losses"].rpartition(" ")[2]) for row in rows.values() if row.get("losses", "").startswith("the same to")]
    assert len(apart) == 7
    assert max(apart) < 1e-4, "these settings change nothing but rounding"
    small, middle, whole = (train_flops(vit("h14", num_classes=1000, image_size=(size, size))) for size in (126, 154, 224))
    (phases,) = (row["ratio"] for (setting, _), row in rows.items() if setting.startswith("phases"))
    assert abs(phases - (0.5 * small + 0.3 * middle + 0.2 * whole) / whole) < 1e-3
