"""What this device reaches at a model's shapes, for `vitscale plan --calibration`: a file of rates, each kept as soon as it is measured.

    python -m benchmarks.calibrate                            ViT-H/14 on a GPU, a tiny model on a CPU
    python -m benchmarks.calibrate --model l16 --batch 64 --out rates.json
    torchrun --nproc-per-node 8 -m benchmarks.calibrate       all-reduce inside a node as well; over several nodes, between them

    products    FLOP/s of a block's four matrix products, forward and both gradients, weighed as a step weighs them
    float8      the same through torchao's layers, compiled, their scaling and rounding among it; on a GPU that has it, where torchao is
    attention   FLOP/s of fused attention, forward and backward (3.5 x forward), as torch chooses its kernel
    memory      bytes a second of LayerNorm, forward and backward, and an addition
    launch      seconds of the host for a kernel on a tensor of one element
    inside      bytes a second and latency of an all-reduce of 256 MB (a CPU: 4 MB) among the ranks of a node; `between`, among nodes

Random numbers, never zeros: a GPU is faster on zeros. Median of the repeats. `--compare` also times a step of the model through the engine
and tells what the plan foretells of it from these rates: a rehearsal of the planner, not a test of it.
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.train_step import OPTIMIZER, BenchConfig, EngineLoop, initial_weights, join_world_of_one, model_config, synthetic_batches
from vitscale.compute import to_float8
from vitscale.config import EngineConfig
from vitscale.gpus import GPUS
from vitscale.memory import Layout
from vitscale.model import ViT
from vitscale.recipes import vit
from vitscale.roofline import assumed, calibrated, step_time

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class CalibrateConfig:
    """What is measured."""

    model: str = "h14" if CUDA else "ti16"
    batch: int = 128 if CUDA else 8
    """Images."""
    precision: Literal["bf16", "fp32"] = "bf16" if CUDA else "fp32"
    float8: bool = CUDA and torch.cuda.get_device_capability() >= (8, 9) and find_spec("torchao") is not None
    """Linear layers in float8 too; a CPU emulates it, which rehearses this and measures nothing."""
    repeats: int = 20 if CUDA else 5
    compare: bool = False
    """Time a step of the engine on one device and hold the plan's against it."""
    out: Path = Path("calibration.json")


def main() -> None:
    config = tyro.cli(CalibrateConfig, description=__doc__)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if config.compare:
            raise SystemExit("compare is of one device's step; run it without torchrun")
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if CUDA else "gloo")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"device": torch.cuda.get_device_name() if CUDA else platform.processor() or "cpu", "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "settings": {"model": config.model, "batch": config.batch, "precision": config.precision, "repeats": config.repeats},
        "rates": {},
    }
    for measure in (products, *[float8] * config.float8, attention, memory, launch):
        keep(result, config, measure.__name__, measure(config))
    if dist.is_initialized():
        for name, link in links(config).items():
            keep(result, config, name, link)
        dist.destroy_process_group()
    if config.compare:
        compare(result, config)


def keep(result: dict[str, Any], config: CalibrateConfig, name: str, rate: Any) -> None:
    """Adds a rate and writes the file, so that what ends early leaves what it has."""
    result["rates"][name] = rate
    if int(os.environ.get("RANK", 0)) == 0:
        config.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name:10} {rate if isinstance(rate, list) else f'{rate:.4g}'}", flush=True)


