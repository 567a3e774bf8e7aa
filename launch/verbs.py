"""The verbs of the `vitscale` command: the flags of each, what it calls, and what it prints.

What a verb needs is imported when it runs, so that `vitscale --help` answers at once and verbs that do not train work without torch.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch.checkpoint_verbs import CHECKPOINT_VERBS
from launch.data_verbs import DATA_VERBS
from launch.evaluate_verb import evaluate
from launch.flags import Processes, UsageError, Weights, given, parse, take_recipe
from launch.plan_verb import plan
from launch.run_verbs import RUN_VERBS
from launch.terminal import Json, Verb, need, print_json
from vitscale.config import BODY, EngineConfig, FinetuneConfig, InitConfig, PositionInterpolation, TrainConfig, settle_length
from vitscale.recipes import FINETUNE, PRETRAIN, Recipe, recipe, recipe_name

_RATES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[LR ...]",
    instance_from_str=lambda words: None if words == ["None"] else tuple(map(float, words)),
    is_instance=lambda value: value is None or isinstance(value, tuple),
    str_from_instance=lambda value: ["None"] if value is None else list(map(str, value)),
)


# -- pretrain, finetune -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainFlags:
    """Flags of `vitscale pretrain`."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    init: str = ""
    """The checkpoint to begin from in place of random weights: its body as it is, at the recipe's image size; its head where the dataset
    has as many classes of the same names. A run, RUN@STEP, RUN@best, a step's folder or an exported folder."""
    init_weights: Weights = "average"
    position_interpolation: PositionInterpolation = "timm"
    """As of `finetune`."""
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
    config = settle_length(flags.config, given(rest, "epochs", "steps"))
    if flags.init:
        if fixed := given(rest, *(f"model.{setting.replace('_', '-')}" for setting in BODY)):
            raise UsageError(f"--{min(fixed)} is the checkpoint's, which --init {flags.init} takes; leave it out")
        config = dataclasses.replace(config, init=InitConfig(flags.init, flags.init_weights, flags.position_interpolation))
    return dataclasses.replace(flags, config=config)


@dataclass(frozen=True)
class FinetuneFlags:
    """Flags of `vitscale finetune`."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    sweep: Annotated[tuple[float, ...] | None, _RATES] = None
    """Peak learning rates to try on a held-out part of the training split before the run, with the best, trains on all of it; none after
    the flag takes the recipe's own grid, and --holdout sets the share (docs/finetuning.md). None: no sweep."""
    nproc: Processes = 0
    json: Json = False


def finetune(words: list[str]) -> None:
    """Train on from a checkpoint, with a new head, at another resolution."""
    flags = finetune_flags(words)
    if flags.sweep is None:
        train(flags.config, flags.nproc, flags.json)
        return
    from launch.sweep import sweep

    if ended := sweep(flags.config, flags.sweep, ranks_here(flags.nproc, flags.config.engine), as_json=flags.json):
        sys.exit(ended)


def finetune_flags(words: list[str]) -> FinetuneFlags:
    """What `vitscale finetune` is told."""
    name, rest = take_recipe(words, "finetune", FINETUNE)
    default = recipe(name, FINETUNE)
    flags = parse(FinetuneFlags, rest, f"finetune {name}", FinetuneFlags(default), f"Recipe {name}. {recipe_doc(name, FINETUNE)}")
    if flags.sweep is not None and given(rest, "optimizer.peak-lr"):
        raise UsageError("--sweep chooses the peak learning rate; leave out --optimizer.peak-lr")
    if flags.sweep is not None and given(rest, "holdout") and not flags.config.holdout:
        raise UsageError("--sweep with --holdout 0 has nothing to compare rates on; --holdout 0.1 works, as leaving it out does")
    return dataclasses.replace(flags, config=settle_length(flags.config, given(rest, "epochs", "steps")))


def train(asked: TrainConfig | FinetuneConfig, nproc: int, as_json: bool) -> None:
    """Starts or resumes a run on this machine and waits for its end."""
    from launch.local import start
    from launch.ranks import stopping
    from vitscale.resolve import resolve
    from vitscale.status import status

    nproc = ranks_here(nproc, asked.engine)
    config = resolve(asked, nproc)
    with stopping() as stop:
        ended = start(config, nproc, sys.stderr if as_json else sys.stdout, stop)
    if as_json:
        print_json(status(Path(config.out)))
    if ended:
        sys.exit(ended)


def ranks_here(nproc: int, engine: EngineConfig) -> int:
    """How many ranks a run has on this machine, where so many are asked for. Raises UsageError, VerbError, ConfigError where none can."""
    from launch.ranks import rank_count, visible_gpus
    from vitscale.check import check_on_cpu

    gpus = visible_gpus()
    ranks = rank_count(nproc, gpus)
    need("torch", "deepspeed", "safetensors")
    if not gpus and not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd")):  # else torch is asked, by each rank
        check_on_cpu(engine)
    return ranks


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
    }
    | CHECKPOINT_VERBS
)
