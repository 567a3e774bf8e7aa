"""The bytes that a rank holds in a training step, by kind, from a config alone. Pure functions; imports no torch.

Where they come from: what autograd keeps of each operator of `model.py` (tests hold it to torch's own count), and what DeepSpeed 0.19.8
keeps and passes through under each ZeRO stage, read in runtime/zero/stage_1_and_2.py and stage3.py and held to its allocations. A step has
moments (the end of the forward pass, the backward pass of each block, the reduction, the update); memory is that of the highest one. AdamW
and SGD are torch's fused ones, which need no room of their own.

Bytes a parameter, N ranks, m moments (2 of AdamW), average included where one is kept (a):
    stage 0, fp32   weights 4, gradients 4, optimizer 4m, average 4a
    stage 1, bf16   weights 2, gradients 2, and 4 where micro-batches add up (`gradients.Gradients`), optimizer (4 + 4m)/N, average 4a/N
    stage 2, bf16   weights 2, gradients 4/N, optimizer (4 + 4m)/N, average 4a/N
    stage 3, bf16   weights 2/N, gradients 4/N, optimizer (4 + 4m)/N, average 4a/N, and the weights gathered at the time
In fp32 the weights under stages 1 and 2 are the masters: optimizer 4m/N.

What stage 3 gathers (partitioned_param_coordinator.py). Each module that begins asks for `prefetch_bucket_size` elements more than were
asked for before, so that within a few modules of the first all weights are under way, up to `max_live_parameters`. The prefetcher passes
over weights that are there, and they are kept until backward has used them. A fetch lands in one buffer, and its weights are copied out of
it one by one; it stays until the last of them is used. So at the end of forward there are all weights, and those of the last fetch twice.
On one rank nothing is gathered. Weights no larger than `param_persistence_threshold` are gathered after each update and stay.

What a reduction holds. Stage 3 copies a bucket together, and adds it to the standing fp32 partition from a copy in fp32. Stage 2 allocates
all of a bucket in each backward pass, two where it reduces while backward goes on. In bf16 it adds to an fp32 partition, allocated at
the first reduction of a step, tensor by tensor, each from a copy in fp32; in fp32 it copies its partition out of the bucket.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vitscale.config import Compilation, EngineConfig, Keeps, OptimizerConfig, ViTConfig
from vitscale.flops import ORTHOGONALIZED, computed_share, elements, is_kernel, matrices, moment_elements, parameters, tensor_sizes
from vitscale.zero import bucket_elements, deepspeed_config

Device = Literal["cuda", "cpu"]

ALLREDUCE_ELEMENTS = 500_000_000  # runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE: of the gradients of stage 0 at once


@dataclass(frozen=True)
class Layout:
    """How a step is laid over ranks."""

    engine: EngineConfig
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    device: Device = "cuda"
    image_size: tuple[int, int] | None = None
    """Of the images that the model is shown, where they are not of its own size."""

    @property
    def keeps(self) -> Keeps:
        """What a checkpointed block keeps; everything where none is."""
        return self.engine.keeps(0)

    @property
    def compilation(self) -> Compilation:
        """What `engine.compile` means there."""
        return self.engine.compilation(self.device == "cuda")

    @property
    def compiled(self) -> bool:
        """Blocks through torch.compile."""
        return self.compilation != "none"

    def shown(self, model: ViTConfig) -> ViTConfig:
        """The model at the size of the images; its parameters are those of its own size."""
        return replace(model, image_size=self.image_size or model.image_size)

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        return 2 if self.engine.precision == "bf16" else 4

    @property
    def masters(self) -> bool:
        """fp32 weights beside those that the model computes with: not where these are the fp32 weights."""
        return self.engine.zero_stage == 3 or self.engine.precision == "bf16"

    @property
    def zero(self) -> dict[str, Any]:
        """Of DeepSpeed's settings of ZeRO those that matter, without `stage3_`: its defaults (runtime/zero/config.py) under `zero.py`'s."""
        defaults = {
            "prefetch_bucket_size": 50_000_000, "max_live_parameters": 10**9, "max_reuse_distance": 10**9,
            "param_persistence_threshold": 100_000, "contiguous_gradients": True, "reduce_scatter": True,
            "overlap_comm": self.engine.zero_stage == 3,
        }  # fmt: skip
        settings = deepspeed_config(self.engine, 0.0, self.micro_batch_size, self.grad_accum_steps, on_gpu=self.device == "cuda")
        return defaults | {name.removeprefix("stage3_"): value for name, value in settings["zero_optimization"].items()}


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
    """The moments of the last micro-batch of a step, in their order; first of all what is held between steps."""
    stage, N, w, zero = layout.engine.zero_stage, layout.world_size, layout.width, layout.zero
    kernels = [size for name, size in tensor_sizes(model).items() if is_kernel(name)]
    P, largest = parameters(model), max(kernels)
    b = bucket_elements(zero, P)
    bf16, contiguous = layout.engine.precision == "bf16", zero["contiguous_gradients"]
    share = 1 if stage == 0 else N
    own = 4 * P // share  # an fp32 partition
    state = own * layout.masters + 4 * moment_elements(model, optimizer) // share
    average = own if optimizer.average_decay else 0
    weights, gathered, again = w * P, 0, 0  # `again`: weights of the last fetch, in the buffer that they came in
    if stage == 3:
        weights = w * P // N
        if N > 1:
            fetched = partitioned_sizes(model, layout)
            weights += w * (P - sum(fetched))
            gathered = w * min(sum(fetched), int(zero["max_live_parameters"]))
            again = w * last_fetch(fetched, int(zero["prefetch_bucket_size"]))
    accumulated = layout.grad_accum_steps > 1
    acts = activations(model, layout)
    inputs = input_bytes(model, layout)
    standing = {1: (w + 4 * (bf16 and accumulated)) * P, 3: own}.get(stage, 0)
    bucket = w * b * (stage == 3 and contiguous)

    def at(moment: str, *, gradients: int = 0, activations: int = 0, buckets: int = 0, gathers: int = 0) -> Memory:
        return Memory(moment, weights + gathers, standing + gradients, state, average, activations, bucket + buckets, inputs)

    def reduced(produced: int, *, all_of_it: bool = False) -> tuple[int, int]:
        """(gradients, buckets) beside the standing ones when so many elements have their gradient; at the end, all of them."""
        flushes = produced > b or all_of_it
        if stage == 0:
            return w * (P if accumulated else produced), 0
        if stage == 1:
            return 0, w * b * contiguous
        if stage == 2:
            buffers = w * b * (1 + zero["overlap_comm"])
            copies = w * b * zero["reduce_scatter"] + 4 * min(largest, P // N) * bf16
            return own * (accumulated + (flushes and not (bf16 and accumulated))), buffers + copies * flushes
        # Joined, unless the one gradient is too large for a bucket; gloo reduces a copy, and what came of it goes into fp32 after that
        joined = w * b + max(w * b * (layout.device == "cpu"), 4 * b // N * bf16)
        return w * min(b, produced) * (not contiguous), joined * flushes

    yield replace(at("between steps"), inputs=0)
    earlier = reduced(0)[0] if accumulated else 0
    yield at("forward", gradients=earlier, activations=acts.total, gathers=gathered + again)
    head = (model.representation_size or model.width) * model.num_classes
    flowing = (4 + w) * layout.micro_batch_size * model.num_classes + w * head  # gradients of the logits, in fp32 before the model's type
    yield at("backward of the head", gradients=earlier, activations=acts.total + flowing, buckets=reduced(0)[1], gathers=gathered)
    block, before = elements(model, "blocks.0."), elements(model, "cls_token", "pos_embed", "patch_embed")
    for index in reversed(range(model.depth)):
        produced = P - before - (index + 1) * block
        gradients, buckets = reduced(produced)
        checkpointed = layout.engine.keeps(index) != "everything"
        live = acts.embed + sum(acts.blocks[: index + 1]) + acts.recomputed * checkpointed + acts.flowing
        yield at(
            f"backward of block {index}", gradients=gradients, activations=live, buckets=buckets, gathers=min(gathered, w * (P - produced))
        )
    gradients, buckets = reduced(P, all_of_it=True)
    if stage == 0:
        buckets += 4 * min(P, ALLREDUCE_ELEMENTS + largest)
    yield at("reduction", gradients=gradients, buckets=buckets)
    if stage and bf16:  # DeepSpeed takes the norm of each tensor's stretch from a copy in fp32
        stretch = largest // N if stage == 3 else min(largest, P // N)
        yield at("norm", gradients=own * (stage == 2), buckets=4 * stretch)
    # Stage 1 makes fp32 of a group at a time, in bf16; in fp32 stage 2 copies its partition together
    update = {0: 4 * P, 1: 4 * sum(kernels) // N * bf16, 2: own if bf16 else 2 * own, 3: own}[stage]
    yield at("update", gradients=update, buckets=exchange_bytes(model, optimizer, layout))
    if stage in (1, 2) and N > 1 and layout.device == "cpu":  # gloo gathers a group's weights into a copy
        yield at("gather", buckets=w * sum(kernels))


def exchange_bytes(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> int:
    """What Muon's update holds for a moment (`exchange.py`), of a rank's part of the matrices, taken to be an N-th where ZeRO cuts them.

    Directions and updates in fp32; in bf16 on a GPU what is sent, what arrives, the whole matrices and their updates; and of those that are
    orthogonalised at once (`ORTHOGONALIZED` elements) their stack, itself scaled, the product that is added to it, and the sum.
    """
    if optimizer.name != "muon":
        return 0
    w, held = 2 if layout.device == "cuda" else 4, matrices(model)
    part = held // (layout.world_size if layout.engine.zero_stage else 1)
    owned = -(-held // layout.world_size)
    return 8 * part + w * (2 * part + 3 * owned + 4 * min(owned, ORTHOGONALIZED))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------------------------


def persistent_sizes(model: ViTConfig, layout: Layout) -> list[int]:
    """The elements of the parameters that stage 3 does not partition, being too small."""
    threshold = int(layout.zero["param_persistence_threshold"])
    return [size for size in tensor_sizes(model).values() if size <= threshold]


def partitioned_sizes(model: ViTConfig, layout: Layout) -> list[int]:
    """The elements of the parameters that stage 3 gathers for each use, about in the order of their use."""
    threshold = int(layout.zero["param_persistence_threshold"])
    sizes = tensor_sizes(model)
    return [sizes[name] for name in sorted(sizes, key=is_kernel) if sizes[name] > threshold]


def last_fetch(sizes: list[int], prefetch: int) -> int:
    """The elements of the last of the fetches that parameters are gathered in, each ending with the one that makes it large enough."""
    elements = 0
    for size in sizes:
        elements = size if elements >= prefetch else elements + size
    return elements


# ---------------------------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------------------------


def input_bytes(model: ViTConfig, layout: Layout) -> int:
    """Of the images of a micro-batch in fp32, where the model sees a copy of them, and on a GPU of two in uint8, one of them the next."""
    height, width = layout.shown(model).image_size
    return layout.micro_batch_size * 3 * height * width * (4 * (layout.width == 2) + 2 * (layout.device == "cuda"))


def activations(model: ViTConfig, layout: Layout) -> Activations:
    """What autograd keeps of a micro-batch, operator by operator (docs/planning.md), in expectation over what stochastic depth leaves out.

    Eager: LayerNorm keeps its input and two numbers a token; a linear layer its input; fused attention q, k, v, its output and a number a
    token and head; GELU its input; dropout a mask. Compiled (predicted): LayerNorm's and GELU's outputs are computed again.
    """
    model = layout.shown(model)
    B, N, D, M, w = layout.micro_batch_size, model.num_train_tokens, model.width, model.mlp_dim, layout.width
    T = B * N
    statistic, mask = _small_bytes(model, layout)
    norm, x = 2 * T * statistic, w * T * D
    blocks, again = [], 0
    for index, share in enumerate(computed_shares(model, B)):
        kept, recomputed = _block_bytes(model, layout, share * B, layout.engine.keeps(index))
        blocks.append(kept)
        again = max(again, recomputed)
    embed = w * B * 3 * model.image_size[0] * model.image_size[1] + B * model.num_tokens * D * mask + 4 * T * (model.patch_dropout > 0)
    embed += (x + norm) * model.pre_norm
    last = w * B * D + 2 * B * statistic if model.pool_norm else x + norm
    gates = 1 + (model.mlp == "swiglu")
    return Activations(embed, tuple(blocks), last + _head_bytes(model, layout), again, w * T * (D + gates * M) + w * D * gates * M)


def _small_bytes(model: ViTConfig, layout: Layout) -> tuple[int, int]:
    """Of a LayerNorm's mean, which torch's CPU kernel keeps in the inputs' type, and of an element of a dropout mask."""
    cuda = layout.device == "cuda"
    return 4 if cuda else layout.width, (1 if cuda else layout.width) * (model.dropout > 0)


