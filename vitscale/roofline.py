"""The time of a training step from what a device can do: work over rates. Pure functions; imports no torch.

A micro-batch takes the longer of what the device computes (matrix products, attention, everything that only moves memory) and what the host
takes to launch it; the step adds the update and the communication that nothing hides. The rates are assumed shares of a data sheet's peaks
until a calibration (benchmarks/calibrate.py) measured them, and so is every time that is told: predicted.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscale.config import ConfigError, OptimizerConfig, ViTConfig
from vitscale.flops import forward_flops, moment_elements, parameters
from vitscale.gpus import GPU
from vitscale.memory import Layout, tensor_sizes
from vitscale.traffic import Link, collectives, seconds

# Assumed where nothing was measured: shares of the data sheet
PRODUCTS_SHARE = (
    0.60  # of the dense peak, over a block's four products; with the next, ViT-H/14 at batch 256 comes out at conservative kernels' roof
)
ATTENTION_SHARE = 0.30  # of the dense peak, forward and backward at head dimensions of 64 to 80
MEMORY_SHARE = 0.85  # of the memory's bandwidth, for LayerNorm, GELU, additions, the optimizer
LINK_SHARE = 0.75  # of a link's bandwidth, for rings of large buffers
INSIDE_LATENCY, BETWEEN_LATENCY = 3e-6, 5e-6  # seconds a hop
HIDDEN_SHARE = 0.5  # of communication that could run behind compute: NCCL takes SMs, and stage 3 waits at modules' bounds
HOOK_SECONDS = 30e-6  # of the host for one of stage 3's hooks around a module
LAUNCH_SECONDS = 6e-6  # of the host for a kernel, through torch's eager dispatch


@dataclass(frozen=True)
class Rates:
    """What a device reaches."""

    products: float
    """FLOP/s of matrix products."""
    attention: float
    """FLOP/s of fused attention, forward and backward."""
    memory: float
    """Bytes a second read and written by kernels that compute little."""
    launch: float
    """Seconds of the host for a kernel."""
    inside: Link
    """Between ranks of a node."""
    between: Link
    """From a rank to another node."""
    measured: tuple[str, ...] = ()
    """Which of these a calibration measured."""
    source: str = ""
    """Where the figures come from, in words."""


def assumed(gpu: GPU, precision: str, network: float = 0.0) -> Rates:
    """Rates from a data sheet. `network` is bytes a second of a rank to other nodes; 0 takes that of the maker's own system."""
    peak = gpu.peak(precision)
    return Rates(
        PRODUCTS_SHARE * peak,
        ATTENTION_SHARE * peak,
        MEMORY_SHARE * gpu.bandwidth,
        LAUNCH_SECONDS,
        Link(LINK_SHARE * gpu.link, INSIDE_LATENCY),
        Link(LINK_SHARE * (network or gpu.network), BETWEEN_LATENCY),
        source=f"{PRODUCTS_SHARE:.0%} of the peak for products, {ATTENTION_SHARE:.0%} for attention, {MEMORY_SHARE:.0%} of memory's, "
        f"{LINK_SHARE:.0%} of links ({gpu.source}): assumed, not measured",
    )


def calibrated(rates: Rates, file: Path) -> Rates:
    """The rates of a file that benchmarks/calibrate.py wrote, over those assumed. Raises ConfigError."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        told = found["rates"]
        figures: dict[str, Any] = {name: float(told[name]) for name in ("products", "attention", "memory", "launch") if name in told}
        links: dict[str, Any] = {name: Link(*map(float, told[name])) for name in ("inside", "between") if name in told}
        where = f"measured on {found['machine']['device']}, {found['date'][:10]} ({file.name})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"calibration={file} is not what benchmarks/calibrate.py writes: {error}") from None
    if not figures or not all(value > 0 for value in figures.values()):
        raise ConfigError(f"calibration={file} holds no rates above 0; benchmarks/calibrate.py measures them")
    measured = (*figures, *links)
    return replace(rates, **figures, **links, measured=measured, source=f"{', '.join(measured)} {where}")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to."""

    products: float
    attention: float
    elementwise: float
    recomputation: float
    waiting_for_launches: float
    """What the host takes longer to launch the kernels than the device to run them."""
    update: float
    """Gradients moved and added up, the norm, the optimizer, the average."""
    communication: float
    """All of it, whether hidden or not."""
    hidden: float
    """The part of the communication behind which the device computes."""

    @property
    def total(self) -> float:
        """Of a step."""
        compute = self.products + self.attention + self.elementwise + self.recomputation + self.waiting_for_launches
        return compute + self.update + self.communication - self.hidden


