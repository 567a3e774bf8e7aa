"""A training step against peers: images a second, model FLOPs, MFU and peak memory, on one GPU or the CPU.

    python benchmarks/train_step.py                          on a GPU ViT-H/14 at 224 px; on a CPU a small case of two minutes
    python benchmarks/train_step.py --model l16 --batch 256 --engine.zero-stage 1 --save

Contestants, each a whole step (normalise, forward, loss, backward, clip, update) with the same weights, images, labels and optimizer:

    vitscale        `vitscale.engine.Engine`, called as `vitscale.train` calls it
    fed             the same on `--data`, read, decoded and moved by `vitscale.stream`; the others have batches that are ready
    torch           a bare loop around the same model: what the engine costs
    transformers    ViTForImageClassification in that bare loop, where it is installed
    timm            VisionTransformer in that bare loop, where it is installed

The bare loop updates with torch's fused AdamW. In bf16 it holds weights and activations in bf16 and fp32 masters, which beats autocast;
in fp32 there are the weights alone. A peer runs as it comes or, with `--peers best` or `both`, at its best: blocks compiled, cuDNN's
attention first; ratios are against the faster of the two. Before it is timed a peer must give vitscale's logits in fp32.

On a GPU building, compilation and warm-up steps are left out; steps are timed with CUDA events; contestants take turns, A B C A B C, over
the repeats, each alone in memory; median and spread (largest minus smallest, over the median) of the repeats; a ratio is the median of
those of each repeat. MFU counts model FLOPs only, never recomputation, against the datasheet's peak and against what a large matrix product
reaches, in bf16 also where `engine.float8` multiplies in less. Images are random pixels and no kernel is zero, because a GPU is faster on
zeros.

On a CPU only ratios mean anything, and other work on the machine lasts longer than a step: all contestants are in memory at once and take
turns step by step, each going first in turn; a ratio is the median of those of each round of steps, told with its middle half.
"""

import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitscale.check import check_model
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig
from vitscale.engine import Engine, device, init_distributed
from vitscale.flops import measured_flops, peak_flops, train_flops
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.optim import split_by_decay
from vitscale.recipes import vit
from vitscale.transfer import on_device

OPTIMIZER = OptimizerConfig(peak_lr=1e-4, weight_decay=0.1)
OBJECTIVE = ObjectiveConfig("softmax")
PREPROCESS = PreprocessConfig()
BATCHES = 4  # different ones, so that no step repeats the one before
CUDA = torch.cuda.is_available()

Batch = tuple[Tensor, Tensor, Tensor]  # pixels (B, H, W, C), labels (B, L), sample keys (B,)
Taken = dict[str, list[dict[str, Any]]]  # of each contestant what was measured in each repeat
Contestant = Literal["vitscale", "fed", "torch", "transformers", "timm"]


