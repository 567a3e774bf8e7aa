"""What one GPU does with a ViT's training step, measured unattended in parts of minutes, the most valuable first; `gpu.sh` is the way in.

    benchmarks/gpu.sh                        all parts, 25 minutes on an H200, then the table with the project's targets beside it
    benchmarks/gpu.sh part1                  the ceilings alone; part2 ... part5 likewise
    benchmarks/gpu.sh --rehearse             all of it with tiny shapes, minutes on a CPU

    part 1    ceilings: a large product, a copy, the four GEMMs of an H/14 block in bf16 and float8, attention by backend
    part 2    H/14 at 224 px, micro-batch 256: ours, timm and transformers at their best in turns A B C A B C, then as they come
    part 3    H/14 at micro-batches 8 to 128, L/16 in turns with timm, B/16, H/14 at 518 px, H/14 against the bare loop
    part 4    float8, activation checkpointing, CUDA graphs, a checkpoint's stall, fed from disk against batches that are ready
    part 5    the tests that need a GPU

A part is a list of rows. A child process measures them one after the other; a row over its limit, or one that takes the process with it
(a fault of the device spoils all that follows in it), is recorded as such and costs only itself: the next begins in a new child. Rows are
lines of JSON, written as soon as they are there. What a row cannot do here is an error in its line, never a figure.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = (1, 2, 3, 4, 5)
PART_SECONDS = 480
MICRO_BATCHES = (8, 16, 32, 64, 128)
BACKENDS = ("cudnn", "flash", "efficient", "math")


@dataclass(frozen=True)
class Sizes:
    """The shapes of a measurement, or of its rehearsal."""

    square: int = 8192
    """Of the large product."""
    copied: int = 2**32
    """Bytes that the copy reads."""
    tokens: int = 256 * 257
    width: int = 1280
    mlp_dim: int = 5120
    attention: tuple[int, int, int, int] = (256, 16, 257, 80)
    """Batch, heads, tokens, width of a head."""
    seconds: float = 0.5
    """That a kernel is timed for."""
    batch: int = 256
    warmup: int = 20
    steps: int = 50
    window: int = 20
    """Steps of a single window."""
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    model: dict[str, Any] = field(default_factory=dict)
    """What a rehearsal's models have instead of their names' sizes."""
    photographs: int = 2048
    """Images of the dataset that is read."""
    tests: tuple[str, ...] = ("-m", "gpu")
    faults: bool = False
    """Rows that fail, hang and die, which a rehearsal must survive."""


REHEARSAL = Sizes(
    square=64, copied=2**16, tokens=32, width=64, mlp_dim=128, attention=(2, 2, 16, 16), seconds=0.002, batch=4, warmup=1, steps=2,
    window=2, micro_batches=(2,), model={"depth": 2, "width": 64, "mlp_dim": 128,
    "num_heads": 2, "image_size": (112, 112), "num_classes": 5},
    photographs=8, tests=("tests/vitscale/test_gpu.py", "--collect-only"), faults=True,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A measurement that ends or fails by itself."""

    part: int
    name: str
    limit: float
    """Seconds, everything included."""
    measure: Callable[[Sizes], dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Part 1: ceilings
# ---------------------------------------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], sizes: Sizes) -> float:
    """Milliseconds, the median of several runs of many calls."""
    from train_step import time_steps

    once = statistics.median(time_steps(work, 5)[1:])
    calls = max(2, math.ceil(1000 * sizes.seconds / max(once, 1e-3) / 5))
    return statistics.median(sum(time_steps(work, calls)) / calls for _ in range(5))


def square_product(sizes: Sizes) -> dict[str, Any]:
    """The product of two large matrices of random numbers."""
    import torch
    from train_step import device

    a, b = (torch.randn(sizes.square, sizes.square, device=device(), dtype=torch.bfloat16) for _ in range(2))
    milliseconds = timed(lambda: a @ b, sizes)
    return {"ms": milliseconds, "tflops": 2 * sizes.square**3 / milliseconds / 1e9}


def memory_copy(sizes: Sizes) -> dict[str, Any]:
    """From the device's memory to the device's memory; bytes read and written."""
    import torch
    from train_step import device

    source = torch.randint(0, 255, (sizes.copied,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    milliseconds = timed(lambda: target.copy_(source), sizes)
    return {"ms": milliseconds, "gb_per_second": 2 * sizes.copied / milliseconds / 1e6}


def gemms(sizes: Sizes, *, float8: bool) -> dict[str, Any]:
    """The products of a block's four linear layers: forward, gradient of the input, gradient of the weights."""
    import torch
    from train_step import device

    M, D, H = sizes.tokens, sizes.width, sizes.mlp_dim
    found: dict[str, Any] = {}
    for name, (K, N) in {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, H), "fc2": (H, D)}.items():
        x, w, g = (torch.randn(shape, device=device(), dtype=torch.bfloat16) for shape in ((M, K), (N, K), (M, N)))
        for product, (a, b) in {"forward": (x, w.t()), "dgrad": (g, w), "wgrad": (g.t(), x)}.items():
            work = float8_product(a, b) if float8 else lambda a=a, b=b: a @ b
            milliseconds = timed(work, sizes)
            found[f"{name} {product}"] = {"ms": milliseconds, "tflops": 2 * M * K * N / milliseconds / 1e9}
    total = sum(of["ms"] for of in found.values())
    return {"products": found, "ms": total, "tflops": 3 * 2 * M * D * (4 * D + 2 * H) / total / 1e9}


def float8_product(a: Any, b: Any) -> Callable[[], Any]:
    """A product in float8 with a scale a tensor, as torchao's tensor-wise recipe has it; the gradient's range is e5m2's."""
    import torch

    a8, b8 = a.contiguous().to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()  # rows by columns, as the kernel wants
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def attention(sizes: Sizes, *, backend: str) -> dict[str, Any]:
    """Scaled dot-product attention, forward alone and with backward, at the layout that the model gives it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from train_step import device

    B, H, N, d = sizes.attention
    qkv = torch.randn(B, N, 3, H, d, device=device(), dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(B, N, H, d, device=device(), dtype=torch.bfloat16).transpose(1, 2)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def forward() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with sdpa_kernel([getattr(SDPBackend, "MATH" if backend == "math" else f"{backend.upper()}_ATTENTION")]):
        ahead = timed(forward, sizes)
        both = timed(lambda: torch.autograd.grad(forward(), (q, k, v), gradient), sizes)
    flops = 4 * B * H * N * N * d
    return {"forward_ms": ahead, "both_ms": both, "forward_tflops": flops / ahead / 1e9, "both_tflops": 3.5 * flops / both / 1e9}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Parts 2 to 4: whole steps
# ---------------------------------------------------------------------------------------------------------------------------------------


def training(sizes: Sizes, model: str = "h14", engine: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """`train_step.run`, of our engine alone in one window where nothing else is said."""
    from train_step import BenchConfig, run

    from vitscale.config import EngineConfig

    config = BenchConfig(model=model, image_size=(224, 224), batch=sizes.batch, engine=EngineConfig(**(engine or {})), turns="repeats")
    config = replace(
        config, contestants=("vitscale",), warmup=sizes.warmup, steps=sizes.window, repeats=1, lines=LINES.with_suffix(".repeats")
    )
    config = replace(config, **(changes | sizes.model))
    result = run(config)
    del result["machine"]
    failed = {name: of["error"] for name, of in result["contestants"].items() if "error" in of}
    return result | ({"error": f"{failed}"} if failed else {})


def at_518(sizes: Sizes, *contestants: str) -> dict[str, Any]:
    """H/14 on 1,370 tokens, ours and peers at their best in one window each."""
    batch = max(2, sizes.batch // 8)
    return training(sizes, batch=batch, image_size=(518, 518), contestants=("vitscale", *contestants), peers="best")


def in_turns(sizes: Sizes, model: str, *contestants: str) -> dict[str, Any]:
    """Ours against peers at their best, A B A B."""
    return training(sizes, model, contestants=("vitscale", *contestants), peers="best", steps=sizes.steps, repeats=2)


def fed(sizes: Sizes, model: str) -> dict[str, Any]:
    """Ours fed from tars of JPEG files on this machine's disk, and on batches that are ready, A B A B."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = rendered_dataset(Path(folder), sizes.photographs)
        return training(sizes, model, contestants=("vitscale", "fed"), data=dataset, steps=sizes.steps, repeats=2)


def rendered_dataset(folder: Path, count: int) -> Path:
    """JPEG files of 500x375 pixels and some 60 KB, rendered: a photograph's spectrum falls with frequency, and so does theirs."""
    import numpy as np
    from photographs import packed
    from PIL import Image

    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)) + 1 / 500
    distinct = min(count, 128)
    for number in range(distinct):
        waves = rng.standard_normal((3, 375, 251)) + 1j * rng.standard_normal((3, 375, 251))
        image_CHW = np.fft.irfft2(waves / frequency**1.2, s=(375, 500))
        image_CHW = 128 + 50 * image_CHW / image_CHW.std()
        one = folder / f"files/class-{number % 4}" / f"{number:05d}-0.jpg"
        one.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_CHW.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(one, "JPEG", quality=90)
        for copy in range(1, count // distinct):
            os.link(one, one.with_name(f"{number:05d}-{copy}.jpg"))
    return packed(folder / "files", folder / "dataset")


def stall(sizes: Sizes, model: str) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint, and until it is durable on this machine's disk; median of three."""
    import torch
    from train_step import CUDA, OPTIMIZER, PREPROCESS, BenchConfig, EngineLoop, initial_weights, model_config, synthetic_batches

    from vitscale import checkpoint
    from vitscale.config import EngineConfig, ObjectiveConfig
    from vitscale.retention import Policy
    from vitscale.saving import Saver

    assert OPTIMIZER.name == "adamw"
    config = BenchConfig(**({"model": model, "image_size": (224, 224), "batch": 2, "engine": EngineConfig()} | sizes.model))
    vit = model_config(config)
    loop = EngineLoop(config, vit, initial_weights(vit))
    found: dict[str, list[float]] = {"stall": [], "durable": []}
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), loop.engine, Policy(newest=1), 0)
        for step in range(1, 4):
            loop.step(*synthetic_batches(config)[0])
            if CUDA:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            about = checkpoint.Description(
                Path(folder), vit, PREPROCESS, ObjectiveConfig("softmax"), None, samples_seen=2 * step, step=step
            )
            saver.snapshot(about, patience=math.inf)
            if CUDA:
                torch.cuda.synchronize()
            found["stall"].append(time.perf_counter() - begun)
            saver.finish()
            found["durable"].append(time.perf_counter() - begun)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    loop.close()
    return {name: statistics.median(of) for name, of in found.items()} | {"of_each": found, "bytes": size}


