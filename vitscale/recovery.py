"""Taking a run up where it can go on, and taking it back where it went wrong.

A rollback is a start like any other: `roll_back` writes down which positions the run is to skip and ends this start on all ranks, and the
next one's `take_up` finds the newest checkpoint that learned nothing of them.
"""

import contextlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from vitscale import checkpoint, retention
from vitscale.config import TrainConfig
from vitscale.ending import Cause, Ended
from vitscale.engine import Engine, device
from vitscale.errors import CheckpointError
from vitscale.finding import find_checkpoint
from vitscale.guards import Guard, Rollback, disagreeing, knows
from vitscale.machine import this_host
from vitscale.origin import origin_of
from vitscale.run import cut_back, note_begin, note_initial, note_skipped, read_metrics, read_record, skipped_ranges, was_evaluated
from vitscale.timeline import Timeline

_HELP = "a lower --optimizer.peak-lr or more warm-up may help, in a run of its own (`vitscale run fork`)"


class TakenUp(NamedTuple):
    """Where a start goes on from."""

    folder: Path | None
    """The newest durable checkpoint."""
    faults: list[str]
    """What is wrong with newer ones."""
    evaluated: bool
    """Whether its step was evaluated."""
    skipped: tuple[tuple[int, int], ...]
    """Ranges of positions that the run leaves out."""


def take_up(config: TrainConfig) -> TakenUp:
    """Rank 0 looks, checks what is fine-tuned, and cuts the run's records back to the checkpoint."""
    found = [TakenUp(None, [], False, ())]
    if dist.get_rank() == 0:
        run = Path(config.out)
        skipped = skipped_ranges(read_record(run))
        _take_back(run, skipped)  # should the rank that was to do it have been killed
        folder, faults = checkpoint.newest_durable(run)
        description = checkpoint.describe(folder) if folder else None
        lines, starts = read_metrics(run), read_record(run)["starts"]
        reached = max((line["step"] for line in lines), default=0)
        told_of_one = any("save_seconds" in line for line in lines) or any(start.get("step") for start in starts)
        had_one = faults or told_of_one or (run / "checkpoints" / "latest").exists()
        if not description and reached and had_one:  # nobody wants weeks begun anew without a word
            found_there = "; ".join(faults) or "none is there"
            raise CheckpointError(
                f"metrics.jsonl tells of step {reached}, yet {run}/checkpoints has no whole one ({found_there}); restore one, or give "
                "another --out to start anew"
            )
        if not description and config.init:
            source = checkpoint.describe(find_checkpoint(config.init.folder))
            note_initial(run, origin_of(source, config.init.weights, results=False))
        note_begin(run, description.step if description else 0)
        cut_back(run, description.step if description else 0, description.samples_seen if description else 0)
        evaluated = bool(description and was_evaluated(run, description.step))
        found = [TakenUp(folder, faults, evaluated, skipped)]
    dist.broadcast_object_list(found, src=0, device=device())
    return found[0]


def _take_back(run: Path, skipped: tuple[tuple[int, int], ...]) -> None:
    """Removes checkpoints that learned what the run skips by now."""
    for folder in checkpoint.committed(run):
        try:
            description = checkpoint.describe(folder)
        except CheckpointError:  # damaged, and found to be so when it is verified
            continue
        if not knows(description.samples_seen, description.state.skipped, skipped):
            retention.remove(run, [description.step])


def roll_back(
    rollback: Rollback, guard: Guard, config: TrainConfig, timeline: Timeline, skipped: tuple[tuple[int, int], ...]
) -> Ended | None:  # fmt: skip
    """Writes down which positions the run is to skip from now on; returns what ends this start on all ranks. A collective.

    None where it was the run's last step alone, which is never skipped.
    """
    if rollback.began == timeline.total_steps:
        return None
    if not guard.can_roll_back:
        most = config.guard.max_rollbacks
        return Ended(Cause.DIVERGED, f"{rollback.words}; guard.max_rollbacks={most} allows no {'more' if most else 'rollback'}; {_HELP}")
    if not rollback.spike and any(end == timeline.samples_at(rollback.first - 1) for _, end in skipped):
        return Ended(Cause.DIVERGED, f"{rollback.words}, right after those that were skipped: it is not the data; {_HELP}")
    rollback = replace(
        rollback, last=min(rollback.last, timeline.total_steps - 1)
    )  # the last step is always made, and its checkpoint written
    cause = Cause.SPIKE if rollback.spike else Cause.NONFINITE
    words = rollback.words
    if dist.get_rank() == 0:
        run = Path(config.out)
        first = first_to_skip(rollback, _whole_ones(run, rollback))
        words = f"{words}: steps {first} to {rollback.last} are skipped from now on"
        note_skipped(run, (timeline.samples_at(first - 1), timeline.samples_at(rollback.last)), cause, words)
        _take_back(run, skipped_ranges(read_record(run)))
    dist.barrier()  # nobody ends, and has the others ended with it, before that is done
    return Ended(cause, words)


def _whole_ones(run: Path, rollback: Rollback) -> list[int]:
    """The steps of checkpoints that can be gone on from, newest first, down to the first one that a rollback leaves in any case."""
    found: list[int] = []
    for folder in reversed(checkpoint.committed(run)):
        with contextlib.suppress(OSError):  # the disk's, which may hold others
            if checkpoint.verify(folder) is None:
                found.append(checkpoint.step_of(folder))
        if found and found[-1] < rollback.first:
            break
    return found


def first_to_skip(rollback: Rollback, checkpoints: Collection[int]) -> int:
    """Where skipping begins: where it should, unless the only checkpoints lie behind that. Pure.

    Then it begins behind the newest from before what went wrong; where there is none, behind the newest made since.
    """
    before = [step for step in checkpoints if step < rollback.began] or [step for step in checkpoints if step < rollback.last]
    if not before or min(before) < rollback.first:
        return rollback.first
    return max(before) + 1


def left_out_line(run: Path, step: int) -> str:
    """What the person at the terminal reads of a step that was left out."""
    return f"warning: step {step} is left out, because its gradient is not finite; {run}/left-out.jsonl has its samples"


def note_left_out(run: Path, step: int, position: int, seen: list[tuple[np.ndarray, torch.Tensor]]) -> None:
    """Writes down the samples of this rank whose loss was not finite in a step that was left out, and rank 0 its positions in any case."""
    rank = dist.get_rank()
    samples = [sample for samples_B, loss in seen if not torch.isfinite(loss) for sample in samples_B.tolist()]
    if samples or rank == 0:
        with contextlib.suppress(OSError), open(run / "left-out.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "position": position, "rank": rank, "samples_of_nonfinite_loss": samples}) + "\n")


def compare_ranks(engine: Engine, step: int) -> Ended | None:
    """What ends this start, on all ranks, where they do not hold the same weights and clock. A collective."""
    own = torch.tensor([engine.bit_sum() ^ (step + engine.updates)], device=device())
    of_all = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, own)
    wrong = disagreeing([int(of_one) for of_one in of_all])
    if wrong == []:
        return None
    hosts: list[str] = [""] * len(of_all)
    dist.all_gather_object(hosts, this_host())
    whose = f"rank {', '.join(map(str, wrong))} holds" if wrong else "ranks hold"
    blamed = tuple(sorted({hosts[rank] for rank in wrong or ()}))
    return Ended(Cause.CORRUPT, f"{whose} other weights than the rest at step {step}, though all should be alike", bad_nodes=blamed)
