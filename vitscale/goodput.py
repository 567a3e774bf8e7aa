"""Where a run's wall time went: steps that count, and what was lost, by cause. From records alone; nothing is measured for it.

Imports no torch.
"""

import calendar
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

START_UP, REDONE, CHECKPOINTS, EVALUATION, DOWNTIME, OTHER = "start-up", "redone steps", "checkpoints", "evaluation", "downtime", "other"


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall time, from the first start on."""

    wall: float
    productive: float
    """Of steps that were not lost."""
    lost: dict[str, float]
    """start-up: before a start's first step. redone steps: made, and lost with a start that ended after its last checkpoint. checkpoints,
    evaluation: while the training stood still for them. downtime: between starts. other: among it, until a hang was found."""

    @property
    def share(self) -> float:
        """Productive time of wall time; 0 for a run that has only begun."""
        return self.productive / self.wall if self.wall > 0 else 0.0


def goodput(starts: Sequence[Mapping[str, Any]], ended: Mapping[int, float], lines: Sequence[Mapping[str, Any]], until: float) -> Goodput:
    """Divides up the wall time of a run. Pure.

    Args:
        starts: of run.json; `lost` of one tells what its taking up an older checkpoint made of the steps of those before it.
        ended: when each start ended, where that is known (ends.jsonl).
        lines: of metrics.jsonl, with `time`; a step may have `checkpoint_seconds`, in which no step was made.
        until: now for a run that runs, otherwise when it was last seen.
    """
    begins = [_seconds(start["time"]) for start in starts]
    if not begins:
        return Goodput(0.0, 0.0, {})
    lost = dict.fromkeys((START_UP, REDONE, CHECKPOINTS, EVALUATION, DOWNTIME, OTHER), 0.0)
    productive = 0.0
    for index, (start, begin) in enumerate(zip(starts, begins, strict=True)):
        follower = starts[index + 1] if index + 1 < len(starts) else None
        next_begin = begins[index + 1] if follower else until
        of_it = [line for line in lines if begin <= line.get("time", 0) < (next_begin if follower else float("inf"))]
        dropped = (follower or {}).get("lost", {})
        seen = max([begin, dropped.get("seen", 0.0), *(line["time"] for line in of_it)])
        end = min(ended.get(index, seen if follower else until), next_begin)
        made, loop_begins = _steps(start, of_it)
        redone = min(dropped.get("seconds", 0.0), max(0.0, end - begin - made))
        stalls = sum(line.get("checkpoint_seconds", 0.0) for line in of_it)
        evaluation = _evaluation(of_it)
        start_up = max(0.0, (loop_begins or end - redone) - begin)
        productive += made
        lost[START_UP] += start_up
        lost[REDONE] += redone
        lost[CHECKPOINTS] += stalls
        lost[EVALUATION] += evaluation
        lost[OTHER] += max(0.0, end - begin - start_up - made - redone - stalls - evaluation)
        lost[DOWNTIME] += max(0.0, next_begin - end)
    return Goodput(max(until, begins[-1]) - begins[0], productive, lost)


def _steps(start: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Seconds that the steps took that a start's lines tell of, and when the first of them began (None: no line tells)."""
    seconds, loop_begins, before = 0.0, None, start.get("step", 0)
    for line in lines:
        if "images_per_second" in line and line["step"] > before:
            took = (line["step"] - before) * line["samples_seen"] / line["step"] / line["images_per_second"]
            loop_begins = line["time"] - took if loop_begins is None else loop_begins
            seconds, before = seconds + took, line["step"]
    return seconds, loop_begins


def _evaluation(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from the lines of a start's steps to those of their evaluations, without the checkpoints' between: the next step tells of it.

    An evaluation that a start makes up for comes before its first step, and is a part of its start-up.
    """
    seconds = 0.0
    for before, line, after in zip(lines, lines[1:], [*lines[2:], {}], strict=False):
        if "eval_loss" in line:
            seconds += max(0.0, line["time"] - before["time"] - after.get("checkpoint_seconds", 0.0))
    return seconds


def steps_lost(step: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a start that goes on from `step` makes of later steps: `steps`, the `seconds` they took, and when the last line was `seen`."""
    later = [line for line in lines if line["step"] > step and "loss" in line]
    if not later:
        return {}
    seconds, _ = _steps({"step": step}, later)
    return {"steps": later[-1]["step"] - step, "seconds": seconds, "seen": max(line.get("time", 0.0) for line in lines)}


def _seconds(iso: str) -> float:
    return float(calendar.timegm(time.strptime(iso, "%Y-%m-%dT%H:%M:%SZ")))
