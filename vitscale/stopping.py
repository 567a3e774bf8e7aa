"""Who asks a run to stop: SLURM or a person by a signal, or a person by the file RUN/stop.

A handler only takes note. The loop asks once a step, and all ranks agree on what any of them was asked (`agreement.py`): a signal that
reaches one rank stops all of them, at the same step, with a checkpoint.

Imports no torch, so that a task can listen before the seconds that importing it takes.
"""

import signal
import time
from pathlib import Path
from types import FrameType

# SLURM's word at a preemption or scancel, and before a time limit, as `submit` sets it up
SIGNALS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2}
_LOOK_EVERY = 1.0  # seconds: a look at RUN/stop is a question to a shared file system

_came: set[str] = set()


def listen() -> None:
    """From now on signals are taken note of, and do not end this process."""
    for number in SIGNALS.values():
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _came.add(signal.Signals(number).name.removeprefix("SIG"))


class Asked:
    """What this rank was asked; rank 0 looks for the file."""

    def __init__(self, run: Path, rank: int) -> None:
        self._file = run / "stop" if rank == 0 else None
        self._looked = float("-inf")
        self._found = False

    def counts(self) -> dict[str, int]:
        """1 for each way in which this rank was asked to stop: `asked` (by RUN/stop), `TERM`, `USR2`."""
        now = time.monotonic()
        if self._file and not self._found and now - self._looked >= _LOOK_EVERY:
            self._looked, self._found = now, self._file.exists()
        return {"asked": int(self._found)} | {name: int(name in _came) for name in SIGNALS}


def why(sums: dict[str, int]) -> str:
    """Of the sums of all ranks' counts the one to stop for: a person's word first; empty where nobody asked."""
    return next((name for name in ("asked", *SIGNALS) if sums[name]), "")
