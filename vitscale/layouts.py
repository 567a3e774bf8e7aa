"""How a run can be laid over a cluster: which ZeRO stages, ways of checkpointing and micro-batches fit, which to choose, and how it scales.

Pure functions; imports no torch. A run is its parts (`timeline.py`): its phases, or one; each has its own images, batch, memory and step,
and what is told of the run is a sum over them.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from vitscale.check import check_engine
from vitscale.config import (
    ConfigError,
    EngineConfig,
    Keeps,
    Phase,
    TrainConfig,
    ViTConfig,
    changes,
    flatten,
    grad_accum_steps,
    to_dict,
    written,
)
from vitscale.failures import expected_goodput
from vitscale.flops import train_flops
from vitscale.gpus import GPU, Cluster
from vitscale.memory import Layout, Memory, peak
from vitscale.roofline import Rates, StepTime, step_time
from vitscale.timeline import Span, timeline_of

RESERVE = 3e9  # bytes of a GPU for the CUDA context, NCCL's buffers, cuBLAS's workspace and fragmentation
SCALE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LEAST_EFFICIENCY = 0.75
ERR = 1.10  # a lower stage is taken up to so much slower: published planners' step times are 4 to 15% off
WORTH = 1.02  # a step that is faster by less is worth no other settings
_KEEPS: tuple[Keeps, ...] = ("everything", "products", "nothing")  # from what computes least again


@dataclass(frozen=True)
class Part:
    """Steps of a run that are alike, laid out: a phase, or what follows the last."""

    images: int
    """That they see together."""
    image_size: tuple[int, int]
    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    memory: Memory
    took: StepTime
    """A step."""

    @property
    def steps(self) -> float:
        """How many they are: a whole number but under another batch than the run's own."""
        return self.images / self.global_batch_size

    @property
    def seconds(self) -> float:
        """All of them, nothing going wrong."""
        return self.steps * self.took.total


@dataclass(frozen=True)
class Option:
    """One way to lay out the steps of a run."""

    engine: EngineConfig
    fits: bool
    parts: tuple[Part, ...]
    """Each with the largest micro-batch that fits and divides; none where one has none."""
    step_seconds: float
    """The mean step's."""

    @property
    def zero_stage(self) -> int:
        """Its ZeRO stage."""
        return self.engine.zero_stage

    @property
    def keeps(self) -> Keeps:
        """What a checkpointed block keeps; everything where none is."""
        return self.engine.keeps(0)

    @property
    def memory(self) -> Memory:
        """Of the part that holds most."""
        return max((part.memory for part in self.parts), key=lambda memory: memory.total)

    @property
    def last(self) -> Part:
        """The part with the run's own settings."""
        return self.parts[-1]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(part.seconds for part in self.parts)


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
    cost: float
    """0 where no price is given."""


Spans = Sequence[tuple[int, Span]]  # of each span the images that its steps see together


def spans_of(config: TrainConfig, samples: int) -> list[tuple[int, Span]]:
    """Those of a run. Raises ConfigError."""
    timeline = timeline_of(config, samples)
    return [(timeline.samples_at(end) - span.first_sample, span) for end, span in zip(timeline.ends, timeline.spans, strict=True)]


def engines(engine: EngineConfig) -> Iterator[EngineConfig]:
    """Each ZeRO stage with each way of checkpointing, of those that a run takes (`check.check_engine`)."""
    every = max(1, engine.checkpoint_every_n_blocks)
    for stage, (n, keeps) in itertools.product((0, 1, 2, 3), ((0, "nothing"), (every, "products"), (every, "nothing"))):
        found = replace(engine, zero_stage=stage, checkpoint_every_n_blocks=n, checkpoint_keeps=keeps)  # type: ignore[arg-type]
        with contextlib.suppress(ConfigError):
            check_engine(found)
            yield found


