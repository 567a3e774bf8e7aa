"""The stream of batches: positions of the run -> samples of the tar shards -> decoded, augmented micro-batches.

    order.py    which sample stands at a position, and which positions are this rank's
    reading.py  its bytes: whole windows ahead, or sample by sample
    images.py   what is done to them: decoded, cropped, resized, augmented
    workers.py  threads or processes that do it, several micro-batches ahead
    here        all of it put together, substitutes for what cannot be used, labels

A batch is a pure function of the config and `samples_seen`: not of ranks, of threads or processes, or of how often the run was stopped. A
sample that cannot be used is replaced by the substitute that the order names and written to quarantine.jsonl; one that an overlay removes
is replaced in silence. Evaluation leaves both out, and counts them.

Axes: B batch, H height, W width, C channels, L labels of a sample.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.dataset import Located, SampleError
from data_tools.errors import UserError
from vitscale import images, keyed
from vitscale.config import Decode, PreprocessConfig, StreamConfig
from vitscale.locality import Size, locality
from vitscale.metrics import counted
from vitscale.mixture import Mixture
from vitscale.order import Int64, RunOrder
from vitscale.pixels import Pixels, path_in_use
from vitscale.quarantine import Fault, Quarantine
from vitscale.reading import Awaited, Bytes, Reader, load, read
from vitscale.workers import Rows, WorkerPool

_ATTEMPTS = 64  # samples read for one position
_DRAWS = 2**16  # and drawn for it: those that an overlay removes cost no reading, and a shard that is lost has thousands
_CHUNK = 16  # samples that a worker gets at once, at most: enough that handing them over costs nothing
_LOOK_EVERY = 0.5  # seconds between looks at whether a worker has died, while waiting for another one

# What decoding damaged bytes raises.
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
R = TypeVar("R")


class StreamError(UserError):
    """The data cannot carry the run any further; the message is one line for the user."""


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


class TrainStream:
    """A rank's share of the training batches.

    Args:
        dataset: the training split, or several.
        image_size: height and width in pixels.
        config: lanes and window must be chosen (above 0).
        weights: of several datasets; none: as many samples of each as it has.
        seed: of the run.
        global_batch_size, micro_batch_size, rank, world_size: how the work is split.
        quarantine: the file that unusable samples are appended to, a line of JSON each.
    """

    def __init__(
        self, dataset: Mixture, image_size: tuple[int, int], preprocess: PreprocessConfig, config: StreamConfig, *, seed: int,
        global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, quarantine: Path, weights: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        self.order = RunOrder([of.shard_sizes for of in dataset.components], weights or None, seed, config.lanes, config.window)
        self.seed, self.global_batch_size, self.micro_batch_size, self.rank, self.world_size = (
            seed, global_batch_size, micro_batch_size, rank, world_size,
        )  # fmt: skip
        self._dataset, self._config = dataset, config
        shards = sum(len(of.shard_names) for of in dataset.components)
        self.locality = locality(
            Size(dataset.num_samples, shards, dataset.num_bytes, len(dataset.components), remote=not dataset.is_local), config,
            global_batch_size=global_batch_size, world_size=world_size, images_per_second_per_rank=1.0,
        )  # fmt: skip
        self._maker = Maker(dataset, self.order, image_size, preprocess, config.decode)
        self._quarantine = Quarantine(quarantine, rank, max_samples=config.max_unusable, max_per_shard=config.max_unusable_per_shard)

    def epoch(self, samples_seen: int) -> float:
        """Passes over the data."""
        return samples_seen / self._dataset.num_samples

    def micro_batches(self, samples_seen: int, end: int | None = None) -> Iterator[Batch]:
        """Micro-batches of this rank from `samples_seen` on, in order, up to `end` (a whole number of steps) or without end.

        Raises QuarantineError or StreamError where too many samples are unusable, ReadError or StorageError where they cannot be read,
        WorkerError where a worker dies.
        """
        reader = Reader(
            self._dataset, self.order if self.locality.reads == "windows" else None,
            lambda positions: self.order.preferred_ranks(positions, self.global_batch_size, self.world_size) == self.rank,
            shared=self._config.processes, threads=self._config.read_threads,
        )  # fmt: skip
        return _prepare_ahead(self._jobs(samples_seen, end), self._maker, reader, self._config, self._quarantine)

    def describe(self) -> str:
        """How a rank reads and decodes, and the memory that it takes for it, in a line."""
        height, width = self._maker.image_size
        batches = (self._config.prefetch + 2) * self.micro_batch_size * height * width * 3
        kind = "process" if self._config.processes else "thread"
        reads = f"in windows of {self.locality.window_bytes / 1e6:,.1f} MB" if not self.locality.why else f"singly, as {self.locality.why}"
        return (
            f"samples are read {reads}; {counted(workers(self._config.workers), kind)} a rank, decoding {self._config.decode} by "
            f"{path_in_use()}; in memory a rank at most {self.locality.buffered_bytes_per_rank / 1e6:,.0f} MB of windows and "
            f"{batches / 1e6:,.0f} MB of batches"
        )

    def _jobs(self, samples_seen: int, end: int | None) -> Iterator[_Job]:
        while end is None or samples_seen < end:
            share = self.order.positions_of_rank(samples_seen, self.global_batch_size, self.rank, self.world_size)
            for positions in share.reshape(-1, self.micro_batch_size):
                samples = self.order.samples_at(positions)
                for i in np.flatnonzero(self._dataset.removed(samples)).tolist():
                    samples[i] = next(self._maker.candidates(int(positions[i]), int(samples[i])))
                yield _Job(positions, samples, keyed.key(keyed.Purpose.SAMPLE, self.seed, positions))
            samples_seen += self.global_batch_size


def evaluation_batches(
    dataset: Mixture, image_size: tuple[int, int], preprocess: PreprocessConfig, config: StreamConfig, *, batch_size: int, rank: int,
    world_size: int,
) -> Iterator[Batch]:  # fmt: skip
    """A rank's share of the whole dataset, each sample exactly once over all ranks.

    All ranks see equally many batches; where a rank has no sample, or one that cannot be used, `valid_B` is False.
    """
    per_rank = -(-dataset.num_samples // world_size)
    first, end = rank * per_rank, min((rank + 1) * per_rank, dataset.num_samples)

    def jobs() -> Iterator[_Job]:
        for start in range(first, first + per_rank, batch_size):
            samples = np.arange(start, start + batch_size, dtype=np.int64)
            samples[samples >= end] = -1
            samples[samples >= 0] = np.where(dataset.removed(samples[samples >= 0]), -1, samples[samples >= 0])
            yield _Job(samples, samples, np.zeros(batch_size, dtype=np.uint64))

    reader = Reader(
        dataset, None, lambda positions: np.zeros(len(positions), np.bool_), shared=config.processes, threads=config.read_threads
    )
    return _prepare_ahead(jobs(), Maker(dataset, None, image_size, preprocess, "exact"), reader, config, None)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a worker does
# ---------------------------------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Some samples of a micro-batch, as a worker gets them."""

    positions: Int64
    samples: Int64
    """-1: there is none."""
    keys: keyed.UInt64
    located: Located
    """Of the samples that there are."""
    data: list[Bytes]


