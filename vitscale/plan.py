"""What a run will take, before a cluster is booked: memory, time, traffic, data, checkpoints, days, and which number of nodes to take.

Pure functions over a config, a cluster and what a step takes (`memory.py`, `traffic.py`, `roofline.py`); imports no torch. A `Plan` is a
list of figures, each with its formula or source and whether it is exact, measured, predicted or assumed; text and JSON are the same list.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_tools.page import byte_size, short
from vitscale.config import ConfigError, TrainConfig, ViTConfig, grad_accum_steps
from vitscale.flops import checkpoint_bytes, forward_flops, parameters, train_flops
from vitscale.gpus import GPU
from vitscale.memory import Keeps, Layout, Memory, peak
from vitscale.roofline import Rates, StepTime, step_time
from vitscale.timeline import timeline_of
from vitscale.traffic import collectives, seconds

Basis = Literal["exact", "predicted", "measured", "assumed"]

# Images of each recipe's dataset, by the end of its name. JFT-300M: arXiv 2010.11929, section 4.1; ImageNet: arXiv 2104.10972 and 1409.0575
SAMPLES = {"jft300m": 303_000_000, "imagenet21k": 14_197_122, "imagenet1k": 1_281_167}
# benchmarks/results/2026-11-21-loader-speed-workers.json: 500x375 photographs, all cores of an Intel Xeon, images a second a core
IMAGES_A_CORE = {"exact": 1022.1, "fast": 1024.1}
IMAGE_BYTES = 43_591
# benchmarks/results/2026-11-22-checkpoint-h14-state-1.json: 5.05 GB copied in 0.56 s by one rank of a CPU
SNAPSHOT_BANDWIDTH = 9.0e9
RESERVE = 3e9  # bytes of a GPU for the CUDA context, NCCL's buffers, cuBLAS's workspace and fragmentation
# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected ends in 54 days on 2,048 nodes of 8 H100
NODE_MTBF_HOURS = 54 * 24 * 2048 / 419
PAPER_CORE_DAYS = {"h14": 2500, "l16": 680}  # arXiv 2010.11929, table 2, on JFT-300M
TPU_CORE = 61.5e12  # FLOP/s in bf16: a TPUv3 chip of two cores does 123 TFLOP/s (Cloud TPU documentation, "TPU v3")
SCALE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LEAST_EFFICIENCY = 0.75
ERR = 1.10  # published planners' step times are 4 to 15% off


@dataclass(frozen=True)
class Cluster:
    """What is to be booked, and what is known of it."""

    gpu: GPU
    nodes: int
    gpus_per_node: int
    price_per_gpu_hour: float = 0.0
    storage_bandwidth: float = 5e9
    """Bytes a second that checkpoints of all nodes together are written at."""
    node_mtbf_hours: float = NODE_MTBF_HOURS
    restart_seconds: float = 180.0
    """From a failure to the first step after it."""

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Data:
    """What is read."""

    samples: int
    image_bytes: float = IMAGE_BYTES
    images_a_core: float = 0.0
    """Images a second that a core decodes; 0 takes what was measured."""


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
class Option:
    """One way to lay out the step."""

    zero_stage: int
    keeps: Keeps
    micro_batch_size: int
    """The largest that fits and divides; 0 where none does."""
    memory: Memory | None
    seconds: float


@dataclass(frozen=True)
class Row:
    """A number of nodes."""

    nodes: int
    gpus: int
    scaling: Literal["strong", "weak"]
    global_batch_size: int
    images_a_gpu: int
    micro_batch_size: int
    zero_stage: int
    keeps: Keeps
    step_seconds: float
    images_per_second: float
    efficiency: float
    """Images a second and GPU over that of the fewest nodes."""
    mfu: float
    exposed: float
    """Share of the step in communication that nothing hides."""
    days: float
    gpu_days: float
    basis: Basis = "predicted"


@dataclass(frozen=True)
class Plan:
    """Everything that is told."""

    sections: dict[str, tuple[Figure, ...]]
    options: tuple[Option, ...]
    chosen: Option
    scaling: tuple[Row, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Layouts that fit
# ---------------------------------------------------------------------------------------------------------------------------------------


def options(config: TrainConfig, cluster: Cluster, rates: Rates, compiled: bool) -> tuple[Option, ...]:
    """Each ZeRO stage with each way of checkpointing, at its largest micro-batch. Raises ConfigError where no micro-batch divides."""
    share = images_a_gpu(config.global_batch_size, cluster)
    micro_batches = [d for d in divisors(share) if d % 2 == 0 or not config.mix.is_on]
    if not micro_batches:
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} gives each of {cluster.world_size} GPUs {share}, but mixing needs pairs; "
            f"a multiple of {2 * cluster.world_size} works"
        )
    every = max(1, config.engine.checkpoint_every_n_blocks)
    found = []
    kept: tuple[Keeps, ...] = ("everything", "products", "nothing")
    for stage in (0, 1, 2, 3) if config.engine.precision == "fp32" else (1, 2, 3):
        for keeps in kept:
            engine = replace(config.engine, zero_stage=stage, checkpoint_every_n_blocks=0 if keeps == "everything" else every)
            layouts = [Layout(engine, cluster.world_size, micro, share // micro, keeps, compiled) for micro in micro_batches]
            found.append(_largest(config, cluster, rates, layouts))
    return tuple(found)


def _largest(config: TrainConfig, cluster: Cluster, rates: Rates, layouts: list[Layout]) -> Option:
    """The option of the largest micro-batch that fits, among layouts of rising micro-batches."""
    best = Option(layouts[0].engine.zero_stage, layouts[0].keeps, 0, None, math.inf)
    for layout in layouts:
        memory = peak(config.model, config.optimizer, layout)
        if memory.total + RESERVE > cluster.gpu.memory:
            break
        took = step_time(config.model, config.optimizer, layout, rates, cluster.nodes, cluster.gpus_per_node)
        best = Option(best.zero_stage, best.keeps, layout.micro_batch_size, memory, took.total)
    return best


def choose(found: Sequence[Option]) -> Option:
    """The lowest stage with a layout within 10% of the fastest, which predictions err by, and the fastest layout of that stage.

    Raises ConfigError where none fits.
    """
    fitting = [option for option in found if option.micro_batch_size]
    if not fitting:
        raise ConfigError("no ZeRO stage fits, even one image a GPU with every block checkpointed; take GPUs with more memory")
    fastest = min(option.seconds for option in fitting)
    stage = min(option.zero_stage for option in fitting if option.seconds <= ERR * fastest)
    return min((option for option in fitting if option.zero_stage == stage), key=lambda option: option.seconds)


def images_a_gpu(global_batch_size: int, cluster: Cluster) -> int:
    """Images of a step on each GPU. Raises ConfigError where they cannot be shared out."""
    if global_batch_size % cluster.world_size:
        fitting = [n for n in range(1, cluster.nodes + 1) if global_batch_size % (n * cluster.gpus_per_node) == 0]
        nodes = f"; {fitting[-1]} nodes work" if fitting else ""
        nearest = max(1, round(global_batch_size / cluster.world_size)) * cluster.world_size
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of nodes x gpus_per_node = {cluster.nodes} x "
            f"{cluster.gpus_per_node} = {cluster.world_size}; global_batch_size={nearest} is{nodes}"
        )
    return global_batch_size // cluster.world_size


def divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def layout_of(config: TrainConfig, cluster: Cluster, option: Option, compiled: bool) -> Layout:
    """An option's layout."""
    every = max(1, config.engine.checkpoint_every_n_blocks)
    engine = replace(config.engine, zero_stage=option.zero_stage, checkpoint_every_n_blocks=0 if option.keeps == "everything" else every)  # type: ignore[arg-type]
    k = grad_accum_steps(config.global_batch_size, option.micro_batch_size, cluster.world_size)
    return Layout(engine, cluster.world_size, option.micro_batch_size, k, option.keeps, compiled)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Scaling
