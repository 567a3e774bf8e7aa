"""The run directory: how a run is begun or taken up, and what is written down of it (`status.py` tells how it is).

    RUN/config.json      the resolved config, enough to repeat the run
    RUN/run.json         versions, commit, dataset hashes, one entry for each start
    RUN/metrics.jsonl    a line a logged step, and a line an evaluation
    RUN/evaluations.jsonl a line a checkpoint that another job evaluated (`watch.py`)
    RUN/stop             there while a person asks the run to stop

Imports no torch: it works on login nodes.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from data_tools.dataset import read_header
from data_tools.durable import replace_file
from data_tools.errors import UserError
from data_tools.overlay import overlay_names
from data_tools.storage import location
from vitscale import checkpoint
from vitscale.config import (
    ConfigError,
    TrainConfig,
    changes,
    from_dict,
    may_change,
    to_dict,
)
from vitscale.goodput import steps_lost
from vitscale.metrics import counted
from vitscale.quarantine import parse_lines
from vitscale.timeline import timeline_of
from vitscale.unindexed import named_tars

FORMAT_VERSION = 1
_MEASURED = ("loss", "eval_loss", "eval_top1", "time", "samples_seen", "images_per_second", "save_seconds")
LOCK_SECONDS = 60.0  # for which a start that SLURM is still ending may hold a run's lock


class RunError(UserError):
    """A run directory that cannot be used as asked; the message is one line for the user."""


def is_of_tars(record: dict[str, Any]) -> bool:
    """Whether run.json is of a run on tars without an index."""
    return "tars" in (of.get("kind") for of in trained_datasets(record))


def open_run(config: TrainConfig, world_size: int) -> bool:
    """Fills the run directory of a resolved config, or takes up the run that is there; call it within `locked`. True if it has finished.

    Raises RunError where the directory holds something else; it is left as it was.
    """
    run = Path(config.out)
    record, changed = check_start(config)
    if is_finished(run, config.eval_data):
        return True
    record["starts"].append(
        {
            "overlays": _overlays(run, record, config),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "world_size": world_size,
            "changed": changed,
            "commit": git_commit(),
            "versions": _versions(),
        }
    )
    write_json(run / "config.json", to_dict(config))
    write_json(run / "run.json", record)  # last: its presence is what makes a directory a run
    return False


def check_start(config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What run.json is to hold before it tells of a start with a resolved config, and which settings are others than before.

    Writes nothing. Raises RunError where the directory holds a run that cannot go on so.
    """
    run = Path(config.out)
    trained_on, held_out = identities(config)
    changed: dict[str, str] = {}
    if (run / "run.json").is_file():
        record = _read_json(run / "run.json")
        if record["format_version"] != FORMAT_VERSION:
            raise RunError(f"{run}/run.json has format version {record['format_version']}; this vitscale reads {FORMAT_VERSION}")
        started = read_config(run)
        if started.recipe != config.recipe:
            raise RunError(f"{run} holds a run of {started.recipe}, not of {config.recipe}; give another --out")
        check_same_data(run, record, trained_on, held_out)
        record["held_out"] = record["held_out"] or (held_out[0] if held_out else None)
        if not has_begun(run):
            record["total_steps"] = timeline_of(config, samples_of(trained_on)).total_steps
        changed = changes(started, config) if has_begun(run) else {}
        if refused := [f"{name}: {change}" for name, change in changed.items() if not may_change(name)]:
            raise RunError(f"{run} holds a run with other settings: {', '.join(refused)}; give its own to resume it, or another --out")
    else:
        record = {
            "format_version": FORMAT_VERSION,
            "dataset": trained_on[0] if len(trained_on) == 1 else trained_on,
            "held_out": held_out[0] if held_out else None,
            "total_steps": timeline_of(config, samples_of(trained_on)).total_steps,
            "starts": [],
        }
    return record, changed


