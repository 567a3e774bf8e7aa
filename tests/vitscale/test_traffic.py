"""The bytes that a rank sends, and the time they take."""

import pytest
import torch

from tests.vitscale.plans import H14
from vitscale.config import EngineConfig, OptimizerConfig, ViTConfig
from vitscale.flops import matrices, moment_elements
from vitscale.memory import Layout
from vitscale.model import ViT
from vitscale.muon import is_muons
from vitscale.optim import build_optimizer
from vitscale.traffic import Collective, Link, collectives, parameter_groups, seconds


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_moments_and_groups_are_those_of_a_real_optimizer(name: str, layer_decay: float) -> None:
    config = OptimizerConfig(name, layer_decay=layer_decay)  # type: ignore[arg-type]
    model = ViTConfig(depth=3, width=32, mlp_dim=48, num_heads=4, patch_size=4, image_size=(8, 12), num_classes=5, qk_norm=True, pool="map")
    net = ViT(model)
    optimizer = build_optimizer(net, config)
    net(torch.randn(2, 3, 8, 12)).sum().backward()
    optimizer.step()
    kept = sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step" and torch.is_tensor(t))
    assert kept == moment_elements(model, config)
    assert len(optimizer.param_groups) == parameter_groups(model, config)
    muons = sum(p.numel() for key, p in net.named_parameters() if is_muons(key, p))
    assert muons == matrices(model)


def test_the_ring_and_the_stages() -> None:
    """Bytes a rank in bf16, over (N-1)/N P: stages 1 and 2 six, 2 four more for a further micro-batch; stage 3 six if it keeps nothing."""
    N, P = 64, 654_195_571
    for stage, k, expected in ((1, 1, 6), (1, 4, 6), (2, 1, 6), (2, 4, 18)):
        layout = Layout(EngineConfig(zero_stage=stage), N, 16, k)  # type: ignore[arg-type]
        sent = sum(one.sent(N) for one in collectives(H14.model, H14.optimizer, layout))
        assert sent == pytest.approx(expected * P * (N - 1) / N, rel=1e-6)
    again = Layout(EngineConfig(zero_stage=3, deepspeed={"zero_optimization": {"stage3_max_reuse_distance": 0}}), N, 16)
    assert sum(one.sent(N) for one in collectives(H14.model, H14.optimizer, again)) == pytest.approx(6 * P * (N - 1) / N, rel=2e-3)
    assert collectives(H14.model, H14.optimizer, Layout(EngineConfig(), 1, 16)) == ()


def test_time_of_a_collective() -> None:
    """One node: a ring's; several: between nodes each GPU carries its part. A faster link is never slower."""
    one = Collective("x", "all-reduce", 8 * 10**9, 1, 1, "nothing")
    inside, between = Link(400e9, 0.0), Link(50e9, 0.0)
    assert seconds(one, 1, 8, inside, between) == pytest.approx(2 * 7 / 8 * 8 / 400)
    assert seconds(one, 2, 8, inside, between) == pytest.approx(2 * (7 / 8 * 8 / 400 + 1 / 2 * 1 / 50))
    assert seconds(one, 2, 8, inside, Link(25e9, 0.0)) > seconds(one, 2, 8, inside, between)
    # Three times in a step, in four calls each: seven hops inside a node and two of a tree of three nodes, in each of two passes
    often = Collective("x", "all-reduce", 8 * 10**9, 4, 3, "nothing")
    late = seconds(often, 3, 8, Link(400e9, 1e-6), Link(50e9, 1e-5))
    assert late == pytest.approx(3 * 2 * (7 / 8 * 8 / 400 + 2 / 3 * 1 / 50 + 4 * (7e-6 + 2e-5)))
