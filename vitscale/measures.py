"""What an evaluation tells of a model: each sample's guess, confidence and scores beside its labels, to measures.

Where it stands: `evaluate.py` gathers what is told of each sample over all ranks, in the dataset's order, and asks here. Nothing here knows
of models, files or ranks, so a measure cannot depend on how the samples were dealt out. What needs every score of every sample, average
precision, is cut so that a rank keeps its own samples' scores and only counts, which are whole numbers, are added over the ranks.

What each measure is, and by whom, is docs/evaluation.md's.

Axes: N samples, n of them one rank's, K classes, L labels of a sample (padded with -1), P pairs of a sample and one of its labels, p of
them one class's, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_tools.progress import Update, no_update
from vitscale import keyed

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

BINS = 15  # of the calibration error, as in Guo et al.
_CLASSES_AT_ONCE = 256  # whose counts the ranks add together


@dataclass(frozen=True)
class ClassMeasure:
    """How one class fares."""

    label: int
    name: str
    samples: int
    """That have this label."""
    right: int
    """Of these, whose guess is one of their labels."""
    accuracy: float | None
    """None without samples."""
    confused_with: str
    """The wrong guess most often made of them; empty where none was."""
    confused: int
    """How often that was."""
    average_precision: float | None
    """None without samples, and where it was not asked for."""


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another. A wrong guess counts once for each label of its sample."""

    label: int
    name: str
    guess: int
    guess_name: str
    samples: int


# ---------------------------------------------------------------------------------------------------------------------------------------
# Of each sample's guess
# ---------------------------------------------------------------------------------------------------------------------------------------


def is_right(labels_NL: Integers, guesses_N: Integers) -> Mask:
    """Whether each sample's guess is one of its labels."""
    found: Mask = (labels_NL == guesses_N[:, None]).any(axis=1)
    return found


def calibration_error(confidences_N: Floats, right_N: Mask) -> float:
    """Expected calibration error: how far confidence is from accuracy in 15 bins of equal width, (lower, upper], weighed by their samples.

    Guo et al., "On Calibration of Modern Neural Networks", section 2 (arXiv 1706.04599).

    Args:
        confidences_N: the probability, in [0, 1], that the model gives its guess: its share of the softmax, or its own sigmoid.
    """
    bins_N = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidences_N, side="left")
    gaps = np.bincount(bins_N, weights=confidences_N - right_N, minlength=BINS)
    return float(np.abs(gaps).sum()) / len(confidences_N)


def count_real(real_NL: Integers, guesses_N: Integers) -> tuple[int, int]:
    """Guesses among the reassessed labels, and samples that have any: those without count for nothing (arXiv 2006.07159)."""
    return int(is_right(real_NL, guesses_N).sum()), int((real_NL >= 0).any(axis=1).sum())


