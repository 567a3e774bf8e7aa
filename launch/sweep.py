"""`vitscale finetune --sweep`: the peak learning rate, chosen on a held-out part of the training split (arXiv 2010.11929, appendix B.1.1).

    RUN/sweep/lr-0.003/     a trial: a run of its own, which trains on all but the held-out part and is evaluated on that
    RUN/sweep/sweep.json    what each trial came to; written anew after each

Where it stands: over `local.start`, as a single run does; then the best rate trains RUN on the whole training split. `submit.py` makes jobs
of the trials and of the run, whose tasks ask `at_best` for the rate.

Invariants: what is known of a trial lies in its own directory alone, so that the same command goes on wherever it was stopped and makes no
finished trial again; all trials and RUN begin from the same weights; a trial that diverges is a result, anything else that ends one ends
the sweep.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data_tools.errors import UserError
from launch.flags import UsageError
from launch.local import start
from launch.ranks import Stop, stopping
from launch.terminal import LaunchError, print_json
from vitscale.config import FinetuneConfig, TrainConfig
from vitscale.ending import Cause
from vitscale.intervals import wilson
from vitscale.resolve import resolve
from vitscale.run import begun_config, check_directory, check_start, is_finished, read_metrics, write_json
from vitscale.status import status
from vitscale.verdict import read_history


class SweepError(UserError):
    """A sweep that has no result; the message is one line for the user."""


@dataclass(frozen=True)
class Trial:
    """What a trial came to."""

    peak_lr: float
    run: str
    state: str
    """finished, diverged, or unfinished."""
    top1: float | None = None
    """On the held-out part, after the last step."""
    loss: float | None = None
    samples: int = 0
    """Of the held-out part."""


# -- What is tried, and what came of it ---------------------------------------------------------------------------------------------------


def grid_of(asked: FinetuneConfig, given: Sequence[float]) -> tuple[float, ...]:
    """The rates to try, the recipe's own where none are given, ascending. Raises UsageError."""
    if asked.eval_data == "none":
        raise UsageError("--sweep with --eval-data none: the run that the sweep is for would never be evaluated; leave it out")
    grid = tuple(given) or asked.sweep.peak_lrs
    if not grid:
        raise UsageError(f"recipe {asked.recipe} has no grid of learning rates; give them, as in --sweep 0.003 0.01 0.03")
    odd = next((lr for lr in grid if not (math.isfinite(lr) and lr > 0) or grid.count(lr) > 1), None)
    if odd is not None:
        raise UsageError(f"--sweep {' '.join(f'{lr:g}' for lr in grid)}: {odd:g} is given twice or not above 0; --sweep 0.003 0.01 works")
    return tuple(sorted(grid))


def trials_of(asked: FinetuneConfig, grid: Sequence[float]) -> list[FinetuneConfig]:
    """The trials of a run: it at each rate, without the held-out part, and evaluated on that.

    Of a trial only its result matters, so that it keeps its newest checkpoint alone.
    """
    return [
        dataclasses.replace(
            asked,
            out=str(Path(asked.out) / "sweep" / f"lr-{lr!r}"),
            holdout=asked.holdout or asked.sweep.holdout,
            eval_data="",
            keep_checkpoints=1,
            keep_every=0,
            keep_best=False,
            optimizer=dataclasses.replace(asked.optimizer, peak_lr=lr),
        )
        for lr in grid
    ]


def final_run(asked: FinetuneConfig, peak_lr: float) -> FinetuneConfig:
    """The run that a sweep is for: at the rate that was best, on the whole training split."""
    return dataclasses.replace(asked, holdout=0.0, optimizer=dataclasses.replace(asked.optimizer, peak_lr=peak_lr))


