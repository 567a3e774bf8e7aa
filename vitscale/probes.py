"""Probes: how good features are, told by the simplest classifiers that can be trained on them.

    few_shot       ridge regression on a few samples of each class, as big_vision's evaluators/fewshot_lsr.py
    linear_probe   a linear head on all samples: ridge regression, logistic regression by L-BFGS, or SGD, whose one setting is chosen on
                   training samples that are held out; the test samples are looked at once, by the head that was chosen
    neighbours     the votes of the nearest training samples, as DINO's and DINOv2's eval_knn.py and eval/knn.py

All are pure functions of two sets of features (`features.py`). What they draw is keyed by a seed and by the samples' numbers in their
dataset, so it does not depend on which others could be read. They compute where the features are, in fp64 but for SGD and neighbours, a
bounded number of samples at a time. A sample of several labels is classified rightly where any of them is found, as in `evaluate.py`.

Axes: N training samples, B samples at a time, D width, F = D + 1 with the constant, K classes, L labels, G settings, R rows, J neighbours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_tools.progress import Progress, Update, no_update
from vitscale import keyed
from vitscale.config import SEEDS, SHOTS, SOLVER_SETTING, Solver
from vitscale.features import Features
from vitscale.intervals import mean_interval, wilson
from vitscale.objective import correct_at, dense_targets

Head = Callable[[Tensor], Tensor]
"""Features (B, D) to scores (B, K), the highest for the class that is meant."""

FEW_SHOT_LAMBDA = 2.0**10
RIDGE_CONSTANT = 100.0  # so large that its weight, the bias, is hardly regularised (fewshot_lsr.py)
NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
HELD_OUT = 0.1  # share, as DINOv2's eval/log_regression.py
LAMBDAS = tuple(2.0**power for power in range(20, -5, -2))
PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # DINOv2's eval/linear.py, of 256 samples
SGD_STEPS, SGD_BATCH = 12_500, 1024  # the same: 10 epochs of 1,250
AT_A_TIME = 2**26  # numbers of a matrix with a row a sample: half a GiB of them in fp64


@dataclass(frozen=True)
class FewShot:
    """What a few samples of each class teach."""

    shots: int
    top1: float
    """Mean over the seeds, each of which draws other samples."""
    low: float
    """Of the 95% interval: Student's t over the seeds; of a single draw, Wilson's over the test samples."""
    high: float
    top1_of_seeds: tuple[float, ...]
    """A single one where every seed would draw the same: all training samples."""
    short_classes: int
    """That have fewer training samples than `shots`, and gave all they have."""


@dataclass(frozen=True)
class Linear:
    """What a linear head reaches."""

    solver: Solver
    chosen: float
    """Of the grid: ridge regression's lambda, the L2 penalty of logistic regression, or SGD's learning rate of 256 samples."""
    grid: tuple[tuple[float, float], ...]
    """Each setting, with the top-1 on the part that was held out."""
    held_out: int
    """Training samples in that part."""
    top1: float
    low: float
    """Of the 95% interval (Wilson)."""
    high: float
    top5: float
    at_edge: bool
    """Whether the best setting was the grid's first or last, so that one beyond may be better."""


@dataclass(frozen=True)
class Neighbours:
    """What the votes of the k nearest training samples reach."""

    k: int
    top1: float
    low: float
    """Of the 95% interval (Wilson)."""
    high: float
    top5: float


# ---------------------------------------------------------------------------------------------------------------------------------------
# Few shots
# ---------------------------------------------------------------------------------------------------------------------------------------


def few_shot(
    train: Features, test: Features, num_classes: int, progress: Progress, *, shots: Sequence[int] = SHOTS, seeds: int = SEEDS
) -> list[FewShot]:
    """Ridge regression on so many samples of each class, for each of `shots`, over seeds 0 to `seeds` - 1.

    A class with fewer samples gives all it has, as upstream. A sample that is drawn for several of its labels is there once.
    """
    counts_K = torch.bincount(train.labels_NL[train.labels_NL >= 0].long(), minlength=num_classes)
    results = []
    with progress("few-shot regressions", "fits") as update:
        for i, each in enumerate(shots):
            hits = []
            for seed in range(seeds if bool((counts_K > each).any()) else 1):  # else each would draw all there are
                update(i * seeds + seed, len(shots) * seeds)
                drawn = train.take(draw_shots(train, each, seed))
                (head,) = ridge_heads(drawn, num_classes, (FEW_SHOT_LAMBDA,))
                hits.append(correct(head, test, num_classes)[0])
            of_seeds = tuple(hit / len(test) for hit in hits)
            mean, low, high = mean_interval(of_seeds) if len(hits) > 1 else (of_seeds[0], *wilson(hits[0], len(test)))
            results.append(FewShot(each, mean, max(0.0, low), min(1.0, high), of_seeds, int((counts_K < each).sum())))
        update(len(shots) * seeds, len(shots) * seeds)
    return results