class Made(NamedTuple):
    """What became of a chunk, its pixels apart."""

    samples: Int64
    """Those that were used."""
    valid: npt.NDArray[np.bool_]
    faults: list[Fault]
    given_up: str = ""
    """Why a position has no sample at all."""


class Maker:
    """Makes pixels of samples; all that a worker knows, and picklable.

    Args:
        order: names substitutes; None leaves out what cannot be used (evaluation).
    """

    def __init__(
        self, dataset: Mixture, order: RunOrder | None, image_size: tuple[int, int], preprocess: PreprocessConfig, decode: Decode
    ) -> None:
        self.dataset, self.order, self.image_size, self.preprocess, self.decode = dataset, order, image_size, preprocess, decode

    def __call__(self, chunk: Chunk, rows: Rows) -> Made:
        """Fills the rows."""
        samples, valid, faults, draws = chunk.samples.copy(), chunk.samples >= 0, [], images.draws(chunk.keys)
        for i in np.flatnonzero(valid).tolist():
            for attempt, (sample, data, located, row) in enumerate(self._tried(chunk, i)):
                reason = self._fill(sample, data, located, row, int(chunk.keys[i]), draws[i], rows.array[i])
                if reason is None:
                    samples[i] = sample
                    break
                faults.append(self._fault(int(chunk.positions[i]), sample, reason))
                if attempt == _ATTEMPTS - 1:
                    given_up = f"{_ATTEMPTS} samples tried for position {chunk.positions[i]} were all unusable"
                    return Made(samples, valid, faults, given_up)
            else:
                valid[i] = False
        rows.array[~valid] = 0
        return Made(samples, valid, faults)

    def candidates(self, position: int, sample: int) -> Iterator[int]:
        """The sample at a position and its substitutes, in the order in which they are tried, without those that overlays remove."""
        assert self.order is not None
        for drawn in itertools.islice(itertools.chain([sample], self.order.substitutes(position)), _DRAWS):
            if not self.dataset.is_removed(drawn):
                yield drawn
        raise StreamError(f"overlays remove all of the {_DRAWS} samples drawn for position {position}; too little of the dataset is left")

    def _tried(self, chunk: Chunk, i: int) -> Iterator[tuple[int, bytes | memoryview, Located, int]]:
        """The i-th sample of a chunk and its bytes, then its substitutes and theirs."""
        sample, data = int(chunk.samples[i]), load(chunk.data[i])
        if data is None:
            data = read(self.dataset, int(chunk.located.shards[i]), *chunk.located.range(i))
        yield sample, data, chunk.located, i
        if self.order is not None:
            position = int(chunk.positions[i])
            first = int(self.order.samples_at(chunk.positions[i : i + 1])[0])
            for substitute in itertools.islice(self.candidates(position, first), 1, None):  # the first is the one above
                located = self.dataset.locate(np.array([substitute]))
                yield substitute, read(self.dataset, int(located.shards[0]), *located.range(0)), located, 0

    def _fill(
        self, sample: int, data: bytes | memoryview, located: Located, row: int, key: int, draws: images.Draws, out_HWC: Pixels
    ) -> str | None:
        """Writes a sample's pixels, or tells why it cannot be used."""
        try:
            data = self.dataset.checked(sample, data, located, row)
        except SampleError as error:
            return error.reason
        try:
            if self.order is None:
                images.evaluation_view(data, self.image_size, self.preprocess, out_HWC)
            else:
                images.training_view(data, self.image_size, key, draws, self.preprocess, self.decode, out_HWC)
        except UNDECODABLE as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _fault(self, position: int, sample: int, reason: str) -> Fault:
        dataset, shard, key = self.dataset.name_of(sample)
        return Fault(position, sample, dataset, shard, key, reason)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Ahead of time and in parallel
