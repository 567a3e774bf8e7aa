"""A run, from its config to its last checkpoint: the loop of pre-training and of fine-tuning, one process a rank.

    python -m vitscale.train RUN        one rank of the run in RUN, which `run.open_run` has prepared; the launcher starts all of them

Follow one batch from here: `stream.py` (which samples, and their pixels) -> `transfer.py`, `mixing.py` -> `model.py` -> `objective.py` ->
`engine.py`; what the stream is made of it tells itself.
`samples_seen` is the only clock: with it, the seed and the checkpoint's tensors a run continues exactly where it was.
"""

import contextlib
import math
import os
import resource
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from data_tools.cache import cache_advice
from data_tools.dataset import Dataset
from data_tools.errors import UserError
from data_tools.processes import die_with
from vitscale import checkpoint, keyed
from vitscale.checkpoint import CheckpointError
from vitscale.config import TrainConfig, ViTConfig, grad_accum_steps, total_steps
from vitscale.engine import Engine, device, init_distributed
from vitscale.evaluate import Evaluation, evaluate
from vitscale.finetune import fine_tuned_weights
from vitscale.flops import peak_flops, train_flops
from vitscale.foreign import ForeignStream, Usable
from vitscale.metrics import Metrics, counted, progress_line
from vitscale.mixture import Mixture
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.optim import learning_rate
from vitscale.resolve import open_data, open_held_out
from vitscale.run import cut_back, note_begin, read_config, read_metrics, unusable_line, was_evaluated
from vitscale.stream import Share, TrainStream
from vitscale.transfer import on_device
from vitscale.unindexed import Tars

_DESCRIPTORS = 65_536  # files that a rank may have open, where the machine lets it


class TrainingError(UserError):
    """Training cannot go on; the message is one line for the user."""


