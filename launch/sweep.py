"""`vitscale finetune --sweep`: the peak learning rate, chosen on a held-out part of the training split (arXiv 2010.11929, appendix B.1.1).

    RUN/sweep/lr-0.003/     a trial: a run of its own, which trains on all but the held-out part and is evaluated on that
    RUN/sweep/sweep.json    what each trial came to; written anew after each

Where it stands: over `local.start`, as a single run does; then the best rate trains RUN on the whole training split. `submit.py` makes jobs
of the trials and of the run, whose tasks ask `at_best` for the rate.

Invariants: what is known of a trial lies in its own directory alone, so that the same command goes on wherever it was stopped and makes no
finished trial again; nothing is trained for a run that has begun, whose rate is chosen; all trials and RUN begin from the same weights and
have the same settings; a trial that diverges is a result, anything else that ends one ends the sweep.
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
from vitscale.metrics import counted
from vitscale.resolve import resolve
from vitscale.run import begun_config, check_directory, check_start, is_finished, read_metrics, read_record, write_json
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
    left_out: int = 0
    """Steps whose gradient was not finite."""


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
    """What a trial has come to so far, from its directory.

    One that came to its end has diverged, too, where it was rolled back because its gradient stayed not finite, where it was not at its
    last step, or where the loss is not: its top-1 is that of weights which learned nothing since.
    """
    history = read_history(run)
    if history and history[-1].cause == Cause.DIVERGED and history[-1].action == "stop":
        return Trial(peak_lr, str(run), "diverged")
    if not is_finished(run):
        return Trial(peak_lr, str(run), "unfinished")
    record, metrics = read_record(run), read_metrics(run)
    last = [line for line in metrics if "eval_top1" in line][-1]
    left_out = {line["step"] for line in metrics if "left_out" in line}
    rolled_back = any(of["cause"] == Cause.NONFINITE for of in record.get("skipped", []))
    if rolled_back or record["total_steps"] in left_out or not math.isfinite(last["eval_loss"]):
        return Trial(peak_lr, str(run), "diverged", left_out=len(left_out))
    return Trial(peak_lr, str(run), "finished", last["eval_top1"], last["eval_loss"], int(last["eval_samples"]), len(left_out))


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
    decided = not any(trial.state == "unfinished" for trial in trials) and any(trial.state == "finished" for trial in trials)
    if not decided or best_trial(trials).peak_lr != rate:
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
    return max(finished, key=lambda trial: (trial.top1, -(trial.loss or 0.0), -trial.peak_lr))


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
            loss = f"{trial.loss:.4f}" if trial.loss is not None and trial.loss < 1e3 else f"{trial.loss:.2g}"
            found = f"{trial.top1:>9.2%}{f'{low:.1%} to {high:.1%}':>21}{loss:>9}"
        left_out = f"  ({counted(trial.left_out, 'step')} left out, not finite)" if trial.left_out else ""
        lines.append(f"{trial.peak_lr:>9g}{found}   {trial.run}{left_out}{'  best' if trial == chosen else ''}")
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
    best: Trial | None = None
    with stopping() as stop:
        ended = try_all(run, configs, trials, nproc, said, stop)
        if not ended:
            best = best_trial(trials)
            if rate_begun(run) is None:  # else what its rate was chosen of is noted, and may be more than is asked for now
                note(run, trials, share, best)
            print(table(trials, share), file=said, flush=True)
            ended = start(resolve(final_run(asked, best.peak_lr), nproc), nproc, said, stop)
    if as_json:
        state = status(run) if begun_config(run) else None
        print_json({"holdout": share, "trials": [vars(of) for of in trials], "best": best.peak_lr if best else None, "run": state})
    return ended


def try_all(run: Path, configs: Sequence[TrainConfig], trials: list[Trial], nproc: int, terminal: TextIO, stop: Stop) -> int:
    """Makes the trials that are not finished, one after another; the command's exit status where that was stopped, else 0."""
    for number, config in enumerate(configs):
        lr = config.optimizer.peak_lr
        if trials[number].state != "unfinished":
            continue
        print(f"sweep: peak lr {lr:g}, {number + 1} of {len(configs)}", file=terminal, flush=True)
        ended = try_out(config, nproc, terminal, stop)
        trials[number] = trial_at(Path(config.out), lr)
        if not ended:
            note(run, trials, config.holdout)
        if stop.signals or ended:  # perhaps too late for the trial, and not for what follows
            made = sum(trial.state != "unfinished" for trial in trials)
            print(f"stopped with {made} of {counted(len(trials), 'trial')} made; the same command makes the others", file=sys.stderr)
            return ended or stop.exit_status
    return 0


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
    inits = {Path(config.init.folder).resolve(): (config.out, config.init.folder) for config in configs if config.init}
    if len(inits) > 1:
        (of_one, one), (of_other, other), *_ = inits.values()
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
