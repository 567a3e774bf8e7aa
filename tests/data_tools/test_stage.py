"""The staged index: the same dataset, copied once whoever starts, never a half or a wrong copy."""

from __future__ import annotations

import fcntl
import multiprocessing
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset import Dataset
from data_tools.stage import StageError

from .conftest import contents


def opened_at(path: Path, stage: Path) -> tuple[str, bytes]:
    dataset = Dataset.open(path, stage=stage)
    return dataset.content_hash, dataset.labels(np.arange(dataset.num_samples))[0].tobytes()


def test_a_staged_dataset_is_the_same(packed: Dataset, tmp_path: Path) -> None:
    staged = Dataset.open(packed.path, stage=tmp_path / "deep" / "stage")
    assert contents(staged) == contents(packed)
    (copy,) = (tmp_path / "deep" / "stage").glob("*.arrow")
    assert copy.read_bytes() == (packed.path / "index.arrow").read_bytes()
    size = (packed.path / "index.arrow").stat().st_size
    (packed.path / "index.arrow").write_bytes(bytes(size))  # nobody looks there any more
    assert contents(Dataset.open(packed.path, stage=tmp_path / "deep" / "stage")) == contents(staged)
    assert contents(pickle.loads(pickle.dumps(staged))) == contents(staged)


def test_processes_that_start_at_once_make_one_copy(packed: Dataset, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(opened_at, [(packed.path, tmp_path / "stage")] * 8)
    assert set(found) == {opened_at(packed.path, tmp_path / "stage")}
    assert sorted(file.suffix for file in (tmp_path / "stage").iterdir()) == [".arrow", ".lock"]


def test_who_comes_while_another_copies_waits_and_takes_its_copy(packed: Dataset, tmp_path: Path) -> None:
    """The other one is this test, which holds the lock; that nobody goes past it can only be seen for a time."""
    stage = tmp_path / "stage"
    expected = opened_at(packed.path, stage)
    (copy,) = stage.glob("*.arrow")
    copy.rename(tmp_path / "whole")
    with ThreadPoolExecutor(1) as pool:
        with copy.with_name(f"{copy.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # beside which there is room for who only shares, but not for who copies
            waiting = pool.submit(opened_at, packed.path, stage)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            (packed.path / "index.arrow").unlink()
            (tmp_path / "whole").rename(copy)
        assert waiting.result() == expected


def test_what_a_killed_start_left_is_no_copy(packed: Dataset, tmp_path: Path) -> None:
    Dataset.open(packed.path, stage=tmp_path / "stage")
    (copy,) = (tmp_path / "stage").glob("*.arrow")
    whole = copy.read_bytes()
    copy.unlink()
    (tmp_path / "stage" / f".{copy.name}.0011aabb.partial").write_bytes(whole[:100])
    Dataset.open(packed.path, stage=tmp_path / "stage")
    assert copy.read_bytes() == whole
    assert not list((tmp_path / "stage").glob(".*"))
    copy.write_bytes(whole[:-1])
    Dataset.open(packed.path, stage=tmp_path / "stage")
    assert copy.read_bytes() == whole


def test_a_copy_that_cannot_be_made_is_one_line(packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot be copied to"):
        Dataset.open(packed.path, stage=tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(17))
    with pytest.raises(StageError, match="has 17 bytes free"):
        Dataset.open(packed.path, stage=tmp_path / "full")
    monkeypatch.undo()
    index = packed.path / "index.arrow"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(StageError, match="was changed: its SHA-256"):
        Dataset.open(packed.path, stage=tmp_path / "stage")
    assert not list((tmp_path / "stage").glob("*.arrow"))
    assert not list((tmp_path / "stage").glob(".*"))
