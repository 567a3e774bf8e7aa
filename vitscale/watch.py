"""A live run's checkpoints as they come, for another job that evaluates them, and the record of what it found. Imports no torch.

    RUN/evaluations.jsonl   a line an evaluated checkpoint

Where it stands: `vitscale evaluate --watch` follows a run with it; the run itself knows nothing of that. A checkpoint is known by the
checksum of its COMMIT.json, not by its step: a run that was taken back makes the same step anew, with other weights.
"""

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vitscale.checkpoint import committed, file_checksum
from vitscale.run import RunError, is_finished, try_lock


def follow(run: Path, done: Collection[str], interval: float) -> Iterator[tuple[Path, str]]:
    """The checkpoints of a run that are not done, oldest first, as they come, until the run is finished and none is left.

    Args:
        done: those by the checksums of their COMMIT.json, which are given with each; who takes one adds it, or it comes again.
        interval: seconds between two looks where there is nothing to do.
    """
    finished = False
    while True:
        finished = finished or is_finished(run)  # asked first, so that what it wrote last is then there
        following = next(_not_done(run, done), None)
        if following:
            yield following
        elif finished:
            return
        else:
            time.sleep(interval)


def _not_done(run: Path, done: Collection[str]) -> Iterator[tuple[Path, str]]:
    for folder in committed(run):
        with contextlib.suppress(FileNotFoundError):  # the run has just removed it
            if (commit := file_checksum(folder / "COMMIT.json")) not in done:
                yield folder, commit


@contextmanager
def recording(run: Path) -> Iterator[BinaryIO]:
    """RUN/evaluations.jsonl to add to, held against a second writer. Raises RunError where there is one.

    A last line that a kill cut short is taken away: what it was to say will be said again.
    """
    with open(run / "evaluations.jsonl", "a+b") as file:
        if not try_lock(file):
            raise RunError(f"{run}/evaluations.jsonl is being written by another `vitscale evaluate --watch`; one can run at a time")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def note(file: BinaryIO, line: dict[str, Any]) -> None:
    """Adds a line, whole and on disk, or none."""
    before = file.seek(0, os.SEEK_END)
    try:
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        file.truncate(before)
        raise
