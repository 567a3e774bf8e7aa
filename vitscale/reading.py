"""How a rank's bytes come in: whole windows in one read each, ahead of their use, or sample by sample.

Where it stands: `stream.py` tells which samples a micro-batch holds when it begins it, `prefetch` micro-batches before it is used; what it
gets back is where each sample's bytes will be. Workers check them and decode.

- *Windows*: neighbours in a lane lie side by side in the tars (`order.py`), so a window is one read of some MB for each shard it touches,
  kind to shared file systems and object stores. When a rank begins a window, the next one of that lane is asked for. A rank reads the
  windows of its own lanes; a sample of another's lane, dealt to it because numbers do not divide, it reads alone.
- *Samples*: a read each; from a disk by the worker that decodes it, from object storage many at once, ahead.

A read that a file system refuses is tried again some times, and then ends the run in one line: it is the machine's fault, not the sample's,
and which samples a run sees must not depend on it. Object storage tries again by itself (`data_tools/storage.py`).

Invariants: of each lane the window in use, the next one, and those that micro-batches in the making need are held; a stretch is read once;
what cannot be read raises when a sample needs it.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from data_tools.errors import UserError
from vitscale.mixture import Mixture
from vitscale.order import Int64, RunOrder
from vitscale.workers import Shared, WorkerPool

_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENOTCONN, errno.EMFILE,
    errno.ENFILE,
}  # fmt: skip
_WAITS = (0.5, 2.0, 8.0)  # seconds before an error of the kinds above is believed

_SMALL = 1 << 20  # bytes that go to a process with its task, where more is shared with it
_SLACK = 1 << 20  # bytes that a stretch may have beyond twice its images: other members, or an index that is damaged

Bool = npt.NDArray[np.bool_]
R = TypeVar("R")


class ReadError(UserError):
    """Bytes that cannot be read; the message is one line for the user."""


class Stored(NamedTuple):
    """Bytes that worker processes share with this one."""

    path: str
    start: int
    size: int


Bytes = bytes | memoryview | Stored | None
"""Where a worker finds a sample's bytes; None: it reads the dataset itself."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of one tar that are read at once: those of `count` samples from `first`."""

    first: int
    count: int
    starts: Int64
    """Where in the stretch each sample's bytes begin."""
    sizes: Int64
    shard: str
    data: Future[bytes | Shared]


@dataclass(frozen=True)
class Awaited:
    """One sample's bytes, to be had when their stretch is read."""

    stretch: Stretch
    number: int

    def bytes(self) -> Bytes:
        """Raises what reading raised."""
        data, start, size = self.stretch.data.result(), int(self.stretch.starts[self.number]), int(self.stretch.sizes[self.number])
        if isinstance(data, Shared):
            return Stored(data.path, start, size)
        return data if size == len(data) else memoryview(data)[start : start + size]


def load(data: Bytes) -> bytes | memoryview | None:
    """A sample's bytes, in the worker that is to decode them."""
    if not isinstance(data, Stored):
        return data
    file = os.open(data.path, os.O_RDONLY)
    try:
        return os.pread(file, data.size, data.start)
    finally:
        os.close(file)


def read(dataset: Mixture, shard: int, start: int, end: int) -> bytes:
    """A stretch of a tar. Raises ReadError or StorageError."""
    return tried(lambda: dataset.read_range(shard, start, end), dataset, shard)


