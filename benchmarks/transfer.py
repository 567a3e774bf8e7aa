"""Does pre-training transfer? The road on real images, over seeds, as tables with intervals: docs/results.md.

    python -m benchmarks.transfer --out /scratch/transfer            Fashion-MNIST, five seeds, about four hours of one core
    python -m benchmarks.transfer --out /scratch/transfer --save     and write benchmarks/results/DATE-transfer.json

A small ViT is pre-trained on six of the ten classes, at the images' own 28 pixels and at fewer. On the four others, of which some
images a class are labelled:

    budget       fine-tuned against the same model from random weights: equal images, steps, batch and augmentation, at 28 pixels
    resolution   pre-trained and fine-tuned at 28 pixels, at 14 and at 7, by patches as much smaller: the model sees as many tokens, and
                 spends as much computing, on less of the image
    tokens       both at 28, both at 20, both at 12 pixels with patches of 4: fewer tokens; and pre-trained at 20 and fine-tuned at 28
    shots        the few-shot probe of the features (big_vision's), by shots, of random weights and of pre-training of several lengths

The learning rate of a cell is the best of a grid on a seed that is in no table, judged by training images that nothing is trained on:
the held-out split gives figures alone. Everything is a command of vitscale, on one thread, and what is there is not made again. A seed is
that of the labelled images, the weights and the order. Figures are the mean over seeds with a t interval of 95%; differences are paired
by seed. Needs Debian's dataset-fashion-mnist.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from launch.quickstart import FASHION_CLASSES, read_fashion_mnist, sample_classes, write_class_folders
from vitscale.intervals import mean_interval
from vitscale.metrics import counted
from vitscale.run import is_finished, read_metrics, read_record

RESULTS = Path(__file__).parent / "results"
DOWNSTREAM = ("dress", "coat", "shirt", "ankle-boot")
EPOCHS = (0, 1, 5)  # of pre-training; 0 is random weights
SHOTS = (1, 5, 10, 25)
NATIVE = 28  # pixels a side
PATCHES = {28: 4, 20: 4, 12: 4, 14: 2, 7: 1}  # by pixels a side of an image, those of a patch: 49, 25 and 9 tokens; 49 of 14 and 7
FEW, ALL = (5, 10, 25, 100), (5_000,)  # labelled images a class, at most; of most classes there are no more
STEPS = dict.fromkeys(FEW, 100) | dict.fromkeys(ALL, 1_000)


class Way(NamedTuple):
    """To the four classes: pixels a side in pre-training (None: random weights instead of it), and afterwards."""

    before: int | None
    pixels: int

    def __str__(self) -> str:
        return f"{self.before or 'random'}to{self.pixels}"


NATIVE_WAY, SCRATCH = Way(NATIVE, NATIVE), Way(None, NATIVE)
TABLES = {  # of so many labelled images a class, pairs of which the first is measured against the second on the same seeds
    "budget": (FEW, [(NATIVE_WAY, SCRATCH)]),
    "resolution": (ALL, [(NATIVE_WAY, Way(14, 14)), (NATIVE_WAY, Way(7, 7))]),
    "tokens": (FEW, [(NATIVE_WAY, Way(20, 20)), (NATIVE_WAY, Way(12, 12)), (Way(20, NATIVE), Way(20, 20))]),
}
CELLS = list(dict.fromkeys((way, labelled) for counts, pairs in TABLES.values() for pair in pairs for way in pair for labelled in counts))
LOOK_SEED = 1000  # learning rates are chosen on it
TRAINED_ON = 50_000  # the first images of the training set; the others choose the learning rates
SGD = (0.003, 0.01, 0.03, 0.1, 0.3)  # learning rates around the recipe's: the paper fine-tunes so
SGD_LONG = (0.01, 0.03, 0.1)
ADAMW = (0.0006, 0.002, 0.006, 0.02)  # and tiny-fashion is trained so
THREADS = 1  # figures depend on how many there are
BUDGET = (
    "--schedule.warmup-steps 10 --preprocess.crop-scale 0.6 1.0 --micro-batch-size 64 --eval-every 0 --keep-checkpoints 1 --log-every 25"
)


def verb(*words: object) -> str:
    """Runs a command of vitscale and returns what it prints. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "launch.main", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment).stdout


