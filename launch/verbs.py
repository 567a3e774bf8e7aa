"""The verbs of the `vitscale` command: the flags of each, what it calls, and what it prints.

What a verb needs is imported when it runs, so that `vitscale --help` answers at once and verbs that do not train work without torch.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from data_tools.config import MAYBE_BYTES
from launch.data_verbs import DATA_VERBS
from launch.flags import UsageError, given, parse, take_recipe
from launch.local import run_ranks, visible_gpus
from launch.terminal import Json, Verb, need, print_json, progress_bar
from vitscale.config import EvalProtocol, FinetuneConfig, TrainConfig, settle_length
from vitscale.recipes import FINETUNE, PRETRAIN, Recipe, recipe, recipe_name

CHECKPOINT = "A run (its newest durable checkpoint), RUN@STEP, a step's folder or an exported folder."
Checkpoint = Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT", help=CHECKPOINT)]
Weights = Annotated[Literal["average", "weight"], tyro.conf.arg(help="The average of the weights where there is one, or the raw weights.")]
Processes = Annotated[int, tyro.conf.arg(help="Processes; 0 starts one a GPU, or one on a machine without.")]


# -- pretrain, finetune -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainFlags:
    """Flags of `vitscale pretrain`."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    nproc: Processes = 0
    json: Json = False


def pretrain(words: list[str]) -> None:
    """Train a ViT from the start, by a recipe; the same command on a run that exists resumes it."""
    name, rest = take_recipe(words, "pretrain", PRETRAIN)
    default = recipe(name, PRETRAIN)
    flags = parse(PretrainFlags, rest, f"pretrain {name}", PretrainFlags(default), f"Recipe {name}. {recipe_doc(name, PRETRAIN)}")
    train(settle_length(flags.config, given(rest, "epochs", "steps")), flags.nproc, flags.json)


@dataclass(frozen=True)
class FinetuneFlags:
    """Flags of `vitscale finetune`."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    nproc: Processes = 0
    json: Json = False


def finetune(words: list[str]) -> None:
    """Train on from a checkpoint, with a new head, at another resolution."""
    name, rest = take_recipe(words, "finetune", FINETUNE)
    default = recipe(name, FINETUNE)
    flags = parse(FinetuneFlags, rest, f"finetune {name}", FinetuneFlags(default), f"Recipe {name}. {recipe_doc(name, FINETUNE)}")
    train(settle_length(flags.config, given(rest, "epochs", "steps")), flags.nproc, flags.json)


def train(asked: TrainConfig | FinetuneConfig, nproc: int, as_json: bool) -> None:
    """Starts or resumes a run on this machine and waits for its end."""
    from vitscale.checkpoint import committed
    from vitscale.resolve import resolve
    from vitscale.run import locked, open_run, status

    gpus = visible_gpus()
    if nproc < 0 or (gpus and nproc > gpus):
        most = f" and at most {gpus}, the visible GPUs" if gpus else ""
        raise UsageError(f"nproc={nproc} must be at least 1{most}; 0 starts one a GPU")
    need("torch", "deepspeed", "safetensors")
    nproc = nproc or max(1, gpus)
    config = resolve(asked, nproc)
    run = Path(config.out)
    with locked(run) as lock:
        if open_run(config, nproc):
            print(f"{run} is finished; another --out starts anew", file=sys.stderr)
        else:
            try:
                run_ranks(run, nproc, lock, terminal=sys.stderr if as_json else sys.stdout)
            except KeyboardInterrupt:
                saved = committed(run)
                where = f"goes on from {saved[-1]}" if saved else "starts anew, because no checkpoint was written yet"
                print(f"\nstopped; the same command {where}", file=sys.stderr)
                raise
    if as_json:
        print_json(status(run))


# -- evaluate -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateFlags:
    """Evaluates on one device, in fp32, every sample once."""

    checkpoint: Checkpoint
    data: str
    """Dataset directory or URL of the split to evaluate on."""
    weights: Weights = "average"
    batch_size: int = 64
    workers: int = 0
    """Workers that decode; 0 takes the cores there are, at most 8."""
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
    """Accuracy of a checkpoint's head on a dataset."""
    flags = parse(EvaluateFlags, words, "evaluate")
    if flags.batch_size < 1 or flags.workers < 0:
        raise UsageError(f"batch-size={flags.batch_size} must be at least 1 and workers={flags.workers} at least 0")
    from data_tools.dataset import Dataset
    from vitscale.checkpoint import describe, find_checkpoint
    from vitscale.resolve import cache_at, stage_at

    description = describe(find_checkpoint(flags.checkpoint)).evaluated_by(flags.eval_protocol)
    dataset = Dataset.open_checked(flags.data, stage=stage_at(flags.stage), cache=cache_at(flags.cache, flags.cache_bytes))
    need("torch", "safetensors")
    from vitscale.evaluate import evaluate_checkpoint

    with progress_bar("evaluating", quiet=flags.json, unit="images") as update:
        result = evaluate_checkpoint(
            description, flags.weights, dataset, batch_size=flags.batch_size, workers=flags.workers, progress=update
        )  # fmt: skip
    if flags.json:
        of = {"checkpoint": str(description.path), "data": flags.data, "dataset": dataset.content_hash, "overlays": dataset.overlay.names}
        print_json(of | {"eval_protocol": description.preprocess.eval_protocol} | dataclasses.asdict(result))
        return
    skipped = f" ({result.skipped:,} more could not be read)" if result.skipped else ""
    skipped += f" (its overlays remove {result.removed:,})" if result.removed else ""
    by = f", by the {description.preprocess.eval_protocol} protocol"
    print(f"{description.path} on {result.samples:,} samples of {flags.data}{skipped}{by}:")
    print(f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f}")