# ---------------------------------------------------------------------------------------------------------------------------------------


def scale(config: TrainConfig, cluster: Cluster, rates: Rates, steps: int, compiled: bool, weak: bool) -> tuple[Row, ...]:
    """From 1 to 512 nodes with one global batch, or with as many images a GPU as the cluster asked for has; those that fit and divide."""
    rows: list[Row] = []
    images = steps * config.global_batch_size
    for nodes in sorted({*SCALE, cluster.nodes}):
        there = replace(cluster, nodes=nodes)
        batch = config.global_batch_size * nodes // cluster.nodes if weak else config.global_batch_size
        asked = replace(config, global_batch_size=batch)
        try:
            share = images_a_gpu(batch, there)
            option = choose(options(asked, there, rates, compiled))
        except ConfigError:
            continue
        took = step_time(config.model, config.optimizer, layout_of(asked, there, option, compiled), rates, nodes, cluster.gpus_per_node)
        rate = batch / took.total
        first = rows[0] if rows else None
        efficiency = (rate / there.world_size) / (first.images_per_second / first.gpus) if first else 1.0
        mfu = rate * train_flops(config.model) / (there.world_size * cluster.gpu.peak(config.engine.precision))
        days = images / rate / 86_400 / goodput(config, there)
        rows.append(
            Row(
                nodes,
                there.world_size,
                "weak" if weak else "strong",
                batch,
                share,
                option.micro_batch_size,
                option.zero_stage,
                option.keeps,
                took.total,
                rate,
                efficiency,
                mfu,
                (took.communication - took.hidden) / took.total,
                days,
                days * there.world_size,
            )
        )
    return tuple(rows)


