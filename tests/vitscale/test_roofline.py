"""The time of a step: sums made by hand, and what more work and better devices do to it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.vitscale.plans import H14, plan_of
from vitscale.config import ConfigError, EngineConfig, OptimizerConfig, ViTConfig
from vitscale.flops import computed_share, forward_flops
from vitscale.gpus import gpu
from vitscale.memory import Layout, peak
from vitscale.roofline import Rates, assumed, block_flops, calibrated, newton_schulz_flops, step_time
from vitscale.traffic import Link


def with_engine(layout: Layout, **changed: Any) -> Layout:
    return replace(layout, engine=replace(layout.engine, **changed))


def test_step_time_is_the_sum_that_a_hand_makes() -> None:
    """ViT-H/14, eager, 16 images twice, ZeRO 1 on one GPU: work in numbers written out, over rates of round numbers."""
    rates = Rates(5e14, 0.0, 2e14, 3e12, 1e-9, Link(1e11, 0.0), Link(1e10, 0.0))
    took = step_time(H14.model, H14.optimizer, Layout(EngineConfig(1, compile="none"), 1, 16, 2), rates, 1, 1)
    images, blocks, N, D, M, K = 32, 32, 257, 1280, 5120, 18_291
    linear = 2 * N * (3 * D * D + D * D + D * M + M * D)
    patches = 2 * 256 * 3 * 14 * 14 * D
    assert took.products == pytest.approx(images * 3 * (blocks * linear + patches + 2 * D * K) / 5e14)
    assert took.attention == pytest.approx(images * 3.5 * blocks * 2 * (2 * N * N * D) / 2e14)
    per_token = 2 * (2 * D + 3 * D) + 2 * (3 * D + 3 * D) + 2 * M + 3 * M + 5 * D + M
    ends = 10 * 4 * K + 3 * 224 * 224 * (1 + 24 + 4 + 2)
    assert took.elementwise == pytest.approx(images * (blocks * N * per_token * 2 + ends) / 3e12)
    P = 654_195_571
    assert took.update == pytest.approx((2 * 10 * P + 6 * P + 24 * P + (12 + 16 + 2) * P) / 3e12)
    assert took.recomputation == took.waiting_for_launches == took.communication == took.hidden == 0
    again = step_time(H14.model, H14.optimizer, Layout(EngineConfig(1, compile="none", checkpoint_every_n_blocks=2), 1, 16, 2), rates, 1, 1)
    forward = linear / 5e14 + 2 * (2 * N * N * D) / 2e14 + N * per_token * 2 / 3 / 3e12
    assert again.recomputation == pytest.approx(images * 16 * forward)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_updates_launches_and_gathers_of_other_stages_by_hand(stage: Any) -> None:
    """Three micro-batches on two nodes of 8 GPUs; a host so slow that the device waits for every launch and hook."""
    rates = Rates(5e14, 0.0, 2e14, 3e12, 1e-3, Link(1e11, 1e-5), Link(1e10, 1e-4))
    precision: Any = "fp32" if stage == 0 else "bf16"
    engine = EngineConfig(stage, precision, compile="none")
    took = step_time(H14.model, H14.optimizer, Layout(engine, 16, 16, 3), rates, 2, 8)
    P, w, k, N = 654_195_571, 4 if stage == 0 else 2, 3, 16
    # Masters and AdamW's moments are read and written, and weights, where they are others; gradients are copied to a bucket and taken out,
    # measured, clipped
    part = (12 + 16 + (0 if stage == 0 else w)) * P + 24 * P
    of_gradients = 4 * w * P * (1 if stage == 0 else k) - (12 if stage == 0 else 0) * P
    assert took.update == pytest.approx((part / (1 if stage == 0 else N) + of_gradients) / 3e12, rel=1e-6)
    tensors = 32 * 12 + 2 + 2 + 2 + 2  # embedding, class token and positions, last norm, head
    launched = 60 + 32 * 50 + 3 * tensors
    hooked = 4 * 11 * 32 * 30e-6 if stage == 3 else 0
    computing = took.products + took.attention + took.elementwise
    assert took.waiting_for_launches == pytest.approx(3 * (launched * 1e-3 + hooked) - computing, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_more_work_is_never_faster_and_better_devices_never_slower(data: st.DataObject) -> None:
    draw = data.draw
    width = 64 * draw(st.integers(2, 24))
    model = ViTConfig(
        depth=draw(st.integers(3, 40)), width=width, mlp_dim=4 * width, num_heads=width // 64, patch_size=14, num_classes=1000,
        qk_norm=draw(st.booleans()), patch_dropout=draw(st.sampled_from((0.0, 0.5))), drop_path_rate=draw(st.sampled_from((0.0, 0.5))),
    )  # fmt: skip
    stage: Any = draw(st.integers(1, 3))
    engine = EngineConfig(stage, checkpoint_every_n_blocks=draw(st.integers(0, 2)), float8=draw(st.booleans()) and stage < 3)
    nodes, micro = draw(st.integers(1, 64)), draw(st.sampled_from((1, 8, 64)))
    optimizer = OptimizerConfig(draw(st.sampled_from(("adamw", "sgd", "muon"))), layer_decay=draw(st.sampled_from((1.0, 0.7))))
    layout, rates = Layout(engine, 8 * nodes, micro, draw(st.integers(1, 3))), assumed(gpu("h100"), "bf16")

    def total(model: ViTConfig = model, layout: Layout = layout, rates: Rates = rates, nodes: int = nodes) -> float:
        took = step_time(model, optimizer, layout, rates, nodes, 8)
        assert min(vars(took).values()) >= 0
        assert took.hidden <= took.communication
        return took.total

    least = total()
    assert total(replace(model, depth=model.depth + 1)) > least
    assert total(layout=replace(layout, micro_batch_size=2 * micro)) > least * (1 - 1e-9)
    assert total(layout=replace(layout, grad_accum_steps=layout.grad_accum_steps + 1)) > least
    assert total(layout=replace(layout, image_size=(280, 280))) > least * (1 - 1e-9)
    assert total(layout=replace(layout, image_size=model.image_size)) == least
    for name in ("products", "float8", "attention", "memory"):
        assert total(rates=replace(rates, **{name: 2 * getattr(rates, name)})) <= least * (1 + 1e-9)
    for link in ("inside", "between"):
        faster = replace(getattr(rates, link), bandwidth=2 * getattr(rates, link).bandwidth)
        assert total(rates=replace(rates, **{link: faster})) <= least * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(24, 24), (24, 72), (80, 16)])
def test_muons_flops_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    from vitscale import muon

    with FlopCounterMode(display=False) as counter:
        muon.orthogonalize(torch.randn(1, *shape))
    assert counter.get_total_flops() == newton_schulz_flops(*shape)


def test_float8_speeds_up_the_inner_blocks_alone() -> None:
    rates = replace(assumed(gpu("h100"), "bf16"), float8=1e30)
    of = [step_time(H14.model, H14.optimizer, Layout(EngineConfig(float8=float8), 1, 64), rates, 1, 1).products for float8 in (False, True)]
    linear, attention = block_flops(H14.model)
    assert of[0] - of[1] == pytest.approx(64 * 3 * 30 * linear / rates.products)
    assert 32 * (linear + attention) < forward_flops(H14.model)
    with pytest.raises(ConfigError, match="computes nothing in fp8"):
        plan_of(replace(H14, engine=EngineConfig(float8=True)), 8, "a100")


def test_what_training_leaves_out_is_left_out_of_time_and_memory() -> None:
    rates = assumed(gpu("h100"), "bf16")

    def of(**changed: Any) -> tuple[float, int]:
        model, layout = replace(H14.model, **changed), Layout(EngineConfig(), 1, 64)
        return step_time(model, H14.optimizer, layout, rates, 1, 1).products, peak(model, H14.optimizer, layout).activations

    whole, dropped, patches = of(), of(drop_path_rate=0.6), of(patch_dropout=0.5)
    computed = sum(computed_share(0.6 * index / 31, 64) for index in range(32)) / 32
    assert dropped[0] / whole[0] == pytest.approx(computed, rel=0.01)
    assert patches[0] / whole[0] == pytest.approx(129 / 257, rel=0.02)
    assert patches[1] < dropped[1] < whole[1]


def test_step_time_grows_with_work_and_hides_no_more_than_there_is() -> None:
    rates = assumed(gpu("h200"), "bf16")
    for stage in (1, 2, 3):
        layout = Layout(EngineConfig(zero_stage=stage, compile="none"), 64, 64)  # type: ignore[arg-type]
        took = step_time(H14.model, H14.optimizer, layout, rates, 8, 8)
        assert 0 <= took.hidden <= took.communication
        more = step_time(H14.model, H14.optimizer, replace(layout, micro_batch_size=128), rates, 8, 8)
        again = step_time(H14.model, H14.optimizer, with_engine(layout, checkpoint_every_n_blocks=1), rates, 8, 8)
        fused = step_time(H14.model, H14.optimizer, with_engine(layout, compile="blocks"), rates, 8, 8)
        assert fused.total < took.total < again.total < more.total


def test_a_calibration_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    file, rates = tmp_path / "rates.json", assumed(gpu("h200"), "bf16")
    told = {"date": "2026-11-22T00:00:00", "machine": {"device": "X"}, "settings": {"precision": "bf16"}}
    file.write_text(json.dumps(told | {"rates": {"products": 7e14, "inside": [3e11, 1e-6]}}))
    found = calibrated(rates, file, "bf16")
    assert (found.products, found.inside, found.attention) == (7e14, Link(3e11, 1e-6), rates.attention)
    assert found.source == "products, inside measured on X, 2026-11-22 (rates.json)"
    with pytest.raises(ConfigError, match="measured in bf16, and the run computes in fp32"):
        calibrated(rates, file, "fp32")
    file.write_text(json.dumps(told | {"machine": {"device": "NVIDIA A100-SXM4-80GB"}, "rates": {"products": 2e14}}))
    assert calibrated(rates, file, "bf16", gpu("a100")).measured == ("products",)
    with pytest.raises(ConfigError, match="measured on NVIDIA A100-SXM4-80GB, and the plan is for h200; --gpu a100 fits it"):
        calibrated(rates, file, "bf16", gpu("h200"))
    wrong = ({"products": -1}, {"inside": 3}, {"products": 1, "inside": [1e11, -1]}, {"products": 1, "inside": [1e11, float("nan")]})
    for bad in ("", "{}", *(json.dumps(told | {"rates": of}) for of in wrong)):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=r"calibrate\.py"):
            calibrated(rates, file, "bf16")