# -- checkpoint ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShowFlags:
    """Prints what a checkpoint holds, after checking that it is whole."""

    checkpoint: Checkpoint
    tensors: bool = False
    """List every tensor."""
    json: Json = False


def checkpoint_show(words: list[str]) -> None:
    """What a checkpoint holds."""
    flags = parse(ShowFlags, words, "checkpoint show")
    from vitscale.checkpoint import describe, find_checkpoint

    description = describe(find_checkpoint(flags.checkpoint))
    if flags.json:
        print_json(dataclasses.asdict(description) | {"path": str(description.path)})
        return
    weights = [t for t in description.tensors if t.kind == "weight"]
    print(f"{description.path}: step {description.step}, {description.samples_seen:,} samples seen; checksums hold")
    print(f"{len(weights)} tensors, {sum(math.prod(t.shape) for t in weights):,} parameters; kinds: {', '.join(description.kinds)}")
    for part in (description.model, description.preprocess):
        print(f"{type(part).__name__}: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(part).items()))
    if flags.tensors:
        for tensor in description.tensors:
            print(f"{tensor.kind:<16} {tensor.name:<40} {' x '.join(map(str, tensor.shape))}")


@dataclass(frozen=True)
class ExportFlags:
    """Writes a folder that timm loads, or plain safetensors with a JSON description."""

    checkpoint: Checkpoint
    out: Annotated[Positional[str], tyro.conf.arg(metavar="OUT", help="The folder to write; it must not exist.")]
    to: Literal["timm", "safetensors"] = "timm"
    headless: bool = False
    """Leave out the head."""
    eval_protocol: EvalProtocol | None = None
    """Another evaluation preprocessing than the run's (docs/stream.md, "Evaluation")."""
    weights: Weights = "average"
    json: Json = False


def checkpoint_export(words: list[str]) -> None:
    """Weights for timm, or as plain safetensors."""
    flags = parse(ExportFlags, words, "checkpoint export")
    from vitscale.checkpoint import describe, find_checkpoint

    description = describe(find_checkpoint(flags.checkpoint)).evaluated_by(flags.eval_protocol)
    need("torch", "safetensors")
    from vitscale.export import export

    out = export(description, flags.weights, Path(flags.out), to=flags.to, headless=flags.headless)
    used = description.preferred(flags.weights)
    if flags.json:
        print_json({"out": str(out), "to": flags.to, "headless": flags.headless, "weights": used, "from": str(description.path)})
    else:
        print(f"{out}: the {used} tensors of {description.path} for {flags.to}{', without head' if flags.headless else ''}")


# -- run ----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatusFlags:
    """Shows how far a run is, and what it last measured."""

    run: Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help="Run directory.")]
    json: Json = False


def run_status(words: list[str]) -> None:
    """How far a run is."""
    flags = parse(StatusFlags, words, "run status")
    from vitscale.metrics import counted, duration
    from vitscale.run import status, unusable_line

    found = status(Path(flags.run))
    if flags.json:
        print_json(found)
        return
    starts = counted(found["starts"], "start")
    print(f"{found['run']}: {found['recipe']}, {found['state']} at step {found['step']} of {found['total_steps']}, {starts}")
    if last := found["last"]:
        left = f", {duration(last['seconds_left'])} left" if found["state"] == "running" else ""
        print(f"loss {last['loss']:.4f}, epoch {last['epoch']:.2f}, {last['images_per_second']:,.0f} img/s{left}")
    if evaluation := found["evaluation"]:
        print(f"held out at step {evaluation['step']}: top-1 {evaluation['eval_top1']:.2%}, loss {evaluation['eval_loss']:.4f}")
    if said := unusable_line(Path(flags.run)):
        print(said)
    goes_on = f"; the same command goes on from {found['checkpoints'][-1]}" if found["checkpoints"] and found["state"] == "stopped" else ""
    print(f"checkpoints: {', '.join(found['checkpoints']) or 'none yet'}{goes_on}")


@dataclass(frozen=True)
class WhichFlags:
    """Tells which samples a step of a run saw, or which steps saw a sample.

    Nothing is recorded for it while a run trains: it follows from the order. The datasets must be there; no image is read."""

    run: Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help="Run directory.")]
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
    from vitscale.metrics import counted
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
    print(f"step {step.step} of {step.run}, {of}: {counted(len(step.samples), 'sample')}{'' if step.made else '; it is still to be made'}")


def recipe_doc(name: str, recipes: tuple[Recipe[Any], ...]) -> str:
    """The docstring of a recipe."""
    return next(" ".join((function.__doc__ or "").split()) for function in recipes if recipe_name(function) == name)


VERBS: dict[str, Verb] = DATA_VERBS | {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "checkpoint show": checkpoint_show,
    "checkpoint export": checkpoint_export,
    "run status": run_status,
    "run which": run_which,
}
