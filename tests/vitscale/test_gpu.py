"""What only a GPU can show: each way of computing a step gives the losses of the plainest one, in bf16 under ZeRO 1 to 3.

The plainest is fp32-accumulating math attention, nothing compiled, nothing recomputed. Tolerances: bf16 rounds to 3 digits, and so do
kernels that sum in another order; float8 rounds kernels' inputs to 2.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.ranks import free_port
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, ViTConfig
from vitscale.engine import Engine, device, init_distributed
from vitscale.model import ViT, initialize
from vitscale.objective import compute_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# A head of 80 features as ViT-H's; inner blocks that float8 takes
MODEL = ViTConfig(depth=4, width=320, mlp_dim=1280, num_heads=4, patch_size=14, image_size=(56, 56), num_classes=16)
BATCH, STEPS = 16, 6


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    init_distributed()
    yield
    dist.destroy_process_group()


def losses(stage: Any, **settings: Any) -> torch.Tensor:
    """Of some steps on the same images."""
    config = EngineConfig(zero_stage=stage, **({"attention": "math", "compile": "none"} | settings))
    model = ViT(MODEL, config.keeps)
    initialize(model, 0)
    engine = Engine(model, config, OptimizerConfig(), micro_batch_size=BATCH, grad_accum_steps=1)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(BATCH, 3, *MODEL.image_size, generator=generator).to(device()) * 2 - 1
    labels_BL = torch.arange(BATCH)[:, None].to(device())
    scores_BL = torch.ones_like(labels_BL, dtype=torch.float32)
    found = []
    for _ in range(STEPS):
        loss = compute_loss(engine.forward(images_BCHW), labels_BL, scores_BL, ObjectiveConfig("softmax"))
        engine.backward(loss)
        engine.step(1e-3)
        found.append(loss.detach().float().clone())
    engine.close()
    torch._dynamo.reset()
    return torch.stack(found).cpu()


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    found = losses(1)
    assert found[-1] < 0.8 * found[0], "it learns, so a wrong gradient would show"
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient"])
def test_attention_backends(plain: torch.Tensor, stage: int, backend: str) -> None:
    torch.testing.assert_close(losses(stage, attention=backend), plain, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_blocks(plain: torch.Tensor, stage: int) -> None:
    torch.testing.assert_close(losses(stage, attention="auto", compile="blocks"), plain, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("keeps", ["nothing", "products"])
@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_activation_checkpointing(plain: torch.Tensor, stage: int, keeps: str, compiled: str) -> None:
    found = losses(stage, attention="auto", compile=compiled, checkpoint_every_n_blocks=1, checkpoint_keeps=keeps)
    torch.testing.assert_close(found, plain, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("stage", [1, 2])
def test_cuda_graphs(plain: torch.Tensor, stage: int) -> None:
    torch.testing.assert_close(losses(stage, attention="auto", compile="graphs"), plain, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float8(plain: torch.Tensor, stage: int) -> None:
    pytest.importorskip("torchao")
    torch.testing.assert_close(losses(stage, attention="auto", compile="blocks", float8=True), plain, rtol=0.1, atol=0.1)
