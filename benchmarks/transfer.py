"""Does pre-training transfer? The road on real images, over seeds, as tables with intervals: docs/results.md.

    python -m benchmarks.transfer --out /scratch/transfer            Fashion-MNIST, five seeds, about two hours of one core
    python -m benchmarks.transfer --out /scratch/transfer --save     and write benchmarks/results/DATE-transfer.json

A small ViT is pre-trained on six of the ten classes, at the images' own 28 pixels, at 20 and at 12. On the four others, of which some
images a class are labelled:

    budget       fine-tuned against the same model from random weights: equal images, steps, batch and augmentation, at 28 pixels
    resolution   pre-trained and fine-tuned at 28 pixels, both at 20, both at 12, and pre-trained at 20 and fine-tuned at 28
    shots        the few-shot probe of the features (big_vision's), by shots, of random weights and of pre-training of several lengths

The learning rate of a cell is the best of a grid on a seed that is in no table, judged by training images that nothing is trained on:
the held-out split gives figures alone. Everything is a command of vitscale, and what is there is not made again. A seed is that of the
labelled images, the weights and the order. Figures are the mean over seeds with a t interval of 95%; differences are paired by seed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.quickstart import FASHION_CLASSES, read_fashion_mnist, sample_classes, write_class_folders
from vitscale.intervals import mean_interval
from vitscale.metrics import counted
from vitscale.run import is_finished, read_metrics

RESULTS = Path(__file__).parent / "results"
DOWNSTREAM = ("dress", "coat", "shirt", "ankle-boot")
LABELLED = (5, 10, 25, 100)  # images a class
EPOCHS = (0, 1, 5)  # of pre-training; 0 is random weights
SHOTS = (1, 5, 10, 25)
STEPS = 100
NATIVE = 28  # pixels a side
PIXELS = {"native": (28, 28), "low": (20, 20), "lower": (12, 12), "raised": (20, 28), "scratch": (None, 28)}  # in pre-training, afterwards
SIDES = sorted({before for before, _ in PIXELS.values() if before}, reverse=True)
DIFFERENCES = {  # of top-1, on the same seeds
    "28, 28 over none": ("native", "scratch"),
    "over 20, 20": ("native", "low"),
    "over 12, 12": ("native", "lower"),
    "20, 28 over 20, 20": ("raised", "low"),
}
LOOK_SEED = 1000  # learning rates are chosen on it
TRAINED_ON = 50_000  # the first images of the training set; the others choose the learning rates
RATES = {  # around those of the recipes: SGD, as the paper fine-tunes, and AdamW, as tiny-fashion is trained
    "native": (0.003, 0.01, 0.03, 0.1, 0.3),
    "low": (0.003, 0.01, 0.03, 0.1, 0.3),
    "lower": (0.003, 0.01, 0.03, 0.1, 0.3),
    "raised": (0.003, 0.01, 0.03, 0.1, 0.3),
    "scratch": (0.0006, 0.002, 0.006, 0.02),
}
BUDGET = (
    f"--steps {STEPS} --schedule.warmup-steps 10 --preprocess.crop-scale 0.6 1.0 --micro-batch-size 64 "
    f"--eval-every 0 --checkpoint-every {STEPS} --keep-checkpoints 1 --log-every 25"
)


def verb(*words: object) -> str:
    """Runs a command of vitscale and returns what it prints. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "launch.main", *map(str, words)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def prepare(out: Path, seed: int) -> None:
    """Datasets of a seed: six classes for pre-training, and the four others with so many labelled images a class."""
    images, labels = read_fashion_mnist("train")
    held_out = (images[TRAINED_ON:], labels[TRAINED_ON:]) if seed == LOOK_SEED else read_fashion_mnist("t10k")
    downstream = [FASHION_CLASSES.index(name) for name in DOWNSTREAM]
    upstream = [label for label in range(len(FASHION_CLASSES)) if label not in downstream]
    for task, classes, count in [("pretrain", upstream, TRAINED_ON), *((f"downstream-{count}", downstream, count) for count in LABELLED)]:
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
    words = ("pretrain", "tiny-fashion", "--data", out / "data" / f"pretrain-{seed}" / "train", "--seed", seed, "--micro-batch-size", 64)
    words += ("--model.image-size", pixels, pixels)
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


def top1(out: Path, seed: int, labelled: int, kind: str, rate: float) -> float:
    """Of the four classes: fine-tuned, or trained from random weights."""
    data, (before, pixels) = out / "data" / f"downstream-{labelled}-{seed}", PIXELS[kind]
    words = ["--data", data / "train", "--seed", seed, *BUDGET.split(), "--optimizer.peak-lr", rate]
    words += ["--model.image-size", pixels, pixels]
    if before:
        words = ["finetune", "tiny-finetune", "--init", pretrained(out, seed, EPOCHS[-1], before), *words]
    else:
        words = ["pretrain", "tiny-fashion", "--epochs", 0, *words]
    run = finished(out / "runs" / f"{kind}-{labelled}-{seed}-{rate:g}", *words)
    found: float = evaluation(out, run, "--data", data / "val")["top1"]
    return found


