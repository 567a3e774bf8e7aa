"""Where gradients lie from the moment that autograd has made them until the optimizer has used them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """Where gradients lie until a step is made: side by side in the order of the optimizer's groups, copied once, while still in cache.

    DeepSpeed's stage 1 flattens all gradients for the reduction, and its part of them for the optimizer, each time into new memory. It
    takes them in the order of groups, so that they lie together as it wants them, and `flatten` copies nothing.

    Args:
        parameters: in that order.
        dtype: of their gradients.
        ranks: that their gradients are averaged over. They are divided here, so that adding them up is all that is left.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype, ranks: int) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._places = self._beside(dtype)
        self._sums = self._places if dtype == torch.float32 else {}  # of a step's micro-batches, where it has several
        self._first = self._last = True
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._put)  # type: ignore[no-untyped-call]

    def begin(self, *, first: bool, last: bool) -> None:
        """Call before each backward pass: whether its micro-batch is the first of its step, and the last."""
        self._first, self._last = first, last

    def _beside(self, dtype: torch.dtype) -> dict[Tensor, Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        flat = torch.empty(sum(sizes), device=self._parameters[0].device, dtype=dtype)
        pieces = zip(self._parameters, torch.split(flat, sizes), strict=True)
        return {parameter: piece.view_as(parameter) for parameter, piece in pieces}

    @torch.no_grad()
    def _put(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if not (self._first and self._last):
            self._sums = self._sums or self._beside(torch.float32)
            gradient = self._sums[parameter].copy_(gradient) if self._first else self._sums[parameter].add_(gradient)
        parameter.grad = torch.div(gradient, self._ranks, out=self._places[parameter]) if self._last else None


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector: a view where the tensors lie side by side in one storage, a copy elsewhere."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.data_ptr() == end and tensor.is_contiguous()):
            return torch.cat([tensor.reshape(-1) for tensor in tensors])
        end += tensor.nbytes
    return first.detach().as_strided((sum(tensor.numel() for tensor in tensors),), (1,))
