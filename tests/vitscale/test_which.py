"""`vitscale run which`, against what a run's batches really held: with removed and damaged samples, overlays between starts."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_tools.amend import removals, write_overlay
from data_tools.config import PackConfig
from data_tools.dataset import Dataset, header_hash
from data_tools.pack import pack
from tests.command import SMALL, vitscale
from tests.conftest import write_images
from tests.runs import begin, log
from vitscale.config import Phase, StreamConfig, TrainConfig
from vitscale.mixture import Mixture
from vitscale.run import RunError, note_begin, overlay_fields, used_overlays
from vitscale.stream import Share, TrainStream
from vitscale.timeline import timeline_of
from vitscale.which import which_sample, which_step

LAYOUTS = [StreamConfig(workers=1), StreamConfig(lanes=4, window=5, workers=1)]


def run_steps(config: TrainConfig, first: int, last: int, world_size: int) -> dict[int, list[list[int]]]:
    """A start that makes the steps after `first` up to `last`, without a model: of each step the samples of each rank."""
    config = begin(replace(config, micro_batch_size=config.global_batch_size // world_size), world_size)
    run = Path(config.out)
    note_begin(run, first)
    overlays = used_overlays(run)
    mixture = Mixture.open(config.datasets, [overlays[name] for name in overlay_fields(len(config.datasets))])
    timeline = timeline_of(config, mixture.num_samples)
    held: dict[int, list[list[int]]] = {step: [] for step in range(first + 1, last + 1)}
    for rank in range(world_size):
        stream = TrainStream(
            mixture, config.preprocess, config.stream, Share(timeline, rank, world_size), seed=config.seed,
            quarantine=run / "quarantine.jsonl", weights=config.data_weights,
        )  # fmt: skip
        for step, made in zip(held, stream.micro_batches(timeline.samples_at(first), timeline.samples_at(last)), strict=True):
            held[step].append(made.samples_B.tolist())
    log(config, *({"step": step, "samples_seen": timeline.samples_at(step), "loss": 1.0} for step in held))
    return held


def remove(path: Path, samples: list[int]) -> None:
    write_overlay(Dataset.open(path), "takedown", removals(np.array(samples), pa.array(["asked for"] * len(samples))))


@pytest.fixture(params=LAYOUTS, ids=["one lane", "lanes"])
def past(request: pytest.FixtureRequest, config: TrainConfig, second: Path, tmp_path: Path) -> tuple[TrainConfig, dict]:
    """A run of two datasets and three starts, between which samples are removed, with damaged ones; and what its batches held."""
    copies = [shutil.copytree(path, tmp_path / f"data-{i}") for i, path in enumerate((config.data, second))]
    for path, sample in zip(copies, (17, 4), strict=True):
        packed = Dataset.open(path)
        located = packed.locate(np.array([sample]))
        with (path / packed.shard_names[int(located.shards[0])]).open("r+b") as tar:
            tar.seek(int(located.offsets[0]) + 20)
            tar.write(bytes(30))
    remove(copies[0], [3, 5, 40])
    config = replace(config, data=tuple(map(str, copies)), data_weights=(2.0, 1.0), stream=request.param)
    held = run_steps(config, 0, 8, 2)
    remove(copies[1], [8, *range(20, 40)])
    held |= run_steps(config, 8, 15, 3)
    remove(copies[0], list(range(50, 130)))  # leaves windows with nothing
    held |= run_steps(config, 12, 27, 1)  # from an earlier checkpoint
    return config, held


def test_a_step_saw_what_its_batches_held(past: tuple[TrainConfig, dict]) -> None:
    config, held = past
    run, batch = Path(config.out), config.global_batch_size
    mixture = Mixture.open(config.datasets)
    replaced = 0
    for step, ranks in held.items():
        found = which_step(run, step)
        assert (found.made, found.world_size) == (True, len(ranks))
        assert [seen.position for seen in found.samples] == list(range((step - 1) * batch, step * batch))
        for rank, samples in enumerate(ranks):
            seen = which_step(run, step, rank).samples
            assert [(of.dataset, of.shard, of.key) for of in seen] == [mixture.name_of(sample) for sample in samples]
            assert [of.sample for of in seen] == [mixture.find(sample)[1] for sample in samples]
            assert seen == tuple(of for of in found.samples if of.rank == rank)
        for of in found.samples:
            replaced += len(of.instead_of) > 0
    reasons = {other.reason.split(":")[0].split(" ")[0] for step in held for of in which_step(run, step).samples for other in of.instead_of}
    assert replaced > 20
    assert len(reasons) >= 2, "some were removed and some damaged"


def test_every_time_that_a_sample_was_seen_is_found(past: tuple[TrainConfig, dict]) -> None:
    """All samples of both datasets: their own positions, and those of others that they stood in for."""
    config, held = past
    run = Path(config.out)
    mixture = Mixture.open(config.datasets)
    truth: dict[int, list[int]] = {sample: [] for sample in range(mixture.num_samples)}
    for step, ranks in sorted(held.items()):
        for samples in ranks:
            for sample in samples:
                truth[sample].append(step)
    stood_in = 0
    for component, first in zip(mixture.components, mixture.first_samples.tolist(), strict=True):
        for own in [*range(0, component.num_samples, 40), 3, 4]:
            found = which_sample(run, component.key(own))
            starts = {mixture.name_of(start)[0]: start for start in mixture.first_samples.tolist()}
            of_key = [starts[named.dataset] + named.sample for named in found.samples]
            assert own + first in of_key
            assert sorted(line["step"] for line in found.seen) == sorted(step for sample in of_key for step in truth[sample])
            stood_in += sum(line["stood_in"] for line in found.seen)
    assert stood_in > 0


def test_a_lane_that_is_gone_sends_its_searches_to_the_next(config: TrainConfig, tmp_path: Path) -> None:
    """A shard is as long as a lane, so that in some epoch a whole lane is removed."""
    pack(PackConfig(sources=(str(write_images(tmp_path / "images", 96, 0)),), out=str(tmp_path / "packed"), samples_per_shard=24))
    path = tmp_path / "packed" / "train"
    dataset = Dataset.open(path)
    remove(path, list(range(24, 48)))
    config = replace(config, data=str(path), stream=LAYOUTS[1], steps=16, schedule=replace(config.schedule, warmup_steps=0))
    truth: dict[int, set[int]] = {sample: set() for sample in range(96)}
    for step, ranks in run_steps(config, 0, 16, 1).items():
        for sample in ranks[0]:
            truth[sample].add(step)
    for sample, steps in truth.items():
        assert {line["step"] for line in which_sample(Path(config.out), dataset.key(sample)).seen} == steps, sample


@pytest.mark.parametrize("past", LAYOUTS[1:], indirect=True)
def test_data_that_moved(past: tuple[TrainConfig, dict], dataset: Path, tmp_path: Path) -> None:
    config, _ = past
    run = Path(config.out)
    before = which_step(run, 20)
    moved = [shutil.move(path, tmp_path / f"moved-{i}") for i, path in enumerate(config.datasets)]
    with pytest.raises(RunError, match="--data says where it lies now"):
        which_step(run, 20)
    assert which_step(run, 20, data=moved) == before
    for wrong, said in (
        (moved[::-1], "not what"),
        (moved[:1], "trained on 2 datasets, and --data names 1"),
        ([dataset, moved[1]], "dataset"),
    ):
        with pytest.raises(RunError, match=said):
            which_step(run, 20, data=wrong)


def test_what_was_not_is_said_in_one_line(config: TrainConfig, tmp_path: Path) -> None:
    run_steps(config, 0, 3, 1)
    run = Path(config.out)
    for step in (0, -1, 28):
        with pytest.raises(RunError, match=r"has no step .*; it has steps 1 to 27"):
            which_step(run, step)
    with pytest.raises(RunError, match="ranks 0 to 0"):
        which_step(run, 2, rank=1)
    with pytest.raises(RunError, match=r"no dataset of .* has a sample with the key 'nobody'"):
        which_sample(run, "nobody")
    with pytest.raises(RunError, match="does not exist"):
        which_step(tmp_path / "nowhere", 1)
    assert [which_step(run, step).made for step in (3, 4)] == [True, False]
    record = json.loads((run / "run.json").read_text())
    del record["starts"][-1]["step"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="does not tell which start made step 2"):
        which_step(run, 2)


def test_without_samples_steps_are_told_and_keys_are_not(config: TrainConfig, tmp_path: Path) -> None:
    """As of a dataset that somebody made without them."""
    copy = shutil.copytree(config.data, tmp_path / "copy")
    shutil.rmtree(copy / "samples")
    header = json.loads((copy / "dataset.json").read_text())
    header["files"] = {name: entry for name, entry in header["files"].items() if not name.startswith("samples/")}
    (copy / "dataset.json").write_text(json.dumps(header | {"content_hash": header_hash(header)}))
    run_steps(replace(config, data=str(copy)), 0, 2, 1)
    assert {of.key for of in which_step(Path(config.out), 1).samples} == {"?"}
    with pytest.raises(RunError, match="samples/, on a disk: --data says where"):
        which_sample(Path(config.out), "any")


def test_as_typed(dataset: Path, second: Path, tmp_path: Path) -> None:
    """On a run of two datasets that the command made: what a step saw, and from a key of it back to the step."""
    out = tmp_path / "run"
    words = ("pretrain", "tiny-digits", "--data", dataset / "train", second, "--data-weights", 1, 3, "--out", out, *SMALL, "--json")
    done = vitscale(*words)
    assert done.returncode == 0, done.stderr
    assert [of["samples"] for of in json.loads(done.stdout)["dataset"]] == [131, 43]
    seen = [seen for n in range(1, 7) for seen in json.loads(vitscale("run", "which", out, "--step", n, "--json").stdout)["samples"]]
    assert Counter(of["dataset"] for of in seen) == {"train": 12, "images": 36}
    step = json.loads(vitscale("run", "which", out, "--step", 2, "--json").stdout)
    assert [seen["position"] for seen in step["samples"]] == list(range(8, 16))
    key = step["samples"][0]["key"]
    back = json.loads(vitscale("run", "which", out, "--sample", key, "--json").stdout)
    assert {"step": 2, "position": 8, "stood_in": False} in back["seen"]
    assert back["checkpoints"] == ["step-00000003", "step-00000006"]
    told = vitscale("run", "which", out, "--sample", key).stdout
    assert "step 2, position 8\n" in told
    assert "checkpoints that were trained on it: step-00000003, step-00000006" in told
    assert (
        f"position 8, rank 0: sample {step['samples'][0]['sample']}, {key} in shards/" in vitscale("run", "which", out, "--step", 2).stdout
    )
    for words in ((), ("--step", 1, "--sample", key), ("--rank", 0, "--sample", key)):
        done = vitscale("run", "which", out, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--step N" in done.stderr
    done = vitscale("run", "which", out, "--step", 7)
    assert (done.returncode, done.stderr) == (1, f"error: {out} has no step 7; it has steps 1 to 6\n")


def test_steps_of_phases_are_told_as_they_were(config: TrainConfig) -> None:
    """Of 12, then of 24 images, over an epoch's end: from the step to its samples, and from a sample to all its steps."""
    phases = (Phase(0.3, (8, 16), 12, 12),)
    config = replace(config, schedule=replace(config.schedule, phases=phases), stream=StreamConfig(lanes=4, window=5, workers=1))
    held, run = {step: ranks[0] for step, ranks in run_steps(config, 0, 20, 1).items()}, Path(config.out)
    assert {len(samples) for samples in held.values()} == {12, 24}
    mixture, position = Mixture.open(config.datasets), 0
    for step, samples in held.items():
        seen = which_step(run, step).samples
        assert [(of.position, of.sample) for of in seen] == list(enumerate(samples, start=position))
        position += len(samples)
    assert position > 2 * mixture.num_samples
    for sample in range(0, mixture.num_samples, 9):
        found = which_sample(run, mixture.components[0].key(sample))
        assert found.steps_made == 20
        assert [line["step"] for line in found.seen] == [step for step, samples in held.items() for of in samples if of == sample]