def options(config: TrainConfig, cluster: Cluster, rates: Rates, spans: Spans) -> tuple[Option, ...]:
    """Each stage and way of checkpointing at its largest micro-batches. Raises ConfigError where a batch cannot be shared out."""
    for number, (_, span) in enumerate(spans[:-1], start=1):
        if rest := span.global_batch_size % cluster.world_size:
            raise ConfigError(
                f"schedule.phases: the {number}. of {len(spans) - 1} has global_batch_size={span.global_batch_size}, not a multiple of "
                f"{cluster.world_size} GPUs; {span.global_batch_size - rest + cluster.world_size} is"
            )
    candidates = [micro_batches(span.global_batch_size, cluster, config.mix.is_on) for _, span in spans]
    found = []
    for engine in engines(config.engine):
        parts = [
            _largest(sizes, partial(_part, config, cluster, rates, engine, images, span), cluster.gpu)
            for (images, span), sizes in zip(spans, candidates, strict=True)
        ]
        laid = [part for part in parts if part]
        found.append(_option(engine, laid if len(laid) == len(parts) else [], cluster))
    return tuple(found)


def asked_for(config: TrainConfig, cluster: Cluster, rates: Rates, spans: Spans) -> Option:
    """The config's own layout, whether it fits or not. Raises ConfigError where its micro-batches do not divide its batches."""
    parts = [_part(config, cluster, rates, config.engine, images, span, span.micro_batch_size) for images, span in spans]
    return _option(config.engine, parts, cluster)


def _option(engine: EngineConfig, parts: Sequence[Part], cluster: Cluster) -> Option:
    fits = bool(parts) and all(part.memory.total + RESERVE <= cluster.gpu.memory for part in parts)
    mean = sum(part.seconds for part in parts) / sum(part.steps for part in parts) if parts else math.inf
    return Option(engine, fits, tuple(parts), mean)


def _part(
    config: TrainConfig, cluster: Cluster, rates: Rates, engine: EngineConfig, images: int, span: Span, micro_batch_size: int
) -> Part:  # fmt: skip
    k = grad_accum_steps(span.global_batch_size, micro_batch_size, cluster.world_size)
    layout = Layout(engine, cluster.world_size, micro_batch_size, k, image_size=span.image_size)
    took = step_time(config.model, config.optimizer, layout, rates, cluster.nodes, cluster.gpus_per_node)
    memory = peak(config.model, config.optimizer, layout)
    return Part(images, span.image_size, span.global_batch_size, micro_batch_size, k, memory, took)


def _largest(sizes: Sequence[int], lay_out: Callable[[int], Part], gpu: GPU) -> Part | None:
    """The part with the largest of rising micro-batches that fits: by halves, as a larger one holds more, but for the largest.

    A step of that one has a single micro-batch, and no sums.
    """
    if (whole := lay_out(sizes[-1])).memory.total + RESERVE <= gpu.memory:
        return whole
    best, low, high = None, 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        part = lay_out(sizes[middle])
        if part.memory.total + RESERVE <= gpu.memory:
            best, low = part, middle + 1
        else:
            high = middle
    return best


def micro_batches(global_batch_size: int, cluster: Cluster, mixes: bool) -> list[int]:
    """Those that divide a GPU's share of a batch, in pairs where it is mixed. Raises ConfigError where there is none."""
    share = images_a_gpu(global_batch_size, cluster)
    found = [d for d in divisors(share) if d % 2 == 0 or not mixes]
    if not found:
        raise ConfigError(
            f"global_batch_size={global_batch_size} gives each of {cluster.world_size} GPUs {share}, but mixing needs pairs; "
            f"a multiple of {2 * cluster.world_size} works"
        )
    return found


def choose(found: Sequence[Option], asked: Option | None = None) -> Option:
    """The fastest layout that fits; of those within 2% of it the config's own, or else the lowest stage with the least checkpointing.

    Stage 3 only where nothing lower fits, or where it is faster by more than 10% (`ERR`). Raises ConfigError where none fits.
    """
    fitting = [option for option in found if option.fits]
    if not fitting:
        raise ConfigError("no ZeRO stage fits, even one image a GPU with every block checkpointed; take GPUs with more memory")
    lower = [option for option in fitting if option.zero_stage < 3]
    among = lower if _least(lower) <= ERR * _least(fitting) else fitting
    if asked and asked.fits and (asked.zero_stage < 3 or among is fitting) and asked.step_seconds <= WORTH * _least(among):
        return asked
    near = [option for option in among if option.step_seconds <= WORTH * _least(among)]
    return min(near, key=lambda option: (option.zero_stage, _KEEPS.index(option.keeps), option.step_seconds))


