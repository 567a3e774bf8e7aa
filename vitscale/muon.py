"""Muon: momentum whose matrices are made orthogonal before they are applied, beside AdamW for everything that is no matrix of a block.

The momentum and its orthogonalisation are Keller Jordan's (kellerjordan.github.io/posts/muon), the scale Moonlight's (arXiv 2502.16982,
section 2.2): an update has the root mean square of AdamW's, so that AdamW's learning rate and weight decay carry over.

ZeRO hands an optimizer flat partitions, in which a matrix is cut wherever a rank's part ends. Momentum is elementwise and does not care;
for the rest `Exchange` brings each matrix together on one rank and its update back to those who hold it, in two all-to-alls a group.
DeepSpeed 0.19.8 has a Muon too. It is not used: stages 1 to 3 of fp32 orthogonalise before they take the norm and clip, so that clipping
shrinks the update instead of the gradient, while its stage 1 in bf16 clips first; every rank that holds a piece of a matrix does the
whole matrix's work; and its orthogonalisation is one of the stacked q, k and v.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vitscale.flops import NEWTON_SCHULZ_STEPS, ORTHOGONALIZED

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pushes singular values towards 1 fastest

# Of a group's tensors, the updates that their directions give
Updates = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


class Stretch(NamedTuple):
    """Elements [start, start + length) of a flattened matrix."""

    start: int
    length: int


class Matrix(NamedTuple):
    """A matrix that is updated as one: a weight, or one of q, k and v."""

    rows: int
    columns: int
    held: list[Stretch]
    """By rank; adjacent, in order, and all of it."""
    wanted: list[Stretch]
    """By rank, of its update: what the rank holds, which without ZeRO is everything."""
    tensor: int
    """Which of the group's tensors it lies in on this rank,"""
    begin: int
    """and where in it the matrix begins, or would: what lies before its first element here may be another matrix's."""


def num_parts(name: str) -> int:
    """How many matrices lie one below the other in a weight: q, k and v are three maps, and no spectrum is that of two."""
    return 3 if name.endswith("attn.qkv.weight") else 1


