"""What all ranks tell one another once a step, without anybody waiting for it.

Each rank puts its loss and some counts (was it asked to stop? is its checkpoint written?) into a small vector, whose sums over all ranks
are under way while the next step computes and are read at the end of that. All ranks read the same sums at the same step, so whatever
follows from them (a stop, a checkpoint's commit, a rollback) they do together, and no rank's host ever waits for its device.
"""

from collections import deque
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Note = TypeVar("Note")


class Heard(NamedTuple, Generic[Note]):
    """What was told at one step."""

    note: Note
    """This rank's own, as it gave it."""
    loss: float
    """Mean over the ranks."""
    sums: dict[str, int]
    """Of each count, over all ranks."""


class _UnderWay(NamedTuple):
    note: object
    names: tuple[str, ...]
    sums: Tensor
    work: "dist.Work | None"
    copied: "torch.cuda.Event | None"


class Agreement(Generic[Note]):
    """A collective of the default process group: every rank tells and listens at the same steps, with the same names.

    Args:
        device: where losses are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: deque[_UnderWay] = deque()
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def tell(self, note: Note, loss: Tensor, **counts: int) -> None:
        """Begins to send this rank's loss (a scalar on the device) and counts."""
        names = tuple(counts)
        told = torch.tensor([0.0, *counts.values()], dtype=torch.float64)
        if self._aside is None:
            told[0] = loss
            work = dist.all_reduce(told, async_op=True)
            self._under_way.append(_UnderWay(note, names, told, work, None))
            return
        on_device = told.pin_memory().to(self._device, non_blocking=True)
        on_device[0] = loss
        work = dist.all_reduce(on_device, async_op=True)
        with torch.cuda.stream(self._aside):  # the stream that computes does not wait for the sums
            if work:
                work.wait()
            sums = torch.empty(len(told), dtype=torch.float64, pin_memory=True)
            sums.copy_(on_device, non_blocking=True)
            on_device.record_stream(self._aside)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._aside)
        self._under_way.append(_UnderWay(note, names, sums, None, copied))

    def heard(self, *, all_: bool) -> list[Heard[Note]]:
        """What all ranks told, oldest first: all but what was told last, which is still under way, or with `all_` that too."""
        found = []
        while len(self._under_way) > (not all_):
            note, names, sums, work, copied = self._under_way.popleft()
            if work:
                work.wait()
            if copied:
                copied.synchronize()
            loss, *counts = sums.tolist()
            found.append(Heard(note, loss / dist.get_world_size(), dict(zip(names, map(int, counts), strict=True))))
        return found  # type: ignore[return-value]
