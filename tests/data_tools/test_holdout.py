"""The two parts of a split: by the rule, written out over the images' bytes, whatever their order; apart from one another and nested."""

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from data_tools.amend import removals, write_overlay
from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.holdout import Part, part_of
from data_tools.pack import pack


def kept(dataset: Dataset) -> set[int]:
    return set(np.flatnonzero(~dataset.overlay.removed(np.arange(dataset.num_samples))).tolist())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_rule_is_the_images_hash(dataset: Path, share: float) -> None:
    whole = Dataset.open(dataset / "train")
    by_hand = {i for i in range(131) if xxhash.xxh3_64_intdigest(whole.read(i)) / 2**64 < share}
    held_out, rest = (Dataset.open(dataset / "train", part=Part(share, side)) for side in (True, False))
    assert 0 < len(by_hand) < 131
    assert kept(held_out) == by_hand
    assert kept(rest) == set(range(131)) - by_hand
    assert (held_out.num_kept, rest.num_kept, whole.num_kept) == (len(by_hand), 131 - len(by_hand), 131)
    assert held_out.overlay.num_removed == rest.overlay.num_removed == 0
    assert kept(pickle.loads(pickle.dumps(rest))) == kept(rest)
    assert [i for batch in held_out.index_batches() for i in batch.samples.tolist()] == sorted(by_hand)
    assert held_out.shard_counts().tolist() == [sum(whole.shard_of(i) == name for i in by_hand) for name in whole.shard_names]


def test_a_larger_share_holds_out_what_a_smaller_one_does(dataset: Path) -> None:
    parts = [kept(Dataset.open(dataset / "train", part=Part(share, True))) for share in (0.02, 0.05, 0.1, 0.3, 0.9)]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert part_of(0.0, held_out=True) is None


def test_another_packing_holds_out_the_same_images(dataset: Path, tmp_path: Path) -> None:
    pack(PackConfig(sources=(str(dataset.parent / "images" / "train"),), out=str(tmp_path), samples_per_shard=50, shuffle_seed=3))
    sides = [Dataset.open(of, part=Part(0.2, True)) for of in (dataset / "train", tmp_path / "train")]
    images = [sorted(of.read(i) for i in kept(of)) for of in sides]
    assert images[0] == images[1]
    assert kept(sides[0]) != kept(sides[1])


def test_shares_are_what_they_say() -> None:
    hashes = np.random.default_rng(0).integers(2**64, size=200_000, dtype=np.uint64)
    for share in (0.01, 0.1):
        assert Part(share, True).holds(hashes).mean() == pytest.approx(share, abs=4 * (share / 200_000) ** 0.5)
    assert Part(0.1, True).holds(np.array([0, 2**64 - 1], np.uint64)).tolist() == [True, False]


def test_overlays_count_on_both_sides(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "train", tmp_path / "data")
    before = [kept(Dataset.open(tmp_path / "data", part=Part(0.2, side))) for side in (True, False)]
    gone = sorted(before[0])[:2] + sorted(before[1])[:3]
    write_overlay(Dataset.open(tmp_path / "data"), "takedown", removals(np.array(sorted(gone)), pa.array(["asked for"] * 5)))
    held_out, rest = (Dataset.open(tmp_path / "data", part=Part(0.2, side)) for side in (True, False))
    assert [kept(held_out), kept(rest)] == [side - set(gone) for side in before]
    assert (held_out.overlay.num_removed, rest.overlay.num_removed) == (5, 5)
    assert (held_out.num_kept, rest.num_kept) == (len(before[0]) - 2, len(before[1]) - 3)
