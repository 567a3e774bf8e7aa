"""`datasets`' own WebDataset builder reads what `pack` writes, sample by sample; webdataset's reader does in test_format.py, the others in
test_peer_readers.py."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.pack import pack

from .conftest import make_image


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The library, which must not look for anything outside."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setitem(os.environ, name, value)
    return importlib.import_module("datasets")  # which reads the environment when it is imported


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_datasets_reads_every_sample(offline: Any, tmp_path: Path, streaming: bool) -> None:
    """Keys, image bytes, labels and scores, in order, over several tars."""
    labels = [[i % 4, 4 + i % 3] if i % 5 else [i % 4] for i in range(30)]
    scores = [[0.5 + i / 100] * len(row) for i, row in enumerate(labels)]
    table = {"image": [make_image(i) for i in range(30)], "label": labels, "scores": scores, "key": [f"k{i:02d}" for i in range(30)]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (result,) = pack(PackConfig((str(tmp_path / "t.parquet"),), str(tmp_path / "out"), samples_per_shard=8, write_cls=True))
    ours = Dataset.open(result.path)
    tars = [str(result.path / name) for name in ours.shard_names]
    cache = str(tmp_path / "cache")
    read = offline.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=streaming, cache_dir=cache)
    read = read.cast_column("jpg", offline.Image(decode=False))
    rows = list(read)
    assert [row["__key__"] for row in rows] == [ours.key(number) for number in range(30)]
    assert [row["jpg"]["bytes"] for row in rows] == [ours.read(number) for number in range(30)]
    their_labels, their_scores = ours.labels(np.arange(30))
    for number, row in enumerate(rows):
        there = their_labels[number] >= 0
        assert row["json"]["labels"] == their_labels[number][there].tolist()
        assert np.float32(row["json"]["scores"]).tolist() == their_scores[number][there].tolist()
        assert int(row["cls"]) == their_labels[number, 0]
