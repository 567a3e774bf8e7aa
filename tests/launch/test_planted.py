"""Steps that go wrong in real runs, and what becomes of them: docs/operations.md's promises."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from tests.command import SMALL, VITSCALE, vitscale
from tests.faults import planted
from tests.runs import losses
from vitscale import checkpoint
from vitscale.ending import read_ends
from vitscale.machine import this_host
from vitscale.run import read_metrics, read_record
from vitscale.verdict import read_history

LONG = [*SMALL, "--steps", "30", "--checkpoint-every", "5", "--keep-checkpoints", "0", "--nproc", "2", "--eval-data", "none"]


def train(dataset: Path, out: Path, environment: dict[str, str] | None, *more: str) -> subprocess.CompletedProcess[str]:
    command = [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", str(out), *LONG, *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def weights(run: Path) -> bytes:
    return (checkpoint.committed(run)[-1] / "node-0000.safetensors").read_bytes()


def decided(run: Path) -> list[tuple[str, str]]:
    return [(past.cause, past.action) for past in read_history(run)]


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(dataset, run, None).returncode == 0
    return run


def test_a_step_whose_gradient_is_not_finite_is_left_out(dataset: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    done = train(dataset, run, planted(tmp_path, "nan", 9, rank=1))
    assert done.returncode == 0, done.stderr
    assert "warning: step 9 is left out, because its gradient is not finite" in done.stdout
    found, usual = losses(run), losses(whole)
    assert sorted(found) == [step for step in range(1, 31) if step != 9]
    assert [found[step] for step in range(1, 9)] == [usual[step] for step in range(1, 9)]
    assert found[10] != usual[10], "its update was not made"
    assert checkpoint.describe(checkpoint.committed(run)[-1]).state.updates == 29
    told = [json.loads(line) for line in (run / "left-out.jsonl").read_text().splitlines()]
    seen = json.loads(vitscale("run", "which", run, "--step", "9", "--rank", "1", "--json").stdout)
    of_rank = {line["rank"]: line["samples_of_nonfinite_loss"] for line in told}
    assert {rank: sorted(samples) for rank, samples in of_rank.items()} == {0: [], 1: sorted(one["sample"] for one in seen["samples"])}
    assert decided(run) == [("", "finished")]


def test_a_spike_rolls_the_run_back_and_its_steps_are_skipped(dataset: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    done = train(dataset, run, planted(tmp_path, "spike", 20, 21, 22), "--guard.spike-window", "16")
    assert done.returncode == 0, done.stderr
    assert "3 in a row far above the usual" in done.stdout
    assert "steps 17 to 22 are skipped from now on; going on from step-00000015 (restart 1)" in done.stdout
    found, usual = losses(run), losses(whole)
    assert sorted(found) == [step for step in range(1, 31) if not 17 <= step <= 22]
    assert [found[step] for step in range(1, 17)] == [usual[step] for step in range(1, 17)]
    shares = [line["data_wait"] for line in read_metrics(run) if "data_wait" in line]
    assert all(math.copysign(1, share) == 1 for share in shares), "what is measured before steps that are skipped took time"
    assert decided(run) == [("spike", "again"), ("", "finished")]
    newest = checkpoint.describe(checkpoint.committed(run)[-1])
    assert (newest.step, newest.state.skipped, newest.state.updates) == (30, ((16 * 8, 22 * 8),), 24)
    assert newest.state.recent_losses == tuple(found.values())[-16:]
    assert "it is skipped" in vitscale("run", "which", run, "--step", "18").stdout
    key = json.loads(vitscale("run", "which", run, "--step", "18", "--json").stdout)["samples"][0]["key"]
    assert 18 not in [seen["step"] for seen in json.loads(vitscale("run", "which", run, "--sample", key, "--json").stdout)["seen"]]


def test_a_flipped_bit_on_one_rank_is_found_and_undone(dataset: Path, tmp_path: Path) -> None:
    three = ["--nproc", "3", "--global-batch-size", "12", "--engine.zero-stage", "0"]
    assert train(dataset, tmp_path / "whole", None, *three).returncode == 0
    run = tmp_path / "run"
    done = train(dataset, run, planted(tmp_path, "flip", 12, rank=2), *three, "--guard.compare-every", "1")
    assert done.returncode == 0, done.stderr
    assert "rank 2 holds other weights than the rest at step 12, though all should be alike" in done.stdout
    assert decided(run) == [("corrupt", "again"), ("", "finished")]
    assert {end.bad_nodes for end in read_ends(run, 0)} == {(this_host(),)}, "the machine of the rank that is wrong is named"
    assert losses(run) == losses(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")


def test_a_rollback_leaves_a_checkpoint_to_go_on_from(dataset: Path, tmp_path: Path, whole: Path) -> None:
    """Though only the newest is kept, and one was due in the middle of the spike."""
    run = tmp_path / "run"
    done = train(dataset, run, planted(tmp_path, "spike", 15, 16, 17), "--guard.spike-window", "8", "--keep-checkpoints", "1")
    assert done.returncode == 0, done.stderr
    assert "steps 12 to 17 are skipped from now on; going on from step-00000010 (restart 1)" in done.stdout
    assert [start["step"] for start in read_record(run)["starts"]] == [0, 10]
    assert sorted(losses(run)) == [step for step in range(1, 31) if not 12 <= step <= 17]


def test_rollbacks_are_counted_over_all_starts(dataset: Path, tmp_path: Path) -> None:
    once = ["--guard.max-nonfinite", "0", "--guard.max-rollbacks", "1"]
    done = train(dataset, tmp_path / "run", planted(tmp_path, "nan", 9, 20, times=2), *once)
    assert done.returncode == 1
    assert "step 20; guard.max_rollbacks=1 allows no more" in done.stderr
    assert decided(tmp_path / "run") == [("nonfinite", "again"), ("diverged", "stop")]


def test_memory_that_runs_out_on_one_rank_in_an_evaluation_is_what_ended_the_run(dataset: Path, tmp_path: Path) -> None:
    """Though the model computes with averages there, which are put back by all ranks together."""
    held_out = ["--eval-data", str(dataset / "val"), "--eval-every", "10", "--optimizer.average-decay", "0.9"]
    done = train(dataset, tmp_path / "run", planted(tmp_path, "memory in evaluation", rank=1), *held_out)
    assert done.returncode == 1
    assert decided(tmp_path / "run") == [("out of memory", "stop")]


def test_the_record_of_rank_0_is_waited_for(dataset: Path, tmp_path: Path) -> None:
    """However late it comes: what ended all ranks is known from it alone."""
    at_once = ["--optimizer.peak-lr", "1e30", "--optimizer.grad-clip", "0", "--guard.max-rollbacks", "0"]
    done = train(dataset, tmp_path / "run", planted(tmp_path, "late record"), *at_once)
    assert done.returncode == 1
    assert "guard.max_rollbacks=0 allows no rollback" in done.stderr
    assert decided(tmp_path / "run") == [("diverged", "stop")]


def test_a_last_step_that_is_left_out_is_the_last_step_all_the_same(dataset: Path, tmp_path: Path) -> None:
    done = train(dataset, tmp_path / "run", planted(tmp_path, "nan", 30), "--guard.max-nonfinite", "0")
    assert done.returncode == 0, done.stderr
    newest = checkpoint.describe(checkpoint.committed(tmp_path / "run")[-1])
    assert (newest.step, newest.state.updates, newest.state.skipped) == (30, 29, ())


def test_a_kill_before_the_first_checkpoint_begins_anew(dataset: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    done = train(dataset, run, planted(tmp_path, "SIGKILL", 14), "--checkpoint-every", "20")
    assert done.returncode == 0, done.stderr
    assert "starting anew, because no checkpoint was written yet (restart 1)" in done.stdout
    assert losses(run) == losses(whole)


def test_without_rollbacks_gradients_that_stay_not_finite_end_the_run(dataset: Path, tmp_path: Path) -> None:
    none_allowed = ["--guard.max-nonfinite", "0", "--guard.max-rollbacks", "0"]
    done = train(dataset, tmp_path / "run", planted(tmp_path, "nan", 9), *none_allowed)
    assert done.returncode == 1
    assert "the gradient was not finite in 1 step in a row up to step 9; guard.max_rollbacks=0 allows no rollback" in done.stderr
    assert decided(tmp_path / "run") == [("diverged", "stop")]


def test_memory_that_runs_out_ends_the_run_with_advice(dataset: Path, tmp_path: Path) -> None:
    done = train(dataset, tmp_path / "run", planted(tmp_path, "memory", 9, rank=1))
    assert done.returncode == 1
    assert "a smaller --micro-batch-size, a higher --engine.zero-stage or" in done.stderr
    assert decided(tmp_path / "run") == [("out of memory", "stop")]
