"""What a run does, by its files: each state from what tells of it."""

import pytest

from vitscale.ending import Past
from vitscale.status import state_of

NOW = 10_000.0


def beat(age: float = 1.0, *, quiet: float = 0.5, phase: str = "training") -> dict:
    return {"time": NOW - age, "start": 2, "host": "n1", "phase": phase, "quiet": quiet, "hang_seconds": 400.0}


def past(action: str, *, start: int = 2, why: str = "the code failed", words: str = "error: no", cause: str = "error") -> Past:
    return Past(start, NOW, cause, words, 0, (), 50, False, action, why, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "state", "why"),
    [
        ({"locked": True}, "starting", ""),
        ({"beats": [beat(phase="starting")]}, "starting", ""),
        ({"beats": [beat()]}, "running", ""),  # elsewhere: no lock is seen
        ({"beats": [beat()], "locked": True, "stop_asked": True}, "running", "it was asked to stop"),
        ({"beats": [beat(), beat(quiet=150.0)]}, "running", ""),
        ({"beats": [beat(), beat(quiet=250.0)]}, "hanging", "n1 has made no step for 251 s; it ends itself after 400"),
        ({"beats": [beat(), beat(age=300.0)]}, "hanging", "n1 has made no step for 300 s; it ends itself after 400"),
        ({"beats": [beat(age=300.0)]}, "stopped", "its processes went away"),
        ({"beats": [beat(phase="ended")]}, "stopped", "its processes went away"),
        ({"beats": [beat(phase="ended")], "job_ended": "cancelled"}, "stopped", "its job ended: cancelled"),
        ({"beats": [beat(phase="ended")], "finished": True}, "finished", ""),
        ({"history": [past("stop")]}, "failed", "error: no; the code failed"),
        ({"history": [past("stop", why="a person asked the run to stop", cause="request")]}, "stopped", "a person asked the run to stop"),
        ({"history": [past("requeue", why="saved")]}, "waiting", "saved; SLURM starts it again"),
        ({"history": [past("requeue", why="preempted", cause="preempted")]}, "waiting", "preempted; SLURM starts it again"),
        ({"history": [past("again")]}, "stopped", ""),
        ({"history": [past("stop", start=1)]}, "stopped", ""),
        ({"history": [past("stop", start=1)], "beats": [beat()]}, "running", ""),
    ],
)
def test_a_state_follows_from_what_is_seen(facts: dict, state: str, why: str) -> None:
    usual = {"beats": [], "history": [], "locked": False, "finished": False, "stop_asked": False}
    seen = usual | facts
    assert state_of(2, seen.pop("beats"), seen.pop("history"), now=NOW, **seen) == (state, why)
