"""Runs whose data lies in a bucket: the losses that a disk gives, the same order wherever the data goes, one line where it is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools import storage
from data_tools.cache import LEAST, CacheError
from data_tools.dataset import Dataset, DatasetError
from data_tools.errors import UserError
from data_tools.storage import Url
from tests.command import SMALL, vitscale
from tests.data_tools.conftest import Server, bucket, process, server, tree, upload  # noqa: F401 - fixtures
from tests.runs import begin
from tests.vitscale.streams import steps
from vitscale import locality
from vitscale.config import ConfigError, StreamConfig, TrainConfig
from vitscale.resolve import resolve
from vitscale.run import read_metrics


@pytest.fixture(autouse=True)
def _copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITSCALE_CACHE", str(tmp_path / "copies"))


def test_a_run_from_a_bucket_that_fails_learns_what_it_learns_from_a_disk(
    dataset: Path, server: Server, bucket: Url, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    for split in ("train", "val"):
        upload(dataset / split, bucket / "data" / split)
    server.set(rate=0.05, seed=1)
    losses = []
    for place, out in ((dataset, "here"), (bucket / "data", "there")):
        cache = ["--cache", tmp_path / "cache", "--cache-bytes", "64MiB"] if out == "there" else []
        words = ["--data", place / "train", "--out", tmp_path / out, "--steps", "3", "--nproc", "2", *cache]
        done = vitscale("pretrain", "tiny-digits", *SMALL, *words)
        assert done.returncode == 0, done.stderr
        losses.append([{name: line[name] for name in line if "loss" in name} for line in read_metrics(tmp_path / out)])
    assert losses[0] == losses[1] != []
    assert any("eval_loss" in line for line in losses[1]), "the sibling in the bucket is held out"
    assert "cache: room for 15 blocks of 4 MiB, 100% of" in done.stdout
    assert sum(server.set()["spoiled"].values()) > 0
    assert any(name.endswith("/000000") for name in tree(tmp_path / "cache"))
    assert json.loads((tmp_path / "there/run.json").read_text())["dataset"]["path"] == str(bucket / "data/train")
    evaluated = vitscale("evaluate", tmp_path / "there", "--data", bucket / "data/val", "--json")
    here = vitscale("evaluate", tmp_path / "there", "--data", dataset / "val", "--json")
    assert json.loads(evaluated.stdout) | {"data": ""} == json.loads(here.stdout) | {"data": ""}


@pytest.mark.parametrize("reads", ["windows", "samples"])
@pytest.mark.parametrize("kinds", ["503,500,reset,short", "stall", "late", "shifted", "garbage"])
def test_batches_from_a_server_that_fails_are_those_of_a_disk(
    dataset: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kinds: str, reads: str  # noqa: F811
) -> None:  # fmt: skip
    """Answers that never come, end early, come in another order, or are another range or other bytes: asked for again until right."""
    monkeypatch.setenv("AWS_READ_TIMEOUT", "1s")
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.1)
    url = upload(dataset / "train", bucket / f"{kinds}-{reads}")
    # Other bytes four times in a row would count as damage: they are rare, and so many are asked for
    window, count, rate = (4, 66, 0.03) if kinds == "garbage" else (16, 22, 0.1)
    config = StreamConfig(lanes=2, window=window, workers=2, reads=reads)
    here, there = Dataset.open(dataset / "train"), Dataset.open(url)
    whole = steps(here, tmp_path, count, world_size=1, micro=6, batch=12, config=config)
    server.set(rate=rate, seed=2, kinds=kinds)
    assert steps(there, tmp_path, count, world_size=1, micro=6, batch=12, config=config) == whole
    assert sum(server.set()["spoiled"].values()) > 0
    assert not (tmp_path / "quarantine.jsonl").exists(), "no sample is at fault"


@pytest.mark.parametrize("reads", ["windows", "samples"])
def test_processes_decode_what_comes_from_far_away(dataset: Path, server: Server, bucket: Url, tmp_path: Path, reads: str) -> None:  # noqa: F811
    url = upload(dataset / "train", bucket / f"processes-{reads}")
    config = StreamConfig(lanes=2, window=16, workers=2, reads=reads)
    whole = steps(Dataset.open(dataset / "train"), tmp_path, 12, world_size=1, micro=6, batch=12, config=config)
    processes = replace(config, processes=True)
    assert steps(Dataset.open(url), tmp_path, 12, world_size=1, micro=6, batch=12, config=processes) == whole


@pytest.mark.parametrize("reads", ["windows", "samples"])
def test_a_server_that_is_gone_ends_a_stream_in_one_line(
    dataset: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reads: str  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_READ_TIMEOUT", "1s")
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.02)
    url = upload(dataset / "train", bucket / f"gone-{reads}")
    config = StreamConfig(lanes=2, window=16, workers=2, reads=reads)
    there = Dataset.open(url)
    for kinds, told in (
        ("503", "the same command goes on when it can"),
        ("stall", "reading shards/.* has not ended for stream.read_timeout=2"),
    ):
        patience = replace(config, read_timeout=2 if kinds == "stall" else 300)
        server.set(rate=1, kinds=kinds)
        with pytest.raises(UserError, match=told) as caught:
            steps(there, tmp_path, 2, world_size=1, micro=12, batch=12, config=patience)
        assert "\n" not in str(caught.value)


def test_a_run_keeps_its_order_where_its_data_moves(
    config: TrainConfig, dataset: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(locality, "WINDOW", 8)
    url = upload(dataset / "train", bucket / "train")
    there, here = replace(config, data=str(url), out=str(tmp_path / "there")), replace(config, out=str(tmp_path / "here"))
    assert (resolve(there, 1).stream.lanes, resolve(here, 1).stream.lanes) == (4, 1)
    assert begin(there).stream == begin(replace(there, data=config.data)).stream
    assert begin(here).stream == begin(replace(here, data=str(url))).stream == begin(here).stream
    assert resolve(replace(here, stream=replace(here.stream, lanes=2)), 1).stream.lanes == 2


def test_what_cannot_be_is_one_line(config: TrainConfig, dataset: Path, server: Server, bucket: Url, tmp_path: Path) -> None:  # noqa: F811
    url = upload(dataset / "train", bucket / "train")
    with pytest.raises(ConfigError, match="cache='x' and cache_bytes=None: one is missing; --cache /local/disk --cache-bytes 200GB"):
        resolve(replace(config, cache="x"), 1)
    with pytest.raises(CacheError, match="must be at least"):
        resolve(replace(config, cache="x", cache_bytes=LEAST - 1), 1)
    with pytest.raises(DatasetError, match="is not a dataset"):
        resolve(replace(config, data=f"{url}x"), 1)
    assert resolve(replace(config, data=str(url), eval_data=""), 1).eval_data == "none", "there is no sibling"
