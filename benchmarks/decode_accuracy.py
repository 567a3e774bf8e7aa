"""What fast decoding costs in accuracy: the same trainings with `stream.decode` exact and fast, evaluated with both kinds of pixels.

    python benchmarks/decode_accuracy.py            # some 6 minutes on two cores
    python benchmarks/decode_accuracy.py --quick    # that it runs; its figures mean nothing

Two tasks, chosen so that images are made much smaller on the way and the fast mode has something to leave out:

    fashion        Fashion-MNIST of Debian's dataset-fashion-mnist, enlarged to 112-pixel JPEGs: 20,000 to learn from, all 10,000 of the
                   test set to ask about
    photographs    of which photograph of Debian's mate-backgrounds and opencv-doc is a picture of 320 x 240 pixels a part? Those to learn
                   from are parts of its left two thirds, those to ask about of its right third

A seed gives both modes the same weights, order and crops, so pixels are all that differs. An evaluation shows the whole image, by Pillow
("exact": what `vitscale evaluate` and users of an export have) or by the fast mode. The table has the mean over the seeds and in brackets
the standard deviation; the last column is the mean of the differences at equal seed, fast less exact, and their standard error.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import photographs
from loader_systems import open_stream, versions
from PIL import Image

from launch.quickstart import FASHION_CLASSES, FASHION_MNIST, Labelled, read_fashion_mnist
from vitscale.config import ObjectiveConfig, PreprocessConfig, ScheduleConfig, ViTConfig

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))
BATCH, PEAK_LR = 64, 2e-3
Mode = Literal["exact", "fast"]
MODES: tuple[Mode, ...] = ("exact", "fast")


@dataclass(frozen=True)
class Task:
    """What is learnt, by which model, from which part of an image, for how long."""

    write: Callable[[Path, int, int], None]
    """(folder, images to learn from, images to ask about): class folders `train` and `val` of JPEG files."""
    images: tuple[int, int]
    model: ViTConfig
    crop_scale: tuple[float, float]
    steps: int


def main() -> None:
    """All trainings, as many at once as there are cores; a table; a dated file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of every training; 0: as many as its task has")
    parser.add_argument("--quick", action="store_true", help="few images and steps")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--one", nargs=4, metavar=("TASK", "MODE", "SEED", "STEPS"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        task, mode, seed, steps = flags.one
        print(json.dumps(trained(flags.folder, TASKS[task], mode, int(seed), int(steps))))
        return
    if flags.quick:
        flags.seeds, flags.steps = 2, 3
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{CORES} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
        "tasks": {},
    }
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder, concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        for name in flags.tasks:
            task = TASKS[name]
            home = Path(folder) / name
            task.write(home, *((128, 64) if flags.quick else task.images))
            for split in ("train", "val"):
                photographs.packed(home / split, home / "packed", samples_per_shard=1000, split=split)
            steps = flags.steps or task.steps
            waiting = {(mode, seed): pool.submit(apart, home, name, mode, seed, steps) for seed in range(flags.seeds) for mode in MODES}
            found = {of: future.result() for of, future in waiting.items()}
            result["tasks"][name] = {"steps": steps} | summary(found, flags.seeds)
            print_table(name, result["tasks"][name])
    flags.results.mkdir(parents=True, exist_ok=True)
    file = flags.results / f"{result['date'][:10]}-decode-accuracy.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {file}")


def apart(home: Path, task: str, mode: Mode, seed: int, steps: int) -> dict[str, float]:
    """One training in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--folder", str(home), "--one", task, mode, str(seed), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- What is learnt ---------------------------------------------------------------------------------------------------------------------


def write_fashion(folder: Path, learnt: int, asked: int) -> None:
    """112-pixel JPEGs of Fashion-MNIST's 28-pixel images."""
    if not FASHION_MNIST.is_dir():
        raise SystemExit(f"{FASHION_MNIST} is not there: install Debian's package dataset-fashion-mnist")
    sets: dict[str, tuple[Labelled, int]] = {"train": (read_fashion_mnist("train"), learnt), "val": (read_fashion_mnist("t10k"), asked)}
    for split, ((images, labels), count) in sets.items():
        for number in range(count):
            path = folder / split / FASHION_CLASSES[labels[number]] / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            enlarged = Image.fromarray(images[number]).resize((112, 112), Image.Resampling.BICUBIC)
            enlarged.convert("RGB").save(path, quality=photographs.QUALITY)


