"""Evaluation: every sample of a dataset exactly once, over any number of ranks.

`evaluate` is what the training loop calls on its live model: top-1, top-5 and loss, as exact counts (and fp64 losses) over all ranks.
`evaluate_checkpoint` is what `vitscale evaluate` calls on a loaded one: it keeps a row a sample besides, gathers the rows in the dataset's
order, and has `measures.py` make everything else of them. So no result depends on how the samples were dealt out.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.dataset import Dataset, DatasetError
from data_tools.progress import Progress, Update, no_progress, no_update
from vitscale.checkpoint import Description
from vitscale.config import ObjectiveConfig, PreprocessConfig, StreamConfig
from vitscale.group import add, gather, own_batches, own_device, place, unreadable
from vitscale.inputs import check_head
from vitscale.intervals import wilson
from vitscale.machine import available_memory
from vitscale.measures import (
    ClassMeasure,
    Confusion,
    average_precisions,
    calibration_error,
    count_real,
    is_right,
    list_confusions,
    mean_over_classes,
    measure_classes,
    pairs_of,
    resample,
)
from vitscale.model import normalize
from vitscale.objective import correct_at, per_sample_loss
from vitscale.transfer import DeviceBatch
from vitscale.weights import load_model

Interval = tuple[float, float]


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


@dataclass(frozen=True)
class Measures(Evaluation):
    """All that `vitscale evaluate` tells of a checkpoint on one dataset. Intervals cover 95%."""

    top1_interval: Interval
    """Wilson's, as of all accuracies: what another draw of so many samples might have given."""
    top5_interval: Interval
    calibration_error: float
    real_top1: float | None
    """Share of the samples that have reassessed labels whose highest logit is one of them; None where no file of them was given."""
    real_interval: Interval | None
    real_samples: int | None
    mean_average_precision: float | None
    """Over the classes that have samples; None where it was not asked for."""
    mean_average_precision_interval: Interval | None
    """Over bootstrap resamples of the samples; None where none were asked for."""
    classes_with_samples: int
    classes: tuple[ClassMeasure, ...]
    confusions: tuple[Confusion, ...]
    """All there are, most frequent first."""


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor], dataset: Dataset, image_size: tuple[int, int], preprocess: PreprocessConfig,
    objective: ObjectiveConfig, *, device: torch.device, batch_size: int, stream: StreamConfig,
    progress: Update = no_update, see: Callable[[DeviceBatch, Tensor], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluates over all ranks of the process group, or alone where there is none. Raises DatasetError where no sample can be read.

    Args:
        forward: normalised fp32 images (B, C, H, W) to logits (B, K), in evaluation mode; called equally often on every rank.
        progress: called with this rank's (samples done, samples in all).
        see: called with each of this rank's batches and its logits in fp32.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # samples, top-1, top-5, loss
    for batch in own_batches(dataset, image_size, preprocess, stream, device=device, batch_size=batch_size, progress=progress):
        logits_BK = forward(normalize(batch.images_BHWC, preprocess)).float()
        of_each = (
            torch.ones_like(batch.valid_B),
            correct_at(logits_BK, batch.labels_BL, 1),
            correct_at(logits_BK, batch.labels_BL, 5),
            per_sample_loss(logits_BK, batch.labels_BL, batch.scores_BL, objective),
        )
        sums += torch.stack([torch.where(batch.valid_B, values_B.double(), 0.0).sum() for values_B in of_each])
        if see:
            see(batch, logits_BK)
    add(sums)
    samples, top1, top5, loss = sums.tolist()
    if samples == 0:
        raise unreadable(dataset)
    skipped, removed = dataset.num_kept - int(samples), dataset.overlay.num_removed
    return Evaluation(top1 / samples, top5 / samples, loss / samples, int(samples), skipped, removed)


def evaluate_checkpoint(
    description: Description, kind: str, dataset: Dataset, *, batch_size: int, workers: int, progress: Progress = no_progress,
    real_NL: npt.NDArray[np.int32] | None = None, precision: bool = False, resamples: int = 0, seed: int = 0,
) -> Measures:  # fmt: skip
    """A checkpoint's own head on a dataset, in fp32, over all ranks of the process group or alone on one device.

    Raises CheckpointError where there is no head or it is another's, DatasetError where no sample can be read.

    Args:
        kind: `average` (where there is one) or `weight`.
        real_NL: labels of every sample of the dataset (`reassessed.read_real_labels`), to be evaluated against, too.
        precision: whether to keep all scores for average precision: 4 bytes for each of a rank's samples and class, in its memory.
        resamples: for the interval of the mean average precision; 0: none.
        seed: of the resamples.
    """
    check_head(description, dataset)
    device, rows, scores = own_device(), list[Tensor](), list[Tensor]()
    if precision:
        check_memory(dataset)

    def keep(batch: DeviceBatch, logits_BK: Tensor) -> None:
        told_BX, scores_BK = tell_of_samples(batch, logits_BK, description.objective)
        rows.append(told_BX)
        if precision:
            scores.append(scores_BK[batch.valid_B].cpu())

    model = load_model(description, kind).to(device)
    with progress("evaluating", "images") as update:
        result = evaluate(
            model, dataset, description.model.image_size, description.preprocess, description.objective, device=device,
            batch_size=batch_size, stream=StreamConfig(workers=workers), progress=update, see=keep,
        )  # fmt: skip
    own_nX = torch.cat(rows)
    told_NX = _of_all_ranks(own_nX)
    samples_N, guesses_N, confidences_N = told_NX[:, 0].astype(np.int64), told_NX[:, 1].astype(np.int64), told_NX[:, 2]
    labels_NL, _ = dataset.labels(samples_N)
    precisions_KR = None
    if precision:
        own_n = np.searchsorted(samples_N, own_nX[own_nX[:, 0] >= 0, 0].cpu().numpy())
        weights_NR = resample(len(samples_N), resamples, seed)
        pairs = pairs_of(labels_NL, told_NX[:, 3:])
        with progress("average precision", "classes") as update:
            precisions_KR = average_precisions(scores, own_n, pairs, weights_NR, dataset.num_classes, add, update)
    return _measures(result, dataset, labels_NL, guesses_N, confidences_N, None if real_NL is None else real_NL[samples_N], precisions_KR)


def check_memory(dataset: Dataset) -> None:
    """Raises DatasetError where this machine has no room for all scores of its ranks' samples."""
    ranks, world_size = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1, place()[1]
    samples = -(-dataset.num_samples * ranks // world_size)
    if (needed := 4 * samples * dataset.num_classes) > (there := available_memory()):
        raise DatasetError(
            f"average precision keeps {needed:,} bytes of scores in memory ({samples:,} samples x {dataset.num_classes:,} classes), and "
            f"{there:,} are available; leave out --average-precision, or evaluate where there is more"
        )


def tell_of_samples(batch: DeviceBatch, logits_BK: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """What is kept of a batch's samples: rows (B, 3 + L) in fp64, and scores (B, K).

    A row holds the sample's number, or -1 where there is none, its guess, how probable the model has it, and its score for each label. A
    score orders samples for one class: softmax's log-probability, or sigmoid's logit, which never saturates.
    """
    guesses_B1 = logits_BK.topk(1, dim=-1).indices
    softmax = objective.kind == "softmax"
    scores_BK = logits_BK.log_softmax(dim=-1) if softmax else logits_BK
    best_B1 = scores_BK.gather(1, guesses_B1).double()
    samples_B = torch.from_numpy(batch.samples_B).to(logits_BK.device).where(batch.valid_B, -1)
    of_labels_BL = scores_BK.gather(1, batch.labels_BL.clamp(min=0).long())
    told = (samples_B[:, None], guesses_B1, best_B1.exp() if softmax else best_B1.sigmoid(), of_labels_BL)
    return torch.cat([column.double() for column in told], dim=1), scores_BK


def _measures(
    result: Evaluation, dataset: Dataset, labels_NL: npt.NDArray[np.int32], guesses_N: npt.NDArray[np.int64],
    confidences_N: npt.NDArray[np.float64], real_NL: npt.NDArray[np.int32] | None, precisions_KR: npt.NDArray[np.float64] | None,
) -> Measures:  # fmt: skip
    """Everything told, of what all ranks hold alike."""
    samples = result.samples
    confusions = list_confusions(labels_NL, guesses_N, dataset.class_name)
    names = [dataset.class_name(label) for label in range(dataset.num_classes)]
    classes = measure_classes(labels_NL, guesses_N, confusions, None if precisions_KR is None else precisions_KR[:, 0], names)
    right, labelled = count_real(real_NL, guesses_N) if real_NL is not None else (0, 0)
    mean, interval = mean_over_classes(precisions_KR) if precisions_KR is not None else (None, None)
    return Measures(
        **asdict(result),
        top1_interval=wilson(round(result.top1 * samples), samples),
        top5_interval=wilson(round(result.top5 * samples), samples),
        calibration_error=calibration_error(confidences_N, is_right(labels_NL, guesses_N)),
        real_top1=right / labelled if labelled else None,
        real_interval=wilson(right, labelled) if labelled else None,
        real_samples=None if real_NL is None else labelled,
        mean_average_precision=mean,
        mean_average_precision_interval=interval,
        classes_with_samples=sum(of.samples > 0 for of in classes),
        classes=tuple(classes),
        confusions=tuple(confusions),
    )


def _of_all_ranks(rows_nX: Tensor) -> npt.NDArray[np.float64]:
    """The rows of all ranks' samples in the dataset's order, without those that are no sample's."""
    told_NX = gather(rows_nX).cpu().numpy()
    told_NX = told_NX[told_NX[:, 0] >= 0]
    return told_NX[np.argsort(told_NX[:, 0])]