def gpu_tests(sizes: Sizes) -> dict[str, Any]:
    """The suite's tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", *sizes.tests, "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    return {"exit": done.returncode, "tail": done.stdout[-3000:]}


def rows(sizes: Sizes) -> list[Row]:
    """All of them, in the order in which they are measured."""
    best = ("timm", "transformers")

    def of(part: int, name: str, limit: float, measure: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> Row:
        return Row(part, name, limit, lambda sizes: measure(sizes, *args, **kwargs))

    return [
        of(1, "product", 60, square_product),
        of(1, "copy", 60, memory_copy),
        of(1, "gemms", 90, gemms, float8=False),
        *(of(1, f"attention {backend}", 60, attention, backend=backend) for backend in BACKENDS),
        of(1, "gemms float8", 90, gemms, float8=True),
        of(2, "h14", 400, in_turns, "h14", *best),
        of(2, "h14 as they come", 200, training, contestants=best, peers="plain", warmup=sizes.warmup // 2),
        of(3, "l16", 200, in_turns, "l16", "timm"),
        *(of(3, f"h14 micro-batch {batch}", 90, training, batch=batch) for batch in reversed(sizes.micro_batches)),
        of(3, "h14 bare loop", 150, training, contestants=("vitscale", "torch"), peers="best"),
        of(3, "h14 at 518", 150, at_518, "timm"),
        of(3, "b16", 120, training, "b16", contestants=("vitscale", "timm"), peers="best"),
        of(4, "h14 float8", 150, training, engine={"float8": True}),
        of(4, "stall", 150, stall, "h14"),
        of(4, "h14 fed", 200, fed, "h14"),
        *(of(4, f"h14 graphs {batch}", 90, training, batch=batch, engine={"compile": "graphs"}) for batch in sizes.micro_batches[:2]),
        of(4, "h14 every block", 90, training, engine={"checkpoint_every_n_blocks": 1}),
        of(4, "h14 keeping products", 90, training, engine={"checkpoint_every_n_blocks": 1, "checkpoint_keeps": "products"}),
        of(5, "tests", 420, gpu_tests),
        *(of(5, f"rehearsed {fault}", 3, fault_of, fault) for fault in ("failure", "hang", "recovery", "death") if sizes.faults),
    ]  # fmt: skip


def fault_of(sizes: Sizes, fault: str) -> dict[str, Any]:
    """What a row may do to the others: nothing."""
    if fault == "failure":
        raise ValueError("as rehearsed")
    if fault == "recovery":
        return square_product(sizes)
    if fault == "hang":
        time.sleep(3600)
    os._exit(7)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Unattended
# ---------------------------------------------------------------------------------------------------------------------------------------

LINES = Path(os.environ.get("VITSCALE_GPU_LINES", "gpu.jsonl"))  # a child's rows lie beside these


READY = "ready"
START_SECONDS = 180  # for a child to import what it needs, or to let go of what a row held; no row's time


def child(orders: Any, sizes: Sizes) -> None:
    """Measures the rows that it is told to, by number, until it is told nothing more."""
    sys.path.insert(0, str(Path(__file__).parent))
    from train_step import free_memory, gpu_state, join_world_of_one

    join_world_of_one()
    listed = rows(sizes)
    orders.send(READY)
    while (number := orders.recv()) is not None:
        try:
            found = listed[number].measure(sizes)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        orders.send(found | {"gpu_after": gpu_state()})
        free_memory()
        orders.send(READY)


def measure_part(part: int, sizes: Sizes, lines: Path, part_seconds: float, only: list[str] | None = None) -> None:
    """Every row of a part, each for as long as it may take and the part has left."""
    context = multiprocessing.get_context("spawn")
    ends, process, orders = time.monotonic() + part_seconds, None, None
    for number, row in enumerate(rows(sizes)):
        if row.part != part or (only and row.name not in only):
            continue
        if time.monotonic() >= ends:
            record(lines, row, {"error": f"not begun: part {part} had its {part_seconds:g} seconds"})
            continue
        if process is None or orders is None:
            orders, theirs = context.Pipe()
            process = context.Process(target=child, args=(theirs, sizes), daemon=False)
            process.start()
            theirs.close()
        print(f"part {part}: {row.name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            if not orders.poll(START_SECONDS) or orders.recv() != READY:
                raise EOFError
            begun = time.monotonic()
            orders.send(number)
            limit = min(row.limit, max(1.0, ends - begun))
            found = orders.recv() if orders.poll(limit) else {"error": f"no end within {limit:.0f} seconds"}
        except (EOFError, OSError):
            process.join(1)
            found = {"error": f"its process ended with status {process.exitcode}"}
        if "gpu_after" not in found:
            process.kill()
            process.join()
            process = None
        record(lines, row, found | {"seconds": time.monotonic() - begun})
    if process is not None and orders is not None:
        orders.send(None)
        process.join(60)
        process.kill()


def record(lines: Path, row: Row, found: dict[str, Any]) -> None:
    """A line, on disk before the next row begins."""
    with open(lines, "a") as file:
        file.write(json.dumps({"part": row.part, "row": row.name} | found) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"  {row.name}: {found.get('error') or said(found)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------------------------

# What it is, floor, target, moonshot, where it stands in the rows; where bars fall from left to right, less is better
Found = dict[str, dict[str, Any]]
TARGETS: tuple[tuple[str, float | None, float | None, float | None, Callable[[Found], float]], ...] = (
    ("H/14 at 224, bf16, images/s", 430, 500, 550, lambda r: r["h14"]["contestants"]["vitscale"]["images_per_second"]),
    ("L/16, share of the measured ceiling", 0.52, 0.58, 0.65, lambda r: mfu_here(r, "l16")),
    ("B/16, share of the measured ceiling", 0.45, 0.50, 0.57, lambda r: mfu_here(r, "b16")),
    ("against timm at its best, H/14", 1.05, 1.12, 1.20, lambda r: r["h14"]["ratios"]["timm"]["ratio"]),
    ("the same with float8", None, None, 1.40, lambda r: float8_ratio(r)),
    ("against transformers at its best, H/14", 1.10, 1.20, 1.35, lambda r: r["h14"]["ratios"]["transformers"]["ratio"]),
    ("ZeRO-1 against a bare torch loop", 0.95, 0.98, 0.99, lambda r: r["h14 bare loop"]["ratios"]["torch"]["ratio"]),
    ("peak memory H/14, GB", 100, 70, 60, lambda r: r["h14"]["contestants"]["vitscale"]["peak_bytes"] / 1e9),
    ("fed from disk against ready batches", 0.97, 0.99, 0.997, lambda r: 1 / r["h14 fed"]["ratios"]["fed"]["ratio"]),
    ("checkpoint stall H/14, s", 1.0, 0.2, 0.025, lambda r: r["stall"]["stall"]),
)


def mfu_here(found: Found, row: str) -> float:
    """Of what a large product reached in this very measurement."""
    return float(found[row]["contestants"]["vitscale"]["tflops_per_second"] / found["product"]["tflops"])


def float8_ratio(found: Found) -> float:
    """Our float8 against timm's best, which has none."""
    ours = found["h14 float8"]["contestants"]["vitscale"]["images_per_second"]
    return float(ours / found["h14"]["contestants"]["timm best"]["images_per_second"])


