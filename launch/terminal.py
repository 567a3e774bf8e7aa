"""What all verbs share: a verb's failure, JSON for other programs, a progress bar."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from data_tools.errors import UserError

Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON.")]
Verb = Callable[[list[str]], None]


class VerbError(UserError):
    """A verb that cannot run on this machine, or whose result is bad; the message is one line for the user."""


def need(*packages: str) -> None:
    """Raises VerbError where a package is not installed, with the extra that brings it."""
    extras = {"torch": "train", "deepspeed": "train", "safetensors": "train", "sklearn": "quickstart"}
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise VerbError(f"{package} is not installed; `pip install 'vitscale[{extras[package]}]'` brings it")


def print_json(value: Any) -> None:
    """For another program to read; a path or another odd value as text."""
    print(json.dumps(value, indent=1, default=str))


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error stream, so that standard output holds results alone; nothing where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
