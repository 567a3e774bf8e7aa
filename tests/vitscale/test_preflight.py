"""That a machine which cannot carry a run is named before the first step, with real processes where the fault can be made for real."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import disks
from tests.distributed import run_on_ranks
from tests.meeting import meet
from vitscale.config import TrainConfig, ViTConfig, to_dict
from vitscale.ending import Cause, Ended
from vitscale.machine import GB, MB, Disk, available_memory, probe_disk
from vitscale.preflight import Machine, Need, all_reduce, contribution, judge_clocks, judge_machines, judge_sums, needed, wrong_elements
from vitscale.run import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What preflight reads of a run."""
    (tmp_path / "run").mkdir()
    model = ViTConfig(depth=1, width=32, mlp_dim=64, num_heads=4, patch_size=8, image_size=(16, 16))
    write_json(tmp_path / "run/config.json", to_dict(TrainConfig(recipe="test", out=str(tmp_path / "run"), model=model)))
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with disks.small_disk(tmp_path / "small", 1 << 20) as folder:
        yield folder


def test_good_machines_pass_with_a_line(run: Path, tmp_path: Path) -> None:
    first, second = meet(tmp_path / "ranks", [{}, {}], run=run)
    assert first
    assert second
    head, *warnings = first["line"].splitlines()
    assert head.startswith("preflight: 2 nodes of 1 rank, ")
    for said in ("of memory free", "run directory ", "scratch ", "clocks agree within ", "all-reduce right"):
        assert said in head
    assert all(warning.startswith("warning: ") for warning in warnings)
    assert second["line"].splitlines()[1:] == warnings
    assert [file.name for file in run.iterdir()] == ["config.json"]  # nothing is left behind


def test_a_full_scratch_is_named(run: Path, tmp_path: Path, small_disk: Path) -> None:
    told = meet(tmp_path / "ranks", [{}, {"TMPDIR": str(small_disk)}, {}], run=run)
    assert told[0] == told[1] == told[2]
    assert told[0] == {
        "cause": "bad node",
        "words": f"preflight: n2: scratch: {small_disk} is full: 1 MB free",
        "bad_nodes": ["n2"],
    }


def test_a_full_run_directory_is_no_nodes_fault(run: Path, tmp_path: Path, small_disk: Path) -> None:
    config = to_dict(TrainConfig(recipe="test", out=str(small_disk)))
    write_json(run / "config.json", config)
    first, second = meet(tmp_path / "ranks", [{}, {}], run=run)
    assert first == second
    assert first
    assert (first["cause"], first["bad_nodes"]) == ("disk full", [])
    assert f"{small_disk} is full: 1 MB free" in first["words"]


def test_what_most_nodes_lack_is_the_settings_fault(run: Path, tmp_path: Path) -> None:
    nowhere = {"TMPDIR": str(tmp_path / "nowhere")}
    first, *_ = meet(tmp_path / "ranks", [{}, nowhere, nowhere], run=run)
    assert first
    assert (first["cause"], first["bad_nodes"]) == ("input", [])
    assert first["words"].startswith("2 of 3 nodes fail preflight, so it is not the nodes: n2: scratch: ")
    assert f"{tmp_path / 'nowhere'} is not there" in first["words"]


@pytest.mark.parametrize(("ahead", "bad"), [({2: "-3600"}, "n3"), ({0: "3600"}, "n1")])
def test_a_wrong_clock_is_named_rank_0s_too(run: Path, tmp_path: Path, ahead: dict[int, str], bad: str) -> None:
    told = meet(tmp_path / "ranks", [{"CLOCK_AHEAD": ahead.get(rank, "0")} for rank in range(3)], run=run)
    assert told[0] == told[1] == told[2]
    assert told[0] == {"cause": "bad node", "words": f"preflight: {bad}: its clock is off by 3600 s", "bad_nodes": [bad]}


def test_a_clock_that_is_a_little_off_is_told(run: Path, tmp_path: Path) -> None:
    first, _ = meet(tmp_path / "ranks", [{}, {"CLOCK_AHEAD": "10"}], run=run)
    assert first
    (warning,) = [line for line in first["line"].splitlines() if "clock is off" in line]
    off = float(warning.removeprefix("warning: n2: its clock is off by ").partition(" s;")[0])
    assert 2 < off <= 10  # never more than it is, however long the messages took