def draw_shots(train: Features, shots: int, seed: int) -> Tensor:
    """Rows (R,) of the training samples drawn for a few-shot probe, ascending: of each class those `shots` whose keys are lowest.

    So the samples of fewer shots are among those of more.
    """
    rows, columns = (train.labels_NL.cpu().numpy() >= 0).nonzero()
    labels = train.labels_NL.cpu().numpy()[rows, columns]
    order = np.lexsort((keyed.key(keyed.Purpose.SHOTS, seed, train.samples_N.cpu().numpy()[rows]), labels))
    rows, labels = rows[order], labels[order]
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # in its class
    return torch.from_numpy(np.unique(rows[place < shots]))


# ---------------------------------------------------------------------------------------------------------------------------------------
# A linear head on all samples
# ---------------------------------------------------------------------------------------------------------------------------------------


def linear_probe(
    train: Features, test: Features, num_classes: int, solver: Solver, progress: Progress, *,
    grid: Sequence[float] | None = None, seed: int = 0,
) -> Linear:  # fmt: skip
    """A linear head with the best setting of the solver's grid, trained on all training samples.

    For each setting a head is trained without the part held out, whose top-1 chooses; of equals the first, the most regularised one.
    Logistic regression and SGD have the softmax loss, or the sigmoid loss where samples may have several labels.

    Args:
        grid: in place of the solver's own, the most regularised setting first.
        seed: draws the part held out, and the order of samples in SGD.
    """
    fit, settings = {
        "ridge": (ridge_heads, grid or LAMBDAS),
        "lbfgs": (logistic_heads, grid or PENALTIES),
        "sgd": (lambda *of: sgd_heads(*of, seed=seed), grid or RATES),
    }[solver]
    out_N = held_out(train.samples_N, seed)
    kept, judge = train.take(~out_N), train.take(out_N)
    unit = "steps" if solver == "sgd" else "fits"
    with progress(f"choosing the {SOLVER_SETTING[solver]}", unit) as update:
        found = [correct(head, judge, num_classes)[0] / len(judge) for head in fit(kept, num_classes, settings, update)]
    chosen = settings[found.index(max(found))]
    with progress("training the head", unit) as update:
        (head,) = fit(train, num_classes, (chosen,), update)
    top1, top5 = correct(head, test, num_classes)
    low, high = wilson(top1, len(test))
    at_edge = len(settings) > 1 and chosen in (settings[0], settings[-1])
    grid_found = tuple(zip(settings, found, strict=True))
    return Linear(solver, chosen, grid_found, len(judge), top1 / len(test), low, high, top5 / len(test), at_edge)


def held_out(samples_N: Tensor, seed: int) -> Tensor:
    """Which (N,) of the samples of these numbers are held out to choose a setting on: a tenth, those whose keys are lowest."""
    keys = keyed.key(keyed.Purpose.HELD_OUT, seed, samples_N.cpu().numpy())
    mask_N = np.zeros(len(keys), np.bool_)
    mask_N[np.argsort(keys, kind="stable")[: math.ceil(HELD_OUT * len(keys))]] = True
    return torch.from_numpy(mask_N)


def ridge_heads(train: Features, num_classes: int, lambdas: Sequence[float], update: Update = no_update) -> Iterator[Head]:
    """For each lambda the head that minimises |X W - Y|^2 + lambda |W|^2, Y being 1 at a sample's labels and -1 elsewhere.

    One eigendecomposition serves all lambdas: with X^T X = Q E Q^T the weights are Q (E + lambda)^-1 Q^T X^T Y, and with fewer samples than
    columns, X X^T = Q E Q^T, they are X^T Q (E + lambda)^-1 Q^T Y (fewshot_lsr.py, whose constants these are).
    """
    prepare = standardization(train.features_ND, RIDGE_CONSTANT)
    size = train.features_ND.shape[1] + 1
    if len(train) >= size:
        gram_FF = train.features_ND.new_zeros(size, size, dtype=torch.float64)
        products_FK = gram_FF.new_zeros(size, num_classes)
        for x_BF, targets_BK in inputs(train, num_classes, prepare):
            gram_FF += x_BF.T @ x_BF
            products_FK += x_BF.T @ (2 * targets_BK - 1)
        eigenvalues, left = torch.linalg.eigh(gram_FF)
        right = left.T @ products_FK
    else:
        x_NF = prepare(train.features_ND)
        eigenvalues, q_NN = torch.linalg.eigh(x_NF @ x_NF.T)
        left, right = x_NF.T @ q_NN, q_NN.T @ (2 * targets(train.labels_NL, num_classes) - 1)
    for done, strength in enumerate(lambdas):
        update(done, len(lambdas))
        yield head_of((left / (eigenvalues + strength)) @ right, prepare)
    update(len(lambdas), len(lambdas))


