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

from launch.data_verbs import DATA_VERBS
from launch.evaluate_verb import evaluate
from launch.flags import Checkpoint, Processes, UsageError, Weights, given, parse, take_recipe
from launch.plan_verb import plan
from launch.run_verbs import RUN_VERBS
from launch.terminal import Json, Verb, need, print_json
from vitscale.config import EvalProtocol, FinetuneConfig, TrainConfig, settle_length
from vitscale.recipes import FINETUNE, PRETRAIN, Recipe, recipe, recipe_name

# -- pretrain, finetune -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainFlags:
    """Flags of `vitscale pretrain`."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    nproc: Processes = 0
    json: Json = False


def pretrain(words: list[str]) -> None:
    """Train a ViT from the start, by a recipe; the same command on a run that exists resumes it."""
    flags = pretrain_flags(words)
    train(flags.config, flags.nproc, flags.json)


def pretrain_flags(words: list[str]) -> PretrainFlags:
    """What `vitscale pretrain` is told."""
    name, rest = take_recipe(words, "pretrain", PRETRAIN)
    default = recipe(name, PRETRAIN)
    flags = parse(PretrainFlags, rest, f"pretrain {name}", PretrainFlags(default), f"Recipe {name}. {recipe_doc(name, PRETRAIN)}")
    return dataclasses.replace(flags, config=settle_length(flags.config, given(rest, "epochs", "steps")))


@dataclass(frozen=True)
class FinetuneFlags:
    """Flags of `vitscale finetune`."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    nproc: Processes = 0
    json: Json = False


def finetune(words: list[str]) -> None:
    """Train on from a checkpoint, with a new head, at another resolution."""
    flags = finetune_flags(words)
    train(flags.config, flags.nproc, flags.json)


def finetune_flags(words: list[str]) -> FinetuneFlags:
    """What `vitscale finetune` is told."""
    name, rest = take_recipe(words, "finetune", FINETUNE)
    default = recipe(name, FINETUNE)
    flags = parse(FinetuneFlags, rest, f"finetune {name}", FinetuneFlags(default), f"Recipe {name}. {recipe_doc(name, FINETUNE)}")
    return dataclasses.replace(flags, config=settle_length(flags.config, given(rest, "epochs", "steps")))


def train(asked: TrainConfig | FinetuneConfig, nproc: int, as_json: bool) -> None:
    """Starts or resumes a run on this machine and waits for its end."""
    from launch.local import run_to_end, visible_gpus
    from vitscale.check import check_on_cpu
    from vitscale.resolve import resolve
    from vitscale.run import locked
    from vitscale.status import status

    gpus = visible_gpus()
    if nproc < 0 or (gpus and nproc > gpus):
        most = f" and at most {gpus}, the visible GPUs" if gpus else ""
        raise UsageError(f"nproc={nproc} must be at least 1{most}; 0 starts one a GPU")
    need("torch", "deepspeed", "safetensors")
    nproc = nproc or max(1, gpus)
    config = resolve(asked, nproc)
    if not gpus and not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd")):  # else torch is asked, by each rank
        check_on_cpu(config.engine)
    run = Path(config.out)
    with locked(run) as lock:
        (run / "stop").unlink(missing_ok=True)  # who starts a run wants it to go on
        ended = run_to_end(config, nproc, lock, terminal=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(status(run))
    if ended:
        sys.exit(ended)


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


@dataclass(frozen=True)
class PruneFlags:
    """Removes checkpoints of a run that are not to be kept. The newest whole one stays, and the best as the run's settings say."""

    run: Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help="Run directory.")]
    keep: int | None = None
    """Newest checkpoints to keep; 0 keeps all. As the run has it where it is not given."""
    keep_every: int | None = None
    """Keep those of every so many steps, too. As the run has it where it is not given."""
    dry_run: bool = False
    """Only tell what would go."""
    json: Json = False


def checkpoint_prune(words: list[str]) -> None:
    """Remove the checkpoints of a run that are not to be kept."""
    flags = parse(PruneFlags, words, "checkpoint prune")
    from vitscale import retention
    from vitscale.checkpoint import CheckpointError, describe, newest_durable, step_folder, step_of
    from vitscale.run import read_config, read_metrics

    run = Path(flags.run)
    policy = retention.policy_of(read_config(run), flags.keep, flags.keep_every)
    if policy.newest < 0 or policy.every < 0:
        raise UsageError(f"keep={policy.newest} and keep-every={policy.every} must be at least 0; 0 of keep keeps all")
    newest, faults = newest_durable(run)
    if newest is None:
        raise CheckpointError(f"{run} has no whole checkpoint, so none is removed; {faults[0] if faults else 'none is there'}")
    sizes = retention.sizes_up_to(run, step_of(newest))
    settled = {step: size for step, size in sizes.items() if step != step_of(newest) or not describe(newest).in_doubt}
    steps = retention.superfluous(settled, retention.goodness(read_metrics(run)), policy)
    if not flags.dry_run:
        retention.remove(run, steps)
    for fault in faults:
        print(f"warning: {fault}; it is left as it is", file=sys.stderr)
    if flags.json:
        kept = [step for step in sizes if step not in steps]
        print_json({"run": flags.run, "removed": steps, "kept": kept, "bytes": sum(sizes[s] for s in steps), "dry_run": flags.dry_run})
        return
    for step in steps:
        print(f"{step_folder(run, step)}: {sizes[step]:,} bytes")
    would = "would be removed" if flags.dry_run else "removed"
    print(f"{len(steps)} of {len(sizes)} checkpoints {would}, {sum(sizes[step] for step in steps):,} bytes")


def recipe_doc(name: str, recipes: tuple[Recipe[Any], ...]) -> str:
    """The docstring of a recipe."""
    return next(" ".join((function.__doc__ or "").split()) for function in recipes if recipe_name(function) == name)


VERBS: dict[str, Verb] = (
    DATA_VERBS
    | RUN_VERBS
    | {
        "pretrain": pretrain,
        "finetune": finetune,
        "plan": plan,
        "evaluate": evaluate,
        "checkpoint show": checkpoint_show,
        "checkpoint export": checkpoint_export,
        "checkpoint prune": checkpoint_prune,
    }
)
