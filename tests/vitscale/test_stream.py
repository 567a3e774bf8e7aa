"""Batches as they leave the stream: the same whatever the split and the number of threads, each sample once, damage replaced and told."""

import dataclasses
import itertools
import json
import shutil
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.amend import Changes, removals, write_overlay
from data_tools.config import PackConfig
from data_tools.dataset import Dataset, header_hash
from data_tools.pack import pack
from tests.conftest import write_images
from tests.runs import begin
from tests.vitscale.streams import IMAGE_SIZE, PREPROCESS, steps, stream
from vitscale import reading
from vitscale.config import StreamConfig, TrainConfig
from vitscale.decoding import Decoder, Task, View
from vitscale.mixture import Mixture
from vitscale.order import RunOrder
from vitscale.quarantine import QuarantineError
from vitscale.reading import Reader, Stretch
from vitscale.resolve import open_data
from vitscale.run import RunError
from vitscale.stream import ahead, evaluation_batches
from vitscale.workers import Rows


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> list[Dataset]:
    """Of several shapes: one shard, many, shards of one sample, more shards than samples a batch."""
    folder = tmp_path_factory.mktemp("shapes")
    made = [Dataset.open(dataset / "train")]
    for name, count, samples_per_shard in (("one-shard", 23, 100), ("single", 7, 1), ("many", 40, 3)):
        pack(
            PackConfig(
                sources=(str(write_images(folder / name, count, 5)),), out=str(folder / "out" / name), samples_per_shard=samples_per_shard
            )
        )
        made.append(Dataset.open(folder / "out" / name / "train"))
    return made


BROKEN = np.array([0, 3, 4, 17, 22])


def renamed(folder: Path) -> Dataset:
    """The dataset in a folder under another name, so that it counts as another one."""
    header = json.loads((folder / "dataset.json").read_text()) | {"name": "spoiled"}
    (folder / "dataset.json").write_text(json.dumps(header | {"content_hash": header_hash(header)}))
    return Dataset.open(folder)


