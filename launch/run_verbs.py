"""The verbs `vitscale run ...`: how runs are, what they saw, and what is asked of them. They work from files alone, and without torch."""

import dataclasses
import getpass
import json
import platform
import shlex
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from launch.evaluation_tables import summary
from launch.flags import UsageError, given, parse
from launch.terminal import Json, Verb, print_json, progress_bar
from vitscale.config import BODY, FinetuneConfig, NewModelConfig, RunConfig, TrainConfig, ViewConfig, flatten, settle_length, to_dict
from vitscale.ending import Cause
from vitscale.metrics import SHARES, counted, duration, share_name
from vitscale.recipes import FINETUNE, PRETRAIN, recipe, recipe_name

Run = Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help="Run directory.")]
_DRAW_EVERY = 2.0
_ENDS = 5  # that `run status` shows
_NO_MACHINES = (Cause.SIGNAL, Cause.SPIKE, Cause.NONFINITE, Cause.DIVERGED)  # whose ends come from no machine, whichever told of them


# -- status -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatusFlags:
    """Shows how far a run is, how it goes, and where its time went, from its files alone."""

    run: Run
    watch: bool = False
    """Show it anew every few seconds until the run ends."""
    verify: bool = False
    """Read the checkpoints, and tell whether their checksums hold."""
    json: Json = False


def run_status(words: list[str]) -> None:
    """How far a run is, how it goes, and where its time went."""
    flags = parse(StatusFlags, words, "run status")
    from vitscale.status import status

    run = Path(flags.run)
    if flags.watch:
        _watch(run, flags)
        return
    found = status(run, verify=flags.verify)
    if flags.json:
        print_json(found)
    else:
        print("\n".join(status_lines(found)))


def _watch(run: Path, flags: StatusFlags) -> None:
    """Until the run ends: redraws on a terminal; elsewhere what changed, as text or as a line of JSON."""
    from rich.live import Live
    from rich.text import Text

    from vitscale.status import AT_REST, status

    if sys.stdout.isatty() and not flags.json:
        with Live(auto_refresh=False) as live:
            while True:
                found = status(run, verify=flags.verify)
                live.update(Text("\n".join(status_lines(found))), refresh=True)
                if found["state"] in AT_REST:
                    return
                time.sleep(_DRAW_EVERY)
    told = None
    while True:
        found = status(run, verify=flags.verify)
        if told != (told := (found["state"], found["step"], found["checkpoints"], found["starts"])):
            print(json.dumps(found, default=str) if flags.json else status_lines(found, short=True)[0], flush=True)
        if found["state"] in AT_REST:
            return
        time.sleep(_DRAW_EVERY)


def status_lines(found: dict[str, Any], *, short: bool = False) -> list[str]:
    """What `run status` prints; `short`: one line."""
    from vitscale.status import LIVE

    where = f" on {', '.join(found['hosts'][:3])}{', ...' if len(found['hosts']) > 3 else ''}" if found["hosts"] else ""
    where += f" (job {found['job']})" if found["job"] else ""
    lives = found["state"] in LIVE
    state = f"{found['state']}{where if lives else ''}{': ' + found['why'] if found['why'] else ''}"
    starts = counted(found["starts"], "start")
    last, pace = found["last"] or {}, found["pace"]
    step = f"step {found['step']}{' of ' + str(found['total_steps']) if found['total_steps'] else ''}"
    if short:
        loss = f", loss {last['loss']:.4f}" if last else ""
        return [f"{found['run']}: {step}{loss}, {state}, {starts}"]
    lines = [f"{found['run']}: {found['recipe']}, {state}", f"{step}, {starts}"]
    if last:
        parts = [f"loss {last['loss']:.4f}", f"epoch {last.get('epoch', 0):.2f}", f"{found['samples_seen']:,} samples"]
        if "images_per_second" in pace:
            parts.append(f"{pace['images_per_second']:,.0f} img/s")
        if "mfu" in pace:
            parts.append(f"MFU {pace['mfu']:.1%}")
        if lives and found["seconds_left"]:
            parts.append(f"{duration(found['seconds_left'])} left")
        lines.append(", ".join(parts))
    if found["bound"]:
        shares = sorted((share for share in SHARES if pace[share] >= 0.005), key=lambda share: -pace[share])
        lines.append(f"{found['bound']} ({', '.join(f'{share_name(share)} {pace[share]:.0%}' for share in shares)})")
    if found["profile"]:
        lines.append(f"profile: {found['profile']}")
    if evaluation := found["evaluation"]:
        lines.append(f"held out at step {evaluation['step']}: top-1 {evaluation['eval_top1']:.2%}, loss {evaluation['eval_loss']:.4f}")
    if apart := found["evaluated_apart"]:
        lines.append(f"evaluated apart at step {apart['step']} on {apart.get('data', '?')}: {summary(apart)}")
    lines += _checkpoint_lines(found)
    lines += _end_lines(found)
    spent = found["goodput"]
    if spent["wall"] > 0 and found["starts"]:
        lost = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent["lost"].items() if seconds >= 1)
        lines.append(f"{spent['share']:.1%} of {duration(spent['wall'])} went into steps that count{'; ' + lost if lost else ''}")
    if reasons := found["unusable"]:
        commonest = max(reasons, key=lambda reason: reasons[reason])
        lines.append(f"warning: others came in the place of {counted(sum(reasons.values()), 'unusable sample')}, most for: {commonest}")
    return lines


