"""Where a rank's time goes, by phase of the step: what metrics.jsonl tells as shares of wall time, and what a profile marks.

The loop says which phase begins (`Clock.enter`); the engine's seam says when collectives are waited for (`Clock.communicating`) and how
many bytes they carry. Nothing waits for the device: on a GPU each change of phase leaves an event in the stream that computes, which is
read once the device has passed it; on a CPU it reads the clock.

What the shares (`metrics.SHARES`) mean, and what they cannot see:
- On a GPU all of it is the device's time, from one event in the stream that computes to the next. `data_wait`: it stood still for a
  batch; where the host waited and the device still had work, nothing is lost and nothing counted. `host`: from the update to the next
  batch (losses, agreement, logging), in which the device has next to nothing to do. `communication`: that stream stood still for
  collectives on it, for DeepSpeed's side streams, or for the host that waited for those; what computing hides does not count.
  `compute`: the rest of forward, backward and update, gaps between kernels included: a device that starves there shows in
  `Clock.lead`, which is then near 0.
- On a CPU all of it is the host's time. Collectives that go on in gloo's threads while the host computes count where they are waited for.
- Waiting for a slower rank is communication, whatever that one does. `checkpoint`: the copy of the state, while no step is made.
"""

import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from vitscale.breakdown import RANGE
from vitscale.metrics import SHARES

DATA, FORWARD, BACKWARD, UPDATE, LOGGING = "data", "forward", "backward", "update", "logging"
CHECKPOINT, COMMUNICATION, OUTSIDE = "checkpoint", "communication", "outside"
# The share that each phase counts into; `outside` (evaluations, what is profiled) counts into none
SHARE_OF = {
    DATA: "data_wait", FORWARD: "compute", BACKWARD: "compute", UPDATE: "compute", LOGGING: "host", CHECKPOINT: "checkpoint",
    COMMUNICATION: "communication",
}  # fmt: skip


class Mark(NamedTuple):
    """The end of a phase."""

    phase: str
    """That ended."""
    device: float
    """Seconds on the device's clock when it came there."""
    host: float
    """Seconds on the host's clock when it asked for that."""


def account(marks: Sequence[Mark]) -> dict[str, float]:
    """Seconds of each share between the first mark and the last. Pure."""
    seconds = dict.fromkeys(SHARES, 0.0)
    for before, mark in itertools.pairwise(marks):
        if share := SHARE_OF.get(mark.phase):
            seconds[share] += mark.device - before.device
    return seconds


def lead(marks: Sequence[Mark]) -> float | None:
    """Seconds by which the host was ahead of the device at the end of backward, the median; None where no backward ended. Pure.

    The clocks are set against each other by the mark that the device reached soonest: one of them must have found it idle, as those after a
    logged step do. Near 0 the device waits for every kernel's launch.
    """
    behind = [mark.device - mark.host for mark in marks]
    backward = [of for of, mark in zip(behind, marks, strict=True) if mark.phase == BACKWARD]
    return statistics.median(backward) - min(behind) if backward else None


class Clock:
    """Seconds of this rank by share, and the bytes that it sent, from its making on; at first `outside`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(SHARES, 0.0)
        self.sent: Counter[str] = Counter()
        """Bytes by collective (`traffic.ring_bytes`)."""
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._phase, self._since = OUTSIDE, time.perf_counter()
        self._pending: deque[tuple[str, torch.cuda.Event, float]] = deque()
        self._last: tuple[torch.cuda.Event, Mark] | None = None
        self._soonest: Mark | None = None
        self._backward: deque[Mark] = deque(maxlen=1000)
        self._idle: list[torch.cuda.Event] = []
        self._range: record_function | None = None
        self._profiled = False

    def enter(self, phase: str) -> None:
        """What follows belongs to a phase; for the loop."""
        self._switch(phase)
        if self._range:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._profiled and phase != OUTSIDE:
            self._range = record_function(RANGE + phase)
            self._range.__enter__()  # type: ignore[no-untyped-call]

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Within it the stream that computes, or a CPU's host, waits for a collective; what another stream waits for does not count."""
        if self._stream is not None and torch.cuda.current_stream() != self._stream:
            yield
            return
        before = self._phase
        self._switch(COMMUNICATION if before != OUTSIDE else OUTSIDE)
        try:
            if self._profiled:
                with record_function(RANGE + COMMUNICATION):
                    yield
            else:
                yield
        finally:
            self._switch(before)

    def computes(self, stream: Any = None) -> bool:
        """Whether a GPU is in a phase that counts as computing, and a stream, where one is given, the one that computes."""
        computing = self._stream is not None and SHARE_OF.get(self._phase) == "compute"
        return computing and (stream is None or bool(stream == self._stream))

    def count(self, collective: str, sent: float) -> None:
        """Takes note of bytes that this rank sends."""
        if self._phase != OUTSIDE:
            self.sent[collective] += round(sent)

    def profile(self, profiled: bool) -> None:
        """While it is on phases are ranges of torch's profiler, and their time, which the profiler lengthens, is no share."""
        self.enter(OUTSIDE)
        self._profiled = profiled

    def microseconds(self) -> dict[str, int]:
        """By share, as far as the device has come."""
        self._settle()
        return {share: round(1e6 * seconds) for share, seconds in self.seconds.items()}

    def lead(self) -> float | None:
        """`lead` of what the device has passed since the last call; None on a CPU."""
        found = lead([self._soonest, *self._backward]) if self._soonest else None
        self._soonest = None
        self._backward.clear()
        return found

    def _switch(self, phase: str) -> None:
        before, now = OUTSIDE if self._profiled else self._phase, time.perf_counter()
        if self._stream is None:
            if share := SHARE_OF.get(before):
                self.seconds[share] += now - self._since
        else:
            event = self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._pending.append((before, event, now))
        self._phase, self._since = phase, now

    def _settle(self) -> None:
        """Counts what the device has passed by now."""
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            phase, event, host = self._pending.popleft()
            mark = Mark(phase, 0.0, host)
            if self._last:
                before, reached = self._last
                mark = Mark(phase, reached.device + before.elapsed_time(event) / 1000, host)
                for share, seconds in account((reached, mark)).items():
                    self.seconds[share] += seconds
                self._idle.append(before)
            self._last = event, mark
            if phase == BACKWARD:
                self._backward.append(mark)
            if self._soonest is None or mark.device - mark.host < self._soonest.device - self._soonest.host:
                self._soonest = mark


class Waited:
    """A collective under way; waiting for it is timed."""

    def __init__(self, work: Any, communicating: Callable[[], Any]) -> None:
        self._work, self._communicating = work, communicating

    def wait(self, *args: Any, **options: Any) -> Any:
        """As torch's own."""
        with self._communicating():
            return self._work.wait(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
