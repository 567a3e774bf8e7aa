"""What a run tells: a line of metrics.jsonl and a line on the terminal for each logged step, and TensorBoard where it is installed."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO


class Metrics:
    """Rank 0's writer, from `step` on."""

    def __init__(self, run: Path, step: int) -> None:
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self._terminal = open_terminal()
        self._board = _tensorboard(run / "tensorboard", step)

    def log(self, values: dict[str, Any], text: str) -> None:
        """Writes one line; `values` must hold `step`."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self.say(text)
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"])

    def say(self, text: str) -> None:
        """A line for the person at the terminal, and for the log where that is another file."""
        for file in {self._terminal, sys.stdout}:
            with contextlib.suppress(BrokenPipeError):  # `vitscale pretrain ... | head` must not end the run
                print(text, file=file, flush=True)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()


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
