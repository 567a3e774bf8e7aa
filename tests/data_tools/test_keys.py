"""Keys must be safe and unique whatever the names."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.config import PackConfig
from data_tools.keys import clean_key, clean_keys, repeated
from data_tools.sources import list_sources

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
