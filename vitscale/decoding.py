"""What a worker does with its part of a micro-batch: the bytes of each sample checked, decoded, cropped, resized and augmented.

Where it stands: `stream.py` makes tasks of positions and of where their bytes are; `images.py` has the views. A sample whose bytes are
damaged or do not decode is replaced by the first of its substitutes (`order.py`) that can be used, or, in evaluation, left out; each is
told of.
No torch: worker processes start with this.
"""

from __future__ import annotations

import itertools
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
    """What of an image the model sees; in how many pixels, the rows tell that it is written to."""

    preprocess: PreprocessConfig
    decode: Decode
    training: bool
    """A random view, or that of evaluation."""

    def fill(self, data: ImageBytes, key: int, draws: images.Draws, out_HWC: Pixels) -> str | None:
        """Writes an image's pixels, or tells why it cannot be used. `draws` are the key's."""
        try:
            if self.training:
                images.training_view(data, out_HWC.shape[:2], key, draws, self.preprocess, self.decode, out_HWC)
            else:
                images.evaluation_view(data, out_HWC.shape[:2], self.preprocess, out_HWC)
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
            used, bad = self._use(task, i, draws[i], rows.array[i])
            faults += bad
            if used is not None:
                samples[i] = used
            elif self.order is not None:
                return Decoded(samples, valid, faults, f"{len(bad)} samples tried for position {task.positions[i]} were all unusable")
            else:
                valid[i] = False
        rows.array[~valid] = 0
        return Decoded(samples, valid, faults)

    def _use(self, task: Task, i: int, draws: images.Draws, out_HWC: Pixels) -> tuple[int | None, list[Fault]]:
        """The sample that is used in the i-th place of a task, None where none can be, and what was wrong with those tried before it."""
        bad: list[Fault] = []
        for sample, data, place in itertools.islice(self._tried(task, i), self.attempts):
            reason = self._fill(sample, data, place, int(task.keys[i]), draws, out_HWC)
            if reason is None:
                return sample, bad
            bad.append(Fault(int(task.positions[i]), sample, *self.dataset.name_of(sample), reason))
        return None, bad

    def _tried(self, task: Task, i: int) -> Iterator[tuple[int, bytes | memoryview, Place]]:
        """The i-th sample of a task and its bytes, then its substitutes and theirs, none twice."""
        sample, data, place = int(task.samples[i]), load(task.data[i]), task.located.place(i)
        yield sample, read(self.dataset, place.shard, place.start, place.end) if data is None else data, place
        if self.order is None:
            return
        of_component = self.dataset.find(sample)[0].num_kept  # substitutes are of the same dataset
        known = {sample}  # the first candidate, and those that were drawn before
        for substitute in kept_candidates(self.order, self.dataset, int(task.positions[i])):
            if len(known) == of_component:
                return
            if substitute not in known:
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


def kept_candidates(order: RunOrder, dataset: Mixture, position: int) -> Iterator[int]:
    """The sample at a position and its substitutes, in the order in which they are tried, without those that overlays remove."""
    return (drawn for drawn in order.candidates(position) if not dataset.is_removed(drawn))
