"""The bytes that a rank holds in a training step, by kind, from a config alone. Pure functions; imports no torch.

Where they come from: what autograd keeps of each operator of `model.py` (tests hold it to torch's own count), and what DeepSpeed 0.19.8
keeps and passes through under each ZeRO stage, read in runtime/bf16_optimizer.py, runtime/zero/stage_1_and_2.py and stage3.py and held to
its allocations. A step has moments (the end of the forward pass, the backward pass of each block, the reduction, the update); memory is
that of the highest one. AdamW and SGD are torch's fused ones, which need no room of their own.

Bytes a parameter, N ranks, m moments (2 of AdamW), average included where one is kept (a):
    stage 0, fp32   weights 4, gradients 4, optimizer 4m, average 4a
    stage 1, bf16   weights 2, gradients 4 (fp32, whole) + 2 (of the micro-batches), optimizer (4 + 4m)/N, average 4a/N
    stage 2, bf16   weights 2, gradients 4/N, optimizer (4 + 4m)/N, average 4a/N
    stage 3, bf16   weights 2/N, gradients 4/N, optimizer (4 + 4m)/N, average 4a/N, and the weights gathered at the time
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from vitscale.config import EngineConfig, OptimizerConfig, ViTConfig
from vitscale.flops import moment_elements, parameters

Keeps = Literal["everything", "products", "nothing"]
Device = Literal["cuda", "cpu"]

ALLREDUCE_ELEMENTS = 500_000_000  # runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE: of the gradients of stages 0 and 1 (bf16) at once


@dataclass(frozen=True)
class Layout:
    """How a step is laid over ranks."""

    engine: EngineConfig
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    keeps: Keeps = "everything"
    """What a checkpointed block keeps; every block is one where `engine.checkpoint_every_n_blocks` does not say otherwise."""
    compiled: bool = False
    """Blocks through torch.compile."""
    device: Device = "cuda"

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        return 2 if self.engine.precision == "bf16" else 4

    @property
    def zero(self) -> dict[str, Any]:
        """Of DeepSpeed's settings those that matter: its defaults, ours over them (`engine.deepspeed_config`), the user's on top."""
        stage = self.engine.zero_stage
        found: dict[str, Any] = {
            "reduce_bucket_size": 50_000_000, "prefetch_bucket_size": 50_000_000, "max_reuse_distance": 10**9,
            "param_persistence_threshold": 100_000, "contiguous_gradients": stage != 1, "reduce_scatter": stage != 2,
            "overlap_comm": stage == 3 or (stage == 2 and self.device == "cuda"),
        }  # fmt: skip
        given = self.engine.deepspeed.get("zero_optimization", {})
        return found | {name.removeprefix("stage3_"): value for name, value in given.items()}

    @property
    def bucket(self) -> int:
        """Elements of gradients that stages 1 (fp32), 2 and 3 reduce at once."""
        return int(self.zero["reduce_bucket_size"])


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at one moment of a step."""

    moment: str
    weights: int
    """That the model computes with, those gathered under stage 3 among them."""
    gradients: int
    optimizer: int
    """fp32 masters and moments."""
    average: int
    activations: int
    """What autograd keeps for the backward pass, and what a block of it computes with."""
    buckets: int
    """Gradients on their way between ranks, and copies made of them."""
    inputs: int
    """Images."""

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, int]:
        """The bytes of each kind."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one micro-batch."""

    embed: int
    blocks: tuple[int, ...]
    head: int
    """Final norm, pooling, head and loss."""
    recomputed: int
    """What a checkpointed block adds to what it kept while its backward pass runs."""
    flowing: int
    """Gradients of activations, and of one kernel, under way in a block's backward pass."""

    @property
    def total(self) -> int:
        """At the end of the forward pass."""
        return self.embed + sum(self.blocks) + self.head