def list_confusions(labels_NL: Integers, guesses_N: Integers, name_of: Callable[[int], str]) -> list[Confusion]:
    """Which classes are taken for which, most frequent first; the numbers of the classes settle ties."""
    samples_P, places_P = np.nonzero((labels_NL >= 0) & ~is_right(labels_NL, guesses_N)[:, None])
    pairs_P2 = np.stack([labels_NL[samples_P, places_P], guesses_N[samples_P]], axis=1)
    pairs, counts = np.unique(pairs_P2, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(label, name_of(label), guess, name_of(guess), times)
        for (label, guess), times in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def measure_classes(
    labels_NL: Integers, guesses_N: Integers, confusions: Sequence[Confusion], precisions_K: Floats | None, names: Sequence[str]
) -> list[ClassMeasure]:
    """A row a class, in the order of their numbers.

    Args:
        confusions: of the same samples (`list_confusions`).
        precisions_K: average precisions, NaN without samples; None where they were not asked for.
    """
    right_N = is_right(labels_NL, guesses_N)
    samples_K, right_K = (
        np.bincount(labels[labels >= 0], minlength=len(names)).tolist() for labels in (labels_NL.ravel(), labels_NL[right_N].ravel())
    )
    most: dict[int, Confusion] = {}
    for confusion in confusions:
        most.setdefault(confusion.label, confusion)
    rows = []
    for label, name in enumerate(names):
        samples, right, worst = samples_K[label], right_K[label], most.get(label)
        precision = float(precisions_K[label]) if precisions_K is not None and samples else None
        rows.append(
            ClassMeasure(
                label,
                name,
                samples,
                right,
                right / samples if samples else None,
                worst.guess_name if worst else "",
                worst.samples if worst else 0,
                precision,
            )
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------------------------
# Average precision
# ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """All pairs of a sample and one of its labels, of all ranks."""

    samples_P: Integers
    """The sample's place among the N."""
    labels_P: Integers
    scores_P: npt.NDArray[np.float32]
    """The sample's score for that label."""


def pairs_of(labels_NL: Integers, scores_NL: npt.NDArray[Any]) -> Pairs:
    """The pairs, by label and then by score.

    Args:
        scores_NL: each sample's score for each of its labels; anything where there is none.
    """
    samples_P, places_P = np.nonzero(labels_NL >= 0)
    labels_P, scores_P = labels_NL[samples_P, places_P], scores_NL[samples_P, places_P].astype(np.float32)
    order = np.lexsort((scores_P, labels_P))
    return Pairs(samples_P[order], labels_P[order], scores_P[order])


def average_precisions(
    scores: Sequence[Tensor], own_n: Integers, pairs: Pairs, weights_NR: npt.NDArray[np.int32], num_classes: int,
    add: Callable[[Tensor], object] = lambda counts: None, progress: Update = no_update,
) -> Floats:  # fmt: skip
    """Average precision of each class under each column of weights (K, R), NaN where a class has no sample of any weight.

    The sum over recall steps of precision, as scikit-learn's `average_precision_score` has it, without interpolation: each sample of the
    class brings the precision at its own score, where equal scores are taken together. What that needs is how many samples score as high
    as each sample of the class, so a rank counts among its own, and the counts are added. It takes n x K scores of 4 bytes on each rank,
    and sends P x R counts in all; to bring all scores of a class to one rank would send all of them, n x K a rank.

    Args:
        scores: of this rank's samples, in blocks (b, K) of some of the n, in fp32 on the CPU.
        own_n: the places of these samples among the N.
        weights_NR: how often each sample counts: once, or as often as it was drawn (`resample`).
        add: adds counts (int32) over the ranks, in place. All ranks call it equally often.
        progress: called with (classes done, classes in all).
    """
    K, R = num_classes, weights_NR.shape[1]
    weights_nR = torch.from_numpy(weights_NR[own_n])
    bounds = np.searchsorted(pairs.labels_P, np.arange(K + 1)).tolist()
    precisions_KR = np.full((K, R), np.nan)
    for first in range(0, K, _CLASSES_AT_ONCE):
        progress(first, K)
        classes = [k for k in range(first, min(first + _CLASSES_AT_ONCE, K)) if bounds[k] < bounds[k + 1]]
        if not classes:
            continue
        own_kn = torch.cat([block_bK[:, first : first + _CLASSES_AT_ONCE].T for block_bK in scores], dim=1)
        of_class = {k: torch.from_numpy(pairs.scores_P[bounds[k] : bounds[k + 1]]) for k in classes}
        counts_PR = torch.cat([count_as_high(own_kn[k - first], of_class[k], weights_nR) for k in classes])
        add(counts_PR)
        start = 0
        for k in classes:
            drawn_pR = weights_NR[pairs.samples_P[bounds[k] : bounds[k + 1]]]
            right_pR = count_as_high(of_class[k], of_class[k], torch.from_numpy(drawn_pR)).numpy()
            all_pR = counts_PR[start : start + len(drawn_pR)].numpy()
            start += len(drawn_pR)
            with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a resample in which the class has no sample
                precisions_KR[k] = (drawn_pR * (right_pR / np.maximum(all_pR, 1))).sum(axis=0) / drawn_pR.sum(axis=0)
    return precisions_KR


def count_as_high(scores_n: Tensor, thresholds_p: Tensor, weights_nR: Tensor) -> Tensor:
    """The weight (p, R) of the samples that score at least as high as each of the thresholds, which rise."""
    reached_n = torch.searchsorted(thresholds_p, scores_n, right=True)
    at_QR = torch.zeros(len(thresholds_p) + 1, weights_nR.shape[1], dtype=torch.int32).index_add_(0, reached_n, weights_nR)
    return at_QR.flip(0).cumsum(0, dtype=torch.int32).flip(0)[1:]


def resample(num_samples: int, resamples: int, seed: int) -> npt.NDArray[np.int32]:
    """Weights (N, 1 + R): of the samples as they are, and of R bootstrap resamples: as many samples, drawn with replacement.

    Each draw is keyed by (seed, resample, number of the draw), so every rank draws the same.
    """
    weights_NR = np.ones((num_samples, 1 + resamples), dtype=np.int32)
    for number in range(resamples):
        drawn_N = keyed.uniform(keyed.key(keyed.Purpose.BOOTSTRAP, seed, number), np.arange(num_samples)) * num_samples
        weights_NR[:, 1 + number] = np.bincount(drawn_N.astype(np.int64), minlength=num_samples)
    return weights_NR


def mean_over_classes(precisions_KR: Floats, confidence: float = 0.95) -> tuple[float, tuple[float, float] | None]:
    """Mean average precision over the classes that have samples, and its percentile interval over the resamples, where there are any."""
    with np.errstate(invalid="ignore"):
        means_R = np.nansum(precisions_KR, axis=0) / np.isfinite(precisions_KR).sum(axis=0)
    if len(means_R) == 1:
        return float(means_R[0]), None
    low, high = np.quantile(means_R[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(means_R[0]), (float(low), float(high))
