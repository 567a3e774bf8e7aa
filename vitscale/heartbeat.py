"""The sign of life of a rank: where it is, for people and supervisors to see, and an end where nothing goes on any more.

    RUN/heartbeats/node-0000.json   replaced every few seconds by the first rank of each node

Peers of a rank that hangs wait for it in a collective for ever, and so would the whole job. Every rank therefore watches itself: where
its loop has not beaten for a bound that it learns from its own steps, it writes its stacks to the log and an end record, and ends.
Time in which the process was stopped as a whole (a suspended job) does not count.
"""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vitscale.config import UNREADABLE, from_dict
from vitscale.ending import EXIT_FAILED, Cause, End, write_end
from vitscale.machine import Place, this_host
from vitscale.metrics import duration

STARTING, TRAINING, EVALUATING, COMPILING, SAVING, ENDED = "starting", "training", "evaluating", "compiling", "saving", "ended"  # phases
WRITE_EVERY = 5.0  # seconds between two signs of life
_WATCH_EVERY = 1.0
_PATIENCE = 30 * 60.0  # for what beats once only, or for the first time: start-up, a compilation, a checkpoint that is waited for
_LEAST, _TIMES = 120.0, 20  # a bound is so many times the slowest of late, and at least so many seconds
_TO_SAY_SO = 60.0  # seconds that a part which has a bound of its own, as the stream has, gets to end the run with better words
_OF_LATE = 128  # beats
_BACKSTOP = 60.0  # seconds over the bound after which C ends the process, where Python itself is held
_ABSURD = 2.0**53  # neither a time nor a count comes near it


@dataclass(frozen=True)
class Sign:
    """What a node's first rank tells of itself."""

    time: float
    start: int
    rank: int
    ranks: int
    """Of its node, from `rank` on."""
    node: int
    host: str
    job: str
    pid: int
    step: int
    samples_seen: int
    phase: str
    quiet: float
    """Seconds since the last beat."""
    seconds_per_step: float | None
    hang_seconds: float
    """The bound of `quiet`."""


def hang_bound(phase: str, gaps: Sequence[float], hang_seconds: float, data_seconds: float) -> float:
    """Seconds without a beat after which a rank hangs.

    Args:
        phase: what the rank does; of others than training and evaluating nobody knows how long they take.
        gaps: seconds between beats of late in this phase.
        hang_seconds: what the user set; 0 learns it from the gaps.
        data_seconds: that the stream itself waits for data.
    """
    if phase not in (TRAINING, EVALUATING):
        return max(hang_seconds, _PATIENCE)
    if hang_seconds:
        return hang_seconds
    return max(_LEAST, data_seconds + _TO_SAY_SO, _TIMES * max(gaps)) if gaps else _PATIENCE


