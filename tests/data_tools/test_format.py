"""What other programs make of the directory, and what `Dataset` makes of a damaged one."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import multiprocessing
import pickle
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import xxhash

from data_tools import assemble, ranges
from data_tools import dataset as fmt
from data_tools.dataset import Dataset, DatasetError, SampleError

from .conftest import contents, make_image, pack_one


@pytest.fixture
def multi(tmp_path: Path) -> Dataset:
    """Several labels and scores a sample, and `.cls` members; the index in several record batches."""
    labels = [[i, (i + 3) % 7] if i % 3 else [] for i in range(7)] * 3
    scores = [[0.9, 0.1] if row else None for row in labels]
    pq.write_table(pa.table({"image": [make_image(i) for i in range(21)], "labels": labels, "scores": scores}), tmp_path / "t.parquet")
    return pack_one(tmp_path / "t.parquet", out=tmp_path / "multi", samples_per_shard=4, write_cls=True)


def shards(dataset: Dataset) -> list[Path]:
    return [dataset.path / name for name in dataset.shard_names]


@pytest.mark.parametrize("name", ["packed", "multi"])
def test_webdataset_streams_every_sample(name: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(name)
    streamed = list(wds.WebDataset([str(path) for path in shards(dataset)], shardshuffle=False, empty_check=False))
    assert len(streamed) == dataset.num_samples
    labels, scores = dataset.labels(np.arange(dataset.num_samples))
    for number, sample in enumerate(streamed):
        assert sample["__key__"] == dataset.key(number)
        (extension,) = {"jpg", "png", "webp"} & sample.keys()
        assert sample[extension] == dataset.read(number)
        told = json.loads(sample["json"])
        assert told["labels"] == labels[number][labels[number] >= 0].tolist()
        assert np.float32(told["scores"] or [1.0] * len(told["labels"])).tolist() == scores[number][labels[number] >= 0].tolist()
        if name == "multi":
            assert sample.get("cls") == (str(told["labels"][0]).encode() if told["labels"] else None)


def test_tarfile_and_gnu_tar_read_plain_ustar(packed: Dataset) -> None:
    offset, first = None, 0
    for path in shards(packed):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert not tar.pax_headers
            assert not any(member.pax_headers for member in members)
        listed = subprocess.run(["tar", "--numeric-owner", "-tvf", path], check=True, capture_output=True, text=True)
        assert not listed.stderr
        lines = listed.stdout.splitlines()
        assert [line.split()[-1] for line in lines] == [member.name for member in members]
        assert all(line.startswith("-rw-r--r-- 0/0 ") and "1970-01-0" in line for line in lines)
        data = path.read_bytes()
        for number, member in enumerate(members[::2], first):
            assert data[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
            assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
            located = packed.locate(np.array([number]))
            offset = int(located.offsets[0])
            assert (member.offset_data, member.size) == (offset, located.sizes[0])
        first += len(members) // 2
    assert first == packed.num_samples


def test_the_tables_for_people(packed: Dataset) -> None:
    manifest = pq.read_table(packed.path / "manifest.parquet")
    assert manifest.schema.equals(fmt.MANIFEST_SCHEMA)
    for row in manifest.to_pylist():
        data = (packed.path / row["name"]).read_bytes()
        assert (row["bytes"], row["checksum"]) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert manifest["first_sample"].to_pylist() == [0, 5, 10, 15, 20]
    samples = pq.read_table(packed.path / "samples/000.parquet")
    assert samples.schema.equals(fmt.SAMPLES_SCHEMA)
    for number, row in enumerate(samples.to_pylist()):
        assert (row["width"], row["height"], row["key"]) == (12, 9, packed.key(number))
        assert row["hash"] == xxhash.xxh3_64_intdigest(packed.read(number))
    index = pa.ipc.open_file(str(packed.path / "index.arrow"))
    assert index.schema.equals(fmt.INDEX_SCHEMA)
    assert (packed.path / "classes.txt").read_text() == "cat\ndog\neel\n"


def test_more_shards_than_a_folder_holds_and_an_index_of_many_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pack_one(photos, out=tmp_path / "whole", samples_per_shard=2)
    whole, labels = contents(wanted), wanted.labels(np.arange(23))
    monkeypatch.setattr(fmt, "SHARDS_PER_FOLDER", 5)
    monkeypatch.setattr(assemble, "INDEX_ROWS", 6)
    parts = pack_one(photos, out=tmp_path / "parts", samples_per_shard=2)
    assert len(parts._batches) == 4
    assert parts.shard_names[7] == "shards/001/train-000007.tar"
    assert sorted(path.name for path in (parts.path / "samples").iterdir()) == ["000.parquet", "001.parquet", "002.parquet"]
    assert contents(parts) == whole
    order = np.random.default_rng(0).integers(0, 23, 50)
    for ours, theirs in zip(parts.labels(order), labels, strict=True):
        assert np.array_equal(ours, theirs[order])


def test_labels_are_padded(multi: Dataset) -> None:
    labels, scores = multi.labels(np.arange(21))
    assert (labels.shape, labels.dtype, scores.shape, scores.dtype) == ((21, 2), np.int32, (21, 2), np.float32)
    assert ((labels == -1) == (scores == 0)).all()
    assert set(np.unique(scores)) == {np.float32(0), np.float32(0.9), np.float32(0.1)}
    assert (labels == -1).all(axis=1).sum() == 9
    assert [part.shape for part in multi.labels(np.array([], dtype=np.int64))] == [(0, 2), (0, 2)]
    for wrong in (-1, 21):
        with pytest.raises(IndexError):
            multi.labels(np.array([0, wrong]))
        with pytest.raises(IndexError):
            multi.read(wrong)


def test_threads_share_few_file_descriptors(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_open_file", functools.lru_cache(2)(ranges._OpenFile))
    dataset = pack_one(photos, out=tmp_path / "out", samples_per_shard=1)
    wanted = [dataset.read(i) for i in range(23)]
    order = np.random.default_rng(0).integers(0, 23, 1000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, order)) == [wanted[i] for i in order]
    open_shards = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and str(tmp_path) in str(link.readlink())]
    assert len([link for link in open_shards if link.readlink().suffix == ".tar"]) <= 2


def read_all(dataset: Dataset) -> list[bytes]:
    return [dataset.read(i) for i in range(dataset.num_samples)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes(packed: Dataset, start: str) -> None:
    wanted = read_all(packed)
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(read_all, (packed,)) == wanted
    assert contents(pickle.loads(pickle.dumps(packed))) == contents(packed)


def test_a_pickle_does_not_take_another_dataset(packed: Dataset, photos: Path, tmp_path: Path) -> None:
    pickled = pickle.dumps(packed)
    shutil.rmtree(packed.path)
    pack_one(photos, out=packed.path.parent, samples_per_shard=6)
    with pytest.raises(DatasetError, match="is now dataset"):
        pickle.loads(pickled)


def test_a_flipped_byte_in_an_image_is_found_by_read(packed: Dataset) -> None:
    flip(packed.path / packed.shard_of(7), int(packed.locate(np.array([7])).offsets[0]) + 3)
    dataset = Dataset.open(packed.path)
    with pytest.raises(SampleError, match="xxh3_64") as caught:
        dataset.read(7)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.sample, error.shard, error.key) == (7, packed.shard_names[1], packed.key(7))
    assert error.reason
    assert str(error) == str(caught.value)
    assert all(dataset.read(i) for i in range(dataset.num_samples) if i != 7)


def test_a_shard_that_goes_away_or_ends_early(packed: Dataset) -> None:
    (packed.path / packed.shard_names[0]).unlink()
    with (packed.path / packed.shard_names[1]).open("r+b") as file:
        file.truncate(600)
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):  # the machine's fault, not the sample's: nothing is substituted
        packed.read(0)
    with pytest.raises(SampleError, match="bytes at offset"):
        packed.read(5)
    with pytest.raises(DatasetError, match=r"train-000000\.tar is missing, the manifest says"):
        Dataset.open(packed.path)
    shutil.copy(packed.path / packed.shard_names[2], packed.path / packed.shard_names[0])
    with pytest.raises(DatasetError, match=r"train-00000[01]\.tar has \d+ bytes, the manifest says"):
        Dataset.open(packed.path)
    assert Dataset.open(packed.path, check_shards=False).read(12)


@pytest.mark.parametrize("name", ["manifest.parquet", "classes.txt", "index.arrow", "samples/000.parquet", "dataset.json"])
def test_a_flipped_byte_anywhere_else_is_found_by_open(packed: Dataset, name: str) -> None:
    intact = (packed.path / name).read_bytes()
    for place in range(0, len(intact), max(1, len(intact) // 60)):
        flip(packed.path / name, place)
        with pytest.raises(DatasetError):
            Dataset.open(packed.path, check_index=True)
        (packed.path / name).write_bytes(intact)
    Dataset.open(packed.path, check_index=True)


def test_a_damaged_index_never_gives_a_wrong_image(packed: Dataset) -> None:
    wanted = read_all(packed)
    intact = (packed.path / "index.arrow").read_bytes()
    for place in range(0, len(intact), 7):
        flip(packed.path / "index.arrow", place)
        try:
            dataset = Dataset.open(packed.path)
        except DatasetError:
            dataset = None
        for number in range(23) if dataset else ():
            with contextlib.suppress(SampleError):
                assert dataset.read(number) == wanted[number]
        (packed.path / "index.arrow").write_bytes(intact)


EDITS: dict[str, Callable[[dict], object]] = {
    "format_version 2; this program reads 1": lambda header: header.update(format_version=2),
    "content_hash does not fit": lambda header: header.update(num_classes=7),
    'does not say "format"': lambda header: header.pop("format"),
}


@pytest.mark.parametrize("message", EDITS)
def test_an_edited_header(packed: Dataset, message: str) -> None:
    header = json.loads((packed.path / "dataset.json").read_text())
    EDITS[message](header)
    (packed.path / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(DatasetError, match=re.escape(message)):
        Dataset.open(packed.path)


def test_the_content_hash_names_every_part(packed: Dataset) -> None:
    header = json.loads((packed.path / "dataset.json").read_text())
    assert header["content_hash"] == fmt.header_hash(header) == packed.content_hash
    rest = {path.relative_to(packed.path).as_posix() for path in packed.path.rglob("*") if path.is_file() and path.suffix != ".tar"}
    assert header["files"].keys() == rest - {"dataset.json"}
    other = copy.deepcopy(header)
    other["files"]["index.arrow"]["sha256"] = "0" * 64
    assert fmt.header_hash(other) != packed.content_hash


def test_a_folder_of_splits_is_not_opened_by_guess(packed: Dataset) -> None:
    with pytest.raises(DatasetError, match=f"open one of its splits: {packed.path}$"):
        Dataset.open(packed.path.parent)
    with pytest.raises(DatasetError, match=r"`vitscale pack .*/shards OUT` makes one of images or tables in it"):
        Dataset.open(packed.path / "shards")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
