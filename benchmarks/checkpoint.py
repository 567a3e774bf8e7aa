"""A checkpoint against DeepSpeed's own and torch.distributed.checkpoint's: how long training stalls, writing, loading, memory.

    python -m benchmarks.checkpoint                              ViT-B (86 M) in training under ZeRO-1 with AdamW, one rank
    python -m benchmarks.checkpoint --case l16 --ranks 2         ViT-L (304 M); tiny: a look at whether it runs
    python -m benchmarks.checkpoint --case h14-state             ViT-H's 632 M weights and one moment, as bare state without an engine

Contestants, all with the same tensors (fp32 weights and the optimizer's moments), in turns A B C A B C over the repeats:

    vitscale      `saving.Saver`: flat pieces, checksums, fsync, a commit
    deepspeed     `engine.save_checkpoint`, as it comes: torch.save, neither checksums nor fsync (with bare state, torch.save alone)
    dcp           `torch.distributed.checkpoint.save`, of the rank's partition
    dcp-async     `torch.distributed.checkpoint.async_save`, whose copies are made anew, as it comes

stall    until training could go on             write    until the checkpoint is complete, from the same beginning
load     until the state is set again, files in the page cache; ours reads all of them once more beforehand, for the checksums
peak     resident memory over what training alone had, at the most, in writing and in loading (where mapped files count). Our buffer counts,
         which is made once, before (`prepare`)

A thread writes while the rank waits, so nothing here says what writing takes from the steps beside it. Rows are printed and kept at once.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from launch.ranks import free_port
from vitscale import checkpoint
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig
from vitscale.engine import Engine, init_distributed
from vitscale.model import ViT, initialize
from vitscale.recipes import vit
from vitscale.retention import Policy
from vitscale.saving import Saver
from vitscale.weights import TensorReader

RESULTS = Path(__file__).parent / "results"
CONTESTANTS = ("vitscale", "deepspeed", "dcp", "dcp-async")
TINY = ViTConfig(depth=2, width=64, mlp_dim=128, num_heads=2, patch_size=8, image_size=(32, 32), num_classes=10)


class BareState:
    """Weights and momentum of a model's shapes, which Saver asks as it asks an engine."""

    def __init__(self, model: ViTConfig) -> None:
        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in ViT(model).named_parameters()}
        self.kinds = {kind: tuple(self.shapes) for kind in ("weight", "momentum_buffer")}
        self.state = {(name, kind): torch.randn(shape.numel()) for name, shape in self.shapes.items() for kind in self.kinds}

    def shares(self) -> dict[str, tuple[int, int]]:
        """As `Engine.shares` without ZeRO."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        cuts = {name: (rank * shape.numel() // ranks, (rank + 1) * shape.numel() // ranks) for name, shape in self.shapes.items()}
        return {name: (start, end - start) for name, (start, end) in cuts.items()}

    def stretch(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """As `Engine.stretch`."""
        return self.state[name, kind][start : start + length]

    def load(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """As `Engine.load`."""
        for name, (start, length) in self.shares().items():
            for kind in self.kinds:
                self.stretch(name, kind, start, length).copy_(read(name, kind, start, length))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("tiny", "b16", "l16", "h14-state"), default="b16")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vitscale-checkpoint-benchmark"), help="on the disk to measure; removed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    if "RANK" in os.environ:
        one_rank(flags)
        sys.stdout.flush()
        os._exit(0)  # as vitscale.train does
    port, ranks = str(free_port()), []
    for rank in range(flags.ranks):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": flags.ranks, "LOCAL_WORLD_SIZE": flags.ranks}
        environment = os.environ | {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(subprocess.Popen([sys.executable, "-m", "benchmarks.checkpoint", *sys.argv[1:]], env=environment))
    sys.exit(max(rank.wait() for rank in ranks))


def one_rank(flags: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    init_distributed()
    model = {"tiny": TINY, "b16": vit("b16"), "l16": vit("l16"), "h14-state": vit("h14")}[flags.case]
    held: Any = BareState(model) if flags.case == "h14-state" else in_training(model)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {"torch": torch.__version__, "deepspeed": importlib.metadata.version("deepspeed")},
        "case": flags.case,
        "ranks": flags.ranks,
        "parameters": sum(shape.numel() for shape in held.shapes.values()),
        "kinds": list(held.kinds),
        "rows": [],
    }
    base = resident()
    shutil.rmtree(flags.folder, ignore_errors=True)
    for repeat in range(flags.repeats + 1):  # the first is not counted
        for name in CONTESTANTS:
            dist.barrier()
            row = {"contestant": name, "repeat": repeat} | measure(name, held, model, flags.folder, base)
            if dist.get_rank() == 0 and repeat:
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                result["medians"] = medians(result["rows"])
                flags.results.mkdir(parents=True, exist_ok=True)
                file = flags.results / f"{result['date'][:10]}-checkpoint-{flags.case}-{flags.ranks}.json"
                file.write_text(json.dumps(result, indent=1) + "\n")
    if dist.get_rank() == 0:
        print(json.dumps(result["medians"], indent=1))


def in_training(model: ViTConfig) -> Engine:
    """An engine that has made a step."""
    plain = ViT(model)
    initialize(plain, 0)
    engine = Engine(plain, EngineConfig(zero_stage=1, precision="fp32"), OptimizerConfig(), micro_batch_size=1, grad_accum_steps=1)
    engine.backward(engine.forward(torch.randn(1, 3, *model.image_size)).sum())
    engine.step(1e-4)
    return engine


def measure(name: str, held: Any, model: ViTConfig, folder: Path, base: int) -> dict[str, float]:
    """One checkpoint, written and loaded; times are the slowest rank's, memory the largest rank's."""
    found: dict[str, float] = {}
    forget_peak()
    if name == "vitscale":
        with timed(found, "prepare"):
            saver = Saver(folder, held, Policy(newest=1), 0)
        dist.barrier()
        begun = time.perf_counter()
        about = checkpoint.Description(folder, model, PreprocessConfig(), ObjectiveConfig(), None, 1, 1)
        assert saver.snapshot(about)
        found["stall"] = time.perf_counter() - begun
        saver.finish()
        found["write"] = time.perf_counter() - begun

        def load() -> None:
            newest, _ = checkpoint.newest_durable(folder)
            assert newest is not None
            held.load(TensorReader(checkpoint.describe(newest)).stretch, 1)

    elif name == "deepspeed":
        begun = time.perf_counter()
        if isinstance(held, Engine):
            held.deepspeed.save_checkpoint(str(folder), tag="deepspeed")
        else:
            folder.mkdir(exist_ok=True)
            torch.save(partition(held), folder / f"torch-{dist.get_rank()}.pt")
        found["stall"] = found["write"] = time.perf_counter() - begun

        def load() -> None:
            if isinstance(held, Engine):
                held.deepspeed.load_checkpoint(str(folder), tag="deepspeed")
                return
            loaded = torch.load(folder / f"torch-{dist.get_rank()}.pt", mmap=True, weights_only=True)
            for key, tensor in partition(held).items():
                tensor.copy_(loaded[key])

    else:
        begun = time.perf_counter()
        state = partition(held)
        if name == "dcp":
            dcp.save(state, checkpoint_id=folder / name)
            found["stall"] = found["write"] = time.perf_counter() - begun
        else:
            writing = dcp.async_save(state, checkpoint_id=folder / name)
            found["stall"] = time.perf_counter() - begun
            getattr(writing, "upload_completion", writing).result()
            found["write"] = time.perf_counter() - begun

        def load() -> None:
            dcp.load(state, checkpoint_id=folder / name)

    dist.barrier()
    found["peak_mib"] = (status_bytes("VmHWM") - base) / 2**20
    forget_peak()
    with timed(found, "load"):
        load()
    found["peak_mib_loading"] = (status_bytes("VmHWM") - base) / 2**20
    slowest = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    bytes_written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        os.sync()  # so that nobody pays for what another left to be written
    return {key: round(value, 4) for key, value in zip(found, slowest.tolist(), strict=True)} | {"mb": bytes_written / 1e6}


def partition(held: Any) -> dict[str, Tensor]:
    """The stretches that this rank holds, by names of their own."""
    stretches = ((name, kind, *share) for name, share in held.shares().items() for kind in held.kinds)
    return {f"{kind}/{name}/{start}": held.stretch(name, kind, start, length) for name, kind, start, length in stretches if length}


class timed:  # noqa: N801 - used as a function
    """Notes how long a block took."""

    def __init__(self, found: dict[str, float], name: str) -> None:
        self.found, self.name = found, name

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.found[self.name] = time.perf_counter() - self.begun


def resident() -> int:
    release()
    return status_bytes("VmRSS")


def forget_peak() -> None:
    """Lets the kernel count this process's peak memory from here on."""
    release()
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A size of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def release() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each contestant's rows, and stalls over DeepSpeed's in the same turn."""
    found: dict[str, Any] = {}
    theirs = {row["repeat"]: row["stall"] for row in rows if row["contestant"] == "deepspeed"}
    for name in CONTESTANTS:
        mine = [row for row in rows if row["contestant"] == name]
        if mine:
            found[name] = {of: round(statistics.median(row[of] for row in mine), 4) for of in mine[0] if of not in ("contestant", "repeat")}
            if ratios := [row["stall"] / theirs[row["repeat"]] for row in mine if row["repeat"] in theirs]:
                found[name]["stall_over_deepspeed"] = round(statistics.median(ratios), 4)
    return found


if __name__ == "__main__":
    main()
