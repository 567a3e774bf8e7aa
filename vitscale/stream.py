"""The stream of batches: positions of the run -> samples of the tar shards -> decoded, augmented micro-batches.

    order.py    which sample stands at a position, and which positions are this rank's
    reading.py  its bytes: whole windows ahead, or sample by sample
    decoding.py checked, decoded, cropped, resized and augmented (images.py), or replaced by a substitute
    workers.py  in threads or processes, several micro-batches ahead
    here        all of it put together, and the labels

A batch is a pure function of the config and `samples_seen`: not of ranks, of threads or processes, or of how often the run was stopped. A
sample that cannot be used is replaced by the substitute that the order names and written to quarantine.jsonl; one that an overlay removes
is replaced in silence. Evaluation leaves both out, and counts them.

Axes: B batch, H height, W width, C channels, L labels of a sample.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from data_tools.dataset import Located
from data_tools.errors import UserError
from vitscale import keyed
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.decoding import Decoded, Decoder, Task, View, kept_candidates
from vitscale.guards import is_skipped
from vitscale.locality import run_locality
from vitscale.metrics import counted
from vitscale.mixture import Mixture
from vitscale.order import MAX_DRAWS, Int64, RunOrder
from vitscale.pixels import path_in_use
from vitscale.quarantine import Quarantine
from vitscale.reading import Awaited, Reader
from vitscale.timeline import Timeline
from vitscale.workers import Rows, WorkerPool, chunks, worker_count

T = TypeVar("T")
_BLOCK = 2**20  # samples that evaluation looks through at once


class StreamError(UserError):
    """The stream cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch, on the CPU."""

    images_BHWC: npt.NDArray[np.uint8]
    labels_BL: npt.NDArray[np.int32]
    """Padded with -1."""
    scores_BL: npt.NDArray[np.float32]
    keys_B: npt.NDArray[np.int64]
    """A key a sample, from which everything random about it is drawn."""
    valid_B: npt.NDArray[np.bool_]
    """False where evaluation has no sample, so that all ranks see equally many batches."""
    samples_B: npt.NDArray[np.int64]
    """Numbers of the samples."""


@dataclass(frozen=True)
class Share:
    """Which part of each step is a rank's."""

    timeline: Timeline
    rank: int = 0
    world_size: int = 1


