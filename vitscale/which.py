"""`vitscale run which`: the samples that a step of a run saw, and the steps that saw a sample.

Where it stands: beside the training loop. What a step saw follows from the config, the order and what run.json and quarantine.jsonl say of
samples that were removed or unusable, so nothing is written down for it; the data are opened to name keys and shards, no image is read.

A sample stands at one position of each epoch. Where it was removed or unusable another was seen in its place, so that "was it seen" has two
answers: at its own positions, and as a stand-in at those of others. Both are given, which is what a request to take an image down asks for.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.amend import find_samples
from data_tools.errors import UserError, message_of
from data_tools.holdout import part_of
from data_tools.progress import Update, no_update
from vitscale import checkpoint
from vitscale.config import TrainConfig
from vitscale.guards import is_skipped
from vitscale.mixture import Mixture
from vitscale.order import MAX_DRAWS, Int64, RunOrder
from vitscale.run import (
    RunError,
    is_of_tars,
    overlay_fields,
    reached,
    read_config,
    read_quarantine,
    read_record,
    samples_of,
    skipped_ranges,
    start_of_step,
    trained_datasets,
)
from vitscale.timeline import timeline_of


@dataclass(frozen=True)
class Named:
    """A sample, as people know it."""

    sample: int
    """Its number in its dataset."""
    dataset: str
    shard: str
    key: str


@dataclass(frozen=True)
class Replaced(Named):
    """A sample that was to be seen and was not."""

    reason: str


@dataclass(frozen=True)
class Seen(Named):
    """What was seen at a position of the run."""

    position: int
    rank: int
    instead_of: tuple[Replaced, ...]
    """What stands at the position, and what was tried before this one."""


@dataclass(frozen=True)
class StepSeen:
    """What a step saw."""

    run: str
    step: int
    made: bool
    """Whether the run is known to have come so far; otherwise this is what the step will see."""
    skipped: bool
    """Whether the run leaves the step out, since it was rolled back to before it."""
    world_size: int
    samples: tuple[Seen, ...]
    """By position."""


@dataclass(frozen=True)
class SampleSeen:
    """Where a sample was seen in the steps that a run has made."""

    run: str
    key: str
    samples: tuple[Named, ...]
    """Those that have the key: one in each dataset that does."""
    steps_made: int
    seen: tuple[dict[str, Any], ...]
    """Step, position, and whether it stood in for another, by position."""
    checkpoints: tuple[str, ...]
    """Those of the run's, of all that are there, that were trained on it."""


def which_step(run: Path, step: int, rank: int | None = None, data: Sequence[str] = ()) -> StepSeen:
    """The samples of a step, of all ranks or of one. Raises RunError.

    Args:
        data: where the datasets lie now; empty: where the run had them.
    """
    past = _Past(run, data)
    if not 1 <= step <= past.record["total_steps"]:
        raise RunError(f"{run} has no step {step}; it has steps 1 to {past.record['total_steps']}")
    world_size = start_of_step(past.record, step)["world_size"]
    if rank is not None and not 0 <= rank < world_size:
        raise RunError(f"rank {rank} had no part in step {step} of {run}, which was made by ranks 0 to {world_size - 1}")
    begin, batch = past.timeline.samples_at(step - 1), past.timeline.at_step(step - 1).global_batch_size
    ranks = range(world_size) if rank is None else [rank]
    shares = [(r, past.order.positions_of_rank(begin, batch, r, world_size)) for r in ranks]
    found = [(position, r, *past.used(position)) for r, positions in shares for position in positions.tolist()]
    names = past.names([sample for _, _, used, before in found for sample in (used, *(other for other, _ in before))])
    seen = [
        Seen(*names[used], position, r, tuple(Replaced(*names[other], reason) for other, reason in before))
        for position, r, used, before in sorted(found)
    ]
    skipped = is_skipped(begin, skipped_ranges(past.record))
    return StepSeen(str(run), step, step <= reached(run), skipped, world_size, tuple(seen))