def seconds_of(work: Callable[[], object], config: CalibrateConfig) -> float:
    """Of one call, the median of the repeats after two that warm up."""
    taken = []
    for repeat in range(config.repeats + 2):
        if CUDA:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        if repeat > 1:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def random(config: CalibrateConfig, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda" if CUDA else "cpu", dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)


def products(config: CalibrateConfig) -> float:
    """FLOP/s of the four linear layers of a block, each with its bias and both gradients."""
    model = vit(config.model)
    D, M, tokens = model.width, model.mlp_dim, config.batch * model.num_tokens
    spent, flops = 0.0, 0
    for inputs, outputs in ((D, 3 * D), (D, D), (D, M), (M, D)):
        x, weight, grad, bias = (
            random(config, tokens, inputs),
            random(config, outputs, inputs),
            random(config, tokens, outputs),
            random(config, outputs),
        )
        for product in (lambda: F.linear(x, weight, bias), lambda: grad @ weight, lambda: grad.T @ x):  # noqa: B023
            spent += seconds_of(product, config)
            flops += 2 * tokens * inputs * outputs
    return flops / spent


def float8(config: CalibrateConfig) -> float:
    """FLOP/s of those layers in float8, as the engine has them (`compute.to_float8`): of a model's second block, the first that is."""
    model = vit(config.model)
    net = ViT(replace(model, depth=3, num_classes=1)).to("cuda" if CUDA else "cpu", torch.bfloat16)
    to_float8(net, emulate=not CUDA)
    block, tokens = net.blocks[1], config.batch * model.num_tokens
    spent, flops = 0.0, 0
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        x = torch.randn(tokens, layer.in_features, device=layer.weight.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, layer.out_features, device=layer.weight.device, dtype=torch.bfloat16)
        compiled = torch.compile(layer)
        spent += seconds_of(lambda: torch.autograd.grad(compiled(x), (x, *layer.parameters()), grad), config)  # noqa: B023
        flops += 3 * 2 * x.numel() * layer.out_features
    return flops / spent


def attention(config: CalibrateConfig) -> float:
    """FLOP/s of fused attention, its backward pass counted as 2.5 forward ones."""
    model = vit(config.model)
    B, N, H, d = config.batch, model.num_tokens, model.num_heads, model.width // model.num_heads
    q, k, v = random(config, B, N, 3, H, d).permute(2, 0, 3, 1, 4).requires_grad_().unbind()
    grad = random(config, B, H, N, d)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    return 3.5 * 4 * B * N * N * model.width / seconds_of(both, config)


def memory(config: CalibrateConfig) -> float:
    """Bytes a second, read and written, of LayerNorm forward and backward and an addition."""
    model = vit(config.model)
    tokens, D = config.batch * model.num_tokens, model.width
    x, y, grad = random(config, tokens, D).requires_grad_(), random(config, tokens, D), random(config, tokens, D)
    weight, bias = random(config, D), random(config, D)

    def work() -> None:
        torch.autograd.grad(F.layer_norm(x, (D,), weight, bias), x, grad)
        torch.add(y, grad)

    return 8 * x.numel() * x.element_size() / seconds_of(work, config)  # LayerNorm 2 and 3, the addition 3


def launch(config: CalibrateConfig) -> float:
    """Seconds of the host for a kernel."""
    one, many = random(config, 1), 1000

    def work() -> None:
        for _ in range(many):
            one.add_(1)

    return seconds_of(work, config) / many


def links(config: CalibrateConfig) -> dict[str, list[float]]:
    """Of an all-reduce: bytes a second that a rank passes on, and seconds a hop, inside a node and between nodes."""
    rank, world, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    inside = [dist.new_group(list(range(start, start + local))) for start in range(0, world, local)]
    across = [dist.new_group(list(range(start, world, local))) for start in range(local)]
    groups = {"inside": (inside[rank // local], local), "between": (across[rank % local], world // local)}
    found = {}
    for name, (group, size) in groups.items():
        if size > 1:
            small, large = random(config, 1), random(config, (128 if CUDA else 1) * 2**20)
            latency = seconds_of(lambda: dist.all_reduce(small, group=group), config) / (2 * (size - 1))  # noqa: B023
            spent = seconds_of(lambda: dist.all_reduce(large, group=group), config)  # noqa: B023
            found[name] = [2 * (size - 1) / size * large.numel() * large.element_size() / spent, latency]
    return found


def compare(result: dict[str, Any], config: CalibrateConfig) -> None:
    """A step of the engine under ZeRO 1 on this device alone, timed, beside what the plan makes of these rates."""
    plain = BenchConfig(
        model=config.model, image_size=vit(config.model).image_size, batch=config.batch, engine=EngineConfig(precision=config.precision)
    )
    join_world_of_one()
    model = model_config(plain)
    loop, batch = EngineLoop(plain, model, initial_weights(model)), synthetic_batches(plain)[0]
    measured = seconds_of(lambda: loop.step(*batch), config)
    loop.close()
    dist.destroy_process_group()
    layout = Layout(plain.engine, 1, config.batch, device="cuda" if CUDA else "cpu")
    rates = calibrated(assumed(GPUS[0], config.precision), config.out, config.precision)
    foretold = step_time(model, OPTIMIZER, layout, rates, 1, 1).total
    result["compared"] = {"measured_seconds": measured, "predicted_seconds": foretold, "ratio": foretold / measured}
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"a step: {1e3 * measured:.1f} ms measured, {1e3 * foretold:.1f} ms predicted, ratio {foretold / measured:.2f}")


if __name__ == "__main__":
    main()
