"""Exports of what ranks wrote under ZeRO-3: their memory is that of a few tensors, their bits are those of DeepSpeed's conversion."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.export import MODELS, REFERENCE, ExportConfig, compare, convert, is_equal, write
from tests.distributed import run_on_ranks

DEPTHS = (4, 24)
FEW_TENSORS = 6.0  # MB, ten times the largest tensor; the blocks between the two depths are 36


def write_both(payload: dict[str, Any]) -> None:
    for depth in DEPTHS:
        folder = Path(payload["folder"]) / str(depth)
        folder.mkdir(exist_ok=True)  # by the first rank that comes
        model = asdict(replace(MODELS["ti16"], depth=depth))
        write({"model": model, "zero_stage": 3, "precision": "bf16", "folder": str(folder)})


def test_memory_does_not_grow_with_depth_and_bits_are_deepspeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_ranks("tests.vitscale.test_export_large:write_both", 2, {"folder": str(tmp_path)}, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grown = {}
    for depth in DEPTHS:
        found = convert("hf", tmp_path / str(depth), tmp_path / str(depth) / "out")
        grown[depth] = found["weights_anonymous_mb"] - found["start_anonymous_mb"]
    assert grown[24] - grown[4] < FEW_TENSORS, grown
    convert(REFERENCE, tmp_path / "24", tmp_path / "24" / "reference")
    assert is_equal(tmp_path / "24" / "out", tmp_path / "24")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_vit_h_of_eight_ranks_is_exported_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    """It wants 22 GB of memory, and 13 GB of disk."""
    result = compare(ExportConfig(only=("timm", "hf", "safetensors", "npz"), repeats=1, folder=tmp_path / "h14"))
    assert result["parameters"] > 630e6
    for name, row in result["medians"].items():
        print(name, row)
        assert row["weights_mb"] < 1000, name
        assert row["equal"], name
