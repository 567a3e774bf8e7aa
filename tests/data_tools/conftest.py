"""Small real images and the sources made of them."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.pack import pack
from data_tools.storage import Url, put

ROOT = Path(__file__).parents[2]


def make_image(number: int, kind: str = "JPEG", size: tuple[int, int] = (12, 9), mode: str = "RGB") -> bytes:
    """An encoded image of noise, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Writes the files and returns their folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_table(table: pa.Table, path: Path, kind: str) -> Path:
    """Writes one table in one of the ways that people have them."""
    if kind == "parquet":
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=4)
        return path.with_suffix(".parquet")
    if kind in ("feather", "feather-plain"):
        pa.feather.write_feather(table, path.with_suffix(".feather"), "lz4" if kind == "feather" else "uncompressed", chunksize=4)
        return path.with_suffix(".feather")
    with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path.with_suffix(".arrow")


def pack_one(*sources: Path | str, out: Path, **settings: object) -> Dataset:
    """Packs into one split and opens it with all checks."""
    (result,) = pack(PackConfig(tuple(map(str, sources)), str(out), **settings))  # type: ignore[arg-type]
    dataset = Dataset.open(result.path, check_index=True)
    assert (result.samples, result.content_hash) == (dataset.num_samples, dataset.content_hash)
    return dataset


def contents(dataset: Dataset) -> dict[str, tuple[bytes, list[int], list[float]]]:
    """Everything that a dataset says: key -> image, labels, scores."""
    labels, scores = dataset.labels(np.arange(dataset.num_samples))
    return {
        dataset.key(i): (dataset.read(i), labels[i][labels[i] >= 0].tolist(), scores[i][labels[i] >= 0].tolist())
        for i in range(dataset.num_samples)
    }


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three classes with 23 images of three formats, one of them in a nested folder."""
    kinds = ("JPEG", "PNG", "WEBP")
    files = {f"{('cat', 'dog', 'eel')[i % 3]}/{i:02d}.img": make_image(i, kinds[i % 2 + i % 5 // 4]) for i in range(22)}
    return write_files(tmp_path / "photos", {**files, "eel/deep/er/99.jpg": make_image(99)})


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Dataset:
    """The photos in five shards."""
    return pack_one(photos, out=tmp_path / "packed", samples_per_shard=5)


# -- A bucket on loopback -----------------------------------------------------------------------------------------------------------------


class Server:
    """The process of `object_server.py`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.data_tools.object_server"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        assert self._process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def set(self, **how: object) -> dict[str, Any]:
        """Tells what was asked since the last time, and what to do from now on."""
        told: dict[str, Any] = json.load(urllib.request.urlopen(f"{self.address}/-/set?" + "&".join(f"{k}={v}" for k, v in how.items())))
        return told


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    server = Server()
    yield server
    server.end()


@pytest.fixture
def server(process: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in {
        "ENDPOINT_URL": process.address, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    process.set()
    return process


BUCKETS = itertools.count()


@pytest.fixture
def bucket(server: Server) -> Url:
    """A new bucket."""
    name = f"bucket{next(BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{server.address}/{name}", method="PUT"))
    return Url(f"s3://{name}")


def upload(folder: Path, url: Url) -> Url:
    """Puts all files of a folder."""
    for name, data in tree(folder).items():
        put(url / name, data)
    return url