def prepare(out: Path, seed: int) -> None:
    """Datasets of a seed: six classes for pre-training, and the four others with so many labelled images a class."""
    images, labels = read_fashion_mnist("train")
    held_out = (images[TRAINED_ON:], labels[TRAINED_ON:]) if seed == LOOK_SEED else read_fashion_mnist("t10k")
    downstream = [FASHION_CLASSES.index(name) for name in DOWNSTREAM]
    upstream = [label for label in range(len(FASHION_CLASSES)) if label not in downstream]
    for task, classes, count in [("pretrain", upstream, TRAINED_ON), *((f"downstream-{count}", downstream, count) for count in STEPS)]:
        train = sample_classes((images[:TRAINED_ON], labels[:TRAINED_ON]), classes, count, seed)
        for split, chosen in (("train", train), ("val", sample_classes(held_out, classes, len(held_out[0]), seed))):
            data = out / "data" / f"{task}-{seed}"
            if not (data / split).exists():
                folder = out / "images" / f"{task}-{seed}" / split
                write_class_folders(folder, chosen, FASHION_CLASSES)
                verb("pack", folder, data, "--split", split)


def finished(run: Path, *words: object) -> Path:
    """A run, made unless it is there."""
    if not is_finished(run):
        verb(*words, "--out", run, "--nproc", 1)
    return run


def pretrained(out: Path, seed: int, epochs: int, pixels: int) -> Path:
    """A run of so many epochs; of none, of one step whose learning rate is zero: the weights that a run begins with."""
    words = ["pretrain", "tiny-fashion", "--data", out / "data" / f"pretrain-{seed}" / "train", "--seed", seed, "--micro-batch-size", 64]
    words += ["--model.image-size", pixels, pixels, "--model.patch-size", PATCHES[pixels]]
    none = ("--epochs", 0, "--steps", 1, "--schedule.warmup-steps", 0, "--optimizer.peak-lr", 0)
    return finished(out / "runs" / f"pretrain-{pixels}-{seed}-{epochs}", *words, *(("--epochs", epochs) if epochs else none))


def evaluation(out: Path, run: Path, *words: object) -> dict[str, Any]:
    """What `evaluate` says of a run."""
    file = out / "evaluations" / f"{run.name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(verb("evaluate", run, *words, "--json"))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def rates_of(way: Way, labelled: int) -> tuple[float, ...]:
    """The grid of learning rates."""
    if way.before is None:
        return ADAMW
    return SGD_LONG if labelled in ALL else SGD


def top1(out: Path, seed: int, labelled: int, way: Way, rate: float) -> float:
    """Of the four classes: fine-tuned, or trained from random weights."""
    data, (before, pixels) = out / "data" / f"downstream-{labelled}-{seed}", way
    words = ["--data", data / "train", "--seed", seed, *BUDGET.split(), "--optimizer.peak-lr", rate, "--steps", STEPS[labelled]]
    words += ["--checkpoint-every", STEPS[labelled], "--model.image-size", pixels, pixels]
    if before:
        words = ["finetune", "tiny-finetune", "--init", pretrained(out, seed, EPOCHS[-1], before), *words]
    else:
        words = ["pretrain", "tiny-fashion", "--epochs", 0, *words]
    run = finished(out / "runs" / f"{way}-{labelled}-{seed}-{rate:g}", *words)
    found: float = evaluation(out, run, "--data", data / "val")["top1"]
    return found


def shots(out: Path, seed: int, epochs: int) -> dict[str, float]:
    """Top-1 of the few-shot probe of a run's features, by shots: the mean over the probe's own draws."""
    run, data = pretrained(out, seed, epochs, NATIVE), out / "data" / f"downstream-{FEW[-1]}-{seed}"
    words = ("--protocol", "fewshot", "--shots", *SHOTS, "--seeds", 5, "--train-data", data / "train")
    return {str(of["shots"]): of["top1"] for of in evaluation(out, run, "--data", data / "val", *words)["results"]}


def own_top1(out: Path, seed: int, pixels: int) -> float:
    """Of a pre-training run on held-out images of its own six classes."""
    run = pretrained(out, seed, EPOCHS[-1], pixels)
    found: float = [line for line in read_metrics(run) if "eval_top1" in line][-1]["eval_top1"]
    return found


def measure(out: Path, seeds: list[int]) -> dict[str, Any]:
    """All of it, told as it goes."""
    found: dict[str, Any] = {"seeds": seeds, "threads": THREADS, "rates": [], "tuned": [], "shots": [], "own": []}

    def tell(table: str, row: dict[str, Any]) -> None:
        found[table].append(row)
        print(row, flush=True)

    prepare(out, LOOK_SEED)
    best: dict[tuple[Way, int], float] = {}
    for way, labelled in CELLS:
        by_rate = {rate: top1(out, LOOK_SEED, labelled, way, rate) for rate in rates_of(way, labelled)}
        best[way, labelled] = max(by_rate, key=lambda rate: by_rate[rate])
        tell("rates", {"way": way, "labelled": labelled, "best": best[way, labelled], "top1": by_rate})
    for seed in seeds:
        prepare(out, seed)
        tell("own", {"seed": seed, **{str(pixels): own_top1(out, seed, pixels) for pixels in PATCHES}})
        for epochs in EPOCHS:
            tell("shots", {"seed": seed, "epochs": epochs, "top1": shots(out, seed, epochs)})
        for (way, labelled), rate in best.items():
            tell("tuned", {"seed": seed, "labelled": labelled, "way": way, "top1": top1(out, seed, labelled, way, rate)})
    starts = [start for run in sorted((out / "runs").iterdir()) for start in read_record(run)["starts"]]
    return found | {
        "torch": sorted({start["versions"]["torch"] for start in starts}),
        "commits": sorted({start["commit"] for start in starts}),
    }


