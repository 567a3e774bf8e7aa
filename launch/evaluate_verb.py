"""`vitscale evaluate`: what a checkpoint is worth on a dataset, once or for each checkpoint of a run as it comes.

Where it stands: the measuring is `vitscale.evaluate`'s, in this process or in several ranks of this machine (`local.run_ranks`), each of
which runs this module as a program. A report is the same mapping everywhere: what `--json` prints, `--out` holds, and a line of
RUN/evaluations.jsonl says.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, cast

import tyro

from data_tools.config import MAYBE_BYTES
from launch.flags import Checkpoint, Processes, UsageError, Weights, parse
from launch.terminal import Json, need, print_json, progress_bar
from vitscale.config import EvalProtocol

_LONGEST = 3600.0  # seconds between two looks for a checkpoint


@dataclass(frozen=True)
class EvaluateFlags:
    """Evaluates in fp32, every sample once, on one device or on several of this machine.

    What each measure is: docs/evaluation.md."""

    checkpoint: Checkpoint
    data: str
    """Dataset directory or URL of the split to evaluate on."""
    protocol: Literal["head", "fewshot", "linear", "knn"] = "head"
    """What is evaluated: the checkpoint's own head, or one that is made of its features for --train-data."""
    train_data: str = ""
    """Dataset whose samples such a head learns from; empty: the sibling `train` of --data."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Of --protocol fewshot: training samples of each class."""
    seeds: int = 3
    """Of --protocol fewshot: draws of them."""
    solver: Literal["ridge", "lbfgs", "sgd"] = "lbfgs"
    """Of --protocol linear (docs/evaluation.md, "Probes")."""
    real: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Reassessed labels to be evaluated against, too: ImageNet's real.json, or an object of key to labels."""
    average_precision: bool = False
    """Mean average precision over the classes. Keeps all scores in memory: 4 bytes for each sample and class."""
    bootstrap: int = 0
    """Resamples of the samples for its interval; 0: none. 1000 are usual."""
    seed: int = 0
    """Of the resamples."""
    per_class: bool = False
    """A row a class: samples, accuracy, what it is most confused with."""
    confusions: int = 0
    """So many of the most frequent pairs of a class and another that it is taken for."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write everything there as JSON: all classes, all confusions."""
    watch: bool = False
    """Evaluate each checkpoint of the run CHECKPOINT as it comes, until the run is finished; results go to RUN/evaluations.jsonl."""
    interval: float = 30.0
    """Of --watch: seconds between two looks for a new checkpoint."""
    weights: Weights = "average"
    batch_size: int = 64
    """Of each process."""
    workers: int = 0
    """Workers of each process that decode; 0 takes the cores there are, at most 8."""
    nproc: Processes = 0
    stage: str = ""
    """As of `pretrain`."""
    cache: str = ""
    """As of `pretrain`."""
    cache_bytes: Annotated[int | None, MAYBE_BYTES] = None
    """As of `pretrain`."""
    eval_protocol: EvalProtocol | None = None
    """Another evaluation preprocessing than the run's (docs/stream.md, "Evaluation")."""
    json: Json = False


def evaluate(words: list[str]) -> None:
    """Accuracy of a checkpoint on a dataset, or of each checkpoint of a live run."""
    from launch.local import visible_gpus

    flags = evaluate_flags(words)
    gpus = visible_gpus()
    if gpus and flags.nproc > gpus:
        raise UsageError(f"nproc={flags.nproc} must be at most {gpus}, the visible GPUs; 0 starts one a GPU")
    flags = dataclasses.replace(flags, nproc=flags.nproc or max(1, gpus))
    if flags.watch:
        watch(flags)
        return
    folder = check_inputs(flags)
    if flags.out and (not Path(flags.out).parent.is_dir() or Path(flags.out).is_dir()):
        raise UsageError(f"out={flags.out} is to be a file in a folder that is there")
    need("torch", "safetensors")
    report = measure(flags, folder)
    if flags.out:
        from data_tools.durable import replace_file

        replace_file(Path(flags.out), json.dumps(report, indent=1, default=str) + "\n")
    if flags.json:
        print_json(asked_of(report, flags))
    else:
        print("\n".join(report_lines(report, flags)))


