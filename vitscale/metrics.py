"""What a run tells: a line of metrics.jsonl and a line on the terminal for each logged step, and TensorBoard where it is installed."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO


class Metrics:
    """Rank 0's writer, from `step` on."""

    def __init__(self, run: Path, step: int) -> None:
        self._file = os.open(run / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""  # what a full disk had no room for
        self._terminal = open_terminal()
        self._board = _tensorboard(run / "tensorboard", step)

    def log(self, values: dict[str, Any], text: str) -> None:
        """Writes one line; `values` must hold `step`. A disk that is full keeps it waiting and the run going."""
        before = self._unwritten
        self._unwritten += (json.dumps(values, allow_nan=False) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if not before:
                self.say(f"warning: metrics.jsonl cannot be written ({error.strerror}); its lines wait until it can")
        self.say(text)
        if self._board is None:
            return
        try:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"])
        except OSError as error:
            self._board = None
            self.say(f"warning: tensorboard/ cannot be written ({error.strerror}), and is not until the next start")

    def say(self, text: str) -> None:
        """A line for the person at the terminal, and for the log where that is another file."""
        for file in {self._terminal, sys.stdout}:
            with contextlib.suppress(OSError):  # neither `vitscale pretrain ... | head` nor a full disk must end the run
                print(text, file=file, flush=True)

    def close(self) -> None:
        """Writes what is buffered, as far as there is room."""
        with contextlib.suppress(OSError):
            os.write(self._file, self._unwritten)
        os.close(self._file)
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


class Moment(NamedTuple):
    """Where a run was at the end of a step."""

    step: int
    seconds: float
    """Of this process's clock."""
    waited: float
    """Seconds in all that were waited for data."""
    stalled: float
    """Seconds in all that training stood still for checkpoints."""


class Pace:
    """How fast steps are made from one logged step to the next, and what they waited for.

    What is done between steps, saves and evaluations, does not count: `restart` after it.
    """

    def __init__(self, step: int) -> None:
        self.waited = self.stalled = self._told = 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        """What follows is measured from here on."""
        self._since = self.moment(step)

    def moment(self, step: int) -> Moment:
        """Now, at the end of a step."""
        return Moment(step, time.perf_counter(), self.waited, self.stalled)

    def measure(self, until: Moment, global_batch_size: int) -> dict[str, float]:
        """Fields of metrics.jsonl for the steps up to a moment; the next ones are measured from there on."""
        seconds = until.seconds - self._since.seconds
        found = {
            "images_per_second": (until.step - self._since.step) * global_batch_size / seconds,
            "data_wait": (until.waited - self._since.waited) / seconds,
            "checkpoint_seconds": until.stalled - self._told,
        }
        self._since, self._told = until, until.stalled
        return found


def open_terminal() -> TextIO:
    """The user's terminal where the launcher passes one on (it sends a process's own output to a log), else standard output."""
    descriptor = os.environ.get("VITSCALE_TERMINAL_FD")
    return os.fdopen(int(descriptor), "w", closefd=False) if descriptor else sys.stdout


def progress_line(values: dict[str, Any], total_steps: int) -> str:
    """The terminal's line for a training step."""
    step = values["step"]
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps} {step / total_steps:4.0%}",
        f"epoch {values['epoch']:.2f}",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
        f"{values['images_per_second']:,.0f} img/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"{duration(values['seconds_left'])} left")
    if values["unusable"]:
        parts.append(f"{values['unusable']:,} unusable")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A length of time for people: 5s, 3m12s, 4h02m, 2d07h."""
    seconds = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller_size:02d}{smaller}"
    return f"{seconds}s"


def counted(number: int, noun: str) -> str:
    """A number of things for people: 1 shard, 1,200 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]
