"""What follows from a start's end: the rules one by one, and what a start that has ended leaves."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.runs import begin, log
from vitscale.config import TrainConfig
from vitscale.ending import Cause, End, in_order, write_end
from vitscale.heartbeat import Sign
from vitscale.verdict import Past, Verdict, conclude, judge, read_history, silent_hosts


def end(cause: Cause, *, rank: int = 0, host: str = "n1", at: float = 100.0, **more) -> End:
    return End(cause, f"error: {cause}", 3, rank, 0, host, at, 57, **more)


def past(action: str, *, cause: Cause | str = "", progressed: bool = False, blamed: tuple[str, ...] = ()) -> Past:
    return Past(0, 0.0, cause, "", 0, blamed, 50, progressed, action, "", ())  # type: ignore[arg-type]


def verdict(*causes: Cause | End, status: int = 1, cluster: bool = True, **facts) -> Verdict:
    ends = in_order([cause if isinstance(cause, End) else end(cause) for cause in causes])
    usual = {"finished": False, "stop_asked": False, "preempted": False, "history": (), "max_restarts": 3, "progressed": True}
    return judge(ends, status, cluster=cluster, **usual | facts)


@pytest.mark.parametrize(
    ("cause", "action"),
    [
        (Cause.SIGNAL, "requeue"),
        (Cause.REQUEST, "stop"),
        (Cause.PREEMPTED, "requeue"),
        (Cause.SPIKE, "again"),
        (Cause.NONFINITE, "again"),
        (Cause.DIVERGED, "stop"),
        (Cause.CORRUPT, "requeue"),
        (Cause.BAD_NODE, "requeue"),
        (Cause.OUT_OF_MEMORY, "stop"),
        (Cause.DISK_FULL, "stop"),
        (Cause.HANG, "again"),
        (Cause.LOST_PEER, "again"),
        (Cause.KILLED, "again"),
        (Cause.INPUT, "again"),  # after progress
        (Cause.ERROR, "again"),
    ],
)
def test_every_cause_has_its_rule(cause: Cause, action: str) -> None:
    """And none of them comes before what a person or SLURM decided."""
    bad = ("n7",) if cause in (Cause.CORRUPT, Cause.BAD_NODE) else ()
    found = verdict(end(cause, bad_nodes=bad))
    assert (found.action, found.without) == (action, bad)
    assert verdict(cause, finished=True).action == "finished"
    assert verdict(cause, stop_asked=True).action == "stop"
    preempted = verdict(cause, preempted=True)
    assert (preempted.action, preempted.cause, preempted.without) == ("requeue", Cause.PREEMPTED, ())


def test_all_causes_are_known_to_the_rules() -> None:
    for cause in Cause:
        assert verdict(cause).why


def test_a_finished_run_is_finished_and_a_person_comes_before_slurm() -> None:
    assert verdict(finished=True, stop_asked=True, preempted=True).action == "finished"
    assert verdict(stop_asked=True, preempted=True).action == "stop"


@pytest.mark.parametrize(
    ("status", "action"), [(75, "requeue"), (140, "requeue"), (137, "again"), (-9, "again"), (1, "again"), (0, "again"), (134, "again")]
)
def test_without_a_record_the_exit_status_tells(status: int, action: str) -> None:
    assert verdict(status=status, cluster=False).action == action


def test_without_a_record_or_progress_a_failure_is_not_tried_again() -> None:
    assert verdict(status=1, progressed=False).action == "stop"
    assert verdict(status=137, progressed=False).action == "again"


@pytest.mark.parametrize("cause", [Cause.ERROR, Cause.INPUT])
def test_an_error_is_tried_again_only_after_progress(cause: Cause) -> None:
    assert verdict(cause, progressed=True).action == "again"
    assert verdict(cause, progressed=False).action == "stop"


def test_memory_that_runs_out_stops_with_advice() -> None:
    assert "--micro-batch-size" in verdict(Cause.OUT_OF_MEMORY).why


@pytest.mark.parametrize("cause", [Cause.HANG, Cause.KILLED])
def test_a_machine_that_fails_twice_in_a_row_is_left_out(cause: Cause) -> None:
    once = past("again", cause=Cause.KILLED, progressed=True, blamed=("n1", "n2"))
    why = verdict(cause).why + ", for the second start in a row on n1"
    assert verdict(cause, history=[once]) == Verdict("requeue", why, cause, ("n1",), without=("n1",))
    assert verdict(end(cause, host="n3"), history=[once]).without == ()
    assert verdict(cause, history=[once, past("requeue", cause=Cause.SIGNAL, blamed=("n1",))]).without == ()
    assert verdict(cause, history=[once], cluster=False).without == (), "there is no other machine"


def test_of_a_hang_those_are_blamed_that_cannot_tell_of_it() -> None:
    """A rank that is stopped makes all others hang, and is the only one that leaves no record."""
    once = past("again", cause=Cause.HANG, progressed=True, blamed=("n4",))
    found = verdict(end(Cause.HANG, host="n1"), end(Cause.HANG, host="n2", rank=1), history=[once], silent=["n4"])
    assert (found.action, found.without) == ("requeue", ("n4",))


def test_of_a_hang_the_machine_is_blamed_that_stood_still_and_was_woken() -> None:
    """To end it, SLURM continues a rank that is stopped, which then misses the peers that have told of the hang."""
    told = end(Cause.HANG, host="n3"), end(Cause.LOST_PEER, host="n4", rank=1, at=100.3, stood_still=21.0)
    another = end(Cause.LOST_PEER, host="n5", rank=2, at=100.1, stood_still=1.0)
    assert verdict(*told, another).blamed == ("n4",)
    assert verdict(*told, another, silent=["n6"]).blamed == ("n4",)


def test_a_rank_that_went_away_alone_and_without_a_word_was_killed() -> None:
    missed = end(Cause.LOST_PEER, host="n1")
    assert verdict(missed, silent=["n2"]) == Verdict("again", "a rank was killed", Cause.KILLED, ("n2",))
    assert verdict(missed, silent=["n2", "n3"]).cause is Cause.LOST_PEER, "who of them went first is not known"
    assert verdict(missed).blamed == ()


def test_a_bad_machine_that_is_the_only_one_stops_the_run() -> None:
    assert verdict(end(Cause.BAD_NODE, bad_nodes=("n1",)), cluster=None).action == "stop"
    assert verdict(end(Cause.CORRUPT, bad_nodes=("n1",)), cluster=None).action == "again"
    assert verdict(Cause.CORRUPT).action == "again", "which one is wrong is not known"


def test_starts_without_progress_are_made_so_many_times() -> None:
    vain = past("again", cause=Cause.KILLED)
    assert verdict(Cause.KILLED, progressed=False).action == "again"
    assert verdict(Cause.KILLED, progressed=False, history=[vain]).action == "again"
    found = verdict(Cause.KILLED, progressed=False, history=[vain, vain])
    assert (found.action, found.why) == ("stop", "a rank was killed; 3 starts in a row made no step that was new")
    assert verdict(Cause.KILLED, progressed=True, history=[vain] * 9).action == "again"
    assert verdict(Cause.SIGNAL, progressed=False, history=[vain, vain]).action == "stop"


@pytest.mark.parametrize("between", [past("stop"), past("again", cause=Cause.KILLED, progressed=True)])
def test_what_a_person_started_and_what_progressed_begins_the_count_anew(between: Past) -> None:
    vain = past("again", cause=Cause.KILLED)
    assert verdict(Cause.KILLED, progressed=False, history=[vain, vain, between, vain]).action == "again"
    assert verdict(Cause.KILLED, progressed=False, history=[vain, vain, between, vain, vain]).action == "stop"


def test_rollbacks_and_preemptions_are_not_counted() -> None:
    others = [past("again", cause=Cause.SPIKE), past("requeue", cause=Cause.PREEMPTED)]
    vain = past("again", cause=Cause.KILLED)
    assert verdict(Cause.KILLED, progressed=False, history=[*others, vain, *others * 3]).action == "again"
    assert verdict(Cause.KILLED, progressed=False, history=[vain, *others, vain]).action == "stop"
    for cause in (Cause.SPIKE, Cause.NONFINITE):
        assert verdict(cause, progressed=False, history=[vain] * 9).action == "again"


def test_no_restarts_at_all_can_be_asked_for() -> None:
    assert verdict(Cause.KILLED, progressed=True, max_restarts=0).why == "a rank was killed; guard.max_restarts is 0"
    assert verdict(Cause.SIGNAL, progressed=True, max_restarts=0).action == "requeue", "nothing went wrong"


def test_a_start_that_ended_is_judged_by_what_it_left(config: TrainConfig) -> None:
    """A second verdict on the same start, as after a job that never came to one of its own, has no progress and no records."""
    config = begin(replace(config, guard=replace(config.guard, max_restarts=2)))
    run = Path(config.out)
    write_end(run, replace(end(Cause.KILLED), start=0))
    write_end(run, replace(end(Cause.LOST_PEER, rank=1), start=0))
    assert conclude(run, 0, -9).action == "again"
    (told,) = read_history(run)
    assert (told.cause, told.rank, told.blamed, told.step, told.progressed) == ("killed", 0, ("n1",), 57, True)
    assert told.words == "error: killed"
    assert conclude(run, 0, 137).action == "again"
    assert conclude(run, 0, 137) == Verdict("stop", "a rank was killed; 2 starts in a row made no step that was new", Cause.KILLED)
    assert [line["progressed"] for line in map(json.loads, (run / "ends.jsonl").read_text().splitlines())] == [True, False, False]


def test_progress_is_a_step_that_no_start_had_made(config: TrainConfig) -> None:
    config = begin(config)
    run = Path(config.out)
    for steps, progressed in (([2, 3], True), ([], False), ([4], True)):
        log(config, *({"step": step, "loss": 1.0} for step in steps))
        conclude(run, len(read_history(run)), -9)
        assert read_history(run)[-1].progressed == progressed
        begin(config)
    (run / "heartbeats").mkdir()
    sign = Sign(100.0, 3, 0, 1, 0, "n1", "", 57, 9, 72, "training", 0.1, None, 120.0)
    (run / "heartbeats" / "node-0000.json").write_text(json.dumps(asdict(sign)))
    (run / "heartbeats" / "node-0001.json").write_text("{}")
    conclude(run, 3, -9)
    assert (read_history(run)[-1].progressed, read_history(run)[-1].step) == (True, 9)


def test_a_stop_that_a_person_asked_for_is_seen(config: TrainConfig) -> None:
    config = begin(config)
    run = Path(config.out)
    (run / "stop").write_text("{}")
    assert conclude(run, 0, 75).action == "stop"


@pytest.mark.parametrize("odd", ["[]", "null", "3", '{"start": 1}', "{" * 5000])
def test_records_that_are_none_are_left_out(config: TrainConfig, odd: str) -> None:
    run = Path(begin(config).out)
    for folder, file in (("ends", "start-000-rank-00000.json"), ("heartbeats", "node-0000.json")):
        (run / folder).mkdir()
        (run / folder / file).write_text(odd)
    (run / "ends.jsonl").write_text(f"{odd}\n")
    assert conclude(run, 0, -9).action == "again"
    assert len(read_history(run)) == 1


def test_machines_all_of_whose_ranks_left_a_record_are_not_silent(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for node, start in enumerate((3, 3, 2)):
        sign = Sign(1.0, start, 2 * node, 2, node, f"n{node}", "", 57, 9, 72, "training", 0.1, None, 120.0)
        (tmp_path / "heartbeats" / f"node-000{node}.json").write_text(json.dumps(asdict(sign)))
    assert silent_hosts(tmp_path, 3, [end(Cause.HANG, rank=0), end(Cause.HANG, rank=1), end(Cause.HANG, rank=2)]) == ["n1"]


def test_a_torn_last_line_takes_no_other_with_it(config: TrainConfig) -> None:
    run = Path(begin(config).out)
    (run / "ends.jsonl").write_text('{"start": 0, "ca')
    conclude(run, 0, -9)
    assert len(read_history(run)) == 1
