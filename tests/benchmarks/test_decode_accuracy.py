"""The comparison of exact with fast decoding runs and adds up; nothing here judges an accuracy."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.quickstart import FASHION_MNIST

from .test_loader import ROOT, bench

sys.path.insert(0, str(ROOT / "benchmarks"))
import decode_accuracy
import photographs


def test_the_sides_of_a_photograph_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shade = np.zeros((900, 1200, 3), np.uint8)
    shade[:, 800:] = 255  # the right third
    monkeypatch.setattr(photographs, "sources", lambda *_: [Image.fromarray(shade)])
    decode_accuracy.write_photographs(tmp_path, 20, 10)
    means = {split: [np.asarray(Image.open(file)).mean() for file in (tmp_path / split).rglob("*.jpg")] for split in ("train", "val")}
    assert [len(of) for of in means.values()] == [20, 10]
    assert max(means["train"]) < 1
    assert min(means["val"]) > 254


def test_summary_pairs_seeds() -> None:
    found = {(mode, seed): {f"evaluated {pixels}": 0.5 + 0.1 * seed + 0.02 * (mode == "fast") for pixels in ("exact", "fast")}
             for mode in ("exact", "fast") for seed in range(3)}  # fmt: skip
    row = decode_accuracy.summary(found, 3)["evaluated exact"]
    assert row["trained exact"]["mean"] == pytest.approx(0.6)
    assert row["trained exact"]["std"] == pytest.approx(0.1)
    assert row["change"]["mean"] == pytest.approx(0.02)
    assert row["change"]["standard_error"] == pytest.approx(0, abs=1e-12)


@pytest.mark.skipif(
    not FASHION_MNIST.is_dir() and os.environ.get("VITSCALE_REQUIRE_FASHION_MNIST") != "1",  # with which it runs, and fails
    reason="install Debian's package dataset-fashion-mnist",
)
def test_it_runs(tmp_path: Path) -> None:
    result, printed = bench(tmp_path, "decode_accuracy.py", "--tasks", "fashion")
    for pixels in ("exact", "fast"):
        row = result["tasks"]["fashion"][f"evaluated {pixels}"]
        assert all(0 <= top1 <= 1 for mode in ("exact", "fast") for top1 in row[f"trained {mode}"]["top1"])
        assert f"evaluated {pixels}" in printed
