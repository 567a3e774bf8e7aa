"""Stateless randomness: permutations are permutations, numbers are spread evenly, and a key decides everything."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vitscale import keyed

PARTS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(length: int, key: int) -> None:
    assert sorted(keyed.permute(np.arange(length), length, key).tolist()) == list(range(length))


@settings(deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_unpermute_is_the_inverse(length: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=50)))
    assert keyed.unpermute(keyed.permute(index, length, key), length, key).tolist() == index.tolist()
    assert keyed.permute(keyed.unpermute(index, length, key), length, key).tolist() == index.tolist()


def test_permute_works_far_past_what_a_table_could_hold() -> None:
    length = 2**40 + 12_345
    index = np.concatenate([np.arange(100_000), length - 1 - np.arange(100_000)])
    where = keyed.permute(index, length, 7)
    assert where.min() >= 0
    assert where.max() < length
    assert len(np.unique(where)) == len(index)


def test_permute_takes_a_length_and_a_key_for_each_index() -> None:
    lengths, keys = np.array([5, 17, 300]), np.array([1, 2, 3])
    together = keyed.permute(np.array([4, 16, 299]), lengths, keys)
    alone = [int(keyed.permute(n - 1, n, k)) for n, k in zip(lengths.tolist(), keys.tolist(), strict=True)]
    assert together.tolist() == alone


def test_every_index_goes_everywhere_equally_often() -> None:
    """Chi-squared of each (index, place) cell over keys; a permutation that favours places would fail by orders of magnitude."""
    num_keys = 20_000
    for length in (2, 3, 7, 16, 64, 256):
        where = keyed.permute(np.arange(length)[None], length, keyed.mix(np.arange(num_keys))[:, None])
        counts = np.stack([np.bincount(where[:, i], minlength=length) for i in range(length)])
        statistic = ((counts - num_keys / length) ** 2 / (num_keys / length)).sum()
        assert statistic / (length - 1) ** 2 < (2 if length < 16 else 1.1), length


def test_neighbours_do_not_stay_neighbours() -> None:
    length = 256
    where = keyed.permute(np.arange(length)[None], length, keyed.mix(np.arange(500))[:, None])
    correlations = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in where]
    assert abs(np.mean(correlations)) < 0.02


def test_uniform_numbers_are_uniform_and_independent_of_each_other() -> None:
    first, second = (keyed.uniform(np.arange(200_000), draw) for draw in (0, 1))
    for numbers in (first, second):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.01


@settings(deadline=None)
@given(PARTS, PARTS)
def test_keys_differ_where_their_parts_do(a: list[int], b: list[int]) -> None:
    assert (keyed.key(*a) == keyed.key(*b)) == (a == b)


def test_key_broadcasts_over_arrays() -> None:
    keys = keyed.key(3, np.arange(10), 5)
    assert keys.tolist() == [int(keyed.key(3, i, 5)) for i in range(10)]


def test_values_are_fixed_for_ever() -> None:
    """A run resumed by a later version must draw what it would have drawn: these numbers are part of the format."""
    assert int(keyed.mix(0)) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0, as published
    assert keyed.permute(np.arange(8), 8, 1).tolist() == [6, 7, 4, 1, 3, 2, 0, 5]
    assert keyed.uniform(12345, 0) == 0.23509587616747463
