"""What is to be done about a start that has ended.

    RUN/ends.jsonl    a line a start: what was found, and what was decided

The supervisor, which is the local launcher or SLURM's batch script, asks `conclude` once all ranks are gone. That gathers what there is
(`ending.py`'s records, heartbeats, the run's directory) and asks `judge`, a pure function. Imports no torch.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_tools.errors import message_of
from vitscale.config import UNREADABLE, from_dict
from vitscale.ending import EXIT_FINISHED, EXIT_STOPPED, Cause, End, killed_by, read_ends
from vitscale.heartbeat import read_heartbeats
from vitscale.run import is_finished, reached, read_config, read_record

Action = Literal["finished", "again", "requeue", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What is to be done after a start has ended.

    finished: nothing. again: another start at once, on the same machines. requeue: another start later, on whatever machines there are.
    stop: nothing is started again; a person is told why.
    """

    action: Action
    why: str
    cause: Cause | None = None
    """None: nothing went wrong."""
    blamed: tuple[str, ...] = ()
    """The machines that it came from."""
    without: tuple[str, ...] = ()
    """Of requeue: machines that are to be left out."""


@dataclass(frozen=True)
class Past:
    """What was found and decided of a start: a line of ends.jsonl."""

    start: int
    time: float
    cause: str
    """A Cause, or "" where nothing went wrong."""
    words: str
    """The first error's last line."""
    rank: int
    """The rank that it came from; -1: not known."""
    blamed: tuple[str, ...]
    """The machines that it came from."""
    step: int
    """The furthest step that the start reached."""
    progressed: bool
    """Whether that was further than any start before it."""
    action: Action
    why: str
    without: tuple[str, ...]


# What follows from the cause alone.
_RULES: dict[Cause, tuple[Action, str]] = {
    Cause.SIGNAL: ("requeue", "saved when asked to by a signal; the job goes on later"),
    Cause.PREEMPTED: ("requeue", "the job was preempted"),
    Cause.REQUEST: ("stop", "a person asked the run to stop"),
    Cause.SPIKE: ("again", "rolled back after a spike of the loss"),
    Cause.NONFINITE: ("again", "rolled back after gradients that were not finite"),
    Cause.CORRUPT: ("again", "ranks disagreed on what they must hold alike; which of them is wrong is not known"),
    Cause.HANG: ("again", "nothing went on"),
    Cause.LOST_PEER: ("again", "a rank went away without a word"),
    Cause.KILLED: ("again", "a rank was killed"),
    Cause.DIVERGED: ("stop", "training diverges, and no rollback is left"),
    Cause.OUT_OF_MEMORY: (
        "stop",
        "memory ran out, as it would again; a smaller --micro-batch-size, a higher --engine.zero-stage or "
        "--engine.checkpoint-every-n-blocks 1 (activation checkpointing) needs less",
    ),
    Cause.DISK_FULL: ("stop", "the disk or the quota is full, or fails; make room, and the same command goes on"),
    Cause.INPUT: ("stop", "what was given cannot be trained with"),
    Cause.ERROR: ("stop", "the code failed"),
    Cause.BAD_NODE: ("stop", "a machine failed its checks, and there is no other"),
}
_STOOD_STILL = 10.0  # seconds: far more than a busy machine keeps a thread waiting, and less than any bound of a hang that is learned
_NODES_FAULT = (Cause.HANG, Cause.KILLED)  # of which twice in a row on one machine is no accident
_NOT_COUNTED = (Cause.SPIKE, Cause.NONFINITE, Cause.PREEMPTED)  # the run itself bounds how often it rolls back


def judge(
    ends: Sequence[End],
    exit_status: int,
    *,
    finished: bool,
    stop_asked: bool,
    preempted: bool,
    cluster: bool,
    history: Sequence[Past],
    max_restarts: int,
    progressed: bool,
    silent: Sequence[str] = (),
) -> Verdict:
    """What to do after a start. Pure; the rules are asked from top to bottom.

    Args:
        ends: its end records, as `read_ends` sorts them.
        exit_status: of the start: of its first rank that failed, or what srun gave.
        finished: whether the run is.
        stop_asked: whether a person asks the run to stop.
        preempted: whether SLURM has said that it wants the machines back.
        cluster: whether there are other machines to start on.
        history: what was decided of the starts before it, oldest first.
        max_restarts: starts in a row without progress, after which nothing is started again.
        progressed: whether it came further than the starts before it.
        silent: the machines of ranks that left no record; where others hang, they wait for those.
    """
    if finished:
        return Verdict("finished", "the run is finished")
    cause, blamed = cause_of_start(ends, exit_status, silent)
    if stop_asked or preempted:
        cause = Cause.REQUEST if stop_asked else Cause.PREEMPTED
        return Verdict(*_RULES[cause], cause)
    action, why = _RULES[cause] if cause else ("again", "the ranks ended well, yet the run is not finished")
    if ends and cause is Cause.SIGNAL and ends[0].signal:
        why = why.replace("a signal", f"SIG{ends[0].signal}")
    without: tuple[str, ...] = ()

    if cause in (Cause.ERROR, Cause.INPUT) and progressed:  # what made new steps may have been stopped by storage or a worker's end
        action, why = "again", f"{why}, after steps that no start had made before"
    if cluster and cause in (Cause.BAD_NODE, Cause.CORRUPT) and blamed:
        action, without = "requeue", blamed
        why = "a machine failed its checks" if cause is Cause.BAD_NODE else "a machine held other values than all others"
    before = history[-1] if history else None
    if cluster and cause in _NODES_FAULT and before and before.cause in _NODES_FAULT and (both := set(blamed) & set(before.blamed)):
        action, without = "requeue", tuple(sorted(both))
        why = f"{why}, for the second start in a row on {', '.join(without)}"

    if action in ("again", "requeue") and cause not in _NOT_COUNTED and not (progressed and cause is Cause.SIGNAL):
        in_vain = 0 if progressed else 1 + _starts_in_vain(history)
        if in_vain >= max_restarts:
            starts = f"{in_vain} starts in a row made no step that was new" if in_vain > 1 else f"guard.max_restarts is {max_restarts}"
            return Verdict("stop", f"{why}; {starts}", cause, blamed)
    return Verdict(action, why, cause, blamed, without)


