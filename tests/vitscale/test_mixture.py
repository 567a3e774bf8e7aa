"""Several datasets as one: what a sample's number leads to, what a run of them remembers and refuses, and a real run that is resumed."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.amend import removals, write_overlay
from data_tools.config import PackConfig
from data_tools.dataset import Dataset, DatasetError, SampleError
from data_tools.pack import pack
from tests.conftest import write_images
from tests.distributed import run_on_ranks
from tests.runs import TOLERANCE, begin, case, last_start, variant
from vitscale.config import ConfigError, TrainConfig, from_dict, to_dict
from vitscale.mixture import Mixture
from vitscale.resolve import resolve
from vitscale.run import RunError, read_config, read_record, used_overlays
from vitscale.status import status
from vitscale.timeline import timeline_of
from vitscale.which import which_step


@pytest.fixture
def mixture(dataset: Path, second: Path) -> Mixture:
    return Mixture.open([dataset / "train", second])


def everyone(mixture: Mixture) -> Iterator[tuple[int, Dataset, int]]:
    """Each number of the mixture, with the dataset and the number there that it must lead to."""
    number = 0
    for dataset in mixture.components:
        for own in range(dataset.num_samples):
            yield number, dataset, own
            number += 1


def test_a_number_leads_to_its_dataset(mixture: Mixture) -> None:
    for opened in (mixture, pickle.loads(pickle.dumps(mixture))):
        for number, dataset, own in everyone(opened):
            assert opened.name_of(number) == (dataset.name, dataset.shard_of(own), dataset.key(own))
    assert number + 1 == mixture.num_samples
    for beyond in (-1, mixture.num_samples):
        with pytest.raises(IndexError):
            mixture.find(beyond)
        with pytest.raises(IndexError):
            mixture.locate(np.array([0, beyond]))


def test_many_at_once_are_each_alone(mixture: Mixture) -> None:
    numbers = np.random.default_rng(0).permutation(mixture.num_samples)
    located, (labels, scores) = mixture.locate(numbers), mixture.labels(numbers)
    for row, number in enumerate(numbers.tolist()):
        dataset, own = mixture.find(number)
        place = located.place(row)
        data = mixture.read_range(place.shard, place.start, place.end)
        assert mixture.checked(number, data, place) == data == dataset.read(own)
        of_own, scores_of_own = dataset.labels(np.array([own]))
        assert labels[row, : dataset.max_labels].tolist() == of_own[0].tolist()
        assert scores[row, : dataset.max_labels].tolist() == scores_of_own[0].tolist()
        with pytest.raises(SampleError, match="xxh3"):
            mixture.checked(number, data[:-1] + bytes([data[-1] ^ 1]), place)
    assert not mixture.is_remote(numbers).any()


def test_removed_samples_are_those_of_each_dataset(dataset: Path, second: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(path, tmp_path / str(i)) for i, path in enumerate((dataset / "train", second))]
    for path, samples in zip(copies, ([3, 5], [0, 42]), strict=True):
        write_overlay(Dataset.open(path), "takedown", removals(np.array(samples), pa.array(["asked for"] * 2)))
    mixture = Mixture.open(copies)
    gone = {number for number, of, own in everyone(mixture) if of.overlay.is_removed(own)}
    assert len(gone) == mixture.num_removed == 4
    assert set(np.flatnonzero(mixture.removed(np.arange(mixture.num_samples))).tolist()) == gone
    assert {number for number in range(mixture.num_samples) if mixture.is_removed(number)} == gone
    assert Mixture.open(copies, [(), ()]).num_removed == 0


def test_labels_of_datasets_with_more_and_fewer_a_sample(tmp_path: Path, dataset: Path) -> None:
    images = write_images(tmp_path / "images", 4, 3)
    table = {"path": [str(path) for path in sorted(images.rglob("*.png"))], "labels": [["class-0", f"class-{i}"] for i in range(1, 5)]}
    pq.write_table(pa.table(table), tmp_path / "images.parquet")
    (tmp_path / "classes.txt").write_text("".join(f"class-{label}\n" for label in range(5)))
    pack(PackConfig((str(tmp_path / "images.parquet"),), str(tmp_path / "out"), class_names=str(tmp_path / "classes.txt")))
    mixture = Mixture.open([dataset / "train", tmp_path / "out" / "train"])
    assert [of.max_labels for of in mixture.components] == [1, 2]
    labels, scores = mixture.labels(np.array([0, 131, 1]))
    assert labels[:, 1].tolist()[::2] == [-1, -1]
    assert labels[1].min() >= 0
    assert scores[:, 1].tolist() == [0, 1, 0]


def test_what_cannot_be_mixed_is_refused(dataset: Path, second: Path, tmp_path: Path, config: TrainConfig) -> None:
    images = write_images(tmp_path / "images", 10, 3)
    (images / "class-4").rename(images / "klasse-4")
    (other,) = pack(PackConfig((str(images),), str(tmp_path / "other")))
    with pytest.raises(DatasetError, match="classes of other names; what is mixed must have the same: pack or index each with"):
        resolve(replace(config, data=(str(second), str(other.path))), 1)
    copied = shutil.copytree(second, tmp_path / "copy")
    with pytest.raises(DatasetError, match="same dataset as"):
        resolve(replace(config, data=(str(second), str(copied))), 1)
    with pytest.raises(ConfigError, match="no dataset"):
        resolve(replace(config, data=()), 1)
    for weights, said in (
        ((1.0,), "=1 for 2 datasets"),
        ((1.0, 0.0), "above 0"),
        ((1.0, -2.0), "above 0"),
        ((1.0, float("nan")), "above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(replace(config, data=(str(second), str(dataset / "train")), data_weights=weights), 1)


def test_a_config_tells_one_dataset_as_text_and_several_as_a_list(config: TrainConfig, second: Path) -> None:
    alone, both = to_dict(config), to_dict(replace(config, data=(config.data, str(second)), data_weights=(3.0, 1.0)))
    assert alone["data"] == config.data
    assert both["data"] == [config.data, str(second)]
    for told in (alone, both):
        assert to_dict(from_dict(TrainConfig, told)) == told
    assert from_dict(TrainConfig, both).datasets == (config.data, str(second))
    del alone["data_weights"]  # a run of before mixtures
    assert from_dict(TrainConfig, alone) == config


def test_a_run_remembers_each_dataset(config: TrainConfig, dataset: Path, second: Path, tmp_path: Path) -> None:
    """Refused by name: another weight, another order, one more or one less. Where they lie may change."""
    moved = shutil.copytree(second, tmp_path / "moved")
    mixed = replace(config, data=(config.data, str(second)), data_weights=(3.0, 1.0), eval_data="", epochs=2.0, steps=0)
    begun = begin(mixed)
    record = json.loads((Path(config.out) / "run.json").read_text())
    assert [of["samples"] for of in record["dataset"]] == [131, 43]
    assert record["total_steps"] == timeline_of(mixed, 174).total_steps == -(-2 * 174 // 24)
    assert begun.eval_data == str(dataset / "val"), "the sibling of the first"
    assert read_config(Path(config.out)) == begun
    assert status(Path(config.out))["dataset"] == record["dataset"]
    begin(replace(mixed, data=(config.data, str(moved))))
    assert last_start(config)["changed"].keys() == {"data"}
    for data, weights, said in [
        (mixed.data, (1.0, 3.0), r"data_weights: \[3.0, 1.0\] -> \[1.0, 3.0\]"),
        ((str(second), config.data), (3.0, 1.0), "give the same dataset, in the same order"),
        (config.data, (), "was begun with 2 datasets"),
    ]:
        with pytest.raises(RunError, match=said):
            begin(replace(mixed, data=data, data_weights=weights))


def test_overlays_of_each_dataset_are_remembered(config: TrainConfig, second: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(path, tmp_path / str(i)) for i, path in enumerate((config.data, second))]
    mixed = replace(config, data=tuple(map(str, copies)))
    begin(mixed)
    assert last_start(config)["overlays"] == {"data": [], "data.1": [], "eval_data": []}
    file = write_overlay(Dataset.open(copies[1]), "takedown", removals(np.array([5]), pa.array(["asked for"])))
    begin(mixed)
    assert used_overlays(Path(config.out)) == {"data": (), "data.1": (file.name,), "eval_data": ()}
    file.unlink()
    with pytest.raises(RunError, match="which is no more in"):
        begin(mixed)


def test_a_dataset_of_which_overlays_leave_nothing_is_refused_in_a_mixture(config: TrainConfig, second: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(second, tmp_path / "copy")
    packed = Dataset.open(copy)
    write_overlay(packed, "all", removals(np.arange(packed.num_samples), pa.array(["why not"] * packed.num_samples)))
    with pytest.raises(DatasetError, match="copy holds no samples that its overlays leave"):
        resolve(replace(config, data=(config.data, str(copy))), 1)


def test_a_run_of_two_datasets_goes_on_at_another_world_size(config: TrainConfig, second: Path, tmp_path: Path) -> None:
    """Stopped in the middle on one rank and resumed on two, it sees the images and draws the loss of the run that was not stopped."""
    mixed = replace(config, data=(str(config.data), str(second)), data_weights=(2.0, 1.5), steps=16)
    walk = "tests.vitscale.test_zero:walk"
    begun = {"part": case(variant(mixed, tmp_path, "part", world_size=1), stop_at=9)}
    part = run_on_ranks(walk, 1, {"cases": begun}, tmp_path)["part"]
    cases = {
        "whole": case(variant(mixed, tmp_path, "whole", world_size=2)),
        "rest": case(variant(mixed, tmp_path, "rest", world_size=2), copy_of=str(tmp_path / "part")),
    }
    whole, rest = run_on_ranks(walk, 2, {"cases": cases}, tmp_path).values()
    losses = [part["losses"][str(step)] for step in range(1, 10)] + [rest["losses"][str(step)] for step in range(10, 17)]
    np.testing.assert_allclose(losses, [whole["losses"][str(step)] for step in range(1, 17)], rtol=TOLERANCE)
    assert (part["images"][0] + rest["images"][0]) % 2**62 == whole["images"][0] % 2**62, "the same images"
    assert [start["step"] for start in read_record(tmp_path / "rest")["starts"]] == [0, 9]
    assert [which_step(tmp_path / "rest", step).world_size for step in (9, 10)] == [1, 2]
