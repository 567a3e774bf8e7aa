"""Measures against scikit-learn, and against numpy written out, over random guesses, labels and scores with and without ties."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix

from vitscale import measures

SEEDS = range(8)


def random_labels(rng: np.random.Generator, samples: int, classes: int, most: int) -> np.ndarray:
    """Up to `most` labels a sample, none twice, some samples without any; the last class has none."""
    labels = np.full((samples, most), -1)
    for row in labels:
        count = rng.integers(0, most + 1)
        row[:count] = rng.permutation(classes - 1)[:count]
    return labels


def dense(labels_NL: np.ndarray, classes: int) -> np.ndarray:
    return (labels_NL[:, :, None] == np.arange(classes)).any(axis=1)


def precisions_of(scores_NK: np.ndarray, labels_NL: np.ndarray, weights_NR: np.ndarray, shares: int = 1) -> np.ndarray:
    """As so many ranks compute them: each its share, in any order; counts are added when all have counted."""
    N = len(scores_NK)
    at_labels_NL = np.take_along_axis(scores_NK, np.maximum(labels_NL, 0), axis=1)
    pairs = measures.pairs_of(labels_NL, at_labels_NL)
    owns = [np.flatnonzero(np.arange(N) % shares == share)[::-1].copy() for share in range(shares)]
    told: list[list[torch.Tensor]] = []
    for own in owns:
        told.append([])
        blocks = torch.from_numpy(scores_NK[own]).split(7)
        measures.average_precisions(blocks, own, pairs, weights_NR, scores_NK.shape[1], lambda counts: told[-1].append(counts.clone()))
    sums = iter([torch.stack(of_all).sum(dim=0, dtype=torch.int32) for of_all in zip(*told, strict=True)])
    return measures.average_precisions(blocks, owns[-1], pairs, weights_NR, scores_NK.shape[1], lambda counts: counts.copy_(next(sums)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [0, 4])
def test_average_precision_is_scikit_learns(seed: int, levels: int) -> None:
    """With `levels` many scores are equal; more classes than are counted at once."""
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(5, 60)), int(rng.choice([4, 300]))
    labels_NL = random_labels(rng, N, K, 3)
    labels_NL[0, 0], labels_NL[0, 1:] = 0, -1
    scores_NK = (rng.integers(0, levels, (N, K)) if levels else rng.normal(size=(N, K))).astype(np.float32)
    found_K = precisions_of(scores_NK, labels_NL, np.ones((N, 1), np.int32))[:, 0]
    truth_NK = dense(labels_NL, K)
    there = truth_NK.any(axis=0)
    assert not there[-1]
    assert (np.isfinite(found_K) == there).all()
    expected = [average_precision_score(truth_NK[:, k], scores_NK[:, k]) for k in np.flatnonzero(there)]
    np.testing.assert_allclose(found_K[there], expected, rtol=1e-12)
    assert measures.mean_over_classes(found_K[:, None]) == (pytest.approx(np.mean(expected), rel=1e-12), None)


def test_average_precision_is_the_same_however_samples_are_dealt_out() -> None:
    rng = np.random.default_rng(3)
    labels_NL, scores_NK = random_labels(rng, 41, 6, 3), rng.integers(0, 9, (41, 6)).astype(np.float32)
    weights_NR = measures.resample(41, 5, seed=1)
    whole = precisions_of(scores_NK, labels_NL, weights_NR)
    for shares in (2, 3):
        np.testing.assert_array_equal(precisions_of(scores_NK, labels_NL, weights_NR, shares), whole)


def test_a_resample_is_scikit_learns_average_precision_of_the_drawn_samples() -> None:
    rng = np.random.default_rng(5)
    labels_NL, scores_NK = random_labels(rng, 30, 5, 2), rng.integers(0, 6, (30, 5)).astype(np.float32)
    weights_NR = measures.resample(30, 20, seed=2)
    assert (weights_NR[:, 0] == 1).all()
    assert (weights_NR.sum(axis=0) == 30).all()
    found_KR = precisions_of(scores_NK, labels_NL, weights_NR)
    truth_NK, means = dense(labels_NL, 5), []
    for r in range(21):
        drawn = np.repeat(np.arange(30), weights_NR[:, r])
        there = np.flatnonzero(truth_NK[drawn].any(axis=0))
        expected = [average_precision_score(truth_NK[drawn, k], scores_NK[drawn, k]) for k in there]
        np.testing.assert_allclose(found_KR[there, r], expected, rtol=1e-12)
        means.append(np.mean(expected))
    mean, interval = measures.mean_over_classes(found_KR)
    assert mean == pytest.approx(means[0])
    assert interval == pytest.approx(np.quantile(means[1:], [0.025, 0.975]))


def test_resamples_are_keyed_and_cover_what_they_should() -> None:
    np.testing.assert_array_equal(measures.resample(50, 3, seed=4), measures.resample(50, 6, seed=4)[:, :4])
    assert (measures.resample(50, 3, seed=4)[:, 1:] != measures.resample(50, 3, seed=5)[:, 1:]).any()
    weights = measures.resample(200, 400, seed=0)[:, 1:]
    assert weights.mean(axis=1) == pytest.approx(1, abs=0.25)  # five standard errors
    assert (weights == 0).mean() == pytest.approx(np.exp(-1), abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_that_score_as_high(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, weights = rng.integers(0, 5, 20).astype(np.float32), rng.integers(0, 4, (20, 3)).astype(np.int32)
    thresholds = np.sort(rng.integers(0, 6, 7)).astype(np.float32)
    found = measures.count_as_high(*map(torch.from_numpy, (scores, thresholds, weights)))
    assert found.tolist() == [weights[scores >= threshold].sum(axis=0).tolist() for threshold in thresholds]


@pytest.mark.parametrize("seed", SEEDS)
def test_confusions_and_classes_are_the_confusion_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, guesses = rng.integers(0, 6, 80), rng.integers(0, 7, 80)
    matrix = confusion_matrix(labels, guesses, labels=range(7))
    found = measures.list_confusions(labels[:, None], guesses, str)
    assert {(of.label, of.guess): of.samples for of in found} == {
        (i, j): matrix[i, j] for i in range(7) for j in range(7) if i != j and matrix[i, j]
    }
    assert [of.samples for of in found] == sorted((of.samples for of in found), reverse=True)
    for row in measures.measure_classes(labels[:, None], guesses, found, None, [f"c{k}" for k in range(7)]):
        assert (row.samples, row.right) == (matrix[row.label].sum(), matrix[row.label, row.label])
        assert row.accuracy == (row.right / row.samples if row.samples else None)
        wrong = np.where(np.arange(7) == row.label, 0, matrix[row.label])
        assert row.confused == wrong.max()
        assert row.confused_with == (str(wrong.argmax()) if wrong.any() else "")
        assert row.average_precision is None


def test_with_several_labels_a_guess_among_them_is_right_for_each() -> None:
    labels_NL = np.array([[0, 1], [0, -1], [2, 0], [-1, -1]])
    guesses = np.array([1, 2, 1, 0])
    assert measures.is_right(labels_NL, guesses).tolist() == [True, False, False, False]
    confusions = measures.list_confusions(labels_NL, guesses, str)
    assert [(of.label, of.guess, of.samples) for of in confusions] == [(0, 1, 1), (0, 2, 1), (2, 1, 1)]
    rows = measures.measure_classes(labels_NL, guesses, confusions, np.array([0.5, 1.0, 0.25]), ["a", "b", "c"])
    assert [(of.samples, of.right, of.average_precision) for of in rows] == [(3, 1, 0.5), (1, 1, 1.0), (1, 0, 0.25)]


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_written_out(seed: int) -> None:
    """Some confidences lie on the edges of bins, which belong to the bin below."""
    rng = np.random.default_rng(seed)
    confidences = np.concatenate([rng.uniform(size=100), np.linspace(0, 1, 16), [1.0, 0.2, 1e-9]])
    right = rng.uniform(size=len(confidences)) < confidences**2
    error = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = ((confidences > low) | ((low == 0) & (confidences == 0))) & (confidences <= high)
        if inside.any():
            error += abs(right[inside].mean() - confidences[inside].mean()) * inside.mean()
    assert measures.calibration_error(confidences, right) == pytest.approx(error, rel=1e-12)
    assert measures.calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == 0


def test_samples_without_reassessed_labels_count_for_nothing() -> None:
    real_NL = np.array([[3, 1], [-1, -1], [2, -1], [0, -1]])
    assert measures.count_real(real_NL, np.array([1, 0, 0, 0])) == (2, 3)