def write_photographs(folder: Path, learnt: int, asked: int) -> None:
    """Parts of photographs, of 320 x 240 pixels; a photograph is a class, and its sides are kept apart."""
    rng = np.random.default_rng(0)
    for label, image in enumerate(whole := photographs.sources(1024, 768)):
        border = image.width * 2 // 3
        sides = {"train": (image.crop((0, 0, border, image.height)), learnt), "val": (image.crop((border, 0, *image.size)), asked)}
        for split, (side, count) in sides.items():
            path = folder / split / f"photograph-{label:02d}"
            path.mkdir(parents=True)
            for number in range(-(-count // len(whole))):
                share = rng.uniform(0.5, 1)
                width = int(min(side.width, side.height * 4 / 3) * share)
                height = width * 3 // 4
                left, top = int(rng.integers(0, side.width - width + 1)), int(rng.integers(0, side.height - height + 1))
                part = side.resize((320, 240), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height), reducing_gap=3.0)
                part.save(path / f"{number:04d}.jpg", quality=photographs.QUALITY)


TASKS = {
    "fashion": Task(
        write_fashion, (20_000, 10_000), ViTConfig(depth=4, width=64, mlp_dim=128, num_heads=4, patch_size=4, image_size=(28, 28)),
        crop_scale=(0.6, 1.0), steps=800,
    ),
    "photographs": Task(
        write_photographs, (2_600, 1_040), ViTConfig(depth=4, width=64, mlp_dim=128, num_heads=4, patch_size=8, image_size=(48, 48)),
        crop_scale=(0.3, 1.0), steps=800,
    ),
}  # fmt: skip


# -- One training -----------------------------------------------------------------------------------------------------------------------


def trained(home: Path, task: Task, mode: Mode, seed: int, steps: int) -> dict[str, float]:
    """Top-1 of what was learnt, with the pixels of both modes."""
    import torch

    from data_tools.dataset import Dataset
    from vitscale.model import ViT, initialize, normalize
    from vitscale.objective import compute_loss
    from vitscale.optim import learning_rate, split_by_decay

    torch.set_num_threads(1)
    train, val = home / "packed" / "train", home / "packed" / "val"
    size, preprocess = task.model.image_size[0], PreprocessConfig()
    model = ViT(dataclasses.replace(task.model, num_classes=Dataset.open(train).num_classes))
    initialize(model, seed)
    kernels, others = split_by_decay(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW([{"params": kernels, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    schedule = ScheduleConfig("cosine", warmup_steps=min(100, steps // 3))
    view = {"crop_scale": task.crop_scale, "flip": 0.0}
    stream = open_stream(train, BATCH, size, preprocess=view, seed=seed, workers=1, decode=mode)
    for step, batch in enumerate(stream.micro_batches(0, steps * BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_LR, schedule)
        logits_BK = model(normalize(torch.from_numpy(batch.images_BHWC), preprocess), torch.from_numpy(batch.keys_B))
        loss = compute_loss(logits_BK, torch.from_numpy(batch.labels_BL), torch.from_numpy(batch.scores_BL), ObjectiveConfig("softmax"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def top1(pixels: Mode) -> float:
        """Of whole images: a stream without random crops, for exactly one epoch of all that fills batches."""
        batches = open_stream(val, BATCH, size, preprocess={"crop_scale": (1.0, 1.0), "flip": 0.0}, workers=1, decode=pixels)
        samples = Dataset.open(val).num_samples // BATCH * BATCH
        right = 0
        with torch.inference_mode():
            for batch in batches.micro_batches(0, samples):
                guessed = model(normalize(torch.from_numpy(batch.images_BHWC), preprocess)).argmax(1)
                right += int((guessed == torch.from_numpy(batch.labels_BL[:, 0])).sum())
        return right / samples

    return {f"evaluated {pixels}": top1(pixels) for pixels in MODES} | {"loss": float(loss.detach())}


# -- The table --------------------------------------------------------------------------------------------------------------------------


def summary(found: dict[tuple[Mode, int], dict[str, float]], seeds: int) -> dict[str, Any]:
    """Top-1 of each way to train and evaluate, and what training fast changes at equal seed."""
    rows: dict[str, Any] = {}
    for pixels in MODES:
        of = {mode: [found[mode, seed][f"evaluated {pixels}"] for seed in range(seeds)] for mode in MODES}
        changes = [fast - exact for fast, exact in zip(of["fast"], of["exact"], strict=True)]
        rows[f"evaluated {pixels}"] = {
            **{f"trained {mode}": {"top1": of[mode], "mean": statistics.fmean(of[mode]), "std": spread(of[mode])} for mode in MODES},
            "change": {"mean": statistics.fmean(changes), "standard_error": spread(changes) / math.sqrt(seeds)},
        }
    return rows


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(name: str, rows: dict[str, Any]) -> None:
    print(f"{name + ', top-1':24}{'trained exact':>18}{'trained fast':>18}{'change':>20}")
    for pixels in MODES:
        row = rows[f"evaluated {pixels}"]
        texts = (f"{cell['mean']:.2%} ({cell['std']:.2%})" for cell in (row[f"trained {mode}"] for mode in MODES))
        cells = "".join(f"{text:>18}" for text in texts)
        change = f"{row['change']['mean']:+.2%} ± {row['change']['standard_error']:.2%}"
        print(f"{'evaluated ' + pixels:24}{cells}{change:>20}", flush=True)


if __name__ == "__main__":
    main()
