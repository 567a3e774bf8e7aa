"""A run's processes on one machine: starts one a rank, ends them all when one dies, and starts them again where that is likely to help.

A rank's output goes to RUN/logs/, a file a node and a start; rank 0 gets the user's terminal for its progress lines. Why a rank ended, it
writes to RUN/ends; what follows is `vitscale.verdict`'s to say, as it is under SLURM.
"""

import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from launch.ranks import Stop, to_the_end
from launch.terminal import LaunchError
from vitscale.checkpoint import committed
from vitscale.config import TrainConfig
from vitscale.ending import EXIT_FINISHED, EXIT_STOPPED, Cause, End, read_ends
from vitscale.run import locked, log_file, newest_start, open_run
from vitscale.verdict import Verdict, conclude


def start(config: TrainConfig, nproc: int, terminal: TextIO, stop: Stop) -> int:
    """Starts or resumes the run of a resolved config on this machine and waits for its end, as `_run_to_end` does."""
    run = Path(config.out)
    with locked(run) as lock:
        (run / "stop").unlink(missing_ok=True)  # who starts a run wants it to go on
        return _run_to_end(config, nproc, lock, terminal, stop)


def _run_to_end(config: TrainConfig, nproc: int, lock: TextIO, terminal: TextIO, stop: Stop) -> int:
    """Starts the run of a resolved config on `nproc` ranks, again and again as long as that helps; rank 0 tells its progress at `terminal`.

    Returns the command's exit status: 0 for a run that is finished, though perhaps it was asked to stop at its end, 130 after Ctrl-C, 75
    where a person asked in another way to stop. Raises LaunchError where it is no use to go on. However it ends, all ranks have ended.
    """
    run = Path(config.out)
    for restart in itertools.count(1):
        if open_run(config, nproc):
            print(f"{run} is finished; another --out starts anew", file=sys.stderr)
            return EXIT_FINISHED
        number = newest_start(run)
        try:
            status = _start_once(run, number, nproc, lock, terminal, stop)
        except KeyboardInterrupt:
            status = -signal.SIGKILL
        verdict, saved = conclude(run, number, status, stop_asked=bool(stop.signals)), committed(run)
        if verdict.action == "finished":
            return EXIT_FINISHED
        ends = read_ends(run, number)
        if stop.signals or (run / "stop").exists():
            if ends and ends[0].cause is Cause.DISK_FULL:  # what was to be saved is not
                print(ends[0].words, file=sys.stderr)
            where = f"goes on from {saved[-1]}" if saved else "starts anew, because no checkpoint was written yet"
            print(f"stopped; the same command {where}", file=sys.stderr)
            return stop.exit_status
        if verdict.action == "stop":
            raise LaunchError(_last_words(run, number, ends, verdict))
        # what is requeued under SLURM is started again here: there is no other machine
        goes_on = f"going on from {saved[-1].name}" if saved else "starting anew, because no checkpoint was written yet"
        print(f"{_what_happened(ends, verdict)}; {goes_on} (restart {restart})", file=terminal, flush=True)
    raise AssertionError("itertools.count ended")


def _start_once(run: Path, start: int, nproc: int, lock: TextIO, terminal: TextIO, stop: Stop) -> int:
    """One start: the exit status of the first rank that failed, else of those that ended well.

    They inherit the run's `lock`, so that it is held as long as any of them lives.
    """
    log = log_file(run, start)
    log.parent.mkdir(exist_ok=True)
    terminal_fd = os.dup(terminal.fileno())
    try:
        with open(log, "ab", buffering=0) as output:
            statuses, failed = to_the_end(
                [sys.executable, "-m", "vitscale.rank", str(run)], run, start, [(output, output)] * nproc, stop,
                of_first={"VITSCALE_TERMINAL_FD": str(terminal_fd)}, pass_fds=(terminal_fd, lock.fileno()),
            )  # fmt: skip
    finally:
        os.close(terminal_fd)
    if failed:
        return statuses[failed[0]]
    return EXIT_STOPPED if EXIT_STOPPED in statuses else EXIT_FINISHED


def _what_happened(ends: Sequence[End], verdict: Verdict) -> str:
    """Why a start ended, in a line."""
    if not ends:
        return verdict.why
    first = ends[0]
    if first.cause is Cause.KILLED:
        return f"rank {first.rank} was killed by SIG{first.signal} at step {first.step}"
    return f"rank {first.rank} at step {first.step}: {first.last_line.removeprefix('error: ')}"


def _last_words(run: Path, start: int, ends: Sequence[End], verdict: Verdict) -> str:
    """Why a run ended for good: what its first error said, where to read on, and what was decided where that does not follow."""
    log = f"all output is in {log_file(run, start)}"
    if not ends:
        return f"error: {verdict.why} ({log})"
    first = ends[0]
    decided = "" if first.cause in (Cause.INPUT, Cause.ERROR) else f"\nnot started again: {verdict.why}"
    return f"{first.words.rstrip()}\n(rank {first.rank}; {log}){decided}"
