"""What a run does about steps that go wrong: pure decisions, from what all ranks know alike.

    a gradient that is not finite   the step is left out by all ranks; too many in a row roll the run back
    losses that spike               roll the run back to a checkpoint from before them, and their steps are skipped from then on
    ranks that hold other weights   are found by comparing sums of the weights' bits

A rollback is a start like any other: the positions to skip are written down, all ranks end, and the next start takes up the newest
checkpoint that knew nothing of them.
"""

import statistics
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vitscale.config import GuardConfig

_LEAST_DEVIATION = 1e-3  # of the median: below it lies noise of the arithmetic


@dataclass(frozen=True)
class Rollback:
    """Steps that go wrong, and are to be skipped."""

    first: int
    """Step, counted from 1: where skipping should begin."""
    began: int
    """The first step that was seen to go wrong."""
    last: int
    spike: bool
    """Of the loss; otherwise gradients were not finite."""
    words: str


class Guard:
    """Watches the steps of a run, each once and in order.

    Args:
        recent_losses: of the steps before, from a checkpoint, oldest first.
        spikes: in a row up to the last of them.
        nonfinite_steps: the same.
        seen: the last step before.
        rollbacks: how many the run has had.
        anew: steps, counted from 1, whose images have another size than those before: what their losses are judged by begins with them.
    """

    def __init__(
        self, config: GuardConfig, recent_losses: Sequence[float] = (), spikes: Sequence[float] = (), nonfinite_steps: int = 0, *,
        seen: int = 0, rollbacks: int = 0, anew: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._config, self._seen, self._rollbacks, self._anew = config, seen, rollbacks, anew
        self._losses = deque(recent_losses, maxlen=config.spike_window)
        self._spikes = list(spikes)
        self._not_finite = nonfinite_steps

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """What the next ones are judged by, oldest first."""
        return tuple(self._losses)

    @property
    def spikes(self) -> tuple[float, ...]:
        """In a row up to the last step seen."""
        return tuple(self._spikes)

    @property
    def nonfinite_steps(self) -> int:
        """How many in a row up to the last step seen were left out."""
        return self._not_finite

    @property
    def in_doubt(self) -> bool:
        """Whether the last step seen may turn out to be one of those to be rolled back: nothing to make a checkpoint of."""
        return bool(self._spikes or self._not_finite)

    @property
    def can_roll_back(self) -> bool:
        """Whether the run may be rolled back once more."""
        return self._rollbacks < self._config.max_rollbacks

    def see(self, step: int, loss: float, *, applied: bool) -> Rollback | None:
        """Judges a step, counted from 1; what it returns is to be rolled back, or only told where the loss spiked and no rollback is left.

        Args:
            loss: mean over all ranks; means nothing where the step was not applied.
            applied: whether the optimizer took the step; it leaves out one whose gradient is not finite.
        """
        if any(self._seen < begins <= step for begins in self._anew):  # which may itself be one of those that are skipped
            self._losses.clear()
        self._seen = step
        if not applied:
            self._not_finite += 1
            if self._not_finite <= self._config.max_nonfinite:
                return None
            row = f"{self._not_finite} step{'s' * (self._not_finite > 1)} in a row up to step {step}"
            began = step - self._not_finite + 1
            return Rollback(began, began, step, False, f"the gradient was not finite in {row}")
        self._not_finite = 0
        if not is_spike(loss, self._losses, self._config):
            self._spikes.clear()
            self._losses.append(loss)
            return None
        self._spikes.append(loss)
        if len(self._spikes) < self._config.spike_steps:
            return None
        usual, spikes = statistics.median(self._losses), len(self._spikes)
        if not self.can_roll_back:  # the run goes on with what it has; the losses are the usual ones from now on
            self._losses.extend(self._spikes)
            self._spikes.clear()
        # What made the loss rise was learned before it rose: as many steps before it are skipped too
        words = f"the loss was {loss:.4g} at step {step}, {spikes} in a row far above the usual {usual:.4g}"
        return Rollback(max(1, step - 2 * spikes + 1), step - spikes + 1, step, True, words)


def is_spike(loss: float, before: Sequence[float], config: GuardConfig) -> bool:
    """Whether a loss lies far above those before it, by their median and their median absolute deviation."""
    if not config.spike_deviations or len(before) < config.spike_window // 2:
        return False
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(one - usual) for one in before)  # of a normal distribution this is its standard deviation
    return loss - usual > config.spike_deviations * max(deviation, _LEAST_DEVIATION * abs(usual))


def is_skipped(position: int, skipped: Sequence[tuple[int, int]]) -> bool:
    """Whether a position lies in one of the half-open ranges."""
    return any(first <= position < end for first, end in skipped)


def knows(samples_seen: int, skipped: Sequence[tuple[int, int]], of_run: Sequence[tuple[int, int]]) -> bool:
    """Whether a checkpoint at `samples_seen`, which skipped some ranges, skipped all those of the run that lie before it."""
    return all((first, end) in skipped for first, end in of_run if first < samples_seen)


def disagreeing(sums: Sequence[int]) -> list[int] | None:
    """The ranks that hold something else than most, of sums of what all should hold alike; None where no more than half agree."""
    value, count = Counter(sums).most_common(1)[0]
    if 2 * count <= len(sums):
        return None
    return [rank for rank, own in enumerate(sums) if own != value]