def knee(rows: Sequence[Row], least_efficiency: float = LEAST_EFFICIENCY) -> Row:
    """The most nodes that still give this share of the fewest nodes' speed a GPU; more nodes cost more GPU-days than they are worth."""
    return max((row for row in rows if row.efficiency >= least_efficiency), key=lambda row: row.nodes)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------------------------


def stall_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """For which training stops while a rank's part is copied to host memory; it is written behind the training."""
    return checkpoint_bytes(config.model, config.optimizer) / cluster.world_size / SNAPSHOT_BANDWIDTH


def write_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """Until a checkpoint is durable."""
    return checkpoint_bytes(config.model, config.optimizer) / cluster.storage_bandwidth


def checkpoint_interval(config: TrainConfig, cluster: Cluster) -> float:
    """Seconds between checkpoints that lose least (Young 1974, Daly 2006): sqrt(2 x stall x mean time between failures), and never before
    the one before it is written."""
    failure = cluster.node_mtbf_hours * 3600 / cluster.nodes
    return max(math.sqrt(2 * stall_seconds(config, cluster) * failure), write_seconds(config, cluster), 60.0)


def goodput(config: TrainConfig, cluster: Cluster) -> float:
    """Share of the time that goes into steps that last: less stalls, half an interval and a restart for each failure."""
    failure, interval = cluster.node_mtbf_hours * 3600 / cluster.nodes, checkpoint_interval(config, cluster)
    stalled = stall_seconds(config, cluster) / interval
    return max(0.01, 1 - stalled - (interval / 2 + write_seconds(config, cluster) + cluster.restart_seconds) / failure)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------------------------


def samples_of(recipe: str) -> int:
    """Images of a recipe's dataset, or 0 where its name does not tell."""
    return next((count for dataset, count in SAMPLES.items() if dataset in recipe.replace("-", "")), 0)


def make(config: TrainConfig, cluster: Cluster, data: Data, rates: Rates, compiled: bool = False) -> Plan:
    """The plan of a run. Raises ConfigError where the batch does not divide, nothing fits, or the length of the run is not known."""
    if min(cluster.nodes, cluster.gpus_per_node) < 1:
        raise ConfigError(f"nodes={cluster.nodes} and gpus_per_node={cluster.gpus_per_node} must be at least 1")
    if not config.model.num_classes:
        raise ConfigError("model.num_classes=0 takes the dataset's number, which a plan does not see; give it, as --model.num-classes 1000")
    if not config.steps and not data.samples:
        raise ConfigError(f"epochs={config.epochs:g} of a dataset of unknown size; give --samples, or --steps")
    found = options(config, cluster, rates, compiled)
    option = choose(found)
    layout = layout_of(config, cluster, option, compiled)
    took = step_time(config.model, config.optimizer, layout, rates, cluster.nodes, cluster.gpus_per_node)
    steps = timeline_of(config, data.samples).total_steps
    rows = scale(config, cluster, rates, steps, compiled, weak=False)
    sections = {
        "model": model_figures(config.model),
        "memory": memory_figures(option),
        "traffic": traffic_figures(config.model, layout, cluster, rates),
        "step": step_figures(config, cluster, rates, took),
        "data": data_figures(config, cluster, data, took),
        "checkpoints": checkpoint_figures(config, cluster, took),
        "run": run_figures(config, cluster, data, took, steps),
    }
    weak = scale(config, cluster, rates, steps, compiled, weak=True)
    return Plan(sections, found, option, (*rows, *weak), advice(config, cluster, found, option, rows))