def step_time(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout, rates: Rates, nodes: int, gpus_per_node: int) -> StepTime:
    """Of an optimizer step of all its micro-batches."""
    B, k = layout.micro_batch_size, layout.grad_accum_steps
    attention = attention_flops(model)
    products = 3 * B * (forward_flops(model) - attention) / rates.products
    attending = 3.5 * B * attention / rates.attention  # the backward pass computes the scores again: five products to the forward's two
    elementwise = B * elementwise_bytes(model, layout) / rates.memory
    again = checkpointed_share(model, layout)
    forward = B * (forward_flops(model) - attention) / rates.products + B * attention / rates.attention + elementwise / 3
    repeated = again * (forward if layout.keeps == "nothing" else elementwise / 3)
    device = products + attending + elementwise + repeated
    host = kernels(model, layout) * rates.launch + hooks(model, layout) * HOOK_SECONDS
    moved = update_bytes(model, optimizer, layout) / rates.memory
    backward = k * (device - forward)
    spent = {"forward": 0.0, "backward": 0.0, "nothing": 0.0}
    for collective in collectives(model, layout):
        spent[collective.hides] += seconds(collective, nodes, gpus_per_node, rates.inside, rates.between)
    hidden = min(HIDDEN_SHARE * spent["forward"], k * forward) + min(HIDDEN_SHARE * spent["backward"], backward)
    return StepTime(
        k * products, k * attending, k * elementwise, k * repeated, k * max(0.0, host - device), moved, sum(spent.values()), hidden
    )


def attention_flops(model: ViTConfig) -> int:
    """FLOPs of one image's scores and weighted sums, forward."""
    return 4 * model.depth * model.num_tokens**2 * model.width


def checkpointed_share(model: ViTConfig, layout: Layout) -> float:
    """Of the blocks, those that compute again in the backward pass."""
    if layout.keeps == "everything":
        return 0.0
    every = max(1, layout.engine.checkpoint_every_n_blocks)
    return -(-model.depth // every) / model.depth


def elementwise_bytes(model: ViTConfig, layout: Layout) -> int:
    """Bytes an image that kernels which compute little read and write, forward and backward.

    Of a token in a block, in numbers: LayerNorm 2D forward and 3D backward, twice; residual additions 3D forward and 3D of gradients,
    twice; GELU 2M forward and 3M backward; gradients of biases read 5D + M. Compiled, an addition is part of the LayerNorm that follows:
    6D less; and the bias's sum is part of GELU's backward pass: M less. The loss: ten passes over the logits in fp32.
    """
    D, M = model.width, model.mlp_dim
    numbers = 27 * D + 6 * M - (6 * D + M) * layout.compiled
    per_block = numbers * layout.width * model.num_tokens
    pixels = 3 * model.image_size[0] * model.image_size[1]
    return model.depth * per_block + 10 * 4 * model.num_classes + pixels * (1 + 12 * 2 + 4 + layout.width)


def update_bytes(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> int:
    """Bytes that a rank reads and writes once a step (and, of gradients, in each micro-batch) to turn gradients into new weights.

    DeepSpeed's passes over P gradients: under stage 1 in bf16 each micro-batch is added to fp32 (2 + 4 + 4), and the sum copied to bf16,
    back, measured, clipped and cleared (6 + 6 + 4 + 8 + 4); the others copy gradients to a bucket, flatten it and take their part out.
    The update reads and writes masters, moments and average of this rank's N-th, and writes weights.
    """
    P, w, k = parameters(model), layout.width, layout.grad_accum_steps
    stage = layout.engine.zero_stage
    share = 1 if stage == 0 else layout.world_size
    state = ((12 + 12 * bool(optimizer.average_decay) + w) * P + 8 * moment_elements(model, optimizer)) // share
    if stage == 0:
        return state + (4 * w + 12) * P
    if stage == 1 and layout.engine.precision == "bf16":
        return state + 10 * P * k + 28 * P
    return state + 4 * w * P * (k if stage > 1 else 1) + 24 * P // share


def kernels(model: ViTConfig, layout: Layout) -> int:
    """Kernels of a micro-batch, of which the host launches each: some 16 forward and 34 backward in a block (9 and 16 compiled)."""
    block = 25 if layout.compiled else 50
    tensors = sum(map(len, tensor_sizes(model)))
    return 60 + model.depth * block + 3 * tensors + checkpointed_block_kernels(model, layout)


def hooks(model: ViTConfig, layout: Layout) -> int:
    """Calls of stage 3's hooks in a micro-batch: before and after each of some 11 modules a block, forward and backward."""
    return 4 * 11 * model.depth if layout.engine.zero_stage == 3 else 0


def checkpointed_block_kernels(model: ViTConfig, layout: Layout) -> int:
    """Those that are launched again."""
    return round(checkpointed_share(model, layout) * model.depth * (9 if layout.compiled else 16))