@dataclass(frozen=True)
class BenchConfig:
    """What is run. Sizes of 0 are those of the model's name."""

    model: str = "ti16"
    """A size (ti, s, b, l, h) and a patch size, as in h14."""
    image_size: tuple[int, int] = (96, 96)
    num_classes: int = 1000
    depth: int = 0
    width: int = 0
    mlp_dim: int = 0
    num_heads: int = 0
    batch: int = 8
    """Images a step."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="fp32"))
    """As in training: ZeRO stage, precision, activation checkpointing, compilation."""
    contestants: tuple[Contestant, ...] = ("vitscale", "torch", "transformers", "timm")
    peers: Literal["plain", "best", "both"] = "plain"
    """Peers as they come, at their best (compiled blocks, cuDNN's attention first), or both."""
    data: Path | None = None
    """Dataset directory that `fed` reads."""
    warmup: int = 2
    """Steps before the timed ones."""
    steps: int = 5
    """Timed steps a repeat."""
    repeats: int = 3
    turns: Literal["repeats", "steps"] = "repeats" if CUDA else "steps"
    """Whether contestants take turns repeat by repeat, each alone in memory, or step by step, all of them in memory."""
    threads: int = 2
    """Of a CPU."""
    lines: Path | None = None
    """File that each repeat is appended to as soon as it is measured, as a line of JSON."""
    save: bool = False
    """Write a dated JSON file."""
    results: Path = Path(__file__).parent / "results"
    """Where to."""


ON_GPU = BenchConfig(model="h14", image_size=(224, 224), batch=128, engine=EngineConfig(), peers="both", warmup=20, steps=50)


def main() -> None:
    config = tyro.cli(BenchConfig, default=ON_GPU if CUDA else BenchConfig(), description=__doc__)
    torch.set_num_threads(config.threads)
    join_world_of_one()
    result = run(config)
    print_table(result)
    if config.save:
        print(f"saved {save(result, config.results)}")
    dist.destroy_process_group()
    if result["contestants"].get("vitscale", {}).get("error"):
        sys.exit(1)


def run(config: BenchConfig) -> dict[str, Any]:
    """All contestants; what is known of the machine, of each contestant, and the ratios."""
    model = model_config(config)
    start = initial_weights(model)
    rounds, errors = (in_turns if config.turns == "repeats" else step_by_step)(config, model, start, reference_logits(model, start))
    contestants = {name: {"error": errors[name]} if name in errors else summary(rounds[name], config) for name in {**rounds, **errors}}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": asdict(model),
        "settings": {name: value for name, value in to_plain(config).items() if name not in ("save", "results", "lines", "data")},
        "parameters": sum(w.numel() for w in start.values()),
        "train_flops_per_image": train_flops(model),
        "contestants": contestants,
        "ratios": ratios({name: taken for name, taken in rounds.items() if name not in errors}, config),
    }


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is trained, and on what
# ---------------------------------------------------------------------------------------------------------------------------------------


def model_config(config: BenchConfig) -> ViTConfig:
    sizes = {name: getattr(config, name) for name in ("depth", "width", "mlp_dim", "num_heads") if getattr(config, name)}
    model = replace(vit(config.model, image_size=config.image_size, num_classes=config.num_classes), **sizes)
    check_model(model)
    return model


