"""What the batch script asks with, and what it is answered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.judge import was_preempted
from tests.runs import begin
from vitscale.config import TrainConfig
from vitscale.ending import Cause, End, write_end
from vitscale.verdict import read_history

# Of slurm 22.05, shortened
JOB = (
    "JobId=12 JobName=vitscale UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 EligibleTime=2026-11-21T20:00:00 PreemptEligibleTime=2026-11-21T20:00:00 PreemptTime={} StartTime=2026-11-21T20:00:00"
)


@pytest.mark.parametrize(
    ("job", "preempted"),
    [(JOB.format("None"), False), (JOB.format("2026-11-21T20:01:00"), True), ("", False), ("slurm_load_jobs error: Invalid job id", False)],
)
def test_a_job_that_is_preempted_has_a_preempt_time(job: str, preempted: bool) -> None:
    assert was_preempted(job) is preempted


def ask(run: Path, status: int, job: str, number: str = "") -> list[str]:
    command = [sys.executable, "-m", "launch.judge", str(run), "--status", str(status), "--job", job]
    environment = os.environ | {"SLURM_JOB_ID": number}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def test_the_answer_is_lines_for_a_shell(config: TrainConfig) -> None:
    run = Path(begin(config, world_size=2).out)
    write_end(run, End(Cause.BAD_NODE, "n3 is off by an hour", 0, 0, 0, "n1", 100.0, 0, bad_nodes=("n3", "n4")))
    assert ask(run, 1, JOB.format("None")) == ["verdict=requeue", "without=n3,n4"]
    assert ask(run, 0, JOB.format("2026-11-21T20:01:00")) == ["verdict=requeue", "without="]
    assert [(past.cause, past.action) for past in read_history(run)] == [("bad node", "requeue"), ("preempted", "requeue")]


def test_what_another_job_has_taken_up_is_left_to_it(config: TrainConfig) -> None:
    run = Path(begin(config, world_size=2).out)
    assert ask(run, 137, JOB.format("None"), number="12") == ["verdict=stop"]
    assert read_history(run) == [], "it is the other one's start"


def test_what_never_was_a_run_is_not_started_again(tmp_path: Path) -> None:
    assert ask(tmp_path / "run", 1, "") == ["verdict=stop"]


def test_a_file_system_that_fails_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()  # reading it is an OSError, as reading from a disk that fails is
    assert ask(tmp_path, 137, JOB.format("None")) == []
