"""How a run is, from its files alone: what `vitscale run status` and `run ls` print. Works wherever they are seen, and without torch."""

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitscale import checkpoint
from vitscale.ending import Cause
from vitscale.goodput import goodput
from vitscale.heartbeat import ENDED, STARTING, Sign, read_heartbeats
from vitscale.metrics import SHARES, what_bounds
from vitscale.run import (
    is_finished,
    is_locked,
    read_config,
    read_evaluations,
    read_metrics,
    read_record,
    samples_of,
    trained_datasets,
    unusable,
)
from vitscale.timeline import timeline_of
from vitscale.verdict import Past, read_history

LIVE = ("starting", "running", "hanging")  # states in which the run has processes
AT_REST = ("finished", "stopped", "failed")  # states that no job of SLURM changes; `waiting`, one may
FRESH = 60.0  # seconds for which a sign of life counts: many times the interval between two, for file systems that show them late
_OF_LATE = 9  # logged lines whose median tells how fast a run is: one alone may be of a moment when storage or a neighbour held it up


@dataclass(frozen=True)
class Submission:
    """What the folder of a run's newest submission tells."""

    folder: Path
    jobs: tuple[str, ...]
    """From the one that made the newest start on; SLURM may start them, or start them again, for all that files tell."""
    begun: bool
    """Whether the newest start is one of its jobs'."""
    ended: str
    """Why it ended for good, where its script came to say so: SLURM ends it in mid-word."""
    time: float


