"""Muon's updates of matrices that ZeRO cuts: each is brought together on one rank, and its update back to those who hold it.

Two all-to-alls a group of the optimizer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitscale.muon import updates_of, work_dtype


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


class Exchange:
    """The updates of a group whose matrices are spread over ranks. Collective: each rank must call it for the same groups in one order.

    Args:
        all_to_all: called as `torch.distributed.all_to_all_single` is.
    """

    def __init__(self, matrices: list[Matrix], rank: int, all_to_all: Callable[..., object]) -> None:
        self._rank, self._all_to_all, ranks = rank, all_to_all, len(matrices[0].held)
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
        pieces = self._pieces(send, [[m.held[rank].length for m in self._mine] for rank in ranks], flat[0])
        whole = [torch.cat([pieces[rank][k] for rank in ranks]).view(m.rows, m.columns) for k, m in enumerate(self._mine)]
        done = [update.reshape(-1) for update in updates_of(whole)]
        # And back
        send = [
            [update[m.wanted[rank].start :][: m.wanted[rank].length] for m, update in zip(self._mine, done, strict=True)] for rank in ranks
        ]
        pieces = self._pieces(send, [[m.wanted[me].length for m in theirs] for theirs in self._by_owner], flat[0])
        updates = [torch.zeros_like(direction) for direction in directions]
        for theirs, of_owner in zip(self._by_owner, pieces, strict=True):
            for m, piece in zip(theirs, of_owner, strict=True):
                updates[m.tensor].view(-1)[m.begin + m.wanted[me].start :][: len(piece)].copy_(piece)
        return updates

    def _pieces(self, send: list[list[Tensor]], lengths: list[list[int]], like: Tensor) -> list[tuple[Tensor, ...]]:
        """Sends a list of flat pieces to each rank, and returns those that each has sent, whose `lengths` are known."""
        outgoing = torch.cat([like.new_empty(0), *(piece for pieces in send for piece in pieces)])
        arriving = like.new_empty(sum(map(sum, lengths)))
        counts = [sum(map(len, pieces)) for pieces in send]
        self._all_to_all(arriving, outgoing, [sum(of_rank) for of_rank in lengths], counts)
        return [
            torch.split(of_rank, each) for of_rank, each in zip(torch.split(arriving, [sum(of) for of in lengths]), lengths, strict=True)
        ]


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
