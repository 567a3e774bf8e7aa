"""The stream of batches: positions of the run -> samples of the tar shards -> decoded, augmented micro-batches.

`order.py` says which sample a position holds, `images.py` what is done to it; here they are read, ahead of time and in parallel, by threads
(reading, decoding and resizing release the GIL). A batch is a pure function of the config and `samples_seen`: not of ranks, workers or how
often the run was stopped. A sample that cannot be used is replaced by the substitute that the order names, and written to quarantine.jsonl;
one that an overlay removes is replaced in silence. Evaluation leaves both out, and counts them.

Axes: B batch, H height, W width, C channels, L labels of a sample.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.dataset import Dataset, SampleError
from data_tools.errors import UserError
from data_tools.images import decode
from vitscale import images, keyed
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.order import EpochOrder, Int64, positions_of_rank

_ATTEMPTS = 64  # samples read for one position
_DRAWS = 2**16  # and drawn for it: those that an overlay removes cost no reading, and a shard that is lost has thousands

# What decoding damaged bytes raises. An OSError in reading is the machine's, not the sample's, and ends the run.
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


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


class _Job(NamedTuple):
    """A batch to be made. `view` gives the i-th sample, or its substitute, and its pixels, or None where it cannot be had."""

    samples: Int64
    keys: keyed.UInt64
    view: Callable[[int], tuple[int, images.Pixels | None]]


class TrainStream:
    """A rank's share of the training batches.

    Args:
        dataset: the training split.
        image_size: height and width in pixels.
        config: lanes and window must be chosen (above 0).
        seed: of the run.
        global_batch_size, micro_batch_size, rank, world_size: how the work is split.
        quarantine: the file that unusable samples are appended to, a line of JSON each.
    """

    def __init__(
        self, dataset: Dataset, image_size: tuple[int, int], preprocess: PreprocessConfig, config: StreamConfig, *, seed: int,
        global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, quarantine: Path,
    ) -> None:  # fmt: skip
        self.dataset, self.image_size, self.preprocess, self.config, self.seed = dataset, image_size, preprocess, config, seed
        self.global_batch_size, self.micro_batch_size, self.rank, self.world_size = global_batch_size, micro_batch_size, rank, world_size
        self.quarantine = quarantine
        self.unusable = len(quarantine.read_bytes().splitlines()) if quarantine.is_file() else 0  # those of earlier starts count
        self._lock = threading.Lock()
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # a step may cross from one epoch into the next

    def micro_batches(self, samples_seen: int, end: int | None = None) -> Iterator[Batch]:
        """Micro-batches of this rank from `samples_seen` on, in order, up to `end` (a whole number of steps) or without end.

        Raises StreamError where too many samples are unusable, and OSError where they cannot be read.
        """
        return _prepare_ahead(self._jobs(samples_seen, end), self.dataset, self.image_size, self.config.workers, self.config.prefetch)

    def samples_at(self, positions: Int64) -> Int64:
        """Numbers of the samples at positions counted through all epochs."""
        epochs, places = np.divmod(positions, self.dataset.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            samples[epochs == epoch] = self._order(epoch).samples_at(places[epochs == epoch])
        return samples

    def _jobs(self, samples_seen: int, end: int | None) -> Iterator[_Job]:
        while end is None or samples_seen < end:
            share = positions_of_rank(
                samples_seen, self.global_batch_size, self.rank, self.world_size, self.dataset.num_samples, self.config.lanes
            )
            for positions in share.reshape(-1, self.micro_batch_size):
                samples = self.samples_at(positions)
                keys = keyed.key(keyed.Purpose.SAMPLE, self.seed, positions)
                yield _Job(samples, keys, partial(self._view, positions, samples, keys))
            samples_seen += self.global_batch_size

    def _view(self, positions: Int64, samples: Int64, keys: keyed.UInt64, i: int) -> tuple[int, images.Pixels]:
        """The sample that is used at a position, and its pixels."""
        sample = int(samples[i])
        epoch, place = divmod(int(positions[i]), self.dataset.num_samples)
        read = 0
        substitutes = self._order(epoch).substitutes(place)
        for _ in range(_DRAWS):
            if not self.dataset.overlay.is_removed(sample):
                image = _readable(self.dataset, sample)
                if isinstance(image, Image.Image):
                    return sample, images.training_view(image, self.image_size, int(keys[i]), self.preprocess)
                self._report_unusable(int(positions[i]), sample, image)
                read += 1
                if read == _ATTEMPTS:
                    raise StreamError(f"{read} samples tried for position {positions[i]} were all unusable; {self.quarantine} names them")
            _, sample = next(substitutes)
        raise StreamError(
            f"overlays remove all of the {_DRAWS} samples drawn for position {positions[i]}; too little of the dataset is left"
        )

    def _report_unusable(self, position: int, sample: int, reason: str) -> None:
        line = {"position": position, "sample": sample, "shard": self.dataset.shard_of(sample), "reason": reason, "rank": self.rank}
        with self._lock, open(self.quarantine, "ab", buffering=0) as file:
            self.unusable += 1
            file.write(json.dumps(line).encode() + b"\n")  # one write a line: ranks append to the same file
        if self.unusable > self.config.max_unusable:
            raise StreamError(
                f"{self.unusable} unusable samples are over stream.max_unusable={self.config.max_unusable}; {self.quarantine} names them"
            )

    def _epoch_order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.dataset.shard_sizes, self.seed, epoch, self.config.lanes, self.config.window)


def evaluation_batches(
    dataset: Dataset,
    image_size: tuple[int, int],
    preprocess: PreprocessConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterator[Batch]:
    """A rank's share of the whole dataset, each sample exactly once over all ranks.

    All ranks see equally many batches; where a rank has no sample, or one that cannot be read, `valid_B` is False.
    """
    per_rank = -(-dataset.num_samples // world_size)
    first, end = rank * per_rank, min((rank + 1) * per_rank, dataset.num_samples)

    def view(samples: Int64, i: int) -> tuple[int, images.Pixels | None]:
        sample = int(samples[i])
        if sample >= end:
            return 0, None
        image = _readable(dataset, sample)
        return sample, images.evaluation_view(image, image_size, preprocess) if isinstance(image, Image.Image) else None

    def jobs() -> Iterator[_Job]:
        for start in range(first, first + per_rank, batch_size):
            samples = np.arange(start, start + batch_size, dtype=np.int64)
            yield _Job(samples, np.zeros(batch_size, dtype=np.uint64), partial(view, samples))

    return _prepare_ahead(jobs(), dataset, image_size, workers, prefetch=4)


def _readable(dataset: Dataset, sample: int) -> Image.Image | str:
    """The decoded image, or why it cannot be had."""
    try:
        image_bytes = dataset.read(sample)
    except SampleError as error:
        return str(error)
    try:
        return decode(image_bytes)
    except UNDECODABLE as error:
        return f"{type(error).__name__}: {error}"


def _prepare_ahead(jobs: Iterator[_Job], dataset: Dataset, image_size: tuple[int, int], workers: int, prefetch: int) -> Iterator[Batch]:
    """Batches in the order of the jobs, `prefetch` of them in the making while one is used; a thread's error is raised in its turn."""
    pool = ThreadPoolExecutor(threads(workers), thread_name_prefix="stream")
    started: deque[tuple[keyed.UInt64, images.Pixels, npt.NDArray[np.bool_], Int64, list[Future[None]]]] = deque()

    def start(job: _Job) -> None:
        size = len(job.samples)
        images_BHWC, valid_B, samples_B = np.zeros((size, *image_size, 3), np.uint8), np.zeros(size, np.bool_), job.samples.copy()

        def fill(piece: Int64) -> None:
            for i in piece.tolist():
                samples_B[i], pixels = job.view(i)
                if pixels is not None:
                    images_BHWC[i], valid_B[i] = pixels, True

        pieces = np.array_split(np.arange(size), min(threads(workers), size))
        started.append((job.keys, images_BHWC, valid_B, samples_B, [pool.submit(fill, piece) for piece in pieces]))

    def finish() -> Batch:
        keys, images_BHWC, valid_B, samples_B, futures = started.popleft()
        for future in futures:
            future.result()
        labels_BL, scores_BL = dataset.labels(samples_B)
        return Batch(images_BHWC, labels_BL, scores_BL, keys.view(np.int64), valid_B, samples_B)

    try:
        for job in jobs:
            start(job)
            if len(started) > prefetch:
                yield finish()
        while started:
            yield finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def threads(workers: int) -> int:
    """Threads to decode with: as many as asked for, or the cores this process may use, at most 8."""
    return workers or min(8, len(os.sched_getaffinity(0)))
