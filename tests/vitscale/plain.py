"""The reference of whole runs: the same training in plain torch, without DeepSpeed, ranks, partitions, compilation or checkpointing."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from vitscale import checkpoint, keyed
from vitscale.compute import to_float8
from vitscale.config import DROP_PATH_SUBSET_ABOVE, TrainConfig, frozen
from vitscale.finetune import fine_tuned_weights
from vitscale.mixture import Mixture
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.optim import build_optimizer, learning_rate
from vitscale.stream import Share, TrainStream
from vitscale.timeline import Timeline, timeline_of
from vitscale.transfer import on_device

CPU = torch.device("cpu")


class Trained(NamedTuple):
    """What a run comes to."""

    losses: list[float]
    norms: list[float]
    """Of gradients before they are clipped."""
    state: dict[tuple[str, str], Tensor]
    """The last weights and their average, by kind and name."""
    start: dict[str, Tensor]


def plain_torch(config: TrainConfig, steps: int = 0, world_size: int = 1) -> Trained:
    """The run's first steps, or all of it, every step one batch of one process; what drop-path drops is computed and times 0.

    Where rounding (bf16) or torch's own random numbers (dropout) depend on how a batch is divided it is divided as ranks do it, and where
    those numbers depend on which samples are computed the same ones are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those that wait for one another are very slow on a busy machine
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    timeline = timeline_of(config, (dataset := Mixture.open(config.datasets)).num_samples)
    ranks = world_size if dtype == torch.bfloat16 or config.model.dropout else 1
    if ranks == 1:
        spans = tuple(replace(span, micro_batch_size=span.global_batch_size) for span in timeline.spans)
        timeline = Timeline(spans, timeline.total_steps)
    streams = [
        on_device(
            TrainStream(
                dataset, config.preprocess, config.stream, Share(timeline, rank, ranks), seed=config.seed,
                quarantine=Path(config.out) / "quarantine.jsonl",
            ).micro_batches(0, timeline.total_samples), CPU, config.mix,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    model = ViT(config.model, image_sizes=[span.image_size for span in timeline.spans])
    if init := config.init:
        model.load_state_dict(
            fine_tuned_weights(checkpoint.describe(Path(init.folder)), init.weights, config.model, init.position_interpolation, config.seed)
        )
    else:
        initialize(model, config.seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in frozen(start, config.optimizer):
        model.get_parameter(name).requires_grad_(False)
    average = {name: p.clone() for name, p in start.items()}
    optimizer = build_optimizer(model, config.optimizer)
    losses, norms = [], []
    for step in range(steps or timeline.total_steps):
        span = timeline.at_step(step)
        computes = copy.deepcopy(model).to(dtype)
        if config.engine.float8:
            to_float8(computes, emulate=True)
        micros = span.global_batch_size // span.micro_batch_size // ranks
        total = 0.0
        optimizer.zero_grad()
        for rank, micro in ((rank, micro) for micro in range(micros) for rank in range(ranks)):
            batch = next(streams[rank])
            if config.model.dropout:
                torch.manual_seed(int(keyed.key(keyed.Purpose.DROPOUT, config.seed, step, micro, rank) >> 1))
            images = normalize(batch.images_BHWC, config.preprocess)
            images = batch.mix.images(images) if batch.mix else images
            computes.zero_grad()
            with patch("vitscale.config.DROP_PATH_SUBSET_ABOVE", DROP_PATH_SUBSET_ABOVE if config.model.dropout else 1.0):
                logits = computes(images.to(dtype), batch.keys_B)
            loss = compute_loss(logits, batch.labels_BL, batch.scores_BL, config.objective, batch.mix) / (micros * ranks)
            loss.backward()
            for p, q in zip(model.parameters(), computes.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad.float() if p.grad is None else p.grad + q.grad
            total += loss.item()
        for group in optimizer.param_groups:
            rate = learning_rate(step, timeline.total_steps, config.optimizer.peak_lr, config.schedule, timeline.samples_at)
            group["lr"] = rate * group["lr_scale"]
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or float("inf"))))
        optimizer.step()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - config.optimizer.average_decay)
        losses.append(total)
    torch.set_num_threads(threads)
    state = {(checkpoint.WEIGHT, name): p.detach() for name, p in model.named_parameters()}
    state |= {(checkpoint.AVERAGE, name): p for name, p in average.items()} if config.optimizer.average_decay else {}
    return Trained(losses, norms, state, start)
