"""The verb that foretells a run: `plan`. It works where torch is not installed."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.flags import UsageError, given, parse, take_recipe
from launch.plan_tables import svg, text
from launch.terminal import Json, print_json
from vitscale.check import check_classes
from vitscale.config import FinetuneConfig, PreprocessConfig, TrainConfig, ViTConfig, fine_tuning_run, settle_length
from vitscale.gpus import GPUS, NODE_MTBF_HOURS, Cluster, gpu
from vitscale.plan import IMAGE_BYTES, Data, dataset_of, make_plan
from vitscale.recipes import FINETUNE, PRETRAIN, Recipe, recipe
from vitscale.roofline import assumed, calibrated


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """What `vitscale plan` wants to know beside a run's own settings."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(sorted(one.name for one in GPUS))}.")] = "h100"
    samples: int = 0
    """Images in the training set; 0 takes those of --data, or what the recipe's name tells."""
    image_bytes: float = 0.0
    """Bytes of an image, as stored; 0 takes those of --data, or of photographs of 500x375 pixels."""
    images_a_core: float = 0.0
    """Images a second that a core decodes and augments; 0 takes what was measured here."""
    network_gbits: float = 0.0
    """Gbit/s of a GPU to other nodes; 0 takes that of the maker's own system."""
    storage_gbytes: float = 5.0
    """GB/s that all nodes together write checkpoints at."""
    node_mtbf_hours: float = NODE_MTBF_HOURS
    """Mean hours between failures of a node; what is there by default is Llama 3's (arXiv 2407.21783)."""
    price_per_gpu_hour: float = 0.0
    """In any currency; 0 tells no cost."""
    calibration: Path | None = None
    """What benchmarks/calibrate.py measured on such a machine."""
    plot: Path | None = None
    """An SVG file to write: days and efficiency against nodes."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class PretrainPlan(ClusterFlags):
    """Flags of `vitscale plan` of a pre-training recipe."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(ClusterFlags):
    """Flags of `vitscale plan` of a fine-tuning recipe."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    init_recipe: str = ""
    """The recipe whose model is fine-tuned, where there is no checkpoint for --init yet, as vit-h14-jft300m."""
    num_classes: int = 0
    """Classes of the new head; 0 takes those of --data, or what the recipe's name tells."""


def plan(words: list[str]) -> None:
    """What a run will take on a cluster: memory, time, traffic, days, and how many nodes to book."""
    recipes: tuple[Recipe[TrainConfig | FinetuneConfig], ...] = (*PRETRAIN, *FINETUNE)
    name, rest = take_recipe(words, "plan", recipes)
    default = recipe(name, recipes)
    told = f"What recipe {name} will take on a cluster."
    flags: PretrainPlan | FinetunePlan
    if isinstance(default, FinetuneConfig):
        flags = parse(FinetunePlan, rest, f"plan {name}", FinetunePlan(config=default), told)
    else:
        flags = parse(PretrainPlan, rest, f"plan {name}", PretrainPlan(config=default), told)
    for figure in ("samples", "image_bytes", "images_a_core", "network_gbits", "price_per_gpu_hour"):
        if not 0 <= getattr(flags, figure) < math.inf:
            raise UsageError(f"{figure}={getattr(flags, figure):g} must be at least 0")
    for figure in ("storage_gbytes", "node_mtbf_hours"):
        if not 0 < getattr(flags, figure) < math.inf:
            raise UsageError(f"{figure}={getattr(flags, figure):g} must be above 0")
    if flags.plot and not flags.plot.parent.is_dir():
        raise UsageError(f"plot={flags.plot}: there is no folder {flags.plot.parent}")
    if flags.plot and flags.plot.suffix != ".svg":
        raise UsageError(f"plot={flags.plot} is drawn as SVG; {flags.plot.with_suffix('.svg')} works")
    if flags.calibration and not flags.calibration.is_file():
        raise UsageError(f"calibration={flags.calibration} does not exist; benchmarks/calibrate.py writes such a file")
    data, classes = data_of(flags, name)
    config = run_of(flags, classes)
    config = dataclasses.replace(settle_length(config, given(rest, "epochs", "steps")), recipe=name)
    device = gpu(flags.gpu)
    rates = assumed(device, config.engine.precision, flags.network_gbits / 8 * 1e9)
    if flags.calibration:
        rates = calibrated(rates, flags.calibration, config.engine.precision, device)
    cluster = Cluster(
        device, flags.nodes, flags.gpus_per_node, flags.price_per_gpu_hour, flags.storage_gbytes * 1e9, flags.node_mtbf_hours
    )  # fmt: skip
    made = make_plan(config, cluster, data, rates)
    if flags.plot:
        flags.plot.write_text(svg(made))
    if flags.json:
        print_json(made.to_dict())
        return
    print(f"{name} on {flags.nodes} x {flags.gpus_per_node} {device.name}: {device.source}; rates {rates.source}\n")
    print(text(made))


def data_of(flags: PretrainPlan | FinetunePlan, name: str) -> tuple[Data, int]:
    """What is read, and its classes: as flags say, else as the dataset does, else what the recipe's name tells."""
    samples, classes = dataset_of(name)
    size, source = float(IMAGE_BYTES), ""
    if any(flags.config.datasets):
        from data_tools.dataset import Dataset  # a third of a second to import
        from vitscale.mixture import Mixture
        from vitscale.unindexed import named_tars

        if named_tars(flags.config.datasets):
            told = "`vitscale data index` makes one; without --data, --samples and --image-bytes tell as much"
            others = f" and {len(flags.config.datasets) - 1} more" * (len(flags.config.datasets) > 1)
            raise UsageError(f"data={flags.config.datasets[0]}{others}: tars without an index, which a plan reads; {told}")
        parts = [Dataset.open(path, check_shards=False) for path in flags.config.datasets]
        mixture = Mixture(parts)
        samples, classes = mixture.num_samples, mixture.num_classes
        weights = flags.config.data_weights or [part.num_samples for part in parts]
        sizes = [int(part.shard_bytes.sum()) / max(1, part.num_samples) for part in parts]
        size = sum(weight * of for weight, of in zip(weights, sizes, strict=True)) / sum(weights)
        source = f"the mean of {' and '.join(flags.config.datasets)}, in its tars"
    return Data(flags.samples or samples, flags.image_bytes or size, flags.images_a_core, source), classes


def run_of(flags: PretrainPlan | FinetunePlan, classes: int) -> TrainConfig:
    """The run that is planned. Raises UsageError where fine-tuning has no model."""
    if isinstance(flags, PretrainPlan):
        model = flags.config.model
        classes = check_classes(flags.config, classes) if any(flags.config.datasets) else model.num_classes or classes
        return dataclasses.replace(flags.config, model=dataclasses.replace(model, num_classes=classes))
    base: ViTConfig
    if flags.config.init:
        from vitscale.checkpoint import describe
        from vitscale.finding import find_checkpoint

        base = describe(find_checkpoint(flags.config.init)).model
    elif flags.init_recipe:
        base = recipe(flags.init_recipe, PRETRAIN).model
    else:
        raise UsageError("a fine-tuning run has its checkpoint's model; --init CHECKPOINT, or --init-recipe vit-h14-jft300m")
    return fine_tuning_run(flags.config, base, PreprocessConfig(), "", flags.num_classes or classes)
