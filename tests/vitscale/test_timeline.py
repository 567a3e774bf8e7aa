"""Phases of smaller images and batches: the clock is whole, the order is the one order, and a run in phases is what it says."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from launch.flags import UsageError, parse
from tests.distributed import run_on_ranks
from tests.runs import TOLERANCE, begin, case, check_alike, log, losses_of, variant
from tests.vitscale.plain import plain_torch
from tests.vitscale.streams import IMAGE_SIZE, rows_of, stream
from vitscale.check import check_config
from vitscale.config import (
    ConfigError,
    Phase,
    ScheduleConfig,
    StreamConfig,
    TrainConfig,
    ViTConfig,
    changes,
    from_dict,
    may_change,
    to_dict,
)
from vitscale.finetune import resample_grid
from vitscale.flops import train_flops
from vitscale.fork import fork, fork_point
from vitscale.guards import Guard
from vitscale.locality import choose_order
from vitscale.mixture import Mixture
from vitscale.model import ViT, initialize, sincos_2d
from vitscale.optim import learning_rate
from vitscale.order import RunOrder
from vitscale.recipes import PRETRAIN, recipe
from vitscale.resolve import resolve
from vitscale.run import RunError, read_config, read_metrics, read_record, write_json
from vitscale.status import status
from vitscale.timeline import Span, Timeline, timeline_of

SMALL, MIDDLE = (8, 16), (16, 16)
# Of the 27 steps' worth of samples: another size and batch, another size, and the run's own 24 images of 16 x 24 pixels
PHASES = (Phase(0.25, SMALL, 12, 2), Phase(0.5, MIDDLE), Phase(0.7, None, 12, 2))


def with_phases(config: TrainConfig, *phases: Phase) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, phases=phases or PHASES))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The clock
# ---------------------------------------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[TrainConfig, int]:
    """A run of some phases, its length in steps or epochs, and the samples of its dataset."""
    shares = sorted(draw(st.sets(st.integers(1, 99), max_size=4)))
    batches = st.integers(1, 200)
    phases = tuple(Phase(share / 100, None, draw(batches | st.none())) for share in shares)
    in_steps = draw(st.booleans())
    length: dict[str, Any] = {"steps": draw(st.integers(1, 10_000))} if in_steps else {"epochs": draw(st.floats(0.01, 300))}
    config = TrainConfig(global_batch_size=draw(batches), schedule=ScheduleConfig(phases=phases), **length)
    return config, draw(st.integers(1, 100_000))


def timeline_or_none(config: TrainConfig, num_samples: int) -> Timeline:
    try:
        return timeline_of(config, num_samples)
    except ConfigError:
        assume(False)
        raise


@settings(deadline=None)
@given(runs(), st.data())
def test_steps_and_samples_are_each_others_inverse(run: tuple[TrainConfig, int], data: st.DataObject) -> None:
    timeline = timeline_or_none(*run)
    step = data.draw(st.integers(0, timeline.total_steps + 10))
    span, begins, ends = timeline.at_step(step), timeline.samples_at(step), timeline.samples_at(step + 1)
    position = data.draw(st.integers(begins, ends - 1))
    assert ends - begins == span.global_batch_size
    assert timeline.step_at(position) == timeline.step_at(begins) == step
    assert timeline.at(position) == span


@settings(deadline=None)
@given(runs())
def test_phases_end_at_the_step_nearest_to_their_share(run: tuple[TrainConfig, int]) -> None:
    config, num_samples = run
    timeline = timeline_or_none(*run)
    asked = [phase.global_batch_size or config.global_batch_size for phase in config.schedule.phases] + [config.global_batch_size]
    assert [span.global_batch_size for span in timeline.spans] == asked
    if config.steps:  # so many samples have these steps by these shares
        shares = np.diff([0.0, *(phase.until for phase in config.schedule.phases), 1.0])
        length = config.steps / float((shares / asked).sum())
        assert timeline.total_steps == config.steps
    else:
        length = config.epochs * num_samples
        assert -1e-6 * length <= timeline.total_samples - length <= asked[-1]
    for phase, before, after in zip(config.schedule.phases, timeline.spans, timeline.spans[1:], strict=False):
        assert abs(after.first_sample - phase.until * length) <= before.global_batch_size / 2 + 1e-6 * length


@settings(deadline=None)
@given(runs(), st.integers(0, 10**7))
def test_without_phases_it_is_a_division(run: tuple[TrainConfig, int], samples_seen: int) -> None:
    config, num_samples = replace(run[0], schedule=ScheduleConfig()), run[1]
    timeline, batch = timeline_of(config, num_samples), config.global_batch_size
    assert timeline.total_steps == (config.steps or math.ceil(config.epochs * num_samples / batch))
    assert timeline.step_at(samples_seen) == samples_seen // batch
    assert timeline.samples_at(samples_seen) == samples_seen * batch
    assert timeline.total_samples == timeline.total_steps * batch


def test_a_phase_without_a_step_is_refused() -> None:
    config = with_phases(TrainConfig(steps=10, global_batch_size=64), Phase(0.01, SMALL))
    with pytest.raises(ConfigError, match=r"the part up to 0\.01 is no whole step of 64 images"):
        timeline_of(config, 0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "rsqrt", "constant"])
def test_the_learning_rate_goes_by_samples(kind: Any) -> None:
    """To the bit the same as by steps where batches are equal, and else the rate of that share of the run's samples."""
    schedule = ScheduleConfig(kind, warmup_steps=37, cooldown_steps=11, timescale=50)
    for step in range(1001):
        assert learning_rate(step, 1000, 1e-3, schedule, lambda s: 4096 * s) == learning_rate(step, 1000, 1e-3, schedule)
    timeline = Timeline((Span(0, 0, SMALL, 8, 8), Span(400, 3200, SMALL, 16, 16)), 600)
    if kind in ("linear", "cosine"):
        plain = ScheduleConfig(kind)
        rates = [learning_rate(step, 600, 1e-3, plain, timeline.samples_at) for step in (0, 200, 400, 500, 600)]
        assert rates == [learning_rate(samples, 6400, 1e-3, plain) for samples in (0, 1600, 3200, 4800, 6400)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_phases_on_the_command_line_and_in_json() -> None:
    words = ["0.5:image-size=126", "0.75:image_size=112x140,global_batch_size=2048,micro-batch-size=64"]
    config = parse(TrainConfig, ["--schedule.phases", *words], "pretrain")
    assert config.schedule.phases == (Phase(0.5, (126, 126)), Phase(0.75, (112, 140), 2048, 64))
    assert from_dict(TrainConfig, to_dict(config)) == config
    before = to_dict(config)
    del before["schedule"]["phases"]
    assert from_dict(TrainConfig, before).schedule.phases == (), "as runs of before were written down"
    other = with_phases(config, config.schedule.phases[0], replace(config.schedule.phases[1], until=0.8, micro_batch_size=32))
    assert {name: may_change(name) for name in changes(config, other)} == {
        "schedule.phases.1.until": False, "schedule.phases.1.micro_batch_size": True
    }  # fmt: skip


@pytest.mark.parametrize(
    "word", ["0.5", "half:image_size=126", "0.5:px=126", "0.5:image_size=1x2x3", "0.5:until=1", "0.5:micro_batch_size=4.5"]
)
def test_words_that_are_no_phase(word: str) -> None:
    with pytest.raises(UsageError, match=rf"{word} is no phase; 0\.5:image_size=126 is one"):
        parse(TrainConfig, ["--schedule.phases", word], "pretrain")


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([Phase(1.0, SMALL)], r"the 1\. of 1, up to 1 of the samples, must end between 0, where it begins, and 1; 0\.5 works"),
        ([Phase(0.5, SMALL), Phase(0.5, MIDDLE)], r"the 2\. of 2, .* must end between 0\.5, where it begins, and 1; 0\.75 works"),
        ([Phase(0.5)], "has the settings of what comes after it; leave it out"),
        ([Phase(0.5, (8, 20))], "image_size=8x20: 20 is not a multiple of patch_size=8; 16 is"),
        ([Phase(0.5, None, 13)], r"13 is not a multiple of micro_batch_size x world_size = 4 x 2 = 8; global_batch_size=16 works"),
        ([Phase(0.5, None, 0)], "must be at least 1"),
        ([Phase(0.5, None, None, 5)], r"= 5 x 2 = 10; global_batch_size=20 works, and so does micro_batch_size=4"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be(config: TrainConfig, phases: list[Phase], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(with_phases(config, *phases), 2)


def test_relative_positions_keep_their_size(config: TrainConfig) -> None:
    config = replace(config, model=replace(config.model, position="relative"))
    check_config(with_phases(config, Phase(0.5, None, 8)), 1)
    with pytest.raises(ConfigError, match="image_size cannot change under position=relative; learned_1d"):
        check_config(with_phases(config, Phase(0.5, SMALL)), 1)


def test_what_smaller_images_save_of_vit_h14() -> None:
    """What the recipe tells of its phases."""
    config = recipe("vit-h14-jft300m", PRETRAIN)
    phases = parse(TrainConfig, ["--schedule.phases", "0.5:image_size=126", "0.8:image_size=154"], "pretrain").schedule.phases
    timeline = timeline_of(with_phases(config, *phases), 303_000_000)
    cost = sum(
        (timeline.samples_at(end) - span.first_sample) * train_flops(replace(config.model, image_size=span.image_size))
        for span, end in zip(timeline.spans, timeline.ends, strict=True)
    )
    assert round(cost / (timeline.total_samples * train_flops(config.model)), 2) == 0.50
    assert "0.50 of the FLOPs" in (next(of for of in PRETRAIN if of.__name__ == "vit_h14_jft300m").__doc__ or "")
    assert timeline.images_left(timeline.total_steps - 1, config.model) == config.global_batch_size
    assert timeline.images_left(1, config.model) > 1.5 * timeline.total_samples, "the first images are the cheap ones"


# ---------------------------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned_1d", "learned_2d", "sincos", "none"])
def test_another_size_is_a_model_of_that_size(position: Any, pool: Any) -> None:
    """One whose embeddings were resampled as fine-tuning does it; and what it learns, the embeddings learn through that."""
    config = ViTConfig(
        depth=2, width=32, mlp_dim=64, num_heads=4, patch_size=8, image_size=(48, 64), num_classes=5, pool=pool, position=position
    )
    small = replace(config, image_size=(24, 40))
    model, other = ViT(config, image_sizes=[small.image_size]), ViT(small)
    initialize(model, 0)
    torch.manual_seed(0)
    nn.init.normal_(model.head.weight)  # zero at first
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    weights: dict[str, torch.Tensor] = dict(leaves)
    if position == "learned_1d":
        prefix = int(pool == "cls")
        patches = resample_grid(leaves["pos_embed"][:, prefix:], config.grid, small.grid, "timm")
        weights["pos_embed"] = torch.cat([leaves["pos_embed"][:, :prefix], patches], dim=1)
    elif position == "learned_2d":
        for name, old, new in zip(("pos_embed_rows", "pos_embed_columns"), config.grid, small.grid, strict=True):
            weights[name] = resample_grid(leaves[name][None], (old, 1), (new, 1), "timm")[0]
    elif position == "sincos":
        other.pos_embed_fixed = resample_grid(sincos_2d(config.grid, config.width), config.grid, small.grid, "timm")
    images = torch.randn(3, 3, *small.image_size)
    logits, expected = model(images), torch.func.functional_call(other, weights, (images,))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - leaves[name].grad).abs().max()) <= 1e-4 * float(parameter.grad.abs().max()), name
    with pytest.raises(ValueError, match="do not fit this model's image_size"):
        model(torch.randn(1, 3, 32, 32))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------------------------------------------------

TIMELINE = Timeline((Span(0, 0, SMALL, 6, 1), Span(4, 24, IMAGE_SIZE, 12, 2), Span(9, 84, MIDDLE, 24, 4)), 12)


@pytest.mark.parametrize(
    "config", [StreamConfig(workers=2), StreamConfig(workers=1, lanes=6, window=5, prefetch=1), StreamConfig(workers=1, processes=True)]
)
def test_batches_of_every_phase(dataset: Path, tmp_path: Path, config: StreamConfig) -> None:
    """Whatever the world size each step has its own positions, and all have each once; and from a step on, as from the start."""
    mixture = Mixture.open([dataset / "train"])
    seen: dict[int, list[list[Any]]] = {}
    for world_size in (1, 2, 3) if not config.processes else (1,):
        seen[world_size] = [[] for _ in range(TIMELINE.total_steps)]
        for rank in range(world_size):
            ranks = stream(mixture, tmp_path, rank=rank, world_size=world_size, config=config, timeline=TIMELINE)
            for step, batch in by_step(ranks.micro_batches(0, TIMELINE.total_samples), world_size):
                span = TIMELINE.at_step(step)
                assert batch.images_BHWC.shape == (span.micro_batch_size, *span.image_size, 3)
                seen[world_size][step] += rows_of(batch)
        assert [len(rows) for rows in seen[world_size]] == [
            TIMELINE.at_step(step).global_batch_size for step in range(TIMELINE.total_steps)
        ]
    first, *others = ([sorted(rows) for rows in steps] for steps in seen.values())
    assert all(other == first for other in others)
    order = RunOrder([mixture.components[0].shard_sizes], None, 0, *lanes_and_window(config, mixture))
    positions = range(TIMELINE.total_samples)
    assert sorted(row[1] for rows in first for row in rows) == sorted(order.samples_at(np.array(positions)).tolist())
    for start in (3, 4, 5, 9) if not config.processes else ():
        again = stream(mixture, tmp_path, config=config, timeline=TIMELINE).micro_batches(
            TIMELINE.samples_at(start), TIMELINE.total_samples
        )
        rows: list[list[Any]] = [[] for _ in range(start, TIMELINE.total_steps)]
        for step, batch in by_step(again, 1, start):
            rows[step - start] += rows_of(batch)
        assert [sorted(of) for of in rows] == first[start:]


def lanes_and_window(config: StreamConfig, mixture: Mixture) -> tuple[int, int]:
    chosen = choose_order(config, mixture.num_samples, 6)
    return chosen.lanes, chosen.window


def by_step(batches: Iterator[Any], world_size: int, step: int = 0) -> Iterator[tuple[int, Any]]:
    """Each micro-batch of a rank with the step that it belongs to."""
    made = 0
    for batch in batches:
        yield step, batch
        made += len(batch.samples_B)
        if made == TIMELINE.at_step(step).global_batch_size // world_size:
            step, made = step + 1, 0


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_run_in_phases_goes_on_as_itself(config: TrainConfig, tmp_path: Path) -> None:
    """Stopped within phases and where one ends, and gone on with by a new engine each time, it is itself, to the bit; and plain torch."""
    config = with_phases(config)
    evaluated = replace(config, eval_data=str(Path(config.data).parent / "val"), eval_every=4)
    parts = timeline_of(config, 0)
    assert [span.first_step for span in parts.spans] == [0, 9, 14, 21], "or the stops below would be elsewhere"
    stops = [5, parts.spans[1].first_step, 17, None]
    wholes = {
        "fp32": variant_of(config, tmp_path, "fp32", zero_stage=3),
        "bf16": variant_of(evaluated, tmp_path, "bf16", zero_stage=1, precision="bf16"),
    }
    cases = {}
    for name, whole in wholes.items():
        cases[name], before = case(whole), None
        for number, stop in enumerate(stops):
            part = replace(whole, out=str(tmp_path / f"{name}-{number}"))
            cases[f"{name}-{number}"], before = case(part, stop_at=stop, copy_of=before), part.out
    results = run_on_ranks("tests.vitscale.test_zero:walk", 1, {"cases": cases}, tmp_path)
    said = (tmp_path / "rank-0.log").read_text()
    expected = plain_torch(wholes["fp32"]).losses
    assert min(expected[-3:]) < 0.9 * expected[0], "it must learn, or equal losses would say little"
    np.testing.assert_allclose(losses_of(results["fp32"], 0, config.steps), expected, rtol=TOLERANCE)
    np.testing.assert_allclose(losses_of(results["bf16"], 0, config.steps), expected, rtol=0.05)
    for name in wholes:
        check_alike(tmp_path / f"{name}-{len(stops) - 1}", tmp_path / name)
    assert "16x24 pixels in 7 tokens, 24 images = 1 rank x 4 x 6" in said
    assert "from step 10 on: 16x16 pixels in 5 tokens, 24 images = 1 rank x 4 x 6" in said
    assert "step 8 held out at 16x24 pixels: top-1" in said
    assert "step 24 held out: top-1" in said
    lines = [line for line in read_metrics(tmp_path / "fp32") if "loss" in line]
    assert [line["samples_seen"] for line in lines] == [parts.samples_at(step) for step in range(1, config.steps + 1)]


def variant_of(config: TrainConfig, folder: Path, name: str, world_size: int = 1, **engine: Any) -> TrainConfig:
    return variant(config, folder, name, accumulate=6 // world_size, world_size=world_size, **engine)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What others make of it
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_another_size_s_losses_are_judged_by_their_own(config: TrainConfig) -> None:
    """Losses that are twice as high from a step on roll the run back, unless images have another size from there on.

    That step may be skipped, and it may lie behind the checkpoint that a start goes on from or before it.
    """
    losses = dict(enumerate([2 + 0.01 * (step % 7) for step in range(100)] + [4 + 0.01 * (step % 7) for step in range(20)], start=1))
    for anew, skipped, found in (((), (), True), ((101,), (), False), ((101,), (99, 100, 101, 102), False)):
        for start in (0, 90, 100):
            before = Guard(config.guard, anew=anew)
            assert not any(before.see(step, losses[step], applied=True) for step in range(1, start + 1) if step not in skipped)
            guard = Guard(config.guard, before.recent_losses, seen=start, anew=anew)
            rolls_back = [guard.see(step, losses[step], applied=True) for step in range(start + 1, 121) if step not in skipped]
            assert any(rolls_back) is found, (anew, skipped, start)


def test_seconds_left_are_of_the_images_to_come(config: TrainConfig) -> None:
    config = begin(with_phases(config))
    timeline, run = timeline_of(config, 131), Path(config.out)
    record = read_record(run)
    record["starts"][-1]["step"] = 0
    write_json(run / "run.json", record)
    log(
        config,
        *({"step": step, "samples_seen": timeline.samples_at(step), "loss": 1.0, "images_per_second": 60.0} for step in range(2, 10)),
    )
    log(
        config,
        *({"step": step, "samples_seen": timeline.samples_at(step), "loss": 1.0, "images_per_second": 12.0} for step in range(10, 13)),
    )
    found = status(run)
    assert found["pace"] == {"images_per_second": 12.0}, "of this phase alone"
    costs = [train_flops(replace(config.model, image_size=size)) for size in (MIDDLE, config.model.image_size)]
    later = timeline.total_samples - timeline.spans[2].first_sample
    assert found["seconds_left"] == pytest.approx((2 * 24 + later * costs[1] / costs[0]) / 12)
    assert found["total_steps"] == 27


def test_lanes_divide_every_phase_s_batch(config: TrainConfig) -> None:
    config = replace(config, global_batch_size=4096, micro_batch_size=16)
    chosen = resolve(with_phases(config, Phase(0.5, None, 1024 + 64)), 4).stream
    assert chosen.lanes == 1, "of a small dataset"
    spans = timeline_of(with_phases(config, Phase(0.5, None, 1024 + 64)), 131).spans
    assert choose_order(StreamConfig(), 10**7, math.gcd(*(span.global_batch_size for span in spans))).lanes == 64


def test_a_fork_keeps_the_batches_that_were(config: TrainConfig, tmp_path: Path) -> None:
    """A larger batch from a checkpoint on is a phase of the steps before it, which the refusal names."""
    begun = variant_of(with_phases(config), tmp_path, "begun")
    run_on_ranks("tests.vitscale.test_zero:walk", 1, {"cases": {"begun": case(begun, stop_at=12)}}, tmp_path)
    run, origin = fork_point(begun.out)
    longer = replace(begun, out=str(tmp_path / "fork"), steps=60, global_batch_size=48, schedule=replace(begun.schedule, phases=()))
    with pytest.raises(RunError, match="the checkpoint's 12 steps would have other batches than they had") as refused:
        fork(run, origin, longer)
    words = str(refused.value).partition("begins with ")[2].split()
    assert len(words) == 2
    kept = parse(TrainConfig, ["--schedule.phases", *words], "run fork").schedule.phases
    forked = fork(run, origin, resolve(with_phases(longer, *kept), 1))
    assert read_record(forked)["total_steps"] == 60
    timeline = timeline_of(read_config(forked), 131)
    assert timeline.step_at(origin.samples_seen) == origin.step == 12
    assert [span.global_batch_size for span in timeline.spans] == [12, 24, 48]
    again = {"cases": {"forked": case(read_config(forked), stop_at=14)}}
    run_on_ranks("tests.vitscale.test_zero:walk", 1, again, tmp_path)
    assert [line["samples_seen"] for line in read_metrics(forked) if "loss" in line][-2:] == [
        origin.samples_seen + 48,
        origin.samples_seen + 96,
    ]