def _checkpoint_lines(found: dict[str, Any]) -> list[str]:
    if not found["checkpoints"]:
        return ["checkpoints: none yet"]
    faults, of_each = found["checkpoint_faults"], []
    for name in found["checkpoints"]:
        checked = "" if faults is None else ", damaged" if faults[name] else ", checksums hold"
        of_each.append(f"{name} ({duration(found['checkpoint_ages'][name])} old{checked})")
    whole = [name for name in found["checkpoints"] if not (faults or {}).get(name)]
    goes_on = (
        f"; the same command {f'goes on from {whole[-1]}' if whole else 'starts anew'}" if found["state"] in ("stopped", "failed") else ""
    )
    return [f"checkpoints: {', '.join(of_each)}{goes_on}"]


def _end_lines(found: dict[str, Any]) -> list[str]:
    """The newest ends: cause, machine and why, and what the first error said where that adds to it."""
    from vitscale.status import first_error

    ends = [end for end in found["ends"] if end["action"] != "finished"]
    earlier, lines = len(ends[:-_ENDS]), []
    if earlier:
        lines.append(f"{counted(earlier, 'earlier end')} in {found['run']}/ends.jsonl")
    for end in ends[-_ENDS:]:
        cause = f", {end['cause']}" if end["cause"] else ""
        where = f" on {', '.join(end['blamed'])}" if end["blamed"] and end["cause"] not in _NO_MACHINES else ""
        said = first_error(end["cause"], end["words"])
        said = f"; rank {end['rank']}: {said}" if said and end["rank"] >= 0 else f"; {said}" if said else ""
        lines.append(f"start {end['start']} ended at step {end['step']}{cause}{where}: {end['why']}{said} -> {end['action']}")
    return lines


# -- ls -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LsFlags:
    """Lists the runs in and below folders."""

    folders: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER", help="Where to look; `runs` if none is given.")] = ()
    json: Json = False