def _least(options: Sequence[Option]) -> float:
    return min((option.step_seconds for option in options), default=math.inf)


def images_a_gpu(global_batch_size: int, cluster: Cluster) -> int:
    """Images of a step on each GPU. Raises ConfigError where they cannot be shared out."""
    if global_batch_size % cluster.world_size:
        share, rest = divmod(global_batch_size, cluster.gpus_per_node)
        fitting = [n for n in divisors(share) if n <= cluster.nodes] if share and not rest else []
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


def advised(config: TrainConfig, option: Option) -> TrainConfig:
    """The config with an option's layout."""
    own = option.last.micro_batch_size
    phases = [
        replace(phase, micro_batch_size=part.micro_batch_size if part.micro_batch_size != own else None)
        for phase, part in zip(config.schedule.phases, option.parts, strict=False)
    ]
    kept = tuple(phase for phase in phases if phase != Phase(phase.until))  # others had a micro-batch of their own alone
    return replace(config, micro_batch_size=own, engine=option.engine, schedule=replace(config.schedule, phases=kept))


def flags(config: TrainConfig, option: Option) -> str:
    """What to say on the command line so that a run has an option's layout."""
    wanted = advised(config, option)
    values = flatten(to_dict(wanted))
    said = [
        f"--{name.replace('_', '-')} {values[name]}" for name in changes(config, wanted) if not name.startswith("schedule.phases")
    ]  # fmt: skip
    if wanted.schedule.phases != config.schedule.phases:
        said.append(" ".join(("--schedule.phases", *map(written, wanted.schedule.phases))))
    return " ".join(said)


def scale(config: TrainConfig, cluster: Cluster, rates: Rates, spans: Spans, chosen: Option, *, weak: bool) -> tuple[Row, ...]:
    """From 1 to 512 nodes with one global batch, or with as many images a GPU as the cluster asked for has; those that fit and divide.

    All see the same images, each number of nodes in the layout that `choose` takes there.
    """
    rows: list[Row] = []
    for nodes in sorted({*SCALE, cluster.nodes}):
        there = replace(cluster, nodes=nodes)
        scaled = [
            (images, replace(span, global_batch_size=span.global_batch_size * nodes // cluster.nodes) if weak else span)
            for images, span in spans
        ]
        try:
            option = chosen if nodes == cluster.nodes else choose(options(config, there, rates, scaled))
        except ConfigError:
            continue
        steps, last = sum(part.steps for part in option.parts), option.last
        rate = sum(part.images for part in option.parts) / option.seconds
        first = rows[0] if rows else None
        efficiency = (rate / there.world_size) / (first.images_per_second / first.gpus) if first else 1.0
        mfu = run_flops(config.model, option) / option.seconds / (there.world_size * cluster.gpu.peak(config.engine.precision))
        exposed = sum(part.steps * (part.took.communication - part.took.hidden) for part in option.parts) / option.seconds
        days = option.seconds / 86_400 / expected_goodput(config, there)
        rows.append(
            Row(
                nodes,
                there.world_size,
                "weak" if weak else "strong",
                last.global_batch_size,
                last.global_batch_size // there.world_size,
                last.micro_batch_size,
                option.zero_stage,
                option.keeps,
                option.seconds / steps,
                rate,
                efficiency,
                mfu,
                exposed,
                days,
                days * there.world_size,
                days * there.world_size * 24 * cluster.price_per_gpu_hour,
            )
        )
    return tuple(rows)


def run_flops(model: ViTConfig, option: Option) -> float:
    """What training needs over all parts, each at its own image size."""
    return sum(part.images * train_flops(replace(model, image_size=part.image_size)) for part in option.parts)


def knee(rows: Sequence[Row], least_efficiency: float = LEAST_EFFICIENCY) -> Row:
    """The most nodes that still give this share of the fewest nodes' speed a GPU; more nodes cost more GPU-days than they are worth."""
    return max((row for row in rows if row.efficiency >= least_efficiency), key=lambda row: row.nodes)
