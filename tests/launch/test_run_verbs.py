"""`vitscale run ...` as a user types it, on real runs: watched, listed, stopped, forked, and their logs."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.run_verbs import command_of
from tests.command import SMALL, VITSCALE, vitscale
from tests.runs import losses
from vitscale.ending import Cause, End, write_end
from vitscale.run import read_config, read_record


@pytest.fixture(scope="module")
def done(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "done"
    ran = vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--out", out, *SMALL)
    assert ran.returncode == 0, ran.stderr
    return out


def test_a_finished_run_is_told_of(done: Path) -> None:
    told = vitscale("run", "status", done, "--verify").stdout.splitlines()
    assert told[0] == f"{done}: tiny-digits, finished"
    assert told[1] == "step 6 of 6, 1 start"
    assert "checksums hold" in next(line for line in told if line.startswith("checkpoints: step-00000003 ("))
    assert any("went into steps that count; start-up" in line for line in told)
    found = json.loads(vitscale("run", "status", done, "--json").stdout)
    spent = found["goodput"]
    assert spent["productive"] > 0
    assert abs(spent["wall"] - spent["productive"] - sum(spent["lost"].values())) < 2, "starts are noted in whole seconds"
    assert vitscale("run", "status", done, "--watch").stdout.startswith(f"{done}: step 6 of 6, loss ")


def test_runs_are_listed(done: Path, tmp_path: Path) -> None:
    listed = vitscale("run", "ls", done.parent).stdout.splitlines()
    assert listed[0].split() == ["run", "recipe", "state", "step", "loss", "last", "seen"]
    assert [row.split()[:4] for row in listed[1:]] == [[str(done), "tiny-digits", "finished", "6/6"]]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    both = json.loads(vitscale("run", "ls", done.parent, tmp_path, "--json").stdout)
    assert sorted(of["state"].partition(":")[0] for of in both) == ["damaged", "finished"]
    assert "is not a folder" in vitscale("run", "ls", tmp_path / "none").stderr


def test_a_run_is_stopped_from_elsewhere_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    """Watched meanwhile, and until its end."""
    out = tmp_path / "run"
    command = [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", str(out), *SMALL, "--eval-data", "none"]
    long = ["--steps", "20000", "--checkpoint-every", "20000", "--log-every", "10"]
    run = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while "step    10/20000" not in run.stdout.readline():
        assert run.poll() is None
    watch = subprocess.Popen([VITSCALE, "run", "status", str(out), "--watch", "--json"], stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    assert json.loads(watch.stdout.readline())["state"] == "running"
    stopped = vitscale("run", "stop", out, "--wait")
    assert stopped.returncode == 0
    assert "stopped: a person asked the run to stop, 1 start" in stopped.stdout
    _, errors = run.communicate()
    assert run.returncode == 75
    assert "stopped; the same command goes on from" in errors
    watched, _ = watch.communicate()
    assert watch.returncode == 0
    assert json.loads(watched.splitlines()[-1])["state"] == "stopped"
    (saved,) = [folder.name for folder in (out / "checkpoints").glob("step-*")]
    step = int(saved.removeprefix("step-"))
    assert list(losses(out))[-1] == step, "no step is lost, and the last one is told"
    assert "does not run" in vitscale("run", "stop", out).stdout
    again = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert again.stdout is not None
    while f"resumes at step {step} " not in (line := again.stdout.readline()):
        assert line, "it ended"
    assert not (out / "stop").exists()
    vitscale("run", "stop", out, "--wait")
    again.communicate()
    assert again.returncode == 75


def run_of(told: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Runs the command that a fork printed."""
    assert told.returncode == 0, told.stderr
    words = shlex.split(told.stdout.splitlines()[-1])
    assert words[0] == "vitscale"
    return vitscale(*words[1:])


def test_a_fork_that_changes_nothing_is_the_same_run(done: Path, tmp_path: Path) -> None:
    told = vitscale("run", "fork", f"{done}@3", tmp_path / "same")
    assert read_record(tmp_path / "same")["origin"]["step"] == 3
    assert list(losses(tmp_path / "same")) == [1, 2, 3]
    ran = run_of(told)
    assert ran.returncode == 0, ran.stderr
    assert "resumes at step 3 " in ran.stdout
    assert losses(tmp_path / "same") == losses(done)
    assert (tmp_path / "same/checkpoints/step-00000003/node-0000.safetensors").samefile(
        done / "checkpoints/step-00000003/node-0000.safetensors"
    )


def test_a_fork_goes_on_with_another_length_and_schedule(done: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in done.rglob("*.json*")}
    told = vitscale(
        "run", "fork", f"{done}@3", tmp_path / "longer", "--steps", "8", "--optimizer.peak-lr", "0.01", "--schedule.kind", "linear"
    )
    ran = run_of(told)
    assert ran.returncode == 0, ran.stderr
    forked = losses(tmp_path / "longer")
    assert list(forked) == list(range(1, 9))
    assert {step: forked[step] for step in (1, 2, 3)} == {step: losses(done)[step] for step in (1, 2, 3)}
    assert forked[6] != losses(done)[6]
    assert {file: file.read_bytes() for file in done.rglob("*.json*")} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("@3 OUT --model.width 32", "model.width: 16 -> 32, and the checkpoint's tensors have these shapes"),
        ("@3 OUT --global-batch-size 16", "global_batch_size: 8 -> 16, and the clock counts samples in whole steps"),
        ("@3 OUT --seed 5", "seed: 0 -> 5, and it gives the order of samples"),
        ("@3 OUT --data OTHER", "was begun with --data"),
        ("@3 OUT --steps 3", "the run would have 3 steps, and the checkpoint is of step 3"),
        ("@4 OUT", "has no checkpoint of step 4; there are those of steps 3, 6"),
        ("@3 RUN", "exists; give a folder that does not"),
        ("@3", "needs RUN@STEP and OUT as its first words"),
    ],
)
def test_a_fork_that_would_not_go_on_is_refused(done: Path, second: Path, tmp_path: Path, words: str, said: str) -> None:
    places = {"OUT": tmp_path / "out", "RUN": done, "OTHER": second}
    named = [places.get(word, word) for word in words.split()]
    refused = vitscale("run", "fork", f"{done}{named[0]}", *named[1:])
    assert refused.returncode != 0
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_of_a_run_is_what_a_user_would_type(done: Path) -> None:
    words = command_of(read_config(done))
    assert words[:2] == ["pretrain", "tiny-digits"]
    assert words[words.index("--model.image-size") + 1 :][:2] == ["16", "16"]
    assert words[words.index("--out") + 1] == str(done)


def test_logs_begin_with_the_first_error(done: Path) -> None:
    for rank, cause, at in ((0, Cause.LOST_PEER, 1.0), (1, Cause.ERROR, 2.0)):
        write_end(done, End(cause, f"Traceback\nof rank {rank}", 0, rank, rank, f"n{rank}", at, 5))
    (done / "logs" / "node-0001-start-000.log").write_text("of node 1\n")
    told = vitscale("run", "logs", done).stdout
    assert told.startswith("first: rank 1 on n1 at step 5, ")
    places = [told.index(text) for text in ("of rank 1\n", "then: rank 0 on n0", "of rank 0\n", "of node 1", "tiny-digits starts on cpu")]
    assert places == sorted(places)
    assert [end["rank"] for end in json.loads(vitscale("run", "logs", done, "--json").stdout)] == [1, 0]
    assert "has had 1 start, from 0 on" in vitscale("run", "logs", done, "--start", "1").stderr