def check_same_data(run: Path, record: dict[str, Any], trained_on: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """Raises RunError unless these `identities` are those of a run's datasets, wherever they lie."""
    for flag, before, now in (("data", trained_datasets(record), trained_on), ("eval-data", _several(record["held_out"]), held_out)):
        if before and now:
            _check_same(run, flag, before, now)


def samples_of(trained_on: list[dict[str, Any]]) -> int:
    """Samples of datasets of these identities; none of tars without an index, which tell of none."""
    return sum(dataset.get("samples", 0) for dataset in trained_on)


def identities(config: TrainConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a run remembers of what it trains on, and of what is held out."""
    tars = named_tars(config.datasets)
    trained_on = [tars.identity()] if tars else [_identity(path) for path in config.datasets]
    return trained_on, [] if config.eval_data == "none" else [_identity(config.eval_data)]


def _identity(path: str) -> dict[str, Any]:
    """What a run remembers of a dataset; `resolve` has checked its files."""
    header = read_header(location(path))
    return {"path": path, "name": header["name"], "hash": header["content_hash"], "samples": header["num_samples"]}


def _check_same(run: Path, flag: str, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Raises RunError unless the datasets are those of the run, in its order, which is part of what they are mixed by."""
    if len(before) != len(now):
        paths = " ".join(of["path"] for of in before)
        raise RunError(f"{run} was begun with {len(before)} datasets, --{flag} {paths}, and is now given {len(now)}; give the same")
    for was, is_now in zip(before, now, strict=True):
        if was["hash"] != is_now["hash"]:
            told, told_now = (f"{of['name']} ({_extent(of)}, hash {of['hash'][:12]})" for of in (was, is_now))
            order = ", in the same order" if len(now) > 1 else ""
            raise RunError(
                f"{run} was begun with --{flag} {was['path']}, {told}; {is_now['path']} is {told_now}; give the same dataset{order}"
            )


def _extent(of: dict[str, Any]) -> str:
    return f"{of['samples']:,} samples" if "samples" in of else f"{of['shards']:,} tars without an index, {of['bytes']:,} bytes"


def trained_datasets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The datasets of run.json that a run trains on: path, name, hash and samples of each, in their order."""
    return _several(record["dataset"])


def _several(of: dict[str, Any] | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return of if isinstance(of, list) else [of] if of else []


def _overlays(run: Path, record: dict[str, Any], config: TrainConfig) -> dict[str, list[str]]:
    """The overlays that a start uses, of each dataset: all that are there. Raises RunError where one that was used before is not."""
    paths = dict(zip(overlay_fields(len(config.datasets)), config.datasets, strict=True)) | {"eval_data": config.eval_data}
    without = {"none"} | (set(config.datasets) if is_of_tars(record) else set())
    used = {name: [] if path in without else list(overlay_names(location(path))) for name, path in paths.items()}
    before = record["starts"][-1].get("overlays", {}) if record["starts"] else {}  # which runs of before had not
    for name, now in used.items():
        path = paths[name]
        if path not in without and (gone := [overlay for overlay in before.get(name, []) if overlay not in now]):
            raise RunError(f"{run} used the overlay {gone[0]}, which is no more in {path}; put it back (a later one can undo what it says)")
    return used


def note_begin(run: Path, step: int) -> None:
    """Writes down at which step the newest start took the run up, so that it can be told later which start made a step."""
    record = _read_json(run / "run.json")
    record["starts"][-1]["step"] = step
    write_json(run / "run.json", record)


def note_initial(run: Path, origin: dict[str, Any]) -> None:
    """Writes down where the weights come from that the run begins with (`origin.py`): what they came from may be gone when it ends."""
    record = _read_json(run / "run.json")
    write_json(run / "run.json", record | {"initial": origin})


def note_skipped(run: Path, positions: tuple[int, int], cause: str, words: str) -> None:
    """Writes down a range of positions, half open, that the run leaves out from now on."""
    record = _read_json(run / "run.json")
    record.setdefault("skipped", []).append({"positions": list(positions), "cause": cause, "words": words, "time": time.time()})
    write_json(run / "run.json", record)


def skipped_ranges(record: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The ranges of positions, half open, that a run leaves out, in the order of their rollbacks."""
    return tuple((of["positions"][0], of["positions"][1]) for of in record.get("skipped", []))


def start_of_step(record: dict[str, Any], step: int) -> dict[str, Any]:
    """The start, of those in run.json, that made a step or will: the newest that took the run up before it. Raises RunError."""
    for start in reversed([*record.get("origin", {}).get("starts", []), *record["starts"]]):
        if start.get("step", step) < step:  # one that has no step came to an end before it began
            return start  # type: ignore[no-any-return]
    raise RunError(f"run.json does not tell which start made step {step}: no start came so far, or a version of before did not note it")


def newest_start(run: Path) -> int:
    """The number of a run's newest start, from 0; -1 where it has none."""
    return len(read_record(run)["starts"]) - 1


def log_file(run: Path, start: int, node: int = 0) -> Path:
    """Where a node's processes write what they print."""
    return run / "logs" / f"node-{node:04d}-start-{start:03d}.log"


def read_record(run: Path) -> dict[str, Any]:
    """What run.json says. Raises RunError."""
    return _read_json(run / "run.json")


def has_begun(run: Path) -> bool:
    """Whether a run has made a step; one that failed before its first may still become another."""
    return bool(read_metrics(run) or checkpoint.committed(run))


def begun_config(run: Path) -> TrainConfig | None:
    """The config of a run that has begun; None where there is none, or one that may still become another."""
    return read_config(run) if (run / "run.json").is_file() and has_begun(run) else None


def reached(run: Path) -> int:
    """The newest step that metrics.jsonl or a checkpoint tells of."""
    logged: list[int] = [line["step"] for line in read_metrics(run) if "loss" in line]
    return max([0, *logged, *map(checkpoint.step_of, checkpoint.committed(run))])


def overlay_fields(datasets: int) -> list[str]:
    """What run.json calls the overlays of each of the datasets that a run trains on."""
    return ["data", *(f"data.{number}" for number in range(1, datasets))]


def used_overlays(run: Path) -> dict[str, tuple[str, ...]]:
    """The overlays that the newest start of a run uses: of its `data` (of several datasets also `data.1` and on) and `eval_data`."""
    return {name: tuple(names) for name, names in _read_json(run / "run.json")["starts"][-1]["overlays"].items()}


def read_config(run: Path) -> TrainConfig:
    """The config that a run was started with. Raises RunError."""
    try:
        config: TrainConfig = from_dict(TrainConfig, _read_json(run / "config.json"))
        return config
    except ConfigError as error:
        raise RunError(f"{run}/config.json cannot be read ({error})") from None


@contextmanager
def locked(run: Path, seconds: float = 1.0) -> Iterator[TextIO]:
    """Makes a run's directory and holds it against a second start, as long as any process has the file open.

    Waits `seconds` for who has it: `run status` holds it for an instant. Raises RunError if another process or something else has it.
    """
    check_directory(run)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "run.lock", "a") as file:
        end = time.monotonic() + seconds
        while not try_lock(file):
            if time.monotonic() > end:
                raise RunError(f"{run} is being trained by another process; `vitscale run status {run}` shows how far it is")
            time.sleep(0.1)
        yield file


def check_directory(run: Path) -> None:
    """Raises RunError where a run's directory is something else."""
    foreign = run.exists() and not (run / "run.json").is_file()
    # What a start that was killed leaves, and what is there before the first start of a run that was submitted, or is swept for
    ours = {"run.lock", "config.json", ".config.json.partial", ".run.json.partial", "submissions", "logs", "stop", "sweep"}
    if foreign and (not run.is_dir() or {entry.name for entry in run.iterdir()} - ours):
        raise RunError(f"{run} exists and is not a run; give another --out")


def is_finished(run: Path, eval_data: str | None = None) -> bool:
    """Whether the checkpoint of a run's last step is there, whole, and was evaluated if anything is held out (None: as the run has it)."""
    if not (run / "run.json").is_file():
        return False
    last_step = _read_json(run / "run.json")["total_steps"]
    folder = checkpoint.step_folder(run, last_step)
    if not folder.is_dir() or checkpoint.verify(folder) is not None:
        return False
    return (eval_data or read_config(run).eval_data) == "none" or was_evaluated(run, last_step)


def was_evaluated(run: Path, step: int) -> bool:
    """Whether metrics.jsonl holds an evaluation of a step."""
    return any(line["step"] == step for line in read_metrics(run) if "eval_loss" in line)


def is_locked(run: Path) -> bool:
    """Whether a process on this machine, or wherever the file system tells of locks, trains the run."""
    if not (run / "run.lock").is_file():
        return False
    with open(run / "run.lock") as file:
        return not try_lock(file, shared=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, whose numbers that others go by are numbers."""
    lines = read_json_lines(run / "metrics.jsonl")
    for line in lines:
        told = [line[name] for name in _MEASURED if name in line]
        if not isinstance(line.get("step"), int) or not all(isinstance(value, int | float) for value in told):
            raise RunError(f"{run}/metrics.jsonl has a line that tells of no step as a run writes it, {line!r:.100}; take it out to go on")
    return lines


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl, oldest first. Raises RunError."""
    lines = read_json_lines(run / "evaluations.jsonl")
    for line in lines:
        if not (isinstance(line.get("step"), int) and isinstance(line.get("commit"), str)):
            raise RunError(f"{run}/evaluations.jsonl has a line that names no checkpoint, {line!r:.100}; take it out to go on")
    return lines


def read_quarantine(run: Path) -> list[dict[str, Any]]:
    """The lines of quarantine.jsonl: samples that could not be used, and where."""
    return _whole_lines(run / "quarantine.jsonl")


def unusable(run: Path) -> Counter[str]:
    """How many distinct samples could not be used, by reason."""
    return Counter({line["sample"]: line["reason"] for line in read_quarantine(run)}.values())


def unusable_line(run: Path) -> str:
    """The same for people; empty where all could be used."""
    if not (reasons := unusable(run)):
        return ""
    (most, times), *others = reasons.most_common()
    why = f"{times:,} for: {most}" + (f", and {counted(len(others), 'other reason')}" if others else "")
    return f"warning: others came in the place of {counted(reasons.total(), 'unusable sample')}; {why}; {run}/quarantine.jsonl names them"


def cut_back(run: Path, step: int, samples_seen: int) -> None:
    """Takes from metrics.jsonl, quarantine.jsonl and left-out.jsonl what a start wrote whose checkpoint never came to be.

    What that was run.json notes.
    """
    if lost := steps_lost(step, read_metrics(run)):
        record = _read_json(run / "run.json")
        if record["starts"]:
            record["starts"][-1]["lost"] = lost
            write_json(run / "run.json", record)
    for name, lines in records_until(run, step, samples_seen).items():
        replace_file(run / name, lines)


def records_until(run: Path, step: int, samples_seen: int) -> dict[str, str]:
    """What those files of a run that have lines said when it was at a step, by their names; without those that are not there."""
    kept = {
        "metrics.jsonl": [line for line in read_metrics(run) if line["step"] <= step],
        "quarantine.jsonl": [line for line in read_quarantine(run) if line["position"] < samples_seen],
        "left-out.jsonl": [line for line in _whole_lines(run / "left-out.jsonl") if line["position"] < samples_seen],
    }
    return {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in kept.items() if (run / name).is_file()}


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Of a file that ranks of several machines add to, those lines that did not get in each other's way."""
    return parse_lines(file.read_bytes()) if file.is_file() else []


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last one that a kill cut short is left out."""
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
    try:
        values = [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} has a damaged line ({error}); take it out to go on") from None
    for value in values:
        if not isinstance(value, dict):
            raise RunError(f"{file} has a line that is no object, {value!r:.50}; take it out to go on")
    return values


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        if not isinstance(values, dict) or (file.name == "run.json" and not _is_record(values)):
            raise ValueError("it does not hold what it should")
        return values
    except FileNotFoundError:
        if not file.parent.exists():
            raise RunError(f"{file.parent} does not exist; a run is what `vitscale pretrain --out RUN` makes") from None
        raise RunError(f"{file.parent} is not a run: it has no {file.name}; a run is what `vitscale pretrain --out RUN` makes") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); restore it") from None


def _is_record(values: dict[str, Any]) -> bool:
    """Whether what run.json holds is of the kind that a run writes, as far as others go by it."""
    starts, origin, skipped = values.get("starts"), values.get("origin", {}), values.get("skipped", [])
    before = origin.get("starts", []) if isinstance(origin, dict) else None
    trained, held_out = values.get("dataset"), values.get("held_out")
    return (
        isinstance(values.get("total_steps"), int)
        and isinstance(starts, list)
        and isinstance(before, list)
        and all(map(_is_start, [*before, *starts]))
        and isinstance(values.get("initial", {}), dict)
        and isinstance(skipped, list)
        and all(isinstance(of, dict) and _is_range(of.get("positions")) for of in skipped)
        and (isinstance(trained, dict) or (isinstance(trained, list) and all(isinstance(of, dict) for of in trained)))
        and (isinstance(held_out, dict | None) or (isinstance(held_out, list) and all(isinstance(of, dict) for of in held_out)))
    )


def _is_start(start: Any) -> bool:
    kinds = {"step": int, "time": str, "world_size": int, "job": str, "overlays": dict, "lost": dict}
    told = isinstance(start, dict) and all(isinstance(start[name], kind) for name, kind in kinds.items() if name in start)
    return told and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", start.get("time", "")) is not None


def _is_range(of: Any) -> bool:
    return isinstance(of, list) and len(of) == 2 and all(isinstance(position, int) for position in of)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replaces a file in one step."""
    replace_file(path, json.dumps(values, indent=1) + "\n")


def try_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Whether an open file could be locked, until it is closed; False where another process has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def git_commit() -> str | None:
    """The commit of the code that runs, with a mark where it was edited; None outside a checkout."""
    here = Path(__file__).parent
    if (snapshot := here.parent / "COMMIT").is_file():  # of a submission, which may lie in a checkout of something else
        return snapshot.read_text().strip() or None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("vitscale", "torch", "deepspeed", "numpy", "pyarrow", "pillow", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
