"""Datasets in a bucket or on the web, read from a real server that fails: the bytes of the same dataset on a disk, or one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_tools import preview, stats, storage
from data_tools.amend import removals, write_overlay
from data_tools.cache import LEAST, Cache
from data_tools.dataset import Dataset, DatasetError, RemovedError, SampleError
from data_tools.errors import UserError
from data_tools.overlay import OverlayError
from data_tools.stage import StageError
from data_tools.storage import StorageError, Url, delete, put
from data_tools.verify import verify

from .conftest import ROOT, Server, contents, tree, upload


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies go to the test's own folder, and a server that does not answer is waited for but shortly."""
    monkeypatch.setenv("VITSCALE_CACHE", str(tmp_path / "copies"))
    monkeypatch.setenv("AWS_READ_TIMEOUT", "1s")
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.1)


def asked_for(told: dict) -> list[tuple[str, str]]:
    return [(method, path.strip("/").partition("/")[2]) for method, path, _, _ in told["asked"]]


def test_a_dataset_in_a_bucket_is_the_one_on_the_disk(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    write_overlay(packed, "takedown", removals(np.array([3]), pa.array(["asked for"])))
    write_overlay(packed, "other", removals(np.array([9, 11]), pa.array(["asked for", "too"])))
    here = Dataset.open(packed.path)
    url = upload(packed.path, bucket / "data/train")
    server.set(rate=0.05, seed=1)
    there = Dataset.open(str(url))
    assert (there.path, there.is_local, here.is_local) == (url, False, True)
    for one in (there, pickle.loads(pickle.dumps(there)), Dataset.open(url, stage=tmp_path / "stage", check_index=True)):
        assert one.overlay.names == here.overlay.names
        assert one.labels(np.arange(23))[0].tolist() == here.labels(np.arange(23))[0].tolist()
        for sample in range(23):
            assert one.key(sample) == here.key(sample)
            assert one.row(sample) == here.row(sample)
            if sample in (3, 9, 11):
                with pytest.raises(RemovedError):
                    one.read(sample)
            else:
                assert one.read(sample) == here.read(sample)
    assert contents(Dataset.open(url, overlays=())) == contents(Dataset.open(packed.path, overlays=()))
    assert sum(server.set()["spoiled"].values()) > 0
    assert [file for file in tree(tmp_path / "copies") if file.endswith(".tar")] == []


def test_a_read_is_one_request_and_opening_lists_once(packed: Dataset, server: Server, bucket: Url) -> None:
    url = upload(packed.path, bucket / "train")
    Dataset.open(url)
    server.set()
    dataset = Dataset.open(url)
    asked = asked_for(server.set())
    assert len([one for one in asked if one[1] == ""]) <= 2, "a listing of all and one of the overlays"
    assert [one for one in asked if one[1].endswith((".tar", ".arrow", "manifest.parquet"))] == [], "the copies are used"
    order = np.random.default_rng(0).permutation(23).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, order)) == [packed.read(i) for i in order]
    assert [method for method, _ in asked_for(server.set())] == ["GET"] * 23


