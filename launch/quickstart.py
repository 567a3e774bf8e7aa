"""`vitscale quickstart`: the whole road on this machine, on real images, as the commands that a user would type.

    OUT/quickstart.json     which images and seed, and the seconds of each stage; written first, so that OUT is known as a quickstart's
    OUT/images/             PNG class folders: classes to pre-train on, and downstream classes that pre-training never sees
    OUT/data/               both as datasets, each with a training and a held-out split
    OUT/runs/               pretrain, finetune (from it, at a higher resolution), scratch (the same steps and data from random weights)
    OUT/evaluation-*.json   held-out accuracy of the three, what `vitscale evaluate --json` prints
    OUT/export/             the fine-tuned model for timm
    OUT/report.html         the page (vitscale/report.py)

A stage is a command line: what is printed is what is run, through the same door. It is skipped where what it makes is there, so the
same call resumes an interrupted road, and shows the table of a finished one.
"""

import contextlib
import gzip
import io
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from launch.ranks import visible_gpus
from launch.terminal import VerbError, print_json
from launch.verbs import VERBS
from vitscale.metrics import duration
from vitscale.run import is_finished, write_json

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

Labelled = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # uint8 images (n, height, width) and their labels (n,)

RUNS = {"pretrain": "pre-trained, on its own classes", "finetune": "fine-tuned", "scratch": "from scratch"}
# Of SGD (0.03, 0.1) and AdamW (3e-4, 1e-3, 3e-3), AdamW at 3e-3 was best for the model from scratch.
SCRATCH_FLAGS = (
    "--epochs 0 --steps 100 --preprocess.crop-scale 0.6 1 --log-every 5 --eval-every 25 --schedule.warmup-steps 10 --optimizer.peak-lr 3e-3"
)


@dataclass(frozen=True)
class QuickstartFlags:
    """Packs real images, pre-trains a small ViT, fine-tunes it on other classes, and compares it with training from scratch."""

    out: str = "quickstart"
    """Folder for everything; a quickstart that is there goes on, or shows its table."""
    images: Literal["auto", "digits", "fashion-mnist"] = "auto"
    """scikit-learn's digits (8 px), or Fashion-MNIST (28 px) of Debian's package dataset-fashion-mnist, which auto takes if it is there."""
    nproc: int = 0
    """Training processes, over which ZeRO partitions the optimizer; 0 starts one a GPU, or two on a machine without."""
    seed: int = 0
    """Of the labelled images chosen and of the three runs."""
    json: bool = False
    """Print the result as JSON; what happens goes to standard error."""


@dataclass(frozen=True)
class Road:
    """What differs between the two sets of images."""

    title: str
    recipe: str
    classes: tuple[str, ...]
    downstream: tuple[str, ...]
    """Classes to fine-tune on; pre-training has the others."""
    train_images: int
    """A class, at most, for pre-training."""
    labelled_images: int
    """A class, downstream."""
    held_out_images: int
    """A class, at most."""
    size: int
    """Native pixels a side, of fine-tuning and of training from scratch."""
    pretrain_flags: str
    margin: float
    """By which the fine-tuned model's top-1 must exceed that of the one from scratch; tests/launch/test_quickstart.py has measured ones."""


