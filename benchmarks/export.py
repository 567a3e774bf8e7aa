"""Exports of a checkpoint that many ranks wrote, beside DeepSpeed's zero_to_fp32: time, memory, and whether they are equal.

    python -m benchmarks.export --save                       a ViT-H/14 (632 M) of 8 ranks of ZeRO-3 in bf16
    python -m benchmarks.export --model ti16 --ranks 2       a look at whether it runs

Ranks over gloo make a step of SGD, without moments so that eight fit, and write the same state twice, by `saving.Saver` and by DeepSpeed's
`save_checkpoint`. Then each contestant converts it in a process of its own, in turns over the repeats, its files in the page cache:

    timm, hf, safetensors, npz      `export.export` of our checkpoint; npz is lossy, for big_vision has another GELU
    zero_to_fp32                    DeepSpeed's conversion as it comes: shards of 5 GB at the most, torch.save
    zero_to_fp32 safetensors        the same with `safe_serialization`
    zero_to_fp32 lazy               its lazy tensors, made and written one after the other by `tensorfiles.write_safetensors`

start      what the process holds once all that it needs is imported, and nothing is read
weights    from there until all weights are written: seconds, and the most that the process held: resident (VmHWM, where pages of mapped
           files count), and anonymous (RssAnon, looked at each 2 ms), which no machine can drop
rest       ours alone: the certificate, for which the model runs, sums of files, and waiting until all is on disk

Nothing is subtracted. `equal` says whether each tensor has the bits that `zero_to_fp32 safetensors` gives; where a format has other
position embeddings, the bits that follow from those.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.distributed import ROOT, run_on_ranks
from vitscale import checkpoint
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig, from_dict
from vitscale.finding import find_checkpoint
from vitscale.recipes import vit
from vitscale.weights import TensorReader

if TYPE_CHECKING:
    from vitscale.model import ViT

MODELS = {
    "h14": vit("h14", num_classes=1000, image_size=(28, 28)),  # weights as at any size but for the positions; activations that take nothing
    "ti16": vit("ti16", num_classes=10, image_size=(32, 32)),
}
REFERENCE = "zero_to_fp32 safetensors"
CONTESTANTS = ("timm", "hf", "safetensors", "npz", "zero_to_fp32", REFERENCE, "zero_to_fp32 lazy")
_SMALL = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "sub_group_size"), 10**7)


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and what to convert it to."""

    model: str = "h14"
    """h14 or ti16."""
    ranks: int = 8
    zero_stage: int = 3
    precision: str = "bf16"
    only: tuple[str, ...] = CONTESTANTS
    """Contestants."""
    repeats: int = 3
    folder: Path = Path("/tmp/vitscale-export-benchmark")
    """On the disk to measure; removed."""
    keep: bool = False
    """Leave the checkpoints there, and take those that an earlier call left."""
    save: bool = False
    """Write a dated JSON file."""
    results: Path = Path(__file__).parent / "results"
    """Where to."""


def main() -> None:
    import tyro

    config = tyro.cli(ExportConfig, description=__doc__)
    result = compare(config)
    print("\n".join(row_text(name, row) for name, row in result["medians"].items()))
    if config.save:
        config.results.mkdir(parents=True, exist_ok=True)
        file = config.results / f"{result['date'][:10]}-export-{config.model}-{config.ranks}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved {file}")