def peak(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> Memory:
    """The moment of a step at which most memory is held. The CUDA context, NCCL's buffers and fragmentation come on top."""
    return max(moments(model, optimizer, layout), key=lambda memory: memory.total)


def moments(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> Iterator[Memory]:
    """The moments of the last micro-batch of a step, in their order."""
    stage, N, w, b, zero = layout.engine.zero_stage, layout.world_size, layout.width, layout.bucket, layout.zero
    kernels, _ = tensor_sizes(model)
    P, largest = parameters(model), max(kernels)
    bf16 = layout.engine.precision == "bf16"
    share = 1 if stage == 0 else N
    masters = 0 if stage == 0 else 4 * P // N
    state = masters + 4 * moment_elements(model, optimizer) // share
    average = 4 * P // share if optimizer.average_decay else 0
    weights, gathered = w * P, 0
    if stage == 3:
        persistent = sum(persistent_sizes(model, layout))
        weights = w * (P - persistent) // N + w * persistent
        gathered = w * (P - persistent) * (N > 1)
    accumulated = layout.grad_accum_steps > 1
    acts = activations(model, layout)
    inputs = input_bytes(model, layout)

    def at(moment: str, *, gradients: int = 0, activations: int = 0, buckets: int = 0, gathers: int = 0) -> Memory:
        standing = {1: 4 * P * bf16, 3: 4 * P // N}.get(stage, 0)
        bucket = b * w if stage == 3 else 0
        return Memory(moment, weights + gathers, standing + gradients, state, average, activations, bucket + buckets, inputs)

    def reduced(produced: int) -> tuple[int, int]:
        """(gradients, buckets) beside the standing ones when so many elements have their gradient."""
        if stage == 0 or (stage == 1 and bf16):
            return w * (P if accumulated else produced), 0
        if stage == 1:
            return 4 * (P if accumulated else produced), 4 * b * zero["contiguous_gradients"]
        if stage == 2:
            own, passing = 4 * P // N, w * min(b, P) * zero["reduce_scatter"] + 4 * largest * bf16
            before = own if accumulated else 0
            return (max(own, before + own * (not bf16)) if produced > b else before, w * b + (passing if produced > b else 0))
        return 0, w * min(b, produced)

    # Stage 3 keeps what its next use is less than the reuse distance away: the second half of the pass, which the backward pass begins with
    kept = min(gathered, w * int(zero["max_reuse_distance"]) // 2)
    prefetch = min(gathered, w * int(zero["prefetch_bucket_size"]))
    earlier = reduced(0)[0] if accumulated else 0
    yield at("forward", gradients=earlier, activations=acts.total, gathers=kept + prefetch)
    block = block_elements(model)
    for index in reversed(range(model.depth)):
        produced = P - embed_elements(model) - (index + 1) * block
        gradients, buckets = reduced(produced)
        checkpointed = layout.keeps != "everything" and index % max(1, layout.engine.checkpoint_every_n_blocks) == 0
        live = acts.embed + sum(acts.blocks[: index + 1]) + acts.recomputed * checkpointed + acts.flowing
        yield at(f"backward of block {index}", gradients=gradients, activations=live, buckets=buckets, gathers=kept)
    gradients, buckets = reduced(P)
    if stage == 0:
        buckets += 4 * min(P, ALLREDUCE_ELEMENTS + largest)
    elif stage == 1 and bf16:  # both groups flattened into one copy, or a group that is large enough as it is; then a copy in bf16
        buckets += 2 * sum(kernels) if sum(kernels) > ALLREDUCE_ELEMENTS else 6 * P
    elif stage == 1:
        buckets += max(0, 4 * P // N - 4 * min(b, P)) if zero["contiguous_gradients"] else 4 * min(b, P)
    elif stage == 2 and b >= P:
        buckets += max(w * P * zero["reduce_scatter"], 4 * P // N)
    yield at("reduction", gradients=gradients, buckets=buckets, gathers=min(kept, prefetch))
    update = {0: 4 * P, 1: 2 * P if bf16 else 8 * P // N, 2: 4 * P // N if bf16 else 8 * P // N, 3: 4 * P // N}[stage]
    yield at("update", gradients=update)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------------------------


def tensor_sizes(model: ViTConfig) -> tuple[list[int], list[int]]:
    """The elements of each parameter: of kernels, and of all else, which are the optimizer's two groups (`optim.split_by_decay`)."""
    D, M, R, K = model.width, model.mlp_dim, model.representation_size, model.num_classes
    rows, columns = model.grid
    position = {"learned_1d": [model.num_tokens * D], "learned_2d": [rows * (D // 2), columns * (D // 2)]}.get(model.position, [])
    table = [((2 * rows - 1) * (2 * columns - 1) + 3 * (model.pool == "cls")) * model.num_heads] * (model.position == "relative")
    kernels = [3 * model.patch_size**2 * D, *[3 * D * D, D * D, D * M, M * D] * model.depth]
    others = [D] * (model.pool == "cls") + [*position, D, *[*[D] * 4, *table, 3 * D, D, M, D] * model.depth, D, D]
    if model.pool == "map":
        kernels += [D * D, 2 * D * D, D * D, D * M, M * D]
        others += [D, D, 2 * D, D, D, D, M, D]
    kernels += [D * R] * (R > 0) + [(R or D) * K] * (K > 0)
    others += [R] * (R > 0) + [K] * (K > 0)
    return kernels, others


def block_elements(model: ViTConfig) -> int:
    """Of one block's parameters."""
    D, M = model.width, model.mlp_dim
    rows, columns = model.grid
    bias = ((2 * rows - 1) * (2 * columns - 1) + 3 * (model.pool == "cls")) * model.num_heads * (model.position == "relative")
    return 4 * D * D + 2 * D * M + 9 * D + M + bias


def embed_elements(model: ViTConfig) -> int:
    """Of the parameters before the first block, whose gradients come last."""
    position = {"learned_1d": model.num_tokens * model.width, "learned_2d": sum(model.grid) * (model.width // 2)}.get(model.position, 0)
    return 3 * model.patch_size**2 * model.width + model.width * (1 + (model.pool == "cls")) + position


def persistent_sizes(model: ViTConfig, layout: Layout) -> list[int]:
    """The elements of the parameters that stage 3 does not partition, being too small."""
    threshold = int(layout.zero["param_persistence_threshold"])
    return [size for sizes in tensor_sizes(model) for size in sizes if size <= threshold]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------------------------


def input_bytes(model: ViTConfig, layout: Layout) -> int:
    """Of the images of a micro-batch in fp32, where the model sees a copy of them, and on a GPU of two in uint8, one of them the next."""
    pixels = layout.micro_batch_size * 3 * model.image_size[0] * model.image_size[1]
    return pixels * (4 * (layout.width == 2) + 2 * (layout.device == "cuda"))


def activations(model: ViTConfig, layout: Layout) -> Activations:
    """What autograd keeps of a micro-batch, operator by operator (docs/planning.md). Stochastic depth is taken to leave nothing out.

    Eager: LayerNorm keeps its input and two numbers a token; a linear layer its input; fused attention q, k, v, its output and a number a
    token and head; GELU its input; dropout a mask. Compiled (predicted): LayerNorm's and GELU's outputs are computed again.
    """
    B, N, D, M, w = layout.micro_batch_size, model.num_tokens, model.width, model.mlp_dim, layout.width
    T = B * N
    cuda = layout.device == "cuda"
    statistic = 4 if cuda else w  # bytes of a LayerNorm's mean; torch's CPU kernel keeps it in the inputs' type
    mask = (1 if cuda else w) if model.dropout else 0  # bytes of an element of a dropout mask
    norm, logsumexp = 2 * T * statistic, 4 * T * model.num_heads
    x, qkv, attended = w * T * D, 3 * w * T * D, w * T * D
    hidden = w * T * M
    masks = T * (2 * D + M) * mask
    normed, activated = x, hidden  # outputs of each of two LayerNorms, and of GELU
    attention = qkv + attended + logsumexp
    if model.position == "relative":  # a bias that learns: torch spells attention out, in fp32; and the index into the bias table
        attention = attended + 3 * 4 * T * D + 4 * B * model.num_heads * N * N + 8 * N * N
    eager = 2 * (x + norm + normed) + attention + hidden + activated + masks
    compiled = 2 * (x + norm) + attention + hidden + T * (2 * D + M) * (model.dropout > 0)
    whole = compiled if layout.compiled else eager
    products = x + attention + x + hidden + x  # the block's input, and what attention, the projection, fc1 and fc2 give
    kept = {"everything": whole, "products": products, "nothing": x}[layout.keeps]
    every = max(1, layout.engine.checkpoint_every_n_blocks)
    blocks = tuple(kept if index % every == 0 else whole for index in range(model.depth))
    again = {"everything": 0, "products": 2 * normed + x + activated, "nothing": whole - x}[layout.keeps]
    embed = w * B * 3 * model.image_size[0] * model.image_size[1] + T * D * mask
    return Activations(embed, blocks, x + norm + _head_bytes(model, layout), again, w * T * (D + M) + w * D * M)


def _head_bytes(model: ViTConfig, layout: Layout) -> int:
    """Pooling, head and loss of a micro-batch."""
    B, N, D, M, w = layout.micro_batch_size, model.num_tokens, model.width, model.mlp_dim, layout.width
    statistic = 4 if layout.device == "cuda" else w
    mask = (1 if layout.device == "cuda" else w) if model.dropout else 0
    if model.pool == "cls":
        pooled = w * B * N * D  # the class token is a view of all tokens
    elif model.pool == "mean":
        pooled = w * B * D
    else:  # tokens, keys and values, the query, attention's output, what LayerNorm and the MLP keep, the sum
        kv, query = 2 * w * B * N * D, w * D
        pooled = w * B * N * D + kv + query + w * B * D + 4 * B * model.num_heads
        pooled += w * B * D + 2 * B * statistic + w * B * D + 2 * w * B * M + B * (M + D) * mask + w * B * D
    return pooled + w * B * model.representation_size + 2 * 4 * B * model.num_classes
