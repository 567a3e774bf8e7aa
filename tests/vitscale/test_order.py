"""The order of samples: each epoch a permutation, each step's set the same under every split of the work, substitutes where promised."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.config import StreamConfig, choose_order
from vitscale.order import EpochOrder, positions_of_rank

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum)


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    numbers = st.integers(1, 40)
    return EpochOrder(np.array(draw(SHARDS)), draw(st.integers(0, 2**40)), draw(st.integers(0, 5)), draw(numbers), draw(numbers))


@given(orders())
def test_an_epoch_is_a_permutation(order: EpochOrder) -> None:
    assert sorted(order.samples_at(np.arange(len(order))).tolist()) == list(range(len(order)))


@given(orders(), st.data())
def test_a_position_alone_is_as_in_a_batch(order: EpochOrder, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(order) - 1))
    assert int(order.samples_at(position)) == int(order.samples_at(np.arange(len(order)))[position])


@given(orders())
def test_a_window_is_one_stretch_of_the_list_of_shards(order: EpochOrder) -> None:
    """Places of a lane, taken a window at a time, cover contiguous stretches: a window is one read, or one a shard that it touches."""
    in_list = np.empty(len(order), dtype=np.int64)  # where in this epoch's list each sample stands
    listed = np.concatenate([
        np.arange(first, first + size)
        for first, size in zip(order._first.tolist(), np.diff(order._starts).tolist(), strict=True)
    ])  # fmt: skip
    in_list[listed] = np.arange(len(order))
    for lane in range(min(order.lanes, len(order))):
        places = in_list[order.samples_at(np.arange(lane, len(order), order.lanes))]
        head = order.window if order.lanes == 1 else 1 + lane * order.window // order.lanes
        cuts = [0, *range(head, len(places), order.window), len(places)]
        for start, end in itertools.pairwise(cuts):
            if start < end:
                assert sorted(places[start:end]) == list(range(min(places[start:end]), min(places[start:end]) + end - start))


@pytest.mark.parametrize(("lanes", "window"), [(1, 1000), (4, 100)])
def test_samples_are_shuffled_within_windows_and_anew_each_epoch(lanes: int, window: int) -> None:
    """One shard of 1,000, so that nothing but windows is shuffled: neighbours come apart, and no epoch is like another."""
    epochs = [EpochOrder(np.array([1000]), seed, epoch, lanes, window) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    orders = [order.samples_at(np.arange(1000)) for order in epochs]
    for order in orders:
        assert np.mean(np.abs(np.diff(order[::lanes])) == 1) < 0.05
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.05


def test_the_order_is_what_it_was() -> None:
    """It is part of the identity of every run: a change of these numbers takes runs that exist to other images."""
    small = EpochOrder(np.array([5, 0, 3, 4]), seed=7, epoch=2, lanes=2, window=3)
    assert small.samples_at(np.arange(12)).tolist() == [0, 9, 1, 10, 2, 6, 3, 5, 4, 11, 8, 7]
    large = EpochOrder(np.full(30_000, 10_000), seed=7, epoch=2, lanes=1024, window=256)
    assert large.samples_at(np.array([0, 1, 4095, 4096, 150_000_000, 299_999_999])).tolist() == [
        288060000,
        245592969,
        2957094,
        288060167,
        141526596,
        36850136,
    ]


@given(orders(), st.data())
def test_a_substitute_stands_in_the_same_window_and_later_in_others(order: EpochOrder, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(order) - 1))
    _, window, start, length = (int(v) for v in order._window_at(np.asarray(position)))
    tried = list(itertools.islice(order.substitutes(position), 9))
    for stand_in, sample in tried[:8]:
        assert stand_in % order.lanes == position % order.lanes
        assert start <= stand_in // order.lanes < start + length
        assert sample == int(order.samples_at(stand_in))
    assert tried == list(itertools.islice(order.substitutes(position), 9))
    lane_size = len(range(position % order.lanes, len(order), order.lanes))
    if lane_size > length:
        assert int(order._window_at(np.asarray(tried[8][0]))[1]) != window


@settings(max_examples=50, deadline=None)
@given(orders(), st.data())
def test_substitutes_go_through_all_windows_of_all_lanes(order: EpochOrder, data: st.DataObject) -> None:
    """Eight draws in each, every window once before any a second time, the position's own lane first."""
    position = data.draw(st.integers(0, len(order) - 1))
    lane, window, _, _ = order._window_at(np.arange(len(order)))
    windows = set(zip(lane.tolist(), window.tolist(), strict=True))
    tried = itertools.islice(order.substitutes(position), 0, 8 * len(windows), 8)
    visited = [(int(lane[stand_in]), int(window[stand_in])) for stand_in, _ in tried]
    assert set(visited) == windows
    assert [of for of, _ in visited] == sorted((of for of, _ in visited), key=lambda of: (of - position) % order.lanes)


def test_epochs_and_seeds_give_other_orders() -> None:
    sizes = np.full(20, 50)
    orders = [EpochOrder(sizes, seed, epoch, 1, 1000).samples_at(np.arange(1000)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=200)
@given(st.data())
def test_the_ranks_positions_are_the_step(data: st.DataObject) -> None:
    """Whatever the split, all ranks together take [samples_seen, samples_seen + B), equally many each."""
    world_size = data.draw(st.integers(1, 8))
    batch = world_size * data.draw(st.integers(1, 12))
    lanes = data.draw(st.sampled_from([1, 2, 4, 8, 16, world_size, batch]))
    num_samples, samples_seen = data.draw(st.integers(1, 200)), data.draw(st.integers(0, 1000))
    shares = [positions_of_rank(samples_seen, batch, rank, world_size, num_samples, lanes) for rank in range(world_size)]
    assert {len(share) for share in shares} == {batch // world_size}
    assert sorted(np.concatenate(shares).tolist()) == list(range(samples_seen, samples_seen + batch))


def test_a_rank_stays_in_its_own_lanes() -> None:
    """Where the world size divides the lanes and they divide the batch, a rank meets only its own share of the lanes, so of the shards."""
    num_samples, lanes, world_size, batch = 64_000, 16, 4, 128
    order = EpochOrder(np.full(64, 1000), 0, 0, lanes, 256)
    shards_of = []
    for rank in range(world_size):
        positions = np.concatenate([positions_of_rank(s, batch, rank, world_size, num_samples, lanes) for s in range(0, 64_000, batch)])
        assert set((positions % lanes).tolist()) == set(range(rank * 4, rank * 4 + 4))
        shards_of.append(set((order.samples_at(positions) // 1000).tolist()))
    assert max(len(shards) for shards in shards_of) <= 64 // world_size + 1


@pytest.mark.parametrize(("num_samples", "batch", "lanes", "window"), [
    (1000, 96, 1, 1000), (3_999_999, 4096, 1, 3_999_999), (303_000_000, 4096, 1024, 256), (303_000_000, 96, 32, 256),
])  # fmt: skip
def test_the_default_order(num_samples: int, batch: int, lanes: int, window: int) -> None:
    chosen = choose_order(StreamConfig(), num_samples, batch)
    assert (chosen.lanes, chosen.window) == (lanes, window)


def test_bad_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="hold no samples"):
        EpochOrder(np.zeros(3), 0, 0, 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        EpochOrder(np.ones(3), 0, 0, 0, 1)
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        EpochOrder(np.ones(3), 0, 0, 1, 1).samples_at([3])