def train(config: TrainConfig, *, stop_at: int | None = None) -> None:
    """Trains from the newest durable checkpoint, or from the start, to the end. Needs a process group (`engine.init_distributed`).

    Raises TrainingError where the run diverges, and what the parts raise; a rank that fails must end, for the others wait for it.

    Args:
        config: resolved (`resolve.resolve`), of a run directory that exists.
        stop_at: the step to stop after, with a checkpoint; None runs to the end.
    """
    rank, world_size, run = dist.get_rank(), dist.get_world_size(), Path(config.out)

    # -- Data -------------------------------------------------------------------------------------------------------------------------
    dataset, held_out = open_data(config), open_held_out(config)  # as the start found them: ranks must agree
    last_step = total_steps(config, dataset.num_samples)

    # -- Weights: this run's newest durable checkpoint, another's to fine-tune, or random -----------------------------------------------
    folder, faults, evaluated = _take_up(config)
    model = ViT(config.model, config.engine.checkpoint_every_n_blocks)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    resumed = checkpoint.describe(folder) if folder else None
    origin = ""
    if resumed:
        model.load_state_dict(checkpoint.read_weights(resumed, checkpoint.WEIGHT, shapes))
    elif init := config.init:
        source = checkpoint.describe(Path(init.folder))  # rank 0 has checked that it is whole
        origin = f"\n{_origin(source, config.model)}"
        model.load_state_dict(fine_tuned_weights(source, init.weights, config.model, init.position_interpolation, config.seed))
    else:
        initialize(model, config.seed)

    # -- Engine -----------------------------------------------------------------------------------------------------------------------
    accumulate = grad_accum_steps(config.global_batch_size, config.micro_batch_size, world_size)
    engine = Engine(model, config.engine, config.optimizer, micro_batch_size=config.micro_batch_size, grad_accum_steps=accumulate)
    if resumed:
        checkpoint.check_tensors(resumed, shapes, engine.kinds)
        engine.load(checkpoint.TensorReader(resumed).stretch, resumed.samples_seen // config.global_batch_size)

    # -- Stream -----------------------------------------------------------------------------------------------------------------------
    samples_seen = resumed.samples_seen if resumed else 0
    step = samples_seen // config.global_batch_size
    share, quarantine = Share(config.global_batch_size, config.micro_batch_size, rank, world_size), run / "quarantine.jsonl"
    stream: TrainStream | ForeignStream
    if isinstance(dataset, Tars):
        usable, cursor = Usable(config.model.num_classes, config.objective.soft_targets), resumed.cursor if resumed else 0
        stream = ForeignStream(
            dataset, config.model.image_size, config.preprocess, config.stream, share, seed=config.seed, quarantine=quarantine,
            usable=usable, cursor=cursor,
        )  # fmt: skip
    else:
        stream = TrainStream(
            dataset, config.model.image_size, config.preprocess, config.stream, share, seed=config.seed, quarantine=quarantine,
            weights=config.data_weights,
        )  # fmt: skip
    metrics = Metrics(run, step) if rank == 0 else None
    if metrics:
        for fault in faults:
            metrics.say(f"warning: {fault}; {f'{folder.name} is used' if folder else 'the run starts anew'}")
        parameters = sum(math.prod(shape) for shape in shapes.values())
        metrics.say(_headline(config, step, last_step, world_size, accumulate, parameters) + origin)
        metrics.say(stream.describe())
        _say_of_data(metrics, dataset, config, step, samples_seen)

    # -- The loop ---------------------------------------------------------------------------------------------------------------------
    batches = on_device(stream.micro_batches(samples_seen, last_step * config.global_batch_size), device(), config.mix)
    if held_out and step > 0 and _due(step, last_step, config.eval_every) and not evaluated:  # the last start ended before it was
        _evaluate(engine, held_out, config, metrics, step, samples_seen)
    since_time, since_step = time.perf_counter(), step
    while step < last_step and step != stop_at:
        lr = learning_rate(step, last_step, config.optimizer.peak_lr, config.schedule)
        loss = torch.zeros((), device=device())
        for micro in range(accumulate):
            batch = next(batches)
            if config.model.dropout:  # element dropout repeats at equal world size and micro-batch
                torch.manual_seed(int(keyed.key(keyed.Purpose.DROPOUT, config.seed, step, micro, rank) >> 1))
            images_BCHW = normalize(batch.images_BHWC, config.preprocess)
            images_BCHW = batch.mix.images(images_BCHW) if batch.mix else images_BCHW
            logits_BK = engine.forward(images_BCHW, batch.keys_B)
            micro_loss = compute_loss(logits_BK, batch.labels_BL, batch.scores_BL, config.objective, batch.mix)
            engine.backward(micro_loss)
            try:
                engine.step(lr)
            except FloatingPointError as error:
                raise TrainingError(_diverged(str(error), step + 1)) from None
            loss += micro_loss.detach() / accumulate
        samples_seen += config.global_batch_size
        step = samples_seen // config.global_batch_size

        saves = step == stop_at or _due(step, last_step, config.checkpoint_every)
        evaluates = held_out is not None and _due(step, last_step, config.eval_every)
        if saves or step % config.log_every == 0 or step == 1:  # the first tells how long the run will take
            dist.all_reduce(loss)
            mean_loss = loss.item() / world_size
            if not math.isfinite(mean_loss):
                raise TrainingError(_diverged(f"the loss is {mean_loss}", step))
            if metrics:
                clock = {"step": step, "samples_seen": samples_seen, "epoch": stream.epoch(samples_seen)}
                learned = {"loss": mean_loss, "lr": lr, "grad_norm": engine.grad_norm()}
                rate = (step - since_step) * config.global_batch_size / (time.perf_counter() - since_time)
                line = clock | learned | {"unusable": stream.unusable()} | _speed(rate, last_step - step, config, world_size)
                metrics.log(line, progress_line(line, last_step))
            since_time, since_step = time.perf_counter(), step
        if saves:  # before the evaluation, which may be long
            about = checkpoint.Description(
                run, config.model, config.preprocess, config.objective, dataset.class_names, samples_seen=samples_seen, step=step,
                cursor=_used_up_by_all(stream),
            )  # fmt: skip
            saved = checkpoint.save(run, engine, about)
            if metrics:
                checkpoint.prune(run, config.keep_checkpoints, step)
                metrics.say(f"saved {saved}")
        if evaluates and held_out:
            _evaluate(engine, held_out, config, metrics, step, samples_seen)
        if evaluates or saves:
            since_time, since_step = time.perf_counter(), step
    if metrics:
        if said := unusable_line(run):
            metrics.say(said)
        metrics.close()
    engine.close()


# ---------------------------------------------------------------------------------------------------------------------------------------


def _take_up(config: TrainConfig) -> tuple[Path | None, list[str], bool]:
    """The newest durable checkpoint or None, what is wrong with newer ones, and whether its step was evaluated.

    Rank 0 looks, checks what is fine-tuned, and cuts the run's records back to the checkpoint.
    """
    found: list[tuple[Path | None, list[str], bool]] = [(None, [], False)]
    if dist.get_rank() == 0:
        run = Path(config.out)
        folder, faults = checkpoint.newest_durable(run)
        description = checkpoint.describe(folder) if folder else None
        reached = max((line["step"] for line in read_metrics(run)), default=0)
        if not description and reached > config.checkpoint_every:  # nobody wants weeks of training begun anew without a word
            found_there = "; ".join(faults) or "none is there"
            raise CheckpointError(
                f"metrics.jsonl tells of step {reached}, yet {run}/checkpoints has no whole one ({found_there}); restore one, or give "
                "another --out to start anew"
            )
        if not description and config.init:
            checkpoint.find_checkpoint(config.init.folder)
        note_begin(run, description.step if description else 0)
        cut_back(run, description.step if description else 0, description.samples_seen if description else 0)
        found = [(folder, faults, bool(description and was_evaluated(run, description.step)))]
    dist.broadcast_object_list(found, src=0, device=device())
    return found[0]


def _used_up_by_all(stream: TrainStream | ForeignStream) -> int:
    """The cursor of a run on tars without an index, the lowest of all ranks."""
    lowest = torch.tensor(stream.cursor, device=device())
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return int(lowest)


def _say_of_data(metrics: Metrics, dataset: Mixture | Tars, config: TrainConfig, step: int, samples_seen: int) -> None:
    """Warnings, what the cache holds, and the overlays in use, which may be others at the next start."""
    for component in dataset.components:
        if component.path_hides_overlays:
            metrics.say(f"warning: {component.path} is on the web, where overlays are not seen: what one removes is trained on")
    if config.cache_bytes and isinstance(dataset, Mixture):
        for said in cache_advice(config.cache_bytes, dataset.num_bytes, dataset.bytes_per_sample, full_shuffle=config.stream.lanes == 1):
            metrics.say(said)
    if names := [name for component in dataset.components for name in component.overlay.names]:
        relabelled = sum(len(component.overlay.samples) for component in dataset.components)
        line = {"step": step, "samples_seen": samples_seen, "overlays": names}
        metrics.log(line, f"overlays: {relabelled:,} samples relabelled, {dataset.num_removed:,} removed")


def _speed(images_per_second: float, steps_left: int, config: TrainConfig, world_size: int) -> dict[str, float]:
    """What a rate says of the run's end, and of its share of the devices' peak where that is known."""
    found = {"images_per_second": images_per_second, "seconds_left": steps_left * config.global_batch_size / images_per_second}
    if peak := peak_flops(_device_name(), config.engine.precision):
        found["mfu"] = train_flops(config.model) * images_per_second / world_size / peak
    return found


def _due(step: int, last_step: int, every: int) -> bool:
    """Whether something that happens at the end, and `every` steps where that is above 0, happens after this step."""
    return step == last_step or (every > 0 and step % every == 0)


def _evaluate(engine: Engine, held_out: Dataset, config: TrainConfig, metrics: Metrics | None, step: int, samples_seen: int) -> None:
    """Evaluates the weights as they are, or their average, and tells the result."""
    with engine.evaluation():
        result = evaluate(
            engine.forward, held_out, config.model.image_size, config.preprocess, config.objective, device=device(),
            batch_size=config.micro_batch_size, stream=config.stream,
        )  # fmt: skip
    if metrics:
        metrics.log({"step": step, "samples_seen": samples_seen} | _eval_fields(result), _eval_line(step, result))


def _diverged(what: str, step: int) -> str:
    return f"{what} at step {step}; the newest checkpoint is from before it, and a lower --optimizer.peak-lr or more warm-up may help"


def _headline(config: TrainConfig, step: int, last_step: int, world_size: int, accumulate: int, parameters: int) -> str:
    begins = f"resumes at step {step}" if step else "starts"
    work = f"{config.global_batch_size} images = {counted(world_size, 'rank')} x {config.micro_batch_size} x {accumulate}"
    return (
        f"{config.recipe} {begins} on {_device_name()}: {parameters:,} parameters, {_pixels(config.model)} in {config.model.num_tokens} "
        f"tokens, {last_step} steps of {work}, ZeRO {config.engine.zero_stage}, {config.engine.precision}, run directory {config.out}"
    )


def _origin(source: checkpoint.Description, model: ViTConfig) -> str:
    """What fine-tuning makes of a checkpoint, in a line."""
    grids = " -> ".join("x".join(map(str, m.grid)) for m in (source.model, model))
    head = f"a new head of {model.num_classes} classes in place of {source.model.num_classes or 'none'}"
    return f"from {source.path}: {_pixels(source.model)} -> {_pixels(model)}, {grids} patches, {head}"


def _pixels(model: ViTConfig) -> str:
    return f"{model.image_size[0]}x{model.image_size[1]} pixels"


def _eval_fields(result: Evaluation) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in asdict(result).items()}