def initial_weights(model: ViTConfig) -> dict[str, Tensor]:
    """The initialisation of training, but a head that is not zero: it would make every gradient below it zero."""
    vit_model = ViT(model)
    initialize(vit_model, seed=0)
    nn.init.normal_(vit_model.head.weight, 0, 0.02, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return {name: w.detach() for name, w in vit_model.state_dict().items()}


def synthetic_batches(config: BenchConfig) -> list[Batch]:
    """Random pixels and labels on the device; keys on the CPU, as the stream gives them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (config.batch, *config.image_size, 3), dtype=torch.uint8, generator=generator).to(device()),
            torch.randint(0, config.num_classes, (config.batch, 1), generator=generator).to(device()),
            torch.randint(0, 2**62, (config.batch,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def fed_batches(config: BenchConfig) -> Iterator[Batch]:
    """Batches of `--data` as training gets them."""
    assert config.data is not None
    from loader_systems import open_stream

    stream = open_stream(config.data, config.batch, config.image_size[0])
    for batch in on_device(stream.micro_batches(0), device()):
        yield batch.images_BHWC, batch.labels_BL, batch.keys_B


def probe_images(model: ViTConfig) -> Tensor:
    return torch.rand(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1)).to(device()) * 2 - 1


@torch.no_grad()
def reference_logits(model: ViTConfig, start: dict[str, Tensor]) -> Tensor:
    vit_model = ViT(model).to(device()).eval()
    vit_model.load_state_dict(start)
    return vit_model(probe_images(model)).cpu()  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------------------------------------


class Loop(Protocol):
    """A contestant, ready to train."""

    def step(self, images_BHWC: Tensor, labels_BL: Tensor, keys_B: Tensor) -> None:
        """One optimizer step."""

    def close(self) -> None:
        """Lets go of everything it holds."""


class EngineLoop:
    """vitscale, as `vitscale.train` runs it."""

    def __init__(self, config: BenchConfig, model: ViTConfig, start: dict[str, Tensor]) -> None:
        vit_model = ViT(model, config.engine.keeps)
        vit_model.load_state_dict(start)
        self.engine = Engine(vit_model, config.engine, OPTIMIZER, micro_batch_size=config.batch, grad_accum_steps=1)

    def step(self, images_BHWC: Tensor, labels_BL: Tensor, keys_B: Tensor) -> None:
        """One optimizer step."""
        logits_BK = self.engine.forward(normalize(images_BHWC, PREPROCESS), keys_B)
        self.engine.backward(compute_loss(logits_BK, labels_BL, torch.ones_like(labels_BL, dtype=torch.float32), OBJECTIVE))
        self.engine.step(OPTIMIZER.peak_lr)

    def close(self) -> None:
        """Lets go of everything it holds."""
        self.engine.close()


class BareLoop:
    """Any model in plain torch; in bf16 with fp32 masters that the optimizer updates.

    Args:
        model: in fp32 on the device.
        forward: its logits.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], precision: str) -> None:
        self.model, self.forward = model.train(), forward
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        named = dict(model.named_parameters())
        self.weights = list(named.values())
        self.masters = self.weights
        if self.dtype != torch.float32:
            self.masters = [w.detach().clone() for w in self.weights]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            model.to(self.dtype)
        kernels, others = split_by_decay(dict(zip(named, self.masters, strict=True)))
        groups = [{"params": kernels, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.peak_lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)

    def step(self, images_BHWC: Tensor, labels_BL: Tensor, keys_B: Tensor) -> None:
        """One optimizer step."""
        logits_BK = self.forward(normalize(images_BHWC, PREPROCESS).to(self.dtype))
        compute_loss(logits_BK, labels_BL, torch.ones_like(labels_BL, dtype=torch.float32), OBJECTIVE).backward()
        separate = self.masters is not self.weights
        if separate:
            torch._foreach_copy_([m.grad for m in self.masters], [w.grad for w in self.weights])  # type: ignore[misc]
        torch.nn.utils.clip_grad_norm_(self.masters, OPTIMIZER.grad_clip)
        self.optimizer.step()
        if separate:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        for weight in self.weights:
            weight.grad = None

    def close(self) -> None:
        """Lets go of everything it holds."""
        self.__dict__.clear()


def variants(config: BenchConfig) -> list[str]:
    """The contestants that can run here, peers as they come, at their best, or both."""
    found = []
    for name in config.contestants:
        if name in ("transformers", "timm") and not installed(name):
            print(f"{name} is left out: it is not installed", file=sys.stderr)
        elif name in ("transformers", "timm") and config.engine.checkpoint_every_n_blocks > 1:
            print(f"{name} is left out: it checkpoints every block or none", file=sys.stderr)
        elif name == "fed" and config.data is None:
            print("fed is left out: --data says from where", file=sys.stderr)
        elif name in ("vitscale", "fed"):
            found.append(name)
        else:
            found += {"plain": [name], "best": [f"{name} best"], "both": [name, f"{name} best"]}[config.peers]
    return found


def build(name: str, config: BenchConfig, model: ViTConfig, start: dict[str, Tensor], expected: Tensor) -> Loop:
    if name in ("vitscale", "fed"):
        return EngineLoop(config, model, start)
    peer = name.removesuffix(" best")
    net, blocks, forward = {"torch": build_ours, "transformers": build_transformers, "timm": build_timm}[peer](config, model, start)
    with torch.no_grad():
        found = forward(probe_images(model)).cpu()
    if not (error := float((found - expected).norm() / expected.norm())) < 1e-4:
        raise ValueError(f"its logits are not those of vitscale: relative difference {error:.1e}")
    if name.endswith(" best"):
        for block in blocks:
            block.compile()
    return BareLoop(net, forward, config.engine.precision)


Built = tuple[nn.Module, nn.ModuleList | nn.Sequential, Callable[[Tensor], Tensor]]


def build_ours(config: BenchConfig, model: ViTConfig, start: dict[str, Tensor]) -> Built:
    net = ViT(model, config.engine.keeps)
    net.load_state_dict(start)
    net.to(device())
    return net, net.blocks, net


def build_timm(config: BenchConfig, model: ViTConfig, start: dict[str, Tensor]) -> Built:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        img_size=model.image_size, patch_size=model.patch_size, embed_dim=model.width, depth=model.depth, num_heads=model.num_heads,
        mlp_ratio=model.mlp_dim / model.width, num_classes=model.num_classes,
    )  # fmt: skip
    net.load_state_dict(start, strict=True)
    net.set_grad_checkpointing(config.engine.checkpoint_every_n_blocks == 1)
    net.to(device())
    return net, net.blocks, net