def judged(value: float, bars: tuple[float | None, ...]) -> str:
    """Which of floor, target and moonshot a figure reaches."""
    known = [bar for bar in bars if bar is not None]
    falls = known[0] > known[-1]
    reached = [
        name for name, bar in zip(("floor", "target", "moonshot"), bars, strict=True)
        if bar is not None and (value <= bar if falls else value >= bar)
    ]  # fmt: skip
    return reached[-1] if reached else "below"


def summary(lines: Path) -> tuple[list[dict[str, Any]], str]:
    """The targets with what was measured, and the table of all rows, as text."""
    taken = [json.loads(line) for line in lines.read_text().splitlines()]
    head, found = taken[0], {line["row"]: line for line in taken if "row" in line}
    targets = []
    for what, *bars, value_of in TARGETS:
        try:
            value = value_of(found)
        except (KeyError, TypeError):
            value = None
        verdict = "not measured" if value is None else "rehearsed" if head["rehearsal"] else judged(value, tuple(bars))
        targets.append({"what": what, "measured": value, "floor": bars[0], "target": bars[1], "moonshot": bars[2], "verdict": verdict})
    text = ["REHEARSAL: no figure means anything"] * head["rehearsal"]
    text += [f"{head['date']}  {head['machine']['device']}  {head['machine']['versions']}"]
    text += [f"{line['part']}  {line['row']:24}{line.get('error') or said(line)}" for line in found.values()]
    text += ["", f"{'':42}{'measured':>10}{'floor':>8}{'target':>8}{'moonshot':>10}"]
    for of in targets:
        bars = "".join(f"{'' if of[key] is None else of[key]:>{width}}" for key, width in (("floor", 8), ("target", 8), ("moonshot", 10)))
        text.append(f"{of['what']:42}{'-' if of['measured'] is None else format(of['measured'], '.4g'):>10}{bars}  {of['verdict']}")
    return targets, "\n".join(text)


