"""The losses are torch's own where torch has them, summed and averaged as the papers do, and labels count as documented."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import ObjectiveConfig
from vitscale.objective import compute_loss, correct_at, dense_targets, per_sample_loss

B, K = 6, 11


@pytest.fixture(name="logits_BK")
def random_logits() -> Tensor:
    return 3 * torch.randn(B, K, generator=torch.Generator().manual_seed(0))


def labels(*rows: list[int]) -> Tensor:
    """Padded with -1, as the stream gives them."""
    longest = max(1, *(len(row) for row in rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def ones(labels_BL: Tensor) -> Tensor:
    return torch.ones(labels_BL.shape)


SINGLE = labels([3], [0], [10], [3], [7], [1])
SEVERAL = labels([3, 5], [0], [10, 1, 2], [4], [7, 8], [])
PADDED = torch.tensor([[3, -1, -1], [0, -1, -1], [-1, 10, -1], [-1, -1, 3], [7, -1, -1], [1, -1, -1]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels_BL", [SINGLE, PADDED], ids=["single", "padded"])
def test_softmax_is_cross_entropy(logits_BK: Tensor, labels_BL: Tensor, smoothing: float) -> None:
    loss = compute_loss(logits_BK, labels_BL, ones(labels_BL), ObjectiveConfig("softmax", label_smoothing=smoothing))
    expected = F.cross_entropy(logits_BK, SINGLE[:, 0], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_softmax_divides_the_weight_among_several_labels(logits_BK: Tensor) -> None:
    loss = per_sample_loss(logits_BK, SEVERAL, ones(SEVERAL), ObjectiveConfig("softmax"))
    log_p = logits_BK.double().log_softmax(1)
    expected = [
        -(log_p[0, 3] + log_p[0, 5]) / 2, -log_p[1, 0], -(log_p[2, 10] + log_p[2, 1] + log_p[2, 2]) / 3, -log_p[3, 4],
        -(log_p[4, 7] + log_p[4, 8]) / 2, torch.tensor(0.0, dtype=torch.float64),
    ]  # fmt: skip
    torch.testing.assert_close(loss.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_without_a_label_adds_nothing_to_sum_or_gradient(logits_BK: Tensor, smoothing: float) -> None:
    config = ObjectiveConfig("softmax", label_smoothing=smoothing)
    logits_BK.requires_grad_()
    per_sample_loss(logits_BK, SEVERAL, ones(SEVERAL), config).sum().backward()
    assert logits_BK.grad is not None
    assert logits_BK.grad[5].count_nonzero() == 0
    assert logits_BK.grad[:5].count_nonzero(dim=1).min() > 0
    full = compute_loss(logits_BK, SEVERAL, ones(SEVERAL), config)
    without = compute_loss(logits_BK[:5], SEVERAL[:5], ones(SEVERAL)[:5], config)
    torch.testing.assert_close(full, without * 5 / 6)  # the mean is over the whole batch, so that micro-batches add up


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(logits_BK: Tensor, kind: str) -> None:
    config = ObjectiveConfig(kind, label_smoothing=0.1)  # type: ignore[arg-type]
    whole = compute_loss(logits_BK, SEVERAL, ones(SEVERAL), config)
    halves = [compute_loss(logits_BK[i::2], SEVERAL[i::2], ones(SEVERAL)[i::2], config) for i in (0, 1)]
    torch.testing.assert_close(whole, sum(halves) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_summed_over_classes_and_averaged_over_the_batch(logits_BK: Tensor, smoothing: float) -> None:
    loss = compute_loss(logits_BK, SEVERAL, ones(SEVERAL), ObjectiveConfig("sigmoid", label_smoothing=smoothing))
    hot = torch.zeros(B, K)
    for row, column in [(0, 3), (0, 5), (1, 0), (2, 10), (2, 1), (2, 2), (3, 4), (4, 7), (4, 8)]:
        hot[row, column] = 1
    target = hot * (1 - smoothing) + smoothing / K
    expected = sum(
        F.binary_cross_entropy(torch.sigmoid(logits_BK[i, c].double()), target[i, c].double()) for i in range(B) for c in range(K)
    )
    torch.testing.assert_close(loss.double(), expected / B, rtol=1e-5, atol=1e-6)
    mean = F.binary_cross_entropy_with_logits(logits_BK, target)
    torch.testing.assert_close(loss, K * mean)


def test_sigmoid_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0, -1000.0, 1000.0]], requires_grad=True)
    loss = compute_loss(logits, labels([1, 3]), torch.ones(1, 2), ObjectiveConfig("sigmoid"))
    assert loss.item() == 400
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1, 0, 0]]


def test_sigmoid_gradient_is_probability_minus_target(logits_BK: Tensor) -> None:
    logits_BK.requires_grad_()
    compute_loss(logits_BK, SEVERAL, ones(SEVERAL), ObjectiveConfig("sigmoid")).backward()
    expected = (torch.sigmoid(logits_BK) - dense_targets(SEVERAL, ones(SEVERAL), K, soft=False)) / B
    torch.testing.assert_close(logits_BK.grad, expected.detach())


def test_scores_weigh_only_where_asked(logits_BK: Tensor) -> None:
    scores = torch.rand(SEVERAL.shape, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    for kind in ("softmax", "sigmoid"):
        hard = compute_loss(logits_BK, SEVERAL, scores, ObjectiveConfig(kind))  # type: ignore[arg-type]
        assert torch.equal(hard, compute_loss(logits_BK, SEVERAL, ones(SEVERAL), ObjectiveConfig(kind)))  # type: ignore[arg-type]
        soft = compute_loss(logits_BK, SEVERAL, scores, ObjectiveConfig(kind, soft_targets=True))  # type: ignore[arg-type]
        target = torch.zeros(B, K)
        for i, j in zip(*torch.where(SEVERAL >= 0), strict=True):
            target[i, SEVERAL[i, j]] = scores[i, j]
        if kind == "sigmoid":
            expected = F.binary_cross_entropy_with_logits(logits_BK, target, reduction="none").sum() / B
        else:
            expected = F.cross_entropy(logits_BK[:5], (target / target.sum(1, keepdim=True))[:5], reduction="sum") / B
        torch.testing.assert_close(soft, expected)
        assert abs(soft - hard) > 0.01


def test_softmax_with_scores_of_zero_counts_as_no_label(logits_BK: Tensor) -> None:
    loss = per_sample_loss(logits_BK, SINGLE, torch.zeros(B, 1), ObjectiveConfig("softmax", soft_targets=True))
    assert loss.count_nonzero() == 0


def test_loss_is_computed_in_fp32(logits_BK: Tensor) -> None:
    for kind in ("softmax", "sigmoid"):
        loss = compute_loss(logits_BK.bfloat16(), SINGLE, torch.ones(B, 1), ObjectiveConfig(kind))  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        assert torch.equal(loss, compute_loss(logits_BK.bfloat16().float(), SINGLE, torch.ones(B, 1), ObjectiveConfig(kind)))  # type: ignore[arg-type]


def test_the_first_loss_of_a_zero_head_is_known() -> None:
    """What a run must print at step 0: log K under softmax; under sigmoid with bias -10, 10 for the label and next to nothing else."""
    wide = 18_291
    softmax = compute_loss(torch.zeros(B, wide), SINGLE, torch.ones(B, 1), ObjectiveConfig("softmax"))
    assert softmax.item() == pytest.approx(math.log(wide), rel=1e-5)
    sigmoid = compute_loss(torch.full((B, wide), -10.0), SINGLE, torch.ones(B, 1), ObjectiveConfig("sigmoid"))
    assert sigmoid.item() == pytest.approx(10 + wide * math.log1p(math.exp(-10)), rel=1e-5)


def test_dense_targets_ignore_padding_in_class_zero() -> None:
    target = dense_targets(labels([2], []), torch.ones(2, 1), 4, soft=False)
    assert target.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_correct_at() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [9.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    labels_BL = labels([1], [2, 3], [0], [3, 0], [])
    assert correct_at(logits, labels_BL, 1).tolist() == [True, False, False, True, False]
    assert correct_at(logits, labels_BL, 2).tolist() == [True, True, False, True, False]
    assert correct_at(logits, labels_BL, 3).tolist() == [True, True, False, True, False]
    assert correct_at(logits, labels_BL, 5).tolist() == [True, True, True, True, False], "fewer classes than k"