@pytest.fixture(scope="session")
def spoiled(tmp_path_factory: pytest.TempPathFactory, datasets: list[Dataset]) -> list[Dataset]:
    """Two of them, each with a byte flipped in the images of five samples; for their other names they count as other datasets."""
    made = []
    for of in (datasets[1], datasets[3]):
        folder = tmp_path_factory.mktemp("spoiled") / "train"
        shutil.copytree(of.path, folder)
        renamed(folder)
        located = of.locate(BROKEN)
        for shard, start, end, _ in map(located.place, range(len(BROKEN))):
            tar = folder / of.shard_names[shard]
            content = bytearray(tar.read_bytes())
            content[(start + end) // 2] ^= 0xFF
            tar.write_bytes(content)
        made.append(Dataset.open(folder))
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_step_is_the_same_under_every_split(datasets: list[Dataset], spoiled: list[Dataset], tmp_path: Path, data: st.DataObject) -> None:
    """Samples, labels, keys and pixels of each step, over epochs' ends, of one dataset or several, whole or damaged: equal for any world
    size, micro-batch, number of threads and way of reading, also where these change from one step to the next."""
    chosen = data.draw(st.lists(st.sampled_from([*datasets, *spoiled]), min_size=1, max_size=2, unique_by=lambda of: of.content_hash))
    dataset = Mixture(chosen)
    weights = data.draw(st.sampled_from([(), (1.0, 3.0), (0.9, 0.1)])) if len(chosen) == 2 else ()
    batch = data.draw(st.sampled_from([4, 12, 24]))
    seed, samples_seen = data.draw(st.integers(0, 2**32)), batch * data.draw(st.integers(0, 10))
    lanes = data.draw(st.sampled_from([0, 1, 2, 4]))
    config = StreamConfig(lanes=lanes, window=data.draw(st.sampled_from([0, 1, 5, 64])), workers=1, reads="samples")
    run = {"batch": batch, "seed": seed, "weights": weights}
    reference = steps(dataset, tmp_path, 3, samples_seen, world_size=1, micro=batch, config=config, **run)
    broken = {sample for of, first in zip(chosen, dataset.first_samples, strict=True) if of in spoiled for sample in BROKEN + first}
    assert not broken & {sample for step in reference for _, sample, _, _ in step}
    for first, count in data.draw(st.sampled_from([[(0, 3)], [(0, 1), (1, 2)], [(0, 2), (2, 1)]])):
        world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 12) if batch % w == 0]))
        micro = data.draw(st.sampled_from([m for m in range(1, batch + 1) if (batch // world_size) % m == 0]))
        split = StreamConfig(
            lanes, config.window, workers=data.draw(st.integers(1, 4)), prefetch=data.draw(st.integers(1, 5)),
            reads=data.draw(st.sampled_from(["auto", "windows", "samples"])), read_threads=data.draw(st.integers(1, 3)),
        )  # fmt: skip
        found = steps(dataset, tmp_path, count, samples_seen + first * batch, world_size=world_size, micro=micro, config=split, **run)
        assert found == reference[first : first + count]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_two_epochs_hold_each_sample_twice(datasets: list[Dataset], tmp_path: Path, data: st.DataObject) -> None:
    """Counted over what the batches of all ranks really held; the last step's surplus begins the third epoch."""
    dataset, world_size = data.draw(st.sampled_from(datasets)), data.draw(st.sampled_from([1, 2, 4]))
    config = StreamConfig(lanes=data.draw(st.sampled_from([0, 2, 4])), window=data.draw(st.sampled_from([0, 3, 17])), workers=2)
    count = -(-2 * dataset.num_samples // 4)
    found = steps(dataset, tmp_path, count, world_size=world_size, micro=1, batch=4, seed=data.draw(st.integers(0, 99)), config=config)
    times = np.bincount([sample for step in found for _, sample, _, _ in step], minlength=dataset.num_samples)
    assert times.min() >= 2
    assert (times - 2).sum() == 4 * count - 2 * dataset.num_samples


def test_an_epoch_by_positions_is_a_permutation(datasets: list[Dataset], tmp_path: Path) -> None:
    for dataset in datasets:
        one = stream(dataset, tmp_path)
        for epoch in range(3):
            positions = np.arange(epoch * dataset.num_samples, (epoch + 1) * dataset.num_samples)
            assert sorted(one.order.samples_at(positions).tolist()) == list(range(dataset.num_samples))


def test_resume_is_one_integer(datasets: list[Dataset], tmp_path: Path) -> None:
    whole = steps(datasets[0], tmp_path, 25, world_size=1, micro=12, batch=12)
    for stop in (1, 10, 11, 24):  # 131 samples: the epoch ends within step 11
        assert steps(datasets[0], tmp_path, 25 - stop, stop * 12, world_size=2, micro=3, batch=12) == whole[stop:]


@pytest.mark.parametrize(("reads", "small"), [("windows", 0), ("windows", 2**20), ("samples", 2**20)])
def test_threads_and_processes_make_the_same_batches(
    datasets: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str, small: int
) -> None:  # fmt: skip
    """Bitwise, for one worker and for four, from the start and from the middle of an epoch; windows in shared memory and in messages."""
    monkeypatch.setattr(reading, "_SMALL", small)
    config = StreamConfig(lanes=4, window=5, workers=1, reads=reads)
    whole = steps(datasets[0], tmp_path, 25, world_size=1, micro=12, batch=12, config=config)
    for workers, processes, stop in ((4, False, 7), (1, True, 0), (4, True, 7), (4, True, 11)):
        split = dataclasses.replace(config, workers=workers, processes=processes)
        assert steps(datasets[0], tmp_path, 25 - stop, stop * 12, world_size=1, micro=6, batch=12, config=split) == whole[stop:]


def test_windows_are_read_once(datasets: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an epoch and all ranks each image's bytes come in once, but for what is read again where a stretch begins within a window."""
    dataset, read = datasets[0], []
    whole = Dataset.read_range
    monkeypatch.setattr(Dataset, "read_range", lambda self, *stretch: read.append(stretch) or whole(self, *stretch))
    config = StreamConfig(lanes=4, window=5, workers=2, reads="windows")
    for rank in range(2):
        for _ in stream(dataset, tmp_path, rank=rank, world_size=2, batch=4, config=config).micro_batches(0, 128):
            pass
    located = dataset.locate(np.arange(dataset.num_samples))
    images = np.zeros(dataset.num_samples, np.int64)
    for shard, start, end in read:
        images += (located.shards == shard) & (located.offsets >= start) & (located.offsets + located.sizes <= end)
    assert images.min() >= 1
    assert len(read) < dataset.num_samples / 2, "samples were read one by one"
    order = stream(dataset, tmp_path, batch=4, config=config).order
    begun_of_next_epoch = sum(count for lane in range(4) for window in range(2) for _, count in order.window_runs(0, 1, lane, window))
    assert images.sum() <= dataset.num_samples + begun_of_next_epoch


def test_a_window_is_let_go_when_its_lane_has_passed_it(datasets: list[Dataset]) -> None:
    """Position by position over two epochs: of what samples were read from, only windows in use are left."""
    order = RunOrder([datasets[0].shard_sizes], None, 0, 4, 5)
    reader = Reader(Mixture([datasets[0]]), order, lambda positions: np.ones(len(positions), np.bool_), shared=False, threads=1)
    in_use: dict[int, tuple[int, ...]] = {}  # by lane
    used: list[tuple[tuple[int, ...], weakref.ref[Stretch]]] = []
    for position in np.arange(2 * datasets[0].num_samples).reshape(-1, 1):
        (window,) = map(tuple, order.windows_at(position).tolist())
        in_use[window[2]] = window
        (awaited,) = reader.start(position, order.samples_at(position))
        assert awaited is not None
        used.append((window, weakref.ref(awaited.stretch)))
        del awaited
        assert [of() is not None for _, of in used] == [of in in_use.values() for of, _ in used]
    reader.close()


def test_a_sample_looks_different_in_each_epoch(datasets: list[Dataset], tmp_path: Path) -> None:
    dataset = datasets[1]
    views: dict[int, set[bytes]] = {}
    for step in steps(dataset, tmp_path, 4 * dataset.num_samples, world_size=1, micro=1, batch=1):
        for _, sample, _, image in step:
            views.setdefault(sample, set()).add(image)
    assert {len(v) for v in views.values()} == {4}


def test_labels_go_with_their_images(datasets: list[Dataset], tmp_path: Path) -> None:
    dataset = datasets[0]
    for batch in itertools.islice(stream(dataset, tmp_path).micro_batches(0), 5):
        for sample, labels in zip(batch.samples_B.tolist(), batch.labels_BL.tolist(), strict=True):
            assert f"class-{labels[0]}" in dataset.key(sample)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> tuple[Dataset, set[int]]:
    """The training split with a byte flipped in the images of three samples."""
    shutil.copytree(dataset / "train", tmp_path / "damaged")
    opened = Dataset.open(tmp_path / "damaged")
    broken = {3, 64, 130}
    for sample in broken:
        shard = tmp_path / "damaged" / opened.shard_of(sample)
        content = bytearray(shard.read_bytes())
        at = content.find(opened.read(sample))
        content[at + 40] ^= 0xFF
        shard.write_bytes(content)
    return Dataset.open(tmp_path / "damaged"), broken


def test_damage_is_replaced_alike_everywhere_and_told(damaged: tuple[Dataset, set[int]], tmp_path: Path) -> None:
    dataset, broken = damaged
    count = 12  # of 12 samples: just past the first epoch's 131
    whole = steps(dataset, tmp_path, count, world_size=1, micro=12, batch=12)
    told = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["sample"] for line in told} == broken
    assert all("xxh3_64" in line["reason"] and line["shard"] == dataset.shard_of(line["sample"]) for line in told)
    used = [sample for step in whole for _, sample, _, _ in step]
    assert not broken & set(used)
    assert set(used) == set(range(dataset.num_samples)) - broken
    assert steps(dataset, tmp_path, count, world_size=3, micro=2, batch=12) == whole


def test_too_much_damage_stops_the_run(damaged: tuple[Dataset, set[int]], tmp_path: Path) -> None:
    dataset, _ = damaged
    batches = stream(dataset, tmp_path, config=StreamConfig(workers=2, max_unusable=2)).micro_batches(0)
    with pytest.raises(QuarantineError, match=r"[34] unusable samples are over stream.max_unusable=2"):
        deque(itertools.islice(batches, 12), maxlen=0)


def test_only_what_is_used_is_told_of_and_earlier_starts_count(damaged: tuple[Dataset, set[int]], tmp_path: Path) -> None:
    """Nothing is read past the end that was asked for, and a budget is for the whole run."""
    dataset, broken = damaged
    for batch in stream(dataset, tmp_path, batch=12).micro_batches(0, 48):
        assert len(batch.samples_B) == 12
    told = [json.loads(line)["position"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    order = stream(dataset, tmp_path, batch=12).order.samples_at(np.arange(48))
    assert sorted(told) == [position for position, sample in enumerate(order.tolist()) if sample in broken]
    assert 0 < len(told) < 3, "the damage must lie on both sides of the end"
    again = stream(dataset, tmp_path, batch=12, config=StreamConfig(workers=2, max_unusable=2)).micro_batches(48, 132)
    with pytest.raises(QuarantineError, match=r"3 unusable samples are over stream.max_unusable=2"):
        deque(again, maxlen=0)


def test_evaluation_leaves_damage_out(damaged: tuple[Dataset, set[int]]) -> None:
    dataset, broken = damaged
    batches = evaluation_batches(Mixture([dataset]), IMAGE_SIZE, PREPROCESS, StreamConfig(workers=2), batch_size=10, rank=0, world_size=1)
    assert sorted(s for b in batches for s, valid in zip(b.samples_B.tolist(), b.valid_B.tolist(), strict=True) if valid) == sorted(
        set(range(dataset.num_samples)) - broken
    )


def test_rows_that_evaluation_leaves_out_are_black(damaged: tuple[Dataset, set[int]]) -> None:
    """Whatever was in the memory: a sample that is damaged, and one that there is none of."""
    mixture, samples = Mixture([damaged[0]]), np.array([2, 3, -1, 4])
    rows = Rows.new((4, *IMAGE_SIZE, 3), shared=False)
    rows.array[:] = 255
    decoder = Decoder(mixture, View(PREPROCESS, "exact", training=False), None)
    task = Task(samples, samples, np.zeros(4, np.uint64), mixture.locate(np.maximum(samples, 0)), [None] * 4)
    assert decoder(task, rows).valid.tolist() == [True, False, False, True]
    assert rows.array.reshape(4, -1).any(axis=1).tolist() == [True, False, False, True]


class Counting(RunOrder):
    """Counts what it is asked for."""

    drawn = 0

    def candidates(self, position: int) -> Iterator[int]:
        for sample in super().candidates(position):
            self.drawn += 1
            yield sample


def test_a_mixture_s_dataset_of_which_nothing_can_be_used_is_known_soon(dataset: Path, tmp_path: Path) -> None:
    """Once each of its own samples was tried; those of the other one never stand in for them."""
    shutil.copytree(dataset / "train", tmp_path / "broken")
    spent = renamed(tmp_path / "broken")
    write_overlay(spent, "most", removals(np.arange(3, 131), pa.array(["asked for"] * 128)))
    shard = tmp_path / "broken" / spent.shard_names[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    mixture = Mixture([Dataset.open(dataset / "val"), Dataset.open(tmp_path / "broken")])
    order = Counting([component.shard_sizes for component in mixture.components], (1, 1), 0, 1, 2**20)
    position = int(order.positions_of(np.array([38]), 1)[0])
    decoder = Decoder(mixture, View(PREPROCESS, "exact", training=True), order, attempts=100)
    at, samples = np.array([position]), order.samples_at(np.array([position]))
    task = Task(at, samples, np.zeros(1, np.uint64), mixture.locate(samples), [None])
    done = decoder(task, Rows.new((1, *IMAGE_SIZE, 3), shared=False))
    assert done.given_up == f"3 samples tried for position {position} were all unusable"
    assert sorted(fault.sample for fault in done.faults) == [37, 38, 39]
    assert order.drawn < 131 * 20, "all that there are were drawn long before"


def test_a_rank_opens_what_the_start_found(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "train", tmp_path / "data")
    begun = begin(replace(config, data=str(tmp_path / "data")))
    assert open_data(begun).num_samples == 131
    renamed(tmp_path / "data")
    with pytest.raises(RunError, match="data is another dataset than when the run started a moment ago; start it again"):
        open_data(begun)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Overlays
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [range(40, 41), range(20, 90), range(3, 131)])
def test_what_an_overlay_removes_is_replaced_in_silence(dataset: Path, tmp_path: Path, removed: range) -> None:
    """One sample, whole shards, all but three of 131; others stay at their positions, and nothing counts against the budget."""
    shutil.copytree(dataset / "train", tmp_path / "data")
    packed = Dataset.open(tmp_path / "data")
    config = StreamConfig(workers=2, max_unusable=0, window=16, lanes=2)
    before = steps(packed, tmp_path, 11, world_size=1, micro=12, batch=12, config=config)
    write_overlay(packed, "takedown", removals(np.array(removed), pa.array(["asked for"] * len(removed))))
    for shard in {packed.shard_of(i) for i in removed} - {packed.shard_of(i) for i in range(131) if i not in removed}:
        (tmp_path / "data" / shard).unlink()  # nobody may want it
    amended = Dataset.open(tmp_path / "data")
    after = steps(amended, tmp_path, 11, world_size=1, micro=12, batch=12, config=config)
    assert not (tmp_path / "quarantine.jsonl").exists()
    for step_before, step_after in zip(before, after, strict=True):
        for row, amended_row in zip(step_before, step_after, strict=True):
            assert row[0] == amended_row[0]  # the key of the position
            assert (row == amended_row) if row[1] not in removed else (amended_row[1] not in removed)
    assert steps(amended, tmp_path, 11, world_size=3, micro=2, batch=12, config=config) == after
    batches = evaluation_batches(Mixture([amended]), IMAGE_SIZE, PREPROCESS, StreamConfig(workers=2), batch_size=10, rank=0, world_size=1)
    assert sorted(s for b in batches for s, valid in zip(b.samples_B.tolist(), b.valid_B.tolist(), strict=True) if valid) == sorted(
        set(range(131)) - set(removed)
    )


def test_other_labels_come_with_the_batches(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "train", tmp_path / "data")
    packed = Dataset.open(tmp_path / "data")
    others = Changes(
        np.array([7]),
        pa.nulls(1, pa.bool_()),
        pa.array([[4, 0, 2]], pa.list_(pa.int32())),
        pa.array([[]], pa.list_(pa.float32())),
        pa.array([""]),
    )
    write_overlay(packed, "relabel", others)
    amended = Dataset.open(tmp_path / "data")
    found = {}
    for batch in stream(amended, tmp_path, batch=131).micro_batches(0, 131):
        found.update(zip(batch.samples_B.tolist(), batch.labels_BL.tolist(), strict=True))
    assert found.pop(7) == [4, 0, 2]
    expected, _ = packed.labels(np.arange(131))
    assert found == {i: [expected[i][0], -1, -1] for i in range(131) if i != 7}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 50), which=st.integers(0, 3))
def test_evaluation_sees_each_sample_once(datasets: list[Dataset], world_size: int, batch_size: int, which: int) -> None:
    """Also where there are more ranks than samples; all ranks see equally many batches, and together those that one sees."""
    dataset = datasets[which]
    seen, counts = [], set()
    for rank in range(world_size):
        batches = list(
            evaluation_batches(
                Mixture([dataset]), IMAGE_SIZE, PREPROCESS, StreamConfig(workers=2), batch_size=batch_size, rank=rank, world_size=world_size
            )
        )
        counts.add(len(batches))
        seen += [batch.samples_B[batch.valid_B].tolist() for batch in batches if batch.valid_B.any()]
    assert seen == [list(range(dataset.num_samples))[first : first + batch_size] for first in range(0, dataset.num_samples, batch_size)]
    assert len(counts) == 1


# ---------------------------------------------------------------------------------------------------------------------------------------
# Ahead of time and in parallel
# ---------------------------------------------------------------------------------------------------------------------------------------


class Thing:
    """What a weak reference can be made to."""


@given(length=st.integers(0, 12), count=st.integers(0, 5))
def test_so_many_are_begun_ahead_and_none_is_kept(length: int, count: int) -> None:
    begun: list[weakref.ref[Thing]] = []

    def begin(_: int) -> Thing:
        thing = Thing()
        begun.append(weakref.ref(thing))
        return thing

    given = 0
    for thing in ahead(map(begin, range(length)), count):
        assert begun[given]() is thing
        del thing
        given += 1
        assert len(begun) == min(given + count, length)
        assert [of() is None for of in begun] == [True] * given + [False] * (len(begun) - given)
    assert given == length
