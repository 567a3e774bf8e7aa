"""How far a long work is: what it calls, and what shows that. This module shows nothing; `launch.terminal` does."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Update = Callable[[int, int], None]  # is told how much is done, of how much
Progress = Callable[[str, str], AbstractContextManager[Update]]  # shows a part of the work, by its title and unit, as a progress bar does


def no_update(done: int, total: int) -> None:
    """Shows nothing of it."""


def no_progress(title: str, unit: str) -> AbstractContextManager[Update]:
    """Shows nothing of any part."""
    return nullcontext(no_update)
