"""Where wall time went, in histories made by hand, and of steps that a start lost."""

import json
import time
from pathlib import Path

import pytest

from tests.runs import begin, last_start, log
from vitscale.config import TrainConfig
from vitscale.goodput import CHECKPOINTS, DOWNTIME, EVALUATION, OTHER, REDONE, START_UP, Goodput, goodput, steps_lost
from vitscale.run import cut_back, read_metrics

T = 1_700_000_000  # when a run is started; a step is 8 images and takes 2 seconds


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(T + seconds))


def step(number: int, seconds: float, **more: float) -> dict:
    return {"step": number, "samples_seen": 8 * number, "loss": 1.0, "images_per_second": 4.0, "time": T + seconds, **more}


def parts(**seconds: float) -> dict[str, float]:
    names = {"start_up": START_UP, "redone": REDONE, "checkpoints": CHECKPOINTS, "evaluation": EVALUATION, "downtime": DOWNTIME}
    return dict.fromkeys([*names.values(), OTHER], 0.0) | {names.get(name, name): value for name, value in seconds.items()}


def test_an_uninterrupted_run() -> None:
    """10 s of start-up, 20 steps, of which the 10th is followed by a checkpoint (3 s) and an evaluation (5 s), and 1 s of the end."""
    lines = [
        step(1, 12),
        step(10, 30),
        {"step": 10, "samples_seen": 80, "eval_loss": 1.0, "time": T + 38},
        step(20, 58, checkpoint_seconds=3.0),
    ]
    found = goodput([{"time": at(0), "step": 0}], {0: T + 59}, lines, T + 59)
    assert found == Goodput(59.0, 40.0, parts(start_up=10, checkpoints=3, evaluation=5, other=1))
    assert found.share == 40 / 59


def test_an_evaluation_of_the_last_step_and_one_that_a_start_makes_up_for() -> None:
    """The latter, before the first step, is start-up: 10 s, then an evaluation of 5 s."""
    evaluation = {"samples_seen": 80, "eval_loss": 1.0}
    lines = [{"step": 5, **evaluation, "time": T + 15}, step(10, 25), {"step": 10, **evaluation, "time": T + 31}]
    found = goodput([{"time": at(0), "step": 5}], {0: T + 31}, lines, T + 31)
    assert found == Goodput(31.0, 10.0, parts(start_up=15, evaluation=6))


def test_a_kill_costs_the_steps_since_the_checkpoint_the_wait_and_another_start_up() -> None:
    """Killed after step 15 (at 45 s), found at 46, started again at 50 from step 10, with 8 s of start-up."""
    starts = [{"time": at(0), "step": 0}, {"time": at(50), "step": 10, "lost": {"steps": 5, "seconds": 10.0, "seen": T + 45.0}}]
    lines = [step(1, 17), step(10, 35), step(11, 60), step(20, 78)]
    found = goodput(starts, {0: T + 46, 1: T + 78}, lines, T + 78)
    assert found == Goodput(78.0, 40.0, parts(start_up=15 + 8, redone=10, downtime=4, other=1))
    assert found.wall == found.productive + sum(found.lost.values())


def test_of_a_launcher_that_was_killed_nobody_wrote_the_end() -> None:
    """What was last seen of it was step 15, at 45 s; the rest until the next start is downtime."""
    starts = [{"time": at(0), "step": 0}, {"time": at(100), "step": 10, "lost": {"steps": 5, "seconds": 10.0, "seen": T + 45.0}}]
    found = goodput(starts, {}, [step(10, 35)], T + 107)
    assert found == Goodput(107.0, 20.0, parts(start_up=15 + 7, redone=10, downtime=55))


def test_a_start_that_lost_all_its_steps_and_one_that_made_none() -> None:
    starts = [
        {"time": at(0), "step": 0},
        {"time": at(40), "lost": {"steps": 6, "seconds": 12.0, "seen": T + 30.0}, "step": 0},
        {"time": at(60), "step": 0},
    ]
    found = goodput(starts, {0: T + 31, 1: T + 55}, [step(1, 72), step(5, 80)], T + 80)
    assert found == Goodput(80.0, 10.0, parts(start_up=19 + 15 + 10, redone=12, downtime=9 + 5))


def test_a_hang_is_time_in_which_nothing_else_was_done() -> None:
    found = goodput([{"time": at(0), "step": 0}], {0: T + 150}, [step(10, 30)], T + 150)
    assert found == Goodput(150.0, 20.0, parts(start_up=10, other=120))


def test_of_a_run_that_has_only_begun_all_is_start_up() -> None:
    assert goodput([{"time": at(0)}], {}, [], T + 9) == Goodput(9.0, 0.0, parts(start_up=9))
    assert goodput([], {}, [], T) == Goodput(0.0, 0.0, {})


def test_lines_every_few_steps_tell_the_same() -> None:
    dense = [step(number, 10 + 2 * number) for number in range(1, 21)]
    of = [goodput([{"time": at(0), "step": 0}], {0: T + 50}, lines, T + 50) for lines in (dense, dense[4::5])]
    assert of[0] == of[1] == Goodput(50.0, 40.0, parts(start_up=10))


@pytest.mark.parametrize(("taken_up", "lost"), [(2, {"steps": 2, "seconds": 4.0, "seen": T + 18.0}), (4, None)])
def test_what_is_cut_back_is_noted_with_the_start(config: TrainConfig, taken_up: int, lost: dict | None) -> None:
    config = begin(config)
    run = Path(config.out)
    (run / "metrics.jsonl").unlink()
    log(config, *(step(number, 10 + 2 * number) for number in (1, 2, 3, 4)))
    begin_lines = read_metrics(run)
    cut_back(run, taken_up, 8 * taken_up)
    assert last_start(config).get("lost") == lost
    assert read_metrics(run) == begin_lines[:taken_up]


def test_steps_without_a_rate_are_counted_and_cost_nothing() -> None:
    lines = [json.loads('{"step": 7, "loss": 1.0}')]
    assert steps_lost(3, lines) == {"steps": 4, "seconds": 0.0, "seen": 0.0}
    assert steps_lost(7, lines) == {}