def _eval_line(step: int, result: Evaluation) -> str:
    skipped = f", {result.skipped} unreadable" if result.skipped else ""
    skipped += f", {result.removed} removed" if result.removed else ""
    scores = f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  loss {result.loss:.4f}"
    return f"step {step} held out: {scores}  ({result.samples} samples{skipped})"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------------------------------------------
# One rank
# ---------------------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The entry of a rank; what ends it early goes to VITSCALE_ERROR_FILE, where the launcher finds it."""
    die_with(int(os.environ.get("VITSCALE_LAUNCHER_PID", os.getppid())))  # a run that is started again has no second writer
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # windows in shared memory and tars have a descriptor each
    if 0 <= soft < _DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS if hard < 0 else min(hard, _DESCRIPTORS), hard))
    try:
        config = read_config(Path(sys.argv[1]))
        init_distributed()
        train(config)
        dist.destroy_process_group()
        status = 0
    except BaseException as error:
        text = f"error: {error}" if isinstance(error, UserError | OSError) else traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        if file := os.environ.get("VITSCALE_ERROR_FILE"):
            with contextlib.suppress(OSError):
                Path(file).write_text(text)
        status = 1
    # Not by the front door: peers may hang in a collective that this rank will never join, and even after a good end threads of torch now
    # and then abort the interpreter's exit ("terminate called without an active exception"). All files are closed and committed by now.
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
