"""Features: what a model's head sees of every sample of a dataset, exactly once, over any number of ranks.

The probes (`probes.py`) are trained on them, so the model runs once over each split, however many probes there are. Views are those of
evaluation. Ranks share out whole batches (`stream.evaluation_batches`), so the features do not depend on how many ranks there were.

Axes: N samples, D width, L labels of a sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.dataset import Dataset, DatasetError
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.mixture import Mixture
from vitscale.model import ViT, normalize
from vitscale.stream import evaluation_batches
from vitscale.transfer import on_device


@dataclass(frozen=True)
class Features:
    """What the head sees of samples, in the order of their numbers, on one device."""

    features_ND: Tensor
    """fp32."""
    labels_NL: Tensor
    """Padded with -1, as wide as the dataset's most labels of a sample."""
    samples_N: Tensor
    """Numbers of the samples in their dataset."""

    def __len__(self) -> int:
        return len(self.features_ND)

    def take(self, rows: Tensor) -> "Features":
        """Those of some rows: their numbers, or a mask."""
        rows = rows.to(self.features_ND.device)
        return Features(self.features_ND[rows], self.labels_NL[rows], self.samples_N[rows])

    def parts(self, size: int) -> "Iterator[Features]":
        """All of them, so many at a time."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield Features(self.features_ND[part], self.labels_NL[part], self.samples_N[part])


@torch.no_grad()
def extract_features(
    model: ViT, dataset: Dataset, preprocess: PreprocessConfig, *, device: torch.device, batch_size: int, stream: StreamConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Features:  # fmt: skip
    """Features of all samples that can be used, on every rank of the process group, or alone where there is none.

    What is left out, damaged or removed, is what `evaluate.evaluate` counts. Raises DatasetError where no sample can be read.

    Args:
        model: in evaluation mode, in fp32 on `device`. With a representation layer the features are what comes out of that.
        progress: called with this rank's (samples done, samples in all).
    """
    grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    batches = evaluation_batches(
        Mixture([dataset]), model.config.image_size, preprocess, stream, batch_size=batch_size, rank=rank, world_size=world_size
    )
    own: list[tuple[Tensor, Tensor, Tensor]] = []
    of_rank, done = -(-dataset.num_kept // world_size), 0
    for batch in on_device(batches, device):
        features_BD = model.pool(model.tokens(normalize(batch.images_BHWC, preprocess))).float()
        samples_B = torch.from_numpy(batch.samples_B).to(device).where(batch.valid_B, -1)
        own.append((features_BD, batch.labels_BL, samples_B))
        done += len(samples_B)
        if progress:
            progress(min(done, of_rank), of_rank)
    if own:  # where all samples are removed no rank has a batch
        features_ND, labels_NL, samples_N = (_of_all_ranks(torch.cat(parts)) for parts in zip(*own, strict=True))
        if (usable_N := samples_N >= 0).any():
            return Features(features_ND, labels_NL, samples_N).take(usable_N)
    removed = dataset.overlay.num_removed
    raise DatasetError(
        f"none of the {dataset.num_samples} samples of {dataset.path} can be read ({removed} are removed by overlays); pack it again"
    )


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, those of rank 0 first; each rank has equally many."""
    if not dist.is_initialized():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)
