"""Evaluation against plain numpy over the whole dataset at once: the same counts however many ranks share the work."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score

from data_tools.amend import removals, write_overlay
from data_tools.dataset import Dataset, DatasetError, SampleError
from tests.data_tools.conftest import make_image, pack_one
from tests.distributed import run_on_ranks
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale import images
from vitscale.checkpoint import describe
from vitscale.config import ObjectiveConfig, PreprocessConfig, StreamConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.evaluate import evaluate, evaluate_checkpoint
from vitscale.intervals import wilson
from vitscale.measures import calibration_error
from vitscale.model import normalize
from vitscale.reassessed import read_real_labels
from vitscale.weights import load_model

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
        evaluate_checkpoint(description, "weight", Dataset.open(dataset / "val"), batch_size=8, workers=1)


# -- Everything that `vitscale evaluate` tells --------------------------------------------------------------------------------------------

SAMPLES, CLASSES = 29, 7


@pytest.fixture
def several(tmp_path: Path) -> Dataset:
    """Up to three labels a sample, under the names of ImageNet's validation images."""
    rng = np.random.default_rng(0)
    labels = [rng.permutation(CLASSES)[: i % 4].tolist() for i in range(SAMPLES)]
    keys = [f"n{i % 3:08d}_ILSVRC2012_val_{SAMPLES - i:08d}" for i in range(SAMPLES)]
    table = pa.table({"key": keys, "image": [make_image(i, size=(30, 20)) for i in range(SAMPLES)], "labels": labels})
    pq.write_table(table, tmp_path / "several.parquet")
    return pack_one(tmp_path / "several.parquet", out=tmp_path / "several", samples_per_shard=4)


@pytest.fixture
def real(several: Dataset, tmp_path: Path) -> Path:
    """Reassessed labels in the order of the images' numbers, some without any."""
    rng = np.random.default_rng(1)
    file = tmp_path / "real.json"
    file.write_text(json.dumps([rng.permutation(CLASSES)[: i % 3].tolist() for i in range(SAMPLES)]))
    return file


def all_measures(payload: dict[str, Any]) -> list[dict[str, Any]]:
    description, dataset = describe(Path(payload["checkpoint"])), Dataset.open(payload["data"])
    found = []
    for kind in ("softmax", "sigmoid"):
        about = dataclasses.replace(description, objective=ObjectiveConfig(kind=kind))
        measures = evaluate_checkpoint(
            about, "weight", dataset, batch_size=5, workers=1, real_NL=read_real_labels(Path(payload["real"]), dataset), precision=True,
            resamples=20, seed=3,
        )  # fmt: skip
        found.append(dataclasses.asdict(measures))
    return found


def test_all_measures_are_the_same_for_any_number_of_ranks(several: Dataset, real: Path, tmp_path: Path) -> None:
    """And those of scikit-learn and numpy, from the logits of all samples at once; one of them is damaged."""
    damage = several.folder / several.shard_of(6)
    content = bytearray(damage.read_bytes())
    content[content.find(several.read(6)) + 40] ^= 0xFF
    damage.write_bytes(content)
    model = dataclasses.replace(MODEL, num_classes=CLASSES)
    written = write_checkpoint(tmp_path / "step", random_vit(model, seed=3), preprocess=PREPROCESS).path
    payload = {"checkpoint": str(written), "data": str(several.path), "real": str(real)}
    one = json.loads(json.dumps(all_measures(payload)))
    for world_size in (2, 3):
        other = run_on_ranks("tests.vitscale.test_evaluate:all_measures", world_size, payload, tmp_path)
        for ours, theirs in zip(one, other, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
            assert ours | {"loss": 0} == theirs | {"loss": 0}

    kept = np.delete(np.arange(SAMPLES), 6)
    views = np.stack([images.evaluation_view(several.read(sample), MODEL.image_size, PREPROCESS) for sample in kept.tolist()])
    with torch.no_grad():
        logits = load_model(describe(written), "weight")(normalize(torch.from_numpy(views), PREPROCESS)).double().numpy()
    guesses, truth = logits.argmax(axis=1), (several.labels(kept)[0][:, :, None] == np.arange(CLASSES)).any(axis=1)
    right = truth[np.arange(len(kept)), guesses]
    in_order = json.loads(real.read_text())
    entries = [in_order[int(several.key(sample)[-8:]) - 1] for sample in kept.tolist()]
    judged = [guess in entry for guess, entry in zip(guesses.tolist(), entries, strict=True) if entry]
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for found, scores in zip(one, (softmax, 1 / (1 + np.exp(-logits))), strict=True):
        assert (found["samples"], found["skipped"], found["top1"]) == (len(kept), 1, right.mean())
        assert found["top1_interval"] == list(wilson(int(right.sum()), len(kept)))
        assert (found["real_top1"], found["real_samples"]) == (np.mean(judged), len(judged))
        expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(CLASSES)]
        assert [of["average_precision"] for of in found["classes"]] == pytest.approx(expected, rel=1e-9)
        assert [of["samples"] for of in found["classes"]] == truth.sum(axis=0).tolist()
        assert found["mean_average_precision"] == pytest.approx(np.mean(expected), rel=1e-9)
        low, high = found["mean_average_precision_interval"]
        assert 0 < low < high < 1
        assert found["calibration_error"] == pytest.approx(calibration_error(scores.max(axis=1), right), rel=1e-5)
        assert sum(of["samples"] for of in found["confusions"]) == truth[~right].sum()


def test_scores_that_do_not_fit_into_memory_are_refused(several: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(MODEL, num_classes=CLASSES)
    description = write_checkpoint(tmp_path / "step", random_vit(model))
    monkeypatch.setattr("vitscale.evaluate.available_memory", lambda: 4 * SAMPLES * CLASSES - 1)
    with pytest.raises(DatasetError, match=r"keeps 812 bytes of scores in memory \(29 samples x 7 classes\), and 811 are available"):
        evaluate_checkpoint(
            description, "weight", several, batch_size=8, workers=1, precision=True
        )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("3", "holds neither a list of labels for each image nor an object"),
        ("[[1]]", r"has 1 entries, none for image \d+ of the key n"),
        ("[" + ", ".join(["[7]"] * SAMPLES) + "]", "has label 7 for n0.*, and .* has classes 0 to 6"),
        ("[" + ", ".join(["4"] * SAMPLES) + "]", "has 4 for n0.*, which is no list of labels"),
        ("[" + ", ".join(["[]"] * SAMPLES) + "]", "has no label for any sample"),
        ("{}", "does not name the sample n0.*; an empty list leaves a sample out"),
    ],
)
def test_a_bad_file_of_reassessed_labels_is_refused(several: Dataset, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(DatasetError, match=said) as refused:
        read_real_labels(tmp_path / "real.json", several)
    assert "\n" not in str(refused.value)


def test_reassessed_labels_by_key(dataset: Path, tmp_path: Path) -> None:
    """Keys of other sets say no number, so a list is refused and an object is not."""
    opened, file = Dataset.open(dataset / "val"), tmp_path / "labels.json"
    expected = [[sample % 5] * (sample % 2) for sample in range(opened.num_samples)]
    file.write_text(json.dumps({opened.key(sample): labels for sample, labels in enumerate(expected)}))
    assert [row[row >= 0].tolist() for row in read_real_labels(file, opened)] == expected
    file.write_text(json.dumps(expected))
    with pytest.raises(DatasetError, match=r"is a list by ImageNet's image numbers, and the key .* has none"):
        read_real_labels(file, opened)