def shots(out: Path, seed: int, epochs: int) -> dict[str, float]:
    """Top-1 of the few-shot probe of a run's features, by shots: the mean over the probe's own draws."""
    run, data = pretrained(out, seed, epochs, NATIVE), out / "data" / f"downstream-{LABELLED[-1]}-{seed}"
    words = ("--protocol", "fewshot", "--shots", *SHOTS, "--seeds", 5, "--train-data", data / "train")
    return {str(of["shots"]): of["top1"] for of in evaluation(out, run, "--data", data / "val", *words)["results"]}


def own_top1(out: Path, seed: int, pixels: int) -> float:
    """Of a pre-training run on held-out images of its own six classes."""
    run = pretrained(out, seed, EPOCHS[-1], pixels)
    found: float = [line for line in read_metrics(run) if "eval_top1" in line][-1]["eval_top1"]
    return found


def measure(out: Path, seeds: list[int]) -> dict[str, Any]:
    """All of it, told as it goes."""
    found: dict[str, Any] = {"seeds": seeds, "rates": [], "tuned": [], "shots": [], "own": []}

    def tell(table: str, row: dict[str, Any]) -> dict[str, Any]:
        found[table].append(row)
        print(row, flush=True)
        return row

    prepare(out, LOOK_SEED)
    best: dict[tuple[str, int], float] = {}
    for kind, rates in RATES.items():
        for labelled in LABELLED:
            by_rate = {rate: top1(out, LOOK_SEED, labelled, kind, rate) for rate in rates}
            best[kind, labelled] = max(by_rate, key=lambda rate: by_rate[rate])
            tell("rates", {"kind": kind, "labelled": labelled, "best": best[kind, labelled], "top1": by_rate})
    for seed in seeds:
        prepare(out, seed)
        tell("own", {"seed": seed, **{str(pixels): own_top1(out, seed, pixels) for pixels in SIDES}})
        for epochs in EPOCHS:
            tell("shots", {"seed": seed, "epochs": epochs, "top1": shots(out, seed, epochs)})
        for labelled in LABELLED:
            by_kind = {kind: top1(out, seed, labelled, kind, best[kind, labelled]) for kind in RATES}
            tell("tuned", {"seed": seed, "labelled": labelled, **by_kind})
    return found


# ---------------------------------------------------------------------------------------------------------------------------------------


def cell(values: list[float]) -> str:
    """A mean in percent, and half its interval."""
    mean, low, high = mean_interval(values)
    return f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def pixels_of(kind: str) -> str:
    """Those of pre-training, and those of fine-tuning."""
    before, afterwards = PIXELS[kind]
    return f"{f'{before} px' if before else 'none'}, {afterwards} px"


def tuned_table(found: dict[str, Any]) -> str:
    """Top-1 after fine-tuning by the pixels of pre-training and of fine-tuning, and how far apart they are on the same seeds."""
    seeds, of = found["seeds"], {(row["seed"], row["labelled"]): row for row in found["tuned"]}
    heads = ["labelled, a class", *map(pixels_of, PIXELS), *DIFFERENCES]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for labelled in LABELLED:
        by_kind = {kind: [of[seed, labelled][kind] for seed in seeds] for kind in PIXELS}
        over = [[a - b for a, b in zip(by_kind[one], by_kind[other], strict=True)] for one, other in DIFFERENCES.values()]
        lines.append(f"| {labelled} | {' | '.join(cell(values) for values in (*by_kind.values(), *over))} |")
    return "\n".join(lines)


def own_table(found: dict[str, Any]) -> str:
    """Top-1 of pre-training itself by its pixels."""
    cells = [cell([row[str(pixels)] for row in found["own"]]) for pixels in SIDES]
    return "\n".join([f"| {' | '.join(f'{pixels} px' for pixels in SIDES)} |", f"|{'---|' * len(SIDES)}", f"| {' | '.join(cells)} |"])


def shots_table(found: dict[str, Any]) -> str:
    """Top-1 of the few-shot probe by the length of pre-training."""
    of = {(row["seed"], row["epochs"]): row["top1"] for row in found["shots"]}
    lines = [f"| pre-training | {' | '.join(counted(n, 'shot') for n in SHOTS)} |", f"|---|{'---|' * len(SHOTS)}"]
    for epochs in EPOCHS:
        cells = [cell([of[seed, epochs][str(n)] for seed in found["seeds"]]) for n in SHOTS]
        lines.append(f"| {counted(epochs, 'epoch') if epochs else 'none: random weights'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_table(found: dict[str, Any]) -> str:
    """The learning rate that was chosen of each grid."""
    chosen = {(row["kind"], row["labelled"]): row["best"] for row in found["rates"]}
    lines = [f"| | grid | {' | '.join(f'{labelled} labelled' for labelled in LABELLED)} |", f"|---|---|{'---|' * len(LABELLED)}"]
    for kind in PIXELS:
        grid = ", ".join(f"{rate:g}" for rate in RATES[kind])
        lines.append(f"| {pixels_of(kind)} | {grid} | {' | '.join(f'{chosen[kind, labelled]:g}' for labelled in LABELLED)} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of datasets, runs and results; what is there is not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-transfer.json")
    flags = parser.parse_args()
    found = measure(flags.out, flags.seeds)
    print(f"\n{tuned_table(found)}\n\n{own_table(found)}\n\n{shots_table(found)}\n\n{rates_table(found)}")
    if flags.save:
        file = RESULTS / f"{time.strftime('%Y-%m-%d')}-transfer.json"
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{file}")


if __name__ == "__main__":
    main()
