"""Which checkpoints of a run are kept: the newest, those of every so many steps, the best, within a budget of bytes. Imports no torch."""

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.checkpoint import committed, step_folder, step_of
from vitscale.config import RunConfig


@dataclass(frozen=True)
class Policy:
    """What is kept, as `config.RunConfig` says it."""

    newest: int = 3
    """So many of the newest; 0 keeps all."""
    every: int = 0
    """Those of every so many steps, for good; 0 keeps none for good."""
    best: bool = True
    """The one that was best on the held-out split."""
    max_bytes: int | None = None
    """The most that all may take together."""


def policy_of(config: RunConfig, newest: int | None = None, every: int | None = None) -> Policy:
    """A run's policy, or with others of its numbers where they are given."""
    newest, every = (asked if given is None else given for asked, given in ((config.keep_checkpoints, newest), (config.keep_every, every)))
    return Policy(newest, every, config.keep_best, config.checkpoint_bytes)


def superfluous(sizes: Mapping[int, int], goodness: Mapping[int, float], policy: Policy, coming: int | None = None) -> list[int]:
    """The steps whose checkpoints go, oldest first. Never the newest nor, where the policy keeps it, the best.

    Over the budget of bytes the oldest give way, those that are kept for good after the others.

    Args:
        sizes: the bytes of each durable checkpoint, by step.
        goodness: what evaluations found, by step; higher is better.
        coming: the bytes of one that is about to be written, to which room belongs as to the newest.
    """
    steps = sorted(sizes)
    safe = set(steps[-1:])
    if policy.best and (best := best_of(steps, goodness)) is not None:
        safe.add(best)
    older = max(0, len(steps) + (coming is not None) - policy.newest) if policy.newest else 0  # than the newest
    of_newest = set(steps[older:])
    for_good = {step for step in steps if policy.every and step % policy.every == 0}
    kept = safe | of_newest | for_good
    if policy.max_bytes is not None:
        taken = sum(sizes[step] for step in kept) + (coming or 0)
        for step in sorted(kept - safe, key=lambda step: (step in for_good, step)):
            if taken <= policy.max_bytes:
                break
            kept.remove(step)
            taken -= sizes[step]
    return [step for step in steps if step not in kept]


def goodness(lines: Iterable[dict[str, Any]]) -> dict[int, float]:
    """How good each evaluated step was, from the lines of metrics.jsonl: its top-1."""
    return {line["step"]: line["eval_top1"] for line in lines if _is_number(line.get("eval_top1"))}


def best_of(steps: Iterable[int], goodness: Mapping[int, float]) -> int | None:
    """The best of these steps, the newest of equally good ones; None where none of them was evaluated."""
    return max((step for step in steps if step in goodness), key=lambda step: (goodness[step], step), default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def folder_bytes(folder: Path) -> int:
    """The bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def sizes_up_to(run: Path, newest: int) -> dict[int, int]:
    """The bytes of each committed checkpoint up to the newest durable one's step; what is newer did not verify, and counts for nothing."""
    return {step_of(folder): folder_bytes(folder) for folder in committed(run) if step_of(folder) <= newest}


def remove(run: Path, steps: Iterable[int]) -> None:
    """Removes the checkpoints of these steps, and what a kill in mid-removal left of others."""
    for step in steps:
        folder = step_folder(run, step)
        doomed = folder.with_name(f".{folder.name}.doomed")  # a kill in mid-removal leaves nothing that looks like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
        if doomed.exists():  # what some file systems do not let go while it is open somewhere
            doomed = folder.with_name(f".{folder.name}.{time.time_ns()}.doomed")
        folder.rename(doomed)
    for doomed in (run / "checkpoints").glob(".step-*.doomed"):
        shutil.rmtree(doomed, ignore_errors=True)
