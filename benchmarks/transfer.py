"""Does pre-training transfer? The road on real images, over seeds, as tables with intervals: docs/results.md.

    python -m benchmarks.transfer --out /scratch/transfer            Fashion-MNIST, three seeds, an hour and a half on two cores
    python -m benchmarks.transfer --out /scratch/transfer --save     and write docs/results.md and benchmarks/results/

A small ViT is pre-trained at 20 pixels on six of the ten classes. On the four others, of which some images a class are labelled:

    budget       fine-tuned at 28 pixels against the same model from random weights: equal images, steps, batch and augmentation
    resolution   fine-tuned at the images' own 28 pixels against fine-tuned at 20
    shots        the few-shot probe of the features (big_vision's), by shots, of random weights and of pre-training of several lengths

Everything is a command of vitscale, and goes on where it was: what is there is not made again. A seed is that of the labelled images, the
weights and the order. Figures are the mean over seeds with a t interval of 95%; differences are paired by seed.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

from launch.quickstart import FASHION_CLASSES, read_fashion_mnist, sample_classes, write_class_folders
from launch.verbs import VERBS
from vitscale.intervals import mean_interval
from vitscale.run import is_finished

RESULTS = Path(__file__).parent / "results"
DOWNSTREAM = ("dress", "coat", "shirt", "ankle-boot")
LABELLED = (5, 10, 25, 100)  # images a class
EPOCHS = (0, 1, 3, 9)  # of pre-training; 0 is random weights
SHOTS = (1, 5, 10, 25)
STEPS = 100
LOW, NATIVE = 20, 28  # pixels a side
# What both runs of a comparison have; learning rates are each one's best of a look at 0.003 to 0.1 (SGD) and 0.0003 to 0.01 (AdamW)
TUNED = f"--steps {STEPS} --eval-every 0 --checkpoint-every {STEPS} --log-every 25"
SCRATCH = f"{TUNED} --epochs 0 --schedule.warmup-steps 10 --preprocess.crop-scale 0.6 1.0 --optimizer.peak-lr 0.002"


def verb(name: str, *words: object) -> str:
    """Runs a command of vitscale and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        VERBS[name]([str(word) for word in words])
    return printed.getvalue()


def prepare(out: Path, seed: int) -> None:
    """Datasets of a seed: six classes for pre-training, and the four others with so many labelled images a class."""
    train, held_out = read_fashion_mnist("train"), read_fashion_mnist("t10k")
    of = {"downstream": [FASHION_CLASSES.index(name) for name in DOWNSTREAM]}
    of["pretrain"] = [label for label in range(len(FASHION_CLASSES)) if label not in of["downstream"]]
    wanted = [("pretrain", 6_000, "pretrain"), *((f"downstream-{count}", count, "downstream") for count in LABELLED)]
    for task, count, which in wanted:
        for split, images, most in (("train", train, count), ("val", held_out, 1_000)):
            data = out / "data" / f"{task}-{seed}"
            if (data / split).exists():
                continue
            folder = out / "images" / f"{task}-{seed}" / split
            write_class_folders(folder, sample_classes(images, of[which], most, seed), FASHION_CLASSES)
            verb("pack", folder, data, "--split", split)


def pretrained(out: Path, seed: int, epochs: int) -> Path:
    """A run of so many epochs; of none, of one step whose learning rate is zero: the weights that a run begins with."""
    run, data = out / "runs" / f"pretrain-{seed}-{epochs}", out / "data" / f"pretrain-{seed}" / "train"
    if not is_finished(run):
        length = ("--epochs", epochs) if epochs else ("--epochs", 0, "--steps", 1, "--schedule.warmup-steps", 1, "--optimizer.peak-lr", 0)
        verb("pretrain", "tiny-fashion", "--data", data, "--out", run, *length, "--seed", seed, "--nproc", 2, "--keep-checkpoints", 1)
    return run


def finished(run: Path, verb_name: str, *words: object) -> Path:
    """A run, made unless it is there."""
    if not is_finished(run):
        verb(verb_name, *words, "--out", run, "--nproc", 2, "--keep-checkpoints", 1)
    return run


