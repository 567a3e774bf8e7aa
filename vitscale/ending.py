"""Why a rank ended before its run did: causes, and the records that it leaves. What follows from them is `verdict.py`'s to say.

    RUN/ends/start-003-rank-00017.json   an end record

Imports no torch.
"""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from data_tools.errors import UserError, message_of
from vitscale.config import UNREADABLE, from_dict
from vitscale.machine import this_host, this_place

EXIT_FINISHED, EXIT_FAILED, EXIT_STOPPED = 0, 1, 75  # of a rank; stopped: saved, to be gone on with later
EXIT_INTERRUPTED = 130  # of a command after Ctrl-C, as a shell has it


class Cause(StrEnum):
    """Why a rank ended."""

    SIGNAL = "signal"
    """A signal asked for it, and the ranks saved."""
    PREEMPTED = "preempted"
    """SLURM wants the machines for another job."""
    REQUEST = "request"
    """A person asked for it, and the ranks saved."""
    SPIKE = "spike"
    """The loss rose suddenly: rolled back, and the next start leaves those positions out."""
    NONFINITE = "nonfinite"
    """Gradients stayed not finite: rolled back in the same way."""
    DIVERGED = "diverged"
    """The same with no rollback left."""
    CORRUPT = "corrupt"
    """Ranks hold different values of what they must hold alike."""
    BAD_NODE = "bad node"
    """A node failed preflight."""
    OUT_OF_MEMORY = "out of memory"
    DISK_FULL = "disk full"
    """Or one that cannot be written, so that a run's last checkpoint was lost."""
    HANG = "hang"
    """Nothing went on for longer than the bound that the run has learned."""
    LOST_PEER = "lost peer"
    """Another rank went away: a consequence, never the cause of a start's end."""
    KILLED = "killed"
    """A signal ended the process, which left no record."""
    INPUT = "input"
    """What the user gave cannot be trained with, or can no more: a file that is gone, a storage that does not answer."""
    ERROR = "error"
    """A fault of the code, or of the machine in a way that nothing above describes."""


@dataclass(frozen=True)
class End:
    """What ended a rank."""

    cause: Cause
    words: str
    """One line, or a traceback."""
    start: int
    rank: int
    node: int
    host: str
    """The machine's name as SLURM knows it (`this_host`)."""
    time: float
    step: int
    signal: str = ""
    """Of SIGNAL and KILLED: its name without SIG."""
    bad_nodes: tuple[str, ...] = ()
    """Machines that are to be left out, as SLURM knows them."""
    stood_still: float = 0.0
    """Seconds for which the process had not run at all right before: it was stopped, or its machine was."""

    @property
    def last_line(self) -> str:
        """Of its words: of a traceback, the exception."""
        return self.words.rstrip().rpartition("\n")[2]


class Ended(Exception):  # noqa: N818 - an end, not an error
    """What ends a start on purpose: on all ranks alike, or on one `alone`, which then tells of it itself."""

    def __init__(self, cause: Cause, words: str, *, signal: str = "", bad_nodes: tuple[str, ...] = (), alone: bool = False) -> None:
        super().__init__(words)
        self.cause, self.words, self.signal, self.bad_nodes, self.alone = cause, words, signal, bad_nodes, alone


# ---------------------------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------------------------


def end_of_this_rank(error: BaseException, *, start: int, step: int, stood_still: float) -> End:
    """The end of this process, whose place its environment tells."""
    place = this_place()
    named = (error.signal, error.bad_nodes) if isinstance(error, Ended) else ("", ())
    return End(cause_of(error), words_of(error), start, place.rank, place.node, this_host(), time.time(), step, *named, stood_still)


def is_its_own(error: BaseException) -> bool:
    """Whether an end is one rank's to tell. What all have to say rank 0 tells; nodes that are to be left out each of them does."""
    return not isinstance(error, Ended) or error.alone or bool(error.bad_nodes)


def write_end(run: Path, end: End) -> None:
    """Writes a rank's end record. The first of a rank counts; on a disk that is full it goes to standard error instead."""
    file = run / "ends" / f"start-{end.start:03d}-rank-{end.rank:05d}.json"
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        if file.exists():
            return
        file.parent.mkdir(exist_ok=True)
        beside.write_text(json.dumps(asdict(end)) + "\n")
        beside.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
            print(f"rank {end.rank} cannot write its end record ({error}): {json.dumps(asdict(end))}", file=sys.stderr, flush=True)


def read_ends(run: Path, start: int) -> list[End]:
    """The end records of a start: causes before consequences, and among each the first one first. One that is damaged is left out."""
    ends: list[End] = []
    for file in sorted((run / "ends").glob(f"start-{start:03d}-rank-*.json")):
        with contextlib.suppress(OSError, *UNREADABLE):
            ends.append(from_dict(End, json.loads(file.read_text(errors="replace"))))
    return in_order(ends)


def in_order(ends: Sequence[End]) -> list[End]:
    """Causes before consequences, and among each the first one first. A hang is often a consequence too: of a peer that went away."""
    return sorted(ends, key=lambda end: (end.cause is Cause.LOST_PEER, end.cause is Cause.HANG, end.time))


_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|socket timeout|timed out|remote process exited|ncclRemoteError"
    r"|unhandled system error|watchdog|collective operation timeout|(recv|send|read|write)\w* (failed|error)|TCPStore",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
_NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)


def cause_of(error: BaseException) -> Cause:
    """Why an exception ends a rank."""
    said = str(error)
    if isinstance(error, Ended):
        return error.cause
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or _NO_SPACE.search(said):
        return Cause.DISK_FULL
    if isinstance(error, UserError):
        return Cause.INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return Cause.OUT_OF_MEMORY
    if isinstance(error, KeyboardInterrupt):
        return Cause.SIGNAL
    if isinstance(error, RuntimeError) and _NO_MEMORY.search(said):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or _LOST_PEER.search(said)):
        return Cause.LOST_PEER
    return Cause.ERROR


def words_of(error: BaseException) -> str:
    """What an exception says to the person at the terminal: one line where that tells what to do, else its traceback."""
    if isinstance(error, Ended):
        return error.words
    if isinstance(error, UserError | OSError):
        return f"error: {message_of(error)}"
    return "".join(traceback.format_exception(error)).rstrip()


def killed_by(exit_status: int) -> str:
    """The signal that an exit status tells of, as Python (-9) and shells (137) do, without SIG; "" for none."""
    number = -exit_status if exit_status < 0 else exit_status - 128 if exit_status > 128 else 0
    return signal.Signals(number).name.removeprefix("SIG") if number in set(signal.Signals) else ""
