"""The order of samples: each epoch a permutation, each step's set the same under every split of the work, substitutes where promised."""

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale import keyed
from vitscale.config import StreamConfig
from vitscale.locality import choose_order
from vitscale.order import EpochOrder, RunOrder, whole_weights

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum)


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    numbers = st.integers(1, 40)
    return EpochOrder(np.array(draw(SHARDS)), draw(st.integers(0, 2**40)), draw(st.integers(0, 5)), draw(numbers), draw(numbers))


@settings(deadline=None)
@given(orders())
def test_an_epoch_is_a_permutation(order: EpochOrder) -> None:
    assert sorted(order.samples_at(np.arange(len(order))).tolist()) == list(range(len(order)))


@settings(deadline=None)
@given(orders(), st.data())
def test_a_position_alone_is_as_in_a_batch(order: EpochOrder, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(order) - 1))
    assert int(order.samples_at(position)) == int(order.samples_at(np.arange(len(order)))[position])


@settings(deadline=None)
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


@settings(deadline=None)
@given(orders(), st.data())
def test_a_substitute_stands_in_the_same_window_and_later_in_others(order: EpochOrder, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(order) - 1))
    _, window, start, length = (int(v) for v in order._geometry.window_at(np.asarray(position)))
    tried = list(itertools.islice(order.substitutes(position), 9))
    stand_ins = order.positions_of(np.array(tried))
    for stand_in in stand_ins[:8].tolist():
        assert stand_in % order.lanes == position % order.lanes
        assert start <= stand_in // order.lanes < start + length
    assert tried == list(itertools.islice(order.substitutes(position), 9))
    lane_size = len(range(position % order.lanes, len(order), order.lanes))
    if lane_size > length:
        assert int(order._geometry.window_at(stand_ins[8])[1]) != window


@settings(max_examples=50, deadline=None)
@given(orders(), st.data())
def test_substitutes_go_through_all_windows_of_all_lanes(order: EpochOrder, data: st.DataObject) -> None:
    """Eight draws in each, every window once before any a second time, the position's own lane first."""
    position = data.draw(st.integers(0, len(order) - 1))
    lane, window, _, _ = order._geometry.window_at(np.arange(len(order)))
    windows = set(zip(lane.tolist(), window.tolist(), strict=True))
    tried = itertools.islice(order.substitutes(position), 0, 8 * len(windows), 8)
    visited = [(int(lane[stand_in]), int(window[stand_in])) for stand_in in order.positions_of(np.array(list(tried)))]
    assert set(visited) == windows
    assert [of for of, _ in visited] == sorted((of for of, _ in visited), key=lambda of: (of - position) % order.lanes)


