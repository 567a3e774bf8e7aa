"""How a run is, from its files alone: what `vitscale run status` and `run ls` print. Works wherever they are seen, and without torch."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitscale import checkpoint
from vitscale.config import TrainConfig
from vitscale.ending import Cause
from vitscale.goodput import goodput
from vitscale.heartbeat import ENDED, STARTING, Sign, read_heartbeats
from vitscale.run import is_finished, is_locked, read_config, read_metrics, read_record, unusable
from vitscale.verdict import Past, read_history

LIVE = ("starting", "running", "hanging")  # states in which the run has processes
FRESH = 60.0  # seconds for which a sign of life counts: many times the interval between two, for file systems that show them late


def status(run: Path, *, verify: bool = False) -> dict[str, Any]:
    """How far a run is and how it goes. Raises RunError.

    Args:
        run: the run directory.
        verify: read the checkpoints, and tell of each whether its checksums hold.
    """
    now = time.time()
    config, record, lines, history = read_config(run), read_record(run), read_metrics(run), read_history(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    start = len(record["starts"]) - 1
    signs = [sign for sign in read_heartbeats(run) if sign.start == start]
    state, why = state_of(
        start,
        signs,
        history,
        locked=is_locked(run),
        finished=is_finished(run),
        stop_asked=(run / "stop").exists(),
        job_ended=_job_ended(run),
        now=now,
    )
    seen = max([line.get("time", 0.0) for line in lines] + [sign.time for sign in signs] + [past.time for past in history], default=now)
    lives = state in LIVE
    spent = goodput(record["starts"], {past.start: past.time for past in history}, lines, now if lives else seen)
    return {
        "run": str(run),
        "recipe": config.recipe,
        "state": state,
        "why": why,
        "job": signs[0].job if signs else "",
        "hosts": sorted({sign.host for sign in signs}),
        "step": max([steps[-1]["step"] if steps else 0, *(sign.step for sign in signs if lives)]),
        "total_steps": record["total_steps"],
        "samples_seen": steps[-1].get("samples_seen", 0) if steps else 0,
        "last": steps[-1] if steps else None,
        "evaluation": evaluations[-1] if evaluations else None,
        "checkpoints": [folder.name for folder in checkpoint.committed(run)],
        "checkpoint_ages": {folder.name: now - (folder / "COMMIT.json").stat().st_mtime for folder in checkpoint.committed(run)},
        "checkpoint_faults": {folder.name: checkpoint.verify(folder) for folder in checkpoint.committed(run)} if verify else None,
        "unusable": dict(unusable(run)),
        "starts": len(record["starts"]),
        "ends": [asdict(past) for past in history],
        "goodput": asdict(spent) | {"share": spent.share},
        "seconds_left": _seconds_left(config, steps, record["total_steps"]),
        "age": now - seen,
        "dataset": record["dataset"],
    }


def state_of(
    start: int,
    signs: list[Sign],
    history: list[Past],
    *,
    locked: bool,
    finished: bool,
    stop_asked: bool,
    job_ended: str = "",
    now: float,
) -> tuple[str, str]:
    """What a run does, and more about it in words. Pure.

    Args:
        start: the newest.
        signs: of life of its nodes.
        history: of starts that ended.
        locked: whether a process on this machine holds the run; of others nothing is known.
        finished: whether it is at its end.
        stop_asked: whether RUN/stop is there.
        job_ended: what the newest submission's batch script noted when it ended for good.
        now: seconds.
    """
    fresh = [sign for sign in signs if sign.phase != ENDED and abs(now - sign.time) < FRESH]  # a clock may be set back
    if locked or fresh:
        if not signs or all(sign.phase == STARTING for sign in signs):
            return "starting", ""
        slowest = max(signs, key=lambda sign: now - sign.time + sign.quiet)
        quiet = now - slowest.time + slowest.quiet
        if slowest.phase != ENDED and quiet > max(FRESH, slowest.hang_seconds / 2):
            return "hanging", f"{slowest.host} has made no step for {quiet:.0f} s; it ends itself after {slowest.hang_seconds:.0f}"
        return "running", "it was asked to stop" if stop_asked else ""
    if finished:
        return "finished", ""
    if not history or history[-1].start < start:
        return "stopped", f"its job ended: {job_ended}" if job_ended else "its processes went away" if signs else ""
    last = history[-1]
    if last.action == "requeue":
        return "waiting", f"{last.why}; SLURM starts it again"
    if last.action == "stop" and last.cause != Cause.REQUEST:
        return "failed", f"{last.words}; {last.why}" if last.words else last.why
    return "stopped", last.why if last.action == "stop" else ""


def _job_ended(run: Path) -> str:
    """Why the newest job that was submitted for a run ended for good, where its script came to say so; SLURM ends it in mid-word."""
    submissions = sorted(folder for folder in (run / "submissions").glob("*") if folder.name.isdigit())
    note = submissions[-1] / "ended" if submissions else None
    return note.read_text(errors="replace").strip() if note and note.is_file() else ""


def _seconds_left(config: TrainConfig, steps: list[dict[str, Any]], total_steps: int) -> float | None:
    """By the speed of the newest line, as that line tells it."""
    if not steps or not steps[-1].get("images_per_second"):
        return None
    left: float = (total_steps - steps[-1]["step"]) * config.global_batch_size / steps[-1]["images_per_second"]
    return left