def compare(config: ExportConfig) -> dict[str, Any]:
    """Writes the checkpoints, and converts them: all rows, and each contestant's medians."""
    if not config.keep:
        shutil.rmtree(config.folder, ignore_errors=True)
    try:
        if not (config.folder / "ours" / "checkpoints").exists():
            config.folder.mkdir(parents=True, exist_ok=True)
            written = {"model": asdict(MODELS[config.model]), "zero_stage": config.zero_stage, "precision": config.precision}
            with tempfile.TemporaryDirectory() as logs:
                run_on_ranks("benchmarks.export:write", config.ranks, written | {"folder": str(config.folder)}, Path(logs))
        weights = checkpoint.describe(find_checkpoint(str(config.folder / "ours"))).tensors
        shutil.rmtree(config.folder / "reference", ignore_errors=True)
        convert(REFERENCE, config.folder, config.folder / "reference")
        rows = []
        for repeat in range(config.repeats):
            for name in config.only:
                os.sync()  # so that nobody pays for what another left to be written
                out = config.folder / "out"
                row = {"contestant": name, "repeat": repeat} | convert(name, config.folder, out)
                row |= {"load": os.getloadavg()[0], "equal": is_equal(out, config.folder)}
                shutil.rmtree(out)
                rows.append(row)
                print(json.dumps(row), flush=True)
    finally:
        if not config.keep:
            shutil.rmtree(config.folder)
    settings = ("model", "ranks", "zero_stage", "precision", "repeats")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        **{name: getattr(config, name) for name in settings},
        "parameters": sum(math.prod(tensor.shape) for tensor in weights if tensor.kind == checkpoint.WEIGHT),
        "medians": {name: medians([row for row in rows if row["contestant"] == name]) for name in config.only},
        "rows": rows,
    }


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a contestant's rows; equal where all of them are."""
    numbers = [of for of in rows[0] if of not in ("contestant", "repeat", "equal")]
    return {of: round(statistics.median(row[of] for row in rows), 2) for of in numbers} | {"equal": all(row["equal"] for row in rows)}


def row_text(name: str, row: dict[str, Any]) -> str:
    said = f"{name:26}start {row['start_mb']:5.0f} MB ({row['start_anonymous_mb']:5.0f})  "
    said += f"weights {row['weights_s']:6.1f} s {row['weights_mb']:6.0f} MB ({row['weights_anonymous_mb']:6.0f})  "
    if "rest_s" in row:
        said += f"rest {row['rest_s']:6.1f} s {row['rest_mb']:6.0f} MB  "
    return said + ("equal" if row["equal"] else "NOT EQUAL")


# ---------------------------------------------------------------------------------------------------------------------------------------
# The checkpoints, on each rank
# ---------------------------------------------------------------------------------------------------------------------------------------


def write(payload: dict[str, Any]) -> None:
    """Makes a step, from weights that are not zero, and two checkpoints of what came of it."""
    import torch
    import torch.distributed as dist

    from benchmarks.checkpoint import release
    from vitscale.checkpoint import Description
    from vitscale.engine import Engine
    from vitscale.retention import Policy
    from vitscale.saving import Saver

    folder, config = Path(payload["folder"]), from_dict(ViTConfig, payload["model"], "model")
    settings = EngineConfig(payload["zero_stage"], payload["precision"], deepspeed={"zero_optimization": _SMALL})
    model, optimizer = shared_model(config, folder / "start"), OptimizerConfig("sgd", momentum=0.0)
    engine = Engine(model, settings, optimizer, micro_batch_size=1, grad_accum_steps=1)
    release()  # what malloc keeps of the whole model that each rank began with
    engine.backward(engine.forward(torch.randn(1, 3, *config.image_size)).square().mean())
    assert engine.step(1e-2)
    if dist.get_rank() == 0:
        (folder / "start").unlink()
    engine.deepspeed.save_checkpoint(str(folder / "theirs"), tag="step")
    release()  # what malloc keeps of what DeepSpeed copied to write it
    saver = Saver(folder / "ours", engine, Policy(newest=1), 0)
    assert saver.snapshot(Description(folder, config, PreprocessConfig(eval_crop=1), ObjectiveConfig(), None, 1, 1))
    saver.finish()