def build_transformers(config: BenchConfig, model: ViTConfig, start: dict[str, Tensor]) -> Built:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    net = ViTForImageClassification(
        TheirConfig(
            hidden_size=model.width, num_hidden_layers=model.depth, num_attention_heads=model.num_heads, intermediate_size=model.mlp_dim,
            image_size=model.image_size, patch_size=model.patch_size, num_labels=model.num_classes, layer_norm_eps=model.layer_norm_eps,
            hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )
    )  # fmt: skip
    weights = {}
    for name, weight in start.items():
        theirs = names_in_transformers(name)
        weights |= dict(zip(theirs, weight.chunk(len(theirs)), strict=True))
    net.load_state_dict(weights, strict=True)
    if config.engine.checkpoint_every_n_blocks == 1:
        net.gradient_checkpointing_enable()
    net.to(device())
    return net, net.vit.layers, lambda images_BCHW: net(images_BCHW).logits


def names_in_transformers(name: str) -> list[str]:
    """The tensors of transformers 5 that one of ours is; its queries, keys and values are apart."""
    for ours, theirs in (
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"), ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"), ("blocks.", "vit.layers."), ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj"), ("head.", "classifier."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    if name.startswith("norm."):
        name = f"vit.layer{name}"
    return [name.replace("attn.qkv", f"attention.{part}_proj") for part in "qkv"] if "attn.qkv" in name else [name]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------------------------


def in_turns(config: BenchConfig, model: ViTConfig, start: dict[str, Tensor], expected: Tensor) -> tuple[Taken, dict[str, str]]:
    """Each contestant alone, built anew in every repeat; and why others are left out."""
    rounds: Taken = {name: [] for name in variants(config)}
    errors: dict[str, str] = {}
    for repeat in range(config.repeats):
        for name in [name for name in rounds if name not in errors]:
            print(f"repeat {repeat + 1}/{config.repeats}: {name}", file=sys.stderr, flush=True)
            try:
                rounds[name].append(measure(name, config, model, start, expected, profile=repeat == 0))
                note(config, {"contestant": name, "repeat": repeat} | rounds[name][-1])
            except Exception as error:  # an unattended run goes on with the others, and the report says why
                leave_out(name, error, errors)
            free_memory()
    return rounds, errors


