"""The time of a training step from what a device can do: work over rates. Pure functions; imports no torch.

A micro-batch takes the longer of what the device computes (matrix products, attention, everything that only moves memory) and what the host
takes to launch it; the step adds the update and the communication that nothing hides. The rates are assumed shares of a data sheet's peaks
until a calibration (benchmarks/calibrate.py) measured them, and so is every time that is told: predicted.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.errors import message_of
from vitscale.config import ConfigError, OptimizerConfig, ViTConfig
from vitscale.flops import NEWTON_SCHULZ_STEPS, branch_flops, ends_flops, matrices, moment_elements, parameters, tensor_sizes
from vitscale.gpus import GPU, gpu_of
from vitscale.memory import Layout, computed_shares
from vitscale.traffic import Link, collectives, seconds

# Assumed where nothing was measured; the reason for each is in docs/planning.md, "Rates"
PRODUCTS_SHARE = 0.60  # of the dense peak, over a block's four products
FLOAT8_SHARE = 0.45  # of the dense peak in float8, whose products are so short that more of them is not multiplying
ATTENTION_SHARE = 0.30  # of the dense peak, forward and backward at head dimensions of 64 to 80
MEMORY_SHARE = 0.85  # of the memory's bandwidth, for LayerNorm, GELU, additions, the optimizer
LINK_SHARE = 0.75  # of a link's bandwidth, for rings of large buffers
INSIDE_LATENCY, BETWEEN_LATENCY = 3e-6, 5e-6  # seconds a hop
HIDDEN_SHARE = 0.5  # of communication that could run behind compute
HOOK_SECONDS = 30e-6  # of the host for one of stage 3's hooks around a module
LAUNCH_SECONDS = 6e-6  # of the host for a kernel, through torch's eager dispatch


@dataclass(frozen=True)
class Rates:
    """What a device reaches."""

    products: float
    """FLOP/s of matrix products in the run's precision,"""
    float8: float
    """and in float8; 0 where the GPU computes nothing in it."""
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
    source: str = ""
    """Where the figures come from, in words."""
    measured: tuple[str, ...] = ()
    """Those that were, on this GPU."""


def assumed(gpu: GPU, precision: str, network: float = 0.0) -> Rates:
    """Rates from a data sheet. `network` is bytes a second of a rank to other nodes; 0 takes that of the maker's own system."""
    peak = gpu.peak(precision)
    return Rates(
        PRODUCTS_SHARE * peak,
        FLOAT8_SHARE * (gpu.fp8 or 0.0),
        ATTENTION_SHARE * peak,
        MEMORY_SHARE * gpu.bandwidth,
        LAUNCH_SECONDS,
        Link(LINK_SHARE * gpu.link, INSIDE_LATENCY),
        Link(LINK_SHARE * (network or gpu.network), BETWEEN_LATENCY),
        source=f"{PRODUCTS_SHARE:.0%} of the peak for products, {ATTENTION_SHARE:.0%} for attention, {MEMORY_SHARE:.0%} of memory's, "
        f"{LINK_SHARE:.0%} of links ({gpu.source}): assumed, not measured",
    )


