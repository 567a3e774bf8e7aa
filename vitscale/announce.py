"""What a run says of itself to people: at its start, where its steps change, and of an evaluation. Strings alone; `train.py` says them."""

import math
from collections.abc import Mapping
from dataclasses import replace

from data_tools.cache import cache_advice
from data_tools.dataset import Dataset
from vitscale import checkpoint
from vitscale.config import TrainConfig, ViTConfig, frozen, grad_accum_steps
from vitscale.evaluate import Evaluation
from vitscale.flops import measured_flops, peak_flops
from vitscale.metrics import counted
from vitscale.mixture import Mixture
from vitscale.timeline import Span, Timeline
from vitscale.unindexed import Tars


def headline(
    config: TrainConfig, step: int, timeline: Timeline, world_size: int, shapes: Mapping[str, tuple[int, ...]], device_name: str
) -> str:  # fmt: skip
    """Where a start begins, and what is trained on what."""
    parameters = f"{sum(map(math.prod, shapes.values())):,} parameters"
    if still := frozen(shapes, config.optimizer):
        parameters += f", {sum(math.prod(shape) for name, shape in shapes.items() if name not in still):,} of them trained"
    begins = f"resumes at step {step}" if step else "starts"
    span, *others = (of for of, end in zip(timeline.spans, timeline.ends, strict=True) if end > step or end == timeline.total_steps)
    size, work = size_and_work(span, config.model, world_size)
    later = "".join(f"; from step {of.first_step + 1} on {' and '.join(size_and_work(of, config.model, world_size))}" for of in others)
    return (
        f"{config.recipe} {begins} on {device_name}: {parameters}, {size}, {timeline.total_steps} steps of {work}{later}, "
        f"ZeRO {config.engine.zero_stage}, {config.engine.precision}, run directory {config.out}"
    )


def cost_line(config: TrainConfig, span: Span, device_name: str) -> str:
    """What a step computes, and what MFU is held against."""
    image, of = span.train_flops(config.model, config.optimizer), (device_name, config.engine.precision)
    ceilings = {"by datasheet": peak_flops(*of), "measured": measured_flops(*of)}
    known = " and ".join(f"{ceiling / 1e12:,.0f} TFLOP/s {kind}" for kind, ceiling in ceilings.items() if ceiling)
    label = f"{config.engine.precision}{', float8 products too' if config.engine.float8 else ''}"
    basis = f"MFU is of {known}, {label}" if known else f"no peak of {device_name} is known, so no MFU is told"
    step = f"{image / 1e9:,.4g} GFLOP an image, {image * span.global_batch_size / 1e12:,.4g} TFLOP a step"
    return f"{step}, recomputation not counted; {basis}"


def size_and_work(span: Span, model: ViTConfig, world_size: int) -> tuple[str, str]:
    """The images of a step, and how they are shared out, for people."""
    at_size, accumulate = replace(model, image_size=span.image_size), grad_accum_steps(*span.batch, world_size)
    work = f"{span.global_batch_size} images = {counted(world_size, 'rank')} x {span.micro_batch_size} x {accumulate}"
    return f"{_pixels(at_size)} in {at_size.num_tokens} tokens", work


def origin_line(source: checkpoint.Description, model: ViTConfig, *, keep_head: bool) -> str:
    """What a run makes of the checkpoint that it begins from, in a line."""
    grids = " -> ".join("x".join(map(str, m.grid)) for m in (source.model, model))
    new = f"a new head of {model.num_classes} classes in place of {source.model.num_classes or 'none'}"
    head = f"the head of {model.num_classes} classes is kept" if keep_head else new
    return f"from {source.path}: {_pixels(source.model)} -> {_pixels(model)}, {grids} patches, {head}"


def eval_line(step: int, result: Evaluation, timeline: Timeline, *, average: bool) -> str:
    """Evaluated at the size that the weights are for, whichever they are trained at."""
    final = timeline.spans[-1].image_size
    size = f" at {final[0]}x{final[1]} pixels" if timeline.at_step(step - 1).image_size != final else ""
    skipped = f", {result.skipped} unreadable" if result.skipped else ""
    skipped += f", {result.removed} removed" if result.removed else ""
    scores = f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  loss {result.loss:.4f}"
    of = ", of the average of the weights" if average else ""
    return f"step {step} held out{size}{of}: {scores}  ({result.samples} samples{skipped})"


def data_warnings(dataset: Mixture | Tars, config: TrainConfig) -> list[str]:
    """What is not seen of the data, and what the cache cannot hold."""
    unseen = [component.path for component in dataset.components if component.path_hides_overlays]
    said = [f"warning: {path} is on the web, where overlays are not seen: what one removes is trained on" for path in unseen]
    if config.cache_bytes and isinstance(dataset, Mixture):
        said += cache_advice(config.cache_bytes, dataset.num_bytes, dataset.bytes_per_sample, full_shuffle=config.stream.lanes == 1)
    return said


def holdout_line(held_out: Dataset, share: float) -> str:
    """What is held out of the training split."""
    of = held_out.num_samples - held_out.overlay.num_removed
    return f"held out: {held_out.num_kept:,} of {of:,} samples (holdout {share:g}); the run is evaluated on them and never trains on them"


def overlays_in_use(dataset: Mixture | Tars) -> tuple[list[str], str]:
    """Their names, and what they do; others may be there at the next start."""
    relabelled = sum(len(component.overlay.samples) for component in dataset.components)
    names = [name for component in dataset.components for name in component.overlay.names]
    return names, f"overlays: {relabelled:,} samples relabelled, {dataset.num_removed:,} removed"


def _pixels(model: ViTConfig) -> str:
    return f"{model.image_size[0]}x{model.image_size[1]} pixels"