def said(found: dict[str, Any]) -> str:
    """A row in words."""
    if "contestants" in found:
        each = (
            f"{name} {of['images_per_second']:.1f} images/s"
            + (f", {of['mfu_of_measured']:.1%} of what a large product reaches" if of["mfu_of_measured"] else "")
            + (f", {of['peak_bytes'] / 1e9:.1f} GB" if of["peak_bytes"] else "")
            for name, of in found["contestants"].items()
        )
        return "; ".join([*each, *(f"{of['ratio']:.3f} x {peer}" for peer, of in found["ratios"].items())])
    plain = {key: value for key, value in found.items() if isinstance(value, int | float) and key not in ("part", "seconds")}
    return ", ".join(f"{key} {value:.4g}" for key, value in plain.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="part1 ... part5; none: all")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by their names, of the parts")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--part-seconds", type=float, default=PART_SECONDS)
    flags = parser.parse_args()
    parts = [int(re.sub("^part", "", part)) for part in flags.parts] or PARTS
    from train_step import machine

    head = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(), "rehearsal": flags.rehearse}
    device = "-".join(head["machine"]["device"].lower().split())
    flags.results.mkdir(parents=True, exist_ok=True)
    lines = flags.results / f"{head['date'][:10]}-gpu-{device}{'-rehearsal' * flags.rehearse}.jsonl"
    if not lines.exists():  # parts may be started one by one
        lines.write_text(json.dumps(head) + "\n")
    os.environ["VITSCALE_GPU_LINES"] = str(lines)
    for part in parts:
        measure_part(part, REHEARSAL if flags.rehearse else Sizes(), lines, flags.part_seconds, flags.only)
    targets, text = summary(lines)
    lines.with_suffix(".json").write_text(json.dumps(head | {"targets": targets}, indent=1) + "\n")
    lines.with_suffix(".txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
