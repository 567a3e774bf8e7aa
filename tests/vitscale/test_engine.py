"""The seam to DeepSpeed: what it is told, averages, bf16 with fp32 masters, and that looking at state changes nothing."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conftest import with_engine
from tests.distributed import run_on_ranks
from tests.runs import STOP, case, losses_of, variant
from vitscale import checkpoint
from vitscale.config import EngineConfig, OptimizerConfig, TrainConfig, ViTConfig, from_dict, to_dict
from vitscale.engine import Engine, deepspeed_config
from vitscale.evaluate import load_model
from vitscale.model import ViT, initialize
from vitscale.run import open_run
from vitscale.train import train

MODEL = ViTConfig(depth=2, width=16, mlp_dim=20, num_heads=2, patch_size=4, image_size=(8, 8), num_classes=3)
SGD = OptimizerConfig("sgd", peak_lr=0.1, momentum=0.0, grad_clip=0.0, average_decay=0.75)


def test_deepspeed_is_told_our_settings_and_then_the_users() -> None:
    config = deepspeed_config(
        EngineConfig(zero_stage=2, precision="bf16", deepspeed={"zero_optimization": {"reduce_bucket_size": 7}}), 1.5, 8, 4
    )
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], config["gradient_clipping"]) == (8, 4, 1.5)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in deepspeed_config(EngineConfig(precision="fp32"), 0, 1, 1)


def watch_averages(payload: dict[str, Any]) -> dict[str, Any]:
    """Steps an engine, keeping the average by hand beside it; the largest differences that must be zero or tiny."""
    found = {}
    for stage in (0, 1, 2, 3):
        model = ViT(MODEL)
        initialize(model, 0)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        start = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
        engine = Engine(model, EngineConfig(zero_stage=stage, precision="fp32"), SGD, micro_batch_size=4, grad_accum_steps=2)
        by_hand = {name: w.clone() for name, w in start.items()}
        generator = torch.Generator().manual_seed(dist.get_rank())
        moved = 0.0
        for _ in range(4):
            for _ in range(2):
                logits = engine.forward(torch.randn(4, 3, 8, 8, generator=generator))
                engine.backward(nn.functional.cross_entropy(logits, torch.randint(3, (4,), generator=generator)))
                engine.step(0.1)
            for name in shapes:
                weight = engine.gather(name, checkpoint.WEIGHT).flatten()
                moved = max(moved, float((weight - start[name]).abs().max()))
                by_hand[name].lerp_(weight, 0.25)
        average = {name: engine.gather(name, checkpoint.AVERAGE) for name in shapes}
        weights = {name: engine.gather(name, checkpoint.WEIGHT) for name in shapes}
        probe = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        averaged = ViT(MODEL)
        averaged.load_state_dict(average)
        with torch.no_grad(), engine.evaluation():
            evaluated = engine.forward(probe)
        plain = ViT(MODEL)
        plain.load_state_dict(weights)
        with torch.no_grad():
            after = engine.forward(probe)
            found[stage] = {
                "moved": moved,
                "average": max(float((average[n].flatten() - by_hand[n]).abs().max()) for n in shapes),
                "evaluated": float((evaluated - averaged(probe)).abs().max()),
                "after": float((after - plain(probe)).abs().max()),
                "apart": float((averaged(probe) - plain(probe)).abs().max()),
                "unchanged": all(torch.equal(engine.gather(n, checkpoint.WEIGHT), weights[n]) for n in shapes),
            }
        engine.close()
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_average_is_of_the_weights_and_evaluation_uses_it(tmp_path: Path, world_size: int) -> None:
    for stage, found in run_on_ranks("tests.vitscale.test_engine:watch_averages", world_size, {}, tmp_path).items():
        assert found["moved"] > 1e-3, stage
        assert found["average"] < 1e-6, stage
        assert found["evaluated"] < 1e-6, stage
        assert found["after"] < 1e-6, stage
        assert found["apart"] > 1e-4, stage
        assert found["unchanged"], stage


@pytest.fixture
def bf16(config: TrainConfig) -> TrainConfig:
    model = dataclasses.replace(config.model, dropout=0.1)
    optimizer = dataclasses.replace(config.optimizer, average_decay=0.9)
    return dataclasses.replace(with_engine(config, precision="bf16"), model=model, optimizer=optimizer)


def test_bf16_trains_and_goes_on_bitwise_with_dropout(bf16: TrainConfig, tmp_path: Path) -> None:
    """Stages 1, 2 and 3 with fp32 accumulation over two micro-batches: stopped and resumed, the losses are bitwise the same."""
    world_size = 2
    configs = {
        f"{name}{stage}": variant(bf16, tmp_path, f"{name}{stage}", accumulate=2, world_size=world_size, zero_stage=stage)
        for name, stage in itertools.product(("whole", "part", "rest"), (1, 2, 3))
    }
    results = {}
    for stage in (1, 2, 3):  # a process for each: stage 3 replaces torch's linear function for the rest of a process's life
        first = {f"whole{stage}": case(configs[f"whole{stage}"]), f"part{stage}": case(configs[f"part{stage}"], stop_at=STOP)}
        second = {f"rest{stage}": case(configs[f"rest{stage}"], copy_of=str(tmp_path / f"part{stage}"))}
        for cases in (first, second):
            results |= run_on_ranks("tests.vitscale.test_zero:walk", world_size, {"cases": cases}, tmp_path)
    for stage in (1, 2, 3):
        whole = losses_of(results[f"whole{stage}"], STOP, bf16.steps)
        assert losses_of(results[f"rest{stage}"], STOP, bf16.steps).tolist() == whole.tolist(), stage
        np.testing.assert_allclose(whole, losses_of(results["whole1"], STOP, bf16.steps), rtol=5e-3)
        ends = [checkpoint.describe(checkpoint.find_checkpoint(str(tmp_path / f"{name}{stage}"))) for name in ("whole", "rest")]
        for kind in ends[0].kinds:
            for name in {t.name for t in ends[0].tensors}:
                tensors = [checkpoint.TensorReader(end).whole(name, kind) for end in ends]
                assert torch.equal(*tensors), (stage, kind, name)
        weights = checkpoint.TensorReader(ends[0]).whole("blocks.0.attn.qkv.weight", checkpoint.WEIGHT)
        assert not torch.equal(weights, weights.bfloat16().float()), "the checkpoint must hold fp32 masters"
        assert ends[0].kinds == ("weight", "exp_avg", "exp_avg_sq", "average")


def dropout_seeds(payload: dict[str, Any]) -> list[list[int]]:
    """What torch's generator was seeded with at each training forward of a run, a list a rank."""
    config: TrainConfig = from_dict(TrainConfig, payload["config"])
    if dist.get_rank() == 0:
        Path(config.out).mkdir()
        open_run(config, dist.get_world_size())
    dist.barrier()
    seeds: list[int] = []
    forward = Engine.forward

    def spy(engine: Engine, *inputs: torch.Tensor) -> torch.Tensor:
        seeds.append(torch.initial_seed())
        return forward(engine, *inputs)

    Engine.forward = spy  # type: ignore[method-assign]
    train(config, stop_at=4)
    of_ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, seeds)
    return of_ranks


