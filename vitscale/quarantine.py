"""Samples that could not be used: RUN/quarantine.jsonl, a line each, and the budgets of a run.

The file is one for all ranks and starts; what counts is distinct samples, in the whole run and in any one shard. `run.cut_back` takes out
what a start wrote whose checkpoint never came to be.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

REMEDY = "`vitscale data repair` makes it good, `vitscale data overlay` gives it up"


class QuarantineError(UserError):
    """Too much of the data cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used at a position of the run."""

    position: int
    sample: int
    dataset: str
    """Name of its dataset."""
    shard: str
    key: str
    reason: str


class Quarantine:
    """One rank's view of the file.

    Args:
        max_samples, max_per_shard: how many distinct samples may be unusable.
        remedy: what can be done about a bad shard.
    """

    def __init__(self, file: Path, rank: int, *, max_samples: int, max_per_shard: int, remedy: str = REMEDY) -> None:
        self._file, self._rank, self._remedy = file, rank, remedy
        self._max_samples, self._max_per_shard = max_samples, max_per_shard
        self._read_to = 0
        self._known: set[int] = set()
        self._in_shard: Counter[str] = Counter()
        self._take_up()  # those of earlier starts count

    def add(self, faults: list[Fault]) -> None:
        """Writes them down. Raises QuarantineError where a budget is spent."""
        lines = [json.dumps(asdict(fault) | {"rank": self._rank}).encode() + b"\n" for fault in faults]
        try:
            file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                for line in lines:
                    if os.write(file, line) != len(line):  # one write a line: ranks append to the same file
                        raise OSError("the disk is full")
            finally:
                os.close(file)
        except OSError as error:
            raise QuarantineError(f"{self._file} cannot be written ({error.strerror or error}); make room and start again") from None
        self._take_up()
        shard, most = max(self._in_shard.items(), key=lambda item: item[1])
        if most > self._max_per_shard:
            raise QuarantineError(
                f"{most} unusable samples in {shard} are over stream.max_unusable_per_shard={self._max_per_shard}; {self._remedy}; "
                f"{self._file} names them"
            )
        if len(self._known) > self._max_samples:
            raise QuarantineError(
                f"{len(self._known)} unusable samples are over stream.max_unusable={self._max_samples}; {self._file} names them"
            )

    def count(self) -> int:
        """Distinct samples that could not be used so far, in the whole run."""
        self._take_up()
        return len(self._known)

    def _take_up(self) -> None:
        """Counts what was written since the last look, by this rank and by others."""
        try:
            with open(self._file, "rb") as file:
                file.seek(self._read_to)
                whole = file.read()
        except FileNotFoundError:
            return
        whole = whole[: whole.rfind(b"\n") + 1]  # the last line may be half written
        self._read_to += len(whole)
        for fault in parse_lines(whole):
            if (sample := fault.get("sample")) not in self._known and isinstance(sample, int):
                self._known.add(sample)
                self._in_shard[f"{fault.get('dataset')}/{fault.get('shard')}"] += 1


def parse_lines(lines: bytes) -> list[dict[str, Any]]:
    """The lines of a quarantine file, but for those that a full disk or a kill has torn: they must not keep a run from going on."""
    found = []
    for line in lines.split(b"\n"):
        with suppress(ValueError, RecursionError):
            fault = json.loads(line)
            if isinstance(fault, dict) and isinstance(fault.get("position"), int):
                found.append(fault)
    return found
