"""Probes against scikit-learn, numpy and torch's own SGD on the same features, and what they draw against what they promise."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from data_tools.config import PackConfig
from data_tools.dataset import Dataset, DatasetError
from data_tools.pack import pack
from data_tools.progress import Update, no_progress
from tests.conftest import write_images
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale import probes
from vitscale.checkpoint import Description
from vitscale.config import ConfigError, ObjectiveConfig, ViTConfig
from vitscale.features import Features
from vitscale.intervals import wilson
from vitscale.objective import per_sample_loss
from vitscale.probes import (
    correct,
    draw_shots,
    few_shot,
    held_out,
    linear_probe,
    logistic_heads,
    losses,
    neighbours,
    ridge_heads,
    sgd_heads,
    sgd_rows,
    slopes,
    votes,
)
from vitscale.probing import ProbeReport, probe

CLASSES = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are not worth several, which would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(count: int, width: int, seed: int = 0, *, labels: int = 1, spread: float = 2.0) -> Features:
    """Features around a centre for each class, the axes of very different sizes; with several labels a sample has one to `labels`."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (CLASSES, width))
    drawn = np.stack([rng.permutation(CLASSES)[:labels] for _ in range(count)]).astype(np.int32)
    drawn[np.arange(labels) >= rng.integers(1, labels + 1, count)[:, None]] = -1
    inside = (drawn >= 0)[..., None]
    features = (np.where(inside, centres[drawn], 0).sum(axis=1) + rng.normal(0, spread, (count, width))) * np.logspace(-1, 1, width) + 3
    return Features(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(drawn), torch.arange(count) * 3)


def one_label(features: Features) -> np.ndarray:
    return features.labels_NL[:, 0].numpy()


def prepared(train: Features, features: Features, constant: float) -> np.ndarray:
    """fewshot_lsr.py's inputs, in numpy."""
    x, of = train.features_ND.double().numpy(), features.features_ND.double().numpy()
    return np.pad((of - x.mean(axis=0)) / (x.std(axis=0) + 1e-5), ((0, 0), (0, 1)), constant_values=constant)


def one_of(labels: np.ndarray) -> np.ndarray:
    return np.stack([(labels == k).any(axis=1) for k in range(CLASSES)], axis=1)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e-2, 2.0**10])
@pytest.mark.parametrize(("count", "labels"), [(30, 1), (30, 3), (41, 1), (200, 1), (200, 3)])
def test_ridge_is_scikit_learns_in_either_form(count: int, labels: int, strength: float) -> None:
    """Width 40: with 30 samples through X X^T, with 41, as many as columns, and more through X^T X."""
    train, test = blobs(count, 40, labels=labels), blobs(50, 40, seed=1)
    (head,) = ridge_heads(train, CLASSES, (strength,))
    model = Ridge(alpha=strength, fit_intercept=False, solver="cholesky")
    model.fit(prepared(train, train, 100.0), np.where(one_of(train.labels_NL.numpy()), 1.0, -1.0))
    np.testing.assert_allclose(head(test.features_ND).numpy(), model.predict(prepared(train, test, 100.0)), rtol=0, atol=1e-6)