# ---------------------------------------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A micro-batch to be made."""

    positions: Int64
    samples: Int64
    """-1: there is none."""
    keys: keyed.UInt64


class _Begun(NamedTuple):
    """A micro-batch in the making."""

    job: _Job
    rows: Rows
    reads: list[Awaited | None]
    chunks: list[Future[Made]]


def _prepare_ahead(
    jobs: Iterator[_Job], maker: Maker, reader: Reader, config: StreamConfig, quarantine: Quarantine | None
) -> Iterator[Batch]:
    """Batches in the order of the jobs, `prefetch` of them in the making while one is used."""
    pool = WorkerPool(maker, workers(config.workers), processes=config.processes)
    begun: deque[_Begun] = deque()

    def begin(job: _Job) -> None:
        size = len(job.samples)
        there = np.flatnonzero(job.samples >= 0)
        rows = Rows((size, *maker.image_size, 3), shared=config.processes)
        reads: list[Awaited | None] = [None] * size
        for place, awaited in zip(there.tolist(), reader.start(job.positions[there], job.samples[there]), strict=True):
            reads[place] = awaited
        located = maker.dataset.locate(np.maximum(job.samples, 0))
        chunks = []
        for first in range(0, size, step := max(1, min(_CHUNK, -(-size // workers(config.workers))))):
            part = slice(first, min(first + step, size))

            def task(part: slice = part) -> tuple[Chunk, Rows]:
                data = [of.bytes() if of else None for of in reads[part]]
                if config.processes:
                    data = [bytes(of) if isinstance(of, memoryview) else of for of in data]
                where = Located(*(of[part] for of in located))
                return Chunk(job.positions[part], job.samples[part], job.keys[part], where, data), rows.part(part.start, part.stop)

            needed = {id(of.stretch): of.stretch.data for of in reads[part] if of}
            chunks.append(pool.submit(task, after=list(needed.values())))
        begun.append(_Begun(job, rows, reads, chunks))

    def finish() -> Batch:
        one = begun.popleft()
        made = [result(chunk, pool, config.read_timeout, partial(_waited_for, one, maker.dataset)) for chunk in one.chunks]
        if quarantine and (faults := [fault for of in made for fault in of.faults]):
            quarantine.add(faults)
        if given_up := next((of.given_up for of in made if of.given_up), ""):
            raise StreamError(f"{given_up}; quarantine.jsonl names them")
        samples_B, valid_B = np.concatenate([of.samples for of in made]), np.concatenate([of.valid for of in made])
        samples_B = np.where(valid_B, samples_B, 0)
        labels_BL, scores_BL = maker.dataset.labels(samples_B)
        return Batch(one.rows.array, labels_BL, scores_BL, one.job.keys.view(np.int64), valid_B, samples_B)

    try:
        for job in jobs:
            begin(job)
            if len(begun) > config.prefetch:
                yield finish()
        while begun:
            yield finish()
    finally:
        pool.close()
        reader.close()


def result(chunk: Future[R], pool: WorkerPool, timeout: float, waited_for: Callable[[], str]) -> R:
    """What became of a chunk; a failure of any other one, or too long a wait, is an error."""
    waited = 0.0
    while not chunk.done():
        if pool.failure is not None:  # perhaps of a later chunk: why wait for its turn?
            raise pool.failure
        try:
            return chunk.result(timeout=min(_LOOK_EVERY, timeout))
        except TimeoutError:
            waited += _LOOK_EVERY
            if waited >= timeout:
                raise stalled(waited_for(), timeout) from None
    return chunk.result()


def stalled(what: str, timeout: float) -> StreamError:
    """The error of a stream that has waited too long for something."""
    return StreamError(
        f"{what} has not ended for stream.read_timeout={timeout:g} seconds; is the storage still there? The same command goes on when it is"
    )


def _waited_for(of: _Begun, dataset: Mixture) -> str:
    """What a micro-batch is not done without."""
    shards = {one.stretch.shard for one in of.reads if one and not one.stretch.data.done()}
    work = "reading" if shards else "reading or decoding"
    shards = shards or {dataset.shard_of(sample) for sample in of.job.samples[of.job.samples >= 0].tolist()}
    return f"{work} {', '.join(sorted(shards)[:3])}{' and others' if len(shards) > 3 else ''}"


def workers(asked: int) -> int:
    """Workers to decode with: as many as asked for, or the cores this process may use, at most 8."""
    return asked or min(8, len(os.sched_getaffinity(0)))
