"""Features against the model called on each sample alone, and bit by bit the same however many ranks share the work."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_tools.amend import removals, write_overlay
from data_tools.dataset import Dataset, DatasetError
from tests.distributed import run_on_ranks
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale import images
from vitscale.checkpoint import describe
from vitscale.config import PreprocessConfig, StreamConfig, ViTConfig
from vitscale.features import Features, extract_features
from vitscale.model import normalize
from vitscale.weights import load_model

MODEL = ViTConfig(depth=2, width=16, mlp_dim=24, num_heads=2, patch_size=8, image_size=(16, 24), num_classes=5)
PREPROCESS = PreprocessConfig(eval_crop=0.9)
DAMAGED, REMOVED = 21, [2, 30]


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Dataset:
    """37 samples, of which one is damaged and two are removed."""
    shutil.copytree(dataset / "val", tmp_path / "val")
    opened = Dataset.open(tmp_path / "val")
    shard = tmp_path / "val" / opened.shard_of(DAMAGED)
    content = bytearray(shard.read_bytes())
    content[content.find(opened.read(DAMAGED)) + 40] ^= 0xFF
    shard.write_bytes(content)
    write_overlay(opened, "takedown", removals(np.array(REMOVED), pa.array(["asked for"] * 2)))
    return Dataset.open(tmp_path / "val")


def extracted(model: Any, dataset: Dataset, batch_size: int) -> Features:
    return extract_features(
        model, dataset, PREPROCESS, device=torch.device("cpu"), batch_size=batch_size, stream=StreamConfig(workers=2)
    )  # fmt: skip


def digest(features: Features) -> str:
    parts = (features.features_ND, features.labels_NL, features.samples_N)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def on_ranks(payload: dict[str, Any]) -> list[str]:
    model, dataset = load_model(describe(Path(payload["checkpoint"])), "weight"), Dataset.open(payload["data"])
    return [digest(extracted(model, dataset, batch_size)) for batch_size in (1, 5, 64)]


@pytest.mark.parametrize(("pool", "representation"), [("cls", 0), ("mean", 12), ("map", 0)])
def test_features_are_what_the_head_sees(damaged: Dataset, pool: str, representation: int) -> None:
    model = random_vit(replace(MODEL, pool=pool, representation_size=representation))
    found = extracted(model, damaged, 8)
    expected = [sample for sample in range(37) if sample not in (DAMAGED, *REMOVED)]
    assert found.samples_N.tolist() == expected
    np.testing.assert_array_equal(found.labels_NL, damaged.labels(np.array(expected))[0])
    seen: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda head, inputs, logits: seen.append(inputs[0]))
    with torch.no_grad():
        for sample in expected:
            view = images.evaluation_view(damaged.read(sample), MODEL.image_size, PREPROCESS)
            model(normalize(torch.from_numpy(view[None]), PREPROCESS))
    assert found.features_ND.dtype == torch.float32
    torch.testing.assert_close(found.features_ND, torch.cat(seen), rtol=1e-5, atol=1e-5)


def test_all_numbers_of_ranks_give_the_same_bits(damaged: Dataset, tmp_path: Path) -> None:
    payload = {"checkpoint": str(write_checkpoint(tmp_path / "step", random_vit(MODEL)).path), "data": str(damaged.path)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks of a test have
    try:
        alone = on_ranks(payload)
    finally:
        torch.set_num_threads(threads)
    for world_size in (2, 3):
        assert run_on_ranks("tests.vitscale.test_features:on_ranks", world_size, payload, tmp_path) == alone


def test_a_dataset_of_which_nothing_can_be_read_is_refused(damaged: Dataset) -> None:
    write_overlay(damaged, "everything", removals(np.arange(37), pa.array(["asked for"] * 37)))
    with pytest.raises(DatasetError, match="none of the 37 samples"):
        extracted(random_vit(MODEL), Dataset.open(damaged.path), 8)


def test_progress_ends_at_the_number_of_samples(damaged: Dataset) -> None:
    told: list[tuple[int, int]] = []
    extract_features(
        random_vit(MODEL), damaged, PREPROCESS, device=torch.device("cpu"), batch_size=8, stream=StreamConfig(workers=2),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(done, 35) for done in (8, 16, 24, 32, 35)], "two are removed"
