"""What is decided of steps that go wrong."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import GuardConfig
from vitscale.guards import Guard, Rollback, disagreeing, is_skipped, is_spike, knows
from vitscale.recovery import first_to_skip

CONFIG = GuardConfig(max_nonfinite=2, spike_deviations=10, spike_window=64, spike_steps=3, max_rollbacks=2)


def settled(config: GuardConfig = CONFIG, rollbacks: int = 0, seed: int = 0) -> Guard:
    """A guard that has seen 64 steps of noise around 2."""
    noise = random.Random(seed)
    guard = Guard(config, rollbacks=rollbacks)
    assert [guard.see(step, noise.gauss(2, 0.05), applied=True) for step in range(1, 65)] == [None] * 64
    return guard


def test_spikes_in_a_row_roll_back_to_before_what_made_them() -> None:
    guard = settled()
    assert guard.see(65, 9, applied=True) is None
    assert guard.see(66, 8, applied=True) is None
    rollback = guard.see(67, 7, applied=True)
    assert rollback is not None
    assert rollback.spike
    assert (rollback.first, rollback.last) == (62, 67)  # three spikes, and three steps before them
    assert "step 67" in rollback.words
    assert "3 in a row" in rollback.words


def test_single_spikes_pass_and_do_not_teach() -> None:
    """A spike that is over before it counts changes nothing, however often it comes, not even what the next ones are judged by."""
    guard = settled()
    before = guard.recent_losses
    for step in range(65, 365, 3):
        assert guard.see(step, 9, applied=True) is None
        assert guard.see(step + 1, 9, applied=True) is None
        assert guard.see(step + 2, statistics.median(before), applied=True) is None
    assert max(guard.recent_losses) < 3


@given(st.integers(0, 1000), st.floats(-0.02, 0.02))
def test_noise_and_a_trend_are_no_spikes(seed: int, slope: float) -> None:
    noise = random.Random(seed)
    guard = Guard(CONFIG)
    for step in range(1, 400):
        assert guard.see(step, 5 + slope * step / 4 + noise.gauss(0, 0.1), applied=True) is None


@given(st.floats(0.1, 100), st.integers(0, 1000))
def test_what_is_a_spike_does_not_depend_on_the_scale(scale: float, seed: int) -> None:
    noise = random.Random(seed)
    before = [noise.gauss(2, 0.05) for _ in range(64)]
    usual = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(one - usual) for one in before)
    for factor, expected in ((9.9, False), (10.1, True)):
        assert is_spike((usual + factor * deviation) * scale, [one * scale for one in before], CONFIG) is expected


def test_a_guard_that_is_resumed_judges_alike() -> None:
    """What it judges by goes through a checkpoint, rows in progress too."""
    noise, one = random.Random(5), settled()
    rollbacks = 0
    for step in range(65, 400):
        loss, applied = noise.choice([2.0, 9.0, 9.0]), noise.random() < 0.6
        other = Guard(CONFIG, one.recent_losses, one.spikes, one.nonfinite_steps)
        found = one.see(step, loss, applied=applied)
        assert other.see(step, loss, applied=applied) == found
        rollbacks += found is not None
    assert rollbacks > 10, "or nothing was tried"


def test_nothing_is_judged_before_half_a_window_is_there() -> None:
    assert not is_spike(1e9, [1.0] * 31, CONFIG)
    assert is_spike(1e9, [1.0] * 32, CONFIG)
    assert not is_spike(1e9, [1.0] * 64, GuardConfig(spike_deviations=0))


def test_too_many_gradients_that_are_not_finite_roll_back() -> None:
    guard = settled()
    assert [guard.see(step, math.nan, applied=False) for step in (65, 66)] == [None, None]
    assert guard.see(67, 2.0, applied=True) is None  # which ends the row
    assert [guard.see(step, math.inf, applied=False) for step in (68, 69)] == [None, None]
    rollback = guard.see(70, math.nan, applied=False)
    assert rollback is not None
    assert not rollback.spike
    assert (rollback.first, rollback.last) == (68, 70)


def test_without_rollbacks_left_the_new_level_becomes_the_usual_one() -> None:
    guard = settled(rollbacks=2)
    assert not guard.can_roll_back
    told = [rollback.last for step in range(65, 200) if (rollback := guard.see(step, 9.0, applied=True))]
    assert told[0] == 67, "a person is told"
    assert len(told) < 15, "until half of the losses that are judged by are as high"
    assert statistics.median(guard.recent_losses) == 9.0
    assert guard.see(200, math.nan, applied=False) is None
    assert guard.see(201, math.nan, applied=False) is None
    assert guard.see(202, math.nan, applied=False) is not None, "a gradient that stays not finite is told all the same"


@pytest.mark.parametrize(
    ("checkpoints", "first"),
    [([], 12), ([5, 10], 12), ([10, 13], 12), ([13], 14), ([12, 14], 15), ([14, 16], 15), ([16], 17), ([15, 16], 17), ([17], 12)],
)
def test_skipping_begins_behind_a_checkpoint_if_there_is_no_other(checkpoints: list[int], first: int) -> None:
    """Of losses that spike from step 15 on, where steps from 12 on should be skipped."""
    assert first_to_skip(Rollback(12, 15, 17, True, ""), checkpoints) == first


def test_ranges_are_half_open() -> None:
    assert [is_skipped(position, [(24, 48), (96, 120)]) for position in (0, 23, 24, 47, 48, 96, 119, 120)] == [
        False, False, True, True, False, True, True, False,
    ]  # fmt: skip


def test_a_checkpoint_is_good_if_it_knows_what_lies_before_it() -> None:
    of_run = ((48, 96), (240, 288))
    assert knows(48, (), of_run)  # written before the first range
    assert not knows(72, (), of_run)
    assert not knows(120, (), of_run)
    assert knows(240, ((48, 96),), of_run)
    assert not knows(264, ((48, 96),), of_run)
    assert knows(480, of_run, of_run)


@pytest.mark.parametrize(
    ("sums", "expected"),
    [([7], []), ([7, 7, 7], []), ([7, 8, 7], [1]), ([8, 7, 7, 9, 7], [0, 3]), ([7, 8], None), ([7, 7, 8, 8], None), ([1, 2, 3], None)],
)
def test_who_disagrees(sums: list[int], expected: list[int] | None) -> None:
    assert disagreeing(sums) == expected