def measure(
    name: str, config: BenchConfig, model: ViTConfig, start: dict[str, Tensor], expected: Tensor, *, profile: bool
) -> dict[str, Any]:  # fmt: skip
    """One contestant, one repeat: built, warmed up, timed and let go; `profile` looks at one more step for its attention."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    loop = build(name, config, model, start, expected)
    batches = fed_batches(config) if name == "fed" else itertools.cycle(synthetic_batches(config))
    order: list[Any] = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    best = CUDA and name.endswith(" best")
    with sdpa_kernel(order, set_priority=True) if best else contextlib.nullcontext():
        attention = attention_kernels(lambda: loop.step(*next(batches))) if profile else []
        for _ in range(config.warmup):
            loop.step(*next(batches))
        milliseconds = time_steps(lambda: loop.step(*next(batches)), config.steps)
    peak = torch.cuda.max_memory_allocated() if CUDA else None
    loop.close()
    return {"step_ms": milliseconds, "peak_bytes": peak, "attention": attention, "gpu": gpu_state()}


def time_steps(step: Callable[[], Any], steps: int) -> list[float]:
    """Milliseconds of each step, one after the other without waiting."""
    if not CUDA:
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def step_by_step(config: BenchConfig, model: ViTConfig, start: dict[str, Tensor], expected: Tensor) -> tuple[Taken, dict[str, str]]:
    """All contestants at once, taking turns at each step; and why others are left out."""
    loops: dict[str, Loop] = {}
    attention, errors = {}, {}
    synthetic = synthetic_batches(config)
    batches = {name: fed_batches(config) if name == "fed" else itertools.cycle(synthetic) for name in variants(config)}
    for name, ready in batches.items():
        try:
            loops[name] = build(name, config, model, start, expected)
            attention[name] = attention_kernels(lambda loop=loops[name], ready=ready: loop.step(*next(ready)))  # type: ignore[misc]
            for _ in range(config.warmup):
                loops[name].step(*next(ready))
        except Exception as error:
            leave_out(name, error, errors)
            loops.pop(name, None)
    rounds: Taken = {name: [] for name in loops}
    for repeat in range(config.repeats):
        step_ms = take_turns(loops, batches, range(config.steps))
        for name, milliseconds in step_ms.items():
            rounds[name].append({"step_ms": milliseconds, "peak_bytes": None, "attention": attention[name], "gpu": None})
            note(config, {"contestant": name, "repeat": repeat} | rounds[name][-1])
    for loop in loops.values():
        loop.close()
    return rounds, errors


def take_turns(
    loops: Mapping[str, Loop], batches: Mapping[str, Iterator[Batch]], turns: Iterable[int], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds, by a clock, of each step of loops that take turns at every step, each going first in turn."""
    step_ms: dict[str, list[float]] = {name: [] for name in loops}
    for turn in turns:
        first = turn % max(1, len(loops))
        for name in [*loops, *loops][first : first + len(loops)]:
            began = clock()
            loops[name].step(*next(batches[name]))
            if CUDA:
                torch.cuda.synchronize()
            step_ms[name].append(1000 * (clock() - began))
    return step_ms


def leave_out(name: str, error: Exception, errors: dict[str, str]) -> None:
    errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    print(f"{name} is left out: {errors[name]}", file=sys.stderr, flush=True)


def note(config: BenchConfig, measured: dict[str, Any]) -> None:
    """Keeps a repeat at once: what comes after it may not end."""
    if config.lines:
        with open(config.lines, "a") as lines:
            lines.write(json.dumps({"model": config.model, "image_size": config.image_size, "batch": config.batch} | measured) + "\n")


