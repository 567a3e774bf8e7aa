"""What a run does, by its files: each state from what tells of it."""

import pytest

from vitscale.heartbeat import Sign
from vitscale.status import state_of
from vitscale.verdict import Past

NOW = 10_000.0


def sign(age: float = 1.0, *, quiet: float = 0.5, phase: str = "training") -> Sign:
    return Sign(NOW - age, 2, 0, 1, 0, "n1", "", 57, 9, 72, phase, quiet, None, hang_seconds=400.0)


def past(action: str, *, start: int = 2, why: str = "the code failed", words: str = "error: no", cause: str = "error") -> Past:
    return Past(start, NOW, cause, words, 0, (), 50, False, action, why, ())  # type: ignore[arg-type]


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
        ({"signs": [sign(phase="ended")], "job_ended": "cancelled"}, "stopped", "its job ended: cancelled"),
        ({"signs": [sign(phase="ended")], "finished": True}, "finished", ""),
        ({"history": [past("stop")]}, "failed", "error: no; the code failed"),
        ({"history": [past("stop", why="a person asked the run to stop", cause="request")]}, "stopped", "a person asked the run to stop"),
        ({"history": [past("requeue", why="saved")]}, "waiting", "saved; SLURM starts it again"),
        ({"history": [past("requeue", why="preempted", cause="preempted")]}, "waiting", "preempted; SLURM starts it again"),
        ({"history": [past("again")]}, "stopped", ""),
        ({"history": [past("stop", start=1)]}, "stopped", ""),
        ({"history": [past("stop", start=1)], "signs": [sign()]}, "running", ""),
    ],
)
def test_a_state_follows_from_what_is_seen(facts: dict, state: str, why: str) -> None:
    usual = {"signs": [], "history": [], "locked": False, "finished": False, "stop_asked": False}
    seen = usual | facts
    assert state_of(2, seen.pop("signs"), seen.pop("history"), now=NOW, **seen) == (state, why)