def trial_at(run: Path, peak_lr: float) -> Trial:
    """What a trial has come to so far, from its directory."""
    history = read_history(run)
    if history and history[-1].cause == Cause.DIVERGED and history[-1].action == "stop":
        return Trial(peak_lr, str(run), "diverged")
    if not is_finished(run):
        return Trial(peak_lr, str(run), "unfinished")
    last = [line for line in read_metrics(run) if "eval_top1" in line][-1]
    return Trial(peak_lr, str(run), "finished", last["eval_top1"], last["eval_loss"], int(last["eval_samples"]))


def rate_begun(run: Path) -> float | None:
    """The peak learning rate of a run that has begun, which no trial can choose any more; None of one that has not."""
    begun = begun_config(run)
    return begun.optimizer.peak_lr if begun else None


def check_sweep_can_choose(run: Path, trials: Sequence[Trial]) -> None:
    """Raises SweepError where trials would be made, or another rate be chosen, for a run that has begun."""
    begun = begun_config(run)
    if begun is None:
        return
    rate = begun.optimizer.peak_lr
    if any(trial.state == "unfinished" for trial in trials) or best_trial(trials).peak_lr != rate:
        grid, holdout = " ".join(f"{trial.peak_lr!r}" for trial in trials), f"--holdout {begun.holdout!r} " if begun.holdout else ""
        raise SweepError(
            f"{run} has begun, at the peak learning rate {rate!r}; --sweep {grid} would choose one anew, for which give another --out; "
            f"--optimizer.peak-lr {rate!r} {holdout}without --sweep{'' if holdout else ' and --holdout'} goes on with it"
        )


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The finished trial of the highest top-1; of equal ones that of the lowest loss, then of the lowest rate. Raises SweepError."""
    if unfinished := [trial.run for trial in trials if trial.state == "unfinished"]:
        raise SweepError(f"{unfinished[0]} is not finished, and a sweep is decided by all its trials; the same command goes on with it")
    finished = [trial for trial in trials if trial.top1 is not None and trial.loss is not None]
    if not finished:
        rates = " ".join(f"{trial.peak_lr:g}" for trial in trials)
        lower = min(trial.peak_lr for trial in trials) / 10
        raise SweepError(f"every trial of --sweep {rates} diverged; lower rates may work, as --sweep {lower:g}")
    return max(finished, key=lambda trial: (trial.top1, -_finite(trial.loss), -trial.peak_lr))


def _finite(loss: float | None) -> float:
    """A loss to compare by: NaN is worse than any."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def table(trials: Sequence[Trial], share: float) -> str:
    """What a sweep found, for people; the best is marked."""
    samples = max(trial.samples for trial in trials)
    best = max((trial.top1 for trial in trials if trial.top1 is not None), default=None)
    chosen = best_trial(trials) if best is not None and all(trial.state != "unfinished" for trial in trials) else None
    head = f"{'peak lr':>9}{'top-1':>9}{'95% of another draw':>21}{'loss':>9}"
    lines = [f"{head}   on {samples:,} held-out samples ({share:g} of the training split)"]
    for trial in trials:
        found = f"{trial.state:>39}"
        if trial.top1 is not None:
            low, high = wilson(round(trial.top1 * trial.samples), trial.samples)
            found = f"{trial.top1:>9.2%}{f'{low:.1%} to {high:.1%}':>21}{trial.loss:>9.4f}"
        lines.append(f"{trial.peak_lr:>9g}{found}   {trial.run}{'  best' if trial == chosen else ''}")
    return "\n".join(lines)


# -- On this machine ----------------------------------------------------------------------------------------------------------------------