class Heartbeat:
    """Watches the rank that makes it, in threads of its own.

    Args:
        run: the run directory.
        start: which of its starts this is.
        place: of this process.
        hang_seconds: the bound, or 0 to learn it.
        data_seconds: that the stream itself waits for data before it ends the run; a learned bound is longer.
    """

    def __init__(
        self,
        run: Path,
        start: int,
        place: Place,
        *,
        hang_seconds: float,
        data_seconds: float,
    ) -> None:
        self._run, self._start, self._place, self._hang_seconds = run, start, place, hang_seconds
        self._data_seconds = data_seconds
        self._at = (0, 0, STARTING)
        self._beats, self._since = 0, time.monotonic()
        self._looked = self._since  # when the watch last did
        self._still = 0.0  # its longest time between two looks since the last beat
        self._gaps: dict[str, deque[float]] = {phase: deque(maxlen=_OF_LATE) for phase in (TRAINING, EVALUATING)}
        self._closed = threading.Event()
        self._news = threading.Event()  # another phase: is written at once
        self._writer = threading.Thread(target=self._write_on, name="heartbeat-writer", daemon=True) if place.local_rank == 0 else None
        if self._writer:  # apart from the watch, which must not wait for a file system
            self._writer.start()
        self._arm()
        self._watch = threading.Thread(target=self._watch_on, name="heartbeat", daemon=True)
        self._watch.start()

    def beat(self, step: int, samples_seen: int, phase: str) -> None:
        """Tells that the rank goes on. Costs microseconds."""
        now, before = time.monotonic(), self._at[2]
        if before in self._gaps:
            self._gaps[before].append(now - self._since)
        self._at, self._since = (step, samples_seen, phase), now
        self._beats += 1
        if phase != before:
            self._news.set()

    @property
    def step(self) -> int:
        """The step of the last beat."""
        return self._at[0]

    def stood_still(self) -> float:
        """Seconds since the last beat for which the process as a whole did not run: its watch, too, stood still."""
        return max(self._still, time.monotonic() - self._looked)

    def close(self) -> None:
        """Ends the watch, and says so in the file."""
        self._closed.set()
        self._news.set()
        self._watch.join()
        faulthandler.cancel_dump_traceback_later()
        if self._writer:
            self._writer.join(WRITE_EVERY)  # a file system that does not answer holds up nobody

    def bound(self) -> float:
        """Seconds without a beat after which this rank now counts as hanging."""
        phase = self._at[2]
        return hang_bound(phase, list(self._gaps.get(phase, ())), self._hang_seconds, self._data_seconds)

    def _watch_on(self) -> None:
        beats, quiet = -1, 0.0
        while not self._closed.wait(_WATCH_EVERY):
            now, bound, goes_on = time.monotonic(), self.bound(), self._beats != beats
            gap = now - self._looked
            quiet = 0.0 if goes_on else quiet + min(gap, 2 * _WATCH_EVERY)
            self._still = gap if goes_on else max(self._still, gap)
            beats, self._looked = self._beats, now
            self._arm()
            if quiet > bound:
                step, _, phase = self._at
                self._end(f"nothing went on for {duration(quiet)} after step {step} ({phase}), over the bound of {duration(bound)}")
                return

    def _arm(self) -> None:
        """Has C end the process unless this is called again in time: threads of Python need the interpreter's lock, which may be held."""
        faulthandler.dump_traceback_later(self.bound() + _BACKSTOP, exit=True)

    def _end(self, words: str) -> None:
        faulthandler.dump_traceback_later(_BACKSTOP, exit=True)  # should the log or the record be what hangs
        with contextlib.suppress(OSError):
            print(f"rank {self._place.rank}: {words}; its threads:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        step, _, _ = self._at
        write_end(self._run, End(Cause.HANG, words, self._start, self._place.rank, self._place.node, this_host(), time.time(), step))
        os._exit(EXIT_FAILED)

    def _write_on(self) -> None:
        while True:
            self._write()
            self._news.wait(WRITE_EVERY)
            self._news.clear()
            if self._closed.is_set():
                self._at = (*self._at[:2], ENDED)
                self._write()
                return

    def _write(self) -> None:
        """Replaces the file in one step, and without waiting for the disk: what a machine's end takes of it, it takes of the run too."""
        file = self._run / "heartbeats" / f"node-{self._place.node:04d}.json"
        beside = file.with_name(f".{file.name}.partial")
        with contextlib.suppress(OSError):  # a full disk must not end what can go on
            file.parent.mkdir(exist_ok=True)
            beside.write_text(json.dumps(asdict(self._sign())) + "\n")
            beside.replace(file)

    def _sign(self) -> Sign:
        step, samples_seen, phase = self._at
        steps = list(self._gaps[TRAINING])
        return Sign(
            time.time(), self._start, self._place.rank, self._place.local_world_size, self._place.node, this_host(),
            os.environ.get("SLURM_JOB_ID", ""), os.getpid(), step, samples_seen, phase, time.monotonic() - self._since,
            statistics.median(steps) if steps else None, self.bound(),
        )  # fmt: skip


def read_heartbeats(run: Path) -> list[Sign]:
    """The last sign of life of each node, by node; one that is damaged is left out."""
    signs = []
    for file in sorted((run / "heartbeats").glob("node-*.json")):
        with contextlib.suppress(OSError, *UNREADABLE):
            sign = from_dict(Sign, json.loads(file.read_text()))
            if all(abs(value) < _ABSURD for value in asdict(sign).values() if isinstance(value, int | float)):
                signs.append(sign)
    return signs
