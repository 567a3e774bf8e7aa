"""Tars that others made and that have no index, read as streams: from front to back, as the webdataset library groups their members.

    _read_tar      the samples of one, each with its image and labels or with why it cannot be used
    _Feed          a thread that reads one tar ahead
    _Drawn         a rank's samples: of two tars in turns, shuffled in windows
    ForeignStream  batches of them, as `stream.TrainStream` has them

Where it stands: in place of `stream.py`'s order and reads, where there is no index to look a sample up in; workers and pixels are the same.
The shards of an epoch are in a keyed random order; the k-th of the run, counted through epochs, is read by rank k mod world size. How many
samples there are is known to nobody, so ranks go at their own pace and every one of them has equally many batches, for ever.

Guarantees are weaker than a dataset's: the order is a function of seed, world size, where the run was taken up and, where images are
damaged, batch sizes and `prefetch`, not of `samples_seen` alone; a run is taken up at the beginning of a shard (`cursor`), and what
was drawn of later shards comes again; a sample comes once in each epoch of its shard, but epochs overlap.

Invariants: nothing is unpickled, no command is run, no decoder of webdataset's is used; a sample that cannot be used is written to
quarantine.jsonl and left out, never in silence; what is held is bounded by `stream.buffer_bytes`; no wait is longer than `read_timeout`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.config import PackError
from data_tools.images import MAX_IMAGE_BYTES
from data_tools.members import OpenTar, TarError, read_samples
from data_tools.storage import Location, Missing, sequential
from data_tools.tars import IMAGE_MEMBERS, labels_of
from vitscale import images, keyed
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.decoding import View
from vitscale.guards import is_skipped
from vitscale.order import Int64
from vitscale.quarantine import Fault, Quarantine
from vitscale.stream import Batch, Share, StreamError, ahead, stalled
from vitscale.unindexed import Tars
from vitscale.workers import Rows, WorkerPool, chunks, worker_count

_FIRST = 256  # in the first window; each one after it may have twice as many
_OPEN = 2  # tars of a rank that are read in turns
_BARREN = 64  # tars in a row without a usable sample, at least, before a rank gives up; at least as many as there are
_ATTEMPTS = 64  # samples tried for one position, beyond those that one shard may have that are unusable
_BLOCK = 1 << 20
_PER_SHARD = 32  # bits of a sample's number that count within its tar
_REMEDY = "`vitscale data index` tells what else is wrong with it, and --data may leave it out"

Reasons = list[str | None]


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is in them
# ---------------------------------------------------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """One sample as it was read, or why it, or the rest of its tar, cannot be used."""

    ordinal: int
    """Of its shard in the run."""
    shard: int
    number: int
    """In its tar."""
    key: str
    data: bytes = b""
    labels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    reason: str = ""
    """Why it cannot be used."""

    @property
    def global_number(self) -> int:
        """Its number among the samples of all the tars."""
        return self.shard << _PER_SHARD | self.number


class Usable(NamedTuple):
    """What a run asks of the labels of a sample."""

    num_classes: int
    """Labels must be below."""
    soft_targets: bool = False
    """Whether scores must lie in [0, 1]."""


def _read_tar(tar: Location, ordinal: int, shard: int, usable: Usable) -> Generator[_Sample]:
    """The samples of a tar, front to back; a last one without data where it is damaged. Raises OSError and StorageError."""
    number = -1
    try:
        with sequential(tar) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            opened = OpenTar(file, str(tar), size, hashed=False)
            for number, (key, members) in enumerate(read_samples(opened, (*IMAGE_MEMBERS, "json", "cls"), MAX_IMAGE_BYTES)):
                image = next((members[suffix][1] for suffix in IMAGE_MEMBERS if suffix in members), b"")
                try:
                    labels, scores = _labels({"__key__": key} | {s: m[1] for s, m in members.items()}, tar, usable)
                except PackError as error:
                    yield _Sample(ordinal, shard, number, key, reason=str(error))
                    continue
                reason = ""
                if not image:
                    reason = f"no member of the sample is {', '.join(IMAGE_MEMBERS)}" if image == b"" else "the image is too large"
                yield _Sample(ordinal, shard, number, key, image or b"", labels, scores, reason)
            if number < 0:
                raise TarError(f"{tar} holds no sample")
            file.seek(opened.end)
            if any(block.strip(b"\0") for block in iter(partial(file.read, _BLOCK), b"")):
                raise TarError(f"{tar} goes on behind its end mark at byte {opened.end}, where no reader looks; write it again")
    except TarError as error:
        yield _Sample(ordinal, shard, (1 << _PER_SHARD) - 1, "", reason=f"the tar after its sample {number}: {error}")


def _labels(sample: dict[str, object], tar: Location, usable: Usable) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Labels of a sample, none twice, and a score for each. Raises PackError where it has none that can be used."""
    for suffix in ("json", "cls"):
        if suffix in sample and sample[suffix] is None:
            raise PackError(f"its {suffix} is too large")
    try:
        labels, scores = labels_of(sample, tar)
    except RecursionError:
        raise PackError("its json is nested too deeply") from None
    if not labels:
        raise PackError("it has no label")
    for label in labels:
        if type(label) is not int or not 0 <= label < usable.num_classes:
            raise PackError(f"its label {str(label)[:80]!r} is no whole number from 0 to model.num_classes - 1 = {usable.num_classes - 1}")
    if len(set(labels)) < len(labels):
        raise PackError(f"a label is given twice: {labels[:20]}")
    scores = scores or [1.0] * len(labels)
    if len(scores) != len(labels) or not all(type(score) in (int, float) and abs(score) <= _LARGEST for score in scores):
        raise PackError("its scores are not a number for each label")
    if usable.soft_targets and not all(0 <= score <= 1 for score in scores):
        raise PackError("its scores are not all in [0, 1], as soft_targets needs them")
    return tuple(labels), tuple(map(float, scores))


