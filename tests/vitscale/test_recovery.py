"""Where a start takes a run up, and what a rollback leaves for it, with checkpoints that hold no tensors."""

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.checkpoint_verbs import checkpoint_prune
from tests.runs import begin, log
from tests.vitscale.savers import about
from vitscale import checkpoint
from vitscale.checkpoint import RunState
from vitscale.config import TrainConfig
from vitscale.ending import Cause, Ended
from vitscale.guards import Guard, Rollback
from vitscale.recovery import roll_back, take_up
from vitscale.run import note_skipped, read_record, skipped_ranges
from vitscale.timeline import Span, Timeline, steady

SPIKE = Rollback(12, 15, 17, True, "the loss was 9")


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def begun(config: TrainConfig) -> TrainConfig:
    """A run of steps of 8 samples, as `about` counts them."""
    return begin(dataclasses.replace(config, global_batch_size=8))


def write(config: TrainConfig, *steps: int, **state) -> None:
    for step in steps:
        hidden = checkpoint.partial_folder(Path(config.out), step)
        hidden.mkdir(parents=True)
        checkpoint.write_description(
            hidden / "checkpoint.json", dataclasses.replace(about(Path(config.out), step), state=RunState(**state))
        )
        checkpoint.commit(Path(config.out), step, {"checkpoint.json": checkpoint.file_checksum(hidden / "checkpoint.json")})


def steps_left(config: TrainConfig) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.committed(Path(config.out))]


def rolled_back(config: TrainConfig, rollback: Rollback = SPIKE) -> tuple[tuple[int, int], ...]:
    """The steps that are skipped from then on, each row of them from its first to its last."""
    ended = roll_back(rollback, Guard(config.guard), config, steady(config.model.image_size, 8, 8, total_steps=27), ())
    assert isinstance(ended, Ended)
    assert ended.cause is Cause.SPIKE
    return tuple((first // 8 + 1, end // 8) for first, end in skipped_ranges(read_record(Path(config.out))))


def test_a_start_takes_back_what_a_killed_rollback_left(begun: TrainConfig) -> None:
    write(begun, 10, 20)
    note_skipped(Path(begun.out), (11 * 8, 17 * 8), "spike", "")
    found = take_up(begun)
    assert found.folder is not None
    assert (found.folder.name, found.skipped) == ("step-00000010", ((11 * 8, 17 * 8),))
    assert steps_left(begun) == [10]


def test_a_rollback_skips_steps_of_the_sizes_that_they_had(begun: TrainConfig) -> None:
    """Steps 12 to 17, of which those after step 14 have twice the images."""
    timeline = Timeline((Span(0, 0, (8, 8), 8, 8), Span(14, 112, (8, 8), 16, 8)), 27)
    assert isinstance(roll_back(SPIKE, Guard(begun.guard), begun, timeline, ()), Ended)
    assert skipped_ranges(read_record(Path(begun.out))) == ((11 * 8, 14 * 8 + 3 * 16),)
    nonfinite = Rollback(18, 18, 19, False, "the gradient was not finite")
    ended = roll_back(nonfinite, Guard(begun.guard), begun, timeline, skipped_ranges(read_record(Path(begun.out))))
    assert ended is not None
    assert ended.cause is Cause.DIVERGED, "right after those that were skipped"


def test_a_rollback_keeps_one_to_go_on_from(begun: TrainConfig) -> None:
    write(begun, 10, 14, 20)
    assert rolled_back(begun) == ((12, 17),)
    assert steps_left(begun) == [10]


def test_a_damaged_checkpoint_is_none_to_go_on_from(begun: TrainConfig) -> None:
    write(begun, 10, 14)
    (checkpoint.step_folder(Path(begun.out), 10) / "checkpoint.json").write_text("{}")
    assert rolled_back(begun) == ((15, 17),)
    found = take_up(begun)
    assert found.folder is not None
    assert found.folder.name == "step-00000014"


@pytest.mark.parametrize("last", [17, 27])
def test_where_the_only_one_was_made_amid_the_spike_that_is_gone_on_from(begun: TrainConfig, last: int) -> None:
    write(begun, 16, spikes=(9.0, 9.0))
    log(begun, {"step": 17, "samples_seen": 17 * 8, "loss": 9.0})
    assert rolled_back(begun, dataclasses.replace(SPIKE, last=last)) == ((17, min(last, 26)),)
    found = take_up(begun)
    assert found.folder is not None
    assert found.folder.name == "step-00000016"


def test_prune_by_hand_keeps_one_from_before_what_may_be_rolled_back(begun: TrainConfig) -> None:
    write(begun, 8, 10)
    write(begun, 12, nonfinite_steps=1)
    checkpoint_prune([begun.out, "--keep", "1"])
    assert steps_left(begun) == [10, 12]
