"""A rank's sign of life: its bound, its file, and processes that really hang, are stopped, or have no disk left."""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from vitscale.ending import Cause, read_ends
from vitscale.heartbeat import COMPILING, EVALUATING, SAVING, STARTING, TRAINING, Sign, hang_bound, read_heartbeats


@pytest.mark.parametrize(
    ("phase", "gaps", "asked", "bound"),
    [
        (STARTING, [], 0, 1800),
        (STARTING, [], 5, 1800),
        (STARTING, [], 4000, 4000),
        (SAVING, [1.0], 5, 1800),
        (COMPILING, [], 5, 1800),  # a step that meets a new size, say
        (TRAINING, [], 0, 1800),  # the first step, which may compile
        (TRAINING, [0.5, 2.0, 1.0], 0, 120),
        (TRAINING, [0.5, 9.0, 1.0], 0, 180),
        (TRAINING, [0.5, 9.0], 5, 5),
        (TRAINING, [], 5, 5),
        (EVALUATING, [7.0], 0, 140),
    ],
)
def test_a_bound_is_twenty_times_the_slowest_step_of_late(phase: str, gaps: list[float], asked: float, bound: float) -> None:
    assert hang_bound(phase, gaps, asked, data_seconds=20) == bound
    assert hang_bound(phase, gaps, asked, data_seconds=300) == (360 if bound in (120, 140, 180) else bound)


RANK = """
import ctypes, os, resource, signal, sys, threading
from pathlib import Path
from vitscale import heartbeat
from vitscale.heartbeat import Heartbeat, TRAINING
from vitscale.machine import Place

heartbeat.WRITE_EVERY, heartbeat._WATCH_EVERY, heartbeat._BACKSTOP = 0.05, 0.02, float(sys.argv[4])
run, what, bound = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if what == "full disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
if what == "dead file system":
    os.mkfifo(run / "heartbeats" / ".node-0002.json.partial")  # opening it to write waits for a reader for ever
armed, arm = threading.Event(), Heartbeat._arm
def arm_and_tell(self):
    arm(self)
    if self.step == 57:
        armed.set()
Heartbeat._arm = arm_and_tell
beat = Heartbeat(run, 3, Place(5, 0, 6, 2), hang_seconds=bound, data_seconds=0)
beat.beat(56, 448, TRAINING)
beat.beat(57, 456, TRAINING)
armed.wait()  # until the watch has seen the beats
print("beaten", flush=True)

def a_step_that_hangs():
    if what == "held interpreter":
        ctypes.PyDLL(None).pause()  # keeps the lock of the interpreter
    threading.Event().wait()

for line in sys.stdin:
    if line == "beat\\n":
        beat.beat(58, 464, TRAINING)
        print("beaten", flush=True)
    elif line == "still\\n":
        print(beat.stood_still(), flush=True)
    elif line == "close\\n":
        beat.close()
        print("closed", flush=True)
    else:
        a_step_that_hangs()
"""


def start(run: Path, what: str = "", bound: float = 0.0, backstop: float = 0.1) -> subprocess.Popen[str]:
    (run / "heartbeats").mkdir(exist_ok=True)
    command = [sys.executable, "-c", RANK, str(run), what, str(bound), str(backstop)]
    env = os.environ | {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "n3"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "beaten\n"
    return process


def tell(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return process.stdout.readline()


def sign(run: Path) -> dict:
    return json.loads((run / "heartbeats" / "node-0002.json").read_text())


def test_a_rank_that_hangs_ends_with_its_stacks_and_a_record(tmp_path: Path) -> None:
    run = start(tmp_path, bound=0.3)
    _, errors = run.communicate("hang\n", timeout=60)
    assert run.returncode == 1
    (end,) = read_ends(tmp_path, 3)
    assert (end.cause, end.rank, end.node, end.host, end.step) == (Cause.HANG, 5, 2, "n3", 57)
    assert "after step 57 (training)" in end.words
    assert "in a_step_that_hangs" in errors, "the stack of the thread that hangs"


def test_where_the_interpreter_is_held_c_ends_the_rank(tmp_path: Path) -> None:
    run = start(tmp_path, "held interpreter", bound=0.5)
    _, errors = run.communicate("hang\n", timeout=60)
    assert run.returncode == 1
    assert "in a_step_that_hangs" in errors
    assert read_ends(tmp_path, 3) == [], "the others tell of the hang, and the judge blames who left no record"


def test_time_for_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    """A job that SLURM suspends goes on. What it waits for is a clock's, so this one test lets time pass."""
    run = start(tmp_path, bound=1.0, backstop=60.0)
    before = float(tell(run, "still"))
    run.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, run.pid, os.WSTOPPED | os.WNOWAIT)
    select.select([], [], [], 2.5)
    run.send_signal(signal.SIGCONT)
    assert before < 2.4 < float(tell(run, "still")), "yet it is told"
    assert tell(run, "beat") == "beaten\n"
    assert tell(run, "close") == "closed\n"
    run.communicate()
    assert read_ends(tmp_path, 3) == []


def test_the_file_tells_where_a_node_is(tmp_path: Path) -> None:
    run = start(tmp_path)
    assert tell(run, "close") == "closed\n"
    told = sign(tmp_path)
    assert told.pop("time") > 1.7e9
    assert 0 <= told.pop("quiet") < 60
    assert 0 <= told.pop("seconds_per_step") < 60
    assert told == {
        "start": 3, "rank": 5, "ranks": 2, "node": 2, "host": "n3", "job": "12", "pid": run.pid, "step": 57, "samples_seen": 456,
        "phase": "ended", "hang_seconds": 1800,
    }  # fmt: skip
    run.communicate()


@pytest.mark.parametrize("fault", ["full disk", "dead file system"])
def test_a_disk_that_fails_ends_neither_the_rank_nor_its_watch(tmp_path: Path, fault: str) -> None:
    run = start(tmp_path, fault, bound=30.0)
    assert tell(run, "beat") == "beaten\n"
    assert tell(run, "close") == "closed\n"
    assert not (tmp_path / "heartbeats" / "node-0002.json").exists()
    run.communicate()
    assert run.returncode == 0
    hanging = start(tmp_path, "dead file system again", bound=0.3)
    hanging.communicate("hang\n", timeout=60)
    assert [end.cause for end in read_ends(tmp_path, 3)] == [Cause.HANG]


@pytest.mark.parametrize("odd", [{"time": 1e400}, {"time": -1e400}, {"time": float("nan")}, {"ranks": 10**400}, {"step": "x"}])
def test_a_heartbeat_that_cannot_be_is_left_out(tmp_path: Path, odd: dict) -> None:
    (tmp_path / "heartbeats").mkdir()
    sign = asdict(Sign(1.0, 3, 0, 1, 0, "n1", "", 57, 9, 72, TRAINING, 0.1, None, 120.0))
    for number, more in enumerate(({}, odd)):
        (tmp_path / "heartbeats" / f"node-000{number}.json").write_text(json.dumps(sign | more))
    assert len(read_heartbeats(tmp_path)) == 1