def shared_model(config: ViTConfig, file: Path) -> "ViT":
    """A model whose weights all ranks map from one file: with a ViT-H of its own each, eight ranks would begin with 20 GB."""
    import torch
    import torch.distributed as dist

    from vitscale.model import ViT

    with torch.device("meta"):
        model = ViT(config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    if dist.get_rank() == 0:
        with open(file, "wb") as made:
            made.truncate(sum(sizes) * 4)
    dist.barrier()
    whole = torch.from_file(str(file), shared=True, size=sum(sizes))
    if dist.get_rank() == 0:
        whole.uniform_(-0.02, 0.02)
    dist.barrier()
    named = zip(model.named_parameters(), whole.split(sizes), strict=True)
    model.load_state_dict({name: flat.view(of.shape) for (name, of), flat in named}, assign=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------------------------
# A conversion, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------------------------


def convert(name: str, folder: Path, out: Path) -> dict[str, float]:
    """What a contestant takes to convert the checkpoint in `folder` to `out`."""
    command = [sys.executable, "-c", "import sys, benchmarks.export as export; export.measure(*sys.argv[1:])", name, str(folder), str(out)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{name} failed\n{told.stderr[-4000:]}")
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return found


def measure(name: str, folder: str, out: str) -> None:
    """Converts, and prints what it took."""
    conversion = (theirs if name.startswith("zero_to_fp32") else ours)(name, Path(folder), Path(out))
    found = {f"start_{of}": size for of, size in sizes().items()}
    most = 0.0
    over = threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, sizes()["anonymous_mb"])

    def mark(phase: str) -> None:
        nonlocal most, begun
        found.update({f"{phase}_s": time.perf_counter() - begun, f"{phase}_mb": status_mb("VmHWM"), f"{phase}_anonymous_mb": most})
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak from here on
        begun, most = time.perf_counter(), 0.0

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    conversion(mark)
    over.set()
    thread.join()
    print(json.dumps({of: round(value, 3) for of, value in found.items()}))


def ours(name: str, folder: Path, out: Path) -> Callable[[Callable[[str], None]], None]:
    from vitscale.export import export

    def conversion(mark: Callable[[str], None]) -> None:
        def told(done: int, total: int) -> None:
            if done == total:
                mark("weights")

        description = checkpoint.describe(find_checkpoint(str(folder / "ours")))
        export(description, "weight", out, to=name, lossy=name == "npz", progress=told)  # type: ignore[arg-type]
        mark("rest")

    return conversion


def theirs(name: str, folder: Path, out: Path) -> Callable[[Callable[[str], None]], None]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict, get_fp32_state_dict_from_zero_checkpoint

    from vitscale.tensorfiles import write_safetensors

    def conversion(mark: Callable[[str], None]) -> None:
        if name.endswith("lazy"):
            lazy = get_fp32_state_dict_from_zero_checkpoint(str(folder / "theirs"), tag="step", lazy_mode=True)
            out.mkdir()
            write_safetensors(out / "model.safetensors", {of: tuple(lazy[of].shape) for of in lazy}, lambda of: lazy[of].contiguous())
        else:
            convert_zero_checkpoint_to_fp32_state_dict(str(folder / "theirs"), str(out), safe_serialization=name == REFERENCE, tag="step")
        mark("weights")

    return conversion


def sizes() -> dict[str, float]:
    return {"mb": status_mb("VmRSS"), "anonymous_mb": status_mb("RssAnon")}


def status_mb(field: str) -> float:
    """A size of /proc/self/status, in MB of 10^6 bytes."""
    return next(int(line.split()[1]) * 1024 / 1e6 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def is_equal(out: Path, folder: Path) -> bool:
    """Whether what was written has the bits of the reference."""
    import torch

    from vitscale.model import parameter_shapes
    from vitscale.targets import position_tensors
    from vitscale.tensorfiles import open_tensors

    reference = open_tensors(folder / "reference" / "model.safetensors")
    if (out / checkpoint.EXPORT_DESCRIPTION).exists():
        description = checkpoint.describe(out)
        model = checkpoint.describe(find_checkpoint(str(folder / "ours"))).model
        positions = position_tensors(model, description.model, reference.read)
        reader, names = TensorReader(description), parameter_shapes(description.model)
        return all(torch.equal(reader.whole(name, "weight"), positions.get(name, reference.read(name))) for name in names)
    written = open_tensors(next(file for file in out.iterdir() if file.suffix in (".bin", ".safetensors")))
    return written.shapes == reference.shapes and all(torch.equal(written.read(name), reference.read(name)) for name in reference.shapes)


if __name__ == "__main__":
    main()
