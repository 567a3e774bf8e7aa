"""The planner: choices, properties over random clusters, and that nothing it needs imports torch."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vitscale import plan as planner
from vitscale.config import ConfigError, EngineConfig, TrainConfig
from vitscale.flops import measured_flops, peak_flops
from vitscale.gpus import GPUS, gpu, gpu_of
from vitscale.memory import Layout
from vitscale.plan import Cluster, Data, Plan, make, samples_of
from vitscale.recipes import PRETRAIN, recipe, recipe_name
from vitscale.roofline import assumed, calibrated, step_time
from vitscale.traffic import Collective, Link, collectives, seconds

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
H14 = recipe("vit-h14-jft300m", PRETRAIN)


def h14(nodes: int = 8, **changed: Any) -> Plan:
    return plan_of(replace(H14, **changed), nodes)


def plan_of(config: TrainConfig, nodes: int, name: str = "h200") -> Plan:
    cluster = Cluster(gpu(name), nodes, 8)
    return make(config, cluster, Data(samples_of(config.recipe)), assumed(cluster.gpu, config.engine.precision))


def figure(plan: Plan, name: str) -> float:
    return next(f.value for section in plan.sections.values() for f in section if f.name == name)  # type: ignore[return-value]


def test_the_verb_answers_without_torch() -> None:
    code = (
        "import sys; from launch.main import dispatch; dispatch(['plan', 'vit-h14-jft300m', '--nodes', '8', '--gpu', 'h200', '--json']);"
        "found = [m for m in ('torch', 'numpy', 'pyarrow', 'PIL', 'deepspeed') if m in sys.modules]; sys.exit(str(found) if found else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RESULTS.parents[1], check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == json.loads(json.dumps(h14().to_dict()))


def test_text_and_json_tell_the_same() -> None:
    plan = h14()
    shown = planner.text(plan)
    for figures in plan.to_dict()["sections"].values():
        for one in figures:
            assert one["said"] in shown
            assert one["how"] in shown
            assert one["how"]
    for row in plan.scaling:
        assert f"{row.gpu_days:,.1f}  {row.basis}" in shown
    assert all(said in shown for said in plan.advice)


def test_figures_of_vit_h14() -> None:
    """Those that the paper and the project's facts give: 654 M parameters with JFT's head, 1.04 M steps, 4.3e21 FLOP, 32% MFU."""
    plan = h14()
    assert figure(plan, "parameters") == 630_764_800 + 1280 * 18_291 + 18_291
    assert figure(plan, "steps") == pytest.approx(1.04e6, rel=0.01)
    assert figure(plan, "flops") == pytest.approx(4.3e21, rel=0.02)
    assert "32% MFU" in next(f.how for f in plan.sections["run"] if f.name == "paper")
    assert figure(plan, "gpu_days") == pytest.approx(64 * figure(plan, "days"))
    assert figure(plan, "days") == pytest.approx(
        figure(plan, "steps") * figure(plan, "step") / 86_400 / figure(plan, "goodput")
    )  # fmt: skip
    kinds = plan.chosen.memory.kinds()  # type: ignore[union-attr]
    assert figure(plan, "peak") == sum(kinds.values()) + planner.RESERVE
    parts = [f.value for f in plan.sections["step"][:7]]
    assert figure(plan, "step") == pytest.approx(sum(parts) - figure(plan, "hidden"))  # type: ignore[arg-type]


def test_figures_taken_from_results_are_theirs() -> None:
    speed = json.loads((RESULTS / "2026-11-21-loader-speed-workers.json").read_text())
    for decode, figure_ in planner.IMAGES_A_CORE.items():
        measured = speed["speed"]["images_per_second_per_core"][f"vitscale {decode}"]["500x375"]["all cores"]["median"]
        assert figure_ == pytest.approx(measured, rel=1e-3)
    assert pytest.approx(speed["photographs"]["500x375"]["mean_bytes"], rel=1e-4) == planner.IMAGE_BYTES
    saved = json.loads((RESULTS / "2026-11-22-checkpoint-h14-state-1.json").read_text())["medians"]["vitscale"]
    assert pytest.approx(saved["mb"] * 1e6 / saved["stall"], rel=0.01) == planner.SNAPSHOT_BANDWIDTH


def test_stage_3_is_not_chosen_where_stage_1_fits() -> None:
    plan = h14(engine=EngineConfig(zero_stage=3))
    assert plan.chosen.zero_stage == 1
    assert any("the config asks for zero_stage=3" in said for said in plan.advice)


def test_a_small_gpu_checkpoints_or_takes_smaller_micro_batches() -> None:
    large, small = plan_of(H14, 1, "h200").chosen, plan_of(H14, 1, "a100-40").chosen
    assert large.micro_batch_size > small.micro_batch_size or small.keeps != "everything"
    for option in plan_of(H14, 1, "a100-40").options:
        assert option.memory is None or option.memory.total + planner.RESERVE <= 40e9


def test_what_does_not_work_is_told_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"gpu=h300 is not known; there are a100, .*h200"):
        gpu("h300")
    with pytest.raises(ConfigError, match=r"4096 is not a multiple of nodes x gpus_per_node = 3 x 8 = 24; .*=4104 is; 2 nodes work"):
        h14(nodes=3)
    with pytest.raises(ConfigError, match="give --samples"):
        plan_of(replace(H14, recipe="mine"), 8)
    with pytest.raises(ConfigError, match="no ZeRO stage fits"):
        plan_of(replace(H14, model=replace(H14.model, image_size=(8960, 8960))), 8, "a100-40")
    with pytest.raises(ConfigError, match="computes nothing in fp8"):
        gpu("a100").peak("fp8")


@pytest.mark.parametrize("function", PRETRAIN, ids=recipe_name)
def test_every_recipe_can_be_planned(function: Any) -> None:
    config = recipe(recipe_name(function), PRETRAIN)
    classes = config.model.num_classes or 10
    config = replace(config, model=replace(config.model, num_classes=classes), recipe=recipe_name(function))
    cluster = Cluster(gpu("h100"), 1, 8)
    plan = make(config, cluster, Data(samples_of(config.recipe) or 50_000), assumed(cluster.gpu, config.engine.precision))
    assert plan.scaling
    assert 0 < figure(plan, "mfu") < 1


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
        chosen = planner.knee(strong)
        assert chosen.efficiency >= planner.LEAST_EFFICIENCY
        assert not any(row.efficiency >= planner.LEAST_EFFICIENCY for row in strong if row.nodes > chosen.nodes)


def test_micro_batches_divide_and_mixing_gets_pairs() -> None:
    assert planner.divisors(12) == [1, 2, 3, 4, 6, 12]
    config = recipe("vit-b16-imagenet1k-augreg", PRETRAIN)
    cluster = Cluster(gpu("h100"), 1, 8)
    assert config.mix.is_on
    found = planner.options(config, cluster, assumed(cluster.gpu, "bf16"), compiled=False)
    assert all(option.micro_batch_size % 2 == 0 for option in found)
    assert planner.choose(found) in found
    assert planner.images_a_gpu(4096, cluster) == 512


# ---------------------------------------------------------------------------------------------------------------------------------------


def test_the_ring_and_the_stages() -> None:
    """Bytes a rank in bf16, over (N-1)/N P: stages 1 and 2 six, 2 four more for a further micro-batch; stage 3 six if it keeps nothing."""
    N, P = 64, 654_195_571
    for stage, k, expected in ((1, 1, 6), (1, 4, 6), (2, 1, 6), (2, 4, 18)):
        layout = Layout(EngineConfig(zero_stage=stage), N, 16, k)  # type: ignore[arg-type]
        sent = sum(one.sent(N) for one in collectives(H14.model, layout))
        assert sent == pytest.approx(expected * P * (N - 1) / N, rel=1e-6)
    again = Layout(EngineConfig(zero_stage=3, deepspeed={"zero_optimization": {"stage3_max_reuse_distance": 0}}), N, 16)
    assert sum(one.sent(N) for one in collectives(H14.model, again)) == pytest.approx(6 * P * (N - 1) / N, rel=2e-3)
    assert collectives(H14.model, Layout(EngineConfig(), 1, 16)) == ()


def test_time_of_a_collective() -> None:
    """One node: a ring's; several: between nodes each GPU carries its part. A faster link is never slower."""
    one = Collective("x", "all-reduce", 8 * 10**9, 1, 1, "nothing")
    inside, between = Link(400e9, 0.0), Link(50e9, 0.0)
    assert seconds(one, 1, 8, inside, between) == pytest.approx(2 * 7 / 8 * 8 / 400)
    assert seconds(one, 2, 8, inside, between) == pytest.approx(2 * (7 / 8 * 8 / 400 + 1 / 2 * 1 / 50))
    assert seconds(one, 2, 8, inside, Link(25e9, 0.0)) > seconds(one, 2, 8, inside, between)