def reduce_with_a_fault(payload: dict) -> list:
    """On every rank: the sum as it should be, and one to which the last rank adds a flipped bit."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    right = contribution(rank, 5000)
    flipped = right.clone()
    if rank == world_size - 1:
        flipped.view(torch.int32)[1234] ^= 1  # the lowest bit of one number in fp32
        flipped[77] = float("nan")
    outcomes: list = [None] * world_size
    dist.all_gather_object(outcomes, [all_reduce(right, world_size)[0], all_reduce(flipped, world_size)])
    return outcomes


def test_a_wrong_sum_cannot_pass(tmp_path: Path) -> None:
    outcomes = run_on_ranks("tests.vitscale.test_preflight:reduce_with_a_fault", 3, {}, tmp_path)
    for right, (wrong, _) in outcomes:
        assert right == 0
        assert wrong >= 1
    with pytest.raises(Ended, match="came out wrong") as ended:
        judge_sums([(f"n{rank}", wrong, rate) for rank, (_, (wrong, rate)) in enumerate(outcomes)], 3)
    assert (ended.value.cause, ended.value.bad_nodes) == (Cause.CORRUPT, ())


@pytest.mark.parametrize("world_size", [1, 3, 61, 4096])
def test_the_known_sum_is_the_sum(world_size: int) -> None:
    total = sum((contribution(rank, 200).double() for rank in range(world_size)), torch.zeros(200, dtype=torch.float64)).float()
    assert wrong_elements(total, world_size) == 0
    total[100] += 1
    assert wrong_elements(total, world_size) == 1


def test_a_sum_that_is_wrong_on_one_node_names_it() -> None:
    with pytest.raises(Ended, match=r"wrong in 7 of them on rank 2-3, all on n2") as ended:
        judge_sums([("n1", 0, 1.0), ("n1", 0, 1.0), ("n2", 7, 1.0), ("n2", 5, 1.0)], 4)
    assert (ended.value.cause, ended.value.bad_nodes) == (Cause.BAD_NODE, ("n2",))
    with pytest.raises(Ended, match="did not end within 180 s on ranks 1-2 of 3") as ended:
        judge_sums([("n1", 0, 1.0), ("n2", -1, 0.0), ("n3", -1, 0.0)], 3)
    assert ended.value.cause is Cause.LOST_PEER


# -- Decisions ----------------------------------------------------------------------------------------------------------------------------


NEED = Need(checkpoint=8 * GB, memory=20 * GB)


def gpus(host: str, **other: object) -> list[Machine]:
    """A node of two good ranks."""
    good = Machine(
        host, 0, "", 600e12, 140 * GB, 141 * GB, 900 * GB,
        (Disk("/tmp", 100 * GB, 10**6, 2 * GB),), Disk("/lustre/run", 10**15, None, GB),
    )  # fmt: skip
    return [replace(good, **other), replace(good, local_rank=1, memory=0, scratch=(), run=None)]  # type: ignore[arg-type]


def test_good_machines_give_no_warning() -> None:
    line, warnings = judge_machines([*gpus("n1"), *gpus("n2")], NEED, 2)
    assert line == (
        "2 nodes of 2 ranks, products 600 TFLOP/s (slowest 600), 140.0 GB of device memory free, 900.0 GB of memory free, "
        "run directory 1000.0 TB free, 1.0 GB/s, scratch 100.0 GB free, 2.0 GB/s"
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"device_fault": "it cannot multiply matrices (CUDA error)"}, r"n2: GPU 0: it cannot multiply matrices"),
        ({"device_free": 70 * GB}, r"n2: GPU 0: 70.0 GB of its 141.0 GB are free, on others 140.0 GB"),
        ({"memory": 900 * MB}, r"n2: 900 MB of memory free for 2 ranks, 512 MB each are needed"),
        ({"scratch": (Disk("/tmp", fault="/tmp cannot be written to (Read-only file system)"),)}, r"n2: scratch: /tmp cannot be"),
        ({"run": Disk("/lustre", fault="/lustre cannot be written to (Stale file handle)")}, r"n2: run directory: /lustre cannot be"),
    ],
)
def test_a_bad_machine_among_good_ones_is_named(other: dict[str, object], said: str) -> None:
    with pytest.raises(Ended, match=said) as ended:
        judge_machines([*gpus("n1"), *gpus("n2", **other), *gpus("n3")], NEED, 2)
    assert (ended.value.cause, ended.value.bad_nodes) == (Cause.BAD_NODE, ("n2",))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"flops": 300e12}, "n2, GPU 0: 300 TFLOP/s, others 600"),
        ({"memory": 19 * GB}, "n2: 19.0 GB of memory free; a snapshot's share and full windows take 20.0 GB"),
        ({"scratch": (Disk("/tmp", GB, 100),)}, "n2: /tmp takes only 100 files more"),
        ({"run": Disk("/lustre/run", 3 * GB, None, GB)}, "run directory: /lustre/run has only 3.0 GB free; a checkpoint takes 8.0 GB"),
        ({"run": Disk("/lustre/run", 10**15, None, MB)}, "run directory: 1 MB/s; a checkpoint of 8.0 GB takes long"),
    ],
)
def test_what_is_scarce_is_told_and_trained_with(other: dict[str, object], said: str) -> None:
    _, warnings = judge_machines([*gpus("n1"), *gpus("n2", **other), *gpus("n3")], NEED, 2)
    assert said in warnings


def test_a_desk_whose_gpu_also_draws_the_screen_is_trained_on() -> None:
    _, warnings = judge_machines([replace(of, device_free=100 * GB) for of in gpus("desk")], NEED, 2)
    assert warnings == [f"desk, GPU {gpu}: only 100.0 GB of its 141.0 GB are free" for gpu in (0, 1)]


def test_only_what_is_certain_is_held_against_a_clock() -> None:
    # The round took 100 s, so a clock that seems 70 s off may be right
    said, warnings = judge_clocks([("n1", 1050.0), ("n2", 1120.0), ("n3", 1050.0)], 1000.0, 1100.0)
    assert said == "clocks agree within 120.00 s"
    assert warnings == ["n2: its clock is off by 20.0 s; times in logs will mislead"]


def test_what_a_run_needs_follows_from_its_model() -> None:
    config = TrainConfig()
    need = needed(config, 64, 8)
    weights = 85_798_656
    assert need.checkpoint == 12 * weights
    assert need.memory == 12 * weights // 8 + 8 * config.stream.buffer_bytes
    assert needed(replace(config, optimizer=replace(config.optimizer, average_decay=0.99)), 1, 1).checkpoint == 16 * weights


# -- The machine --------------------------------------------------------------------------------------------------------------------------


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    disk = probe_disk(tmp_path, 8 * MB)
    assert disk.rate > 0
    assert disk.free_bytes > 8 * MB
    assert not disk.fault
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_says_so(small_disk: Path) -> None:
    assert probe_disk(small_disk, 8 * MB).full
    (small_disk / "taken").write_bytes(bytes(1 << 20))  # now not one byte is left
    disk = probe_disk(small_disk, 0)
    assert (disk.full, disk.fault) == (True, f"{small_disk} is full (No space left on device)")
    assert os.listdir(small_disk) == ["taken"]


def _memory_of(folder: Path, cgroup: str, files: dict[str, str]) -> int:
    for name, text in {"proc/meminfo": "MemTotal: 64 kB\nMemAvailable:  1000000 kB\n", "proc/self/cgroup": cgroup, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return available_memory(folder / "proc", folder / "cgroup")


def test_memory_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    assert available_memory() > 0
    assert _memory_of(tmp_path / "none", "0::/\n", {}) == 1_000_000 << 10
    job = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 100\ninactive_file 400\n"}
    above = {"memory.max": "max\n", "memory.current": "3000\n", "memory.stat": "inactive_file 0\n"}
    second = {f"cgroup/slurm/job_1/{name}": text for name, text in job.items()}
    second |= {f"cgroup/slurm/{name}": text for name, text in above.items()}
    assert _memory_of(tmp_path / "v2", "0::/slurm/job_1/step_0\n", second) == 2400
    first = {
        "cgroup/memory/slurm/memory.limit_in_bytes": "7000",
        "cgroup/memory/slurm/memory.usage_in_bytes": "2000",
        "cgroup/memory/slurm/memory.stat": "total_inactive_file 1\n",
    }
    assert _memory_of(tmp_path / "v1", "4:memory:/slurm\n1:cpuset:/slurm\n", first) == 5001
