"""The clock and the order of samples: which sample stands at which position, and which positions a rank takes in a step.

`samples_seen` is the one clock of a run, and `RunOrder` says which sample stands at each position that it counts. A run reads one dataset
or several, its components. Pairs of positions are given to components by weight. A component counts the positions that are its own; that
count, divided by its samples, is its epoch and the position within, and `EpochOrder` knows the sample there: the shards in a keyed random
order are read as one long list, the list is cut into lanes, lanes into windows, and each window is shuffled inside. Position p of an epoch
is lane p mod L, place p div L.

Invariants: every sample of a component is at exactly one position of each of its epochs; what stands at a position depends on the arguments
of `RunOrder` alone, not on ranks, workers or batch sizes; neighbours in a lane lie in the same window, and a window is one contiguous
stretch of the list; everything is computed from the position, so that a resume costs what a start costs; no array is as long as an epoch.
Reading the samples is `stream.py`'s business.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vitscale import keyed
from vitscale.keyed import Purpose

Int64 = npt.NDArray[np.int64]

MAX_DRAWS = 2**16  # candidates for a position; removed ones are skipped unread, so this may be large: a lost shard removes thousands
_MAX_WEIGHT = math.isqrt(2**63 - 1) - 1024  # the sum of whole-number weights: its square must fit into 64 bits
_EPOCHS_KEPT = 4  # of each component: a step may cross from one epoch into the next, and batches are prepared ahead


class RunOrder:
    """The order of a whole run. Safe for threads and for `pickle`; all methods are pure.

    Positions are counted from 0 through the whole run. Samples are numbered through all components: sample i of component c is
    `first_samples[c] + i`.

    Args:
        components: of each dataset the samples in each shard, in the manifest's order.
        weights: how many positions each component has, as shares of their sum; None: as many as it has samples, so that each sample of each
            comes once in so many positions as there are samples.
        seed: of the run.
        lanes: of each component; fixed for a run.
        window: samples shuffled together; fixed for a run.
    """

    def __init__(self, components: Sequence[npt.ArrayLike], weights: Sequence[float] | None, seed: int, lanes: int, window: int) -> None:
        self.components = tuple(np.asarray(sizes, dtype=np.int64) for sizes in components)
        self.sizes = tuple(int(sizes.sum()) for sizes in self.components)
        if not all(self.sizes):
            raise ValueError(f"the dataset's {len(self.components[self.sizes.index(0)])} shards hold no samples; at least one is needed")
        self._asked_weights = weights  # what `pickle` gives, for whole ones may be rounded once more
        self.weights = whole_weights(self.sizes if weights is None else weights)
        if len(self.weights) != len(self.components):
            raise ValueError(f"{len(self.weights)} weights for {len(self.components)} datasets; give each one weight")
        self.seed, self.lanes, self.window = seed, lanes, window
        self.first_samples = tuple(itertools.accumulate(self.sizes, initial=0))[:-1]
        self._geometry = tuple(Lanes(size, lanes, window) for size in self.sizes)
        self._epoch_order = lru_cache(maxsize=_EPOCHS_KEPT * len(self.components))(self._make_epoch_order)

    def samples_at(self, positions: Int64) -> Int64:
        """Numbers of the samples at positions, (n,)."""
        positions = np.asarray(positions, dtype=np.int64)
        samples = np.empty_like(positions)
        component, count = self._components_at(positions)
        for c in np.unique(component).tolist():
            at_c = np.flatnonzero(component == c)
            epoch, place = np.divmod(count[at_c], self.sizes[c])
            for e in np.unique(epoch).tolist():
                at_e = np.flatnonzero(epoch == e)
                samples[at_c[at_e]] = self.first_samples[c] + self._epoch_order(c, e).samples_at(place[at_e])
        return samples

    def candidates(self, position: int) -> Iterator[int]:
        """The sample at a position, then its substitutes, `MAX_DRAWS` in all: the first that can be used is used."""
        first = int(self.samples_at(np.array([position]))[0])
        return itertools.islice(itertools.chain([first], self.substitutes(position)), MAX_DRAWS)

    def substitutes(self, position: int) -> Iterator[int]:
        """The samples that may stand in for an unusable one at a position, in the order in which they are tried; without end.

        They are of the same component; `EpochOrder.substitutes` has the rule.
        """
        component, count = (int(v) for v in self._components_at(np.asarray(position, dtype=np.int64)))
        epoch, place = divmod(count, self.sizes[component])
        for sample in self._epoch_order(component, epoch).substitutes(place):
            yield self.first_samples[component] + sample

    def windows_at(self, positions: Int64) -> Int64:
        """Component, epoch of the component, lane and number of the window that holds each position, (n, 4)."""
        positions = np.asarray(positions, dtype=np.int64)
        windows = np.empty((len(positions), 4), dtype=np.int64)
        windows[:, 0], count = self._components_at(positions)
        for c, geometry in enumerate(self._geometry):
            at_c = np.flatnonzero(windows[:, 0] == c)
            windows[at_c, 1], place = np.divmod(count[at_c], self.sizes[c])
            windows[at_c, 2], windows[at_c, 3], _, _ = geometry.window_at(place)
        return windows

    def windows_in(self, component: int, lane: int) -> int:
        """How many windows a lane of a component has; 0 where the component has fewer samples than lanes."""
        return self._geometry[component].windows_in(lane)

    def window_runs(self, component: int, epoch: int, lane: int, window: int) -> list[tuple[int, int]]:
        """What a window reads: the number of the first sample and the count of each stretch, one for each shard that it touches.

        A component that has fewer samples than lanes has fewer windows; one that is not there is an IndexError.
        """
        runs = self._epoch_order(component, epoch).window_runs(lane, window)
        return [(self.first_samples[component] + first, count) for first, count in runs]

    def positions_of_rank(self, samples_seen: int, global_batch_size: int, rank: int, world_size: int) -> Int64:
        """The positions that a rank takes in the step at `samples_seen`, ascending, `global_batch_size // world_size` of them.

        All ranks' together are [samples_seen, samples_seen + global_batch_size). Each position prefers a rank by its lane, so that a rank
        reads its own windows; a rank takes the first that prefer it, and what is left over goes, in the order of preference, to ranks that
        have room. Where the share is even, positions 2j and 2j + 1 go together, by the preference of the first.
        """
        share = global_batch_size // world_size
        unit = dealt_together(share)
        firsts = np.arange(samples_seen, samples_seen + global_batch_size, unit, dtype=np.int64)
        taken = firsts[_deal(self.preferred_ranks(firsts, global_batch_size, world_size), share // unit, world_size) == rank]
        positions: Int64 = (taken[:, None] + np.arange(unit)).ravel()
        return positions

    def preferred_ranks(self, positions: Int64, global_batch_size: int, world_size: int) -> Int64:
        """The rank that each position would best go to, for it reads the window: what `positions_of_rank` deals by."""
        unit = dealt_together(global_batch_size // world_size)
        component, count = self._components_at(np.asarray(positions, dtype=np.int64) // unit * unit)
        lane = count % np.asarray(self.sizes, dtype=np.int64)[component] % self.lanes
        if len(self.sizes) > 1:
            # A component has any number of positions in a step, so more of some lanes than of others, and those are neighbours: they are
            # strewn over the ranks, or some ranks would be preferred by far more positions than they take.
            pairs = -(-self.lanes // 2)
            lane = 2 * (lane // 2 * _golden_stride(pairs) % pairs)
        preferred: Int64 = lane * world_size // self.lanes
        return preferred

    def positions_of(self, samples: Int64, end: int) -> Int64:
        """Where samples stand, ascending, in all epochs of theirs that begin before position `end`: the inverse of `samples_at`."""
        samples = np.asarray(samples, dtype=np.int64)
        if len(samples) and (samples.min() < 0 or samples.max() >= sum(self.sizes)):
            raise IndexError(f"samples {samples.min()}..{samples.max()} are not all in [0, {sum(self.sizes)})")
        found = [np.empty(0, dtype=np.int64)]
        for c, (first, size) in enumerate(zip(self.first_samples, self.sizes, strict=True)):
            own = samples[(samples >= first) & (samples < first + size)] - first
            for epoch in itertools.count() if len(own) else ():
                if int(self._position_of(c, np.asarray(epoch * size))) >= end:
                    break
                found.append(self._position_of(c, epoch * size + self._epoch_order(c, epoch).positions_of(own)))
        return np.sort(np.concatenate(found))

    def _components_at(self, positions: Int64) -> tuple[Int64, Int64]:
        """The component of each position, and how many positions before it are the component's.

        Of the first j pairs of positions, floor(j w1 / W) are the first component's; of the first r of the others floor(r w2 / (W - w1))
        are the second's, and so on. A pair is of one component, for a rank must hold both its samples, and samples of two components have
        no lane in common. Regular as it is, it needs no shuffling: which positions a rank takes follows from lanes, not from places in
        a batch, and each component's samples are shuffled by its own order.
        """
        rest = positions // 2
        component, pairs = np.full_like(positions, len(self.weights) - 1), rest
        undecided, total = np.ones(positions.shape, dtype=np.bool_), sum(self.weights)
        for c, weight in enumerate(self.weights[:-1]):
            before = _share(rest, weight, total)
            mine = undecided & (_share(rest + 1, weight, total) > before)
            component, pairs = np.where(mine, c, component), np.where(mine, before, pairs)
            undecided, rest, total = undecided & ~mine, rest - before, total - weight
        pairs = np.where(undecided, rest, pairs)
        return component, 2 * pairs + positions % 2

    def _position_of(self, component: int, count: Int64) -> Int64:
        """The position that has so many of the component's before it: the inverse of `_components_at`."""
        pair, second = np.divmod(count, 2)
        totals = [sum(self.weights[c:]) for c in range(len(self.weights))]
        if component < len(self.weights) - 1:
            pair = -_share(-(pair + 1), totals[component], self.weights[component]) - 1
        for c in reversed(range(component)):
            pair = _share(pair, totals[c], totals[c] - self.weights[c])
        return 2 * pair + second

    def _make_epoch_order(self, component: int, epoch: int) -> "EpochOrder":
        # The first component keeps the run's seed, so that a run of one dataset has the order that it always had.
        seed = int(keyed.key(Purpose.COMPONENT, self.seed, component)) if component else self.seed
        return EpochOrder(self.components[component], seed, epoch, self.lanes, self.window)

    def __reduce__(self) -> tuple[object, ...]:
        return RunOrder, (self.components, self._asked_weights, self.seed, self.lanes, self.window)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers with the same proportions, as decimals are written: (0.1, 0.3) are (1, 3).

    Their sum is kept below 3,037,000,000, so that 64 bits suffice for every position: proportions of more digits are rounded.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights {', '.join(map(str, weights)) or 'of no dataset'} must all be numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = Fraction(math.lcm(*(weight.denominator for weight in exact)), math.gcd(*(weight.numerator for weight in exact)))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > _MAX_WEIGHT:
        whole = [max(1, weight * _MAX_WEIGHT // total) for weight in whole]
    return tuple(whole)


def _share(count: Int64, weight: int, total: int) -> Int64:
    """floor(count * weight / total), exactly, without a product over 64 bits."""
    whole, rest = np.divmod(count, total)
    share: Int64 = whole * weight + rest * weight // total
    return share


def _golden_stride(length: int) -> int:
    """The number prime to `length` next above its golden section: multiples of it modulo `length` fall far from each other."""
    return next(stride for stride in itertools.count(max(1, round(length * 0.618))) if math.gcd(stride, length) == 1)


def dealt_together(share: int) -> int:
    """Positions that always go to the same rank: pairs, where its share is even; a step begins at a multiple of the batch, so with one."""
    return 2 if share % 2 == 0 else 1


def _deal(preferred: Int64, room: int, world_size: int) -> Int64:
    """The rank of each thing that is dealt: the one that it prefers, where that has room; equally many to each."""
    order = np.argsort(preferred, kind="stable")
    wanted = np.bincount(preferred, minlength=world_size)
    turn = np.arange(len(preferred)) - np.repeat(np.cumsum(wanted) - wanted, wanted)  # among those that prefer the same rank
    ranks = preferred[order]
    ranks[turn >= room] = np.repeat(np.arange(world_size), np.maximum(room - wanted, 0))
    dealt = np.empty_like(ranks)
    dealt[order] = ranks
    return dealt


@dataclass(frozen=True)
class Lanes:
    """How the list of one epoch is cut: arithmetic of its length alone, whatever the order of its shards.

    Args:
        num_samples: N, the length of the list.
        lanes: L; the first N mod L of them hold one sample more.
        window: samples of a window.
    """

    num_samples: int
    lanes: int
    window: int

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes={self.lanes} and window={self.window} must both be at least 1")

    def window_at(self, positions: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """Lane, window number, and first place and length of the window that holds each position of the epoch."""
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_samples):
            raise IndexError(f"positions [{positions.min()}, {positions.max()}] leave the epoch's [0, {self.num_samples})")
        lane, place = positions % self.lanes, positions // self.lanes
        window, start, length = self.window_of(lane, place)
        return lane, window, start, length

    def window_of(self, lane: Int64, place: Int64) -> tuple[Int64, Int64, Int64]:
        """Number, first place and length of the window that holds each place of a lane.

        First windows differ in length from lane to lane, so that readers do not have to fill all of them in the same step.
        """
        head = self._first_window(lane)
        window = np.where(place < head, 0, 1 + (place - head) // self.window)
        start = np.where(window == 0, 0, head + (window - 1) * self.window)
        length = np.minimum(np.where(window == 0, head, self.window), self.lane_size(lane) - start)
        return window, start, length

    def window_start(self, lane: int, window: int) -> int:
        """The first place of a window of a lane."""
        return int(self._first_window(np.asarray(lane))) + (window - 1) * self.window if window else 0

    def _first_window(self, lane: Int64) -> Int64:
        """How many samples a lane's first window holds, where the lane is that long."""
        return np.full_like(lane, self.window) if self.lanes == 1 else 1 + lane * self.window // self.lanes

    def windows_in(self, lane: int) -> int:
        """How many windows a lane has."""
        size = int(self.lane_size(np.asarray(lane)))
        return int(self.window_of(np.asarray(lane), np.asarray(size - 1))[0]) + 1 if size else 0

    def lane_first(self, lane: Int64) -> Int64:
        """Where a lane starts in the list."""
        share, extra = divmod(self.num_samples, self.lanes)
        return lane * share + np.minimum(lane, extra)

    def lane_size(self, lane: Int64) -> Int64:
        """How many samples a lane holds."""
        share, extra = divmod(self.num_samples, self.lanes)
        return share + (lane < extra)

    def lane_of(self, index: Int64) -> Int64:
        """The lane that holds each place of the list."""
        share, extra = divmod(self.num_samples, self.lanes)
        longer = extra * (share + 1)  # places in lanes that hold one sample more
        return np.where(index < longer, index // (share + 1), extra + (index - longer) // max(1, share))


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order.

    Args:
        shard_sizes: samples in each shard, in the manifest's order; samples are numbered through in that order.
        seed: of the run.
        epoch: from 0.
        lanes: L; fixed for a run.
        window: samples shuffled together; fixed for a run.
    """

    shard_sizes: Int64
    seed: int
    epoch: int
    lanes: int
    window: int
    _geometry: Lanes = field(init=False, repr=False, compare=False)
    _first: Int64 = field(init=False, repr=False, compare=False)  # number of the first sample of each shard, in this epoch's order
    _starts: Int64 = field(init=False, repr=False, compare=False)  # where each shard starts in the list, then N

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        if sizes.sum() == 0:
            raise ValueError(f"the dataset's {len(sizes)} shards hold no samples; at least one is needed")
        object.__setattr__(self, "_geometry", Lanes(int(sizes.sum()), self.lanes, self.window))
        shards = keyed.permute(np.arange(len(sizes)), len(sizes), keyed.key(Purpose.SHARD_ORDER, self.seed, self.epoch))
        object.__setattr__(self, "_first", (np.cumsum(sizes) - sizes)[shards])
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(sizes[shards])]))

    def __len__(self) -> int:
        return self._geometry.num_samples

    def samples_at(self, positions: npt.ArrayLike) -> Int64:
        """Numbers of the samples at positions in [0, N) of the epoch."""
        positions = np.asarray(positions, dtype=np.int64)
        lane, window, start, length = self._geometry.window_at(positions)
        shuffled = keyed.permute(positions // self.lanes - start, length, self._window_key(lane, window))
        return self._list_to_sample(self._geometry.lane_first(lane) + start + shuffled)

    def positions_of(self, samples: Int64) -> Int64:
        """The positions of the epoch at which samples stand: the inverse of `samples_at`."""
        filled = np.flatnonzero(np.diff(self._starts))
        filled = filled[np.argsort(self._first[filled])]
        nth = filled[np.searchsorted(self._first[filled], samples, side="right") - 1]
        index = self._starts[nth] + samples - self._first[nth]
        lane = self._geometry.lane_of(index)
        place = index - self._geometry.lane_first(lane)
        window, start, length = self._geometry.window_of(lane, place)
        unshuffled = keyed.unpermute(place - start, length, self._window_key(lane, window))
        return (start + unshuffled) * self.lanes + lane

    def window_runs(self, lane: int, window: int) -> list[tuple[int, int]]:
        """The number of the first sample and the count of each stretch of a window, one for each shard that it touches, as listed."""
        start = self._geometry.window_start(lane, window)
        if not (0 <= lane < self.lanes and window >= 0 and start < int(self._geometry.lane_size(np.asarray(lane)))):
            raise IndexError(f"an epoch of {len(self)} samples in {self.lanes} lanes has no window {window} in lane {lane}")
        _, _, _, length = (int(v) for v in self._geometry.window_at(np.asarray(start * self.lanes + lane)))
        first = int(self._geometry.lane_first(np.asarray(lane))) + start
        runs, end = [], first + length
        nth = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < end:
            until = min(end, int(self._starts[nth + 1]))
            if until > first:  # an empty shard holds nothing
                runs.append((int(self._first[nth]) + first - int(self._starts[nth]), until - first))
            first, nth = until, nth + 1
        return runs

    def substitutes(self, position: int) -> Iterator[int]:
        """The samples that may stand in for an unusable one at a position, in the order in which they are tried; without end.

        Places of the same window, drawn by (seed, epoch, position, attempt); after eight of them of the lane's next window, and so on; when
        all windows of the lane have been tried, of the next lane's.
        """
        lane, _, start, length = (int(v) for v in self._geometry.window_at(np.asarray(position, dtype=np.int64)))
        first = start
        for attempt in itertools.count():
            if attempt and attempt % 8 == 0:
                start = start + length if start + length < int(self._geometry.lane_size(np.asarray(lane))) else 0
                if start == first:
                    lane, first, start = (lane + 1) % min(self.lanes, len(self)), 0, 0
                _, _, start, length = (int(v) for v in self._geometry.window_at(np.asarray(start * self.lanes + lane)))
            draw = keyed.key(Purpose.SUBSTITUTE, self.seed, self.epoch, position, attempt)
            yield int(self.samples_at((start + int(draw % np.uint64(length))) * self.lanes + lane))

    def _window_key(self, lane: Int64, window: Int64) -> keyed.UInt64:
        return keyed.key(Purpose.WINDOW, self.seed, self.epoch, lane, window)

    def _list_to_sample(self, index: Int64) -> Int64:
        nth = np.searchsorted(self._starts, index, side="right") - 1
        samples: Int64 = self._first[nth] + index - self._starts[nth]
        return samples