def _starts_in_vain(history: Sequence[Past]) -> int:
    """How many starts without progress were made in a row by themselves; rollbacks and preemptions are passed over."""
    in_vain = 0
    for past in reversed(history):
        if past.progressed or past.action in ("stop", "finished"):
            break
        in_vain += past.cause not in _NOT_COUNTED
    return in_vain


def cause_of_start(ends: Sequence[End], exit_status: int, silent: Sequence[str] = ()) -> tuple[Cause | None, tuple[str, ...]]:
    """The cause of a start's end (None: its ranks ended well), and the machines that it came from."""
    if ends:
        first = ends[0]
        stopped = [end.host for end in ends if end.stood_still > _STOOD_STILL]
        if first.cause is Cause.HANG and (waited_for := stopped or silent):  # those that tell of a hang wait for those that cannot
            return first.cause, tuple(sorted(set(waited_for)))
        if first.cause is Cause.LOST_PEER and len(set(silent)) == 1:  # all others say that it went away, and it does not say why
            return Cause.KILLED, tuple(silent[:1])
        return first.cause, first.bad_nodes or (() if first.cause in (Cause.LOST_PEER, Cause.CORRUPT) else (first.host,))
    if exit_status == EXIT_FINISHED:
        return None, ()
    if exit_status == EXIT_STOPPED or killed_by(exit_status) == "USR2":  # which nobody sends but to have the run saved
        return Cause.SIGNAL, ()
    return (Cause.KILLED if killed_by(exit_status) else Cause.ERROR), ()


# ---------------------------------------------------------------------------------------------------------------------------------------
# A start that has ended
# ---------------------------------------------------------------------------------------------------------------------------------------


def conclude(
    run: Path, start: int, exit_status: int, *, cluster: bool = False, preempted: bool = False, stop_asked: bool = False
) -> Verdict:  # fmt: skip
    """Gathers what there is of a start that has ended, judges, and writes it to ends.jsonl. Call it when no rank lives any more."""
    history = read_history(run)
    judged = any(past.start == start for past in history)  # the last attempt came to no start of its own
    ends = [] if judged else read_ends(run, start)
    silent = silent_hosts(run, start, ends) if cluster and not judged else []  # the local launcher ends ranks itself, and sees who went
    record = read_record(run)
    begun: int = record["starts"][start].get("step", 0)
    step = max([begun, reached(run), *(end.step for end in ends), *(sign.step for sign in read_heartbeats(run) if sign.start == start)])
    progressed = not judged and step > max([begun, *(past.step for past in history)])
    verdict = judge(
        ends, exit_status, finished=is_finished(run), stop_asked=stop_asked or (run / "stop").exists(),
        preempted=preempted, cluster=cluster, history=history,
        max_restarts=read_config(run).guard.max_restarts, progressed=progressed, silent=silent,
    )  # fmt: skip
    words, rank = (ends[0].last_line, ends[0].rank) if ends else ("", -1)
    past = Past(
        start, time.time(), verdict.cause or "", words, rank, verdict.blamed, step, progressed, verdict.action, verdict.why, verdict.without
    )
    try:
        with open(run / "ends.jsonl", "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # by a kill in mid-word
            file.write(b"\n" * torn + json.dumps(asdict(past)).encode() + b"\n")
    except OSError as error:  # a full disk does not change what is to be done
        with contextlib.suppress(OSError):
            print(f"warning: {run}/ends.jsonl cannot be written ({message_of(error)})", file=sys.stderr)
    return verdict


def read_history(run: Path) -> list[Past]:
    """What was decided of the starts that have ended, oldest first. A line that is damaged, or of a later version, is left out."""
    file = run / "ends.jsonl"
    past = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(*UNREADABLE):
            past.append(from_dict(Past, json.loads(line)))
    return past


def silent_hosts(run: Path, start: int, ends: Sequence[End]) -> list[str]:
    """The machines of ranks that left no record, where their node's heartbeat tells its name."""
    spoken = {end.rank for end in ends}
    signs = [sign for sign in read_heartbeats(run) if sign.start == start]
    return sorted({sign.host for sign in signs if not spoken.issuperset(range(sign.rank, sign.rank + sign.ranks))})