@functools.lru_cache(maxsize=4096)
def _share(rate: float, micro_batch_size: int) -> float:
    return computed_share(rate, micro_batch_size)


def computed_shares(model: ViTConfig, micro_batch_size: int) -> list[float]:
    """The share of a micro-batch's samples that each block computes, in expectation."""
    return [_share(rate, micro_batch_size) for rate in model.drop_path_rates]


def _block_bytes(model: ViTConfig, layout: Layout, rows: float, keeps: Keeps) -> tuple[int, int]:
    """Of a block that computes so many of the samples: (what it keeps, what its backward pass adds to that for a while)."""
    B, N, D, M, H, w = layout.micro_batch_size, model.num_train_tokens, model.width, model.mlp_dim, model.num_heads, layout.width
    T: float = rows * N
    statistic, mask = _small_bytes(model, layout)
    x, attended, hidden = w * T * D, w * T * D, w * T * M
    norm = 2 * T * statistic
    normed, activated = x, hidden  # outputs of each of two LayerNorms, and of GELU
    if model.mlp == "swiglu":  # both halves; what the gate makes of its own, and their product
        hidden, activated = 2 * hidden, 2 * hidden
    elif model.activation == "quick_gelu":  # the sigmoid, and the product
        activated = 2 * hidden
    attention = 4 * x + 4 * T * H  # q, k, v and the output, and a number a token and head
    if model.position == "relative":  # a bias that learns: torch spells attention out, in fp32; and the index into the bias table
        attention = attended + 3 * 4 * T * D + 4 * rows * H * N * N + 8 * N * N
    # LayerNorm over q and k: two outputs and statistics; and since these lie head by head, so does attention's output, which is copied
    heads = (3 * x + 4 * T * H * statistic) * model.qk_norm
    masks = T * (2 * D + M) * mask
    scaled = 2 * x * (model.layer_scale > 0)  # what LayerScale multiplies
    eager = 2 * (x + norm + normed) + attention + heads + hidden + activated + masks + scaled
    compiled = 2 * (x + norm) + attention + heads + hidden + scaled + T * (2 * D + M) * (model.dropout > 0)
    whole = (compiled if layout.compiled else eager) + 2 * x * (rows < B)  # `index_add` keeps what it adds
    if keeps == "everything":
        return round(whole), 0
    given = w * B * N * D  # the block's input, of all samples
    if keeps == "nothing":
        return given, round(whole - x * (rows == B))
    # What qkv, attention, the projection, fc1 and fc2 give; then the outputs of LayerNorms, the sum between the branches, and GELU's
    return round(given + attention + x + hidden + x), round(2 * normed + 3 * x * model.qk_norm + x + activated)


def _head_bytes(model: ViTConfig, layout: Layout) -> int:
    """Pooling, head and loss of a micro-batch."""
    B, N, D, M, w = layout.micro_batch_size, model.num_train_tokens, model.width, model.mlp_dim, layout.width
    statistic, mask = _small_bytes(model, layout)
    if model.pool == "cls":
        pooled = w * B * N * D  # the class token is a view of all tokens
    elif model.pool in ("mean", "mean_with_cls"):
        pooled = w * B * D
    else:  # tokens, keys and values, the query, attention's output, what LayerNorm and the MLP keep, the sum
        patches, hidden = N - model.num_prefix_tokens, 3 if model.activation == "quick_gelu" else 2
        tokens = N if B == 1 else patches  # of several samples the patches among the tokens are copied together
        kv, query = 2 * w * B * patches * D, w * D
        pooled = w * B * tokens * D + kv + query + w * B * D + 4 * B * model.num_heads
        pooled += w * B * D + 2 * B * statistic + w * B * D + hidden * w * B * M + B * (M + D) * mask + w * B * D
    return pooled + w * B * model.representation_size + 2 * 4 * B * model.num_classes
