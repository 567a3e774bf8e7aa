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

from vitscale.config import MixConfig
from vitscale.mixing import Mix, draw_mix
from vitscale.stream import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on the device; `stream.Batch` describes the fields."""

    images_BHWC: Tensor
    labels_BL: Tensor
    scores_BL: Tensor
    keys_B: Tensor
    """On the CPU, where what is left out of each sample is drawn."""
    valid_B: Tensor
    samples_B: np.ndarray
    """On the CPU."""
    mix: Mix | None
    """How its samples are to be mixed, if at all."""


def on_device(batches: Iterator[Batch], device: torch.device, mix: MixConfig | None = None) -> Iterator[DeviceBatch]:
    """The batches on the device, in order, with what mixup and CutMix draw for them."""
    if device.type != "cuda":
        for batch in batches:
            yield _sent(batch, device, mix)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: DeviceBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            sent = _sent(batch, device, mix)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in (sent.images_BHWC, sent.labels_BL, sent.scores_BL, sent.valid_B, *(sent.mix or ())):
            tensor.record_stream(torch.cuda.current_stream(device))  # or its memory could be given away while the step still reads it
        ahead = sent
    if ahead is not None:
        yield ahead


def _sent(batch: Batch, device: torch.device, mix: MixConfig | None) -> DeviceBatch:
    def send(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    images_BHWC, labels_BL, scores_BL, valid_B = (
        send(array) for array in (batch.images_BHWC, batch.labels_BL, batch.scores_BL, batch.valid_B)
    )
    keys_B = torch.from_numpy(batch.keys_B)
    height, width = images_BHWC.shape[1:3]
    drawn = draw_mix(batch.keys_B, (height, width), mix) if mix else None
    return DeviceBatch(images_BHWC, labels_BL, scores_BL, keys_B, valid_B, batch.samples_B, Mix(*map(send, drawn)) if drawn else None)
