"""Every option of a training step comes to what plain torch comes to: alone, as recipes combine them, and all at once, under ZeRO 0 to 3.

Two ranks walk all cases through `train.train`, each a run of a few steps from one start. Its losses, last weights and their average are
held to `plain.plain_torch`, which has no engine. What a model leaves out is held to formulas in test_model.py, and optimizers in
test_engine.py; CUDA graphs and the other kernels of attention need a GPU (test_gpu.py).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_on_ranks
from tests.runs import case, losses_of, state
from tests.vitscale.models import random_vit, relative_error, write_checkpoint
from tests.vitscale.plain import Trained, plain_torch
from tests.vitscale.test_zero import walk
from vitscale import compute
from vitscale.compute import compile_blocks, to_float8
from vitscale.config import Config, FinetuneConfig, Phase, TrainConfig, ViTConfig
from vitscale.recipes import FINETUNE, PRETRAIN, recipe_name
from vitscale.resolve import resolve

RANKS, BATCH = 2, 32
MODEL = ViTConfig(depth=3, width=64, mlp_dim=128, num_heads=4, patch_size=8, image_size=(16, 24))
SIZES = {name: getattr(MODEL, name) for name in ("depth", "width", "mlp_dim", "num_heads", "patch_size", "image_size")}
# Largest relative error of a loss, and of the way that the weights went from their start. In fp32 what differs is the order of sums, which
# AdamW blows up where a gradient is all but 0: it divides by its size.
FP32 = 2e-6, 5e-4
# In bf16 a sum in another order is another number of 8 bits; ranks' gradients are added up in it, too
BF16 = 1e-3, 0.15
# and where a number is next to the middle of two of float8's, its last bit in bf16 decides between numbers of 4 bits
FLOAT8 = 3e-3, 0.4


def walk_as_a_cpu_can(payload: dict[str, Any]) -> dict[str, Any]:
    """Compiled blocks are traced, and not compiled, for seconds a graph; float8 is rounded to, and multiplied in bf16."""
    compute.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
    compute.check_on_cpu = lambda *_: None
    compute.to_float8 = functools.partial(to_float8, emulate=True)
    results = {}
    for name, asked in payload["cases"].items():
        torch._dynamo.reset()
        results |= walk({"cases": {name: asked}})
    return results


def set_to(config: Any, settings: Mapping[str, Any]) -> Any:
    """The config with settings by their dotted names."""
    for dotted, value in settings.items():
        part, _, rest = dotted.partition(".")
        config = replace(config, **{part: set_to(getattr(config, part), {rest: value}) if rest else value})
    return config


ALL: dict[str, Any] = {
    "engine.compile": "blocks", "engine.checkpoint_every_n_blocks": 1, "engine.checkpoint_keeps": "products", "engine.attention": "flash",
    "model.drop_path_rate": 0.5, "model.patch_dropout": 0.3, "model.qk_norm": True, "micro_batch_size": BATCH // RANKS // 2,
    "optimizer.average_decay": 0.7, "optimizer.layer_decay": 0.7, "mix.mixup_alpha": 0.8, "mix.cutmix_alpha": 1.0,
}  # fmt: skip
# Smaller images in smaller batches, then other batches, then the run's own
PHASES = {"schedule.phases": (Phase(0.3, (8, 16), BATCH // 2, 4), Phase(0.6, None, BATCH // 2, 8))}
IN_FLOAT8 = {"engine.precision": "bf16", "engine.float8": True, "engine.compile": "blocks"}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "attention by math": {"engine.attention": "math"},
    "attention by flash": {"engine.attention": "flash"},
    "compiled blocks": {"engine.compile": "blocks"},
    "blocks computed again": {"engine.checkpoint_every_n_blocks": 1},
    "every other block computed again": {"engine.checkpoint_every_n_blocks": 2},
    "products kept": {"engine.checkpoint_every_n_blocks": 1, "engine.checkpoint_keeps": "products"},
    "drop-path": {"model.drop_path_rate": 0.6},
    "patch dropout": {"model.patch_dropout": 0.4},
    "dropout": {"model.dropout": 0.2},
    "qk-norm": {"model.qk_norm": True},
    "4 micro-batches": {"micro_batch_size": BATCH // RANKS // 4},
    "16 micro-batches": {"micro_batch_size": BATCH // RANKS // 16},
    "sgd": {"optimizer.name": "sgd", "optimizer.peak_lr": 0.05},
    "muon": {"optimizer.name": "muon"},
    "decay of layers": {"optimizer.layer_decay": 0.6},
    "average": {"optimizer.average_decay": 0.7},
    "no clipping": {"optimizer.grad_clip": 0.0},
    "mixup and CutMix": {"mix.mixup_alpha": 0.8, "mix.cutmix_alpha": 1.0},
    "phases": PHASES,
    "bf16": {"engine.precision": "bf16"},
    "everything": ALL,
    "everything in phases with muon and dropout": ALL | PHASES | {"optimizer.name": "muon", "model.dropout": 0.2, "engine.compile": "none"},
    "everything in bf16": ALL | {"engine.precision": "bf16", "engine.compile": "none"},  # compiled: test_compute.py
    "float8": IN_FLOAT8,
    "everything in float8": ALL | IN_FLOAT8,
}


def of_recipe(function: Callable[[], Config], base: TrainConfig, start: Path) -> Config:
    """A recipe with all that it turns on, its model, run and schedule shrunk."""
    asked = function()
    schedule = asked.schedule
    shrunk: Any = replace(
        asked, recipe="", data=base.data, eval_data="none", steps=base.steps, epochs=0.0, log_every=1, eval_every=0,
        checkpoint_every=base.steps, global_batch_size=BATCH,
        micro_batch_size=BATCH // RANKS // 2, stream=base.stream, optimizer=replace(asked.optimizer, grad_clip=0.3),
        schedule=replace(schedule, warmup_steps=2, cooldown_steps=min(2, schedule.cooldown_steps), timescale=2),
    )  # fmt: skip
    if isinstance(shrunk, FinetuneConfig):
        return replace(shrunk, init=str(start), model=replace(shrunk.model, image_size=MODEL.image_size))
    return replace(shrunk, model=replace(shrunk.model, **SIZES, num_classes=0))


@pytest.fixture(scope="module")
def expected() -> dict[str, Trained]:
    """What plain torch comes to, case by case: at no stage."""
    return {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_option_and_recipe_is_plain_torch(stage: int, config: TrainConfig, expected: dict[str, Trained], tmp_path: Path) -> None:
    """Where a case has bf16, which stage 0 has not, recipes are in fp32 there."""
    base = replace(
        config, model=MODEL, steps=6, global_batch_size=BATCH, micro_batch_size=BATCH // RANKS,
        schedule=replace(config.schedule, warmup_steps=2),
    )  # fmt: skip
    start = write_checkpoint(tmp_path / "start" / "step-000000002", random_vit(replace(MODEL, image_size=(24, 16), num_classes=7))).path
    cases: dict[str, Config] = {name: set_to(base, settings) for name, settings in OPTIONS.items()}
    cases = {name: of for name, of in cases.items() if stage or of.engine.precision == "fp32"}
    of_recipes: dict[str, tuple[str, Config]] = {}  # by all but the learning rate: recipes of a family are alike once they are shrunk
    for function in (*PRETRAIN, *FINETUNE):
        asked = of_recipe(function, base, start)
        of_recipes.setdefault(repr(set_to(asked, {"optimizer.peak_lr": 0.0})), (recipe_name(function), asked))
    cases |= {name: asked if stage else set_to(asked, {"engine.precision": "fp32"}) for name, asked in of_recipes.values()}
    runs = {
        name: resolve(replace(set_to(of, {"engine.zero_stage": stage}), out=str(tmp_path / name.replace(" ", "-"))), RANKS)
        for name, of in cases.items()
    }
    payload = {"cases": {name: case(run) for name, run in runs.items()}}
    results = run_on_ranks("tests.vitscale.test_options:walk_as_a_cpu_can", RANKS, payload, tmp_path)
    wrong = {}
    for name, run in runs.items():
        of = f"{name} in {run.engine.precision}"
        plain = expected.get(of) or expected.setdefault(of, plain_torch(run, world_size=RANKS))
        found = [float(np.abs(losses_of(results[name], 0, run.steps) / plain.losses - 1).max())]
        ended = state(Path(run.out))
        for kind in dict.fromkeys(kind for kind, _ in plain.state):
            ours, theirs = ({name: of[kind, name] - plain.start[name] for name in plain.start} for of in (ended, plain.state))
            found.append(relative_error(*(torch.cat([way.flatten() for way in ways.values()]) for ways in (ours, theirs))))
        print(f"stage {stage} {name:45}", *(f"{far:.1e}" for far in found))
        loss, way = FLOAT8 if run.engine.float8 else BF16 if run.engine.precision == "bf16" else FP32
        if not (found[0] <= loss and max(found[1:]) <= way):
            wrong[name] = found
    assert wrong == {}
