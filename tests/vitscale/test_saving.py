"""Checkpoints written behind: what is written is what was there at the snapshot, and whatever the disk does, no rank waits for another."""

import dataclasses
import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.disks import small_disk
from tests.distributed import run_on_ranks
from tests.vitscale.savers import MODEL, Held, about, saved, step_of_state
from vitscale import checkpoint
from vitscale.checkpoint import RunState, describe
from vitscale.config import EngineConfig, OptimizerConfig
from vitscale.engine import Engine
from vitscale.errors import CheckpointError
from vitscale.model import ViT, initialize
from vitscale.retention import Policy
from vitscale.saving import Saver, lay_out, node_file
from vitscale.weights import TensorReader

# ---------------------------------------------------------------------------------------------------------------------------------------
# Who writes what
# ---------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_files_laid_out_for_any_ranks_and_nodes_read_as_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Each rank's stretches are put where its node's layout says; safetensors itself reads the files, and our reader the tensors."""
    shapes = {
        f"p{i}.weight": tuple(shape)
        for i, shape in enumerate(data.draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6)))
    }
    ranks = data.draw(st.integers(1, 6))
    leaders = [0, *sorted(data.draw(st.sets(st.integers(1, max(1, ranks - 1)), max_size=3)) & set(range(1, ranks)))]
    kinds = {"weight": tuple(shapes), "exp_avg": tuple(name for name in shapes if data.draw(st.booleans()))}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    cuts = [sorted(data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))) for size in sizes]
    bounds = [[0, *cut, size] for cut, size in zip(cuts, sizes, strict=True)]
    shares = np.array([[(b[r], b[r + 1] - b[r]) if b[r] < b[r + 1] else (0, 0) for b in bounds] for r in range(ranks)])
    state = {(name, kind): torch.randn(size) for name, size in zip(shapes, sizes, strict=True) for kind in kinds if name in kinds[kind]}

    layout = lay_out(shapes, kinds, shares, leaders)
    folder = tmp_path_factory.mktemp("laid-out")
    for node, leader in enumerate(leaders):
        body = torch.full((layout.body_bytes(node) // 4,), torch.nan)
        for rank in range(leader, [*leaders, ranks][node + 1]):
            for p, name in enumerate(shapes):
                start, length = shares[rank, p]
                for kind in [kind for kind in kinds if name in kinds[kind]]:
                    at = layout.offsets(node)[name, kind] + start - layout.starts_NP[node, p]
                    if length:
                        body[at : at + length] = state[name, kind][start : start + length]
        (folder / node_file(node)).write_bytes(layout.header(node) + body.numpy().tobytes())
    checkpoint.write_description(folder / "checkpoint.json", about(folder, 1, layout.entries()))
    reader = TensorReader(describe(folder))
    for (name, kind), whole in state.items():
        assert torch.equal(reader.whole(name, kind), whole.view(shapes[name]))
    assert all(len(layout.header(node)) % 8 == 0 for node in range(len(leaders)))


def test_ranks_that_do_not_hold_neighbouring_stretches_are_refused() -> None:
    shares = np.array([[(4, 4)], [(0, 4)]])
    with pytest.raises(RuntimeError, match="adjacent"):
        lay_out({"p": (8,)}, ("weight",), shares, [0])
    with pytest.raises(RuntimeError, match="adjacent"):
        lay_out({"p": (9,)}, ("weight",), shares[::-1], [0])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------------------------------------------------


def train_a_step(engine: Engine, generator: torch.Generator) -> None:
    logits = engine.forward(torch.randn(4, 3, 8, 8, generator=generator))
    engine.backward(nn.functional.cross_entropy(logits, torch.randint(3, (4,), generator=generator)))
    engine.step(0.01)


def round_trip(payload: dict[str, Any]) -> list[str]:
    """For each stage and precision: what the checkpoint holds is what the engine held at the snapshot, though it went on."""
    told = []
    for stage, precision in payload["engines"]:
        model = ViT(MODEL)
        initialize(model, 0)
        config = EngineConfig(zero_stage=stage, precision=precision)
        engine = Engine(model, config, OptimizerConfig(weight_decay=0.1, average_decay=0.9), micro_batch_size=4, grad_accum_steps=1)
        run = Path(payload["folder"]) / f"{stage}-{precision}"
        saver = Saver(run, engine, Policy(newest=1), 0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for step in (1, 2):
            train_a_step(engine, generator)
            held = {(name, kind): engine.gather(name, kind).clone() for name in engine.shapes for kind in engine.kinds}
            assert saver.snapshot(about(run, step))
            train_a_step(engine, generator)
            saver.finish()
            description = describe(checkpoint.step_folder(run, step))
            reader = TensorReader(description)
            for (name, kind), tensor in held.items():
                assert torch.equal(reader.whole(name, kind), tensor), (stage, precision, name, kind)
                assert not torch.equal(engine.gather(name, kind), tensor), "the state must have moved on"
        assert checkpoint.verify(description.path) is None
        assert (run / "checkpoints/latest").read_text() == "step-00000002\n"
        assert all(len(t.pieces) <= payload["nodes"] for t in description.tensors), "one piece a node"
        dist.barrier()
        told.append(" ".join(sorted(file.name for file in description.path.iterdir())))
        assert saver.news() == ([f"saved {checkpoint.step_folder(run, step)}" for step in (1, 2)] if dist.get_rank() == 0 else [])
        engine.close()
    return told


ENGINES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]


MANY = [pytest.param(*ranks, marks=pytest.mark.soak) for ranks in ((2, 1), (2, 2), (4, 1))]


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(1, 1), (3, 2), (4, 2), *MANY])
def test_a_checkpoint_is_the_state_at_its_snapshot(tmp_path: Path, world_size: int, ranks_per_node: int) -> None:
    nodes = -(-world_size // ranks_per_node)
    engines = ENGINES if world_size < 4 else [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
    payload = {"engines": engines, "folder": str(tmp_path), "nodes": nodes}
    told = run_on_ranks("tests.vitscale.test_saving:round_trip", world_size, payload, tmp_path, ranks_per_node=ranks_per_node)
    files = ["COMMIT.json", "checkpoint.json", *(node_file(node) for node in range(nodes))]
    assert told == [" ".join(files)] * len(engines), "and nothing else is left in the folder"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------------------------


def advance(saver: Saver) -> int:
    """What the loop does at a later step's end; the number of tasks left."""
    sums = torch.tensor([saver.unwritten, saver.failed])
    dist.all_reduce(sums)
    saver.advance(*sums.tolist())
    return int(sums[0])


def settled(saver: Saver) -> None:
    """Waits for what this rank does behind."""
    if saver._thread:
        saver._thread.join()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """A process group of this process."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_disk_that_fills_up_costs_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", 5 << 20) as run:
        held = Held(2**18)
        saver = Saver(run, held, Policy(newest=2), 0)
        saved(saver, held, run, 1)
        held.move_to(2)
        assert saver.snapshot(about(run, 2))
        settled(saver)  # it has made sure of room
        with open(run / "others", "wb") as others:  # then others take it
            others.write(bytes(os.statvfs(run).f_bavail * os.statvfs(run).f_frsize - 4096))
        while advance(saver):
            settled(saver)
        (said,) = saver.news()
        assert said == (
            f"warning: no checkpoint of step 2: {run}/checkpoints/.step-00000002.partial/node-0000.safetensors cannot be written "
            "(No space left on device)"
        )
        with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written: .*No space left"):
            saver.finish()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]

        held.move_to(3)  # there is still no room: it is not begun
        assert saver.snapshot(about(run, 3))
        with pytest.raises(CheckpointError, match=r"it takes [\d,]+ bytes, and .* has [\d,]+ left"):
            saver.finish()
        assert "no checkpoint of step 3: it takes" in saver.news()[0]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]

        (run / "others").unlink()
        saved(saver, held, run, 4)
        assert step_of_state(checkpoint.newest_durable(run)[0]) == 4


@pytest.mark.usefixtures("alone")
def test_a_disk_without_files_left_is_told_of(tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", 64 << 20, files=12) as run:
        held = Held(1000)
        saver = Saver(run, held, Policy(newest=9), 0)
        saved(saver, held, run, 1)
        assert saver.snapshot(about(run, 2))
        with pytest.raises(CheckpointError, match=r"it takes 6 files, and .* has [0-5] left"):
            saver.finish()


@pytest.mark.usefixtures("alone")
def test_a_full_disk_loses_first_what_would_go_anyway(tmp_path: Path) -> None:
    """Room for two and a half: the older of two goes before the third is written, where two are kept."""
    with small_disk(tmp_path / "run", int(5.25 * 2**20)) as run:
        held = Held(2**18)
        saver = Saver(run, held, Policy(newest=2), 0)
        for step in (1, 2, 3, 4):
            saved(saver, held, run, step)
            assert [*map(checkpoint.step_of, checkpoint.committed(run))] == [*range(max(1, step - 1), step + 1)]


@pytest.mark.usefixtures("alone")
def test_the_budget_of_bytes_is_kept(tmp_path: Path) -> None:
    held = Held(2**18)
    saver = Saver(tmp_path, held, Policy(newest=0, max_bytes=int(4.5 * 2**20)), 0)
    for step in range(1, 6):
        saved(saver, held, tmp_path, step)
        assert sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file()) <= 4.5 * 2**20
    small = Saver(tmp_path, held, Policy(newest=0, max_bytes=2**20), 5)
    assert small.snapshot(about(tmp_path, 6))
    with pytest.raises(CheckpointError, match=r"over checkpoint_bytes=1,048,576; --checkpoint-bytes \d+ has room for it"):
        small.finish()
    assert step_of_state(checkpoint.newest_durable(tmp_path)[0]) == 5


@pytest.mark.usefixtures("alone")
def test_what_may_be_rolled_back_takes_the_place_of_no_other(tmp_path: Path) -> None:
    """A checkpoint of a stop amid a spike: of one that is kept it would be the last."""
    held = Held(1000)
    saver = Saver(tmp_path, held, Policy(newest=1), 0)
    saved(saver, held, tmp_path, 1)
    assert saver.snapshot(dataclasses.replace(about(tmp_path, 2), state=RunState(spikes=(9.0,))))
    saver.finish()
    assert [*map(checkpoint.step_of, checkpoint.committed(tmp_path))] == [1, 2]
    saved(saver, held, tmp_path, 3)
    assert [*map(checkpoint.step_of, checkpoint.committed(tmp_path))] == [3]


@pytest.mark.usefixtures("alone")
def test_a_file_that_is_written_just_as_the_loop_looks_is_committed(tmp_path: Path) -> None:
    class EndsAsItIsLookedAt(list):
        def __getitem__(self, which):
            found = super().__getitem__(which)
            settled(saver)
            return found

    held = Held(1000)
    saver = Saver(tmp_path, held, Policy(), 0)
    assert saver.snapshot(about(tmp_path, 1))
    settled(saver)
    assert advance(saver) == 2
    saver._tasks = EndsAsItIsLookedAt(saver._tasks)
    saver.advance(2, 0)
    saver.finish()
    assert checkpoint.verify(checkpoint.step_folder(tmp_path, 1)) is None


@pytest.mark.usefixtures("alone")
def test_a_newer_one_that_was_passed_over_takes_the_place_of_no_whole_one(tmp_path: Path) -> None:
    held = Held(1000)
    first = Saver(tmp_path, held, Policy(newest=0), 0)
    saved(first, held, tmp_path, 1)
    saved(first, held, tmp_path, 9)
    (checkpoint.step_folder(tmp_path, 9) / node_file(0)).write_bytes(b"")
    saved(Saver(tmp_path, held, Policy(newest=1), 1), held, tmp_path, 2)
    assert [*map(checkpoint.step_of, checkpoint.committed(tmp_path))] == [2, 9]


@pytest.mark.usefixtures("alone")
def test_a_nodes_file_is_synced_by_its_writer_before_rank_0_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system what rank 0 syncs is not what another node still holds."""
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name), sync(number))[1])
    held = Held(1000)
    saved(Saver(tmp_path, held, Policy(), 0), held, tmp_path, 1)
    assert synced.index(node_file(0)) < synced.index(".node-0000.json.partial")


