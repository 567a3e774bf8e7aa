"""Evaluation against plain numpy over the whole dataset at once: the same counts however many ranks share the work."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_tools.amend import removals, write_overlay
from data_tools.dataset import Dataset, SampleError
from tests.distributed import run_on_ranks
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale import images
from vitscale.checkpoint import CheckpointError, describe
from vitscale.config import ObjectiveConfig, PreprocessConfig, StreamConfig, ViTConfig
from vitscale.evaluate import evaluate, evaluate_checkpoint, load_model
from vitscale.model import normalize

# More classes than the dataset's five, so that being among the five best says something.
MODEL = ViTConfig(depth=1, width=16, mlp_dim=16, num_heads=2, patch_size=8, image_size=(16, 24), num_classes=12)
PREPROCESS = PreprocessConfig(eval_crop=0.9)


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Dataset:
    """37 held-out samples, one of them damaged."""
    shutil.copytree(dataset / "val", tmp_path / "val")
    opened = Dataset.open(tmp_path / "val")
    shard = tmp_path / "val" / opened.shard_of(21)
    content = bytearray(shard.read_bytes())
    content[content.find(opened.read(21)) + 40] ^= 0xFF
    shard.write_bytes(content)
    return Dataset.open(tmp_path / "val")


def by_hand(checkpoint: Path, dataset: Dataset) -> dict[str, float]:
    views, labels = [], []
    for sample in range(dataset.num_samples):
        try:
            data = dataset.read(sample)
        except SampleError:
            continue
        views.append(images.evaluation_view(data, MODEL.image_size, PREPROCESS))
        labels.append(dataset.labels(np.array([sample]))[0][0, 0])
    with torch.no_grad():
        logits = load_model(describe(checkpoint), "weight")(normalize(torch.from_numpy(np.stack(views)), PREPROCESS)).double().numpy()
    ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)  # classes that are ahead of the right one
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return {"top1": np.mean(ranks < 1), "top5": np.mean(ranks < 5), "loss": np.mean(losses), "samples": len(labels)}


def on_ranks(payload: dict[str, Any]) -> list[dict[str, Any]]:
    model, dataset = load_model(describe(Path(payload["checkpoint"])), "weight"), Dataset.open(payload["data"])
    settings: dict[str, Any] = {"device": torch.device("cpu"), "stream": StreamConfig(workers=2)}
    return [
        dataclasses.asdict(evaluate(model, dataset, MODEL.image_size, PREPROCESS, ObjectiveConfig(), batch_size=size, **settings))
        for size in (1, 5, 64)
    ]


def test_all_ranks_together_see_what_one_sees(damaged: Dataset, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "step", random_vit(MODEL, seed=3), preprocess=PREPROCESS).path
    expected = by_hand(written, damaged)
    assert 0 < expected["top1"] < expected["top5"] < 1
    for world_size in (1, 2, 3):
        payload = {"checkpoint": str(written), "data": str(damaged.path)}
        for found in run_on_ranks("tests.vitscale.test_evaluate:on_ranks", world_size, payload, tmp_path):
            assert (found["samples"], found["skipped"]) == (expected["samples"], 1)
            assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    write_overlay(damaged, "takedown", removals(np.array([2, 30]), pa.array(["asked for"] * 2)))
    expected = by_hand(written, Dataset.open(damaged.path))
    payload = {"checkpoint": str(written), "data": str(damaged.path)}
    for found in run_on_ranks("tests.vitscale.test_evaluate:on_ranks", 2, payload, tmp_path):
        assert (found["samples"], found["skipped"], found["removed"]) == (expected["samples"], 1, 2)
        assert (found["top1"], found["loss"]) == (expected["top1"], pytest.approx(expected["loss"], rel=1e-5))


@pytest.mark.parametrize("names", [None, ("a", "b", "c", "d", "e")])
def test_a_head_for_other_class_names_is_refused(dataset: Path, tmp_path: Path, names: tuple[str, ...] | None) -> None:
    """Also where one side has no names: numbers that were given by hand and numbers of sorted names seldom agree."""
    model = random_vit(dataclasses.replace(MODEL, num_classes=5))
    description = write_checkpoint(tmp_path / "step", model, class_names=names)
    with pytest.raises(CheckpointError, match="labels may mean other classes"):
        evaluate_checkpoint(
            description, "weight", Dataset.open(dataset / "val"), batch_size=8, workers=1, progress=lambda done, total: None
        )