def run_ls(words: list[str]) -> None:
    """The runs below folders: state, step, loss, age."""
    flags = parse(LsFlags, words, "run ls")
    from data_tools.errors import UserError
    from vitscale.status import status

    folders = [Path(folder) for folder in flags.folders or ("runs",)]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give one that runs lie in")
    found = []
    runs = {file.parent for folder in folders for file in folder.rglob("run.json")}
    runs |= {file.parents[2] for folder in folders for file in folder.rglob("submissions/*/jobs")}  # which may not have started yet
    for run in sorted(runs):
        try:
            found.append(status(run))
        except UserError as error:  # one that is damaged does not hide the others
            found.append(
                {"run": str(run), "recipe": "", "state": f"damaged: {error}", "step": 0, "total_steps": 0, "last": None, "age": 0.0}
            )
    if flags.json:
        print_json(found)
        return
    rows = [("run", "recipe", "state", "step", "loss", "last seen")]
    for of in found:
        loss = f"{of['last']['loss']:.4f}" if of["last"] else ""
        rows.append((of["run"], of["recipe"], of["state"], f"{of['step']}/{of['total_steps'] or '?'}", loss, f"{duration(of['age'])} ago"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# -- stop ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StopFlags:
    """Asks a run to save and end, on whatever machines it runs; it stays stopped until somebody starts it again."""

    run: Run
    wait: bool = False
    """Until it has ended, and is judged: one that SLURM has still to start, until it was started."""


def run_stop(words: list[str]) -> None:
    """Ask a run to save and end."""
    flags = parse(StopFlags, words, "run stop")
    from data_tools.durable import replace_file
    from vitscale.status import AT_REST, status

    run = Path(flags.run)
    found = status(run)
    if found["state"] == "finished":
        print(f"{run} is finished; there is nothing to stop")
        return
    replace_file(run / "stop", json.dumps({"time": time.time(), "by": f"{getpass.getuser()}@{platform.node()}"}) + "\n")
    if found["state"] in AT_REST:
        print(f"{run} does not run; nothing starts it again but the command that started it")
        return
    if found["state"] == "waiting":
        print(f"{run} does not run now: {status(run)['why']}")
        if not flags.wait:
            return
    elif not flags.wait:
        print(f"{run} was asked to stop; it saves at its next step (`vitscale run status {run}` tells)")
        return
    with progress_bar(f"waiting for {run} to save and end", quiet=False, unit="steps") as update:
        while (found := status(run))["state"] not in AT_REST:
            update(found["step"], found["total_steps"] or 0)
            time.sleep(0.5)
    print(status_lines(found, short=True)[0])


# -- fork ---------------------------------------------------------------------------------------------------------------------------------


def run_fork(words: list[str]) -> None:
    """Begin another run from a checkpoint, with another schedule or length."""
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print(
                "usage: vitscale run fork RUN@STEP OUT [--field value ...]\n\nOUT must not exist; RUN alone means its newest checkpoint. "
                "Fields are those of\n`vitscale pretrain RECIPE --help`; the model's sizes, batch size, seed, order, optimizer and recipe "
                "stay as they are."
            )
            return
        raise UsageError("`vitscale run fork` needs RUN@STEP and OUT as its first words, then fields that are to be others")
    from vitscale.fork import fork, fork_point
    from vitscale.resolve import resolve
    from vitscale.run import read_config

    run, origin = fork_point(words[0])
    before = dataclasses.replace(read_config(run), out=words[1])
    asked = parse(TrainConfig, words[2:], "run fork", before)
    out = fork(run, origin, resolve(settle_length(asked, given(words[2:], "epochs", "steps")), 1))
    as_a_job = "as a job behind `vitscale submit --site SITE.toml --nodes N --`"
    print(f"{out} goes on from step {origin.step} of {run}; this starts it ({as_a_job}):")
    print(" ".join(["vitscale", *command_of(read_config(out))]))


def command_of(config: TrainConfig) -> list[str]:
    """The words after `vitscale` that start or resume the run of a config."""
    name, init = config.recipe, config.init
    fine_tunes = name in map(recipe_name, FINETUNE)
    default: RunConfig = recipe(name, FINETUNE) if fine_tunes else recipe(name, PRETRAIN)
    asked = _fine_tuning_asked(config) if fine_tunes else _pretraining_asked(config)
    before, now = flatten(to_dict(default)), flatten(to_dict(asked))
    words = ["finetune" if fine_tunes else "pretrain", name]
    if init and not fine_tunes:
        words += [*_flag("init", init.checkpoint), *_flag("init-weights", init.weights)]
        words += _flag("position-interpolation", init.position_interpolation)
    for setting, value in now.items():
        if value != before.get(setting) and setting != "recipe":
            words += _flag(setting, value)
    return words


def _flag(setting: str, value: Any) -> list[str]:
    name = "--" + setting.replace("_", "-")
    if isinstance(value, bool):
        parts = name.removeprefix("--").rpartition(".")
        return [name if value else f"--{parts[0]}{parts[1]}no-{parts[2]}"]
    values = value if isinstance(value, list) else [value]
    return [name, *(shlex.quote(str(one)) for one in values)]


def _pretraining_asked(config: TrainConfig) -> TrainConfig:
    """What a user asked of `pretrain` beside --init to get this config."""
    if not config.init:
        return config
    body = {name: getattr(recipe(config.recipe, PRETRAIN).model, name) for name in BODY}
    return dataclasses.replace(config, init=None, model=dataclasses.replace(config.model, **body))


def _fine_tuning_asked(config: TrainConfig) -> FinetuneConfig:
    """What a user asked of `finetune` to get this config."""
    assert config.init is not None
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    model = NewModelConfig(**{f.name: getattr(config.model, f.name) for f in dataclasses.fields(NewModelConfig)})
    view = ViewConfig(**{f.name: getattr(config.preprocess, f.name) for f in dataclasses.fields(ViewConfig)})
    init = config.init
    return FinetuneConfig(
        **shared, init=init.checkpoint, init_weights=init.weights, position_interpolation=init.position_interpolation, model=model,
        preprocess=view, sweep=recipe(config.recipe, FINETUNE).sweep,
    )  # fmt: skip


# -- logs ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogsFlags:
    """Shows what the processes of a start said: why it ended first, then every node's log, that of the first error first."""

    run: Run
    start: int | None = None
    """Which start, from 0; the newest if none is given."""
    tail: int | None = None
    """Only so many of the last lines of each log; all if none is given."""
    json: Json = False
    """Only the end records, as JSON."""


def run_logs(words: list[str]) -> None:
    """What the processes of a start said, the first error first."""
    flags = parse(LogsFlags, words, "run logs")
    from vitscale.ending import read_ends
    from vitscale.run import log_file, read_record
    from vitscale.status import submission_of

    run = Path(flags.run)
    if flags.tail is not None and flags.tail < 1:
        raise UsageError(f"tail={flags.tail} must be at least 1")
    if not (run / "run.json").is_file() and (submission := submission_of(run)):
        what = (
            f"{run} has no logs yet: no start of it has begun; what SLURM says of job {submission.jobs[0]}: {submission.folder}/job-*.log"
        )
        print_json([]) if flags.json else print(what)
        return
    starts = read_record(run)["starts"]
    start = len(starts) - 1 if flags.start is None else flags.start
    if not 0 <= start < len(starts):
        raise UsageError(f"start={start} is not one of {run}, which has had {counted(len(starts), 'start')}, from 0 on")
    ends = read_ends(run, start)
    if flags.json:
        print_json([dataclasses.asdict(end) for end in ends])
        return
    for number, end in enumerate(ends):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.time))
        order = "then" if number else "first"
        print(f"{order}: rank {end.rank} on {end.host} at step {end.step}, {at}: {end.cause}\n{end.words.rstrip()}\n")
    nodes = list(dict.fromkeys(end.node for end in ends))
    named = [log_file(run, start, node) for node in nodes]
    logs = [*named, *sorted(set((run / "logs").glob(f"node-*-start-{start:03d}.log")) - set(named))]
    if start == len(starts) - 1:  # tasks whose ranks have not met do not know their start's number
        logs += [log for log in sorted((run / "logs").glob("node-*-job-*.log")) if _utc(log.stat().st_mtime) >= starts[start]["time"]]
    for log in logs:
        if log.is_file():
            print(f"-- {log} --")
            with open(log, errors="replace") as file:
                for line in file if flags.tail is None else deque(file, flags.tail):
                    print(line, end="")