@pytest.mark.usefixtures("alone")
def test_a_slow_disk_costs_the_checkpoints_that_come_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(1000)
    saver = Saver(tmp_path, held, Policy(), 0)
    synced, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.wait(), sync(descriptor))[1])
    held.move_to(1)
    assert saver.snapshot(about(tmp_path, 1))
    settled(saver)
    for step in range(2, 50):  # the run goes on
        held.move_to(step)
        advance(saver)
    assert not saver.snapshot(about(tmp_path, 50))
    (said,) = saver.news()
    assert "no checkpoint of step 50: that of step 1 is still being written" in said
    synced.set()
    saver.finish()
    assert saver.news() == [f"saved {checkpoint.step_folder(tmp_path, 1)}"]
    assert step_of_state(checkpoint.step_folder(tmp_path, 1)) == 1
    saved(saver, held, tmp_path, 51)


@pytest.mark.usefixtures("alone")
def test_a_fault_of_the_code_gives_a_checkpoint_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(1000)
    saver = Saver(tmp_path, held, Policy(), 0)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "commit", lambda *_: 1 / 0)
        assert saver.snapshot(about(tmp_path, 1))
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            saver.finish()
    assert not list((tmp_path / "checkpoints").iterdir())
    saved(saver, held, tmp_path, 2)


