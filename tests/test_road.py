"""Fashion-MNIST through the whole road, by the installed command: pack, pre-train at 20 px, fine-tune at 28 px, evaluate, export.

The images are those of Debian's package dataset-fashion-mnist. The short form learns from a seeded subset; the full one packs all 70,000
and must beat logistic regression on the pixels of the same split.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.quickstart import FASHION_CLASSES, FASHION_MNIST, Labelled, read_fashion_mnist, sample_classes, write_class_folders

VITSCALE = str(Path(sys.executable).with_name("vitscale"))


@pytest.fixture(scope="module")
def splits() -> tuple[Labelled, Labelled]:
    """The 60,000 training and the 10,000 test images."""
    if not FASHION_MNIST.is_dir():
        missing = f"{FASHION_MNIST} is not there: install Debian's package dataset-fashion-mnist to prove the road on real images"
        if os.environ.get("VITSCALE_REQUIRE_FASHION_MNIST") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return read_fashion_mnist("train"), read_fashion_mnist("t10k")


def vitscale(cwd: Path, command: str) -> str:
    """What a command prints on standard output; it must succeed."""
    called = subprocess.run([VITSCALE, *command.split()], cwd=cwd, capture_output=True, text=True, check=False)
    assert called.returncode == 0, called.stderr
    return called.stdout


def go_the_road(cwd: Path, train: Labelled, held_out: Labelled, pretrain_flags: str, finetune_flags: str) -> dict[str, Any]:
    """The evaluation of the fine-tuned model's export."""
    for split, images in (("train", train), ("val", held_out)):
        write_class_folders(cwd / "images" / split, images, FASHION_CLASSES)
        (packed,) = json.loads(vitscale(cwd, f"pack images/{split} data --split {split} --json"))
        assert (packed["samples"], packed["rejects"], packed["classes"]) == (len(images[1]), 0, 10)
    vitscale(cwd, f"pretrain tiny-fashion --data data/train --out pretrained --nproc 2 {pretrain_flags}")
    vitscale(cwd, f"finetune tiny-finetune --init pretrained --data data/train --out finetuned --nproc 2 --eval-data none {finetune_flags}")
    vitscale(cwd, "checkpoint export finetuned export")
    of_run, of_export = (
        json.loads(vitscale(cwd, f"evaluate {path} --data data/val --batch-size 250 --json")) for path in ("finetuned", "export")
    )
    assert of_export["top1"] == of_run["top1"]
    assert (of_run["samples"], of_run["skipped"]) == (len(held_out[1]), 0)
    return of_run


def test_a_subset_is_learned_far_beyond_guessing(splits: tuple[Labelled, Labelled], tmp_path: Path) -> None:
    """600 training images a class, 2,000 held-out ones; guessing has 10 %."""
    train, held_out = (sample_classes(of, list(range(10)), count, seed=0) for of, count in zip(splits, (600, 200), strict=True))
    result = go_the_road(
        tmp_path,
        train,
        held_out,
        "--epochs 8 --global-batch-size 64 --micro-batch-size 32 --schedule.warmup-steps 40 --preprocess.crop-scale 0.9 1",
        "--steps 100 --preprocess.crop-scale 0.9 1",
    )
    assert result["top1"] > 0.6  # fifty points above guessing


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_all_of_it_beats_logistic_regression(splits: tuple[Labelled, Labelled], tmp_path: Path) -> None:
    """The recipe's own epochs and 1,000 steps of fine-tuning."""
    from sklearn.linear_model import LogisticRegression

    (train_images, train_labels), (test_images, test_labels) = splits
    pixels, test_pixels = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in (train_images, test_images))
    rival = LogisticRegression(max_iter=100).fit(pixels, train_labels).score(test_pixels, test_labels)
    assert rival > 0.83  # it reaches 0.844 elsewhere: no straw man
    result = go_the_road(tmp_path, *splits, "", "--steps 1000 --schedule.warmup-steps 50 --log-every 50 --preprocess.crop-scale 1 1")
    print(f"10,000 test images: fine-tuned {result['top1']:.2%}, logistic regression on the same pixels {rival:.2%}")
    assert result["samples"] == 10_000
    assert result["top1"] > rival + 0.02
