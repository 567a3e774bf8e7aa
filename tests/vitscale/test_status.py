"""What a run does, by its files: each state from what tells of it."""

import os
from pathlib import Path

import pytest

from tests.runs import begin, log
from vitscale.config import TrainConfig, to_dict
from vitscale.heartbeat import Sign
from vitscale.run import RunError, read_record, write_json
from vitscale.status import Submission, state_of, status, submission_of
from vitscale.verdict import Past

NOW = 10_000.0


def sign(age: float = 1.0, *, quiet: float = 0.5, phase: str = "training") -> Sign:
    return Sign(NOW - age, 2, 0, 1, 0, "n1", "", 57, 9, 72, phase, quiet, None, hang_seconds=400.0)


def past(action: str, *, start: int = 2, why: str = "the code failed", words: str = "error: no", cause: str = "error") -> Past:
    return Past(start, NOW, cause, words, 0, (), 50, False, action, why, ())  # type: ignore[arg-type]


def submission(*jobs: str, begun: bool = True, ended: str = "") -> Submission:
    return Submission(Path(), jobs or ("17",), begun, ended, NOW)


AGAIN = "it goes on in job 17, unless cancelled or over (squeue -j 17)"


@pytest.mark.parametrize(
    ("facts", "state", "why"),
    [
        ({"locked": True}, "starting", ""),
        ({"signs": [sign(phase="starting")]}, "starting", ""),
        ({"signs": [sign()]}, "running", ""),  # elsewhere: no lock is seen
        ({"signs": [sign()], "locked": True, "stop_asked": True}, "running", "it was asked to stop"),
        ({"signs": [sign(), sign(quiet=150.0)]}, "running", ""),
        ({"signs": [sign(), sign(quiet=250.0)]}, "hanging", "n1 has made no step for 251 s; it ends itself after 400"),
        ({"signs": [sign(), sign(age=300.0)]}, "hanging", "n1 has made no step for 300 s; it ends itself after 400"),
        ({"signs": [sign(age=300.0)]}, "stopped", "its processes went away"),
        ({"signs": [sign(age=-3600.0)]}, "stopped", "its processes went away"),  # the clock was set back
        ({"signs": [sign(phase="ended")]}, "stopped", "its processes went away"),
        ({"signs": [sign(phase="ended")], "submission": submission()}, "waiting", f"its processes went away; {AGAIN}"),
        ({"signs": [sign(age=300.0)], "submission": submission()}, "waiting", f"its processes went away; {AGAIN}"),  # a node died
        ({"submission": submission()}, "waiting", f"no process of its newest start gave a sign of life yet; {AGAIN}"),
        (
            {"submission": submission(), "stop_asked": True, "signs": [sign(phase="ended")]},
            "waiting",
            "its processes went away; asked to stop, it makes no step in job 17 (squeue -j 17)",
        ),
        (
            {"submission": submission("17", "18"), "signs": [sign(phase="ended")]},
            "waiting",
            "its processes went away; it goes on in jobs 17, 18, unless cancelled or over (squeue -j 17,18)",
        ),
        ({"signs": [sign(phase="ended")], "submission": submission(ended="cancelled")}, "stopped", "its job ended: cancelled"),
        ({"history": [past("requeue")], "submission": submission(ended="cancelled")}, "stopped", "its job ended: cancelled"),
        (
            {"history": [past("stop")], "submission": submission(begun=False)},
            "waiting",
            "submitted as job 17, and not started yet, unless cancelled (squeue -j 17)",
        ),
        (
            {"history": [past("stop")], "submission": submission(begun=False, ended="the run was stopped")},
            "stopped",
            "its job ended: the run was stopped",
        ),
        ({"signs": [sign()], "submission": submission(begun=False)}, "running", ""),
        ({"signs": [sign(phase="ended")], "finished": True}, "finished", ""),
        ({"history": [past("stop")]}, "failed", "error: no; the code failed"),
        ({"history": [past("stop", why="a person asked the run to stop", cause="request")]}, "stopped", "a person asked the run to stop"),
        ({"history": [past("stop", why="a rank went away", cause="lost peer", words="gloo/tcp.cc:53")]}, "failed", "a rank went away"),
        ({"history": [past("requeue", why="saved")], "submission": submission()}, "waiting", f"saved; {AGAIN}"),
        ({"history": [past("again", why="killed")], "submission": submission()}, "waiting", f"killed; {AGAIN}"),
        ({"history": [past("stop")], "submission": submission(ended="the run was stopped")}, "failed", "error: no; the code failed"),
        ({"history": [past("requeue", why="saved")]}, "stopped", "saved"),  # no job of SLURM's: its launcher went away
        ({"history": [past("again")]}, "stopped", "the code failed"),
        ({"history": [past("stop", start=1)]}, "stopped", ""),
        ({"history": [past("stop", start=1)], "signs": [sign()]}, "running", ""),
    ],
)
def test_a_state_follows_from_what_is_seen(facts: dict, state: str, why: str) -> None:
    usual = {"signs": [], "history": [], "locked": False, "finished": False, "stop_asked": False}
    seen = usual | facts
    assert state_of(2, seen.pop("signs"), seen.pop("history"), now=NOW, **seen) == (state, why)