_LARGEST = float(np.finfo(np.float32).max)


class _Feed:
    """The samples of one tar, read ahead by a thread.

    Args:
        ordinal: of the tar in the run.
        room: bytes that may be held, though one sample always may.
    """

    def __init__(self, ordinal: int, tar: Location, samples: Generator[_Sample], room: int) -> None:
        self.ordinal, self.tar, self._room = ordinal, tar, room
        self._held = 0
        self._read: deque[_Sample | BaseException | None] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._serve, args=(samples,), name=f"tar-{tar.name}", daemon=True).start()

    def take(self, timeout: float) -> _Sample | None:
        """The next sample; None where the tar has no more. Raises StreamError where none comes in time, or what ended the reading."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._read), timeout):
                raise stalled(f"reading {self.tar}", timeout)
            sample = self._read.popleft()
            if isinstance(sample, Missing | FileNotFoundError):
                raise StreamError(f"{self.tar} is not there any more; put it back, and the same command goes on")
            if isinstance(sample, OSError):
                raise StreamError(f"{self.tar} cannot be read ({sample.strerror or sample}); the same command goes on when it can")
            if isinstance(sample, BaseException):
                raise sample
            self._held -= len(sample.data) if sample else 0
            self._changed.notify_all()
        return sample

    def close(self) -> None:
        """Ends the reading, without waiting for a read under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _serve(self, samples: Generator[_Sample]) -> None:
        last: BaseException | None = None
        try:
            with closing(samples):
                for sample in samples:
                    if not self._put(sample, len(sample.data)):
                        return
        except BaseException as error:
            last = error
        self._put(last, 0)

    def _put(self, item: _Sample | BaseException | None, size: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._held or self._held + size <= self._room)
            self._held += size
            self._read.append(item)
            self._changed.notify_all()
            return not self._closed