def which_sample(run: Path, key: str, data: Sequence[str] = (), progress: Update = no_update) -> SampleSeen:
    """The steps made so far that saw the sample with a key. Raises RunError where no dataset of the run has it.

    `progress` is called with how many keys were looked at, and of how many.
    """
    past = _Past(run, data)
    steps_made = reached(run)
    samples = []
    for dataset, first in zip(past.mixture.components, past.mixture.first_samples.tolist(), strict=True):
        try:
            own = int(find_samples(dataset, pa.array([key]), partial(_further, progress, first, past.mixture.num_samples))[0])
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"the keys of {dataset.path} cannot be read ({message_of(error)}); a key is looked for in its samples/, on a disk: "
                "--data says where"
            ) from None
        if own >= 0:
            samples.append(first + own)
    if not samples:
        raise RunError(f"no dataset of {run} has a sample with the key {key!r}; `vitscale data preview` and samples/*.parquet tell keys")
    end = past.timeline.samples_at(steps_made)
    skipped = skipped_ranges(past.record)
    looked_at = (past.positions_that_saw(sample, end) for sample in samples)
    seen = {position: own for found in looked_at for position, own in found.items() if not is_skipped(position, skipped)}
    lines = tuple({"step": past.timeline.step_at(p) + 1, "position": p, "stood_in": not own} for p, own in sorted(seen.items()))
    first = lines[0]["step"] if lines else steps_made + 1
    kept = tuple(folder.name for folder in checkpoint.committed(run) if checkpoint.step_of(folder) >= first)
    return SampleSeen(str(run), key, tuple(Named(*name) for name in past.names(samples).values()), steps_made, lines, kept)


def _further(progress: Update, before: int, total: int, done: int, _: int) -> None:
    """Progress in one dataset as progress in all of them."""
    progress(before + done, total)