def tried(action: Callable[[], R], dataset: Mixture, shard: int) -> R:
    """What an action that reads a tar gives, tried again where a file system's mood may pass. Raises ReadError."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except OSError as error:
            if wait is None or error.errno not in _PASSING:
                mend = "the same command goes on when it can be"
                if error.errno == errno.ENOENT:
                    mend = (
                        "`vitscale data repair` makes a tar again, `vitscale data overlay` gives up its samples; the same command goes on"
                    )
                raise ReadError(f"{dataset.tar_of(shard)} cannot be read ({error.strerror or error}); {mend}") from None
            time.sleep(wait * random.uniform(0.5, 1))
    raise AssertionError("the last attempt returns or raises")


class Reader:
    """Reads for one rank.

    Args:
        order: whose windows are read; with None samples are.
        is_own: for each of (n,) positions whether this rank reads its window whole.
        shared: for worker processes.
        threads: that read.
    """

    def __init__(
        self, dataset: Mixture, order: RunOrder | None, is_own: Callable[[Int64], Bool], *, shared: bool, threads: int
    ) -> None:  # fmt: skip
        self._dataset, self._order, self._is_own, self._shared = dataset, order, is_own, shared
        self._pool: WorkerPool | None = None  # begun with the first read: of samples on a disk there is none
        self._threads = threads
        self._lanes: dict[tuple[int, int], dict[tuple[int, int], list[Stretch]]] = {}  # component, lane: epoch, window: its stretches

    def start(self, positions: Int64, samples: Int64) -> list[Awaited | None]:
        """Begins to read, and tells where the bytes of each sample will be; None where the worker is to read them."""
        found: list[Awaited | None] = [None] * len(samples)
        if self._order is not None:
            windows = self._order.windows_at(positions)
            own = np.flatnonzero(self._is_own(positions))
            for window in np.unique(windows[own], axis=0):
                places = own[(windows[own] == window).all(axis=1)]
                _assign(found, samples, places, self._window(self._order, *window.tolist()))
        alone = np.array([i for i, where in enumerate(found) if where is None], np.int64)
        remote = alone[self._dataset.is_remote(samples[alone])]
        _assign(found, samples, remote, self._stretches(np.unique(samples[remote])))
        return found

    def close(self) -> None:
        """Begins no more reads."""
        if self._pool is not None:
            self._pool.close()

    def _window(self, order: RunOrder, component: int, epoch: int, lane: int, window: int) -> list[Stretch]:
        """The stretches of a window that is in use now; the next one of its lane is begun, and those before it are let go."""
        held = self._lanes.setdefault((component, lane), {})
        last = window + 1 == order.windows_in(component, lane)
        for one in ((epoch, window), (epoch + 1, 0) if last else (epoch, window + 1)):
            if one not in held:
                runs = order.window_runs(component, one[0], lane, one[1])
                held[one] = self._stretches(np.concatenate([np.arange(first, first + count) for first, count in runs]))
        for past in [one for one in held if one < (epoch, window)]:
            del held[past]
        return held[epoch, window]

    def _stretches(self, samples: Int64) -> list[Stretch]:
        """Neighbours among the samples become one stretch, whose read is begun."""
        if not len(samples):
            return []
        located = self._dataset.locate(samples)
        cuts = np.flatnonzero((np.diff(samples) != 1) | (np.diff(located.shards) != 0)) + 1
        stretches = []
        for places in np.split(np.arange(len(samples)), cuts):
            offsets, sizes = located.offsets[places], located.sizes[places]
            start, end = int(offsets.min()), int(max(offsets.max(), (offsets + sizes).max()))  # a sum may be over 64 bits, and negative
            if start < 0 or sizes.min() < 0 or end - start > 2 * int(sizes.sum()) + _SLACK:
                continue  # each is read alone, and judged by who reads it
            first, shard = int(samples[places[0]]), int(located.shards[places[0]])
            self._pool = self._pool or WorkerPool(self._read, self._threads)
            data = self._pool.submit(partial(tuple, (shard, start, end)))
            stretches.append(Stretch(first, len(places), offsets - start, sizes, self._dataset.shard_of(first), data))
        return stretches

    def _read(self, shard: int, start: int, end: int) -> bytes | Shared:
        data = read(self._dataset, shard, start, end)
        if not self._shared or len(data) < _SMALL:
            return data
        shared = Shared(len(data))
        shared.array()[:] = np.frombuffer(data, np.uint8)
        return shared


def _assign(found: list[Awaited | None], samples: Int64, places: Int64, stretches: Iterable[Stretch]) -> None:
    """Tells each of the places in which stretch its sample lies."""
    for stretch in stretches:
        numbers = samples[places] - stretch.first
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if 0 <= number < stretch.count:
                found[place] = Awaited(stretch, number)
