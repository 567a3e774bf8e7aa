"""Runs on this machine's processes when something ends them: killed ranks, a killed launcher, code that fails, a second start.

Everything is killed for real. What a test waits for is a line of output or the end of a process, never time.
"""

import os
import re
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from launch.ranks import visible_gpus
from tests.command import SMALL, VITSCALE, vitscale
from tests.disks import small_disk
from vitscale.run import read_metrics
from vitscale.verdict import read_history

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


def steps_and_losses(out: Path) -> tuple[list[int], list[float]]:
    lines = [line for line in read_metrics(out) if "loss" in line]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1"])
def test_a_run_goes_on_by_itself_after_a_kill(dataset: Path, tmp_path: Path, whole: list[float], victim: str) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "saved")
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(ranks[int(victim[-1])], signal.SIGKILL)
    output, errors = run.communicate()
    assert run.returncode == 0, errors
    told = re.search(rf"^{victim} was killed by SIGKILL at step (\d+); going on from step-(\d+) \(restart 1\)$", output, re.MULTILINE)
    assert told, output
    assert 0 <= int(told[1]) - int(told[2]) <= 10, "a kill costs the steps since the checkpoint and no more"
    assert f"resumes at step {int(told[2])} " in output
    wait_until_gone(ranks)
    assert steps_and_losses(tmp_path / "run") == (list(range(1, 41)), whole), "each step must stand in metrics.jsonl once"
    assert [(past.start, past.cause, past.action) for past in read_history(tmp_path / "run")] == [
        (0, "killed", "again"),
        (1, "", "finished"),
    ]


def test_ranks_die_with_their_launcher(dataset: Path, tmp_path: Path, whole: list[float]) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "saved")
    ranks = ranks_of(run)
    run.kill()
    run.communicate()
    wait_until_gone(ranks)
    again = start(dataset, tmp_path / "run")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "resumes at step" in output
    assert steps_and_losses(tmp_path / "run") == (list(range(1, 41)), whole)


def test_a_rank_that_is_stopped_counts_as_hanging(dataset: Path, tmp_path: Path, whole: list[float]) -> None:
    run = start(dataset, tmp_path / "run", "--guard.hang-seconds", "5")
    wait_for_line(run, "saved")
    ranks = ranks_of(run)
    os.kill(ranks[1], signal.SIGSTOP)
    output, errors = run.communicate()
    assert run.returncode == 0, errors
    assert re.search(
        r"^rank 0 at step \d+: nothing went on for \ds after step \d+ .*; going on from step-\d+ \(restart 1\)$", output, re.M
    ), output
    wait_until_gone(ranks)
    assert steps_and_losses(tmp_path / "run") == (list(range(1, 41)), whole)


def test_starts_in_vain_are_not_made_for_ever(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run")
    for restart in (1, 2, 3):
        wait_for_line(run, "tiny-digits starts on cpu")
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        if restart < 3:
            wait_for_line(run, f"starting anew, because no checkpoint was written yet (restart {restart})")
    _, errors = run.communicate()
    assert run.returncode == 1
    assert errors.startswith("error: rank 1 was killed by SIGKILL\n(rank 1; all output is in")
    assert re.search(r"not started again: a rank was killed; \d starts in a row made no step that was new", errors)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_run_that_is_asked_to_stop_saves(dataset: Path, tmp_path: Path, whole: list[float], number: int, status: int) -> None:
    run = start(dataset, tmp_path / "run")
    wait_for_line(run, "step  2/40")
    ranks = ranks_of(run)
    run.send_signal(number)
    output, errors = run.communicate()
    assert run.returncode == status
    assert "stopping: the ranks save at their next step" in errors
    (told,) = re.findall(r"stopped; the same command goes on from .*/checkpoints/step-(\d+)$", errors, re.MULTILINE)
    assert "Traceback" not in errors
    wait_until_gone(ranks)
    assert steps_and_losses(tmp_path / "run")[0] == list(range(1, int(told) + 1)), "no step is lost"
    assert [past.action for past in read_history(tmp_path / "run")] == ["stop"]
    again = start(dataset, tmp_path / "run")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"resumes at step {int(told)} " in output
    assert steps_and_losses(tmp_path / "run") == (list(range(1, 41)), whole)


def test_a_second_ctrl_c_waits_for_nothing(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run", "--steps", "4000")
    wait_for_line(run, "step    2/4000")
    ranks = ranks_of(run)
    os.kill(ranks[0], signal.SIGSTOP)  # so that no rank comes to save
    run.send_signal(signal.SIGINT)
    assert run.stderr is not None
    while "stopping" not in run.stderr.readline():
        pass
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
    assert re.search(r"^the gradient was not finite in 11 steps in a row up to step \d+, right after those that were skipped", errors, re.M)
    assert "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), "no checkpoint of it may be kept"


def test_a_fault_in_a_rank_shows_its_traceback(dataset: Path, tmp_path: Path) -> None:
    run = start(dataset, tmp_path / "run", "--engine.deepspeed", '{"zero_optimization": {"allgather_bucket_size": "many"}}')
    _, errors = run.communicate()
    assert run.returncode == 1
    assert errors.startswith("Traceback (most recent call last)")
    assert "many" in errors


def test_what_lies_where_the_command_is_given_is_not_imported(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('somebody else's')\n")
    command = [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", "run", *LONG, "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(visible_gpus() > 0, reason="a GPU can")
@pytest.mark.parametrize("words", [["--engine.float8", "--engine.precision", "bf16"], ["--engine.compile", "graphs"]])
def test_what_needs_a_gpu_is_refused_before_anything_is_written(dataset: Path, tmp_path: Path, words: list[str]) -> None:
    run = start(dataset, tmp_path / "run", *words)
    _, errors = run.communicate()
    assert run.returncode == 1
    assert "GPU" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(dataset: Path, tmp_path: Path, whole: list[float]) -> None:
    out = tmp_path / "run"
    run = start(dataset, out)
    wait_for_line(run, "step 25/40")
    ranks = ranks_of(run)
    run.kill()  # Ctrl-C would save
    run.communicate()
    wait_until_gone(ranks)
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


def test_a_disk_without_room_costs_checkpoints_and_not_the_steps(dataset: Path, tmp_path: Path) -> None:
    """Until the run's end, which must leave one; with more room the same command makes it whole."""
    large = ["--model.width", "384", "--model.mlp-dim", "1536", "--model.depth", "4"]  # checkpoints of 88 MB
    with small_disk(tmp_path / "disk", 600 << 20) as disk:
        assert start(dataset, disk / "whole", *large).wait() == 0
        whole = steps_and_losses(disk / "whole")
        shutil.rmtree(disk / "whole")
        run = start(dataset, disk / "run", *large)
        wait_for_line(run, "step  2/40")
        run.send_signal(signal.SIGINT)
        run.communicate()
        filler = disk / "filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (72 << 20))
        full = start(dataset, disk / "run", *large)
        output, errors = full.communicate()
        assert full.returncode == 1
        assert "Traceback" not in errors
        said = r"error: the last checkpoint could not be written: it takes [\d,]+ bytes, and .*run has [\d,]+ left; .*is whole"
        assert re.match(said, errors), errors
        assert "warning: no checkpoint of step 30: it takes" in output
        assert "step 40/40" in output
        assert read_history(disk / "run")[-1].cause == "disk full"
        filler.unlink()
        again = start(dataset, disk / "run", *large)
        _, errors = again.communicate()
        assert again.returncode == 0, errors
        assert steps_and_losses(disk / "run") == whole


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
