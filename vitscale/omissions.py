"""What training leaves out of a sample: whole residual branches (stochastic depth) and patches (patch dropout).

Both are drawn from the sample's key, on the host and once for a forward pass, so that no split of a batch into micro-batches and ranks
matters, and the device is told which rows to compute and is never waited for.

Axes: B batch, N tokens that are kept, P patches, R samples that a branch computes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitscale.config import ViTConfig, drop_path_rows
from vitscale.keyed import GOLDEN, mix


class Path(NamedTuple):
    """What a block does of its two branches, attention and MLP: stochastic depth as drawn for a micro-batch."""

    rows_2R: Tensor | None
    """int32; the samples each branch computes, others pass it by. None: all of them, in order."""
    scales_2R: Tensor | None
    """fp32; what each computed sample's branch is multiplied by, 0 where it is dropped all the same. None: 1."""


FULL_PATH = Path(None, None)
PATCH_DRAWS = 2**20  # where the patches' draws of a key begin, far behind those of any number of blocks


def draw_omissions(config: ViTConfig, keys_B: Tensor, device: torch.device) -> tuple[Tensor | None, list[Path]]:
    """What the samples of these keys leave out: (rows (B, N) of the flattened tokens that are kept, or None; the path of each block).

    All of it goes to the device in one transfer that waits for nothing.
    """
    keys = keys_B.numpy()
    kept = kept_tokens(config, keys) if config.patch_dropout else None
    drawn = keyed_uniform(keys, np.arange(2 * config.depth)[:, None]).reshape(config.depth, 2, -1)
    paths = [draw_path(rate, of_2B) if rate else (None, None) for rate, of_2B in zip(config.drop_path_rates, drawn, strict=True)]
    arrays = [array for array in (kept, *(array for path in paths for array in path)) if array is not None]
    packed = torch.from_numpy(np.concatenate([array.ravel().view(np.int32) for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = iter(torch.split(packed, [array.size for array in arrays]))

    def sent(array: npt.NDArray[np.int32] | npt.NDArray[np.float32] | None) -> Tensor | None:
        return None if array is None else next(pieces).view(torch.from_numpy(array).dtype).view(array.shape)

    return sent(kept), [Path(sent(rows), sent(scales)) for rows, scales in paths]


def draw_path(
    rate: float, uniform_2B: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.float32]]:  # fmt: skip
    """The fields of a `Path`, of a block that drops each branch of a sample at `rate` (arXiv 1603.09382).

    DINOv2 (dinov2/layers/block.py) leaves out a fixed number of each micro-batch; here each sample decides for itself, so that no split of
    a batch matters, and some that are dropped are computed (`config.drop_path_rows`), equally many in both branches.
    """
    dropped_2B = uniform_2B < np.float32(rate)
    scales_2B = np.where(dropped_2B, np.float32(0), np.float32(1) / np.float32(1 - rate))
    batch = dropped_2B.shape[1]
    computed = drop_path_rows(rate, int((~dropped_2B).sum(axis=1).max()), batch)
    if computed == batch:
        return None, scales_2B
    rows_2R = np.argsort(dropped_2B, axis=1, kind="stable")[:, :computed]
    return rows_2R.astype(np.int32), np.take_along_axis(scales_2B, rows_2R, axis=1)


def kept_tokens(config: ViTConfig, keys_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Rows (B, N) of the flattened tokens that patch dropout keeps: all before the patches, and of each sample those that draw least."""
    patches, prefix = config.grid[0] * config.grid[1], config.num_prefix_tokens
    uniform_BP = keyed_uniform(keys_B[:, None], PATCH_DRAWS + np.arange(patches))
    kept_BP = np.sort(np.argsort(uniform_BP, axis=1, kind="stable")[:, : config.num_train_tokens - prefix], axis=1)
    kept_BN = np.concatenate([np.tile(np.arange(prefix), (len(keys_B), 1)), prefix + kept_BP], axis=1)
    rows_BN: npt.NDArray[np.int32] = (np.arange(len(keys_B))[:, None] * config.num_tokens + kept_BN).astype(np.int32)
    return rows_BN


def keyed_uniform(keys: npt.NDArray[np.int64], draw: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The draw-th number in [0, 1) of each key: SplitMix64's finaliser of a counter; arrays are broadcast.

    Another sequence than `keyed.uniform` draws from the same key, so what the model draws never meets what the stream draws.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        counters = keys.view(np.uint64) + np.asarray(draw, np.uint64) * GOLDEN
    numbers: npt.NDArray[np.float32] = (mix(counters) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return numbers