def calibrated(rates: Rates, file: Path, precision: str, gpu: GPU | None = None) -> Rates:
    """The rates of a file that benchmarks/calibrate.py wrote in this precision, over those assumed. Raises ConfigError.

    One of another GPU is refused; of a device that the table does not know it is taken, and does not count as measured.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        told = found["rates"]
        figures: dict[str, Any] = {
            name: float(told[name]) for name in ("products", "float8", "attention", "memory", "launch") if name in told
        }
        links: dict[str, Any] = {name: Link(*map(float, told[name])) for name in ("inside", "between") if name in told}
        measured_in = found["settings"]["precision"]
        device = str(found["machine"]["device"])
        where = f"measured on {device}, {found['date'][:10]} ({file.name})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"calibration={file} is not what benchmarks/calibrate.py writes: {message_of(error)}") from None
    measured_rates = [*figures.values(), *(link.bandwidth for link in links.values())]
    latencies = [link.latency for link in links.values()]
    if not figures or not all(0 < value < math.inf for value in measured_rates) or not all(0 <= value < math.inf for value in latencies):
        raise ConfigError(f"calibration={file} holds no rates above 0; benchmarks/calibrate.py measures them")
    if measured_in != precision:
        raise ConfigError(
            f"calibration={file} was measured in {measured_in}, and the run computes in {precision}; "
            f"benchmarks/calibrate.py --precision {precision} measures that"
        )
    measured_on = gpu_of(device)
    if gpu and measured_on and measured_on != gpu:
        raise ConfigError(f"calibration={file} was measured on {device}, and the plan is for {gpu.name}; --gpu {measured_on.name} fits it")
    return replace(
        rates, **figures, **links, source=f"{', '.join((*figures, *links))} {where}", measured=tuple(figures) if measured_on == gpu else ()
    )


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
    """Of an optimizer step of all its micro-batches, in expectation over what stochastic depth leaves out."""
    B, k = layout.micro_batch_size, layout.grad_accum_steps
    shown = layout.shown(model)
    shares = computed_shares(shown, B)
    linear, attention = block_flops(shown)
    products, attending, elementwise, repeated = 3 * B * ends_flops(shown, shown.num_train_tokens) / rates.products, 0.0, 0.0, 0.0
    for index, share in enumerate(shares):
        eighth = layout.engine.float8 and 0 < index < model.depth - 1  # compute.to_float8
        multiplied = B * share * linear / (rates.float8 if eighth else rates.products)
        attended = B * share * attention / rates.attention
        moved = B * block_bytes(shown, layout, share, float8=eighth) / rates.memory
        products, attending, elementwise = products + 3 * multiplied, attending + 3.5 * attended, elementwise + moved
        if layout.engine.keeps(index) != "everything":
            repeated += moved / 3 + (multiplied + attended) * (layout.keeps == "nothing")
    elementwise += B * ends_bytes(shown, layout) / rates.memory
    device = products + attending + elementwise + repeated
    host = kernels(model, layout) * rates.launch + hooks(model, layout) * HOOK_SECONDS
    update = update_bytes(model, optimizer, layout) / rates.memory + muon_flops(model, optimizer, layout) / rates.products
    # Of a micro-batch a third is its forward pass, or a fourth where that is computed again
    forward = k * max(device, host) / (4 if layout.keeps == "nothing" else 3)
    backward = k * max(device, host) - forward
    spent = {"forward": 0.0, "backward": 0.0, "nothing": 0.0}
    for collective in collectives(model, optimizer, layout):
        spent[collective.hides] += seconds(collective, nodes, gpus_per_node, rates.inside, rates.between)
    hidden = min(HIDDEN_SHARE * spent["forward"], forward) + min(HIDDEN_SHARE * spent["backward"], backward)
    return StepTime(
        k * products, k * attending, k * elementwise, k * repeated, k * max(0.0, host - device), update, sum(spent.values()), hidden
    )


def block_flops(model: ViTConfig) -> tuple[int, int]:
    """FLOPs of one training image's forward pass through a block: of its four linear layers, and of scores and weighted sums."""
    attention = 4 * model.num_train_tokens**2 * model.width
    return sum(branch_flops(model, model.num_train_tokens)) - attention, attention


def block_bytes(model: ViTConfig, layout: Layout, share: float = 1.0, *, float8: bool = False) -> float:
    """Bytes an image that kernels which compute little read and write in a block, forward and backward.

    Of a token, in numbers: LayerNorm 2D forward and 3D backward, twice; residual additions 3D forward and 3D of gradients, twice; GELU 2M
    forward and 3M backward; gradients of biases read 5D + M. Compiled, an addition is part of the LayerNorm that follows: 6D less; and
    the bias's sum is part of GELU's backward pass: M less. Normalised queries and keys: 4D and 6D. SwiGLU reads and writes a half more than
    GELU does: M and 2M; LayerScale 2D and 2D twice.

    Where only a `share` of the samples is computed, an addition is a copy of all (2D), and a sum of all (4D) backward, and of the rows
    that are computed they are gathered, multiplied and added (7D), and the same backward (6D). In float8 the inputs of four layers and the
    gradients of their outputs, 8D + 2M, are read for their largest number and once more to be rounded to a byte.
    """
    D, M, w = model.width, model.mlp_dim, layout.width
    numbers = 15 * D + 6 * M - (6 * D + M) * layout.compiled + 10 * D * model.qk_norm
    numbers += 3 * M * (model.mlp == "swiglu") + 8 * D * (model.layer_scale > 0)
    added = 12 * D + 26 * D * share * (share < 1)
    rounded = (8 * D + 2 * M) * (2 * w + 1) * float8
    return ((numbers * share + added) * w + rounded * share) * model.num_train_tokens


