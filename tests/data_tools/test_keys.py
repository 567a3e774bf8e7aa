"""Keys must be safe and unique whatever the names."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.keys import clean_key, hashed_key, unique_keys

SAFE = re.compile(r"(?!__|-)[A-Za-z0-9_-]{1,80}")


def keys_of(raw: list[str]) -> list[str]:
    return unique_keys(pa.array(raw, pa.large_string()), lambda row: f"row {row}").to_pylist()


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
    raw = ["a/b", "a_b"]
    assert len(set(keys_of([*raw, *keys_of(raw), hashed_key("a/b", "row 0\0000")]))) == 5


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=100) | st.sampled_from(["a/b", "a_b", "a", "-", "__"]), min_size=1))
def test_any_names(raw: list[str]) -> None:
    keys = keys_of(raw)
    assert len(set(keys)) == len(raw)
    assert all(SAFE.fullmatch(key) for key in keys)