# ---------------------------------------------------------------------------------------------------------------------------------------


def cell(values: list[float]) -> str:
    """A mean in percent, and half its interval."""
    mean, low, high = mean_interval(values)
    return f"{round(100 * mean, 1) + 0.0:.1f} ± {50 * (high - low):.1f}"  # 0 added, for zero has no sign


def head_of(way: Way) -> str:
    """Of its column."""
    return f"{way.before or 'random'} → {way.pixels}"


def table_of(heads: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def tuned_table(found: dict[str, Any], name: str) -> str:
    """Top-1 after fine-tuning by the pixels of pre-training and of fine-tuning, and how far apart they are on the same seeds."""
    counts, pairs = TABLES[name]
    of = {(Way(*row["way"]), row["labelled"], row["seed"]): row["top1"] for row in found["tuned"]}
    ways = list(dict.fromkeys(way for pair in pairs for way in pair))
    rows = []
    for labelled in counts:
        by_way = {way: [of[way, labelled, seed] for seed in found["seeds"]] for way in ways}
        over = [[a - b for a, b in zip(by_way[one], by_way[other], strict=True)] for one, other in pairs]
        rows.append([f"{labelled:,}", *map(cell, by_way.values()), *map(cell, over)])
    differences = [f"{head_of(one)} over {head_of(other)}" for one, other in pairs]
    return table_of(["labelled, a class", *map(head_of, ways), *differences], rows)


def own_table(found: dict[str, Any]) -> str:
    """Top-1 of pre-training itself by its pixels, and what the images' own are worth over them on the same seeds."""
    native, rows = [row[str(NATIVE)] for row in found["own"]], []
    for pixels, patch in PATCHES.items():
        top1 = [row[str(pixels)] for row in found["own"]]
        over = "" if pixels == NATIVE else cell([a - b for a, b in zip(native, top1, strict=True)])
        rows.append([f"{pixels} px", f"{patch} px", str((pixels // patch) ** 2), cell(top1), over])
    return table_of(["image", "patch", "tokens", "top-1", f"{NATIVE} px over it"], rows)


def shots_table(found: dict[str, Any]) -> str:
    """Top-1 of the few-shot probe by the length of pre-training."""
    of, rows = {(row["seed"], row["epochs"]): row["top1"] for row in found["shots"]}, []
    for epochs in EPOCHS:
        cells = [cell([of[seed, epochs][str(n)] for seed in found["seeds"]]) for n in SHOTS]
        rows.append([counted(epochs, "epoch") if epochs else "none: random weights", *cells])
    return table_of(["pre-training", *(counted(n, "shot") for n in SHOTS)], rows)


def rates_table(found: dict[str, Any]) -> str:
    """The learning rate that was chosen of each grid."""
    chosen: dict[tuple[Way, tuple[float, ...]], dict[int, float]] = {}
    for row in found["rates"]:
        grid = tuple(map(float, row["top1"]))
        chosen.setdefault((Way(*row["way"]), grid), {})[row["labelled"]] = row["best"]
    rows = [
        [head_of(way), ", ".join(f"{rate:g}" for rate in grid), *(f"{best[n]:g}" if n in best else "" for n in STEPS)]
        for (way, grid), best in chosen.items()
    ]
    return table_of(["pixels", "grid", *(f"{labelled:,} labelled" for labelled in STEPS)], rows)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """All of them, as docs/results.md has them."""
    tuned = {name: tuned_table(found, name) for name in TABLES}
    return tuned | {"own": own_table(found), "shots": shots_table(found), "rates": rates_table(found)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of datasets, runs and results; what is there is not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-transfer.json")
    flags = parser.parse_args()
    found = measure(flags.out, flags.seeds)
    for name, table in tables(found).items():
        print(f"\n{name}\n\n{table}")
    if flags.save:
        file = RESULTS / f"{time.strftime('%Y-%m-%d')}-transfer.json"
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{file}")


if __name__ == "__main__":
    main()
