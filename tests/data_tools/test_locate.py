"""Where samples lie: the index's own columns, whatever its batches and shards, and stretches of tars as they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dataset import Dataset, DatasetError

from .conftest import make_image, pack_one, write_files
from .synthetic import write_dataset


@settings(max_examples=60, deadline=None)
@given(
    shard_sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_located_is_what_arrow_reads(tmp_path_factory: pytest.TempPathFactory, shard_sizes: list[int], rows: int, seed: int) -> None:
    count, rng = sum(shard_sizes), np.random.default_rng(seed)
    sizes = rng.integers(-(2**31), 2**31, count)  # as a damaged index may have them
    folder = tmp_path_factory.mktemp("located")
    path = write_dataset(folder / "d", labels=[[0]] * count, shard_sizes=shard_sizes, num_classes=1, sizes=sizes, rows=rows)
    dataset = Dataset.open(path, check_shards=False)
    samples = rng.integers(0, count, 50)
    located = dataset.locate(samples)
    table = pa.ipc.open_file(str(path / "index.arrow")).read_all().take(pa.array(samples))
    shards = np.repeat(np.arange(len(shard_sizes)), shard_sizes)[samples]
    assert located.shards.tolist() == shards.tolist()
    for name, found in (("offset", located.offsets), ("size", located.sizes), ("hash", located.hashes)):
        assert found.tolist() == table[name].to_pylist()
    assert [found.dtype for found in located] == [np.int64, np.int64, np.int64, np.uint64]
    assert all(len(found) == 0 for found in dataset.locate(np.zeros(0, np.int64)))
    for none in (-1, count):
        with pytest.raises(IndexError):
            dataset.locate(np.array([0, none]))
    shutil.rmtree(folder)


def test_an_index_that_cannot_be_mapped(tmp_path: Path) -> None:
    """Compressed by another program, with a header that fits it."""
    path = write_dataset(tmp_path / "d", labels=[[0]] * 3000, shard_sizes=[3000], num_classes=1, rows=3000, compression="lz4")
    with pytest.raises(DatasetError, match="is compressed or damaged, and cannot be mapped"):
        Dataset.open(path, check_shards=False)


def test_ranges_of_a_tar(packed: Dataset) -> None:
    tar = (packed.path / packed.shard_names[1]).read_bytes()
    for start, end in ((0, 0), (0, 1), (5, 2000), (len(tar) - 7, len(tar)), (0, len(tar)), (len(tar) - 3, len(tar) + 50)):
        assert packed.read_range(1, start, end) == tar[start:end]
    for start, end in ((-1, 5), (7, 3), (len(tar) + 1, len(tar) + 9), (0, -5)):
        assert packed.read_range(1, start, end) == b"", "nothing lies there"
    located = packed.locate(np.arange(packed.num_samples))
    for shard, offset, size, of in zip(*(column.tolist() for column in located), strict=True):
        assert xxhash.xxh3_64_intdigest(packed.read_range(shard, offset, offset + size)) == of
    assert packed.is_local


def test_a_large_stretch_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system call gives 2 GiB at most; here as if it gave 1,000 bytes."""
    write_files(tmp_path / "photos", {f"a/{i}.jpg": make_image(i) for i in range(9)})
    dataset = pack_one(tmp_path / "photos", out=tmp_path / "out")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 1000), offset))
    tar = (dataset.path / dataset.shard_names[0]).read_bytes()
    assert dataset.read_range(0, 0, len(tar)) == tar