@pytest.mark.usefixtures("alone")
def test_too_little_memory_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.saving.available_memory", lambda: 7)
    with pytest.raises(
        CheckpointError, match=r"node 0 has no memory for snapshots of checkpoints \(8,000 bytes are needed, 7 are available"
    ):
        Saver(tmp_path, Held(1000), Policy(), 0)


def one_node_fails(payload: dict[str, Any]) -> list[list[str]]:
    """The kernel refuses the second of three nodes its file, once; then all is well again."""
    run, held = Path(payload["run"]), Held(2**16)
    saver = Saver(run, held, Policy(), 0)
    news, rank = [], dist.get_rank()
    for step, limit in ((1, 20_000), (2, resource.RLIM_INFINITY)):
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        held.move_to(step)
        assert saver.snapshot(about(run, step))
        while advance(saver):
            settled(saver)
        news.append(saver.news())
        dist.barrier()
        news.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
    return news


def test_a_node_that_cannot_write_leaves_no_rank_waiting(tmp_path: Path) -> None:
    payload = {"run": str(tmp_path / "run")}
    first, there, second, then = run_on_ranks("tests.vitscale.test_saving:one_node_fails", 3, payload, tmp_path, ranks_per_node=1)
    assert first == ["warning: no checkpoint of step 1: another node could not write its file, and its log says why"]
    assert "node-0001.safetensors cannot be written (File too large)" in (tmp_path / "rank-1.log").read_text()
    assert there == []
    assert second == [f"saved {tmp_path}/run/checkpoints/step-00000002"]
    assert then == ["latest", "step-00000002"]
