"""The verb that foretells a run: `plan`. It works where torch is not installed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.flags import UsageError, given, parse, take_recipe
from launch.terminal import Json, print_json
from vitscale.config import TrainConfig, settle_length
from vitscale.plan import IMAGE_BYTES, NODE_MTBF_HOURS, Cluster, Data, make, samples_of, svg, text
from vitscale.recipes import PRETRAIN, recipe
from vitscale.roofline import assumed, calibrated


@dataclass(frozen=True)
class PlanFlags:
    """Flags of `vitscale plan`."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    """h100, h100-pcie, h200, a100, a100-40, b200, gb200, l40s or mi300x."""
    samples: int = 0
    """Images in the training set; 0 takes what the recipe's name tells."""
    image_bytes: float = IMAGE_BYTES
    """Bytes of an image, as stored."""
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
    compiled: bool = False
    """Blocks run through torch.compile."""
    calibration: Path | None = None
    """What benchmarks/calibrate.py measured on such a machine."""
    plot: Path | None = None
    """An SVG file to write: days and efficiency against nodes."""
    json: Json = False


def plan(words: list[str]) -> None:
    """What a run will take on a cluster: memory, time, traffic, days, and how many nodes to book."""
    name, rest = take_recipe(words, "plan", PRETRAIN)
    default = recipe(name, PRETRAIN)
    flags = parse(PlanFlags, rest, f"plan {name}", PlanFlags(default), f"What recipe {name} will take on a cluster.")
    config = dataclasses.replace(settle_length(flags.config, given(rest, "epochs", "steps")), recipe=name)
    for figure in ("samples", "image_bytes", "images_a_core", "network_gbits", "price_per_gpu_hour"):
        if getattr(flags, figure) < 0:
            raise UsageError(f"{figure}={getattr(flags, figure):g} must be at least 0")
    for figure in ("storage_gbytes", "node_mtbf_hours"):
        if getattr(flags, figure) <= 0:
            raise UsageError(f"{figure}={getattr(flags, figure):g} must be above 0")
    from vitscale.check import check_model
    from vitscale.gpus import gpu

    check_model(config.model)
    device = gpu(flags.gpu)
    rates = assumed(device, config.engine.precision, flags.network_gbits / 8 * 1e9)
    if flags.calibration:
        rates = calibrated(rates, flags.calibration)
    cluster = Cluster(
        device, flags.nodes, flags.gpus_per_node, flags.price_per_gpu_hour, flags.storage_gbytes * 1e9, flags.node_mtbf_hours
    )  # fmt: skip
    data = Data(flags.samples or samples_of(name), flags.image_bytes, flags.images_a_core)
    made = make(config, cluster, data, rates, flags.compiled)
    if flags.plot:
        flags.plot.write_text(svg(made))
    if flags.json:
        print_json(made.to_dict())
        return
    print(f"{name} on {flags.nodes} x {flags.gpus_per_node} {device.name}: {device.source}; rates {rates.source}\n")
    print(text(made))