def logistic_heads(train: Features, num_classes: int, penalties: Sequence[float], update: Update = no_update) -> Iterator[Head]:
    """For each penalty the head that minimises the mean loss + penalty / 2 |W|^2 without its biases; each starts from the one before.

    scikit-learn's and cuML's C, which multiplies the summed loss, is 1 / (penalty N).
    """
    prepare, several = standardization(train.features_ND, 1.0), train.labels_NL.shape[1] > 1
    weights_FK = nn.Parameter(train.features_ND.new_zeros(train.features_ND.shape[1] + 1, num_classes, dtype=torch.float64))

    def objective(penalty: float) -> float:
        loss, gradient_FK = 0.0, torch.zeros_like(weights_FK)
        for x_BF, targets_BK in inputs(train, num_classes, prepare):
            logits_BK = x_BF @ weights_FK
            loss += float(losses(logits_BK, targets_BK, several=several).sum())
            gradient_FK += x_BF.T @ slopes(logits_BK, targets_BK, several=several)
        gradient_FK /= len(train)
        gradient_FK[:-1] += penalty * weights_FK[:-1]
        weights_FK.grad = gradient_FK
        return loss / len(train) + penalty / 2 * float(weights_FK[:-1].square().sum())

    for done, penalty in enumerate(penalties):
        update(done, len(penalties))
        search = torch.optim.LBFGS([weights_FK], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")
        search.step(torch.no_grad()(lambda penalty=penalty: objective(penalty)))  # type: ignore[no-untyped-call]
        yield head_of(weights_FK.detach().clone(), prepare)
    update(len(penalties), len(penalties))


def sgd_heads(
    train: Features, num_classes: int, rates: Sequence[float], update: Update = no_update, *, seed: int = 0,
    steps: int = SGD_STEPS, batch_size: int = SGD_BATCH,
) -> Iterator[Head]:  # fmt: skip
    """For each learning rate the head that SGD with momentum 0.9 and cosine decay to zero finds, all of them in one pass.

    As DINOv2's eval/linear.py, rates being of 256 samples, but on the features of one view a sample, standardised, from zero, and in fp32.
    """
    prepare, several = standardization(train.features_ND, 1.0), train.labels_NL.shape[1] > 1
    batch_size = min(batch_size, len(train))
    weights_FGK = train.features_ND.new_zeros(train.features_ND.shape[1] + 1, len(rates), num_classes)
    velocity_FGK = torch.zeros_like(weights_FGK)
    rates_G1 = weights_FGK.new_tensor(rates)[:, None] * batch_size / 256
    for step in range(steps):
        update(step, steps)
        batch = train.take(torch.from_numpy(sgd_rows(step, batch_size, len(train), seed)))
        x_BF, targets_B1K = prepare(batch.features_ND).float(), targets(batch.labels_NL, num_classes).float()[:, None]
        logits_BGK = (x_BF @ weights_FGK.flatten(1)).view(batch_size, len(rates), num_classes)  # one product for all heads
        gradient_FGK = (x_BF.T @ slopes(logits_BGK, targets_B1K, several=several).flatten(1)).view_as(weights_FGK)
        velocity_FGK.mul_(0.9).add_(gradient_FGK, alpha=1 / batch_size)
        weights_FGK -= rates_G1 * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * velocity_FGK
    update(steps, steps)
    yield from (head_of(weights_FK.double(), prepare) for weights_FK in weights_FGK.unbind(1))


def sgd_rows(step: int, batch_size: int, num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of an SGD step's batch: each epoch has a permutation of its own, and the last batch of one goes on into the next."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = keyed.key(keyed.Purpose.PROBE_ORDER, seed, positions // num_samples)
    return keyed.permute(positions % num_samples, num_samples, epochs)


def standardization(features_ND: Tensor, constant: float) -> Callable[[Tensor], Tensor]:
    """What makes features (B, D) an input (B, F) in fp64: less the mean of these, by their deviation + 1e-5, the constant appended."""
    parts = torch.split(features_ND, rows_at_a_time(features_ND.shape[1]))
    mean_D = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features_ND)
    squares_D = torch.stack([(part.double() - mean_D).square().sum(dim=0) for part in parts]).sum(dim=0)
    scale_D = (squares_D / len(features_ND)).sqrt() + 1e-5
    return lambda features_BD: F.pad((features_BD.double() - mean_D) / scale_D, (0, 1), value=constant)


def head_of(weights_FK: Tensor, prepare: Callable[[Tensor], Tensor]) -> Head:
    """The head of these weights of prepared features."""
    return lambda features_BD: prepare(features_BD) @ weights_FK


def losses(logits_BK: Tensor, targets_BK: Tensor, *, several: bool) -> Tensor:
    """Each sample's loss (B,), as `objective.per_sample_loss` has it but in the precision of the logits.

    several: the sigmoid loss, summed over the classes; else softmax, under which a sample without a label adds nothing.
    """
    if several:
        return (F.softplus(logits_BK) - targets_BK * logits_BK).sum(dim=-1)
    return targets_BK.sum(dim=-1) * logits_BK.logsumexp(dim=-1) - (targets_BK * logits_BK).sum(dim=-1)


def slopes(logits_BK: Tensor, targets_BK: Tensor, *, several: bool) -> Tensor:
    """Of each sample's loss the gradient in its logits (B, K); there may be more axes between."""
    if several:
        return logits_BK.sigmoid() - targets_BK
    return targets_BK.sum(dim=-1, keepdim=True) * logits_BK.softmax(dim=-1) - targets_BK


# ---------------------------------------------------------------------------------------------------------------------------------------
# Neighbours
# ---------------------------------------------------------------------------------------------------------------------------------------


def neighbours(
    train: Features, test: Features, num_classes: int, progress: Progress, *, ks: Sequence[int] = NEIGHBOURS
) -> list[Neighbours]:
    """For each k the accuracy of its nearest training samples' votes. A k of more samples than there are is all of them."""
    ks = sorted({min(k, len(train)) for k in ks})
    unit_ND = F.normalize(train.features_ND)
    hits = np.zeros((len(ks), 2), np.int64)
    done = 0
    with progress("nearest neighbours", "images") as update:
        for part in test.parts(rows_at_a_time(len(train), num_classes)):
            update(done, len(test))
            done += len(part)
            for row, votes_BK in enumerate(votes(unit_ND, train.labels_NL, part.features_ND, num_classes, ks)):
                hits[row] += [int(correct_at(votes_BK, part.labels_NL, k).sum()) for k in (1, 5)]
        update(len(test), len(test))
    return [
        Neighbours(k, top1 / len(test), *wilson(top1, len(test)), top5 / len(test))
        for k, (top1, top5) in zip(ks, hits.tolist(), strict=True)
    ]


def votes(unit_ND: Tensor, labels_NL: Tensor, features_BD: Tensor, num_classes: int, ks: Sequence[int]) -> Iterator[Tensor]:
    """For each k, ascending, the votes (B, K) of the k nearest of the training samples, whose features have length 1.

    A neighbour of cosine similarity s gives exp(s / 0.07) to each of its labels, as in DINO; DINOv2's softmax is that over a constant.
    """
    nearest = (F.normalize(features_BD) @ unit_ND.T).topk(ks[-1], dim=1)
    weights_BJ, labels_BJL = (nearest.values / TEMPERATURE).exp(), labels_NL[nearest.indices]
    votes_BK = features_BD.new_zeros(len(features_BD), num_classes)
    for before, k in zip((0, *ks), ks, strict=False):
        given_BJL = weights_BJ[:, before:k, None] * (labels_BJL[:, before:k] >= 0)
        votes_BK = votes_BK.scatter_add(1, labels_BJL[:, before:k].clamp(min=0).long().flatten(1), given_BJL.flatten(1))
        yield votes_BK


# ---------------------------------------------------------------------------------------------------------------------------------------
# A bounded number of samples at a time
# ---------------------------------------------------------------------------------------------------------------------------------------


def rows_at_a_time(*columns: int) -> int:
    """How many samples are computed at a time where matrices have so many columns."""
    return max(1, AT_A_TIME // max(columns))


def inputs(train: Features, num_classes: int, prepare: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The prepared features (B, F) and the targets (B, K) of some samples at a time."""
    for part in train.parts(rows_at_a_time(train.features_ND.shape[1], num_classes)):
        yield prepare(part.features_ND), targets(part.labels_NL, num_classes)


def targets(labels_BL: Tensor, num_classes: int) -> Tensor:
    """1 at each label, in fp64 (B, K)."""
    return dense_targets(labels_BL, torch.ones_like(labels_BL), num_classes, soft=False).double()


def correct(head: Head, test: Features, num_classes: int) -> tuple[int, int]:
    """How many samples have one of their labels at the highest score, and among the five highest."""
    top1 = top5 = 0
    for part in test.parts(rows_at_a_time(test.features_ND.shape[1], num_classes)):
        scores_BK = head(part.features_ND)
        top1 += int(correct_at(scores_BK, part.labels_NL, 1).sum())
        top5 += int(correct_at(scores_BK, part.labels_NL, 5).sum())
    return top1, top5
