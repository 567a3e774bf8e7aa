"""The optimizer and the learning rate. Knows nothing of ranks: DeepSpeed partitions what is built here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.config import OptimizerConfig, ScheduleConfig, frozen, layers_of
from vitscale.muon import Muon, is_muons, num_parts


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD, or Muon, over the groups of `param_groups`, without what is `frozen`.

    Fused: one pass over memory. The default on a CPU takes a pass for each operation, on temporaries that are new pages every step.
    """
    parameters = dict(model.named_parameters())
    still = frozen(parameters, config)
    groups = param_groups({name: p for name, p in parameters.items() if name not in still}, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, fused=True)
    settings: dict[str, Any] = {"lr": config.peak_lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    return Muon(groups, {p: num_parts(name) for name, p in parameters.items()}, **settings)


def param_groups(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of parameters that are updated alike, in the order of the model: none is empty.

    Kernels decay and everything else does not; under Muon the matrices of blocks come first; and with a decay of layers each of these is
    divided by layers. A step's learning rate is to be multiplied by a group's `lr_scale`.
    """
    kernels, others = split_by_decay(parameters)
    kinds = [(kernels, config.weight_decay, False), (others, 0.0, False)]
    if config.name == "muon":
        muons = {p for name, p in parameters.items() if is_muons(name, p)}
        kinds = [
            ([p for p in kernels if p in muons], config.weight_decay, True),
            ([p for p in kernels if p not in muons], *kinds[0][1:]),
            kinds[1],
        ]
    layers = layers_of(parameters)
    scale_of = {parameters[name]: config.layer_decay ** (max(layers.values()) - layer) for name, layer in layers.items()}
    groups = []
    for of_kind, weight_decay, muon in kinds:
        for scale in sorted({scale_of[p] for p in of_kind}):
            groups.append({"params": [p for p in of_kind if scale_of[p] == scale], "weight_decay": weight_decay, "lr_scale": scale})
            if config.name == "muon":
                groups[-1] |= {"muon": muon, "momentum": config.momentum}
    return groups


def split_by_decay(parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Kernels (of linear layers and the patch convolution), and all else: biases, norms, tokens, position embeddings (big_vision)."""
    kernels = [p for name, p in parameters.items() if name.endswith(".weight") and p.ndim >= 2]
    others = [p for name, p in parameters.items() if not (name.endswith(".weight") and p.ndim >= 2)]
    return kernels, others


def learning_rate(
    step: int, total_steps: int, peak_lr: float, schedule: ScheduleConfig, samples_at: Callable[[int], int] = lambda step: step
) -> float:
    """The rate of the step that starts when `step` steps are done (big_vision, utils.create_learning_rate_schedule).

    The warm-up multiplies the schedule, which itself runs from the end of the warm-up to the end of the run. rsqrt is the scaling study's
    (arXiv 2106.04560, appendix): constant up to the warm-up's end, then peak / sqrt(1 + (step - warm-up) / timescale).

    Where batches grow, linear and cosine run over samples, so that a rate belongs to a share of the data, as epochs do in arXiv 1711.00489;
    the peak is not scaled with the batch, whose growth there stands in for a falling rate (nor is it in arXiv 2407.21783, section 3.4.1).
    Warm-up, cool-down and rsqrt count steps: what they wait for are the optimizer's averages (arXiv 1910.04209).

    Args:
        samples_at: the samples seen when so many steps are made; where all steps have equally many, the steps themselves do.
    """
    warm = samples_at(schedule.warmup_steps)
    progress = (samples_at(step) - warm) / max(1, samples_at(total_steps) - warm)
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