def test_step_time_grows_with_work_and_hides_no_more_than_there_is() -> None:
    rates = assumed(gpu("h200"), "bf16")
    for stage in (1, 2, 3):
        layout = Layout(EngineConfig(zero_stage=stage), 64, 64)  # type: ignore[arg-type]
        took = step_time(H14.model, H14.optimizer, layout, rates, 8, 8)
        assert 0 <= took.hidden <= took.communication
        more = step_time(H14.model, H14.optimizer, replace(layout, micro_batch_size=128), rates, 8, 8)
        again = step_time(H14.model, H14.optimizer, replace(layout, keeps="nothing"), rates, 8, 8)
        fused = step_time(H14.model, H14.optimizer, replace(layout, compiled=True), rates, 8, 8)
        assert fused.total < took.total < again.total < more.total


def test_checkpoints_are_as_often_as_failures_ask() -> None:
    often, rarely = (Cluster(gpu("h100"), 64, 8, node_mtbf_hours=hours) for hours in (500, 50_000))
    assert planner.checkpoint_interval(H14, often) < planner.checkpoint_interval(H14, rarely)
    assert planner.goodput(H14, often) < planner.goodput(H14, rarely) < 1


# ---------------------------------------------------------------------------------------------------------------------------------------


def test_gpus_by_the_names_that_cuda_gives() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA GB200": "gb200",
        "NVIDIA B200": "b200", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    assert {name: found.name for name in names if (found := gpu_of(name))} == names
    assert {one.name for one in GPUS} == set(names.values())
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert measured_flops("NVIDIA H200", "bf16") == 790e12
    assert measured_flops("NVIDIA H200", "fp32") is peak_flops("cpu", "bf16") is None


def test_a_calibration_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    file, rates = tmp_path / "rates.json", assumed(gpu("h200"), "bf16")
    file.write_text(
        json.dumps({"date": "2026-11-22T00:00:00", "machine": {"device": "X"}, "rates": {"products": 7e14, "inside": [3e11, 1e-6]}})
    )  # fmt: skip
    found = calibrated(rates, file)
    assert (found.products, found.inside, found.attention) == (7e14, Link(3e11, 1e-6), rates.attention)
    assert found.measured == ("products", "inside")
    for bad in ("", "{}", '{"rates": {"products": -1}, "date": "", "machine": {"device": "X"}}', '{"rates": {"inside": 3}, "date": "d"}'):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=r"calibrate\.py"):
            calibrated(rates, file)


def test_the_plot_is_an_image_of_the_rows() -> None:
    plan = h14()
    root = ElementTree.fromstring(planner.svg(plan))
    lines = [line for line in root.iter() if line.tag.endswith("polyline")]
    rows = [row for row in plan.scaling if row.scaling == "strong"]
    assert [len(line.attrib["points"].split()) for line in lines] == [len(rows)] * 2