def test_both_forms_of_ridge_and_all_lambdas_are_the_normal_equations() -> None:
    for count in (30, 200):
        train, strengths = blobs(count, 40), (2.0**-4, 1.0, 2.0**10)
        x, y = prepared(train, train, 100.0), np.where(one_of(train.labels_NL.numpy()), 1.0, -1.0)
        for strength, head in zip(strengths, ridge_heads(train, CLASSES, strengths), strict=True):
            tall = np.linalg.solve(x.T @ x + strength * np.eye(41), x.T @ y)
            wide = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(count), y)
            np.testing.assert_allclose(x @ tall, x @ wide, rtol=0, atol=1e-6)
            np.testing.assert_allclose(head(train.features_ND).numpy(), x @ wide, rtol=0, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(200, 40), blobs(50, 40, seed=1)

    def all_of_it() -> list[Any]:
        heads = [*ridge_heads(train, CLASSES, (1.0,)), *logistic_heads(train, CLASSES, (0.01,))]
        return [*(head(test.features_ND) for head in heads), neighbours(train, test, CLASSES, no_progress)]

    *whole, near = all_of_it()
    monkeypatch.setattr(probes, "AT_A_TIME", 300)  # 7 samples at a time
    *parts, as_near = all_of_it()
    assert near == as_near
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    train, test = blobs(300, 12), blobs(50, 12, seed=1)
    *_, head = logistic_heads(train, CLASSES, (10.0, penalty))  # warm or not, there is one minimum
    model = LogisticRegression(C=1 / (penalty * 300), tol=1e-10, max_iter=10_000)
    model.fit(prepared(train, train, 1.0)[:, :-1], one_label(train))
    ours, theirs = head(test.features_ND).softmax(dim=1).numpy(), model.predict_proba(prepared(train, test, 1.0)[:, :-1])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_several_labels_are_as_many_logistic_regressions_of_scikit_learn() -> None:
    train, test = blobs(300, 12, labels=3), blobs(50, 12, seed=1)
    (head,) = logistic_heads(train, CLASSES, (1e-2,))
    for k in range(CLASSES):
        model = LogisticRegression(C=1 / (1e-2 * 300), tol=1e-10, max_iter=10_000)
        model.fit(prepared(train, train, 1.0)[:, :-1], one_of(train.labels_NL.numpy())[:, k])
        theirs = model.decision_function(prepared(train, test, 1.0)[:, :-1])
        np.testing.assert_allclose(head(test.features_ND)[:, k].numpy(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("several", [False, True])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_losses_are_those_of_training_and_slopes_their_gradients(several: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits_BK = (torch.randn(7, CLASSES, generator=rng, dtype=torch.float64) * 3).requires_grad_()
    labels_BL = torch.randint(-1, CLASSES, (7, 1), generator=rng)
    targets_BK = probes.targets(labels_BL, CLASSES)
    loss_B = losses(logits_BK, targets_BK, several=several)
    config = ObjectiveConfig(kind="sigmoid" if several else "softmax")
    torch.testing.assert_close(loss_B.float(), per_sample_loss(logits_BK, labels_BL, torch.ones(7, 1), config), rtol=1e-5, atol=1e-5)
    (gradient_BK,) = torch.autograd.grad(loss_B.sum(), logits_BK)
    torch.testing.assert_close(slopes(logits_BK, targets_BK, several=several), gradient_BK)


@pytest.mark.parametrize("labels", [1, 3])
def test_sgd_of_all_rates_at_once_is_torchs_of_each(labels: int) -> None:
    train, rates, steps, batch = blobs(100, 12, labels=labels), (0.01, 0.3), 25, 32
    heads = sgd_heads(train, CLASSES, rates, seed=5, steps=steps, batch_size=batch)
    x = torch.from_numpy(prepared(train, train, 1.0)[:, :-1]).float()
    y = torch.from_numpy(one_of(train.labels_NL.numpy())).float()
    for rate, head in zip(rates, heads, strict=True):
        layer = nn.Linear(12, CLASSES)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            rows = sgd_rows(step, batch, 100, seed=5)
            loss = F.cross_entropy if labels == 1 else lambda z, t: F.binary_cross_entropy_with_logits(z, t) * CLASSES
            optimizer.zero_grad()
            loss(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(head(train.features_ND).float(), layer(x).detach(), rtol=1e-4, atol=1e-4)


def test_sgd_takes_each_sample_once_an_epoch() -> None:
    rows = np.concatenate([sgd_rows(step, 32, 100, seed=1) for step in range(25)])
    epochs = rows.reshape(8, 100)
    assert (np.sort(epochs, axis=1) == np.arange(100)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 8
    assert not np.array_equal(rows[:32], sgd_rows(0, 32, 100, seed=2))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Few shots
# ---------------------------------------------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(0, 12), min_size=CLASSES, max_size=CLASSES), seed=st.integers(0, 99))
def test_shots_are_of_each_class_nested_and_the_samples_own(counts: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    samples = np.random.default_rng(seed).permutation(1000)[: len(labels)]
    train = Features(torch.zeros(len(labels), 2), torch.from_numpy(labels[:, None]), torch.from_numpy(samples))
    drawn = {shots: set(draw_shots(train, shots, seed).tolist()) for shots in (1, 5, 10, 25)}
    for shots, rows in drawn.items():
        assert np.bincount(labels[list(rows)], minlength=CLASSES).tolist() == [min(count, shots) for count in counts]
    assert all(fewer <= more for fewer, more in pairwise(drawn.values()))
    if len(labels) > 1:  # a sample is drawn or not whatever row it stands in, and whichever that was not drawn is missing
        undrawn = sorted(set(range(len(labels))) - drawn[5])
        rest = torch.tensor([row for row in reversed(range(len(labels))) if row not in undrawn[:1]])
        assert {int(rest[row]) for row in draw_shots(train.take(rest), 5, seed)} == drawn[5]


def test_a_sample_of_several_labels_is_there_once() -> None:
    train = blobs(100, 4, labels=3)
    rows = draw_shots(train, 5, seed=0)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert one_of(train.labels_NL[rows].numpy()).sum(axis=0).min() >= 5


def test_few_shot_is_big_visions_written_in_numpy() -> None:
    """The same draws, then fewshot_lsr.py's equations; seeds draw other samples and so give other accuracies."""
    train, test = blobs(120, 40), blobs(300, 40, seed=1)
    for found in few_shot(train, test, CLASSES, no_progress, shots=(1, 5, 25)):
        expected = []
        for seed in range(3):
            drawn = train.take(draw_shots(train, found.shots, seed))
            x, y = prepared(drawn, drawn, 100.0), np.where(one_of(drawn.labels_NL.numpy()), 1.0, -1.0)
            weights = np.linalg.solve(x.T @ x + 2**10 * np.eye(41), x.T @ y)
            expected.append(float(np.mean((prepared(drawn, test, 100.0) @ weights).argmax(axis=1) == one_label(test))))
        assert found.top1_of_seeds == pytest.approx(expected)
        assert len(set(expected)) > 1
        assert found.top1 == pytest.approx(np.mean(expected))
        assert 0 <= found.low < found.top1 < found.high <= 1
        assert found.short_classes == sum(np.bincount(one_label(train)) < found.shots)
    assert few_shot(train, test, CLASSES, no_progress, shots=(25,))[0].short_classes > 0


def test_all_samples_are_one_draw_with_an_interval_of_the_test_samples() -> None:
    """Seeds that draw the same would give an interval without a width, as if the figure were certain."""
    train, test = blobs(60, 40), blobs(100, 40, seed=1)
    most = int(np.bincount(one_label(train)).max())
    all_but_one, everything = few_shot(train, test, CLASSES, no_progress, shots=(most - 1, most))
    assert len(all_but_one.top1_of_seeds) == 3
    assert everything.top1_of_seeds == (everything.top1,)
    assert (everything.low, everything.high) == pytest.approx(wilson(round(everything.top1 * len(test)), len(test)))
    assert everything.low < everything.top1 < everything.high


# ---------------------------------------------------------------------------------------------------------------------------------------
# The choice of a setting
# ---------------------------------------------------------------------------------------------------------------------------------------


@given(count=st.integers(2, 300), seed=st.integers(0, 99))
def test_a_tenth_is_held_out(count: int, seed: int) -> None:
    samples = torch.arange(count) * 7
    mask = held_out(samples, seed)
    assert int(mask.sum()) == -(-count // 10)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held_out(samples[shuffled], seed), mask[shuffled])  # the sample's number tells, not its row
    if count > 100:
        assert not torch.equal(mask, held_out(samples, seed + 1))


@pytest.mark.parametrize("solver", ["ridge", "lbfgs", "sgd"])
def test_a_setting_is_chosen_without_the_samples_it_is_judged_on(monkeypatch: pytest.MonkeyPatch, solver: probes.Solver) -> None:
    """The heads that are compared see neither the held-out part nor the test samples; the last one sees all training samples."""
    name = {"ridge": "ridge_heads", "lbfgs": "logistic_heads", "sgd": "sgd_heads"}[solver]
    fit = partial(sgd_heads, steps=200) if solver == "sgd" else getattr(probes, name)
    fitted, judged = [], []

    def watched(train: Features, num_classes: int, grid: Sequence[float], *rest: Any, **more: Any) -> Iterator[probes.Head]:
        fitted.append((set(train.samples_N.tolist()), tuple(grid)))
        return fit(train, num_classes, grid, *rest, **more)

    def watched_correct(head: probes.Head, test: Features, num_classes: int) -> tuple[int, int]:
        judged.append(test)
        return correct(head, test, num_classes)

    monkeypatch.setattr(probes, name, watched)
    monkeypatch.setattr(probes, "correct", watched_correct)
    train, test = blobs(400, 12), blobs(200, 12, seed=1)
    found = linear_probe(train, test, CLASSES, solver, no_progress)
    settings = tuple(setting for setting, _ in found.grid)
    out = train.take(held_out(train.samples_N, 0))
    every = set(train.samples_N.tolist())
    assert fitted == [(every - set(out.samples_N.tolist()), settings), (every, (found.chosen,))]
    assert all(set(seen.samples_N.tolist()) == set(out.samples_N.tolist()) and len(seen) == 40 for seen in judged[:-1])
    assert judged[-1] is test
    assert len(judged) == len(settings) + 1
    assert dict(found.grid)[found.chosen] == max(top1 for _, top1 in found.grid)
    assert found.low < found.top1 < found.high
    assert found.top1 > 0.4  # of six classes


def test_top1_and_top5_are_scikit_learns() -> None:
    train, test = blobs(300, 12), blobs(200, 12, seed=1)
    found = linear_probe(train, test, CLASSES, "ridge", no_progress, grid=(1.0,))
    (head,) = ridge_heads(train, CLASSES, (1.0,))
    scores = head(test.features_ND).numpy()
    assert found.top1 == pytest.approx(top_k_accuracy_score(one_label(test), scores, k=1))
    assert found.top5 == pytest.approx(top_k_accuracy_score(one_label(test), scores, k=5))
    assert not found.at_edge


# ---------------------------------------------------------------------------------------------------------------------------------------
# Neighbours
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_votes_are_scikit_learns_with_the_same_weights() -> None:
    train, test, ks = blobs(300, 12), blobs(80, 12, seed=1), (1, 10, 20, 100)
    unit = F.normalize(train.features_ND)
    for k, votes_BK in zip(ks, votes(unit, train.labels_NL, test.features_ND, CLASSES, ks), strict=True):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
        theirs = model.fit(train.features_ND.double().numpy(), one_label(train)).predict_proba(test.features_ND.double().numpy())
        np.testing.assert_allclose(F.normalize(votes_BK, p=1, dim=1).numpy(), theirs, rtol=0, atol=1e-4)


def test_each_label_of_a_neighbour_gets_its_vote() -> None:
    train, test = blobs(60, 12, labels=3), blobs(20, 12, seed=1)
    (found,) = votes(F.normalize(train.features_ND), train.labels_NL, test.features_ND, CLASSES, (7,))
    x, of = (f.features_ND.double().numpy() for f in (train, test))
    similarity = (of / np.linalg.norm(of, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    nearest = np.argsort(-similarity, axis=1)[:, :7]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.07)
    expected = np.einsum("bj,bjk->bk", weights, one_of(train.labels_NL.numpy())[nearest])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_more_neighbours_than_samples_are_all_of_them() -> None:
    train, test = blobs(50, 12), blobs(80, 12, seed=1)
    assert [found.k for found in neighbours(train, test, CLASSES, no_progress)] == [10, 20, 50]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------------------------------------------------

MODEL = ViTConfig(depth=1, width=16, mlp_dim=16, num_heads=2, patch_size=8, image_size=(16, 24), num_classes=7)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Description:
    """Of random weights; its head is for other classes than the dataset's five, which is nothing to a probe."""
    return write_checkpoint(tmp_path / "step", random_vit(MODEL))


def probed(checkpoint: Description, dataset: Path, protocol: Any, told: Callable[..., None] = lambda *of: None, **rest: Any) -> ProbeReport:
    shown: list[str] = []

    @contextmanager
    def progress(title: str, unit: str, /) -> Iterator[Update]:
        assert not shown  # a terminal shows one bar at a time
        shown.append(title)
        yield lambda done, total: told(title, unit, done, total)
        shown.clear()

    splits = (Dataset.open(dataset / split) for split in ("train", "val"))
    return probe(checkpoint, "weight", protocol, *splits, batch_size=16, workers=2, progress=progress, **rest)


@pytest.mark.parametrize(
    ("protocol", "rest"), [("fewshot", {}), ("linear", {"solver": "ridge"}), ("linear", {"solver": "lbfgs"}), ("knn", {})]
)
def test_a_probe_of_a_checkpoint_reports(checkpoint: Description, dataset: Path, protocol: str, rest: dict[str, Any]) -> None:
    """Random features tell stripes apart, too; the report is JSON, and each part of the work is told to its end."""
    told: dict[tuple[str, str], tuple[int, int]] = {}
    report = probed(checkpoint, dataset, protocol, lambda *of: told.update({of[:2]: of[2:]}), **rest)
    assert (report.width, report.num_classes, report.train_samples, report.test_samples) == (16, 5, 131, 37)
    assert max(result.top1 for result in report.results) > 0.4
    assert json.loads(json.dumps(dataclasses.asdict(report)))["results"][0]["top1"] == report.results[0].top1
    assert {("features of the training split", "images"), ("features of the test split", "images")} < told.keys()
    assert all(done == total for done, total in told.values())


@pytest.mark.parametrize("rest", [{"shots": ()}, {"shots": (0, 5)}, {"seeds": 0}])
def test_settings_that_cannot_work_are_refused(checkpoint: Description, dataset: Path, rest: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        probed(checkpoint, dataset, "fewshot", **rest)


def test_splits_must_be_two_of_the_same_classes(checkpoint: Description, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(dataset / "train")
    (tmp_path / "train").symlink_to(dataset / "train")
    with pytest.raises(DatasetError, match="is the split that the probe is trained on"):
        probed(checkpoint, tmp_path, "knn")
    source = write_images(tmp_path / "images", 9, seed=0, num_classes=3)
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "other"), split="val"))
    (tmp_path / "val").unlink()
    (tmp_path / "val").symlink_to(tmp_path / "other" / "val")
    with pytest.raises(DatasetError, match=r"have 5 and 3 classes; a probe needs the same"):
        probed(checkpoint, tmp_path, "knn")
