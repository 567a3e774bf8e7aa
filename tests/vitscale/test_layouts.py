"""Which layouts fit, which is chosen, and how it scales."""

import random
from dataclasses import replace

import pytest

from tests.vitscale.plans import H14, plan_of
from vitscale.config import ConfigError
from vitscale.gpus import GPUS, Cluster, gpu
from vitscale.layouts import LEAST_EFFICIENCY, RESERVE, asked_for, choose, divisors, images_a_gpu, knee, options, spans_of
from vitscale.recipes import PRETRAIN, recipe
from vitscale.roofline import assumed


def test_the_fastest_is_chosen_and_stage_3_for_a_tenth() -> None:
    cluster = Cluster(gpu("h200"), 16, 8)
    real = options(H14, cluster, assumed(cluster.gpu, "bf16"), spans_of(H14, 303_000_000))
    alike = [replace(option, step_seconds=1.0) for option in real if option.fits]
    assert len({option.zero_stage for option in alike}) == 3
    first = choose(alike)
    assert (first.zero_stage, first.keeps) == (1, "everything"), "of those that are as fast the plainest"
    for option in alike:
        others = [other for other in alike if other != option]
        faster, hardly, much = (replace(option, step_seconds=seconds) for seconds in (0.97, 0.99, 0.9))
        assert choose([*others, much]) == much
        assert (choose([*others, faster]) == faster) is (option.zero_stage < 3)
        assert choose([*others, hardly]) in (first, hardly)
        if option.zero_stage < 3:
            assert choose(alike, option) == option, "what the config asks for is kept where it is as fast"
            assert choose([*others, faster], first if option != first else None) == faster
    third = [option for option in alike if option.zero_stage == 3]
    assert choose(third, third[-1]) == third[-1]
    with pytest.raises(ConfigError, match="no ZeRO stage fits"):
        choose([replace(option, fits=False) for option in alike])


def test_the_largest_micro_batch_may_hold_less_than_smaller_ones() -> None:
    """It is all of a step, so that stage 1 in bf16 keeps no sums of micro-batches."""
    config = replace(H14, global_batch_size=1024, model=replace(H14.model, depth=256))
    cluster, rates = Cluster(gpu("a100-40"), 32, 8), assumed(gpu("a100-40"), "bf16")
    by_size = {}
    for size in (2, 4):
        sized = replace(config, micro_batch_size=size)
        by_size[size] = asked_for(sized, cluster, rates, spans_of(sized, 303_000_000))
    assert by_size[4].fits
    assert not by_size[2].fits
    assert by_size[4].memory.total < by_size[2].memory.total
    found = options(sized, cluster, rates, spans_of(sized, 303_000_000))
    assert next(option for option in found if (option.zero_stage, option.keeps) == (1, "everything")).last.micro_batch_size == 4


def test_a_small_gpu_checkpoints_or_takes_smaller_micro_batches() -> None:
    large, small = plan_of(H14, 1, "h200").chosen, plan_of(H14, 1, "a100-40").chosen
    assert large.last.micro_batch_size > small.last.micro_batch_size
    for option in plan_of(H14, 1, "a100-40").options:
        assert option.fits == bool(option.parts)
        assert not option.fits or option.memory.total + RESERVE <= 40e9


def test_properties_over_random_clusters() -> None:
    draw = random.Random(0)
    for _ in range(12):
        name, config = draw.choice([one.name for one in GPUS]), recipe(draw.choice(["vit-h14-jft300m", "vit-b16-imagenet1k"]), PRETRAIN)
        plan = plan_of(config, draw.choice((1, 2, 8, 32)), name)
        strong = [row for row in plan.scaling if row.scaling == "strong"]
        assert [row.nodes for row in strong] == sorted(row.nodes for row in strong)
        for row in plan.scaling:
            assert row.images_a_gpu * row.gpus == row.global_batch_size
            assert row.images_a_gpu % row.micro_batch_size == 0
            assert 0 < row.mfu < 1
            assert 0 <= row.exposed < 1
            assert row.gpu_days == pytest.approx(row.days * row.gpus)
        chosen = knee(strong)
        assert chosen.efficiency >= LEAST_EFFICIENCY
        assert not any(row.efficiency >= LEAST_EFFICIENCY for row in strong if row.nodes > chosen.nodes)


def test_micro_batches_divide_and_mixing_gets_pairs() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    config = recipe("vit-b16-imagenet1k-augreg", PRETRAIN)
    cluster = Cluster(gpu("h100"), 1, 8)
    assert config.mix.is_on
    found = options(config, cluster, assumed(cluster.gpu, "bf16"), spans_of(config, 1_281_167))
    assert all(part.micro_batch_size % 2 == 0 for option in found for part in option.parts)
    assert choose(found) in found
    assert images_a_gpu(4096, cluster) == 512
