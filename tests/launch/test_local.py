"""Runs on this machine's processes when something ends them: killed ranks, a killed launcher, code that fails, a second start.

Everything is killed for real. What a test waits for is a line of output or the end of a process, never time.
"""

import os
import re
import resource
import select
import signal
import subprocess
from pathlib import Path

import pytest

from launch.local import visible_gpus
from tests.command import SMALL, VITSCALE, vitscale
from vitscale.run import read_metrics

LIMIT = 20_000  # bytes: less than a checkpoint has, more than logs and metrics
LONG = [*SMALL, "--steps", "40", "--checkpoint-every", "10", "--keep-checkpoints", "0", "--nproc", "2", "--eval-data", "none"]


def start(dataset: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", str(out), *LONG, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the run ended before it printed {text!r}: {process.stderr.read() if process.stderr else ''}")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def wait_until_gone(pids: list[int]) -> None:
    """Returns when none of the processes runs any more; pytest's timeout ends the test otherwise."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll(60_000) or pytest.fail(f"process {pid} still runs after a minute")
        os.close(descriptor)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = start(dataset, out)
    assert done.wait() == 0
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_kill_costs_the_steps_since_the_checkpoint_and_no_more(dataset: Path, tmp_path: Path, whole: list[float], victim: str) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "saved")
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(run.pid if victim == "launcher" else ranks[int(victim[-1])], signal.SIGKILL)
    _, errors = run.communicate()
    if victim == "launcher":
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 1
        assert "killed by SIGKILL" in errors
        assert f"({victim}; all output is in" in errors
    wait_until_gone(ranks)
    again = start(dataset, tmp_path / "run")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "resumes at step" in output
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 41)), "each step must stand in metrics.jsonl once"
    assert [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line] == whole


def test_ctrl_c_ends_all_ranks(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "step  2/40")
    ranks = ranks_of(run)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate()
    assert run.returncode == 130
    assert "the same command starts anew, because no checkpoint was written yet" in errors
    assert "Traceback" not in errors
    wait_until_gone(ranks)


def test_a_second_start_is_refused(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run", "--steps", "4000")
    wait_for_line(run, "step    1/4000")
    second = start(dataset, tmp_path / "run", "--steps", "4000")
    _, errors = second.communicate()
    assert second.returncode == 1
    assert "is being trained by another process" in errors
    assert '"state": "running"' in vitscale("run", "status", tmp_path / "run", "--json").stdout
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert '"state": "stopped"' in vitscale("run", "status", tmp_path / "run", "--json").stdout


def test_a_loss_that_is_no_number_stops_the_run(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run", "--optimizer.peak-lr", "1e30", "--optimizer.grad-clip", "0")
    _, errors = run.communicate()
    assert run.returncode == 1
    assert re.match(r"error: the (loss is nan|gradient is not finite) at step \d+; the newest checkpoint is from before it", errors)
    assert "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), "no checkpoint of it may be kept"


def test_a_fault_in_a_rank_shows_its_traceback(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run", "--engine.deepspeed", '{"zero_optimization": {"reduce_bucket_size": "many"}}')
    _, errors = run.communicate()
    assert run.returncode == 1
    assert errors.startswith("Traceback (most recent call last)")
    assert "many" in errors


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(dataset: Path, tmp_path: Path, whole: list[float]) -> None:
    out = tmp_path / "run"
    run = start(dataset, out)
    wait_for_line(run, "step 25/40")
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate()
    assert f"the same command goes on from {out}/checkpoints/step-00000020" in errors
    file = out / "checkpoints" / "step-00000020" / "node-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    again = start(dataset, out)
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "step-00000020: node-0000.safetensors does not have the checksum" in output
    assert "resumes at step 10" in output
    assert [line["loss"] for line in read_metrics(out) if "loss" in line] == whole


def test_a_checkpoint_that_does_not_fit_the_disk_ends_the_run_in_one_line(dataset: Path, tmp_path: Path, whole: list[float]) -> None:
    """The kernel refuses the bytes over a limit for the size of a file, as it refuses those over a full disk."""
    out = tmp_path / "run"
    resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    try:
        run = start(dataset, out)
    finally:
        resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _, errors = run.communicate()
    assert run.returncode == 1
    assert "Traceback" not in errors
    assert re.match(r"error: .*node-0000.safetensors cannot be written \(.*File too large.*\); what was saved before it is whole\n", errors)
    assert not [file for file in (out / "checkpoints").rglob("*") if file.is_file()]
    again = start(dataset, out)
    again.communicate()
    assert again.returncode == 0
    assert [line["loss"] for line in read_metrics(out) if "loss" in line] == whole


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("0,-1,1", 1), (" 0, 1", 2), ("GPU-8a,GPU-9b", 2)]
)
def test_visible_gpus_are_those_that_cuda_would_show(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


def test_another_dataset_is_refused_on_resume(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "saved")
    run.send_signal(signal.SIGINT)
    run.communicate()
    for source in ("train", "val"):
        assert (
            vitscale("pack", dataset.parent / "images" / source, tmp_path / "other", "--split", source, "--shuffle-seed", "1").returncode
            == 0
        )
    again = vitscale("pretrain", "tiny-digits", "--data", tmp_path / "other" / "train", "--out", tmp_path / "run", *LONG)
    assert again.returncode == 1
    assert "was begun with --data" in again.stderr