def _utc(seconds: float) -> str:
    """A moment as run.json has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# -- which --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WhichFlags:
    """Tells which samples a step of a run saw, or which steps saw a sample.

    Nothing is recorded for it while a run trains: it follows from the order. The datasets must be there; no image is read."""

    run: Run
    step: int | None = None
    """The step, from 1; metrics.jsonl and `run status` count them so."""
    rank: int | None = None
    """Only what this rank saw."""
    sample: Annotated[str | None, tyro.conf.arg(metavar="KEY", help="The key of a sample: tells all steps so far that saw it.")] = None
    data: tuple[str, ...] = ()
    """Where the run's datasets lie now, if not where they lay."""
    json: Json = False


def run_which(words: list[str]) -> None:
    """Which samples a step saw, or which steps saw a sample."""
    flags = parse(WhichFlags, words, "run which")
    if (flags.step is None) == (flags.sample is None) or (flags.rank is not None and flags.step is None):
        raise UsageError("`vitscale run which RUN` needs --step N (with --rank R for one rank's) or --sample KEY, one of the two")
    from vitscale.which import which_sample, which_step

    if flags.sample is not None:
        with progress_bar("looking for the key", quiet=flags.json, unit="keys") as update:
            found = which_sample(Path(flags.run), flags.sample, flags.data, update)
        if flags.json:
            print_json(dataclasses.asdict(found))
            return
        for named in found.samples:
            print(f"{flags.sample}: sample {named.sample}, in {named.shard} of {named.dataset}")
        for line in found.seen:
            print(f"step {line['step']}, position {line['position']}{', in place of another' if line['stood_in'] else ''}")
        trained_on = f"; checkpoints that were trained on it: {', '.join(found.checkpoints)}" if found.checkpoints else ""
        print(f"seen {counted(len(found.seen), 'time')} in {counted(found.steps_made, 'step')}{trained_on}")
        return
    assert flags.step is not None
    step = which_step(Path(flags.run), flags.step, flags.rank, flags.data)
    if flags.json:
        print_json(dataclasses.asdict(step))
        return
    for seen in step.samples:
        instead = "".join(f", instead of {other.key} ({other.reason})" for other in seen.instead_of)
        print(f"position {seen.position}, rank {seen.rank}: sample {seen.sample}, {seen.key} in {seen.shard} of {seen.dataset}{instead}")
    of = f"rank {flags.rank} of {step.world_size}" if flags.rank is not None else counted(step.world_size, "rank")
    state = "; it is skipped" if step.skipped else "" if step.made else "; it is still to be made"
    print(f"step {step.step} of {step.run}, {of}: {counted(len(step.samples), 'sample')}{state}")


RUN_VERBS: dict[str, Verb] = {
    "run ls": run_ls,
    "run status": run_status,
    "run logs": run_logs,
    "run stop": run_stop,
    "run fork": run_fork,
    "run which": run_which,
}
