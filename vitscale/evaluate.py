"""Evaluation: every sample of a dataset exactly once, over any number of ranks.

`evaluate` is what the training loop calls on its live model and what `vitscale evaluate` calls on a loaded one; sums are exact counts (and
fp64 losses) over all ranks, so the result does not depend on how the samples were dealt out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.dataset import Dataset, DatasetError
from vitscale.checkpoint import CheckpointError, Description, read_weights
from vitscale.config import ObjectiveConfig, PreprocessConfig, StreamConfig
from vitscale.mixture import Mixture
from vitscale.model import ViT, normalize, parameter_shapes
from vitscale.objective import correct_at, per_sample_loss
from vitscale.stream import evaluation_batches
from vitscale.transfer import on_device


@dataclass(frozen=True)
class Evaluation:
    """Results on one dataset."""

    top1: float
    """Share of samples whose highest logit is one of their labels."""
    top5: float
    loss: float
    samples: int
    """That were evaluated."""
    skipped: int
    """That could not be used: damaged, or not decodable."""
    removed: int
    """That an overlay removes; where a part is evaluated, in the whole dataset."""


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor], dataset: Dataset, image_size: tuple[int, int], preprocess: PreprocessConfig,
    objective: ObjectiveConfig, *, device: torch.device, batch_size: int, stream: StreamConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluates over all ranks of the process group, or alone where there is none. Raises DatasetError where no sample can be read.

    Args:
        forward: normalised fp32 images (B, C, H, W) to logits (B, K), in evaluation mode; called equally often on every rank.
        progress: called with this rank's (samples done, samples in all).
    """
    grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    batches = evaluation_batches(
        Mixture([dataset]), image_size, preprocess, stream, batch_size=batch_size, rank=rank, world_size=world_size
    )
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # samples, top-1, top-5, loss
    done = 0
    for batch in on_device(batches, device):
        logits_BK = forward(normalize(batch.images_BHWC, preprocess)).float()
        of_each = (
            torch.ones_like(batch.valid_B),
            correct_at(logits_BK, batch.labels_BL, 1),
            correct_at(logits_BK, batch.labels_BL, 5),
            per_sample_loss(logits_BK, batch.labels_BL, batch.scores_BL, objective),
        )
        sums += torch.stack([torch.where(batch.valid_B, values_B.double(), 0.0).sum() for values_B in of_each])
        done += len(batch.valid_B)
        if progress:
            progress(min(done, -(-dataset.num_kept // world_size)), -(-dataset.num_kept // world_size))
    if grouped:
        dist.all_reduce(sums)
    samples, top1, top5, loss = sums.tolist()
    removed = dataset.overlay.num_removed
    if samples == 0:
        raise DatasetError(
            f"none of the {dataset.num_samples} samples of {dataset.path} can be read ({removed} are removed by overlays); pack it again"
        )
    return Evaluation(
        top1 / samples, top5 / samples, loss / samples, int(samples), skipped=dataset.num_kept - int(samples), removed=removed
    )  # fmt: skip


def load_model(description: Description, kind: str) -> ViT:
    """The model of a checkpoint or an export, in evaluation mode on the CPU. Raises CheckpointError where a tensor is missing or extra.

    Args:
        kind: `average` (where there is one) or `weight`.
    """
    model = ViT(description.model)
    model.load_state_dict(read_weights(description, kind, parameter_shapes(description.model)))
    return model.eval()


def evaluate_checkpoint(
    description: Description, kind: str, dataset: Dataset, *, batch_size: int, workers: int, progress: Callable[[int, int], None]
) -> Evaluation:
    """A checkpoint's own head on a dataset, in fp32 on one device. Raises CheckpointError where there is no head or it is another's."""
    if description.model.num_classes != dataset.num_classes:
        raise CheckpointError(
            f"{description.path} has a head of {description.model.num_classes} classes, {dataset.path} has {dataset.num_classes}; "
            "fine-tune the checkpoint on these classes first"
        )
    if description.class_names != dataset.class_names:
        names = ["no class names" if not of.class_names else f"{of.class_names[0]}, ..." for of in (description, dataset)]
        raise CheckpointError(
            f"{description.path} was trained on {names[0]}, {dataset.path} has {names[1]}: labels may mean other classes; pack it with the "
            "--class-names of the training split, or without"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(description, kind).to(device)
    return evaluate(
        model, dataset, description.model.image_size, description.preprocess, description.objective, device=device,
        batch_size=batch_size, stream=StreamConfig(workers=workers), progress=progress,
    )  # fmt: skip
