"""A stream whose shards are damaged, gone or slow, or whose workers die: it goes on or ends with one line, and never hangs."""

import dataclasses
import errno
import functools
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from data_tools import ranges
from data_tools.config import PackConfig
from data_tools.dataset import INDEX_SCHEMA, Dataset
from data_tools.pack import pack
from tests.command import SMALL, VITSCALE
from tests.conftest import write_images
from tests.data_tools.mutations import mutated
from tests.vitscale.streams import stream
from vitscale import reading
from vitscale.config import StreamConfig
from vitscale.mixture import Mixture
from vitscale.quarantine import Fault, Quarantine, QuarantineError
from vitscale.reading import Reader, ReadError
from vitscale.run import cut_back
from vitscale.stream import Batch, StreamError

MUTATIONS = 2000  # by `make soak`
SAMPLE = 60  # of them, each time


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in six shards."""
    folder = tmp_path_factory.mktemp("small")
    pack(PackConfig(sources=(str(write_images(folder / "images", 30, 3)),), out=str(folder / "out"), samples_per_shard=5))
    return folder / "out" / "train"


def epoch(dataset: Dataset, folder: Path, config: StreamConfig) -> Batch:
    """An epoch in one batch."""
    return next(stream(dataset, folder, batch=dataset.num_samples, seed=1, config=config).micro_batches(0, dataset.num_samples))


def mutate(small: Path, copy: Path, rng: random.Random) -> None:
    """Damages one to three of the shards."""
    shutil.copytree(small, copy)
    for shard in rng.sample(sorted(copy.rglob("*.tar")), rng.randint(1, 3)):
        content = shard.read_bytes()
        shard.write_bytes(rng.choice([mutated(content, rng), b"", bytes(len(content)), rng.randbytes(len(content)), content * 2]))


def walk_mutations(small: Path, tmp_path: Path, seeds: range) -> None:
    """Each sample whose bytes are whole is used where it stands, each other one is told of, and another one stands in for it."""
    for seed in seeds:
        rng = random.Random(seed)
        copy = tmp_path / f"mutation-{seed}"
        mutate(small, copy, rng)
        dataset = Dataset.open(copy, check_shards=False)
        located = dataset.locate(np.arange(dataset.num_samples))
        tars = [(copy / name).read_bytes() for name in dataset.shard_names]
        bytes_now = [tars[s][o : o + n] for s, o, n in zip(located.shards, located.offsets, located.sizes, strict=True)]
        broken = {i for i, data in enumerate(bytes_now) if xxhash.xxh3_64_intdigest(data) != located.hashes[i]}
        config = StreamConfig(lanes=rng.choice([1, 2]), window=8, workers=2, reads=rng.choice(["windows", "samples"]))
        same_order = epoch(Dataset.open(small), copy, config)
        found = epoch(dataset, copy, config)
        told = [json.loads(line) for line in (copy / "quarantine.jsonl").read_text().splitlines()] if broken else []
        assert {line["sample"] for line in told} == broken, seed
        assert all(line["shard"] == dataset.shard_of(line["sample"]) and line["key"] == dataset.key(line["sample"]) for line in told), seed
        assert not broken & set(found.samples_B.tolist()), seed
        for place, (sample, expected) in enumerate(zip(found.samples_B.tolist(), same_order.samples_B.tolist(), strict=True)):
            if expected not in broken:
                assert sample == expected, seed
                assert np.array_equal(found.images_BHWC[place], same_order.images_BHWC[place]), seed
        shutil.rmtree(copy)


def test_mutated_shards_lose_what_is_damaged_and_nothing_else(small: Path, tmp_path: Path) -> None:
    walk_mutations(small, tmp_path, range(SAMPLE))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_mutated_shards(small: Path, tmp_path: Path) -> None:
    walk_mutations(small, tmp_path, range(SAMPLE, MUTATIONS))


@pytest.mark.parametrize("processes", [False, True])
def test_a_damaged_index_loses_what_is_damaged_and_reads_no_more(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:  # fmt: skip
    """A sample of each window has a place that is none: its neighbours are read without it, into memory that workers share or not."""
    shutil.copytree(small, tmp_path / "data")
    index = pa.ipc.open_file(tmp_path / "data" / "index.arrow").read_all().to_pydict()
    index["offset"][2], index["offset"][7], index["offset"][12], index["offset"][17] = -512, 2**40, 2**63 - 1, -(2**63)
    index["size"][22], index["size"][27] = -1, 2**31 - 1
    with pa.ipc.new_file(tmp_path / "data" / "index.arrow", INDEX_SCHEMA) as file:
        file.write_table(pa.table(index, INDEX_SCHEMA))
    whole, asked = Dataset.read_range, []
    monkeypatch.setattr(Dataset, "read_range", lambda self, *stretch: asked.append(stretch) or whole(self, *stretch))
    monkeypatch.setattr(reading, "_SMALL", 0)
    epoch(Dataset.open(tmp_path / "data"), tmp_path, StreamConfig(lanes=1, window=5, workers=2, reads="windows", processes=processes))
    assert {json.loads(line)["sample"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()} == set(range(2, 30, 5))
    assert max(end - start for _, start, end in asked) <= 2 * sum(map(abs, index["size"])) + 2**20


@pytest.mark.parametrize("reads", ["windows", "samples"])
@pytest.mark.parametrize("processes", [False, True])
def test_a_missing_shard_ends_the_run_in_one_line(small: Path, tmp_path: Path, reads: str, processes: bool) -> None:
    shutil.copytree(small, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    (tmp_path / "data" / dataset.shard_names[2]).unlink()
    with pytest.raises(ReadError, match=rf"{dataset.shard_names[2]} cannot be read \(No such file or directory\); `vitscale data repair`"):
        epoch(dataset, tmp_path, StreamConfig(lanes=2, window=8, workers=2, reads=reads, processes=processes))
    assert not (tmp_path / "quarantine.jsonl").exists(), "which samples a run sees must not depend on a disk's moods"


@pytest.mark.parametrize("reads", ["windows", "samples"])
def test_a_read_that_never_ends_ends_the_run(small: Path, tmp_path: Path, reads: str) -> None:
    """A named pipe in place of a shard: who opens it waits for a writer that never comes, as on a file system whose server is gone."""
    shutil.copytree(small, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    shard = tmp_path / "data" / dataset.shard_names[2]
    shard.unlink()
    os.mkfifo(shard)
    what = f"reading {dataset.shard_names[2]}" if reads == "windows" else f"reading or decoding .*{dataset.shard_names[2]}"
    with pytest.raises(StreamError, match=rf"{what}.* for stream.read_timeout=1 seconds; is the storage still there"):
        epoch(dataset, tmp_path, StreamConfig(lanes=2, window=8, workers=2, reads=reads, read_timeout=1))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_mood_of_the_file_system_passes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Read again, and by a handle opened anew: the first one of each tar stays stale."""
    whole = epoch(Dataset.open(small), tmp_path, StreamConfig(workers=1))
    handles: Counter[str] = Counter()

    class Moody(ranges._OpenFile):
        def __init__(self, path: str, of: object) -> None:
            super().__init__(path)
            handles[path] += 1
            self.stale = handles[path] == 1

        def read(self, start: int, end: int) -> bytes:
            if self.stale:
                raise OSError(number, os.strerror(number))
            return super().read(start, end)

    monkeypatch.setattr(reading, "_WAITS", (0.001,) * 8)
    monkeypatch.setattr(ranges, "_open_file", functools.lru_cache(8)(Moody))
    found = epoch(Dataset.open(small), tmp_path, StreamConfig(workers=1))
    assert np.array_equal(found.images_BHWC, whole.images_BHWC)
    assert len(handles) == 6
    assert min(handles.values()) > 1