def model_figures(model: ViTConfig) -> tuple[Figure, ...]:
    """Of the model alone."""
    P, forward = parameters(model), forward_flops(model)
    return (
        Figure("parameters", P, f"{P:,}", "sum over the model's tensors", "exact"),
        Figure(
            "tokens",
            model.num_tokens,
            f"{model.num_tokens}",
            f"{_by(model.grid)} patches{' and a class token' * (model.pool == 'cls')}",
            "exact",
        ),
        Figure("forward_flops", forward, f"{forward / 1e9:,.1f} GFLOP an image", "matrix products, 2 a multiply-add", "exact"),
        Figure(
            "train_flops", 3 * forward, f"{3 * forward / 1e9:,.1f} GFLOP an image", "3 x forward; recomputation is never counted", "exact"
        ),
    )


def memory_figures(option: Option) -> tuple[Figure, ...]:
    """Of the chosen layout, by kind, at its highest moment."""
    assert option.memory is not None
    how = {
        "weights": "what the model computes with: 2 P in bf16, 4 P in fp32; stage 3 holds an N-th and gathers the rest",
        "gradients": "stage 1 in bf16: 4 P summed in fp32 and 2 P of the micro-batch; stages 2 and 3: 4 P / N",
        "optimizer": "fp32 masters and moments: 12 P / N with AdamW",
        "average": "an fp32 average of the weights, where one is kept",
        "activations": "what autograd keeps: eager and not checkpointed 8 width + 2 mlp_dim numbers a token and block",
        "buckets": "gradients on their way between GPUs, and DeepSpeed's copies of them",
        "inputs": "images in fp32, and two micro-batches in uint8",
    }
    kinds = [Figure(kind, size, _gb(size), how[kind], "predicted") for kind, size in option.memory.kinds().items()]
    reserve = Figure("reserve", RESERVE, _gb(RESERVE), "CUDA context, NCCL, cuBLAS, fragmentation: an allowance", "assumed")
    total = option.memory.total + RESERVE
    return (*kinds, reserve, Figure("peak", total, _gb(total), f"the sum, in the {option.memory.moment}", "predicted"))


def traffic_figures(model: ViTConfig, layout: Layout, cluster: Cluster, rates: Rates) -> tuple[Figure, ...]:
    """Each collective of a step."""
    figures = []
    for one in collectives(model, layout):
        sent = one.sent(layout.world_size)
        spent = seconds(one, cluster.nodes, cluster.gpus_per_node, rates.inside, rates.between)
        behind = "nothing hides it" if one.hides == "nothing" else f"runs behind the {one.hides} pass"
        how = f"{one.kind} of {_gb(one.bytes)}, {one.times} a step; {1e3 * spent:,.1f} ms; {behind}"
        figures.append(Figure(one.what.replace(", ", "_").replace(" ", "_"), sent, _gb(sent), how, "predicted"))
    total = sum(figure.value for figure in figures)  # type: ignore[misc]
    link = f"{rates.inside.bandwidth / 1e9:,.0f} GB/s inside a node, {rates.between.bandwidth / 1e9:,.0f} GB/s a GPU between nodes"
    return (*figures, Figure("sent", total, _gb(total), f"the sum; {link}", "predicted"))


