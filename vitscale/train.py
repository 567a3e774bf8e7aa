"""A run, from its config to its last checkpoint: the loop of pre-training and of fine-tuning, one process a rank.

Follow one batch from here: `stream.py` (which samples, and their pixels) -> `transfer.py`, `mixing.py` -> `model.py` -> `objective.py` ->
`engine.py`; what the stream is made of it tells itself.
`samples_seen` is the only clock: with it, the seed and the checkpoint's tensors a run continues exactly where it was.

However a start ends before the run does, it ends as `ending.py` says, and another start is the only way to go on: after a signal
(`stopping.py`), which all ranks agree on at a step's end (`agreement.py`) and save, and after steps that went wrong (`guards.py`).
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data_tools.dataset import Dataset
from vitscale import checkpoint, keyed, stopping
from vitscale.agreement import Agreement
from vitscale.announce import cost_line, data_warnings, eval_line, headline, holdout_line, origin_line, overlays_in_use, size_and_work
from vitscale.compute import Compiling
from vitscale.config import TrainConfig, grad_accum_steps
from vitscale.ending import Cause, Ended
from vitscale.engine import Engine, device
from vitscale.errors import CheckpointError
from vitscale.evaluate import Evaluation, evaluate
from vitscale.finetune import fine_tuned_weights
from vitscale.flops import measured_flops, peak_flops
from vitscale.foreign import ForeignStream, Usable
from vitscale.guards import Guard, is_skipped
from vitscale.heartbeat import COMPILING, EVALUATING, SAVING, TRAINING
from vitscale.metrics import SHARES, Metrics, Moment, Pace, progress_line
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.optim import learning_rate
from vitscale.profiling import Profile
from vitscale.recovery import compare_ranks, left_out_line, note_left_out, roll_back, take_up
from vitscale.resolve import open_data, open_held_out
from vitscale.retention import policy_of
from vitscale.run import unusable_line
from vitscale.saving import PATIENCE, Saver
from vitscale.stopping import Asked
from vitscale.stream import Share, TrainStream
from vitscale.timeline import Timeline, timeline_of
from vitscale.timing import BACKWARD, CHECKPOINT, DATA, FORWARD, LOGGING, OUTSIDE, UPDATE, Clock
from vitscale.transfer import on_device
from vitscale.unindexed import Tars
from vitscale.weights import TensorReader, check_tensors, read_weights

_LARGEST = torch.finfo(torch.float32).max  # stands for an infinite loss, which JSON has no word for
Beat = Callable[[int, int, str], None]  # (step, samples_seen, phase): tells that the rank goes on


class _Step(NamedTuple):
    """What a rank keeps of a step until all ranks' losses of it are known."""

    at: Moment
    samples_seen: int
    lr: float
    grad_norm: float
    applied: bool
    """Whether the optimizer took it."""
    logged: bool