class TrainStream:
    """A rank's share of the training batches.

    Args:
        dataset: the training split, or several.
        config: lanes and window must be chosen (above 0).
        seed: of the run.
        quarantine: the file that unusable samples are appended to, a line of JSON each.
        weights: of several datasets; none: as many samples of each as it has.
    """

    cursor = 0
    """Nothing beside `samples_seen` tells where it is; of tars without an index something does (`foreign.ForeignStream`)."""

    def __init__(
        self, dataset: Mixture, preprocess: PreprocessConfig, config: StreamConfig, share: Share, *, seed: int, quarantine: Path,
        weights: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        self.order = RunOrder(
            [component.shard_sizes for component in dataset.components], weights or None, seed, config.lanes, config.window
        )
        self.seed, self.share = seed, share
        self._dataset, self._config = dataset, config
        self.locality = run_locality(dataset.size, config, share.timeline, share.world_size)
        view = View(preprocess, config.decode, training=True)
        self._decoder = Decoder(dataset, view, self.order, attempts=config.max_unusable + 1)
        self._quarantine = Quarantine(quarantine, share.rank, max_samples=config.max_unusable, max_per_shard=config.max_unusable_per_shard)

    def epoch(self, samples_seen: int) -> float:
        """Passes over the data."""
        return samples_seen / self._dataset.num_samples

    def micro_batches(self, samples_seen: int, end: int | None = None, skipped: Sequence[tuple[int, int]] = ()) -> Iterator[Batch]:
        """Micro-batches of this rank from `samples_seen` on, in order, up to `end` (a whole number of steps) or without end.

        Steps whose positions lie in one of the half-open ranges `skipped` are left out.

        Raises QuarantineError or StreamError where too many samples are unusable, ReadError or StorageError where they cannot be read,
        WorkerError where a worker dies.
        """
        reader = Reader(
            self._dataset, self.order if self.locality.reads == "windows" else None, self._prefers,
            shared=self._config.processes, threads=self._config.read_threads,
        )  # fmt: skip
        return _prepare_ahead(self._jobs(samples_seen, end, skipped), self._decoder, reader, self._config, self._quarantine)

    def unusable(self) -> int:
        """Distinct samples that could not be used so far, in the whole run."""
        return self._quarantine.count()

    def describe(self) -> str:
        """How a rank reads and decodes, and the memory that it takes for it, in a line."""
        largest = max(span.micro_batch_size * math.prod(span.image_size) * 3 for span in self.share.timeline.spans)
        batches = (self._config.prefetch + 2) * largest
        kind = "process" if self._config.processes else "thread"
        reads = f"one by one ({self.locality.why})" if self.locality.why else f"in windows of {self.locality.window_bytes / 1e6:,.1f} MB"
        return (
            f"samples are read {reads}; {counted(worker_count(self._config.workers), kind)} a rank, decoding {self._config.decode} by "
            f"{path_in_use()}; in memory a rank at most {self.locality.buffered_bytes_per_rank / 1e6:,.0f} MB of what was read and "
            f"{batches / 1e6:,.0f} MB of batches"
        )

    def _jobs(self, samples_seen: int, end: int | None, skipped: Sequence[tuple[int, int]]) -> Iterator[_Job]:
        share = self.share
        while end is None or samples_seen < end:
            span = share.timeline.at(samples_seen)
            begin, samples_seen = samples_seen, samples_seen + span.global_batch_size
            if is_skipped(begin, skipped):
                continue
            taken = self.order.positions_of_rank(begin, span.global_batch_size, share.rank, share.world_size)
            for positions in taken.reshape(-1, span.micro_batch_size):
                samples = self.order.samples_at(positions)
                for i in np.flatnonzero(self._dataset.removed(samples)).tolist():
                    samples[i] = self._kept_instead(int(positions[i]))
                yield _Job(positions, samples, keyed.key(keyed.Purpose.SAMPLE, self.seed, positions), span.image_size)

    def _prefers(self, positions: Int64) -> npt.NDArray[np.bool_]:
        """Whether this rank reads the window of each of a micro-batch's positions whole."""
        batch = self.share.timeline.at(int(positions[0])).global_batch_size
        own: npt.NDArray[np.bool_] = self.order.preferred_ranks(positions, batch, self.share.world_size) == self.share.rank
        return own

    def _kept_instead(self, position: int) -> int:
        """The first candidate for a position that no overlay removes."""
        for sample in kept_candidates(self.order, self._dataset, position):
            return sample
        raise StreamError(
            f"all of the {MAX_DRAWS} samples drawn for position {position} are removed or held out; too little of the dataset is left"
        )


def evaluation_batches(
    dataset: Mixture, image_size: tuple[int, int], preprocess: PreprocessConfig, config: StreamConfig, *, batch_size: int, rank: int,
    world_size: int,
) -> Iterator[Batch]:  # fmt: skip
    """A rank's share of the whole dataset, each sample that is not removed exactly once over all ranks.

    Ranks share out whole batches, so that a batch has the same samples in every world size, and a model the same results for it to the last
    bit. All ranks see equally many batches; where a rank has no sample, or one that cannot be used, `valid_B` is False.
    """
    per_rank = -(-dataset.num_kept // (batch_size * world_size)) * batch_size
    kept = _kept_samples(dataset, rank * per_rank, (rank + 1) * per_rank)

    def jobs() -> Iterator[_Job]:
        for _ in range(0, per_rank, batch_size):
            samples = np.fromiter(itertools.chain(itertools.islice(kept, batch_size), itertools.repeat(-1)), np.int64, batch_size)
            yield _Job(samples, samples, np.zeros(batch_size, dtype=np.uint64), image_size)

    reader = Reader(
        dataset, None, lambda positions: np.zeros(len(positions), np.bool_), shared=config.processes, threads=config.read_threads
    )
    return _prepare_ahead(jobs(), Decoder(dataset, View(preprocess, "exact", training=False), None), reader, config, None)


def _kept_samples(dataset: Mixture, first: int, end: int) -> Iterator[int]:
    """The samples that are not removed, from the `first` of them up to the `end`, counted from 0; memory takes a block."""
    passed = 0
    for start in range(0, dataset.num_samples, _BLOCK):
        if passed >= end:
            return
        block = np.arange(start, min(start + _BLOCK, dataset.num_samples), dtype=np.int64)
        block = block[~dataset.removed(block)]
        yield from block[max(0, first - passed) : max(0, end - passed)].tolist()
        passed += len(block)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Ahead of time and in parallel
# ---------------------------------------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A micro-batch to be made."""

    positions: Int64
    samples: Int64
    """-1: there is none."""
    keys: keyed.UInt64
    image_size: tuple[int, int]


class _Begun(NamedTuple):
    """A micro-batch in the making."""

    job: _Job
    rows: Rows
    reads: list[Awaited | None]
    chunks: list[Future[Decoded]]


def _prepare_ahead(
    jobs: Iterator[_Job], decoder: Decoder, reader: Reader, config: StreamConfig, quarantine: Quarantine | None
) -> Iterator[Batch]:
    """Batches in the order of the jobs, `prefetch` of them in the making while one is used."""
    pool = WorkerPool(decoder, worker_count(config.workers), processes=config.processes)
    try:
        begun = ahead((_begin(job, decoder, reader, pool, config) for job in jobs), config.prefetch)
        yield from map(partial(_finish, decoder.dataset, pool, config, quarantine), begun)
    finally:
        pool.close()
        reader.close()


def ahead(begun: Iterable[T], count: int) -> Iterator[T]:
    """Each of what is begun, once `count` more have been; nothing that was given is kept."""
    waiting: deque[T] = deque()
    for newest in begun:
        waiting.append(newest)
        del newest  # or the last one would be kept by its name
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _begin(job: _Job, decoder: Decoder, reader: Reader, pool: WorkerPool, config: StreamConfig) -> _Begun:
    """Has a micro-batch's bytes read, and each of its chunks decoded once they are there."""
    size, there = len(job.samples), np.flatnonzero(job.samples >= 0)
    begun = _Begun(job, Rows.new((size, *job.image_size, 3), shared=config.processes), [None] * size, [])
    for i, awaited in zip(there.tolist(), reader.start(job.positions[there], job.samples[there]), strict=True):
        begun.reads[i] = awaited
    located = decoder.dataset.locate(np.maximum(job.samples, 0))
    for first, end in chunks(size, worker_count(config.workers)):
        stretches = {id(awaited.stretch): awaited.stretch.data for awaited in begun.reads[first:end] if awaited}
        task = partial(_task, job, begun.reads[first:end], begun.rows.part(first, end), located, slice(first, end), config.processes)
        begun.chunks.append(pool.submit(task, after=list(stretches.values())))
    return begun


def _task(
    job: _Job, reads: list[Awaited | None], rows: Rows, located: Located, part: slice, processes: bool
) -> tuple[Task, Rows]:  # fmt: skip
    """What a worker is to do with a part of a micro-batch whose bytes have been read. Raises what reading them raised."""
    data = [awaited.bytes() if awaited else None for awaited in reads]
    if processes:
        data = [bytes(found) if isinstance(found, memoryview) else found for found in data]
    where = Located(*(column[part] for column in located))
    return Task(job.positions[part], job.samples[part], job.keys[part], where, data), rows


def _finish(dataset: Mixture, pool: WorkerPool, config: StreamConfig, quarantine: Quarantine | None, begun: _Begun) -> Batch:
    """The batch, once all its chunks are done."""
    done = pool.results(begun.chunks, config.read_timeout, lambda: stalled(_waited_for(begun, dataset), config.read_timeout))
    if quarantine and (faults := [fault for decoded in done for fault in decoded.faults]):
        quarantine.add(faults)
    if given_up := next((decoded.given_up for decoded in done if decoded.given_up), ""):
        raise StreamError(f"{given_up}; quarantine.jsonl names them")
    valid_B = np.concatenate([decoded.valid for decoded in done])
    samples_B = np.where(valid_B, np.concatenate([decoded.samples for decoded in done]), 0)
    labels_BL, scores_BL = dataset.labels(samples_B)
    return Batch(begun.rows.array, labels_BL, scores_BL, begun.job.keys.view(np.int64), valid_B, samples_B)


def stalled(what: str, timeout: float) -> StreamError:
    """The error of a stream that has waited too long for something."""
    return StreamError(
        f"{what} has not ended for stream.read_timeout={timeout:g} seconds; is the storage still there? The same command goes on when it is"
    )


def _waited_for(begun: _Begun, dataset: Mixture) -> str:
    """What a micro-batch is not done without."""
    shards = {awaited.stretch.shard for awaited in begun.reads if awaited and not awaited.stretch.data.done()}
    work = "reading" if shards else "reading or decoding"
    shards = shards or {dataset.shard_of(sample) for sample in begun.job.samples[begun.job.samples >= 0].tolist()}
    return f"{work} {', '.join(sorted(shards)[:3])}{' and others' if len(shards) > 3 else ''}"
