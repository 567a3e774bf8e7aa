"""The loss: logits and sparse labels to one number.

Labels travel sparse, (B, L) padded with -1, and become dense (B, K) on the device, where mixup and CutMix mix them. Knows nothing of ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import ObjectiveConfig
from vitscale.mixing import Mix


def compute_loss(logits_BK: Tensor, labels_BL: Tensor, scores_BL: Tensor, config: ObjectiveConfig, mix: Mix | None = None) -> Tensor:
    """Mean over the batch of each sample's loss, in fp32.

    softmax: cross-entropy against the labels' distribution (several labels share the weight; without a label a sample adds nothing).
    sigmoid: binary cross-entropy *summed* over the classes, as big_vision's `sigmoid_xent`; torch's own mean would be K times smaller.
    mix: how the images were mixed. Both losses are linear in the targets, so a mixed image has the mean of two, weighed by their shares.
    """
    return per_sample_loss(logits_BK, labels_BL, scores_BL, config, mix).mean()


def per_sample_loss(logits_BK: Tensor, labels_BL: Tensor, scores_BL: Tensor, config: ObjectiveConfig, mix: Mix | None = None) -> Tensor:
    """Each sample's loss (B,), in fp32."""
    targets_BK = dense_targets(labels_BL, scores_BL, logits_BK.shape[-1], soft=config.soft_targets)
    K, smoothing = logits_BK.shape[-1], config.label_smoothing
    if config.kind == "softmax":
        total_B1 = targets_BK.sum(dim=-1, keepdim=True)
        targets_BK = targets_BK / total_B1.where(total_B1 > 0, 1.0)
        targets_BK = (1 - smoothing) * targets_BK + smoothing / K * (total_B1 > 0)
        targets_BK = mix.targets(targets_BK) if mix else targets_BK
        return -(targets_BK * F.log_softmax(logits_BK.float(), dim=-1)).sum(dim=-1)
    targets_BK = (1 - smoothing) * targets_BK + smoothing / K
    targets_BK = mix.targets(targets_BK) if mix else targets_BK
    # torch's own form subtracts two numbers near 10 to get 5e-5 at a bias of -10, which over 18 k classes is 1% off in fp32; this is not
    logits_BK = logits_BK.float()
    return (F.softplus(logits_BK) - targets_BK * logits_BK).sum(dim=-1)


def dense_targets(labels_BL: Tensor, scores_BL: Tensor, num_classes: int, soft: bool) -> Tensor:
    """Targets (B, K) in fp32: 1 at each label, or its score where `soft`; -1 is padding."""
    present_BL = labels_BL >= 0
    values_BL = (scores_BL.float() if soft else torch.ones_like(scores_BL, dtype=torch.float32)) * present_BL
    targets_BK = torch.zeros(labels_BL.shape[0], num_classes, device=labels_BL.device)
    return targets_BK.scatter_add_(1, labels_BL.clamp(min=0).long(), values_BL)


def correct_at(logits_BK: Tensor, labels_BL: Tensor, k: int) -> Tensor:
    """For each sample (B,) whether one of its labels is among its k highest logits; with several labels and k = 1, precision at 1."""
    top_BT = logits_BK.topk(min(k, logits_BK.shape[-1]), dim=-1).indices
    return (top_BT[:, :, None] == labels_BL[:, None, :]).any(dim=2).any(dim=1)