def sweep(asked: FinetuneConfig, given: Sequence[float], nproc: int, *, as_json: bool) -> int:
    """Makes the trials that are not made yet, one after another, then the run; returns the command's exit status. Raises UserError.

    Args:
        asked: the run that the sweep is for; its `holdout`, where it has one, is the trials'.
        given: rates to try; none: the recipe's.
        nproc: ranks of each.
    """
    grid, said = grid_of(asked, given), sys.stderr if as_json else sys.stdout
    asked = dataclasses.replace(asked, out=asked.out or f"runs/{asked.recipe}")
    run = Path(asked.out)
    check_directory(run)
    configs = [resolve(trial, nproc) for trial in trials_of(asked, grid)]
    check_alike([*configs, resolve(final_run(asked, grid[0]), nproc)])
    for config in configs:
        check_start(config)  # those that are finished, too: a result of other settings is none of this sweep's
    share = configs[0].holdout
    trials = [trial_at(Path(config.out), lr) for config, lr in zip(configs, grid, strict=True)]
    check_sweep_can_choose(run, trials)
    with stopping() as stop:
        for number, (config, lr) in enumerate(zip(configs, grid, strict=True)):
            if trials[number].state != "unfinished":
                continue
            print(f"sweep: peak lr {lr:g}, {number + 1} of {len(grid)}", file=said, flush=True)
            if ended := try_out(config, nproc, said, stop):
                return ended
            trials[number] = trial_at(Path(config.out), lr)
            note(run, trials, share)
            if stop.signals:  # too late for the trial, and not for what follows
                print(f"stopped; the same command goes on after {config.out}", file=sys.stderr)
                return stop.exit_status
        best = best_trial(trials)
        note(run, trials, share, best)
        print(table(trials, share), file=said, flush=True)
        ended = start(resolve(final_run(asked, best.peak_lr), nproc), nproc, said, stop)
    if as_json:
        print_json({"holdout": share, "trials": [vars(trial) for trial in trials], "best": best.peak_lr, "run": status(run)})
    return ended


def try_out(config: TrainConfig, nproc: int, terminal: TextIO, stop: Stop) -> int:
    """Starts or resumes a trial and waits for its end; one that diverges is over, too."""
    try:
        return start(config, nproc, terminal, stop)
    except LaunchError:
        if trial_at(Path(config.out), config.optimizer.peak_lr).state == "diverged":
            return 0
        raise


def check_alike(configs: Sequence[TrainConfig]) -> None:
    """Raises SweepError where runs of a sweep begin from different weights, as where a run that is fine-tuned went on meanwhile."""
    folders = {config.init.folder: config.out for config in configs if config.init}
    if len(folders) > 1:
        (one, of_one), (other, of_other), *_ = folders.items()
        raise SweepError(
            f"{of_one} began from {one}, and {of_other} is to begin from {other}; give another --out, and an --init that "
            "stays: a run that is finished, or an export of the checkpoint"
        )


def note(run: Path, trials: Sequence[Trial], share: float, best: Trial | None = None) -> None:
    """Writes RUN/sweep/sweep.json."""
    values = {"holdout": share, "trials": [vars(trial) for trial in trials], "best": best.peak_lr if best else None}
    write_json(run / "sweep" / "sweep.json", values)


# -- As jobs of SLURM ---------------------------------------------------------------------------------------------------------------------


def note_trials(submission: Path, trials: Sequence[FinetuneConfig]) -> None:
    """Writes down in a run's submission which trials its rate is to be the best of."""
    runs = [{"peak_lr": trial.optimizer.peak_lr, "run": trial.out} for trial in trials]
    write_json(submission / "sweep.json", {"holdout": trials[0].holdout, "trials": runs})


def at_best(config: TrainConfig, submission: Path) -> TrainConfig:
    """A submitted run at the rate that was best, where its submission names trials; one that has begun keeps its own.

    Raises SweepError.
    """
    if not (submission / "sweep.json").is_file():
        return config
    run = Path(config.out)
    peak_lr = rate_begun(run)
    if peak_lr is None:
        noted = json.loads((submission / "sweep.json").read_bytes())
        trials = [trial_at(Path(of["run"]), of["peak_lr"]) for of in noted["trials"]]
        best = best_trial(trials)
        note(run, trials, noted["holdout"], best)
        print(table(trials, noted["holdout"]), flush=True)
        peak_lr = best.peak_lr
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_lr=peak_lr))
