"""Damaged and hostile sources are packed or refused with a reason: no crash, no hang, nothing outside OUT."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.pack import pack
from tests.data_tools.mutations import KINDS, mutated

from .conftest import make_image, tree, write_files

HOSTILE_NAMES = (
    "../../etc/x",
    "a" * 300,
    "..",
    "/etc/passwd",
    "new\nline",
    "\x00",
    "猫",
    "__meta__",
    "-rf",
    "a/b",
    "a_b",
    "",
    " ",
    "x.jpg.png",
)


def pack_mutated(number: int, folder: Path) -> str:
    """Packs one mutated source beside good images; what became of it."""
    rng = random.Random(number)
    good = {f"good/{i}.jpg": make_image(i) for i in range(2)}
    source, inputs = folder / "in", 2
    kind = rng.choice(["image", "image", "names", "parquet", "feather", "tar", "csv", "jsonl"])
    if kind == "image":
        write_files(source, {**good, "other/mutated.img": mutated(make_image(number % 40, rng.choice(KINDS), (30, 20)), rng)})
        inputs = 3
    else:
        count = 6
        names = [rng.choice(HOSTILE_NAMES) if kind == "names" else f"k{i}" for i in range(count)]
        columns = {"image": [make_image(i) for i in range(count)], "label": [f"c{i % 2}" for i in range(count)], "key": names}
        source.mkdir()
        inputs = count
        if kind == "tar":
            with webdataset.TarWriter(str(source / "t.tar")) as sink:
                for image, key in zip(columns["image"], names, strict=True):
                    sink.write({"__key__": key, "jpg": image, "json": {"labels": [int(key[1:])], "scores": [0.5]}})
        elif kind in ("csv", "jsonl"):
            rows = [{"path": f"{key}.jpg", "label": "c", "key": key} for key in names]
            lines = [json.dumps(row) for row in rows] if kind == "jsonl" else ["path,label,key", *(",".join(row.values()) for row in rows)]
            write_files(
                source, {f"t.{kind}": "\n".join(lines).encode(), **{f"{key}.jpg": columns["image"][i] for i, key in enumerate(names)}}
            )
        elif kind == "feather":
            pa.feather.write_feather(pa.table(columns), source / "t.feather", rng.choice(["lz4", "uncompressed"]), chunksize=3)
        else:
            pq.write_table(pa.table(columns), source / "t.parquet", row_group_size=3)
        if kind != "names":
            (table,) = source.glob("t.*")
            table.write_bytes(mutated(table.read_bytes(), rng))
    before = {**tree(source)}
    checks = rng.choice(["decode", "header"])
    named = source if kind in ("image", "names") else next(source.glob("t.*"))
    config = PackConfig((str(named),), str(folder / "out"), jobs=1, check_images=checks, samples_per_shard=2)
    refused = ""
    try:
        (result,) = pack(config)
    except PackError as error:
        refused = str(error)
    assert tree(source) == before
    assert {path.name for path in folder.iterdir()} <= {"in", "out"}
    if refused:
        assert "\n" not in refused
        assert not (folder / "out").exists()
        assert kind not in ("image", "names"), refused
        return f"{kind} refused"
    if kind in ("image", "names"):  # a table may have lost rows and still be one
        assert result.samples + result.rejects == inputs
    dataset = Dataset.open(result.path, check_index=True)
    assert len({dataset.key(sample) for sample in range(len(dataset))}) == len(dataset)
    for sample in range(len(dataset)):
        image = dataset.read(sample)
        if checks == "decode":
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
    return f"{kind} {'rejected' if result.rejects else 'packed'}"


def pack_many(numbers: range, tmp_path: Path) -> Counter[str]:
    told: Counter[str] = Counter()
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        told[pack_mutated(number, folder)] += 1
        shutil.rmtree(folder)
    return told


def test_a_hundred_mutated_sources(tmp_path: Path) -> None:
    told = pack_many(range(100), tmp_path)
    assert {"image packed", "image rejected", "names packed", "parquet refused"} <= set(told)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_two_thousand_mutated_sources(tmp_path: Path) -> None:
    print(dict(pack_many(range(100, 2_100), tmp_path)))