def top1(out: Path, run: Path, data: Path) -> float:
    """Of a run on a held-out split."""
    file = out / "evaluations" / f"{run.name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        found = verb("evaluate", run, "--data", data / "val", "--json")
        file.write_text(found)
    found_top1: float = json.loads(file.read_text())["top1"]
    return found_top1


def tuned(out: Path, seed: int, labelled: int) -> dict[str, float]:
    """Top-1 of the four classes: fine-tuned at both resolutions, and from random weights."""
    data, init = out / "data" / f"downstream-{labelled}-{seed}", pretrained(out, seed, EPOCHS[-1])
    common = ("--data", data / "train", "--seed", seed)
    found = {}
    for name, size in (("native", NATIVE), ("low", LOW)):
        words = ("tiny-finetune", "--init", init, *common, *TUNED.split(), "--model.image-size", size, size)
        found[name] = top1(out, finished(out / "runs" / f"finetune-{name}-{labelled}-{seed}", "finetune", *words), data)
    words = ("tiny-fashion", *common, *SCRATCH.split(), "--model.image-size", NATIVE, NATIVE)
    found["scratch"] = top1(out, finished(out / "runs" / f"scratch-{labelled}-{seed}", "pretrain", *words), data)
    return found


def shots(out: Path, seed: int, epochs: int) -> dict[int, float]:
    """Top-1 of the few-shot probe of a run's features, by shots: the mean over the probe's own draws."""
    run, data = pretrained(out, seed, epochs), out / "data" / f"downstream-{LABELLED[-1]}-{seed}"
    file = out / "evaluations" / f"shots-{run.name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        words = ("--protocol", "fewshot", "--shots", *SHOTS, "--seeds", 5, "--json")
        file.write_text(verb("evaluate", run, "--data", data / "val", "--train-data", data / "train", *words))
    results = json.loads(file.read_text())["results"]
    return {of["shots"]: of["top1"] for of in results}


# ---------------------------------------------------------------------------------------------------------------------------------------


def cell(values: list[float]) -> str:
    """A mean in percent, and half its interval."""
    mean, low, high = mean_interval(values)
    return f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def tables(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    seeds = found["seeds"]
    of = {(row["seed"], row["labelled"]): row for row in found["tuned"]}
    lines = ["| labelled, a class | fine-tuned, 28 px | from random weights, 28 px | difference | fine-tuned, 20 px | 28 over 20 px |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for labelled in LABELLED:
        rows = [of[seed, labelled] for seed in seeds]
        native, low, scratch = ([row[name] for row in rows] for name in ("native", "low", "scratch"))
        gained = [a - b for a, b in zip(native, scratch, strict=True)]
        finer = [a - b for a, b in zip(native, low, strict=True)]
        lines.append(f"| {labelled} | {cell(native)} | {cell(scratch)} | {cell(gained)} | {cell(low)} | {cell(finer)} |")
    by_epochs = {(row["seed"], row["epochs"]): row["top1"] for row in found["shots"]}
    lines += ["", f"| few-shot probe, 20 px: pre-training | {' | '.join(f'{n} shots' for n in SHOTS)} |", f"|---|{'---|' * len(SHOTS)}"]
    for epochs in EPOCHS:
        cells = [cell([by_epochs[seed, epochs][str(n)] for seed in seeds]) for n in SHOTS]
        lines.append(f"| {f'{epochs} epochs' if epochs else 'none: random weights'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(out: Path, seeds: list[int]) -> dict[str, Any]:
    """All of it, told as it goes."""
    found: dict[str, Any] = {"seeds": seeds, "tuned": [], "shots": []}
    for seed in seeds:
        prepare(out, seed)
        for epochs in EPOCHS:
            row = {"seed": seed, "epochs": epochs, "top1": {str(n): value for n, value in shots(out, seed, epochs).items()}}
            found["shots"].append(row)
            print(row, flush=True)
        for labelled in LABELLED:
            row = {"seed": seed, "labelled": labelled, **tuned(out, seed, labelled)}
            found["tuned"].append(row)
            print(row, flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of datasets, runs and results; what is there is not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-transfer.json")
    flags = parser.parse_args()
    found = measure(flags.out, flags.seeds)
    print(f"\n{tables(found)}")
    if flags.save:
        file = RESULTS / f"{time.strftime('%Y-%m-%d')}-transfer.json"
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{file}")


if __name__ == "__main__":
    main()