def test_processes(packed: Dataset, server: Server, bucket: Url) -> None:
    dataset = Dataset.open(upload(packed.path, bucket / "train"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(dataset.read, range(0, 23, 5)) == [packed.read(i) for i in range(0, 23, 5)]
    here, there = os.pipe()
    if (child := os.fork()) == 0:
        try:
            dataset.read(0)
        except StorageError as error:
            os.write(there, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert re.search("forked .* start such processes by spawn", os.read(here, 1000).decode())


def test_processes_that_start_at_once_fetch_a_file_once(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    server.set(rate=0.5, kinds="late")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(opened, [(url, tmp_path / "stage")] * 6)
    assert found == [packed.content_hash] * 6
    fetched = [path for method, path in asked_for(server.set()) if method == "GET" and path.endswith(("index.arrow", "manifest.parquet"))]
    assert sorted(fetched) == ["train/index.arrow", "train/manifest.parquet"]


def opened(url: Url, stage: Path) -> str:
    return Dataset.open(url, stage=stage).content_hash


def test_on_the_web(packed: Dataset, server: Server, bucket: Url) -> None:
    upload(packed.path, bucket / "a dir/train")
    url = Url(f"{server.address}/{bucket.name}/a%20dir/train")
    server.set(rate=0.1, seed=4)
    dataset = Dataset.open(url)
    assert contents(dataset) == contents(packed)
    assert verify(url).problems == ()
    assert sum(server.set()["spoiled"].values()) > 0
    put(bucket / "a dir/train" / packed.shard_names[0], bytes(int(packed.shard_bytes[0])))
    with pytest.raises(StorageError, match=r"train-000000\.tar has changed while it was read"):
        dataset.read(0)


def bytes_or_error(dataset: Dataset, sample: int) -> bytes | Exception:
    try:
        return dataset.read(sample)
    except (SampleError, StorageError) as error:
        return error


FAULTS = ("503", "500", "reset", "short", "late", "shifted", "garbage")


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("where", ["bucket", "cache", "web"])
def test_faults_cost_time_and_no_byte(
    packed: Dataset, server: Server, bucket: Url, tmp_path: Path, kind: str, where: str
) -> None:  # fmt: skip
    url = upload(packed.path, bucket / "train")
    if where == "web":
        url = Url(f"{server.address}/{bucket.name}/train")
    dataset = Dataset.open(url, cache=Cache(tmp_path / "cache", LEAST) if where == "cache" else None)
    wanted = [packed.read(i) for i in range(23)]
    server.set(rate=0.3, seed=3, kinds=kind)
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(functools.partial(bytes_or_error, dataset), [*range(23)] * 3)]
    wrong = [got for got, image in zip(found, wanted * 3, strict=True) if got != image]
    assert all(isinstance(error, SampleError | StorageError) and "\n" not in str(error) for error in wrong), wrong
    assert len(wrong) < (23 if kind == "garbage" or (kind == "shifted" and where != "web") else 1), "all attempts may be wrong"
    assert where == "cache" or server.set()["spoiled"][kind] > 0
    server.set()
    assert [dataset.read(sample) for sample in range(23)] == wanted, "nothing of it stays"


@pytest.mark.parametrize("where", ["disk", "cached disk", "bucket", "web"])
def test_a_range_ends_where_its_tar_does(packed: Dataset, server: Server, bucket: Url, tmp_path: Path, where: str) -> None:
    """A damaged index may ask for any: what is there of it comes, and nobody makes room for the rest."""
    url = upload(packed.path, bucket / "train")
    places = {"bucket": url, "web": f"{server.address}/{bucket.name}/train"}
    dataset = Dataset.open(places.get(where, packed.path), cache=Cache(tmp_path / "cache", LEAST) if where == "cached disk" else None)
    tar = (packed.path / packed.shard_names[1]).read_bytes()
    assert dataset.read_range(1, 5, 2**62) == tar[5:]
    assert dataset.read_range(1, len(tar), 2**62) == dataset.read_range(1, -5, 100) == b""


@pytest.mark.parametrize("where", ["bucket", "cache", "web"])
def test_other_bytes_are_asked_for_again_three_times(packed: Dataset, server: Server, bucket: Url, tmp_path: Path, where: str) -> None:
    url = upload(packed.path, bucket / "train")
    dataset = Dataset.open(
        url if where != "web" else f"{server.address}/{bucket.name}/train",
        cache=Cache(tmp_path / "cache", LEAST) if where == "cache" else None,
    )
    server.set(rate=1, kinds="garbage")
    with pytest.raises(SampleError, match="do not have the index's xxh3_64"):
        dataset.read(0)
    asked = [path for method, path in asked_for(server.set()) if method == "GET" and path.endswith(".tar")]
    assert len(asked) == 4
    assert dataset.read(0) == packed.read(0)


@pytest.mark.parametrize("place", ["bucket", "web"])
def test_a_range_is_never_another_one(packed: Dataset, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(storage, "WEB_ATTEMPTS", 3)
    url = upload(packed.path, bucket / "train")
    dataset = Dataset.open(url if place == "bucket" else f"{server.address}/{bucket.name}/train")
    assert dataset.read_range(1, 5, 100) == packed.read_range(1, 5, 100)
    server.set(rate=1, kinds="shifted")
    with pytest.raises(StorageError, match=r"train-000001\.tar cannot be had: .*; the same command goes on") as caught:
        dataset.read_range(1, 5, 100)
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_one_line(packed: Dataset, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(packed.path, bucket / "train")
    storage._store.cache_clear()
    monkeypatch.setattr(storage, "RETRIES", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    dataset = Dataset.open(url)
    server.set(rate=1, kinds="stall")
    with pytest.raises(StorageError, match=r"train-000001\.tar cannot be had: .*, 2 times; the same command goes on") as caught:
        dataset.read(7)
    assert "\n" not in str(caught.value)
    server.set(rate=0.3, kinds="stall", seed=1)
    assert dataset.read(7) == packed.read(7)
    storage._store.cache_clear()
    monkeypatch.setenv("HTTP_READ_TIMEOUT", "1s")
    monkeypatch.setattr(storage, "WEB_ATTEMPTS", 2)
    storage._web.cache_clear()
    server.set()
    dataset = Dataset.open(f"{server.address}/{bucket.name}/train")
    server.set(rate=1, kinds="stall")
    with pytest.raises(StorageError, match=r"train-000001\.tar cannot be had: .*, 2 times; the same command goes on") as caught:
        dataset.read(7)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HTTP_READ_TIMEOUT", "soon")
    storage._web.cache_clear()
    with pytest.raises(StorageError, match="HTTP_READ_TIMEOUT=soon must be a number of seconds; 60s is usual"):
        dataset.read(7)
    storage._web.cache_clear()


def test_what_has_changed_or_is_gone_is_named(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    dataset = Dataset.open(url)
    dataset.read(0)
    tar, name = (packed.path / packed.shard_names[0]).read_bytes(), packed.shard_names[0]
    put(url / name, tar[:-1] + b"?")
    with pytest.raises(StorageError, match=r"train-000000\.tar has changed while it was read; start again"):
        dataset.read(1)
    for other, said in (
        (tar + bytes(512), "bytes where"),
        (tar[:700], "bytes where|shorter than it should be"),
        (b"", "shorter|bytes where"),
    ):
        put(url / name, other)
        with pytest.raises(DatasetError, match=rf"train-000000\.tar has {len(other)} bytes, the manifest says"):
            Dataset.open(url)
        with pytest.raises(StorageError, match=rf"train-000000\.tar .*({said})"):
            [Dataset.open(url, check_shards=False).read(i) for i in range(5)]
    delete(url / name)
    with pytest.raises(DatasetError, match=r"train-000000\.tar is missing, the manifest says"):
        Dataset.open(url)
    with pytest.raises(StorageError, match=r"train-000000\.tar: No such file"):
        Dataset.open(url, check_shards=False).read(0)
    assert Dataset.open(url, check_shards=False).read(7) == packed.read(7)
    for table in ("manifest.parquet", "index.arrow", "classes.txt", "samples/000.parquet"):
        whole = (packed.path / table).read_bytes()
        shutil.rmtree(tmp_path / "copies")
        put(url / name, tar)
        put(url / table, whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StageError, match=rf"{re.escape(table)} was changed: its SHA-256 is not dataset\.json's"):
            Dataset.open(url).key(0)
        put(url / table, whole[:-1])
        with pytest.raises(DatasetError, match=rf"{re.escape(table)} has {len(whole) - 1} bytes, dataset\.json says {len(whole)}"):
            Dataset.open(url)
        put(url / table, whole)
        Dataset.open(url).key(0)
    put(url / "dataset.json", b"{}")
    with pytest.raises(DatasetError, match="does not say"):
        Dataset.open(url)


def test_a_damaged_sample_has_its_key_and_costs_no_table(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    tar = bytearray((packed.path / packed.shard_names[2]).read_bytes())
    tar[int(packed.locate(np.array([12])).offsets[0]) + 5] ^= 1
    put(url / packed.shard_names[2], bytes(tar))
    dataset = Dataset.open(url)
    with pytest.raises(SampleError, match="do not have the index's xxh3_64") as caught:
        dataset.read(12)
    assert (caught.value.key, caught.value.shard) == (packed.key(12), packed.shard_names[2])
    assert not list((tmp_path / "copies").rglob("samples/*"))
    assert [dataset.read(sample) for sample in (11, 13)] == [packed.read(11), packed.read(13)]


def test_an_overlay_that_is_not_what_it_says(packed: Dataset, server: Server, bucket: Url) -> None:
    write_overlay(packed, "takedown", removals(np.array([3]), pa.array(["asked for"])))
    url = upload(packed.path, bucket / "train")
    (name,) = Dataset.open(url).overlay.names
    put(url / "overlay" / name, b"something else")
    assert Dataset.open(url).overlay.num_removed == 1, "the copy is what the name says"
    shutil.rmtree(os.environ["VITSCALE_CACHE"])
    with pytest.raises(StageError, match="was changed"):
        Dataset.open(url)
    put(url / "overlay" / "notes.txt", b"")
    with pytest.raises(OverlayError, match="is no overlay by its name"):
        Dataset.open(url)


def test_a_copy_that_rots_is_made_anew(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    contents(Dataset.open(url))
    for file in (tmp_path / "copies").rglob("*"):
        if file.is_file() and file.suffix != ".lock":
            data = file.read_bytes()
            check = file.suffix == ".arrow"
            for other in (data[:-1] + bytes([data[-1] ^ 1]), data[: len(data) // 2]):
                if file.parent.name == "samples" and len(other) == len(data):
                    continue  # which only its size is looked at of
                file.write_bytes(other)
                assert contents(Dataset.open(url, check_index=check)) == contents(packed)
                assert file.read_bytes() == data


def test_verify_stats_and_preview_say_what_they_say_of_a_disk(packed: Dataset, server: Server, bucket: Url) -> None:
    write_overlay(packed, "takedown", removals(np.array([3]), pa.array(["asked for"])))
    url = upload(packed.path, bucket / "train")
    server.set(rate=0.05, seed=8)
    same = {"path": ""}
    assert dataclasses.replace(verify(url, decode=True), **same) == dataclasses.replace(verify(packed.path, decode=True), **same)
    assert dataclasses.replace(stats.count(url), **same) == dataclasses.replace(stats.count(packed.path), **same)
    for by in ("class", "shard", "random"):
        assert dataclasses.replace(preview.sheet(url, by=by), **same) == dataclasses.replace(preview.sheet(packed.path, by=by), **same)
    server.set()
    tar = bytearray((packed.path / packed.shard_names[2]).read_bytes())
    tar[int(packed.locate(np.array([12])).offsets[0]) + 5] ^= 1
    for place in (packed.path, url):
        (place / packed.shard_names[2]).write_bytes(tar) if isinstance(place, Path) else put(place / packed.shard_names[2], bytes(tar))
        (place / "stranger").write_bytes(b"") if isinstance(place, Path) else put(place / "stranger", b"")
    (packed.path / packed.shard_names[4]).unlink()
    delete(url / packed.shard_names[4])
    assert verify(url).problems == verify(packed.path).problems
    assert {problem.file for problem in verify(url).problems} == {packed.shard_names[2], packed.shard_names[4], "stranger"}


def vitscale(*words: str) -> subprocess.CompletedProcess[str]:
    start = "import sys; from launch.main import main; sys.argv[0] = 'vitscale'; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", start, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_verbs(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    for words in (["data", "stats"], ["data", "preview"], ["data", "verify"]):
        there, here = (vitscale(*words, str(place), "--json") for place in (url, packed.path))
        assert (there.returncode, there.stderr) == (0, ""), words
        assert json.loads(there.stdout) | {"path": ""} == json.loads(here.stdout) | {"path": ""}
    done = vitscale("data", "stats", str(url), "--html", str(tmp_path / "page.html"))
    assert (done.returncode, (tmp_path / "page.html").is_file()) == (0, True)


def test_nothing_is_fetched_to_a_disk_without_room(packed: Dataset, server: Server, bucket: Url, tmp_path: Path) -> None:
    url = upload(packed.path, bucket / "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be copied to .*; give another stage$"):
        Dataset.open(url, stage=tmp_path / "file")
