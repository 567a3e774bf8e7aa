"""What all verbs share: a verb's failure, JSON for other programs, a progress bar."""

import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import tyro

from data_tools.errors import UserError

Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON.")]
Verb = Callable[[list[str]], None]


class VerbError(UserError):
    """A verb that cannot run on this machine, or whose result is bad; the message is one line for the user."""


class LaunchError(UserError):
    """A rank ended badly; the message is what it said, one line or a traceback."""


def need(*packages: str) -> None:
    """Raises VerbError where a package is not installed, with the extra that brings it."""
    extras = {"torch": "train", "deepspeed": "train", "safetensors": "train", "sklearn": "quickstart"}
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise VerbError(f"{package} is not installed; `pip install 'vitscale[{extras[package]}]'` brings it")


def print_json(value: Any) -> None:
    """For another program to read; a path or another odd value as text."""
    print(json.dumps(value, indent=1, default=str))


LINE_EVERY = 30.0  # seconds between lines where there is no terminal, as in the log of a job
DRAW_EVERY = 0.1


class NotedUpdate(Protocol):
    """What a long work calls as often as it likes: `data_tools.progress.Update`, and a note."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """How much is done, of how much, and what else there is to say."""


@contextmanager
def progress_bar(title: str, quiet: bool, unit: str = "") -> Iterator[NotedUpdate]:
    """How far a work is, how fast it goes and when it will be done, on the error stream, so that standard output holds results alone.

    A bar on a terminal; elsewhere a line now and then, none in the first half minute; nothing where `quiet`.
    """
    if quiet:
        yield lambda done, total, note="", /: None
        return
    if not sys.stderr.isatty():
        yield _Pace(unit, LINE_EVERY, lambda done, total, said: print(f"{title}: {said}", file=sys.stderr, flush=True)).update
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, said="")
        pace = _Pace(unit, DRAW_EVERY, lambda done, total, said: bar.update(task, completed=done, total=total, said=said))
        yield pace.update


class _Pace:
    """Shows a work's progress at most once in so many seconds; the rate is that since the first update, whatever was done before."""

    def __init__(self, unit: str, every: float, show: Callable[[int, int, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._every, self._show, self._clock = unit, every, show, clock
        self._shown = clock()
        self._first: tuple[float, int] | None = None

    def update(self, done: int, total: int, note: str = "", /) -> None:
        now = self._clock()
        if self._first is None:
            self._first = now, done
        if now - self._shown >= self._every:
            self._shown = now
            started, before = self._first
            self._show(done, total, told(done, total, done - before, now - started, self._unit, note))


def told(done: int, total: int, lately: int, seconds: float, unit: str, note: str) -> str:
    """A work's progress in words, where `lately` of it was done in so many seconds."""
    words = [f"{done:,} of {total:,}"]
    if lately > 0 and seconds > 0:
        rate = lately / seconds
        left = datetime.timedelta(seconds=round((total - done) / rate))
        words += [f"{rate:,.{0 if rate >= 10 else 1}f}{f' {unit}' if unit else ''}/s", f"{left} left"]
    return ", ".join([*words, *([note] if note else [])])