def submit(run: Path, number: int, *jobs: str, config: TrainConfig | None = None, time: float | None = None) -> Path:
    folder = run / "submissions" / f"{number:03d}"
    folder.mkdir(parents=True)
    (folder / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    if time is not None:
        os.utime(folder / "jobs", (time, time))
    if config:
        write_json(folder / "config.json", to_dict(config))
    return folder


def test_a_run_that_was_submitted_and_has_not_started_is_told_of(config: TrainConfig) -> None:
    run = Path(config.out)
    with pytest.raises(RunError, match="does not exist"):
        status(run)
    submit(run, 0, "17", config=config)
    found = status(run)
    assert (found["state"], found["job"], found["step"], found["total_steps"], found["starts"]) == ("waiting", "17", 0, 27, 0)
    assert found["why"] == "submitted as job 17, and not started yet, unless cancelled (squeue -j 17)"
    (run / "submissions" / "000" / "ended").write_text("the run was stopped\n")  # what was given could not be trained with
    found = status(run)
    assert (found["state"], found["why"]) == ("stopped", "its job ended: the run was stopped")


def test_the_newest_submission_is_the_newest_starts_or_newer_than_it(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(config.out)
    assert submission_of(run) is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    submit(run, 0, "16", "17", "18", time=0.0)
    begin(config)
    found = submission_of(run)
    assert found
    assert (found.jobs, found.begun, found.ended) == (("17", "18"), True, "")  # of a chain what came before is over
    (run / "submissions" / "000" / "jobs").unlink()  # or not for this user to read
    found = submission_of(run)
    assert found
    assert (found.jobs, found.begun) == (("17",), True)
    after = submit(run, 10, "21")
    os.utime(after / "jobs", (2e9, 2e9))
    found = submission_of(run)
    assert found
    assert (found.jobs, found.begun) == (("21",), False)
    os.utime(after / "jobs", (1e9, 1e9))  # never started: a start on one machine came after it
    assert submission_of(run) is None


def test_how_fast_it_goes_is_the_median_of_the_newest_lines_of_this_start(config: TrainConfig) -> None:
    config = begin(config)
    run = Path(config.out)
    assert status(run)["seconds_left"] is None
    record = read_record(run)
    record["starts"][-1]["step"] = 5
    write_json(run / "run.json", record)
    rates = {4: 1000.0, 5: 1000.0, 6: 1.0, 7: 24.0, 8: 25.0, 9: 24.0, 10: 500.0}
    log(config, *({"step": step, "samples_seen": 24 * step, "loss": 1.0, "images_per_second": rate} for step, rate in rates.items()))
    found = status(run)
    assert found["pace"] == {"images_per_second": 24.0}
    assert found["seconds_left"] == 17.0
