"""Features: what a model's head sees of every sample of a dataset, exactly once, over any number of ranks.

The probes (`probes.py`) are trained on them, so the model runs once over each split, however many probes there are. Views are those of
evaluation. Ranks share out whole batches (`group.own_batches`), so the features do not depend on how many ranks there were.

Axes: N samples, D width, L labels of a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.dataset import Dataset
from data_tools.progress import Update, no_update
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.group import gather, own_batches, unreadable
from vitscale.model import ViT, normalize


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
    progress: Update = no_update,
) -> Features:  # fmt: skip
    """Features of all samples that can be used, on every rank of the process group, or alone where there is none.

    What is left out, damaged or removed, is what `evaluate.evaluate` counts. Raises DatasetError where no sample can be read.

    Args:
        model: in evaluation mode, in fp32 on `device`. With a representation layer the features are what comes out of that.
        progress: called with this rank's (samples done, samples in all).
    """
    own: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in own_batches(dataset, model.config.image_size, preprocess, stream, device=device, batch_size=batch_size, progress=progress):
        features_BD = model.pool(model.tokens(normalize(batch.images_BHWC, preprocess))).float()
        samples_B = torch.from_numpy(batch.samples_B).to(device).where(batch.valid_B, -1)
        own.append((features_BD, batch.labels_BL, samples_B))
    if own:  # where all samples are removed no rank has a batch
        features_ND, labels_NL, samples_N = (gather(torch.cat(parts)) for parts in zip(*own, strict=True))
        if (usable_N := samples_N >= 0).any():
            return Features(features_ND, labels_NL, samples_N).take(usable_N)
    raise unreadable(dataset)