def train(config: TrainConfig, *, stop_at: int | None = None, beat: Beat = lambda step, samples_seen, phase: None) -> None:
    """Trains from the newest durable checkpoint, or from the start, to the end. Needs a process group (`engine.init_distributed`).

    Raises Ended on all ranks alike where this start is over before the run is, and what the parts raise; a rank that fails must end, for
    the others wait for it.

    Args:
        config: resolved (`resolve.resolve`), of a run directory that exists.
        stop_at: the step to stop after, with a checkpoint; None runs to the end.
        beat: is called all the while.
    """
    rank, world_size, run = dist.get_rank(), dist.get_world_size(), Path(config.out)

    # -- Data -------------------------------------------------------------------------------------------------------------------------
    dataset, held_out = open_data(config), open_held_out(config)  # as the start found them: ranks must agree
    timeline = timeline_of(config, dataset.num_samples)
    last_step = timeline.total_steps

    # -- Weights: this run's newest durable checkpoint, another's to go on from, or random ----------------------------------------------
    folder, faults, evaluated, skipped = take_up(config)
    sizes = {span.image_size for span in timeline.spans}
    model = ViT(config.model, config.engine.keeps, sizes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    resumed = checkpoint.describe(folder) if folder else None
    origin = ""
    if resumed:
        model.load_state_dict(read_weights(resumed, checkpoint.WEIGHT, shapes))
    elif init := config.init:
        source = checkpoint.describe(Path(init.folder))  # rank 0 has checked that it is whole
        origin = f"\n{origin_line(source, config.model, keep_head=init.keep_head)}"
        how = init.position_interpolation, config.seed
        model.load_state_dict(fine_tuned_weights(source, init.weights, config.model, *how, keep_head=init.keep_head))
    else:
        initialize(model, config.seed)

    # -- Engine -----------------------------------------------------------------------------------------------------------------------
    samples_seen = resumed.samples_seen if resumed else 0
    step, span = timeline.step_at(samples_seen), timeline.at(samples_seen)
    accumulate, clock = grad_accum_steps(*span.batch, world_size), Clock(device())
    engine = Engine(
        model, config.engine, config.optimizer, micro_batch_size=span.micro_batch_size, grad_accum_steps=accumulate, clock=clock
    )  # fmt: skip
    if resumed:
        check_tensors(resumed, shapes, engine.kinds)
        engine.load(TensorReader(resumed).stretch, resumed.step if resumed.state.updates is None else resumed.state.updates)

    # -- Stream -----------------------------------------------------------------------------------------------------------------------
    share, quarantine = Share(timeline, rank, world_size), run / "quarantine.jsonl"
    stream: TrainStream | ForeignStream
    if isinstance(dataset, Tars):
        usable, cursor = Usable(config.model.num_classes, config.objective.soft_targets), resumed.state.cursor if resumed else 0
        stream = ForeignStream(
            dataset, config.preprocess, config.stream, share, seed=config.seed, quarantine=quarantine, usable=usable, cursor=cursor
        )  # fmt: skip
    else:
        stream = TrainStream(
            dataset, config.preprocess, config.stream, share, seed=config.seed, quarantine=quarantine, weights=config.data_weights
        )  # fmt: skip

    # -- What the run leaves: checkpoints, and what people read ----------------------------------------------------------------------------
    saver = Saver(run, engine, policy_of(config), step)
    metrics = Metrics(run, step) if rank == 0 else None
    if metrics:
        for fault in faults:
            metrics.say(f"warning: {fault}; {f'{folder.name} is used' if folder else 'the run starts anew'}")
        metrics.say(headline(config, step, timeline, world_size, shapes, _device_name()) + origin)
        metrics.say(cost_line(config, span, _device_name()))
        metrics.say(engine.computes)
        metrics.say(stream.describe())
        for warning in data_warnings(dataset, config):
            metrics.say(warning)
        if config.holdout and held_out:
            metrics.say(holdout_line(held_out, config.holdout))
        overlays, what_they_do = overlays_in_use(dataset)
        if overlays:
            metrics.log({"step": step, "samples_seen": samples_seen, "overlays": overlays}, what_they_do)

    # -- What watches over the run, and what it does with each step once all ranks' losses are known --------------------------------------
    past = (resumed.state.recent_losses, resumed.state.spikes, resumed.state.nonfinite_steps) if resumed else ()
    guard = Guard(config.guard, *past, seen=step, rollbacks=len(skipped), anew=timeline.other_sizes())
    asked, agreement = Asked(run, rank), Agreement[_Step](device())
    pace, profile = Pace(step), Profile(config.profile, run, step, rank, clock, engine.module)
    if metrics and (late := profile.too_late()):
        metrics.say(late)
    compiling = Compiling(lambda: beat(step, samples_seen, COMPILING))

    def tell(done: _Step, loss: float, sums: Mapping[str, int]) -> None:
        """Rank 0's line of a step: of those that are logged, and of those that were left out."""
        if not metrics:
            return
        at = _clock(done.at.step, done.samples_seen)
        if not done.applied:
            metrics.log(at | {"left_out": "the gradient is not finite"}, left_out_line(run, done.at.step))
        elif done.logged:
            learned = {"epoch": stream.epoch(done.samples_seen), "loss": loss, "lr": done.lr, "grad_norm": done.grad_norm}
            speed = pace.measure(done.at, timeline.samples_at, sums) | {"unusable": stream.unusable()}
            if profile.covers(done.at.step):  # nothing that is measured is true of other steps
                speed = {name: value for name, value in speed.items() if name not in SHARES} | {"profiled": True}
            if (lead := clock.lead()) is not None:
                speed["host_lead"] = lead
            line = at | learned | speed | _outlook(speed["images_per_second"], done.at.step, timeline, config, world_size)
            line |= {"save_seconds": saver.seconds} if saver.seconds else {}
            metrics.log(line, progress_line(line, last_step))

    def hear(*, all_: bool, ends: bool = False) -> str:
        """Takes note of the steps whose losses are known by now; returns why the ranks are to stop, or nothing."""
        reason = ""
        for known in agreement.heard(all_=all_):
            done = known.note
            if ends and done.applied:  # the last step of a start is told, whichever it is
                done = done._replace(logged=True, grad_norm=engine.grad_norm())
            reason = stopping.why(known.sums)
            saver.advance(known.sums["unwritten"], known.sums["failed"])
            loss = known.loss if math.isfinite(known.loss) else _LARGEST
            rollback = guard.see(done.at.step, loss, applied=done.applied)
            if rollback and rollback.spike and not guard.can_roll_back:
                if metrics:
                    metrics.say(f"warning: {rollback.words}; guard.max_rollbacks={config.guard.max_rollbacks} allows no rollback")
            elif rollback:
                beat(step, samples_seen, SAVING)
                saver.wait()
                if ended := roll_back(rollback, guard, config, timeline, skipped):
                    raise ended
            tell(done, loss, known.sums)
        if metrics:
            for said in (*compiling.news(), *saver.news()):
                metrics.say(said)
        return reason

    def compare() -> None:
        """Ends this start where ranks differ in what they must hold alike: before a checkpoint could make it last."""
        if ended := compare_ranks(engine, step):
            beat(step, samples_seen, SAVING)
            saver.wait()
            raise ended

    def evaluate_on(held_out: Dataset) -> str:
        """Evaluates the weights as they are, or their average, and tells the result; returns why it was broken off, or nothing."""
        clock.enter(OUTSIDE)
        found = _evaluate(engine, held_out, config, asked, saver, lambda: beat(step, samples_seen, EVALUATING))
        if isinstance(found, str):
            return found
        if metrics:
            metrics.log(
                _clock(step, samples_seen) | _eval_fields(found),
                eval_line(step, found, timeline, average=config.optimizer.average_decay > 0),
            )
        return ""

    def resume() -> None:
        """What follows counts as steps again."""
        clock.enter(LOGGING)
        pace.restart(step)

    def about() -> checkpoint.Description:
        """The checkpoint of this step. A collective."""
        state = checkpoint.RunState(
            cursor=_used_up_by_all(stream),
            updates=engine.updates,
            skipped=tuple(of for of in skipped if of[0] < samples_seen),
            recent_losses=guard.recent_losses,
            spikes=guard.spikes,
            nonfinite_steps=guard.nonfinite_steps,
        )
        about = config.model, config.preprocess, config.objective, dataset.class_names
        return checkpoint.Description(run, *about, samples_seen=samples_seen, step=step, state=state)

    # -- The loop ---------------------------------------------------------------------------------------------------------------------
    batches = on_device(stream.micro_batches(samples_seen, timeline.total_samples, skipped), device(), config.mix)
    reason = _asked_by_any(asked)
    if held_out and step > 0 and _due(step, last_step, config.eval_every) and not evaluated:  # the last start ended before it was
        reason = reason or evaluate_on(held_out)
    gc.disable()  # to look through what a start has made takes half a second, a different one on each rank, and all wait for it
    resume()
    while step < last_step and step != stop_at and not reason:
        if is_skipped(samples_seen, skipped):
            reason = hear(all_=True)  # what was made before is measured before the pace begins anew
            step += 1
            samples_seen = timeline.samples_at(step)
            pace.restart(step)
            continue
        if profile.between(step):
            reason = hear(all_=True)
            beat(step, samples_seen, SAVING)
            told = profile.write(span.train_flops(config.model, config.optimizer) * span.global_batch_size / world_size)
            dist.barrier()  # for those that write, where the waiting counts into no share
            if metrics and told:
                metrics.say(told)
            resume()
            continue
        beat(step, samples_seen, TRAINING)
        if timeline.at_step(step) != span:
            span = timeline.at_step(step)
            accumulate = grad_accum_steps(*span.batch, world_size)
            engine.set_batch(span.micro_batch_size, accumulate)
            if metrics:
                metrics.say(f"from step {step + 1} on: {', '.join(size_and_work(span, config.model, world_size))}")
        lr = learning_rate(step, last_step, config.optimizer.peak_lr, config.schedule, timeline.samples_at)
        loss = torch.zeros((), device=device())
        seen = []  # the samples of each micro-batch, and its loss
        for micro in range(accumulate):
            clock.enter(DATA)
            batch = next(batches)
            clock.enter(FORWARD)
            if config.model.dropout:  # element dropout repeats at equal world size and micro-batch
                torch.manual_seed(int(keyed.key(keyed.Purpose.DROPOUT, config.seed, step, micro, rank) >> 1))
            images_BCHW = normalize(batch.images_BHWC, config.preprocess)
            images_BCHW = batch.mix.images(images_BCHW) if batch.mix else images_BCHW
            logits_BK = engine.forward(images_BCHW, batch.keys_B)
            micro_loss = compute_loss(logits_BK, batch.labels_BL, batch.scores_BL, config.objective, batch.mix)
            clock.enter(BACKWARD)
            engine.backward(micro_loss)
            clock.enter(UPDATE)
            applied = engine.step(lr)
            clock.enter(LOGGING)
            loss += micro_loss.detach() / accumulate
            seen.append((batch.samples_B, micro_loss.detach()))
        position, step = samples_seen, step + 1
        samples_seen = timeline.samples_at(step)
        if not applied:
            note_left_out(run, step, position, seen)

        evaluates = held_out is not None and _due(step, last_step, config.eval_every)
        saves = evaluates or step == stop_at or _due(step, last_step, config.checkpoint_every)  # what is evaluated may be the best
        logged = saves or step % config.log_every == 0 or step == 1  # the first tells how long the run will take
        logged = logged or timeline.at_step(step) != span  # a pace is of steps that are alike
        grad_norm = engine.grad_norm() if logged and applied else math.nan
        done = _Step(pace.moment(step, clock.sent), samples_seen, lr, grad_norm, applied, logged)
        if logged:
            gc.collect()
            if not gc.get_freeze_count():  # once: what is frozen is never collected, were it garbage later
                gc.freeze()
        agreement.tell(done, loss, **asked.counts(), unwritten=saver.unwritten, failed=saver.failed, **clock.microseconds())
        reason = hear(all_=saves)
        if saves or (config.guard.compare_every and step % config.guard.compare_every == 0):
            compare()
        if saves and not reason and (step == last_step or not guard.in_doubt):
            beat(step, samples_seen, SAVING)
            clock.enter(CHECKPOINT)
            before = time.perf_counter()
            saver.snapshot(about(), patience=math.inf if step in (last_step, stop_at) else PATIENCE)
            pace.stalled += time.perf_counter() - before
            resume()
        if evaluates and held_out and not reason:
            reason = evaluate_on(held_out)
            resume()
    clock.enter(OUTSIDE)
    profile.close()

    # -- The end ----------------------------------------------------------------------------------------------------------------------
    beat(step, samples_seen, SAVING)
    hear(all_=True, ends=True)
    saver.wait()
    if step != (resumed.step if resumed else 0) and saver.newest != step:
        compare()
        saver.snapshot(about())
    try:
        saver.finish()
    except CheckpointError as error:
        raise Ended(Cause.DISK_FULL, f"error: {error}") from None
    if metrics:
        for said in saver.news():
            metrics.say(said)
        if said := unusable_line(run):
            metrics.say(said)
        metrics.close()
    compiling.close()
    engine.close()
    gc.unfreeze()
    gc.enable()
    if reason:
        raise _stopped(reason, step)


# ---------------------------------------------------------------------------------------------------------------------------------------


def _asked_by_any(asked: Asked) -> str:
    """Why the ranks are to stop before they have begun, or nothing."""
    counts = asked.counts()
    sums = torch.tensor(list(counts.values()), device=device())
    dist.all_reduce(sums)
    return stopping.why(dict(zip(counts, sums.tolist(), strict=True)))


def _stopped(reason: str, step: int) -> Ended:
    if reason == "asked":
        return Ended(Cause.REQUEST, f"stopped at step {step} as RUN/stop asks, and saved")
    return Ended(Cause.SIGNAL, f"stopped at step {step} by SIG{reason}, and saved", signal=reason)


def _used_up_by_all(stream: TrainStream | ForeignStream) -> int:
    """The cursor of a run on tars without an index, the lowest of all ranks."""
    lowest = torch.tensor(stream.cursor, device=device())
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return int(lowest)


def _outlook(images_per_second: float, step: int, timeline: Timeline, config: TrainConfig, world_size: int) -> dict[str, float]:
    """What a rate says of the run's end, and of its share of the devices' peak where that is known."""
    found = {"seconds_left": timeline.images_left(step, config.model, config.optimizer) / images_per_second}
    of = (_device_name(), config.engine.precision)
    for name, ceiling in (("mfu", peak_flops(*of)), ("mfu_of_measured", measured_flops(*of))):
        if ceiling:
            flops = timeline.at_step(step - 1).train_flops(config.model, config.optimizer)
            found[name] = flops * images_per_second / world_size / ceiling
    return found


def _due(step: int, last_step: int, every: int) -> bool:
    """Whether something that happens at the end, and `every` steps where that is above 0, happens after this step."""
    return step == last_step or (every > 0 and step % every == 0)


def _evaluate(
    engine: Engine, held_out: Dataset, config: TrainConfig, asked: Asked, saver: Saver, beat: Callable[[], None]
) -> Evaluation | str:  # fmt: skip
    """An evaluation, between whose batches ranks go on to tell one another what they are asked; or why it was broken off."""
    agreement, nothing = Agreement[None](device()), torch.zeros((), device=device())

    def between_batches(done: int, total: int) -> None:
        beat()
        agreement.tell(None, nothing, **asked.counts(), unwritten=saver.unwritten, failed=saver.failed)
        for known in agreement.heard(all_=False):
            saver.advance(known.sums["unwritten"], known.sums["failed"])
            if reason := stopping.why(known.sums):
                raise _BrokenOff(reason)

    with engine.evaluation():
        try:
            found: Evaluation | str = evaluate(
                engine.forward, held_out, config.model.image_size, config.preprocess, config.objective, device=device(),
                batch_size=config.micro_batch_size, stream=config.stream, progress=between_batches,
            )  # fmt: skip
        except _BrokenOff as broken_off:
            found = str(broken_off)
        agreement.heard(all_=True)
    return found


class _BrokenOff(Exception):  # noqa: N818 - asked for
    """Ends an evaluation, on all ranks after the same batch; the next start makes it anew."""


def _clock(step: int, samples_seen: int) -> dict[str, float]:
    return {"step": step, "samples_seen": samples_seen, "time": time.time()}


def _eval_fields(result: Evaluation) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in asdict(result).items()}


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