class _Past:
    """What is known of a run, and the order and data that it had."""

    def __init__(self, run: Path, data: Sequence[str]) -> None:
        self.run, self.record = run, read_record(run)
        if is_of_tars(self.record):
            raise RunError(
                f"{run} was trained on tars without an index, whose order cannot be told; `vitscale data index` makes one for other runs"
            )
        self.config: TrainConfig = read_config(run)
        self.timeline = timeline_of(self.config, samples_of(trained_datasets(self.record)))
        self._paths = self._found(data)
        self._mixture = lru_cache(maxsize=8)(self._open)
        self._part = part_of(self.config.holdout, held_out=False)
        self.mixture = self._mixture(((),) * len(self._paths))
        stream = self.config.stream
        sizes = [dataset.shard_sizes for dataset in self.mixture.components]
        self.order = RunOrder(sizes, self.config.data_weights or None, self.config.seed, stream.lanes, stream.window)
        self._unusable: dict[int, dict[int, str]] = defaultdict(dict)
        for line in read_quarantine(run):
            self._unusable[line["position"]][line["sample"]] = line["reason"]

    def used(self, position: int) -> tuple[int, list[tuple[int, str]]]:
        """The sample that is used at a position, and those tried before it, with what was wrong with each."""
        start = start_of_step(self.record, self.timeline.step_at(position) + 1)
        mixture, unusable = self._mixture(self._overlays(start)), self._unusable.get(position, {})
        before: dict[int, str] = {}
        for sample in self.order.candidates(position):
            if mixture.is_removed(sample):
                dataset, own = mixture.find(sample)
                outside = bool(self._part and not self._part.holds(dataset.locate(np.array([own])).hashes)[0])
                before[sample] = "it is held out" if outside else "an overlay removes it"
            elif sample in unusable:
                before[sample] = unusable[sample]
            else:
                return sample, list(before.items())
        raise RunError(f"none of {MAX_DRAWS} samples drawn for position {position} of {self.run} can be used; the run ends there")

    def positions_that_saw(self, sample: int, end: int) -> dict[int, bool]:
        """Positions below `end` that saw a sample, each with whether the sample stands there itself."""
        own = self.order.positions_of(np.array([sample]), end)
        seen = {position: True for position in own[own < end].tolist() if self.used(position)[0] == sample}
        first = int(self.mixture.first_samples[np.searchsorted(self.mixture.first_samples, sample, side="right") - 1])
        bad = self._ever_bad()
        positions = self.order.positions_of(bad[(bad >= first) & (bad < first + len(self.mixture.find(sample)[0]))], end)
        windows = self.order.windows_at(positions)
        for target in self.order.windows_at(own).tolist():
            of_epoch = windows[:, 1] == target[1]
            reaching = self._reaching(target, {(lane, window) for lane, window in windows[of_epoch, 2:].tolist()})
            for position, (lane, window) in zip(positions[of_epoch].tolist(), windows[of_epoch, 2:].tolist(), strict=True):
                near = (lane, window) in reaching
                if near and position < end and position not in seen and self.used(position)[0] == sample:
                    seen[position] = False
        return seen

    def _reaching(self, target: list[int], bad: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """The windows (lane, window) whose positions may have been given a substitute from a target window.

        A search for a substitute leaves a window when all of eight draws were bad, and goes on to the lane's next one, from the last to the
        first; so it came from this window, or from one before it with nothing but windows that hold something bad between. After a whole
        lane it goes on to the next lane's first window.

        Args:
            bad: the windows that hold something bad.
        """
        component, _, lane, window = target
        count = self.order.windows_in(component, lane)
        before = [(lane, (window - back) % count) for back in range(1, count)]
        reaching = {(lane, window), *itertools.takewhile(bad.__contains__, before)}
        if all((lane, first) in bad for first in range(window)):
            lanes = min(self.order.lanes, self.order.sizes[component])
            for back in range(1, lanes):
                previous = (lane - back) % lanes
                whole = {(previous, w) for w in range(self.order.windows_in(component, previous))}
                if not whole <= bad:
                    break
                reaching |= whole
        return reaching

    def _ever_bad(self) -> Int64:
        """All samples that an overlay of any start removed, that are held out, or that were unusable anywhere, ascending."""
        bad = {sample for samples in self._unusable.values() for sample in samples}
        for overlays in {self._overlays(start) for start in self.record["starts"]}:
            mixture = self._mixture(overlays)
            for dataset, first in zip(mixture.components, mixture.first_samples.tolist(), strict=True):
                if dataset.overlay.bits is not None:
                    gone = np.flatnonzero(np.unpackbits(dataset.overlay.bits, bitorder="little", count=dataset.num_samples))
                    bad.update((gone + first).tolist())
        return np.array(sorted(bad), dtype=np.int64)

    def names(self, samples: Sequence[int]) -> dict[int, tuple[int, str, str, str]]:
        """Number, dataset, shard and key of each of the samples; neighbours' keys come from one read."""
        return {sample: (self.mixture.find(sample)[1], *self.mixture.name_of(sample)) for sample in sorted(set(samples))}

    def _overlays(self, start: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(start.get("overlays", {}).get(name, ())) for name in overlay_fields(len(self._paths)))

    def _open(self, overlays: tuple[tuple[str, ...], ...]) -> Mixture:
        return Mixture.open(self._paths, overlays, part=self._part)

    def _found(self, data: Sequence[str]) -> list[str]:
        """Where the run's datasets lie. Raises RunError where one is not there, or is another."""
        trained = trained_datasets(self.record)
        paths = list(data or self.config.datasets)
        if len(paths) != len(trained):
            raise RunError(
                f"{self.run} was trained on {len(trained)} datasets, and --data names {len(paths)}; name each, in the run's order"
            )
        for path, was in zip(paths, trained, strict=True):
            try:
                (opened,) = Mixture.open([path], [()]).components
            except UserError as error:
                raise RunError(f"{self.run} was trained on {was['path']}, and {error}; --data says where it lies now") from None
            if opened.content_hash != was["hash"]:
                raise RunError(
                    f"{path} is {opened.name} (hash {opened.content_hash[:12]}) and not what {self.run} was trained on, {was['name']} "
                    f"(hash {was['hash'][:12]}); --data says where that lies now"
                )
        return paths