class _Drawn:
    """The samples of one rank, for ever: those of its tars, some tars at a time in turns, shuffled in windows.

    While a window is drawn from, in a keyed order, the next one is filled as fast, so that as many samples as a window has are held; the
    first ones are smaller, so that a run need not wait for a whole one.

    Args:
        cursor: the shards of the run, counted through epochs, that are used up.
        unusable: is told of samples that are left out, and for which position they were drawn.
    """

    def __init__(
        self, tars: Tars, config: StreamConfig, usable: Usable, *, seed: int, cursor: int, rank: int, world_size: int,
        unusable: Callable[[int, _Sample], None],
    ) -> None:  # fmt: skip
        self._tars, self._config, self._usable, self._seed, self._world_size = tars, config, usable, seed, world_size
        self._unusable = unusable
        self._next_ordinal = cursor + rank
        self._window, self._room = config.window, config.buffer_bytes // 2
        self._drawing: list[_Sample] = []
        self._filling: list[_Sample] = []
        self._target = min(_FIRST, self._window)  # samples in the window that is being filled
        self._bytes = self._windows = self._barren = 0
        self._key = keyed.key(keyed.Purpose.FOREIGN_SHUFFLE, seed, cursor, rank)
        self._feeds = deque(self._open() for _ in range(_OPEN))

    @property
    def floor(self) -> int:
        """The first shard of this rank's, counted through epochs, of which not all samples have been drawn."""
        return min([feed.ordinal for feed in self._feeds] + [sample.ordinal for sample in self._drawing + self._filling])

    def draw(self, position: int) -> _Sample:
        """The next sample, which comes to stand at a position. Raises StreamError, StorageError and whatever `unusable` does."""
        if not self._drawing:
            while self._fill(position):
                pass
            order = keyed.permute(np.arange(len(self._filling)), len(self._filling), keyed.key(self._key, self._windows))
            self._drawing, self._filling = [self._filling[place] for place in order.tolist()], []
            self._windows += 1
            self._target = min(2 * self._target, self._window)
        sample = self._drawing.pop()
        self._bytes -= len(sample.data)
        for _ in range(2):
            if len(self._drawing) + len(self._filling) < self._target:
                self._fill(position)
        return sample

    def close(self) -> None:
        """Ends all reading."""
        for feed in self._feeds:
            feed.close()

    def _fill(self, position: int) -> bool:
        """Reads a sample into the next window, unless that or the memory is full; one sample always has room."""
        if len(self._filling) >= self._target or (self._filling and self._bytes >= self._room):
            return False
        self._filling.append(self._read(position))
        self._bytes += len(self._filling[-1].data)
        return True

    def _read(self, position: int) -> _Sample:
        """The next usable sample of the tars that are open."""
        while True:
            sample = self._feeds[0].take(self._config.read_timeout)
            if sample is None:
                self._feeds[0] = self._open()
                self._barren += 1
                if self._barren > max(_BARREN, len(self._tars.shards)):
                    raise StreamError(
                        f"{' '.join(self._tars.said)}: {self._barren} tars in a row held no sample that can be used; a sample is an image "
                        f"({', '.join(IMAGE_MEMBERS)}) and a `cls` or `json` of one name, and RUN/quarantine.jsonl tells what is wrong"
                    )
                continue
            self._feeds.rotate(-1)
            if not sample.reason:
                self._barren = 0
                return sample
            self._unusable(position, sample)

    def _open(self) -> _Feed:
        shards, ordinal = self._tars.shards, self._next_ordinal
        self._next_ordinal += self._world_size
        shard = shard_at(self._seed, ordinal, len(shards))
        return _Feed(ordinal, shards[shard], _read_tar(shards[shard], ordinal, shard, self._usable), self._room // _OPEN)


def shard_at(seed: int, ordinal: int, shards: int) -> int:
    """The shard that comes at a place in the run, counted through epochs."""
    epoch, place = divmod(ordinal, shards)
    return int(keyed.permute(place, shards, keyed.key(keyed.Purpose.FOREIGN_SHARDS, seed, epoch)))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoder:
    """Makes pixels of images; all that a worker knows, and picklable."""

    view: View

    def __call__(self, data: list[bytes], keys: keyed.UInt64, rows: Rows) -> Reasons:
        """Fills the rows, and tells of each image why it cannot be used, or None."""
        drawn = images.draws(keys)
        return [self.view.fill(*of) for of in zip(data, keys.tolist(), drawn, rows.array, strict=True)]


@dataclass
class _Begun:
    """A micro-batch in the making."""

    positions: Int64
    keys: keyed.UInt64
    samples: list[_Sample]
    floor: int
    """The rank's first shard that is not used up once this micro-batch is."""
    rows: Rows
    chunks: list[Future[Reasons]] = field(default_factory=list)


class ForeignStream:
    """A rank's share of the training batches, of tars without an index; its arguments are those of `stream.TrainStream`.

    Args:
        usable: what is asked of labels.
        cursor: the shards, counted through epochs, that all ranks have used up.
    """

    def __init__(
        self, tars: Tars, preprocess: PreprocessConfig, config: StreamConfig, share: Share, *, seed: int, quarantine: Path,
        usable: Usable, cursor: int = 0,
    ) -> None:  # fmt: skip
        self.seed, self.share = seed, share
        self.cursor = cursor
        """This rank's, of the micro-batch before the one that was given last: that one may be on its way to the device yet."""
        self._given = cursor  # the cursor, once the micro-batch that was given last is used
        self._tars, self._config, self._usable = tars, config, usable
        self._decoder = _Decoder(View(preprocess, config.decode, training=True))
        self._quarantine = Quarantine(
            quarantine, share.rank, max_samples=config.max_unusable, max_per_shard=config.max_unusable_per_shard, remedy=_REMEDY
        )  # fmt: skip

    def unusable(self) -> int:
        """Distinct samples that could not be used so far, in the whole run."""
        return self._quarantine.count()

    def describe(self) -> str:
        """What can and cannot be promised, for people."""
        held = f"in memory a rank at most {self._config.buffer_bytes / 1e6:,.0f} MB of samples, or a few of them where they are larger"
        return f"{self._tars.guarantees(self.share.world_size, self._config.window)}\n{held}"

    def epoch(self, samples_seen: int) -> float:
        """Passes over the tars, about; nobody knows how many samples they have."""
        return self.cursor / len(self._tars.shards)

    def micro_batches(self, samples_seen: int, end: int | None = None, skipped: Sequence[tuple[int, int]] = ()) -> Iterator[Batch]:
        """Micro-batches of this rank from the position `samples_seen` on, and from the cursor's shard, up to `end` or without end.

        What is drawn for positions in one of the half-open ranges `skipped` is thrown away.

        Raises QuarantineError or StreamError where too many samples are unusable or a tar is gone, StorageError where one cannot be read,
        WorkerError where a worker dies.
        """
        pool = WorkerPool(self._decoder, worker_count(self._config.workers), processes=self._config.processes)
        drawn = _Drawn(
            self._tars, self._config, self._usable, seed=self.seed, cursor=self.cursor, rank=self.share.rank,
            world_size=self.share.world_size, unusable=lambda position, sample: self._leave_out(position, sample, sample.reason),
        )  # fmt: skip
        self._given = self.cursor
        try:
            todo = (of for of in self._positions(samples_seen, end) if not self._thrown_away(of, drawn, skipped))
            begun = ahead((self._begin(positions, drawn, pool) for positions in todo), self._config.prefetch)
            yield from map(partial(self._finish, drawn, pool), begun)
        finally:
            pool.close()
            drawn.close()

    def _positions(self, samples_seen: int, end: int | None) -> Iterator[Int64]:
        while end is None or samples_seen < end:
            span = self.share.timeline.at(samples_seen)
            each = span.global_batch_size // self.share.world_size
            first = samples_seen + self.share.rank * each
            yield from np.arange(first, first + each, dtype=np.int64).reshape(-1, span.micro_batch_size)
            samples_seen += span.global_batch_size

    def _thrown_away(self, positions: Int64, drawn: _Drawn, skipped: Sequence[tuple[int, int]]) -> bool:
        if not is_skipped(int(positions[0]), skipped):
            return False
        for position in positions.tolist():
            drawn.draw(position)
        return True

    def _begin(self, positions: Int64, drawn: _Drawn, pool: WorkerPool) -> _Begun:
        samples = [drawn.draw(position) for position in positions.tolist()]
        size = len(samples)
        image_size = self.share.timeline.at(int(positions[0])).image_size
        rows = Rows.new((size, *image_size, 3), shared=self._config.processes)
        keys = keyed.key(keyed.Purpose.SAMPLE, self.seed, positions)
        begun = _Begun(positions, keys, samples, drawn.floor, rows)
        begun.chunks = [self._submit(begun, first, end, pool) for first, end in chunks(size, worker_count(self._config.workers))]
        return begun

    def _submit(self, begun: _Begun, first: int, end: int, pool: WorkerPool) -> Future[Reasons]:
        data = [sample.data for sample in begun.samples[first:end]]
        return pool.submit(partial(tuple, (data, begun.keys[first:end], begun.rows.part(first, end))))

    def _finish(self, drawn: _Drawn, pool: WorkerPool, begun: _Begun) -> Batch:
        """The batch, once each of its samples that cannot be decoded has given its place to the next one drawn."""
        self.cursor, self._given = self._given, begun.floor
        reasons = [reason for of_chunk in self._results(begun.chunks, pool) for reason in of_chunk]
        for place, reason in enumerate(reasons):
            tried, position = 1, int(begun.positions[place])
            while reason is not None:
                self._leave_out(position, begun.samples[place], reason)
                if (tried := tried + 1) > _ATTEMPTS + self._config.max_unusable_per_shard:
                    raise StreamError(f"{tried - 1} samples tried for position {position} were all unusable; quarantine.jsonl names them")
                begun.samples[place] = drawn.draw(position)
                ((reason,),) = self._results([self._submit(begun, place, place + 1, pool)], pool)
        labels_BL, scores_BL = _padded(begun.samples)
        samples_B = np.array([sample.global_number for sample in begun.samples], dtype=np.int64)
        return Batch(begun.rows.array, labels_BL, scores_BL, begun.keys.view(np.int64), np.ones(len(samples_B), np.bool_), samples_B)

    def _results(self, futures: list[Future[Reasons]], pool: WorkerPool) -> list[Reasons]:
        timeout = self._config.read_timeout
        return pool.results(futures, timeout, lambda: stalled("decoding a micro-batch", timeout))

    def _leave_out(self, position: int, sample: _Sample, reason: str) -> None:
        """Writes a sample down that cannot be used. Raises QuarantineError where a budget is spent."""
        tar = self._tars.shards[sample.shard]
        self._quarantine.add([Fault(position, sample.global_number, str(tar.parent), tar.name, sample.key, reason)])


def _padded(samples: list[_Sample]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    shape = (len(samples), max(len(sample.labels) for sample in samples))
    labels_BL, scores_BL = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, sample in enumerate(samples):
        labels_BL[row, : len(sample.labels)] = sample.labels
        scores_BL[row, : len(sample.scores)] = sample.scores
    return labels_BL, scores_BL
