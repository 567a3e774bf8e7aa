"""The clock of a run: which step a position belongs to, and the sizes of the batch and of the images that the step has.

`samples_seen` is the one clock, and everything that turns it into steps, or steps into it, asks here. A run has spans of equal steps: one
for each phase of `schedule.phases`, and the last with the run's own settings. Where a phase ends is a share of the run's samples, rounded
to a whole step. Pure, and imports no torch.
"""

import dataclasses
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from vitscale.config import ConfigError, FinetuneConfig, OptimizerConfig, TrainConfig, ViTConfig
from vitscale.flops import train_flops


@dataclass(frozen=True)
class Span:
    """Steps in a row that are alike."""

    first_step: int
    """Steps made when it begins."""
    first_sample: int
    """`samples_seen` when it begins."""
    image_size: tuple[int, int]
    global_batch_size: int
    micro_batch_size: int

    @property
    def batch(self) -> tuple[int, int]:
        """Images a step, and those that a rank handles at once."""
        return self.global_batch_size, self.micro_batch_size

    def train_flops(self, model: ViTConfig, optimizer: OptimizerConfig | None = None) -> int:
        """Of one of its images, forward and backward."""
        return train_flops(dataclasses.replace(model, image_size=self.image_size), optimizer)


@dataclass(frozen=True)
class Timeline:
    """The steps of a run. Past its end the last span goes on."""

    spans: tuple[Span, ...]
    total_steps: int

    @property
    def total_samples(self) -> int:
        """`samples_seen` at the run's end."""
        return self.samples_at(self.total_steps)

    @property
    def ends(self) -> tuple[int, ...]:
        """Steps made when each span ends."""
        return (*(span.first_step for span in self.spans[1:]), self.total_steps)

    def at(self, samples_seen: int) -> Span:
        """The span of the step that the position belongs to."""
        return self.spans[bisect_right(self.spans, samples_seen, key=lambda span: span.first_sample) - 1]

    def at_step(self, step: int) -> Span:
        """The span of the step that begins when `step` steps are made."""
        return self.spans[bisect_right(self.spans, step, key=lambda span: span.first_step) - 1]

    def step_at(self, samples_seen: int) -> int:
        """Whole steps made."""
        span = self.at(samples_seen)
        return span.first_step + (samples_seen - span.first_sample) // span.global_batch_size

    def samples_at(self, step: int) -> int:
        """`samples_seen` when `step` steps are made."""
        span = self.at_step(step)
        return span.first_sample + (step - span.first_step) * span.global_batch_size

    def batches(self, step: int) -> list[tuple[int, int]]:
        """What the first `step` steps are as the clock counts them: after so many steps, batches of that size."""
        begun = [(span.first_step, span.global_batch_size) for span in self.spans if span.first_step < step]
        return [of for before, of in zip([(0, 0), *begun], begun, strict=False) if of[1] != before[1]]

    def other_sizes(self) -> set[int]:
        """The steps, counted from 1, whose images have another size than those of the step before."""
        return {after.first_step + 1 for before, after in pairwise(self.spans) if before.image_size != after.image_size}

    def images_left(self, step: int, model: ViTConfig, optimizer: OptimizerConfig | None = None) -> float:
        """Images to come after `step` steps, counted as so many of the last step made, by the FLOPs of each size."""
        left = sum(
            max(0, end - max(step, span.first_step)) * span.global_batch_size * span.train_flops(model, optimizer)
            for span, end in zip(self.spans, self.ends, strict=True)
        )
        return left / self.at_step(max(0, step - 1)).train_flops(model, optimizer)


def steady(image_size: tuple[int, int], global_batch_size: int, micro_batch_size: int, total_steps: int = 0) -> Timeline:
    """Steps that are all alike."""
    return Timeline((Span(0, 0, image_size, global_batch_size, micro_batch_size),), total_steps)


class Part(NamedTuple):
    """A phase with nothing left open."""

    until: float
    image_size: tuple[int, int]
    global_batch_size: int
    micro_batch_size: int


def parts_of(config: TrainConfig | FinetuneConfig) -> list[Part]:
    """The phases of a run, the last of them with its own settings."""
    own = Part(1.0, config.model.image_size, config.global_batch_size, config.micro_batch_size)
    given = [{name: value for name, value in vars(phase).items() if value is not None} for phase in config.schedule.phases]
    return [*(own._replace(**values) for values in given), own]


def timeline_of(config: TrainConfig | FinetuneConfig, num_samples: int) -> Timeline:
    """The timeline of a run over a dataset of so many samples. Raises ConfigError where a phase has no whole step.

    Of a run whose length is given in epochs, the last step is the one that reaches it.
    """
    parts = parts_of(config)
    begins = [0.0, *(part.until for part in parts)]
    steps_a_sample = sum((part.until - begin) / part.global_batch_size for begin, part in zip(begins, parts, strict=False))
    samples = config.steps / steps_a_sample if config.steps else config.epochs * num_samples
    spans, step, position = [], 0, 0
    for part in parts:
        batch = part.global_batch_size
        spans.append(Span(step, position, part.image_size, batch, part.micro_batch_size))
        if part is not parts[-1]:
            steps = round((part.until * samples - position) / batch)
        else:
            steps = config.steps - step if config.steps else math.ceil((samples - position) / batch)
        if config.schedule.phases and steps < 1:
            raise ConfigError(
                f"schedule.phases: of the run's {samples:,.0f} samples the part up to {part.until:g} is no whole step of {batch} images; "
                "a longer run has one, or leave the phase out"
            )
        step, position = step + steps, position + steps * batch
    return Timeline(tuple(spans), step)