def evaluate_flags(words: list[str]) -> EvaluateFlags:
    """What `vitscale evaluate` is told. Raises UsageError on what no checkpoint or dataset would make good."""
    flags = parse(EvaluateFlags, words, "evaluate")
    if flags.batch_size < 1 or flags.workers < 0:
        raise UsageError(f"batch-size={flags.batch_size} must be at least 1 and workers={flags.workers} at least 0")
    for name in ("nproc", "bootstrap", "confusions", "seed"):
        if getattr(flags, name) < 0:
            raise UsageError(f"{name}={getattr(flags, name)} must be at least 0")
    if not 0 < flags.interval <= _LONGEST:
        raise UsageError(f"interval={flags.interval:g} must be above 0 and at most {_LONGEST:g} seconds")
    if flags.bootstrap and not flags.average_precision:
        raise UsageError(f"bootstrap={flags.bootstrap} is for the interval of --average-precision; give both")
    of_head = [name for name in ("real", "average_precision", "per_class", "confusions") if getattr(flags, name)]
    if flags.protocol != "head" and of_head:
        raise UsageError(f"--{of_head[0].replace('_', '-')} is of --protocol head; --protocol {flags.protocol} tells accuracies alone")
    if flags.watch and (flags.out or flags.per_class or flags.confusions):
        raise UsageError("--watch writes a line a checkpoint; leave out --out, --per-class and --confusions")
    return flags


def check_inputs(flags: EvaluateFlags) -> Path:
    """Looks at what is to be read, before anything long begins or a job is submitted. The checkpoint's folder; a run's for --watch."""
    from vitscale.checkpoint import describe
    from vitscale.finding import find_checkpoint
    from vitscale.run import read_record

    folder = Path(flags.checkpoint)
    if not flags.watch:
        folder = find_checkpoint(flags.checkpoint)
        describe(folder).evaluated_by(flags.eval_protocol)
    elif not (folder / "submissions").is_dir():  # of one that is submitted the first start may still be to come
        read_record(folder)
    dataset = _open(flags, flags.data)
    if flags.protocol != "head":
        _open(flags, _train_data(flags))
    if flags.real:
        from vitscale.reassessed import read_real_labels

        read_real_labels(Path(flags.real), dataset)
    return folder


# -- One checkpoint -----------------------------------------------------------------------------------------------------------------------


def measure(flags: EvaluateFlags, folder: Path) -> dict[str, Any]:
    """The report on a checkpoint, made by `flags.nproc` processes."""
    if flags.nproc == 1:
        return report_on(flags, folder, quiet=flags.json)
    from launch.local import run_ranks

    with tempfile.TemporaryDirectory(prefix="vitscale-evaluate-") as scratch:
        task = Path(scratch) / "task.json"
        task.write_text(json.dumps({"flags": dataclasses.asdict(flags), "checkpoint": str(folder)}))
        run_ranks([sys.executable, "-m", "launch.evaluate_verb", scratch], flags.nproc, Path(scratch))
        report: dict[str, Any] = json.loads((Path(scratch) / "report.json").read_bytes())
        return report