ROADS = {
    "digits": Road(
        "handwritten digits", "tiny-digits", tuple("0123456789"), ("4", "6", "8", "9"), train_images=1_000, labelled_images=5,
        held_out_images=1_000, size=8, pretrain_flags="--epochs 60", margin=0.03,
    ),
    "fashion-mnist": Road(
        "Fashion-MNIST", "tiny-fashion", FASHION_CLASSES, ("dress", "coat", "shirt", "ankle-boot"), train_images=6_000, labelled_images=10,
        held_out_images=500, size=28, pretrain_flags="--epochs 3 --log-every 25 --eval-every 500", margin=0.03,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One command of the road."""

    name: str
    verb: str
    words: tuple[str, ...]
    finished: Callable[[], bool]
    """Whether what it makes is there, whole: all but a run is written beside and renamed into place."""
    printed_to: Path | None = None
    """The file that its output goes to."""

    @property
    def command(self) -> str:
        """What a user types for it."""
        redirected = f" > {shlex.quote(str(self.printed_to))}" if self.printed_to else ""
        return f"vitscale {self.verb} {shlex.join(self.words)}{redirected}"

    def run(self) -> None:
        """Does what the command would do in a shell; the file is written whole or not at all."""
        with contextlib.redirect_stdout(io.StringIO()) if self.printed_to else contextlib.nullcontext() as printed:
            VERBS[self.verb](list(self.words))
        if printed and self.printed_to:
            result = json.loads(printed.getvalue())
            write_json(self.printed_to, result)
            print(f"top-1 {result['top1']:.2%} of {result['samples']:,} held-out images")


def quickstart(flags: QuickstartFlags) -> None:
    """Goes the road from wherever it was left. Raises VerbError where OUT is something else, or the result is not what it should be."""
    out = Path(flags.out)
    state = open_folder(out, flags)
    road, todo = ROADS[state["images"]], stages(out, state["images"], flags.nproc or visible_gpus() or 2, flags.seed)
    with contextlib.redirect_stdout(sys.stderr) if flags.json else contextlib.nullcontext():
        if not (out / "images").exists():
            print(f"writing {road.title} as PNG class folders to {out}/images", flush=True)
            write_images(out / "images", state["images"], flags.seed)
        for number, stage in enumerate(todo, start=1):
            print(f"\n[{number}/{len(todo)}] {stage.name}\n$ {stage.command}", flush=True)
            if stage.finished():
                print("done before")
                continue
            started = time.monotonic()
            try:
                stage.run()
            finally:  # an interrupted stage goes on later, and its time adds up
                state["seconds"][stage.name] = state["seconds"].get(stage.name, 0) + time.monotonic() - started
                write_json(out / "quickstart.json", state)
        rows, seconds = table(out, road, state["seconds"]), sum(state["seconds"].values())
        from vitscale.report import write_report

        runs = {name: out / "runs" / name for name in RUNS}
        write_report(out / "report.html", road.title, rows, seconds, [stage.command for stage in todo], runs, out / "data/downstream")
        print(f"\n{format_table(rows)}\n\n{duration(seconds)} in all; {out}/report.html shows curves, predictions and embeddings")
    if flags.json:
        print_json({"out": str(out), "images": state["images"], "seed": state["seed"], "seconds": seconds, "rows": rows})
    finetuned, scratch = rows[1]["top1"], rows[2]["top1"]
    if finetuned < scratch + road.margin:
        raise VerbError(
            f"the fine-tuned model has {finetuned:.2%} top-1 and the one from scratch {scratch:.2%}; it should be {road.margin:.0%} ahead"
        )


def open_folder(out: Path, flags: QuickstartFlags) -> dict[str, Any]:
    """What OUT/quickstart.json says, which is made where OUT is new. Raises VerbError where OUT is something else or another quickstart."""
    file = out / "quickstart.json"
    if file.is_file():
        state: dict[str, Any] = json.loads(file.read_text())
        asked = {"images": state["images"] if flags.images == "auto" else flags.images, "seed": flags.seed}
        for name, value in asked.items():
            if state[name] != value:
                raise VerbError(f"{out} holds a quickstart with {name} {state[name]}, not {value}; give another --out")
        return state
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VerbError(f"{out} exists and is not a quickstart's folder; give another --out")
    if flags.images == "fashion-mnist" and not FASHION_MNIST.is_dir():
        raise VerbError(f"{FASHION_MNIST} is not there; install Debian's package dataset-fashion-mnist, or use --images digits")
    images = ("fashion-mnist" if FASHION_MNIST.is_dir() else "digits") if flags.images == "auto" else flags.images
    if (flags.images, images) == ("auto", "digits"):
        print(f"scikit-learn's digits are used: Debian's package dataset-fashion-mnist ({FASHION_MNIST}) is not there", file=sys.stderr)
    state = {"images": images, "seed": flags.seed, "seconds": {}}
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, state)
    return state


def stages(out: Path, images: str, nproc: int, seed: int) -> list[Stage]:
    """The commands, in order. The model from scratch gets the steps, images, augmentation and resolution of the fine-tuned one."""
    road = ROADS[images]
    size = ("--model.image-size", str(road.size), str(road.size))
    pretrained = out / "runs/pretrain"

    def pack(task: str, split: str) -> Stage:
        made = out / "data" / task
        words = (str(out / "images" / task / split), str(made), "--split", split)
        return Stage(f"pack {task} {split}", "pack", words, (made / split).exists)

    def train(name: str, verb: str, recipe: str, task: str, *flags: str) -> Stage:
        run = out / "runs" / name
        where = ("--data", str(out / "data" / task / "train"), "--out", str(run))
        words = (recipe, *where, *flags, "--nproc", str(nproc), "--seed", str(seed))
        return Stage(name, verb, words, lambda: is_finished(run))

    def evaluate(name: str, task: str) -> Stage:
        file = out / f"evaluation-{name}.json"
        words = (str(out / "runs" / name), "--data", str(out / "data" / task / "val"), "--json")
        return Stage(f"evaluate {name}", "evaluate", words, file.exists, file)

    return [
        *(pack(task, split) for task in ("pretrain", "downstream") for split in ("train", "val")),
        train("pretrain", "pretrain", road.recipe, "pretrain", *road.pretrain_flags.split()),
        train("finetune", "finetune", "tiny-finetune", "downstream", "--init", str(pretrained), *size),
        train("scratch", "pretrain", road.recipe, "downstream", *size, *SCRATCH_FLAGS.split()),
        *(evaluate(name, task) for name, task in zip(RUNS, ("pretrain", "downstream", "downstream"), strict=True)),
        Stage("export", "checkpoint export", (str(out / "runs/finetune"), str(out / "export")), (out / "export").exists),
    ]


# -- The result -------------------------------------------------------------------------------------------------------------------------


def table(out: Path, road: Road, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row a model: pre-trained (on its own classes), fine-tuned, from scratch, and guessing."""
    rows: list[dict[str, Any]] = []
    for run, name in RUNS.items():
        result = json.loads((out / f"evaluation-{run}.json").read_text())
        steps = json.loads((out / "runs" / run / "run.json").read_text())["total_steps"]
        rows.append({"model": name, "top1": result["top1"], "images": result["samples"], "steps": steps, "seconds": seconds[run]})
    return [*rows, {"model": "guessing", "top1": 1 / len(road.downstream), "images": rows[1]["images"], "steps": 0, "seconds": 0.0}]


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [f"{'held out':<30} {'top-1':>8} {'images':>7} {'steps':>6} {'seconds':>8}"]
    lines += [f"{r['model']:<30} {r['top1']:>8.2%} {r['images']:>7,} {r['steps']:>6,} {r['seconds']:>8.1f}" for r in rows]
    return "\n".join(lines)


# -- Images -----------------------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, images: str, seed: int) -> None:
    """FOLDER/{pretrain,downstream}/{train,val}/CLASS/*.png, whole or not at all."""
    road = ROADS[images]
    train, held_out = (read_fashion_mnist("train"), read_fashion_mnist("t10k")) if images == "fashion-mnist" else read_digits()
    beside = folder.with_name(".images.partial")
    shutil.rmtree(beside, ignore_errors=True)
    for task, count in (("pretrain", road.train_images), ("downstream", road.labelled_images)):
        classes = [label for label, name in enumerate(road.classes) if (name in road.downstream) == (task == "downstream")]
        write_class_folders(beside / task / "train", sample_classes(train, classes, count, seed), road.classes)
        write_class_folders(beside / task / "val", sample_classes(held_out, classes, road.held_out_images, seed), road.classes)
    beside.rename(folder)


def read_fashion_mnist(split: Literal["train", "t10k"]) -> Labelled:
    """60,000 training or 10,000 test images of 28 x 28 pixels, in the IDX format."""
    images = gzip.decompress((FASHION_MNIST / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION_MNIST / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def read_digits() -> tuple[Labelled, Labelled]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; the last third is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def sample_classes(of: Labelled, classes: list[int], count: int, seed: int) -> Labelled:
    """`count` images (or all there are) of each class."""
    images, labels = of
    chosen: list[int] = []
    for label in classes:
        there = np.flatnonzero(labels == label).tolist()
        chosen += random.Random(f"{seed} {label}").sample(there, min(count, len(there)))
    return images[chosen], labels[chosen]


def write_class_folders(folder: Path, of: Labelled, names: tuple[str, ...]) -> None:
    """FOLDER/CLASS/NUMBER.png."""
    for number, (image, label) in enumerate(zip(*of, strict=True)):
        path = folder / names[label] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