def test_a_disk_that_stays_ill_ends_the_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def ill(self: ranges._OpenFile, start: int, end: int) -> bytes:
        tried.append(start)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading, "_WAITS", (0.001,) * 3)
    monkeypatch.setattr(ranges._OpenFile, "read", ill)
    with pytest.raises(ReadError, match=r"\.tar cannot be read \(Input/output error\); the same command goes on when it can be"):
        epoch(Dataset.open(small), tmp_path, StreamConfig(workers=1))
    assert len(tried) >= 4


def test_datasets_of_many_tars_share_the_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of 70 tars each, where a process may have 40 files open beside those that it has."""
    made = []
    for number in range(4):
        source = write_images(tmp_path / f"images-{number}", 70, number)
        (one,) = pack(PackConfig(sources=(str(source),), out=str(tmp_path / f"out-{number}"), samples_per_shard=1))
        made.append(Dataset.open(one.path))
    monkeypatch.setattr(ranges, "_open_file", functools.lru_cache(30)(ranges._OpenFile))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        mixture = Mixture(made)
        located = mixture.locate(np.arange(mixture.num_samples))
        for sample in range(mixture.num_samples):
            place = located.place(sample)
            data = mixture.read_range(place.shard, place.start, place.end)
            assert mixture.checked(sample, data, place) == data
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_torn_line_of_the_quarantine_keeps_nothing_from_going_on(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    faults = [Fault(position, position, "d", "s", f"key-{position}", "damaged") for position in range(4)]
    Quarantine(file, 0, max_samples=9, max_per_shard=9).add(faults[:2])
    whole = file.read_bytes()
    for torn in (b'{"posi', b'{"a": 1}\n', b"5\n", b"\n", b"\0\0\n", b"\xff\xfe\n", b'{"position": "x"}\n'):
        file.write_bytes(whole + torn)
        again = Quarantine(file, 1, max_samples=3, max_per_shard=9)
        again.add(faults[2:3])  # its first line may be lost behind half a line; the budget still counts what can be read
        with pytest.raises(QuarantineError, match=r"[45] unusable samples are over|[45] unusable samples in"):
            again.add([*faults[3:], Fault(9, 9, "d", "s", "key-9", "damaged")])
        cut_back(tmp_path, 0, 2)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(("lanes", "window", "micro", "prefetch"), [(2, 4, 24, 4), (4, 8, 8, 1), (2, 32, 2, 2), (2, 4, 2, 1)])
def test_no_more_is_held_than_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, window: int, micro: int, prefetch: int
) -> None:
    """Bytes of windows alive at once, over eight epochs, where micro-batches span many windows and where they span none. They go as soon as
    they are let go of: what only the collector of circles would find counts as held."""

    class Held(bytes):
        alive = most = 0
        lock = threading.RLock()  # the same thread may let go of one while it makes another

        def __init__(self, _: bytes) -> None:
            with Held.lock:
                Held.alive += len(self)
                Held.most = max(Held.most, Held.alive)

        def __del__(self) -> None:
            with Held.lock:
                Held.alive -= len(self)

    whole = Reader._read
    monkeypatch.setattr(Reader, "_read", lambda self, *stretch: Held(whole(self, *stretch)))
    opened = Dataset.open(dataset / "train")
    config = StreamConfig(lanes=lanes, window=window, workers=2, prefetch=prefetch, reads="windows")
    ours = stream(opened, tmp_path, batch=24, micro=micro, config=config)
    gc.disable()
    try:
        for _ in ours.micro_batches(0, 8 * 24 * (131 // 24)):
            pass
    finally:
        gc.enable()
    largest = (opened.shard_bytes / opened.shard_sizes).max()  # images are not all of the average size that is reckoned with
    room = largest / (opened.shard_bytes.sum() / opened.num_samples)
    assert 0 < Held.most <= ours.locality.buffered_bytes_per_rank * room


def test_a_line_that_another_rank_is_writing_is_counted_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    lines = b"".join(json.dumps(dataclasses.asdict(Fault(i, i, "d", "s", f"key-{i}", "damaged"))).encode() + b"\n" for i in range(3))
    file.write_bytes(lines[:-20])
    quarantine = Quarantine(file, 0, max_samples=9, max_per_shard=9)
    assert quarantine.count() == 2
    file.write_bytes(lines)
    assert quarantine.count() == 3


def test_too_much_damage_in_one_shard_ends_the_run(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    shard = tmp_path / "data" / dataset.shard_names[4]
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(
        QuarantineError, match=rf"[45] unusable samples in .*{dataset.shard_names[4]} are over stream.max_unusable_per_shard=3; `vits"
    ):
        epoch(dataset, tmp_path, StreamConfig(workers=1, max_unusable_per_shard=3))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------------------------


def run_with_processes(dataset: Path, out: Path) -> subprocess.Popen[str]:
    """A run of two ranks with two worker processes each, that would go on for hours, and is not started again by itself."""
    flags = "--guard.max-restarts 0 --steps 400000 --nproc 2 --eval-data none --log-every 1 --stream.processes --stream.workers 2".split()
    run = subprocess.Popen(
        [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", str(out), *SMALL, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step"):
            return run
    raise AssertionError(run.stderr.read() if run.stderr else "")


def workers_of(run: subprocess.Popen[str]) -> list[int]:
    def children(pid: int) -> list[int]:
        return [int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()]

    return [worker for rank in children(run.pid) for worker in children(rank)]


def test_a_killed_worker_ends_the_run_and_is_named(dataset: Path, tmp_path: Path) -> None:
    run = run_with_processes(dataset, tmp_path / "run")
    workers = workers_of(run)
    assert len(workers) == 4
    killed = time.monotonic()
    os.kill(workers[2], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert run.returncode == 1
    assert f"(process {workers[2]}) was killed by SIGKILL, as the system does where memory runs out" in errors
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists() or Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_an_error_in_a_worker_ends_the_run_and_is_told(dataset: Path, tmp_path: Path) -> None:
    """The tars go away under a run."""
    shutil.copytree(dataset / "train", tmp_path / "data" / "train")
    run = run_with_processes(tmp_path / "data", tmp_path / "run")
    gone = time.monotonic()
    for shard in (tmp_path / "data").rglob("*.tar"):
        shard.rename(shard.with_suffix(".gone"))
        os.truncate(shard.with_suffix(".gone"), 0)
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - gone < 10
    assert run.returncode == 1
    assert "unusable" in errors or "cannot be read" in errors, errors
    assert "Traceback" not in errors
