"""The optimizer and the learning rate. Knows nothing of ranks: DeepSpeed partitions what is built here."""

import math

import torch
from torch import Tensor, nn

from vitscale.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over two groups: kernels, which decay, and everything else, which does not."""
    kernels, others = split_by_decay(dict(model.named_parameters()))
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum)


def split_by_decay(parameters: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Kernels (of linear layers and the patch convolution), and all else: biases, norms, tokens, position embeddings (big_vision)."""
    kernels = [p for name, p in parameters.items() if name.endswith(".weight") and p.ndim >= 2]
    others = [p for name, p in parameters.items() if not (name.endswith(".weight") and p.ndim >= 2)]
    return kernels, others


def learning_rate(step: int, total_steps: int, peak_lr: float, schedule: ScheduleConfig) -> float:
    """The rate of the step that starts when `step` steps are done (big_vision, utils.create_learning_rate_schedule).

    The warm-up multiplies the schedule, which itself runs from the end of the warm-up to the end of the run. rsqrt is the scaling study's
    (arXiv 2106.04560, appendix): constant up to the warm-up's end, then peak / sqrt(1 + (step - warm-up) / timescale).
    """
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, max(0.0, progress))
    if schedule.kind == "linear":
        rate = schedule.end_lr + (peak_lr - schedule.end_lr) * (1 - progress)
    elif schedule.kind == "cosine":
        rate = schedule.end_lr + (peak_lr - schedule.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.kind == "rsqrt":
        rate = peak_lr / math.sqrt(1 + max(0, step - schedule.warmup_steps) / schedule.timescale)
    else:
        rate = peak_lr
    if schedule.warmup_steps:
        rate *= min(1.0, step / schedule.warmup_steps)
    if schedule.cooldown_steps:
        rate *= min(1.0, (total_steps - step) / schedule.cooldown_steps)
    return rate