def is_muons(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter: the matrices of blocks. The patch embedding and the head are for AdamW (Keller Jordan)."""
    return name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2


def orthogonalize(x_KRC: Tensor) -> Tensor:
    """For each matrix, about the nearest one whose singular values are all 1 (they end up in 0.7 to 1.2): Newton-Schulz, quintic."""
    a, b, c = _COEFFICIENTS
    tall = x_KRC.shape[-2] > x_KRC.shape[-1]
    x_KRC = x_KRC.mT if tall else x_KRC
    x_KRC = x_KRC / (x_KRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_KRR = x_KRC @ x_KRC.mT
        x_KRC = a * x_KRC + (b * gram_KRR + c * gram_KRR @ gram_KRR) @ x_KRC
    return x_KRC.mT if tall else x_KRC


def updates_of(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The updates of whole matrices, before the learning rate; those of a shape are worked on together."""
    found: list[Tensor] = list(matrices)
    of_shape: dict[torch.Size, list[int]] = {}
    for k, matrix in enumerate(matrices):
        of_shape.setdefault(matrix.shape, []).append(k)
    for shape, which in of_shape.items():
        at_once = max(1, ORTHOGONALIZED // shape.numel())
        for first in range(0, len(which), at_once):
            batch = which[first : first + at_once]
            x_KRC = orthogonalize(torch.stack([matrices[k] for k in batch])) * (0.2 * math.sqrt(max(shape)))
            for k, x_RC in zip(batch, x_KRC, strict=True):
                found[k] = x_RC
    return found


def work_dtype(device: torch.device) -> torch.dtype:
    """What is orthogonalised and sent: bf16 is enough (Keller Jordan), and on a GPU far faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Muon(torch.optim.AdamW):
    """AdamW, but for groups whose `muon` is set; these have a `momentum`.

    `updates` of whole weights is what there is at first; an engine that cuts them sets another.
    """

    def __init__(self, groups: list[dict[str, Any]], parts: dict[Tensor, int], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._parts = parts
        self.updates: Updates = self._whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the groups that there are: DeepSpeed shows an optimizer one at a time."""
        groups = self.param_groups
        for group in groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not (group["muon"] and weights):
                continue
            directions = []
            for weight in weights:
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                directions.append(weight.grad.lerp(momentum, group["momentum"]))  # Nesterov's
            for weight, update in zip(weights, self.updates(weights, directions), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _whole(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
        split = [part for w, d in zip(weights, directions, strict=True) for part in d.to(work_dtype(d.device)).chunk(self._parts[w])]
        done = iter(updates_of(split))
        return [torch.cat([next(done) for _ in range(self._parts[weight])]) for weight in weights]


class Exchange:
    """The updates of a group whose matrices are spread over ranks. Collective: each rank must call it for the same groups in one order."""

    def __init__(self, matrices: list[Matrix]) -> None:
        self._matrices, self._rank, ranks = matrices, dist.get_rank(), dist.get_world_size()
        self._owners = choose_owners(matrices)
        self._mine = [matrix for matrix, owner in zip(matrices, self._owners, strict=True) if owner == self._rank]
        self._by_owner = [[matrix for matrix, owner in zip(matrices, self._owners, strict=True) if owner == rank] for rank in range(ranks)]

    def __call__(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
        """The updates that a group's directions give. Collective."""
        me, ranks = self._rank, range(len(self._by_owner))
        dtype = work_dtype(directions[0].device)
        flat = [direction.to(dtype).view(-1) for direction in directions]
        # To each owner what this rank holds of its matrices; from each rank what it holds of mine
        send = [[flat[m.tensor][m.begin + m.held[me].start :][: m.held[me].length] for m in theirs] for theirs in self._by_owner]
        pieces = _all_to_all(send, [[m.held[rank].length for m in self._mine] for rank in ranks], flat[0])
        whole = [torch.cat([pieces[rank][k] for rank in ranks]).view(m.rows, m.columns) for k, m in enumerate(self._mine)]
        done = [update.reshape(-1) for update in updates_of(whole)]
        # And back
        send = [
            [update[m.wanted[rank].start :][: m.wanted[rank].length] for m, update in zip(self._mine, done, strict=True)] for rank in ranks
        ]
        pieces = _all_to_all(send, [[m.wanted[me].length for m in theirs] for theirs in self._by_owner], flat[0])
        updates = [torch.zeros_like(direction) for direction in directions]
        for theirs, of_owner in zip(self._by_owner, pieces, strict=True):
            for m, piece in zip(theirs, of_owner, strict=True):
                updates[m.tensor].view(-1)[m.begin + m.wanted[me].start :][: len(piece)].copy_(piece)
        return updates


def cut(shape: Sequence[int], parts: int, shares: Sequence[tuple[int, int]], *, everywhere: bool, tensor: int, begin: int) -> list[Matrix]:
    """The matrices of a weight of which ranks hold these (start, length), or have these to send where each holds it `everywhere`.

    Args:
        tensor: which of the group's tensors the weight lies in on this rank,
        begin: and where in it, as in `Matrix`.
    """
    rows, columns = shape[0] // parts, shape[1]
    size = rows * columns
    matrices = []
    for first in range(0, parts * size, size):
        ends = [(max(start, first), min(start + length, first + size)) for start, length in shares]
        held = [Stretch(low - first, high - low) if low < high else Stretch(0, 0) for low, high in ends]
        wanted = [Stretch(0, size)] * len(shares) if everywhere else held
        matrices.append(Matrix(rows, columns, held, wanted, tensor, begin + first))
    return matrices


def choose_owners(matrices: Sequence[Matrix]) -> list[int]:
    """The rank that orthogonalises each matrix: of those that hold most of it the one with the least to do. The same on every rank."""
    load = [0] * len(matrices[0].held)
    owners = [0] * len(matrices)
    cost = [m.rows * m.columns * min(m.rows, m.columns) for m in matrices]
    for k in sorted(range(len(matrices)), key=lambda k: -cost[k]):
        most = max(stretch.length for stretch in matrices[k].held)
        # The last rank's piece may be shorter by what does not divide: it holds as much as the others all the same
        holders = [rank for rank, stretch in enumerate(matrices[k].held) if 2 * stretch.length > most]
        owners[k] = min(holders, key=lambda rank: (load[rank], rank))
        load[owners[k]] += cost[k]
    return owners


def _all_to_all(send: list[list[Tensor]], lengths: list[list[int]], like: Tensor) -> list[tuple[Tensor, ...]]:
    """Sends a list of flat pieces to each rank, and returns those that each has sent, whose `lengths` are known."""
    outgoing = torch.cat([like.new_empty(0), *(piece for pieces in send for piece in pieces)])
    arriving = like.new_empty(sum(map(sum, lengths)))
    counts = [sum(map(len, pieces)) for pieces in send]
    dist.all_to_all_single(arriving, outgoing, [sum(of_rank) for of_rank in lengths], counts)
    return [torch.split(of_rank, each) for of_rank, each in zip(torch.split(arriving, [sum(of) for of in lengths]), lengths, strict=True)]