def step_figures(config: TrainConfig, cluster: Cluster, rates: Rates, took: StepTime) -> tuple[Figure, ...]:
    """A step's time by what it goes to."""
    rate = config.global_batch_size / took.total
    flops = rate * train_flops(config.model) / cluster.world_size
    top = cluster.gpu.peak(config.engine.precision)
    how = {
        "products": f"3 x forward products / {rates.products / 1e12:,.3g} TFLOP/s",
        "attention": f"3.5 x forward attention / {rates.attention / 1e12:,.3g} TFLOP/s",
        "elementwise": f"LayerNorm, GELU, additions: bytes / {rates.memory / 1e9:,.4g} GB/s",
        "recomputation": "what checkpointed blocks compute again",
        "waiting_for_launches": f"kernels x {rates.launch * 1e6:.3g} us of the host, where the device is faster than that",
        "update": "passes over gradients, the norm, the optimizer: bytes / memory bandwidth",
        "communication": "all collectives, hidden or not",
        "hidden": "of the communication, what runs behind compute; taken off",
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
        figures.append(
            Figure(
                "mfu_of_measured",
                flops / reached,
                f"{flops / reached:.1%}",
                f"of {reached / 1e12:,.0f} TFLOP/s, what a product reached",
                "predicted",
            )
        )
    return tuple(figures)


def data_figures(config: TrainConfig, cluster: Cluster, data: Data, took: StepTime) -> tuple[Figure, ...]:
    """What the loader must deliver."""
    rate = config.global_batch_size / took.total / cluster.nodes
    a_core = data.images_a_core or IMAGES_A_CORE[config.stream.decode]
    source = "given" if data.images_a_core else "benchmarks/results/2026-11-21-loader-speed-workers.json, 500x375 photographs"
    basis: Basis = "assumed" if data.images_a_core else "measured"
    read = rate * data.image_bytes
    figures = [
        Figure("images_per_second_a_node", rate, f"{rate:,.0f} images/s", "images a second / nodes", "predicted"),
        Figure("images_a_core", a_core, f"{a_core:,.0f} images/s", f"decoded and augmented by a core: {source}", basis),
        Figure("cores_a_node", rate / a_core, f"{rate / a_core:,.1f} cores", "the two above, divided; RandAugment costs more", "predicted"),
        Figure("bytes_a_node", read, f"{read / 1e6:,.1f} MB/s", f"x {data.image_bytes:,.0f} bytes an image", "predicted"),
    ]
    if data.samples:
        size = data.samples * data.image_bytes
        figures.append(Figure("dataset", size, f"{size / 1e12:,.3g} TB", f"{data.samples:,} images x bytes an image", "assumed"))
    return tuple(figures)


def checkpoint_figures(config: TrainConfig, cluster: Cluster, took: StepTime) -> tuple[Figure, ...]:
    """How large, how often, and what failures cost."""
    size, stall, write = checkpoint_bytes(config.model, config.optimizer), stall_seconds(config, cluster), write_seconds(config, cluster)
    interval, share = checkpoint_interval(config, cluster), goodput(config, cluster)
    failure = cluster.node_mtbf_hours / cluster.nodes
    every = max(1, round(interval / took.total))
    source = "copying at 9 GB/s a rank: benchmarks/results/2026-11-22-checkpoint-h14-state-1.json, on a CPU"
    return (
        Figure("checkpoint", size, _gb(size), "fp32 weights, moments and average", "exact"),
        Figure("stall", stall, f"{1e3 * stall:,.1f} ms", f"a rank's part / {source}", "predicted"),
        Figure("write", write, f"{write:,.1f} s", f"/ {cluster.storage_bandwidth / 1e9:g} GB/s of storage, behind the training", "assumed"),
        Figure(
            "failure",
            failure,
            f"every {failure:,.0f} h",
            f"{cluster.node_mtbf_hours:,.0f} h of a node (arXiv 2407.21783) / nodes",
            "assumed",
        ),
        Figure(
            "interval",
            interval,
            f"{interval / 60:,.1f} minutes",
            "Young, Daly: sqrt(2 x stall x time between failures); at least a minute",
            "predicted",
        ),
        Figure(
            "checkpoint_every", every, f"{every:,} steps", f"--checkpoint-every; the config has {config.checkpoint_every:,}", "predicted"
        ),
        Figure(
            "goodput", share, f"{share:.2%}", f"less stalls, and half an interval and {cluster.restart_seconds:g} s a failure", "predicted"
        ),
    )


def run_figures(config: TrainConfig, cluster: Cluster, data: Data, took: StepTime, steps: int) -> tuple[Figure, ...]:
    """The whole run."""
    N, images = cluster.world_size, steps * config.global_batch_size
    days = steps * took.total / 86_400 / goodput(config, cluster)
    flops = images * train_flops(config.model)
    energy = days * 24 * N * cluster.gpu.watts / 1e3
    figures = [
        Figure("steps", steps, f"{steps:,}", "epochs x samples / global batch" if config.epochs else "as asked", "exact"),
        Figure("images", images, f"{images:,}", "steps x global batch", "exact"),
        Figure(
            "epochs",
            images / data.samples if data.samples else 0.0,
            f"{images / data.samples if data.samples else 0:,.3g}",
            "images / samples",
            "exact",
        ),
        Figure("flops", flops, f"{flops:.3g} FLOP", "images x training FLOPs", "exact"),
        Figure("days", days, f"{days:,.2f} days", "steps x step time / goodput", "predicted"),
        Figure("gpu_days", days * N, f"{days * N:,.1f} GPU-days", f"x {N} GPUs", "predicted"),
        Figure(
            "energy",
            energy,
            f"{energy:,.0f} kWh",
            f"x {cluster.gpu.watts:g} W of a GPU at full power, nothing else of the machines",
            "predicted",
        ),
    ]
    if cluster.price_per_gpu_hour:
        cost = days * 24 * N * cluster.price_per_gpu_hour
        figures.append(Figure("cost", cost, f"{cost:,.0f}", f"x {cluster.price_per_gpu_hour:g} a GPU and hour", "predicted"))
    size = next((name for name in PAPER_CORE_DAYS if f"vit-{name}-jft300m" == config.recipe), "")
    if size:
        paper = PAPER_CORE_DAYS[size]
        share = flops / (paper * 86_400 * TPU_CORE)
        how = f"the paper's; of 61.5 TFLOP/s a core (a TPUv3 chip of two cores: 123 in bf16) these FLOPs are {share:.0%} MFU"
        figures.append(Figure("paper", paper, f"{paper:,} TPUv3-core-days", how, "measured"))
        figures.append(
            Figure(
                "core_days_a_gpu_day",
                paper / (days * N),
                f"{paper / (days * N):,.1f}",
                "TPUv3-core-days that a GPU-day stands for",
                "predicted",
            )
        )
    return tuple(figures)


def advice(config: TrainConfig, cluster: Cluster, found: Sequence[Option], chosen: Option, rows: Sequence[Row]) -> tuple[str, ...]:
    """In words: the layout and why, warnings, and the number of nodes."""
    assert chosen.memory is not None
    layout = f"ZeRO {chosen.zero_stage}, {_keeps(chosen.keeps)}, micro_batch_size={chosen.micro_batch_size}"
    others = [o for o in found if o.zero_stage == chosen.zero_stage and o.keeps != chosen.keeps and o.memory]
    slower = "".join(f"; {_keeps(o.keeps)} {o.seconds / chosen.seconds - 1:+.0%}" for o in others)
    said = [
        f"Take {layout}: {1e3 * chosen.seconds:,.1f} ms a step, the lowest stage within 10% of the fastest, as predictions err{slower}."
    ]
    third = next((o for o in found if o.zero_stage == 3 and o.keeps == chosen.keeps and o.memory), None)
    if chosen.zero_stage < 3 and third and third.memory:
        saved = chosen.memory.total - third.memory.total
        asked = "warning: the config asks for zero_stage=3. " * (config.engine.zero_stage == 3)
        said.append(
            f"{asked}ZeRO 3 buys nothing: all fits under stage {chosen.zero_stage}; stage 3 would save {_gb(saved)} of "
            f"{_gb(chosen.memory.total)} and gather weights in every pass."
        )
    best = knee(rows)
    further = next((row for row in rows if row.nodes > best.nodes), None)
    line = (
        f"{best.nodes} node{'s' * (best.nodes > 1)}: {best.days:,.1f} days, {best.gpu_days:,.0f} GPU-days, {best.efficiency:.0%} efficiency"
    )
    if further:
        line += (
            f"; not {further.nodes}: a GPU's share is {further.images_a_gpu} there, {further.exposed:.0%} of a step is "
            f"communication that nothing hides, efficiency is {further.efficiency:.0%}, and {further.days:,.1f} days cost "
            f"{further.gpu_days:,.0f} GPU-days"
        )
    said.append(f"Take {line}. (The most nodes at {LEAST_EFFICIENCY:.0%} or more of the speed a GPU that {rows[0].nodes} has.)")
    return tuple(said)


def _keeps(keeps: Keeps) -> str:
    return {"everything": "no checkpointing", "products": "selective checkpointing", "nothing": "full checkpointing"}[keeps]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else byte_size(size)


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


# ---------------------------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------------------------


def text(plan: Plan) -> str:
    """What the terminal shows."""
    lines = []
    titles = {"memory": "memory of a GPU", "traffic": "traffic of a step, of a GPU", "step": "a step", "run": "the run"}
    for name, figures in plan.sections.items():
        lines += ["", titles.get(name, name)]
        lines += [f"  {f.name.replace('_', ' '):<26}{f.said:>26}  {f.basis:<10}{f.how}" for f in figures]
    lines += ["", "what fits: the largest micro-batch, GB by kind at the highest moment, predicted"]
    kinds = list(plan.chosen.memory.kinds()) if plan.chosen.memory else []
    lines.append(f"  {'ZeRO':<6}{'checkpointing':<26}{'micro':>6}{'step ms':>10}{'peak':>8}{''.join(f'{kind:>12}' for kind in kinds)}")
    for o in plan.options:
        row = f"  {o.zero_stage:<6}{_keeps(o.keeps):<26}"
        if o.memory:
            row += f"{o.micro_batch_size:>6}{1e3 * o.seconds:>10.1f}{(o.memory.total + RESERVE) / 1e9:>8.1f}"
            row += "".join(f"{size / 1e9:>12.2f}" for size in o.memory.kinds().values())
        lines.append(row + (" <- chosen" if o == plan.chosen else "" if o.memory else "does not fit"))
    for kind, told in (("strong", "one global batch"), ("weak", "the same images a GPU")):
        lines += ["", f"{kind} scaling ({told})"]
        lines.append(
            f"  {'nodes':>5}{'GPUs':>6}{'batch':>9}{'a GPU':>7}{'micro':>7}{'ZeRO':>6}{'step ms':>10}{'images/s':>11}{'efficiency':>12}"
            f"{'MFU':>7}{'days':>9}{'GPU-days':>10}"
        )
        lines += [
            f"  {r.nodes:>5}{r.gpus:>6}{r.global_batch_size:>9}{r.images_a_gpu:>7}{r.micro_batch_size:>7}{r.zero_stage:>6}"
            f"{1e3 * r.step_seconds:>10.1f}{r.images_per_second:>11,.0f}{r.efficiency:>12.0%}"
            f"{r.mfu:>7.1%}{r.days:>9,.2f}{r.gpu_days:>10,.1f}  {r.basis}"
            for r in plan.scaling
            if r.scaling == kind
        ]
    return "\n".join([*lines, "", *plan.advice]).lstrip("\n")


def svg(plan: Plan) -> str:
    """Days and efficiency against nodes, both axes' nodes by powers of two: a file by itself."""
    rows = [row for row in plan.scaling if row.scaling == "strong"]
    width, height, left, right, top, bottom = 720, 360, 64, 64, 40, 48
    low, high = (math.log2(f(row.nodes for row in rows)) for f in (min, max))
    most = max(row.days for row in rows)

    def x(nodes: int) -> float:
        return left + (math.log2(nodes) - low) / max(1e-9, high - low) * (width - left - right)

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    drawn = []
    for i in range(5):
        at = y(i / 4)
        drawn.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e8f0"/>')
        drawn.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{short(most * i / 4)}</text>')
        drawn.append(f'<text x="{width - right + 8}" y="{at + 4:.1f}">{i / 4:.0%}</text>')
    drawn += [f'<text x="{x(r.nodes):.1f}" y="{height - bottom + 18}" text-anchor="middle">{r.nodes}</text>' for r in rows]
    for color, name, share in (("#2563eb", "days", lambda r: r.days / most), ("#ea7317", "efficiency", lambda r: min(1.0, r.efficiency))):
        points = [(x(r.nodes), y(share(r))) for r in rows]  # type: ignore[no-untyped-call]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"><title>{name}</title></polyline>')
        drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
    drawn.append(f'<text x="{left}" y="22" fill="#2563eb">days</text>')
    drawn.append(f'<text x="{width - right}" y="22" fill="#ea7317" text-anchor="end">efficiency</text>')
    drawn.append(f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">nodes (predicted, one global batch)</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="#475569"><rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )
