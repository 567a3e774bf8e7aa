"""`vitscale run ...` as a user types it, on real runs: watched, listed, stopped, forked, and their logs."""

import dataclasses
import json
import os
import shlex
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import run_verbs
from launch.run_verbs import command_of, run_status, run_stop, status_lines
from tests.command import SMALL, VITSCALE, vitscale
from tests.runs import begin, losses
from vitscale.config import TrainConfig, to_dict
from vitscale.ending import Cause, End, write_end
from vitscale.heartbeat import Sign
from vitscale.run import read_config, read_record, write_json
from vitscale.status import status
from vitscale.verdict import Past


@pytest.fixture(scope="module")
def done(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "done"
    ran = vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--eval-data", dataset / "val", "--out", out, *SMALL)
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
    assert spent["lost"]["evaluation"] > 0
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
        ("@3 OUT --global-batch-size 16", "the checkpoint's 3 steps would have other batches than they had"),
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


def test_of_a_long_log_the_last_lines(done: Path) -> None:
    (done / "logs" / "node-0001-start-000.log").write_text("one\ntwo\nthree\n")
    told = vitscale("run", "logs", done, "--tail", 2).stdout
    assert "node-0001-start-000.log --\ntwo\nthree\n" in told
    assert "starts on cpu" not in told
    assert "tail=0 must be at least 1" in vitscale("run", "logs", done, "--tail", 0).stderr


def test_logs_of_tasks_that_met_nobody_are_shown_with_the_newest_start(done: Path) -> None:
    old, new = (done / "logs" / f"node-0002-job-{job}-0-0.log" for job in (6, 7))
    for log in (old, new):
        log.write_text(f"in {log.name}\n")
    os.utime(old, (1e9, 1e9))
    told = vitscale("run", "logs", done).stdout
    assert f"in {new.name}\n" in told
    assert old.name not in told


# -- A run of SLURM's, from files alone ---------------------------------------------------------------------------------------------------


def past(start: int, action: str, cause: str = "", why: str = "", words: str = "", blamed: tuple[str, ...] = (), rank: int = 0) -> Past:
    return Past(start, time.time(), cause, words, rank, blamed, 50, False, action, why, ())  # type: ignore[arg-type]


class Files:
    """What job 17 leaves of a run, put there step by step."""

    def __init__(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.run, self.starts = config, Path(config.out), 0
        self._folder = self.run / "submissions" / "000"
        monkeypatch.setenv("SLURM_JOB_ID", "17")

    def submit(self) -> None:
        self._folder.mkdir(parents=True)
        write_json(self._folder / "config.json", to_dict(self.config))
        (self._folder / "jobs").write_text("17\n")

    def start(self) -> None:
        begin(self.config)
        self.starts += 1

    def beat(self, phase: str = "training") -> None:
        (self.run / "heartbeats").mkdir(exist_ok=True)
        sign = Sign(time.time(), self.starts - 1, 0, 1, 0, "n1", "17", 57, 9, 72, phase, 0.5, None, hang_seconds=400.0)
        (self.run / "heartbeats" / "node-0000.json").write_text(json.dumps(asdict(sign)))

    def judge(self, action: str, cause: str = "", why: str = "") -> None:
        with open(self.run / "ends.jsonl", "a") as file:
            file.write(json.dumps(asdict(past(self.starts - 1, action, cause, why))) + "\n")

    def end(self, words: str) -> None:
        (self._folder / "ended").write_text(f"{words}\n")


@pytest.fixture
def files(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(config, monkeypatch)


def going_through(files: Files, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, ...]]) -> list[str]:
    """Has a verb that waits see the next of the steps each time that it sleeps; the states that it saw. The last step must end it."""
    left, seen = iter(steps), []

    def go_on(seconds: float) -> None:
        seen.append(status(files.run)["state"])
        name, *words = next(left)
        getattr(files, name)(*words)

    monkeypatch.setattr(run_verbs, "time", SimpleNamespace(sleep=go_on, time=time.time))  # others sleep, too: subprocess for one
    return seen


ON = [
    ("start",),  # seen as submitted
    ("beat", "starting"),  # seen as waiting: rank 0 has opened the run, and no machine has given a sign of life
    ("beat",),
    ("beat", "ended"),
    ("judge", "requeue", "signal", "saved"),  # seen as waiting for its verdict
    ("start",),
    ("beat",),
    ("beat", "ended"),
    ("judge", "again", "killed", "a rank was killed"),
    ("start",),
    ("beat",),
    ("beat", "ended"),
]
SEEN = ["waiting", "waiting", "starting", "running", "waiting", "waiting", "waiting", "running", "waiting", "waiting", "waiting", "running"]


@pytest.mark.parametrize(
    ("last", "state"),
    [
        (("judge", "stop", "request", "a person asked the run to stop"), "stopped: a person asked the run to stop"),
        (("judge", "stop", "error", "the code failed"), "failed: the code failed"),
        (("end", "cancelled"), "stopped: its job ended: cancelled"),
    ],
)
def test_a_watch_goes_on_until_a_run_is_at_rest(
    files: Files, last: tuple[str, ...], state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.submit()
    seen = going_through(files, monkeypatch, [*ON, last])
    run_status([str(files.run), "--watch"])
    assert seen == [*SEEN, "waiting"]
    assert f", {state}, 3 starts" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("begins", [0, 3, 4])
def test_a_stop_waits_for_what_is_judged(
    files: Files, begins: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked before the job starts, while it runs, and between its ranks' end and its verdict."""
    files.submit()
    steps = [*ON[:4], ("judge", "stop", "request", "a person asked the run to stop")]
    for name, *words in steps[:begins]:
        getattr(files, name)(*words)
    seen = going_through(files, monkeypatch, steps[begins:])
    run_stop([str(files.run), "--wait"])
    assert seen == SEEN[begins:5]
    told = capsys.readouterr().out.splitlines()
    assert ", stopped: a person asked the run to stop, 1 start" in told[-1]
    happened = {0: ["submitted as job 17, and not started yet"], 3: [], 4: ["its processes went away"]}[begins]
    asked = "asked to stop, it makes no step in job 17 (squeue -j 17)"
    assert told[:-1] == [f"{files.run} does not run now: {words}; {asked}" for words in happened]
    assert (files.run / "stop").exists()


def test_a_run_that_has_not_started_is_known_to_all_verbs(files: Files) -> None:
    files.submit()
    words = "submitted as job 17, and not started yet"
    assert vitscale("run", "status", files.run).stdout.splitlines()[:2] == [
        f"{files.run}: test, waiting: {words}, unless cancelled (squeue -j 17)",
        "step 0 of 27, 0 starts",
    ]
    assert json.loads(vitscale("run", "status", files.run, "--json").stdout)["state"] == "waiting"
    listed = vitscale("run", "ls", files.run.parent).stdout.splitlines()
    assert listed[1].split()[:4] == [str(files.run), "test", "waiting", "0/27"]
    assert [of["job"] for of in json.loads(vitscale("run", "ls", files.run.parent, "--json").stdout)] == ["17"]
    assert "has no logs yet" in vitscale("run", "logs", files.run).stdout
    assert json.loads(vitscale("run", "logs", files.run, "--json").stdout) == []
    stopped = vitscale("run", "stop", files.run).stdout
    assert stopped == f"{files.run} does not run now: {words}; asked to stop, it makes no step in job 17 (squeue -j 17)\n"
    assert (files.run / "stop").exists()
    files.start()  # which a run that is asked to stop does not hinder
    assert (files.run / "stop").exists()


# -- What is shown ------------------------------------------------------------------------------------------------------------------------


def shown(done: Path, **found: Any) -> list[str]:
    return status_lines(status(done) | found)


def test_the_newest_ends_are_told_by_cause_machine_and_why(done: Path) -> None:
    ends = [
        *(past(start, "again", "killed", "a rank was killed") for start in range(4)),
        past(4, "again", "lost peer", "a rank went away without a word", "RuntimeError: [gloo/transport/tcp/pair.cc:547]", ("n2",)),
        past(5, "requeue", "signal", "saved when asked to by SIGUSR2; the job goes on later", "stopped at step 50 by SIGUSR2", ("n1",)),
        past(6, "again", "spike", "rolled back after a spike of the loss", "the loss rose to 9", ("n1",)),
        past(7, "requeue", "bad node", "a machine failed its checks", "scratch is full", ("n2",), rank=3),
        past(8, "again", why="the ranks ended well, yet the run is not finished", rank=-1),
        past(9, "finished", why="the run is finished"),
    ]
    lines = shown(done, ends=list(map(dataclasses.asdict, ends)))
    first = lines.index(f"4 earlier ends in {done}/ends.jsonl")
    assert lines[first + 1 : first + 6] == [
        "start 4 ended at step 50, lost peer on n2: a rank went away without a word -> again",
        "start 5 ended at step 50, signal: saved when asked to by SIGUSR2; the job goes on later -> requeue",
        "start 6 ended at step 50, spike: rolled back after a spike of the loss; rank 0: the loss rose to 9 -> again",
        "start 7 ended at step 50, bad node on n2: a machine failed its checks; rank 3: scratch is full -> requeue",
        "start 8 ended at step 50: the ranks ended well, yet the run is not finished -> again",
    ]
    assert not any(line.startswith("start 9") for line in lines)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (["step-00000006"], "the same command goes on from step-00000003"),
        (["step-00000003", "step-00000006"], "the same command starts anew"),
        ([], "the same command goes on from step-00000006"),
    ],
)
def test_a_run_goes_on_from_its_newest_whole_checkpoint(done: Path, damaged: list[str], said: str) -> None:
    names = ["step-00000003", "step-00000006"]
    faults = {name: "checksum" if name in damaged else None for name in names}
    (line,) = [of for of in shown(done, state="stopped", checkpoint_faults=faults) if of.startswith("checkpoints: ")]
    assert line.endswith(f"; {said}")
