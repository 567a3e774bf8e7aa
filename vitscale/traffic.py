"""The bytes that a rank sends in a step, by collective, and the time they take. Pure functions; imports no torch.

What DeepSpeed 0.19.8 calls under each stage was counted on real ranks (benchmarks/communication.py counts the bytes on the wire). P
parameters of w bytes (2 in bf16: fp32 gradients travel as bf16), k micro-batches, and of N ranks each sends (N-1)/N of:
    stage 0   all-reduce of gradients 2wP
    stage 1   all-reduce 2wP once a step, all-gather of weights wP
    stage 2   all-reduce 2wP in every micro-batch (`use_multi_rank_bucket_allreduce`), all-gather wP
    Muon      what ranks hold of cut matrices to those who orthogonalise them, and back (`exchange.py`): at most 2 w of the matrices
              over N; at stage 0, where each holds everything, an N-th of them, and their updates to all
    stage 3   all-gather wP in the forward pass of every micro-batch and, but for what `stage3_max_reuse_distance` keeps, in its backward
              pass; reduce-scatter wP in every micro-batch; all-gather of the small weights that are not partitioned
"""

from dataclasses import dataclass
from typing import Literal

from vitscale.config import OptimizerConfig, ViTConfig
from vitscale.flops import matrices, parameters
from vitscale.memory import ALLREDUCE_ELEMENTS, Layout, persistent_sizes
from vitscale.zero import bucket_elements

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
PASSES = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
}  # over the data, of a ring: an all-reduce is one of each of the others


def ring_bytes(kind: Kind, size: int, ranks: int) -> float:
    """Bytes that a rank sends in a collective over a ring (NCCL's, on which others improve in hops, not in bytes).

    Args:
        size: bytes of the whole: of the reduced tensor, of what is gathered from all, of what is scattered to all.
    """
    return PASSES[kind] * size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step."""

    what: str
    kind: Kind
    bytes: int
    """Of the whole tensor, each time; of an all-to-all what a rank holds."""
    calls: int
    """That carry it, each time."""
    times: int
    """A step."""
    hides: Literal["forward", "backward", "nothing"]
    """What it can run behind."""

    def sent(self, world_size: int) -> int:
        """Bytes that a rank sends in a step; it receives as many."""
        return int(self.times * ring_bytes(self.kind, self.bytes, world_size))


@dataclass(frozen=True)
class Link:
    """What joins ranks: bytes a second that one can send each way, and seconds until the first arrives."""

    bandwidth: float
    latency: float


def collectives(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> tuple[Collective, ...]:
    """Those of an optimizer step; scalars (norms, the loss) are left out."""
    if layout.world_size == 1:
        return ()
    return (*_of_zero(model, optimizer, layout), *_of_muon(model, optimizer, layout))


def parameter_groups(model: ViTConfig, optimizer: OptimizerConfig) -> int:
    """How many the optimizer has (`optim.param_groups`): what decays, what does not, and Muon's matrices; or each of these by layers."""
    return 2 * (model.depth + 2) if optimizer.layer_decay < 1 else 3 if optimizer.name == "muon" else 2


def _of_muon(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> tuple[Collective, ...]:
    if optimizer.name != "muon":
        return ()
    w = 2 if layout.device == "cuda" else 4  # muon.work_dtype
    whole = w * matrices(model)
    part = whole // layout.world_size
    groups = model.depth if optimizer.layer_decay < 1 else 1
    if layout.engine.zero_stage == 0:
        matrices_to_owners = Collective("exchange matrices", "all-to-all", part, groups, 1, "nothing")
        return matrices_to_owners, Collective("exchange updates", "all-gather", whole, groups, 1, "nothing")
    return (Collective("exchange matrices", "all-to-all", part, groups, 2, "nothing"),)


def _of_zero(model: ViTConfig, optimizer: OptimizerConfig, layout: Layout) -> tuple[Collective, ...]:
    stage, w, P, k = layout.engine.zero_stage, layout.width, parameters(model), layout.grad_accum_steps
    buckets = -(-P // bucket_elements(layout.zero, P))
    groups = parameter_groups(model, optimizer)
    gather = Collective("gather weights", "all-gather", w * P, groups, 1, "nothing")
    # Without `overlap_comm` the reduction waits for the backward pass or stops it: nothing hides it
    behind: Literal["backward", "nothing"] = "backward" if layout.zero["overlap_comm"] else "nothing"
    if stage == 0:
        return (Collective("reduce gradients", "all-reduce", w * P, -(-P // ALLREDUCE_ELEMENTS), 1, "nothing"),)
    if stage == 1:
        return Collective("reduce gradients", "all-reduce", w * P, buckets, 1, behind), gather
    if stage == 2:
        return Collective("reduce gradients", "all-reduce", w * P, buckets, k, behind), gather
    sizes = persistent_sizes(model, layout)
    small = sum(sizes)
    again = max(0, P - small - int(layout.zero["max_reuse_distance"]) // 2)
    fetches = max(1, -(-(P - small) // max(1, int(layout.zero["prefetch_bucket_size"]))))
    found = (
        Collective("gather weights, forward", "all-gather", w * (P - small), fetches, k, "forward"),
        Collective("gather weights, backward", "all-gather", w * again, fetches, k, "backward"),
        Collective("reduce gradients", "reduce-scatter", w * P, buckets, k, behind),
        Collective("gather small weights", "all-gather", w * small, len(sizes), 1, "nothing"),
    )
    return tuple(collective for collective in found if collective.bytes)


def seconds(collective: Collective, nodes: int, gpus_per_node: int, inside: Link, between: Link) -> float:
    """Of a collective in a step, in two levels as NCCL lays them: a ring inside each node, then rings between nodes, one a GPU.

    Inside, a rank passes on (G-1)/G of the data, between (M-1)/M of a G-th of it; each hop waits a latency, and trees (log2) shorten the
    longest way between nodes.
    """
    G, M = gpus_per_node, nodes
    per_pass = (G - 1) / G * collective.bytes / inside.bandwidth + (M - 1) / M * collective.bytes / G / between.bandwidth
    hops = (G - 1) * inside.latency + max(0, (M - 1).bit_length()) * between.latency
    return collective.times * PASSES[collective.kind] * (per_pass + collective.calls * hops)