def attention_kernels(step: Callable[[], None]) -> list[str]:
    """The attention operators that a step calls, by torch's own names: which backend was chosen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = {event.key for event in profile.key_averages()}
    return sorted(key.removeprefix("aten::_") for key in found if key.startswith("aten::_scaled_dot_product_") and "backward" not in key)


def free_memory() -> None:
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------------------------------


def summary(taken: list[dict[str, Any]], config: BenchConfig) -> dict[str, Any]:
    """Median and spread over the repeats."""
    rates = [1000 * config.batch / statistics.fmean(t["step_ms"]) for t in taken]
    median = statistics.median(rates)
    flop_rate = median * train_flops(model_config(config))
    name, precision = device_name(), config.engine.precision
    datasheet, measured = peak_flops(name, precision), measured_flops(name, precision)
    return {
        "images_per_second": median,
        "spread": (max(rates) - min(rates)) / median,
        "images_per_second_of_each_repeat": rates,
        "step_ms_median": statistics.median(ms for t in taken for ms in t["step_ms"]),
        "tflops_per_second": flop_rate / 1e12,
        "mfu_of_datasheet": flop_rate / datasheet if datasheet else None,
        "mfu_of_measured": flop_rate / measured if measured else None,
        "peak_bytes": max(t["peak_bytes"] for t in taken) if CUDA else None,
        "attention": taken[0]["attention"],
        "gpu_after_each_repeat": [t["gpu"] for t in taken],
    }


def ratios(rounds: Taken, config: BenchConfig) -> dict[str, dict[str, float]]:
    """vitscale's speed over each peer's, at the peer's best of what was run: the median of those taken together, and their middle half.

    Together are the steps of a round or, where contestants take turns by repeats, the means of those.
    """
    times = {
        name: [statistics.fmean(t["step_ms"]) for t in taken] if config.turns == "repeats" else [ms for t in taken for ms in t["step_ms"]]
        for name, taken in rounds.items()
    }
    if not times.get("vitscale"):
        return {}
    found = {}
    for peer in sorted({name.removesuffix(" best") for name in times} - {"vitscale"}):
        best = min((times[name] for name in (peer, f"{peer} best") if name in times), key=statistics.median)
        found[peer] = ratio_of_turns(best, times["vitscale"])
    return found


def ratio_of_turns(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of what was taken together, and their middle half."""
    of_each = sorted(time / other for time, other in zip(times, others, strict=True))
    quarter = len(of_each) // 4
    return {"ratio": statistics.median(of_each), "low": of_each[quarter], "high": of_each[-1 - quarter]}


def print_table(result: dict[str, Any]) -> None:
    model, settings, machine_ = result["model"], result["settings"], result["machine"]
    precision = settings["engine"]["precision"] + (" and float8" if settings["engine"].get("float8") else "")
    print(
        f"\n{settings['model']} at {model['image_size'][0]}x{model['image_size'][1]} px, {result['parameters']:,} parameters, "
        f"batch {settings['batch']}, {precision}, ZeRO {settings['engine']['zero_stage']}, "
        f"{result['train_flops_per_image'] / 1e9:,.4g} GFLOP an image, on {machine_['device']}; torch {machine_['versions']['torch']}"
    )
    print(f"{'':18}{'images/s':>10}{'spread':>9}{'step ms':>10}{'TFLOP/s':>9}{'MFU':>7}{'of meas.':>10}{'peak GB':>9}  attention")
    for name, c in result["contestants"].items():
        if "error" in c:
            print(f"{name:18}{c['error']}")
            continue
        peak = f"{c['peak_bytes'] / 1e9:.2f}" if c["peak_bytes"] else "-"
        mfu, measured = (f"{c[key]:.1%}" if c[key] else "-" for key in ("mfu_of_datasheet", "mfu_of_measured"))
        print(
            f"{name:18}{c['images_per_second']:10.1f}{c['spread']:9.1%}{c['step_ms_median']:10.1f}{c['tflops_per_second']:9.3f}{mfu:>7}"
            f"{measured:>10}{peak:>9}  {', '.join(c['attention']) or 'in a compiled graph'}"
        )
    for peer, of in result["ratios"].items():
        print(f"vitscale is {of['ratio']:.3f} x {peer} (half of the turns {of['low']:.3f} to {of['high']:.3f})")


def save(result: dict[str, Any], folder: Path, name: str = "train-step") -> Path:
    """Writes DATE-NAME-DEVICE-MODEL.json, with a number where there is one already."""
    folder.mkdir(parents=True, exist_ok=True)
    what = "-".join(f"{result['machine']['device']} {result['settings']['model']}".lower().split())
    stem = f"{result['date'][:10]}-{name}-{what}"
    number = 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    packages = ("torch", "deepspeed", "transformers", "timm", "torchao", "triton")
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages if installed(name)},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if CUDA else None,
        "commit": output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature, where nvidia-smi tells them."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    text = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0") if CUDA else None
    return dict(zip(fields, (value.strip() for value in text.split(",")), strict=False)) if text else None


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def to_plain(config: BenchConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def join_world_of_one() -> None:
    """The process group that the engine needs, of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed()


if __name__ == "__main__":
    main()
