"""What a run tells: a line of metrics.jsonl and a line on the terminal for each logged step, and TensorBoard where it is installed."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

# What the wall time of steps is divided into, mean over the ranks; `timing.py` says what each means on a GPU and on a CPU
SHARES = ("data_wait", "communication", "compute", "host", "checkpoint")
WORTH_TELLING = 0.05  # of the time, from which on something else than computing is told on the terminal


class Metrics:
    """Rank 0's writer, from `step` on."""

    def __init__(self, run: Path, step: int) -> None:
        self._file = os.open(run / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""  # what a full disk had no room for
        self._terminal = open_terminal()
        self._board = open_board(run / "tensorboard", step + 1)

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
    stalled: float
    """Seconds in all that training stood still for checkpoints."""
    sent: Mapping[str, int]
    """Bytes in all that this rank sent, by collective."""


class Pace:
    """How fast steps are made from one logged step to the next, and what their time went into.

    What is done between steps, saves and evaluations, does not count into their speed: `restart` after it.
    """

    def __init__(self, step: int) -> None:
        self.stalled = self._told = 0.0
        self._spent, self._sent = dict.fromkeys(SHARES, 0), (step, dict[str, int]())
        self.restart(step)

    def restart(self, step: int) -> None:
        """The speed of what follows is measured from here on."""
        self._since = self.moment(step, {})

    def moment(self, step: int, sent: Mapping[str, int]) -> Moment:
        """Now, at the end of a step."""
        return Moment(step, time.perf_counter(), self.stalled, dict(sent))

    def measure(self, until: Moment, samples_at: Callable[[int], int], spent: Mapping[str, int]) -> dict[str, Any]:
        """Fields of metrics.jsonl for the steps up to a moment; the next ones are measured from there on.

        Args:
            samples_at: how many samples were seen after a step.
            spent: on each of SHARES by then, in whatever unit.
        """
        seconds = until.seconds - self._since.seconds
        found: dict[str, Any] = {
            "images_per_second": (samples_at(until.step) - samples_at(self._since.step)) / seconds,
            "checkpoint_seconds": until.stalled - self._told,
        }
        since = {share: spent[share] - self._spent[share] for share in SHARES}
        if total := sum(since.values()):
            found |= {share: part / total for share, part in since.items()}
        step, sent = self._sent
        if more := {name: (number - sent.get(name, 0)) / (until.step - step) for name, number in until.sent.items()}:
            found["communication_bytes"] = more
        self._since, self._told, self._sent = until, until.stalled, (until.step, dict(until.sent))
        self._spent = {share: spent[share] for share in SHARES}
        return found


def what_bounds(shares: Mapping[str, float], workers: int = 0, images_per_second: float = 0.0, ranks: int = 1) -> str:
    """In words, what a run's steps wait for and what would help; empty where nothing is known. Pure.

    Args:
        shares: of SHARES.
        workers: that decode, a rank; 0: not known.
        images_per_second: of all ranks.
    """
    if not all(share in shares for share in SHARES):
        return ""
    most = max((share for share in SHARES if share != "compute"), key=shares.__getitem__)
    part = shares[most]
    if part < WORTH_TELLING:
        return f"bound by computing, {shares['compute']:.0%} of the time"
    if most == "data_wait":
        words = f"waits for data {part:.0%} of the time: more --stream.workers or cores, --stream.decode fast, or nearer data"
        if workers and images_per_second:
            each, enough = images_per_second / (workers * ranks), math.ceil(workers / (1 - min(part, 0.99)))
            words += f"; {counted(workers, 'worker')} a rank give {each:,.0f} img/s each, and some {enough} would keep up"
        return words
    return {
        "communication": f"waits for other ranks {part:.0%} of the time: more images a rank and step send less for each, and so does "
        "ZeRO 1 than 2 or 3; the line `preflight` in the run's log tells the link's speed",
        "host": f"waits for Python {part:.0%} of the time: a larger --micro-batch-size, or a larger --log-every",
        "checkpoint": f"stands still for checkpoints {part:.0%} of the time: a larger --checkpoint-every",
    }[most]


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
    most = max((share for share in SHARES if share != "compute"), key=lambda share: values.get(share, 0.0))
    if values.get(most, 0.0) > WORTH_TELLING:
        parts.append(f"{share_name(most)} {values[most]:.0%}")
    parts.append(f"{duration(values['seconds_left'])} left")
    if values["unusable"]:
        parts.append(f"{values['unusable']:,} unusable")
    return "  ".join(parts)


def share_name(share: str) -> str:
    """What people are told of one of SHARES."""
    return share.removesuffix("_wait")


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


def open_board(folder: Path, purge_step: int | None = None) -> Any:
    """TensorBoard's writer, which takes back what was written of steps from `purge_step` on; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)  # type: ignore[no-untyped-call]