def ends_bytes(model: ViTConfig, layout: Layout) -> int:
    """The same outside the blocks: pixels to normalised numbers, and ten passes over the logits in fp32 for the loss."""
    pixels = 3 * model.image_size[0] * model.image_size[1]
    left_out = 6 * model.num_tokens * model.width * layout.width * (model.patch_dropout > 0)  # gathered, and back
    return 10 * 4 * model.num_classes + pixels * (1 + 12 * 2 + 4 + layout.width) + left_out


def muon_flops(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> float:
    """FLOPs of the rank that orthogonalises most (`muon.orthogonalize`, `muon.choose_owners`): an N-th of all, at least one matrix."""
    if optimizer.name != "muon":
        return 0.0
    D, M = model.width, model.mlp_dim
    whole = model.depth * (4 * newton_schulz_flops(D, D) + 2 * newton_schulz_flops(D, M))
    return max(whole / layout.world_size, newton_schulz_flops(D, M))


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Of one matrix: in each step its Gram matrix of the shorter side, that one's square, and their product with the matrix."""
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * 2 * (2 * short**2 * long + short**3)


def update_bytes(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> int:
    """Bytes that a rank reads and writes once a step (and, of gradients, in each micro-batch) to turn gradients into new weights.

    Passes over P gradients: under stage 1 each is laid where it stays (w + w) or, of several micro-batches, added in fp32 (w + 4 + 4) and
    rounded (4 + w). The others copy gradients to a bucket, flatten it and take their part out. Of its part a rank takes the norm and clips
    it, in fp32.
    The update reads and writes masters, moments and average of this rank's N-th, and writes weights that are not those masters. Muon's
    takes some 100 bytes more a number of a matrix: momentum and direction, pieces sent and joined, and five times three products' operands.
    Out of CUDA graphs each micro-batch's gradients are copied.
    """
    P, w, k = parameters(model), layout.width, layout.grad_accum_steps
    stage = layout.engine.zero_stage
    share = 1 if stage == 0 else layout.world_size
    state = ((12 + 12 * bool(optimizer.average_decay) + w * layout.masters) * P + 8 * moment_elements(model, optimizer)) // share
    state += 100 * matrices(model) // layout.world_size * (optimizer.name == "muon") + 2 * w * P * k * (layout.compilation == "graphs")
    if stage == 0:
        return state + (4 * w + 12) * P
    if stage == 1:
        laid = 2 * w * P if k == 1 else (w + 8) * P * k + (4 + w) * P
        return state + laid + 24 * P // share
    return state + 4 * w * P * k + 24 * P // share


def kernels(model: ViTConfig, layout: Layout) -> int:
    """What the host launches in a micro-batch: of a block some 16 kernels forward and 34 backward, 9 and 16 compiled, two graphs of them.

    A checkpointed block launches its forward pass again.
    """
    forward, backward = {"none": (16, 34), "blocks": (9, 16), "graphs": (1, 1)}[layout.compilation]
    tensors = len(tensor_sizes(model))
    again = forward * sum(layout.engine.keeps(index) != "everything" for index in range(model.depth))
    return 60 + model.depth * (forward + backward) + 3 * tensors + again


def hooks(model: ViTConfig, layout: Layout) -> int:
    """Calls of stage 3's hooks in a micro-batch, forward and backward: before and after each of some 11 modules a block, or each block that
    is compiled (`zero.BLOCKS_ARE_LEAVES`)."""
    return 4 * (1 if layout.compiled else 11) * model.depth if layout.engine.zero_stage == 3 else 0