def test_epochs_and_seeds_give_other_orders() -> None:
    sizes = np.full(20, 50)
    orders = [EpochOrder(sizes, seed, epoch, 1, 1000).samples_at(np.arange(1000)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_rank_stays_in_its_own_lanes() -> None:
    """Where the world size divides the lanes and they divide the batch, a rank meets only its own share of the lanes, so of the shards."""
    lanes, world_size, batch = 16, 4, 128
    order = RunOrder([np.full(64, 1000)], None, 0, lanes, 256)
    shards_of = []
    for rank in range(world_size):
        positions = np.concatenate([order.positions_of_rank(s, batch, rank, world_size) for s in range(0, 64_000, batch)])
        assert set((positions % lanes).tolist()) == set(range(rank * 4, rank * 4 + 4))
        shards_of.append(set((order.samples_at(positions) // 1000).tolist()))
    assert max(len(shards) for shards in shards_of) <= 64 // world_size + 1


@pytest.mark.parametrize(("num_samples", "batch", "lanes", "window"), [
    (1000, 96, 1, 1000), (3_999_999, 4096, 1, 3_999_999), (303_000_000, 4096, 1024, 256), (303_000_000, 96, 32, 256),
])  # fmt: skip
def test_the_default_order(num_samples: int, batch: int, lanes: int, window: int) -> None:
    chosen = choose_order(StreamConfig(), num_samples, batch)
    assert (chosen.lanes, chosen.window) == (lanes, window)


@pytest.mark.parametrize(("num_samples", "batch", "lanes", "window"), [
    (1_281_167, 4096, 1024, 256), (1_281_167, 96, 32, 256), (100_000, 4096, 64, 256), (2048, 24, 2, 256), (1000, 96, 1, 1000),
    (303_000_000, 4096, 1024, 256),
])  # fmt: skip
def test_the_default_order_of_a_dataset_that_is_far_away(num_samples: int, batch: int, lanes: int, window: int) -> None:
    """Windows wherever a lane has four of them, as each read of a full shuffle is a request."""
    chosen = choose_order(StreamConfig(), num_samples, batch, remote=True)
    assert (chosen.lanes, chosen.window) == (lanes, window)
    assert choose_order(StreamConfig(lanes=8, window=100), num_samples, batch, remote=True) == StreamConfig(lanes=8, window=100)


def test_bad_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="hold no samples"):
        EpochOrder(np.zeros(3), 0, 0, 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        EpochOrder(np.ones(3), 0, 0, 0, 1)
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        EpochOrder(np.ones(3), 0, 0, 1, 1).samples_at([3])


# ---------------------------------------------------------------------------------------------------------------------------------------
# The order of a run
# ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class SlowOrder:
    """The rule of design.md told the long way: lists, slices and one position after the other. Only the shuffle itself is `keyed`'s."""

    components: list[list[int]]
    weights: list[Fraction]
    seed: int
    lanes: int
    window: int

    def run(self) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Sample and window (component, epoch, lane, number) of position 0, 1, 2 and so on."""
        firsts = list(itertools.accumulate(map(sum, self.components), initial=0))
        readers = [self.component(c) for c in range(len(self.components))]
        taken = [0] * len(self.components)
        while True:
            rest = sum(taken) + 1  # the pairs up to and with this one
            for c in range(len(self.components)):
                share = rest * self.weights[c] // sum(self.weights[c:])
                if share > taken[c]:
                    break
                rest -= share
            taken[c] += 1
            for _ in range(2):
                sample, window = next(readers[c])
                yield firsts[c] + sample, (c, *window)

    def component(self, c: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
        seed = int(keyed.key(keyed.Purpose.COMPONENT, self.seed, c)) if c else self.seed
        shards, first = [], 0
        for size in self.components[c]:
            shards.append(list(range(first, first + size)))
            first += size
        for epoch in itertools.count():
            order = keyed.permute(np.arange(len(shards)), len(shards), keyed.key(keyed.Purpose.SHARD_ORDER, seed, epoch))
            samples = [sample for shard in order.tolist() for sample in shards[shard]]
            lanes = []
            for lane in range(self.lanes):
                size = len(samples) // self.lanes + (lane < len(samples) % self.lanes)
                start = lane * (len(samples) // self.lanes) + min(lane, len(samples) % self.lanes)
                lanes.append(self.shuffled(samples[start : start + size], seed, epoch, lane))
            for row in itertools.zip_longest(*lanes):
                for lane, there in enumerate(row):
                    if there is not None:
                        yield there[0], (epoch, lane, there[1])

    def shuffled(self, samples: list[int], seed: int, epoch: int, lane: int) -> list[tuple[int, int]]:
        head = self.window if self.lanes == 1 else 1 + lane * self.window // self.lanes
        cuts = [0, *range(head, len(samples), self.window), len(samples)]
        result = []
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            of = samples[start:end]
            where = keyed.permute(np.arange(len(of)), len(of), keyed.key(keyed.Purpose.WINDOW, seed, epoch, lane, number)) if of else of
            result += [(of[int(place)], number) for place in where]
        return result


WEIGHTS = st.one_of(
    st.integers(1, 9).map(float),
    st.floats(0.01, 10, allow_nan=False).map(lambda weight: round(weight, 3)).filter(lambda weight: weight > 0),
)


@dataclass
class Run:
    fast: RunOrder
    slow: SlowOrder


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """One to four datasets: empty shards, shards of one sample, fewer samples than lanes; weights given, or those of their sizes."""
    shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum)
    components = draw(st.lists(shards, min_size=1, max_size=4))
    weights = draw(st.none() | st.lists(WEIGHTS, min_size=len(components), max_size=len(components)))
    seed, lanes, window = draw(st.integers(0, 2**40)), draw(st.integers(1, 24)), draw(st.integers(1, 40))
    exact = [Fraction(str(weight)) for weight in weights] if weights else [Fraction(sum(shard)) for shard in components]
    return Run(RunOrder(components, weights, seed, lanes, window), SlowOrder(components, exact, seed, lanes, window))


@settings(max_examples=150, deadline=None)
@given(runs(), st.data())
def test_every_step_is_the_specified_one_under_every_split(run: Run, data: st.DataObject) -> None:
    """Steps taken by another world size each, begun anywhere by another `RunOrder`: the sets are those of the slow reference, the ranks'
    shares are equal and disjoint, and pairs stay together."""
    batch = data.draw(st.sampled_from([1, 2, 3, 6, 16, 36, 64, 128, 192]))
    steps = data.draw(st.integers(1, 6))
    expected = list(itertools.islice(run.slow.run(), batch * steps))
    for step in data.draw(st.permutations(range(steps))):
        world_size = data.draw(st.sampled_from([size for size in range(1, 65) if batch % size == 0]))
        order = pickle.loads(pickle.dumps(run.fast)) if data.draw(st.booleans()) else run.fast
        shares = [order.positions_of_rank(step * batch, batch, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {batch // world_size}
        assert sorted(np.concatenate(shares).tolist()) == list(range(step * batch, (step + 1) * batch))
        for share in shares:
            micro = data.draw(st.sampled_from([size for size in range(1, len(share) + 1) if len(share) % size == 0]))
            for positions in share.reshape(-1, micro):
                assert order.samples_at(positions).tolist() == [expected[p][0] for p in positions.tolist()]
                if micro % 2 == 0:
                    assert (positions[1::2] == positions[::2] + 1).all()
                    assert not (positions[::2] % 2).any()
            assert [tuple(of) for of in order.windows_at(share).tolist()] == [expected[p][1] for p in share.tolist()]


@settings(max_examples=80, deadline=None)
@given(runs())
def test_every_epoch_of_every_component_is_exact(run: Run) -> None:
    order = run.fast
    positions = np.arange(4 * sum(order.sizes) * max(1, round(max(order.weights) / min(order.weights) / 20)))[:20_000]
    samples, components = order.samples_at(positions), order.windows_at(positions)[:, 0]
    for c, size in enumerate(order.sizes):
        own = samples[components == c] - order.first_samples[c]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
        assert len(set(own[len(own) // size * size :].tolist())) == len(own) % size
        pairs = len(positions) // 2
        assert abs(np.count_nonzero(components[: 2 * pairs] == c) - 2 * pairs * order.weights[c] / sum(order.weights)) <= 2 * (c + 1)


@settings(max_examples=80, deadline=None)
@given(runs(), st.data())
def test_where_a_sample_was_seen_is_where_it_stands(run: Run, data: st.DataObject) -> None:
    order, end = run.fast, data.draw(st.integers(0, 600))
    samples = order.samples_at(np.arange(end))
    wanted = np.array(data.draw(st.lists(st.integers(0, sum(order.sizes) - 1), max_size=5, unique=True)), dtype=np.int64)
    found = order.positions_of(wanted, end)
    assert found[found < end].tolist() == np.flatnonzero(np.isin(samples, wanted)).tolist()
    assert np.isin(order.samples_at(found), wanted).all()


@settings(max_examples=80, deadline=None)
@given(runs(), st.data())
def test_a_window_reads_what_its_positions_need(run: Run, data: st.DataObject) -> None:
    """Its stretches are the samples of its positions and nothing else, each within one shard."""
    order = run.fast
    c = data.draw(st.integers(0, len(order.sizes) - 1))
    epoch = data.draw(st.integers(0, 2))
    positions = order._position_of(c, np.arange(epoch * order.sizes[c], (epoch + 1) * order.sizes[c]))
    windows, samples = order.windows_at(positions), order.samples_at(positions)
    shard_ends = order.first_samples[c] + np.cumsum(order.components[c])
    per_lane = np.bincount(np.unique(windows[:, 2:], axis=0)[:, 0], minlength=order.lanes)
    assert [order.windows_in(c, lane) for lane in range(order.lanes)] == per_lane.tolist()
    for window in {tuple(of) for of in windows.tolist()}:
        runs_of = order.window_runs(*window)
        read = [sample for first, count in runs_of for sample in range(first, first + count)]
        assert sorted(samples[(windows == window).all(axis=1)].tolist()) == sorted(read)
        for first, count in runs_of:
            assert count > 0
            assert np.searchsorted(shard_ends, first, side="right") == np.searchsorted(shard_ends, first + count - 1, side="right")


@settings(max_examples=60, deadline=None)
@given(runs(), st.data())
def test_a_run_s_substitutes_are_of_the_same_component_and_window(run: Run, data: st.DataObject) -> None:
    order, position = run.fast, data.draw(st.integers(0, 500))
    component, epoch, lane, window = order.windows_at(np.array([position]))[0].tolist()
    tried = list(itertools.islice(order.substitutes(position), 20))
    read = {sample for first, count in order.window_runs(component, epoch, lane, window) for sample in range(first, first + count)}
    assert set(tried[:8]) <= read
    first = order.first_samples[component]
    assert all(first <= sample < first + order.sizes[component] for sample in tried)


@settings(max_examples=100, deadline=None)
@given(orders(), st.data())
def test_a_run_of_one_dataset_has_the_order_that_runs_always_had(order: EpochOrder, data: st.DataObject) -> None:
    run = RunOrder([order.shard_sizes], None, order.seed, order.lanes, order.window)
    epoch = data.draw(st.integers(0, 3))
    of_epoch = EpochOrder(order.shard_sizes, order.seed, epoch, order.lanes, order.window)
    positions = np.arange(len(order))
    assert run.samples_at(epoch * len(order) + positions).tolist() == of_epoch.samples_at(positions).tolist()
    position = data.draw(st.sampled_from(positions.tolist()))
    expected = list(itertools.islice(of_epoch.substitutes(position), 12))
    assert list(itertools.islice(run.substitutes(epoch * len(order) + position), 12)) == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ranks_take_the_lanes_that_they_always_took(data: st.DataObject) -> None:
    """Where lanes divide the batch, and a rank's lanes come in pairs, it takes its lanes alone."""
    world_size = data.draw(st.integers(1, 16))
    lanes = world_size * 2 * data.draw(st.integers(1, 4))
    batch = lanes * data.draw(st.integers(1, 4))
    num_samples = batch * data.draw(st.integers(1, 5)) + data.draw(st.integers(0, batch - 1))
    samples_seen = batch * data.draw(st.integers(0, num_samples // batch - 1))
    order = RunOrder([[num_samples]], None, 0, lanes, 8)
    for rank in range(world_size):
        expected = [p for p in range(samples_seen, samples_seen + batch) if p % num_samples % lanes // (lanes // world_size) == rank]
        assert order.positions_of_rank(samples_seen, batch, rank, world_size).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dealing_is_by_preference_first_come_first_served(data: st.DataObject) -> None:
    """Against the rule told the long way, for world sizes and lanes that divide nothing, over the end of an epoch."""
    world_size, lanes = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 70))
    share = data.draw(st.integers(1, 8))
    batch = share * world_size
    num_samples = data.draw(st.integers(1, 1000))
    samples_seen = batch * data.draw(st.integers(0, 20))
    unit = 2 if share % 2 == 0 else 1
    expected: list[list[int]] = [[] for _ in range(world_size)]
    left = []
    for position in sorted(
        range(samples_seen, samples_seen + batch, unit), key=lambda p: (p % num_samples % lanes * world_size // lanes, p)
    ):
        of_rank = expected[position % num_samples % lanes * world_size // lanes]
        (of_rank if len(of_rank) * unit < share else left).append(position)
    for of_rank in expected:
        while len(of_rank) * unit < share:
            of_rank.append(left.pop(0))
    order = RunOrder([[num_samples]], None, 0, lanes, 8)
    for rank in range(world_size):
        taken = [position + i for position in sorted(expected[rank]) for i in range(unit)]
        assert order.positions_of_rank(samples_seen, batch, rank, world_size).tolist() == taken


@pytest.mark.parametrize(("lanes", "world_size"), [(256, 8), (512, 16), (1024, 8)])
@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.9, 0.1], [7, 2, 1], [1, 1, 1, 1]])
def test_in_a_mixture_each_rank_is_preferred_by_about_what_it_takes(weights: list[float], lanes: int, world_size: int) -> None:
    """A step of as many positions as a component has lanes meets but some of them: not all of one rank's and none of another's."""
    order = RunOrder([[100_003 + 7 * i] for i in range(len(weights))], weights, 0, lanes, 64)
    for step in range(20):
        preferred = order.preferred_ranks(np.arange(step * lanes, (step + 1) * lanes), lanes, world_size)
        assert np.bincount(preferred, minlength=world_size).max() <= 1.3 * lanes / world_size


def test_a_mixture_s_order_is_what_it_was() -> None:
    """It is part of the identity of every run, as that of one dataset is."""
    small = RunOrder([[5, 0, 3, 4], [7]], [2, 1], seed=7, lanes=2, window=3)
    assert small.samples_at(np.arange(24)).tolist() == [
        12, 17, 0, 6, 2, 7, 13, 16, 1, 9, 3, 8, 14, 18, 5, 10, 4, 11, 15, 12, 0, 9, 3, 10,
    ]  # fmt: skip
    large = RunOrder([np.full(30_000, 10_000), np.full(100, 10_000), [5]], [3, 0.5, 0.0001], seed=7, lanes=1024, window=256)
    assert large.samples_at(np.array([0, 1, 4096, 10**12, 10**12 + 1, 10**12 + 2])).tolist() == [
        301000000, 301000001, 3360492, 62654564, 174057475, 89080699,
    ]  # fmt: skip


def test_a_mixture_s_components_do_not_go_the_same_way() -> None:
    """The same dataset twice: the two are shuffled apart."""
    order = RunOrder([[1000], [1000]], None, 0, 1, 1000)
    samples = order.samples_at(np.arange(2000))
    one, other = samples[samples < 1000], samples[samples >= 1000] - 1000
    assert np.mean(one == other) < 0.05


@pytest.mark.parametrize(("weights", "whole"), [
    ([1, 1], (1, 1)), ([0.1, 0.3], (1, 3)), ([3, 1.5, 1e-4], (30_000, 15_000, 1)), ([1e12, 5e11], (2, 1)), ([7], (1,)),
    ([2.5, 2.5, 5.0], (1, 1, 2)),
])  # fmt: skip
def test_weights_are_the_decimals_that_are_written(weights: list[float], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


def test_sizes_of_any_dataset_are_weights() -> None:
    """The arithmetic stays within 64 bits, exact up to three thousand million samples and within one in a thousand million above."""
    assert whole_weights([2_000_000_001, 1_000_000_000]) == (2_000_000_001, 1_000_000_000)
    huge = whole_weights([10**15 + 1, 10**13 + 7, 3])
    assert sum(huge) ** 2 < 2**63
    assert huge[0] / huge[1] == pytest.approx(100, rel=1e-6)
    assert huge[2] == 1
    order = RunOrder([[2_000_000_001], [1_000_000_000]], None, 0, 1, 1000)
    position = 10**12 + 1
    component = int(order.windows_at(np.array([position]))[0, 0])
    before = [position // 2 * 2_000_000_001 // 3_000_000_001, 0]
    before[1] = position // 2 - before[0]
    assert component == int((position // 2 + 1) * 2_000_000_001 // 3_000_000_001 == before[0])
    count = 2 * before[component] + position % 2
    assert int(order._position_of(component, np.asarray(count))) == position
    assert order.windows_at(np.array([position]))[0, 1] == count // order.sizes[component]


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1], [1, 1, 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        RunOrder([[3], [4]], weights, 0, 1, 1)


def test_what_is_not_there_is_refused() -> None:
    order = RunOrder([[3, 0, 4], [2]], None, 0, 4, 2)
    with pytest.raises(IndexError, match="no window 5"):
        order.window_runs(0, 0, 1, 5)
    with pytest.raises(IndexError, match="no window 0"):
        order.window_runs(1, 0, 3, 0)
    with pytest.raises(IndexError, match=r"\[0, 9\)"):
        order.positions_of(np.array([9]), 10)
    with pytest.raises(ValueError, match="hold no samples"):
        RunOrder([[3], [0, 0]], [1, 1], 0, 1, 1)


def test_weights_that_are_rounded_are_rounded_once() -> None:
    order = RunOrder([[5], [5], [5]], (1e12, 1, 1), 0, 1, 5)
    assert pickle.loads(pickle.dumps(order)).weights == order.weights
