"""What a run will take, before a cluster is booked: memory, time, traffic, data, checkpoints, days, and which number of nodes to take.

Pure functions over a config, a cluster and what a step takes (`layouts.py`, `failures.py`); imports no torch. A `Plan` is a list of
figures, each with its formula or source and whether it is exact, measured, predicted or assumed; text and JSON are the same list.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_tools.page import byte_size
from vitscale.check import check_config, check_phase_ends, check_schedule
from vitscale.config import ConfigError, Keeps, TrainConfig, ViTConfig
from vitscale.failures import SNAPSHOT_BANDWIDTH, SNAPSHOT_SOURCE, checkpoint_interval, expected_goodput, stall_seconds, write_seconds
from vitscale.flops import checkpoint_bytes, forward_flops, parameters, train_flops
from vitscale.gpus import NODE_MTBF_HOURS, Cluster
from vitscale.layouts import (
    ERR,
    LEAST_EFFICIENCY,
    RESERVE,
    WORTH,
    Option,
    Part,
    Row,
    advised,
    asked_for,
    choose,
    flags,
    knee,
    micro_batches,
    options,
    run_flops,
    scale,
    spans_of,
)
from vitscale.memory import Layout
from vitscale.recipes import PRETRAIN, recipe
from vitscale.roofline import HIDDEN_SHARE, Rates, StepTime
from vitscale.timeline import timeline_of
from vitscale.traffic import collectives, seconds

Basis = Literal["exact", "predicted", "measured", "assumed"]

# Training images and classes of recipes' datasets, by what stands in the recipe's name. JFT-300M: arXiv 2010.11929, section 4.1; ImageNet:
# arXiv 2104.10972 and 1409.0575; the others as arXiv 2010.11929 fine-tunes on them, and of VTAB's tasks of 1,000 images the most classes
DATASETS = {
    "jft300m": (303_000_000, 18_291), "imagenet21k": (14_197_122, 21_843), "imagenet": (1_281_167, 1_000), "cifar100": (50_000, 100),
    "cifar10": (50_000, 10), "pets": (3_680, 37), "flowers": (2_040, 102), "vtab": (1_000, 397),
}  # fmt: skip
# benchmarks/results/2026-11-21-loader-speed-workers.json: 500x375 photographs, all cores of an Intel Xeon, images a second a core
IMAGES_A_CORE = {"exact": 1022.1, "fast": 1024.1}
IMAGE_BYTES = 43_591
PAPER_CORE_DAYS = {"vit-h14-jft300m": 2500, "vit-l16-jft300m": 680}  # arXiv 2010.11929, table 2
MOST_OFF = 0.15  # of what published planners of this kind foretell from measured rates (docs/planning.md)
MOST_OFF_ASSUMED = 0.30  # an allowance where rates are assumed
TPU_CORE = 61.5e12  # FLOP/s in bf16: a TPUv3 chip of two cores does 123 TFLOP/s (Cloud TPU documentation, "TPU v3")


@dataclass(frozen=True)
class Data:
    """What is read."""

    samples: int
    image_bytes: float = IMAGE_BYTES
    """As read: of an image in its tar."""
    images_a_core: float = 0.0
    """Images a second that a core decodes; 0 takes what was measured."""
    source: str = ""
    """Where samples and bytes come from; empty: assumed."""


@dataclass(frozen=True)
class Figure:
    """One line of a plan."""

    name: str
    value: float | str
    said: str
    """The value for people."""
    how: str
    basis: Basis


@dataclass(frozen=True)
class Plan:
    """Everything that is told."""

    sections: dict[str, tuple[Figure, ...]]
    options: tuple[Option, ...]
    chosen: Option
    asked: Option | None
    """The config's own layout; None where its batch cannot be shared out."""
    scaling: tuple[Row, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def dataset_of(name: str) -> tuple[int, int]:
    """Images and classes of a recipe's dataset, or zeros where its name does not tell."""
    return next((known for dataset, known in DATASETS.items() if dataset in name.replace("-", "")), (0, 0))


def make_plan(config: TrainConfig, cluster: Cluster, data: Data, rates: Rates) -> Plan:
    """The plan of a run. Raises ConfigError where no run could be so, or the batch does not divide, or nothing fits."""
    if min(cluster.nodes, cluster.gpus_per_node) < 1:
        raise ConfigError(f"nodes={cluster.nodes} and gpus_per_node={cluster.gpus_per_node} must be at least 1")
    if not config.model.num_classes:
        raise ConfigError("model.num_classes=0 takes the dataset's number; give --data, or the number, as --model.num-classes 1000")
    if not config.steps and not data.samples:
        raise ConfigError(f"epochs={config.epochs:g} of a dataset of unknown size; give --data or --samples, or --steps")
    if config.global_batch_size > 0:
        micro_batches(config.global_batch_size, cluster, config.mix.is_on)  # says of a batch that cannot be shared out what works
    whole = replace(config, micro_batch_size=config.global_batch_size, schedule=replace(config.schedule, phases=()))
    check_config(whole, 1)  # all but phases, and how batches are shared out
    check_phase_ends(config.schedule.phases)
    if config.engine.float8:
        cluster.gpu.peak("fp8")
    check_schedule(config, timeline_of(config, data.samples).total_steps)
    spans = spans_of(config, data.samples)
    found = options(config, cluster, rates, spans)
    try:
        asked, refused = asked_for(config, cluster, rates, spans), ""
    except ConfigError as error:
        asked, refused = None, str(error)
    chosen = choose(found, asked)
    check_config(advised(config, chosen), cluster.world_size)
    rows = scale(config, cluster, rates, spans, chosen, weak=False)
    sections = {
        "model": model_figures(config.model),
        "memory": memory_figures(config, chosen, cluster),
        "traffic": traffic_figures(config, chosen, cluster, rates),
        "step": step_figures(config, chosen, cluster, rates),
        "data": data_figures(config, chosen, cluster, data),
        "checkpoints": checkpoint_figures(config, cluster, chosen.last.took),
        "run": run_figures(config, chosen, cluster, data, rates),
    }
    weak = scale(config, cluster, rates, spans, chosen, weak=True)
    said = (*layout_advice(config, cluster, found, chosen, asked, refused), *nodes_advice(cluster, rows))
    return Plan(sections, found, chosen, asked, (*rows, *weak), said)


def model_figures(model: ViTConfig) -> tuple[Figure, ...]:
    """Of the model alone."""
    P, forward, train = parameters(model), forward_flops(model), train_flops(model)
    kept = f", of which training sees {model.num_train_tokens}" * (model.num_train_tokens < model.num_tokens)
    registers = f", {model.registers} registers" * (model.registers > 0)
    tokens = f"{sides(model.grid)} patches{' and a class token' * model.class_token}{registers}{kept}"
    less = ", less what patch dropout and stochastic depth leave out" * (train < 3 * forward)
    return (
        Figure("parameters", P, f"{P:,}", "sum over the model's tensors", "exact"),
        Figure("tokens", model.num_tokens, f"{model.num_tokens}", tokens, "exact"),
        Figure("forward_flops", forward, f"{forward / 1e9:,.1f} GFLOP an image", "matrix products, 2 a multiply-add", "exact"),
        Figure("train_flops", train, f"{train / 1e9:,.1f} GFLOP an image", f"3 x forward{less}; recomputation is never counted", "exact"),
    )


def memory_figures(config: TrainConfig, option: Option, cluster: Cluster) -> tuple[Figure, ...]:
    """Of the chosen layout, by kind, at its highest moment."""
    largest = max(option.parts, key=lambda part: part.memory.total)
    layout, memory = _layout(option, largest, cluster), option.memory
    stage, w, m = layout.engine.zero_stage, layout.width, len(config.optimizer.moments())
    whole, over = f"{w} P", " / N" * (stage > 0)
    state = f"fp32 masters and moments: {4 + 4 * m} P{over}" if layout.masters else f"moments: {4 * m} P{over}"
    born = ", as far as the moment has them" * (stage == 0)
    sums = "4 P summed in fp32, and " * (layout.grad_accum_steps > 1 and w < 4)
    how = {
        "weights": f"{w} P / N, and what is gathered of the others for the time" if stage == 3 else whole,
        "gradients": "4 P / N in fp32, as far as the moment has them" if stage > 1 else f"{sums}{whole} of the micro-batch{born}",
        "optimizer": f"{state}{', of matrices of blocks 4 fewer' * (config.optimizer.name == 'muon')}",
        "average": f"fp32 average of the weights: 4 P{over}" if config.optimizer.average_decay else "none is kept",
        "activations": "what the backward pass still needs, and what one block's computes with",
        "buckets": "gradients on their way between GPUs, and copies of them",
        "inputs": f"{'images in fp32, and ' * (w < 4)}two micro-batches in uint8",
    }
    kinds = [Figure(kind, size, _gb(size), how[kind], "predicted") for kind, size in memory.kinds().items()]
    reserve = Figure("reserve", RESERVE, _gb(RESERVE), "CUDA context, NCCL, cuBLAS, fragmentation: an allowance", "assumed")
    total = memory.total + RESERVE
    of = f" at {sides(largest.image_size)} pixels" * (len(option.parts) > 1)
    return (*kinds, reserve, Figure("peak", total, _gb(total), f"the sum, at its highest: in the {memory.moment}{of}", "predicted"))


def traffic_figures(config: TrainConfig, option: Option, cluster: Cluster, rates: Rates) -> tuple[Figure, ...]:
    """Each collective of a step."""
    layout = _layout(option, option.last, cluster)
    figures = []
    for one in collectives(config.model, config.optimizer, layout):
        sent = one.sent(layout.world_size)
        spent = seconds(one, cluster.nodes, cluster.gpus_per_node, rates.inside, rates.between)
        behind = "nothing hides it" if one.hides == "nothing" else f"runs behind the {one.hides} pass"
        how = f"{one.kind} of {_gb(one.bytes)}, {one.times} a step; {1e3 * spent:,.1f} ms; {behind}"
        figures.append(Figure(one.what.replace(", ", "_").replace(" ", "_"), sent, _gb(sent), how, "predicted"))
    total = sum(figure.value for figure in figures)  # type: ignore[misc]
    link = f"{rates.inside.bandwidth / 1e9:,.0f} GB/s inside a node, {rates.between.bandwidth / 1e9:,.0f} GB/s a GPU between nodes"
    return (*figures, Figure("sent", total, _gb(total), f"the sum; {link}", "predicted"))


def step_figures(config: TrainConfig, option: Option, cluster: Cluster, rates: Rates) -> tuple[Figure, ...]:
    """A step's time by what it goes to, of the part with the run's own settings."""
    took = option.last.took
    rate = config.global_batch_size / took.total
    flops = rate * train_flops(config.model) / cluster.world_size
    top = cluster.gpu.peak(config.engine.precision)
    eighth = f", of inner blocks {rates.float8 / 1e12:,.3g}" * config.engine.float8
    muon = ", the orthogonalising of matrices" * (config.optimizer.name == "muon")
    how = {
        "products": f"FLOPs of linear layers, 3 x forward / {rates.products / 1e12:,.3g} TFLOP/s{eighth}",
        "attention": f"FLOPs of attention, 3.5 x forward (scores are computed again) / {rates.attention / 1e12:,.3g} TFLOP/s",
        "elementwise": f"LayerNorm, GELU, additions, loss: bytes / {rates.memory / 1e9:,.4g} GB/s",
        "recomputation": "what checkpointed blocks compute again",
        "waiting_for_launches": f"by how much the host, {rates.launch * 1e6:.3g} us a kernel, is slower than the device",
        "update": f"passes over gradients, the norm, the optimizer: bytes / memory bandwidth{muon}",
        "communication": "all collectives, hidden or not",
        "hidden": f"{HIDDEN_SHARE:.0%} of the communication that can run behind compute; taken off",
    }
    figures = [Figure(name, value, f"{1e3 * value:,.2f} ms", how[name], "predicted") for name, value in asdict(took).items()]
    figures += [
        Figure("step", took.total, f"{1e3 * took.total:,.2f} ms", f"the sum, less what is hidden; rates: {rates.source}", "predicted"),
        Figure("images_per_second", rate, f"{rate:,.0f} images/s", "global batch / step", "predicted"),
        Figure(
            "images_per_second_a_gpu", rate / cluster.world_size, f"{rate / cluster.world_size:,.1f} images/s", "of one GPU", "predicted"
        ),
        Figure(
            "mfu", flops / top, f"{flops / top:.1%}", f"model FLOPs / {top / 1e12:,.0f} TFLOP/s, the data sheet's dense peak", "predicted"
        ),
    ]
    if cluster.gpu.reached and config.engine.precision == "bf16":
        reached = cluster.gpu.reached
        how_reached = f"of {reached / 1e12:,.0f} TFLOP/s, what an 8192-cubed product in bf16 was measured to reach"
        figures.append(Figure("mfu_of_measured", flops / reached, f"{flops / reached:.1%}", how_reached, "predicted"))
    return tuple(figures)


def data_figures(config: TrainConfig, option: Option, cluster: Cluster, data: Data) -> tuple[Figure, ...]:
    """What the loader must deliver, in the part that asks for most."""
    fastest = max(option.parts, key=lambda part: part.global_batch_size / part.took.total)
    rate = fastest.global_batch_size / fastest.took.total / cluster.nodes
    of = f", at {sides(fastest.image_size)} pixels, where it is most" * (len(option.parts) > 1)
    a_core = data.images_a_core or IMAGES_A_CORE[config.stream.decode]
    source = "given" if data.images_a_core else "benchmarks/results/2026-11-21-loader-speed-workers.json, 500x375 photographs"
    basis: Basis = "assumed" if data.images_a_core else "measured"
    read = rate * data.image_bytes
    where = data.source or "of photographs of 500x375 pixels"
    figures = [
        Figure("images_per_second_a_node", rate, f"{rate:,.0f} images/s", f"images a second / nodes{of}", "predicted"),
        Figure("images_a_core", a_core, f"{a_core:,.0f} images/s", f"decoded, cropped and resized by a core: {source}", basis),
        Figure("cores_a_node", rate / a_core, f"{rate / a_core:,.1f} cores", "the two above, divided; RandAugment costs more", "predicted"),
        Figure("bytes_a_node", read, f"{read / 1e6:,.1f} MB/s", f"x {data.image_bytes:,.0f} bytes an image, {where}", "predicted"),
    ]
    if data.samples:
        size = data.samples * data.image_bytes
        known: Basis = "exact" if data.source else "assumed"
        figures.append(Figure("dataset", size, f"{size / 1e12:,.3g} TB", f"{data.samples:,} images x bytes an image", known))
    return tuple(figures)


def checkpoint_figures(config: TrainConfig, cluster: Cluster, took: StepTime) -> tuple[Figure, ...]:
    """How large, how often, and what failures cost."""
    size, stall, write = checkpoint_bytes(config.model, config.optimizer), stall_seconds(config, cluster), write_seconds(config, cluster)
    interval, share = checkpoint_interval(config, cluster), expected_goodput(config, cluster)
    failure = cluster.node_mtbf_hours / cluster.nodes
    every = max(1, round(interval / took.total))
    source = f"copying at {SNAPSHOT_BANDWIDTH / 1e9:g} GB/s a rank: {SNAPSHOT_SOURCE}, on a CPU"
    of_node = f"{cluster.node_mtbf_hours:,.0f} h of a node{' (arXiv 2407.21783)' * (cluster.node_mtbf_hours == NODE_MTBF_HOURS)} / nodes"
    return (
        Figure("checkpoint", size, _gb(size), "fp32 weights, moments and average", "exact"),
        Figure("stall", stall, f"{1e3 * stall:,.1f} ms", f"a rank's part / {source}", "predicted"),
        Figure(
            "write",
            write,
            f"{write:,.1f} s",
            f"the checkpoint / {cluster.storage_bandwidth / 1e9:g} GB/s of storage, behind the training",
            "assumed",
        ),
        Figure(
            "failure",
            failure,
            f"every {failure:,.0f} h",
            of_node,
            "assumed",
        ),
        Figure(
            "interval",
            interval,
            f"{interval / 60:,.1f} minutes",
            "Young, Daly: sqrt(2 x stall x time between failures); at least a write, and a minute",
            "predicted",
        ),
        Figure(
            "checkpoint_every", every, f"{every:,} steps", f"--checkpoint-every; the config has {config.checkpoint_every:,}", "predicted"
        ),
        Figure(
            "goodput",
            share,
            f"{share:.2%}",
            f"less stalls, and for each failure half an interval, a write and {cluster.restart_seconds:g} s; evaluation, compiling, "
            "the queue and preemption come on top",
            "predicted",
        ),
    )


def run_figures(config: TrainConfig, option: Option, cluster: Cluster, data: Data, rates: Rates) -> tuple[Figure, ...]:
    """The whole run: sums over its parts."""
    measured = "float8" if config.engine.float8 else "products"
    off, why = (
        (MOST_OFF, "planners of this kind err by 4 to 15%") if measured in rates.measured else (MOST_OFF_ASSUMED, "rates are assumed")
    )
    N, images, flops = cluster.world_size, sum(part.images for part in option.parts), run_flops(config.model, option)
    steps = round(sum(part.steps for part in option.parts))
    days = option.seconds / 86_400 / expected_goodput(config, cluster)
    energy = days * 24 * N * cluster.gpu.watts / 1e3
    figures = [
        Figure("steps", steps, f"{steps:,}", "epochs x samples / global batch" if config.epochs else "as asked", "exact"),
        Figure("images", images, f"{images:,}", "steps x global batch", "exact"),
        Figure("flops", flops, f"{flops:.3g} FLOP", "images x training FLOPs", "exact"),
        Figure(
            "days", days, f"{days:,.3g} days",
            f"steps x step time / goodput; {why}, so {days * (1 - off):,.3g} to {days * (1 + off):,.3g}", "predicted",
        ),
        Figure("gpu_days", days * N, f"{days * N:,.1f} GPU-days", f"x {N} GPUs", "predicted"),
        Figure(
            "energy", energy, f"{energy:,.0f} kWh", f"x {cluster.gpu.watts:g} W of a GPU at full power, nothing else of the machines",
            "predicted",
        ),
    ]  # fmt: skip
    if data.samples:
        epochs = images / data.samples
        figures.insert(2, Figure("epochs", epochs, f"{epochs:,.3g}", f"images / {data.samples:,} samples", "exact"))
    if cluster.price_per_gpu_hour:
        cost = days * 24 * N * cluster.price_per_gpu_hour
        how = (
            f"x {cluster.price_per_gpu_hour:g} a GPU and hour, so {cost * (1 - off):,.0f} to {cost * (1 + off):,.0f}: steps, checkpoints "
            "and failures of this one run; no evaluation, compiling, trials, storage or other runs"
        )
        figures.append(Figure("cost", cost, f"{cost:,.0f}", how, "predicted"))
    if math.isclose(flops, paper_flops(config.recipe), rel_tol=0.01):
        paper = PAPER_CORE_DAYS[config.recipe]
        share = flops / (paper * 86_400 * TPU_CORE)
        how = f"the paper's; of 61.5 TFLOP/s a core (a TPUv3 chip of two cores: 123 in bf16) these FLOPs are {share:.0%} MFU"
        ratio = paper / (days * N)
        figures.append(Figure("paper", paper, f"{paper:,} TPUv3-core-days", how, "measured"))
        figures.append(
            Figure("core_days_a_gpu_day", ratio, f"{ratio:,.1f}", "TPUv3-core-days that a GPU-day stands for", "predicted")
        )  # fmt: skip
    return tuple(figures)


def paper_flops(name: str) -> float:
    """FLOPs of a recipe as it stands whose cost the paper tells, else 0."""
    if name not in PAPER_CORE_DAYS:
        return 0.0
    own = recipe(name, PRETRAIN)
    return own.epochs * dataset_of(name)[0] * train_flops(own.model)


def layout_advice(
    config: TrainConfig, cluster: Cluster, found: Sequence[Option], chosen: Option, asked: Option | None, refused: str
) -> list[str]:
    """In words: what the config's own layout does, what to take and what to say for it, and what else could be taken."""
    room = f"of {cluster.gpu.memory / 1e9:,.0f} GB"
    if asked is None:
        said = [f"The config as it stands cannot be shared out there: {refused}."]
    else:
        does = f"{1e3 * asked.step_seconds:,.1f} ms a step" if asked.fits else "does not fit"
        said = [f"The config as it stands ({_words(asked)}) needs {_gb(asked.memory.total + RESERVE)} {room}: {does}."]
    on = f"On {cluster.nodes} node{'s' * (cluster.nodes > 1)} take"
    if chosen == asked:
        said.append(f"{on} it: no other layout that fits is faster by more than {WORTH - 1:.0%}.")
    else:
        in_the_mean = " in the mean of all phases" * (len(chosen.parts) > 1)
        faster = f", {asked.step_seconds / chosen.step_seconds - 1:+.0%} in speed" if asked and asked.fits else ""
        said.append(
            f"{on} {flags(config, chosen)} ({_words(chosen)}; {_gb(chosen.memory.total + RESERVE)} {room}): "
            f"{1e3 * chosen.step_seconds:,.1f} ms a step{in_the_mean}{faster}, the fastest that fits."
        )
    others = [o for o in found if o.zero_stage == chosen.zero_stage and o.keeps != chosen.keeps and o.fits]
    if others:
        slower = ", ".join(f"{checkpointing(o.keeps)} {o.step_seconds / chosen.step_seconds - 1:+.0%}" for o in others)
        said.append(f"Beside it under ZeRO {chosen.zero_stage}, in time a step: {slower}.")
    third = next((o for o in found if o.zero_stage == 3 and o.keeps == chosen.keeps and o.fits), None)
    if chosen.zero_stage == 3:
        lower = any(o.fits for o in found if o.zero_stage < 3)
        said.append(f"ZeRO 3, as {f'lower stages are slower by more than {ERR - 1:.0%}' if lower else 'nothing lower fits'}.")
    elif third:
        warning = "Warning: the config asks for zero_stage=3. " * (config.engine.zero_stage == 3)
        less, more = chosen.memory.total - third.memory.total, third.step_seconds / chosen.step_seconds - 1
        uncompiled = ", be compiled only where --engine.compile blocks asks for it" * (
            config.engine.compile == "auto" and not config.engine.float8
        )
        nothing = more >= 0 and third.last.micro_batch_size <= chosen.last.micro_batch_size
        said.append(
            f"{warning}ZeRO 3 {'buys nothing' if nothing else 'is not needed'}, as stage {chosen.zero_stage} fits: with a micro-batch of "
            f"{third.last.micro_batch_size} it would hold {_gb(abs(less))} {'less' if less > 0 else 'more'}, gather weights in every "
            f"micro-batch{uncompiled}, and take {abs(more):.0%} {'more' if more > 0 else 'less'} time a step."
        )
    return said


def nodes_advice(cluster: Cluster, rows: Sequence[Row]) -> list[str]:
    """In words: how many nodes to book."""
    best = knee(rows)
    further = next((row for row in rows if row.nodes > best.nodes), None)
    line = (
        f"{best.nodes} node{'s' * (best.nodes > 1)}: {best.days:,.3g} days, {best.gpu_days:,.0f} GPU-days, {best.efficiency:.0%} efficiency"
    )
    if further:
        line += (
            f"; not {further.nodes}: a GPU's share is {further.images_a_gpu} there, {further.exposed:.0%} of a step is "
            f"communication that nothing hides, efficiency is {further.efficiency:.0%}, and {further.days:,.3g} days cost "
            f"{further.gpu_days:,.0f} GPU-days"
        )
    rule = f"the most nodes at {LEAST_EFFICIENCY:.0%} or more of the speed a GPU that {rows[0].nodes} has"
    return [f"Most for the money ({rule}): {line}."]


def _layout(option: Option, part: Part, cluster: Cluster) -> Layout:
    return Layout(option.engine, cluster.world_size, part.micro_batch_size, part.grad_accum_steps, image_size=part.image_size)


def _words(option: Option) -> str:
    sizes = " then ".join(dict.fromkeys(str(part.micro_batch_size) for part in option.parts))
    return f"ZeRO {option.zero_stage}, {checkpointing(option.keeps)}, micro-batch {sizes}"


def checkpointing(keeps: Keeps) -> str:
    """In words."""
    return {"everything": "no checkpointing", "products": "selective checkpointing", "nothing": "full checkpointing"}[keeps]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else byte_size(size)


def sides(height_width: tuple[int, int]) -> str:
    """In words."""
    return "{} x {}".format(*height_width)