def test_dropout_differs_between_steps_micro_batches_and_ranks(bf16: TrainConfig, tmp_path: Path) -> None:
    config = variant(bf16, tmp_path, "run", accumulate=2, world_size=2, zero_stage=1)
    of_ranks = run_on_ranks("tests.vitscale.test_engine:dropout_seeds", 2, {"config": to_dict(config)}, tmp_path)
    assert [len(seeds) for seeds in of_ranks] == [4 * 2, 4 * 2]
    assert len(set(itertools.chain(*of_ranks))) == 2 * 4 * 2


def first_checkpoint(payload: dict[str, Any]) -> dict[str, Any]:
    """The fp32 weights of an engine in bf16 before any step, against the initialisation."""
    found = {}
    for stage in (1, 2, 3):
        model = ViT(MODEL)
        initialize(model, 0)
        start = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
        engine = Engine(model, EngineConfig(zero_stage=stage, precision="bf16"), SGD, micro_batch_size=4, grad_accum_steps=1)
        found[stage] = all(torch.equal(engine.gather(n, k).flatten(), w) for n, w in start.items() for k in ("weight", "average"))
        engine.close()
    return found


def test_bf16_starts_from_the_exact_fp32_initialisation(tmp_path: Path) -> None:
    assert run_on_ranks("tests.vitscale.test_engine:first_checkpoint", 2, {}, tmp_path) == {"1": True, "2": True, "3": True}


def test_a_checkpoint_loads_as_the_model_that_was_trained(config: TrainConfig, tmp_path: Path) -> None:
    trained = variant(config, tmp_path, "run", world_size=2, zero_stage=3)
    run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": {"run": case(trained, stop_at=2)}}, tmp_path)
    description = checkpoint.describe(checkpoint.find_checkpoint(str(tmp_path / "run")))
    model = load_model(description, "average")  # there is none: the weights
    assert not model.training
    reader = checkpoint.TensorReader(description)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.whole(name, "weight"))
    fresh = ViT(trained.model)
    initialize(fresh, trained.seed)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
