"""What is left when a process ends at any one touch of the file system."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any


def ends_at(last: int, count: Iterator[int], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which ends the process instead of being called the `last`-th time of all that share the count."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == last:
            os._exit(9)
        return function(*args, **kwargs)

    return counted


def killed_everywhere(action: Callable[[], object], touches: list[tuple[Any, str]]) -> Iterator[int]:
    """Runs the action in children, each ended one touch later than the one before, until one comes through; yields after each."""
    for last in itertools.count(1):
        if (child := os.fork()) == 0:
            count = itertools.count(1)
            for owner, name in touches:
                setattr(owner, name, ends_at(last, count, getattr(owner, name)))
            action()
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield last
        if ended == 0:
            return
        assert ended == 9