def status(run: Path, *, verify: bool = False) -> dict[str, Any]:
    """How far a run is and how it goes. Raises RunError.

    Args:
        run: the run directory.
        verify: read the checkpoints, and tell of each whether its checksums hold.
    """
    now = time.time()
    submission = submission_of(run)
    if submission and not (run / "run.json").is_file():  # which its first start writes
        config = read_config(submission.folder)
        record: dict[str, Any] = {"starts": [], "total_steps": config.steps or None, "dataset": None}
    else:
        config, record = read_config(run), read_record(run)
    lines, history = read_metrics(run), read_history(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    start, newest = len(record["starts"]) - 1, (record["starts"] or [{}])[-1]
    signs = [sign for sign in read_heartbeats(run) if sign.start == start]
    state, why = state_of(
        start,
        signs,
        history,
        locked=is_locked(run),
        finished=is_finished(run),
        stop_asked=(run / "stop").exists(),
        submission=submission,
        now=now,
    )
    told = [line.get("time", 0.0) for line in lines] + [sign.time for sign in signs] + [past.time for past in history]
    told += [submission.time] if submission else []
    seen = max(told, default=now)
    lives = state in LIVE
    timeline = timeline_of(config, samples_of(trained_datasets(record))) if steps else None
    begun = timeline.at_step(steps[-1]["step"] - 1).first_step if timeline else 0
    pace = _pace([line for line in steps if line["step"] > max(begun, newest.get("step", 0))])
    bound = what_bounds(pace, config.stream.workers, pace.get("images_per_second", 0.0), newest.get("world_size", 1))
    profiles = sorted((run / "profile").glob("step-*.md"), key=lambda file: (file.stat().st_mtime, file.name))
    spent = goodput(record["starts"], {past.start: past.time for past in history}, lines, now if lives else seen)
    return {
        "run": str(run),
        "recipe": config.recipe,
        "state": state,
        "why": why,
        "job": submission.jobs[0] if submission and not submission.begun else newest.get("job", ""),
        "hosts": sorted({sign.host for sign in signs}),
        "step": max([steps[-1]["step"] if steps else 0, *(sign.step for sign in signs if lives)]),
        "total_steps": record["total_steps"],
        "samples_seen": steps[-1].get("samples_seen", 0) if steps else 0,
        "last": steps[-1] if steps else None,
        "pace": pace,
        "bound": bound,
        "profile": str(profiles[-1]) if profiles else None,
        "evaluation": evaluations[-1] if evaluations else None,
        "evaluated_apart": next(reversed(read_evaluations(run)), None),
        "checkpoints": [folder.name for folder in checkpoint.committed(run)],
        "checkpoint_ages": {folder.name: now - (folder / "COMMIT.json").stat().st_mtime for folder in checkpoint.committed(run)},
        "checkpoint_faults": {folder.name: checkpoint.verify(folder) for folder in checkpoint.committed(run)} if verify else None,
        "unusable": dict(unusable(run)),
        "starts": len(record["starts"]),
        "ends": [asdict(past) for past in history],
        "goodput": asdict(spent) | {"share": spent.share},
        "seconds_left": timeline.images_left(steps[-1]["step"], config.model, config.optimizer) / pace["images_per_second"]
        if timeline and pace.get("images_per_second")
        else None,
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
    submission: Submission | None = None,
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
        submission: the newest, where the run was submitted since its last start on one machine.
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
    if submission and not submission.begun and not submission.ended:
        return "waiting", _waiting(f"submitted as {_named(submission.jobs)}, and not started yet", submission, stop_asked)
    last = history[-1] if history and history[-1].start >= start and (not submission or submission.begun) else None
    if last and last.action == "stop":
        words = first_error(last.cause, last.words)
        return ("stopped", last.why) if last.cause == Cause.REQUEST else ("failed", f"{words}; {last.why}" if words else last.why)
    if submission and submission.ended:
        return "stopped", f"its job ended: {submission.ended}"
    happened = last.why if last else "its processes went away" if signs else "no process of its newest start gave a sign of life yet"
    if submission:
        return "waiting", _waiting(happened, submission, stop_asked)
    return "stopped", happened if last or signs else ""


def first_error(cause: str, words: str) -> str:
    """What the first error of a start said, where that adds to why it ended: a peer's end and one that was asked for explain themselves."""
    return "" if cause in (Cause.LOST_PEER, Cause.SIGNAL, Cause.REQUEST, Cause.PREEMPTED) else words


def submission_of(run: Path) -> Submission | None:
    """The newest submission of a run, unless a start on one machine came after it; None where there is none."""
    folder = max((of for of in (run / "submissions").glob("*") if of.name.isdigit()), key=lambda of: int(of.name), default=None)
    if folder is None:
        return None
    newest: Mapping[str, Any] = ((read_record(run)["starts"] if (run / "run.json").is_file() else None) or [{}])[-1]
    job: str = newest.get("job", "")
    jobs: tuple[str, ...] = ()
    submitted, ended = 0.0, ""
    with contextlib.suppress(OSError):  # a submission is for its owner alone to read
        submitted, jobs = (folder / "jobs").stat().st_mtime, tuple((folder / "jobs").read_text().split())
    with contextlib.suppress(OSError):
        ended = (folder / "ended").read_text(errors="replace").strip()
    if job and (job in jobs or not jobs):
        return Submission(folder, jobs[jobs.index(job) :] if jobs else (job,), True, ended, submitted)
    newer = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(submitted)) > newest.get("time", "")
    return Submission(folder, jobs, False, ended, submitted) if jobs and newer else None


def _named(jobs: Sequence[str]) -> str:
    return f"job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}"


def _waiting(happened: str, submission: Submission, stop_asked: bool) -> str:
    """What becomes of a run that waits for its jobs, and where to ask whether they wait, too: of a cancelled one no file tells."""
    jobs = _named(submission.jobs)
    then = f"; it goes on in {jobs}, unless cancelled or over" if submission.begun else ", unless cancelled"
    then = f"; asked to stop, it makes no step in {jobs}" if stop_asked else then
    return f"{happened}{then} (squeue -j {','.join(submission.jobs)})"


def _pace(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How a start goes of late: the medians of the speeds that its newest lines measured, and the means of the shares."""
    of_late = [line for line in steps if "profiled" not in line][-_OF_LATE:]
    measured = {name: [line[name] for line in of_late if name in line] for name in ("images_per_second", "mfu", "mfu_of_measured")}
    found = {name: statistics.median(values) for name, values in measured.items() if values}
    told = [line for line in of_late if all(share in line for share in SHARES)]
    return found | ({share: statistics.fmean(line[share] for line in told) for share in SHARES} if told else {})  # which sum to 1
