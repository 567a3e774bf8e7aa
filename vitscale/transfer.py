"""Batches from this machine's memory to the device, one ahead of the step that uses it.

On a GPU a batch is copied into pinned memory and from there, on a stream of its own, while the step before still computes; on the CPU
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscale.stream import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on the device; `stream.Batch` describes the fields."""

    images_BHWC: Tensor
    labels_BL: Tensor
    scores_BL: Tensor
    keys_B: Tensor
    valid_B: Tensor


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[DeviceBatch]:
    """The batches on the device, in order."""
    if device.type != "cuda":
        for batch in batches:
            yield _sent(batch, device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: DeviceBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            sent = _sent(batch, device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in vars(sent).values():
            tensor.record_stream(torch.cuda.current_stream(device))  # or its memory could be given away while the step still reads it
        ahead = sent
    if ahead is not None:
        yield ahead


def _sent(batch: Batch, device: torch.device) -> DeviceBatch:
    def send(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    return DeviceBatch(*(send(array) for array in (batch.images_BHWC, batch.labels_BL, batch.scores_BL, batch.keys_B, batch.valid_B)))
