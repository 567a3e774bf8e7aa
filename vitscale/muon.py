"""Muon: momentum whose matrices are made orthogonal before they are applied, beside AdamW for everything that is no matrix of a block.

The momentum and its orthogonalisation are Keller Jordan's (kellerjordan.github.io/posts/muon), the scale Moonlight's (arXiv 2502.16982,
section 2.2): an update has the root mean square of AdamW's, so that AdamW's learning rate and weight decay carry over.

ZeRO hands an optimizer flat partitions, in which a matrix is cut wherever a rank's part ends. Momentum is elementwise and does not care;
the rest is `exchange.py`'s, which the engine puts in the place of `updates`.
DeepSpeed 0.19.8 has a Muon too. It is not used: stages 1 to 3 of fp32 orthogonalise before they take the norm and clip, so that clipping
shrinks the update instead of the gradient, while its stage 1 in bf16 clips first; every rank that holds a piece of a matrix does the
whole matrix's work; and its orthogonalisation is one of the stacked q, k and v.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscale.flops import NEWTON_SCHULZ_STEPS, ORTHOGONALIZED

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pushes singular values towards 1 fastest

# Of a group's tensors, the updates that their directions give
Updates = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


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
