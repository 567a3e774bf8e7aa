"""The clock and the order of samples: which sample stands at which position, and which positions a rank takes in a step.

`samples_seen` is the one clock of a run. Every position of an epoch names one sample, and the name depends on nothing but the arguments of
`EpochOrder`: not on ranks, workers or batch sizes. The shards in a keyed random order are read as one long list; the list is cut into
lanes, lanes into windows, and each window is shuffled inside. Position p of an epoch is lane p mod L, place p div L.

Invariants: `samples_at` is a bijection from positions [0, N) onto samples [0, N); neighbours in a lane lie in the same window, and a window
is one contiguous stretch of the list; no array is as long as an epoch. Reading the samples is `stream.py`'s business.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vitscale import keyed
from vitscale.keyed import Purpose

Int64 = npt.NDArray[np.int64]


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
    _first: Int64 = field(init=False, repr=False, compare=False)  # number of the first sample of each shard, in this epoch's order
    _starts: Int64 = field(init=False, repr=False, compare=False)  # where each shard starts in the list, then N

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        if sizes.sum() == 0:
            raise ValueError(f"the dataset's {len(sizes)} shards hold no samples; at least one is needed")
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes={self.lanes} and window={self.window} must both be at least 1")
        shards = keyed.permute(np.arange(len(sizes)), len(sizes), keyed.key(Purpose.SHARD_ORDER, self.seed, self.epoch))
        object.__setattr__(self, "_first", (np.cumsum(sizes) - sizes)[shards])
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(sizes[shards])]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def samples_at(self, positions: npt.ArrayLike) -> Int64:
        """Numbers of the samples at positions in [0, N) of the epoch."""
        positions = np.asarray(positions, dtype=np.int64)
        lane, window, start, length = self._window_at(positions)
        shuffled = keyed.permute(positions // self.lanes - start, length, keyed.key(Purpose.WINDOW, self.seed, self.epoch, lane, window))
        return self._list_to_sample(self._lane_first(lane) + start + shuffled)

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """The (position, sample) pairs that may stand in for an unusable sample, in the order in which they are tried; without end.

        Places of the same window, drawn by (seed, epoch, position, attempt); after eight of them of the lane's next window, and so on; when
        all windows of the lane have been tried, of the next lane's.
        """
        lane, _, start, length = (int(v) for v in self._window_at(np.asarray(position, dtype=np.int64)))
        first = start
        for attempt in itertools.count():
            if attempt and attempt % 8 == 0:
                start = start + length if start + length < int(self._lane_size(np.asarray(lane))) else 0
                if start == first:
                    lane, first, start = (lane + 1) % min(self.lanes, len(self)), 0, 0
                _, _, start, length = (int(v) for v in self._window_at(np.asarray(start * self.lanes + lane)))
            draw = keyed.key(Purpose.SUBSTITUTE, self.seed, self.epoch, position, attempt)
            stand_in = (start + int(draw % np.uint64(length))) * self.lanes + lane
            yield stand_in, int(self.samples_at(stand_in))

    def _window_at(self, positions: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """Lane, window number, and first place and length of the window that holds each position.

        First windows differ in length from lane to lane, so that readers do not have to fill all of them in the same step.
        """
        if positions.size and (positions.min() < 0 or positions.max() >= len(self)):
            raise IndexError(f"positions [{positions.min()}, {positions.max()}] leave the epoch's [0, {len(self)})")
        lane, place = positions % self.lanes, positions // self.lanes
        head = np.full_like(lane, self.window) if self.lanes == 1 else 1 + lane * self.window // self.lanes
        window = np.where(place < head, 0, 1 + (place - head) // self.window)
        start = np.where(window == 0, 0, head + (window - 1) * self.window)
        length = np.minimum(np.where(window == 0, head, self.window), self._lane_size(lane) - start)
        return lane, window, start, length

    def _lane_first(self, lane: Int64) -> Int64:
        """Where a lane starts in the list; the first N mod L lanes hold one sample more."""
        share, extra = divmod(len(self), self.lanes)
        return lane * share + np.minimum(lane, extra)

    def _lane_size(self, lane: Int64) -> Int64:
        share, extra = divmod(len(self), self.lanes)
        return share + (lane < extra)

    def _list_to_sample(self, index: Int64) -> Int64:
        nth = np.searchsorted(self._starts, index, side="right") - 1
        samples: Int64 = self._first[nth] + index - self._starts[nth]
        return samples


def positions_of_rank(samples_seen: int, global_batch_size: int, rank: int, world_size: int, num_samples: int, lanes: int) -> Int64:
    """The positions of the run, counted through all epochs, that a rank takes in the step at `samples_seen`.

    All ranks' together are [samples_seen, samples_seen + global_batch_size), equally many each. Where the numbers divide and the step does
    not cross the end of an epoch, a rank takes the lanes that are its own and so reads its own shards.
    """
    share = global_batch_size // world_size
    first = samples_seen % num_samples
    if lanes % world_size == 0 and global_batch_size % lanes == 0 and first + global_batch_size <= num_samples:
        batch: Int64 = np.arange(samples_seen, samples_seen + global_batch_size, dtype=np.int64)
        mine: Int64 = batch[batch % num_samples % lanes // (lanes // world_size) == rank]
        return mine
    start = samples_seen + rank * share
    return np.arange(start, start + share, dtype=np.int64)
