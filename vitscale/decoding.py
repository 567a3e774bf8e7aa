"""What a worker does with its part of a micro-batch: the bytes of each sample checked, decoded, cropped, resized and augmented.

Where it stands: `stream.py` makes tasks of positions and of where their bytes are; `images.py` has the views. A sample whose bytes are
damaged or do not decode is replaced by the first of its substitutes (`order.py`) that can be used, or, in evaluation, left out; each is
told of.
No torch: worker processes start with this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.dataset import Located, Place, SampleError
from data_tools.images import UNDECODABLE
from vitscale import images, keyed
from vitscale.config import Decode, PreprocessConfig
from vitscale.mixture import Mixture
from vitscale.order import Int64, RunOrder
from vitscale.pixels import ImageBytes, Pixels
from vitscale.quarantine import Fault
from vitscale.reading import Bytes, load, read, tried
from vitscale.workers import Rows


@dataclass(frozen=True)
class View:
    """What of an image the model sees."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    preprocess: PreprocessConfig
    decode: Decode
    training: bool
    """A random view, or that of evaluation."""

    def fill(self, data: ImageBytes, key: int, draws: images.Draws, out_HWC: Pixels) -> str | None:
        """Writes an image's pixels, or tells why it cannot be used. `draws` are the key's."""
        try:
            if self.training:
                images.training_view(data, self.image_size, key, draws, self.preprocess, self.decode, out_HWC)
            else:
                images.evaluation_view(data, self.image_size, self.preprocess, out_HWC)
        except UNDECODABLE as error:
            return f"{type(error).__name__}: {error}"
        return None


class Task(NamedTuple):
    """Some samples of a micro-batch, as a worker gets them."""

    positions: Int64
    samples: Int64
    """-1: there is none."""
    keys: keyed.UInt64
    located: Located
    """Of the samples that there are."""
    data: list[Bytes]


class Decoded(NamedTuple):
    """What became of a task, its pixels apart."""

    samples: Int64
    """Those that were used."""
    valid: npt.NDArray[np.bool_]
    faults: list[Fault]
    given_up: str = ""
    """Why a position has no sample at all."""


class Decoder:
    """Does tasks; all that a worker knows, and picklable.

    Args:
        order: names substitutes; None leaves out what cannot be used (evaluation).
        attempts: samples that are tried for a position; one more than a run's budget, so that who counts them ends the run.
    """

    def __init__(self, dataset: Mixture, view: View, order: RunOrder | None, attempts: int = 1) -> None:
        self.dataset, self.view, self.order, self.attempts = dataset, view, order, attempts

    def __call__(self, task: Task, rows: Rows) -> Decoded:
        """Fills the rows."""
        samples, valid, faults, draws = task.samples.copy(), task.samples >= 0, [], images.draws(task.keys)
        for i in np.flatnonzero(valid).tolist():
            for attempt, (sample, data, place) in enumerate(self._candidates(task, i), start=1):
                reason = self._fill(sample, data, place, int(task.keys[i]), draws[i], rows.array[i])
                if reason is None:
                    samples[i] = sample
                    break
                dataset, shard, name = self.dataset.name_of(sample)
                faults.append(Fault(int(task.positions[i]), sample, dataset, shard, name, reason))
                if attempt == self.attempts:
                    break
            if reason is not None and self.order is not None:
                return Decoded(samples, valid, faults, f"{attempt} samples tried for position {task.positions[i]} were all unusable")
            valid[i] = reason is None
        rows.array[~valid] = 0
        return Decoded(samples, valid, faults)

    def candidates(self, position: int) -> Iterator[int]:
        """The sample at a position and its substitutes, in the order in which they are tried, without those that overlays remove."""
        assert self.order is not None
        for drawn in self.order.candidates(position):
            if not self.dataset.is_removed(drawn):
                yield drawn

    def _candidates(self, task: Task, i: int) -> Iterator[tuple[int, bytes | memoryview, Place]]:
        """The i-th sample of a task and its bytes, then its substitutes and theirs."""
        sample, data, place = int(task.samples[i]), load(task.data[i]), task.located.place(i)
        yield sample, read(self.dataset, place.shard, place.start, place.end) if data is None else data, place
        if self.order is not None:
            known = {sample}  # the first candidate, and those that were drawn before
            for substitute in self.candidates(int(task.positions[i])):
                if len(known) == self.dataset.num_samples - self.dataset.num_removed:
                    return
                if substitute in known:
                    continue
                known.add(substitute)
                place = self.dataset.locate(np.array([substitute])).place(0)
                yield substitute, read(self.dataset, place.shard, place.start, place.end), place

    def _fill(self, sample: int, data: bytes | memoryview, place: Place, key: int, draws: images.Draws, out_HWC: Pixels) -> str | None:
        """Writes a sample's pixels, or tells why it cannot be used."""
        try:
            data = tried(lambda: self.dataset.checked(sample, data, place), self.dataset, place.shard)
        except SampleError as error:
            return error.reason
        return self.view.fill(data, key, draws, out_HWC)
