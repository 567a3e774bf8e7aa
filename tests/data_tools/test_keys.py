"""Keys must be safe and unique whatever the names."""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.keys import clean_key, clean_keys, repeated
from data_tools.pack import pack
from data_tools.sources import list_sources
from data_tools.verify import verify

from .conftest import contents, make_image

SAFE = re.compile(r"(?!__|-)[A-Za-z0-9_-]{1,80}")


def keys_of(raw: list[str]) -> list[str]:
    """The keys of a table whose key column has these texts."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "t.parquet"
        pq.write_table(pa.table({"image": [b""] * len(raw), "label": [0] * len(raw), "key": raw}), table)
        listing = list_sources(PackConfig((str(table),), ""), None, Path(folder))
        return [key for batch in listing.batches() for key in batch["key"].to_pylist()]


@pytest.mark.parametrize("plain", ["cat_001", "n01440764_10026", "a-b", "_x", "0" * 80])
def test_plain_names_stay(plain: str) -> None:
    assert clean_key(plain) == plain
    assert clean_key("cat/001") == "cat_001"


@pytest.mark.parametrize(
    "hostile", ["../../etc/passwd", "/etc/x.y", "a\nb", "é", "猫/一", "x" * 81, "", ".", "__meta__", "-rf", "a b", "\0"]
)
def test_hostile_names_become_safe(hostile: str) -> None:
    assert SAFE.fullmatch(clean_key(hostile))
    assert clean_key(hostile) != clean_key(hostile + "?")


HOSTILE = ["../../up", "/etc/abs", "a\nb\tc\x1b[2J", "übergroß", "猫/一", "x" * 300, "..", "-rf", "__meta__", "CON", "a'\"$(touch x)`;"]


def test_hostile_names_neither_break_nor_leave_the_dataset(tmp_path: Path) -> None:
    """As keys, as paths, as names in a tar and of files: all good images are there, under safe names, and OUT is all that was written."""
    images = {name: make_image(number) for number, name in enumerate(HOSTILE)}
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    pq.write_table(pa.table({"image": list(images.values()), "label": [0] * len(images), "key": HOSTILE}), work / "keys.parquet")
    pq.write_table(pa.table({"path": HOSTILE, "label": [0] * len(images)}), work / "paths.parquet")
    for name, image in images.items():
        if 0 < len(name.encode()) < 250 and "/" not in name and name != "..":
            (work / "files/0").mkdir(parents=True, exist_ok=True)
            (work / f"files/0/{name}.jpg").write_bytes(image)
    (work / "files/0" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(images["-rf"])
    (work / "files/0" / ("y" * 251 + ".jpg")).write_bytes(images["-rf"])
    with tarfile.open(work / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, image in images.items():
            for suffix, data in {"jpg": image, "cls": b"0"}.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    found = {}
    for source in ("keys.parquet", "paths.parquet", "files", "t.tar"):
        out = work / f"out-{source}"
        config = PackConfig((str(work / source),), str(out), num_classes=1)
        if source == "paths.parquet":
            with pytest.raises(PackError, match="no usable image is left"):
                pack(config)
            continue
        pack(config)
        dataset = Dataset.open(out / "train", check_index=True)
        assert verify(dataset.path, decode=True).problems == ()
        found[source] = contents(dataset)
        assert all(SAFE.fullmatch(key) for key in found[source])
        for tar_file in dataset.path.rglob("*.tar"):
            with tarfile.open(tar_file) as tar:
                assert all(SAFE.fullmatch(member.name.partition(".")[0]) and member.isreg() for member in tar)
        webdataset = wds.WebDataset(str(dataset.path / "shards/000/train-000000.tar"), shardshuffle=False)
        assert sorted(sample["__key__"] for sample in webdataset) == sorted(found[source])
    assert sorted(image for image, _, _ in found["keys.parquet"].values()) == sorted(images.values())
    assert len(found["files"]) == len(list((work / "files/0").iterdir()))
    created = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - before
    assert all(path.parts[2].startswith("out-") for path in created)


def test_names_that_meet_are_told_apart_and_others_keep_theirs() -> None:
    keys = keys_of(["a/b", "a_b", "c", "same", "same", "same"])
    assert len(set(keys)) == 6
    assert keys[2] == "c"


def test_a_name_made_to_meet_a_hashed_one() -> None:
    """Names that are the very keys that others would get when they meet: those are made anew too."""
    raw = ["a/b", "a_b"]
    meant = keys_of(raw)
    keys = keys_of([*raw, *meant])
    assert len(set(keys)) == 4
    assert not set(meant) & set(keys)
    assert keys_of([*raw, *meant, *keys]) != keys


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=200), st.integers(1, 50))
def test_what_stands_more_than_once_is_found_a_part_at_a_time(values: list[int], at_once: int) -> None:
    found = repeated(np.array(values, np.uint64), at_once)
    assert found.tolist() == [place for place, value in enumerate(values) if values.count(value) > 1]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=90) | st.from_regex(r"[A-Za-z0-9_/-]{0,90}", fullmatch=True)))
def test_many_keys_at_once_are_those_one_by_one(raw: list[str]) -> None:
    assert clean_keys(pa.array(raw, pa.large_string())).to_pylist() == [clean_key(text) for text in raw]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=100) | st.sampled_from(["a/b", "a_b", "a", "-", "__"]), min_size=1))
def test_any_names(raw: list[str]) -> None:
    keys = keys_of(raw)
    assert len(set(keys)) == len(raw)
    assert all(SAFE.fullmatch(key) for key in keys)