def report_on(flags: EvaluateFlags, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """What is found of a checkpoint; all ranks of the process group call it, and each gets the same."""
    from vitscale.checkpoint import describe
    from vitscale.evaluate import evaluate_checkpoint

    description = describe(folder).evaluated_by(flags.eval_protocol)
    dataset = _open(flags, flags.data)
    about = {
        "checkpoint": str(description.path),
        "data": flags.data,
        "dataset": dataset.content_hash,
        "dataset_name": dataset.name,
        "overlays": dataset.overlay.names,
        "eval_protocol": description.preprocess.eval_protocol,
        "protocol": flags.protocol,
        "weights": description.preferred(flags.weights),
        "step": description.step,
        "samples_seen": description.samples_seen,
    }
    if flags.protocol != "head":
        return about | report_of_probe(flags, description, dataset, quiet=quiet)
    real_NL = None
    if flags.real:
        from vitscale.reassessed import read_real_labels

        real_NL = read_real_labels(Path(flags.real), dataset)
    found = evaluate_checkpoint(
        description, flags.weights, dataset, batch_size=flags.batch_size, workers=flags.workers,
        progress=lambda title, unit: progress_bar(title, quiet, unit), real_NL=real_NL, precision=flags.average_precision,
        resamples=flags.bootstrap, seed=flags.seed,
    )  # fmt: skip
    return about | dataclasses.asdict(found)


def report_of_probe(flags: EvaluateFlags, description: Any, dataset: Any, *, quiet: bool) -> dict[str, Any]:
    """What `vitscale.probing` finds of the features, and the lines that say it; the one place where it is called."""
    from vitscale.probing import lines, probe

    found = probe(
        description, flags.weights, cast(Any, flags.protocol), _open(flags, _train_data(flags)), dataset, batch_size=flags.batch_size,
        workers=flags.workers, progress=lambda title, unit: progress_bar(title, quiet, unit), shots=flags.shots, seeds=flags.seeds,
        solver=flags.solver,
    )  # fmt: skip
    return dataclasses.asdict(found) | {"lines": lines(found)}


def _open(flags: EvaluateFlags, path: str) -> Any:
    """A dataset, checked."""
    from data_tools.dataset import Dataset
    from vitscale.resolve import cache_at, stage_at

    return Dataset.open_checked(path, stage=stage_at(flags.stage), cache=cache_at(flags.cache, flags.cache_bytes))


def _train_data(flags: EvaluateFlags) -> str:
    return flags.train_data or f"{flags.data.rstrip('/').rpartition('/')[0] or '.'}/train"


def main() -> NoReturn:
    """One of several ranks: `python -m launch.evaluate_verb FOLDER`. Rank 0 leaves its report in the folder, one that fails its end."""
    from data_tools.durable import replace_file
    from data_tools.processes import die_with
    from vitscale.ending import EXIT_FAILED, EXIT_FINISHED, end_of_this_rank, write_end
    from vitscale.rank import leave

    die_with(int(os.environ["VITSCALE_LAUNCHER_PID"]))
    folder, leads = Path(sys.argv[1]), os.environ["RANK"] == "0"
    try:
        from vitscale.evaluate import meet

        task = json.loads((folder / "task.json").read_bytes())
        flags = EvaluateFlags(**task["flags"] | {"shots": tuple(task["flags"]["shots"])})
        meet()
        report = report_on(flags, Path(task["checkpoint"]), quiet=flags.json or not leads)
        if leads:
            replace_file(folder / "report.json", json.dumps(report, default=str))
    except BaseException as error:
        write_end(folder, end_of_this_rank(error, start=0, step=0, stood_still=0.0))
        leave(EXIT_FAILED)
    leave(EXIT_FINISHED)


# -- Each checkpoint of a run -------------------------------------------------------------------------------------------------------------


def watch(flags: EvaluateFlags) -> None:
    """Evaluates each durable checkpoint of a run as it comes, oldest first, none twice, until the run is finished or a signal says stop.

    A stop leaves nothing half written, and the same command goes on. A checkpoint that the run removes meanwhile, and one that is damaged,
    are told of and left out.
    """
    from vitscale.ending import EXIT_STOPPED
    from vitscale.metrics import open_board
    from vitscale.run import read_evaluations
    from vitscale.watch import follow, note, recording

    run = check_inputs(flags)
    need("torch", "safetensors")
    dataset = _open(flags, flags.data)
    same = {"dataset": dataset.content_hash, "overlays": list(dataset.overlay.names), "asked": _asked(flags)}
    terminated: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        with recording(run) as file:
            done = {line["commit"] for line in read_evaluations(run) if same.items() <= line.items()}
            board = open_board(run / "tensorboard" / f"evaluate-{dataset.content_hash[:12]}")
            for folder, commit in follow(run, done, flags.interval):
                done.add(commit)
                report = measure_of_run(flags, folder)
                if isinstance(report, str):
                    print(f"warning: {report}; going on", file=sys.stderr, flush=True)
                    continue
                line = {"time": time.time(), "commit": commit} | asked_of(report, flags) | same
                note(file, line)
                if board is not None:
                    for name in _CURVES:
                        if line.get(name) is not None:
                            board.add_scalar(f"eval_{name}", line[name], line["step"])
                    board.flush()
                print(json.dumps(line) if flags.json else f"step {line['step']}: {', '.join(headline(report))}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what {run} has written since", file=sys.stderr)
        sys.exit(EXIT_STOPPED if terminated else 130)
    if not flags.json:
        print(f"{run} is finished, and all its checkpoints are evaluated")


def measure_of_run(flags: EvaluateFlags, folder: Path) -> dict[str, Any] | str:
    """The report on a checkpoint of a live run, or why there is none: it is damaged, or the run removed it meanwhile."""
    from data_tools.errors import UserError
    from vitscale.checkpoint import verify

    problem: dict[str, Any] | str | None = None
    try:
        problem = verify(folder) or measure(flags, folder)
    except (UserError, OSError):
        if (folder / "COMMIT.json").is_file():
            raise
    there = (folder / "COMMIT.json").is_file() or isinstance(problem, dict)
    return problem if problem and there else f"{folder} was removed before it was evaluated"


_CURVES = ("top1", "top5", "loss", "calibration_error", "real_top1", "mean_average_precision")  # named as those that the run draws itself


def _asked(flags: EvaluateFlags) -> dict[str, Any]:
    """What was asked for, as far as it changes what is found: another question is another evaluation of the same checkpoint."""
    usual = vars(EvaluateFlags("", ""))
    named = (
        "protocol", "train_data", "shots", "seeds", "solver", "weights", "eval_protocol", "real", "average_precision", "bootstrap", "seed",
    )  # fmt: skip
    asked = {name: getattr(flags, name) for name in named if getattr(flags, name) != usual[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}  # as a line of JSON has it


# -- For people ---------------------------------------------------------------------------------------------------------------------------


def asked_of(report: Mapping[str, Any], flags: EvaluateFlags) -> dict[str, Any]:
    """The report without those tables that were not asked for, and without its lines for people."""
    kept = {name: value for name, value in report.items() if name != "lines"}
    if "classes" in kept and not flags.per_class:
        del kept["classes"]
    if "confusions" in kept:
        kept["confusions"] = kept["confusions"][: flags.confusions]
        if not flags.confusions:
            del kept["confusions"]
    return kept


def headline(report: Mapping[str, Any]) -> list[str]:
    """What a report says in a line."""
    if "lines" in report:
        return list(report["lines"][1:])
    words = [f"top-1 {report['top1']:.2%}", f"top-5 {report['top5']:.2%}", f"loss {report['loss']:.4f}"]
    if report.get("real_top1") is not None:
        words.append(f"ReaL top-1 {report['real_top1']:.2%}")
    if report.get("mean_average_precision") is not None:
        words.append(f"mean average precision {report['mean_average_precision']:.2%}")
    return words


def report_lines(report: Mapping[str, Any], flags: EvaluateFlags) -> list[str]:
    """What is printed of a report."""
    if "lines" in report:
        by = f"{report['checkpoint']} by {report['protocol']} on {report['data']}, the {report['eval_protocol']} protocol:"
        return [by, *report["lines"]]
    skipped = f" ({report['skipped']:,} more could not be read)" if report["skipped"] else ""
    skipped += f" (its overlays remove {report['removed']:,})" if report["removed"] else ""
    of = f"{report['checkpoint']} on {report['samples']:,} samples of {report['data']}{skipped}"
    lines = [
        f"{of}, by the {report['eval_protocol']} protocol:",
        f"top-1 {report['top1']:.2%}, top-5 {report['top5']:.2%}, loss {report['loss']:.4f}",
        f"95% of another such draw of samples: top-1 {_span(report['top1_interval'])}, top-5 {_span(report['top5_interval'])}",
        f"calibration error {report['calibration_error']:.2%}",
    ]
    if report["real_top1"] is not None:
        lines.append(f"ReaL top-1 {report['real_top1']:.2%} ({_span(report['real_interval'])}) of {report['real_samples']:,} samples")
    if report["mean_average_precision"] is not None:
        interval = report["mean_average_precision_interval"]
        within = f" ({_span(interval)} of {flags.bootstrap:,} resamples)" if interval else ""
        lines.append(
            f"mean average precision {report['mean_average_precision']:.2%}{within} over {report['classes_with_samples']:,} classes"
        )
    if flags.per_class:
        rows = [("class", "samples", "right", "accuracy", "precision", "most confused with")]
        for of_class in report["classes"]:
            worst = f"{of_class['confused_with']} ({of_class['confused']:,})" if of_class["confused"] else ""
            shares = [f"{share:.2%}" if share is not None else "" for share in (of_class["accuracy"], of_class["average_precision"])]
            rows.append((of_class["name"], f"{of_class['samples']:,}", f"{of_class['right']:,}", *shares, worst))
        lines += ["", *_columns(rows)]
    if flags.confusions:
        pairs = [(of["name"], of["guess_name"], f"{of['samples']:,}") for of in report["confusions"][: flags.confusions]]
        lines += ["", *_columns([("class", "taken for", "samples"), *pairs])]
    return lines


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2%} to {interval[1]:.2%}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    main()
