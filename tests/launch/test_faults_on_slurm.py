"""What a cluster does to a run, done for real on a SLURM of four nodes: each time the run comes to its end by itself, to the same bits.

Where a signal told it, no step is made twice; otherwise those since the last durable checkpoint are. A fault comes before a step that a
seed has drawn, while the run waits for it (`tests/held`), so that nothing depends on how fast the machine is.
"""

import random
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from tests.command import vitscale
from tests.disks import small_disk
from tests.jobs import FAULTS, PATIENCE, SIGNAL_LEAD, HeldRun, logs, pretraining, site_file, submitted, wait_for_end
from tests.runs import check_alike, losses
from tests.slurm import NODES, Cluster
from vitscale.run import is_finished, read_record
from vitscale.verdict import read_history

EVERY = 5  # steps between checkpoints
ROOM = 12  # steps between two faults at least: two checkpoints, and the commit of one
GUARD = ["--guard.hang-seconds", 40, "--guard.max-restarts", 3]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster


def settings(dataset: Path, out: Path, steps: int, *more: object) -> list[object]:
    checkpoints = ["--checkpoint-every", EVERY, "--keep-checkpoints", 0]
    return pretraining(dataset, out, "--steps", steps, "--global-batch-size", 12, "--micro-batch-size", 2, *checkpoints, *GUARD, *more)


def whole(cluster: Cluster, site: Path, pretrain: list[object], nodes: int) -> Path:
    """The run that nothing happens to."""
    (job,), submission = submitted(cluster, "--site", site, "--nodes", nodes, *pretrain)
    assert wait_for_end(cluster, job, submission, 900) == "COMPLETED", logs(submission)
    return Path(str(pretrain[pretrain.index("--out") + 1]))


def go_through(cluster: Cluster, dataset: Path, folder: Path, names: list[str], *, nodes: int, seed: int, without_client: bool) -> None:
    """One fault after the other happens to a run, each to a start of its own, and to another run none."""
    rng = random.Random(seed)
    at: list[int] = []
    for _ in names:
        at.append((at[-1] if at else 0) + ROOM + rng.randrange(EVERY))
    steps = at[-1] + ROOM
    site = site_file(folder / "site", without_client=without_client, lines=SIGNAL_LEAD)
    held = HeldRun(cluster, folder, site, settings(dataset, folder / "run", steps), held_at=at)
    held.submit(nodes)
    durable, nodes_then = [], []
    for name, step in zip(names, at, strict=True):
        held.wait_at(step)
        durable.append(held.newest())
        nodes_then.append(cluster.nodes_of(held.job))
        FAULTS[name].happen(held, step)
    assert held.wait_for_state() == "COMPLETED", logs(held.submission)

    assert is_finished(held.run)
    starts, past = held.starts(), {past.start: past for past in read_history(held.run)}
    assert len(starts) == len(names) + 1, "each fault ends one start"
    for number, (name, step, saved, on) in enumerate(zip(names, at, durable, nodes_then, strict=True)):
        fault, next_start = FAULTS[name], starts[number + 1]
        if fault.judged or number in past:
            told = past[number]
            assert (told.cause in fault.causes, told.action) == (True, fault.action), (name, told)
            if name in AT_FAULT:
                assert told.blamed == (on[AT_FAULT[name]],), (name, told)
        if fault.saves:
            assert step <= next_start["step"] <= step + 1, f"{name}: saved at the step's end, or at the next one's"
            assert next_start["step"] == past[number].step
            assert "lost" not in next_start, name
        else:
            assert saved <= next_start["step"] < step, name
            assert next_start.get("lost", {"steps": 0})["steps"] <= step - 1 - saved, name
    assert past[len(names)].action == "finished"
    assert all(before["step"] <= after["step"] for before, after in pairwise(starts))
    check_alike(held.run, whole(cluster, site, settings(dataset, folder / "whole", steps), nodes))


@pytest.mark.timeout(3000)
def test_a_run_goes_through_several_faults(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """The tasks have no client of SLURM, as in a container: who decides goes by what the batch script is told."""
    go_through(cluster, dataset, tmp_path, ["USR2", "a rank hangs", "preemption", "a rank killed"], nodes=2, seed=0, without_client=True)


AT_FAULT = {"a rank killed": 1, "a rank hangs": -1}  # which of a job's nodes; each has one rank
SEEDS = range(2)


@pytest.mark.soak
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("user_signal", [False, True], ids=["", "preempt_send_user_signal"])
@pytest.mark.parametrize("without_client", [False, True], ids=["client", "no client"])
def test_all_faults(dataset: Path, tmp_path: Path, user_signal: bool, without_client: bool, seed: int) -> None:
    names = list(FAULTS)
    random.Random(seed).shuffle(names)
    with Cluster(tmp_path / "slurm", preempt_send_user_signal=user_signal) as cluster:
        go_through(cluster, dataset, tmp_path, names, nodes=2 + seed % 2, seed=seed, without_client=without_client)


def test_a_run_moves_between_nodes_and_stages_by_its_submit_line(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """4 -> 2 -> 3 tasks, ZeRO 1 -> 3 -> 2: nothing but the line is another, and losses follow those of the run that stays."""
    layouts = [(4, 1), (2, 3), (3, 2)]
    stops, steps = [9, 30], 54
    same = ["--global-batch-size", 24, "--model.dropout", 0, "--engine.precision", "fp32"]
    site = site_file(tmp_path / "site")
    moving = HeldRun(cluster, tmp_path, site, settings(dataset, tmp_path / "run", steps, *same), held_at=stops)
    for (nodes, stage), step in zip(layouts, [*stops, None], strict=True):
        moving.submit(nodes, "--engine.zero-stage", stage)
        if step:
            moving.wait_at(step)
            assert vitscale("run", "stop", moving.run).returncode == 0
            moving.let_go(step)
        assert moving.wait_for_state() == ("FAILED" if step else "COMPLETED"), logs(moving.submission)
    starts = moving.starts()
    assert [start["world_size"] for start in starts] == [4, 2, 3]
    assert [past.action for past in read_history(moving.run)] == ["stop", "stop", "finished"]
    assert not any("lost" in start for start in starts)
    stayed = whole(cluster, site, settings(dataset, tmp_path / "whole", steps, *same, "--engine.zero-stage", 1), 4)
    ours, theirs = losses(moving.run), losses(stayed)
    assert ours.keys() == theirs.keys()
    first = starts[1]["step"]
    assert {step: loss for step, loss in ours.items() if step <= first} == {step: theirs[step] for step in range(1, first + 1)}
    for start in starts[1:]:
        after = range(start["step"] + 1, start["step"] + 21)
        assert after[-1] <= steps
        worst = max(abs(ours[step] - theirs[step]) for step in after)
        assert worst < 1e-5, f"{worst} within 20 steps after step {start['step']}"


@pytest.mark.parametrize(("bad", "full"), [("n1", True), pytest.param("n2", False, marks=pytest.mark.soak)], ids=["full", "missing"])
def test_a_node_that_fails_preflight_is_left_out(cluster: Cluster, dataset: Path, tmp_path: Path, bad: str, full: bool) -> None:
    """It is the scratch, a folder on each node's own disk, that is wrong; the run ends on another node in its place."""
    scratch = tmp_path / "scratch"
    for node in NODES:
        if full or node != bad:
            (scratch / node).mkdir(parents=True)
    client = tmp_path / "client" / "scontrol"
    client.parent.mkdir()
    client.write_text(
        f'#!/bin/bash\n[ "$1" = update ] && kill -TERM $$  # as SLURM may at this moment\nexec {shutil.which("scontrol")} "$@"\n'
    )
    client.chmod(0o755)
    lines = f'setup = ["export PATH={client.parent}:$PATH"]'
    site = site_file(tmp_path / "site", variables=f"export TMPDIR={scratch}/$SLURMD_NODENAME", without_client=True, lines=lines)
    run = tmp_path / "run"
    with small_disk(scratch / bad, 1 << 20) if full else nullcontext():
        if full:
            (scratch / bad / "of somebody else").write_bytes(bytes(1 << 20))
        (job,), submission = submitted(cluster, "--site", site, "--nodes", 2, *settings(dataset, run, 3))
        assert wait_for_end(cluster, job, submission, PATIENCE) == "COMPLETED", logs(submission)
    assert is_finished(run)
    first, second = read_history(run)
    assert (first.cause, first.action, first.blamed, first.without) == ("bad node", "requeue", (bad,), (bad,))
    assert str(scratch / bad) in first.words
    assert second.action == "finished"
    assert bad not in cluster.nodes_of(job)
    assert cluster.job(job)["ExcNodeList"] == bad


def test_a_signal_does_not_end_the_judge(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """A second USR2 from a person, or a preemption's TERM, may come while it decides what follows the first."""
    signals = 'case "$*" in *launch.judge*) kill -USR2 $$; kill -TERM $$ ;; esac'
    run = tmp_path / "run"
    (job,), submission = submitted(
        cluster, "--site", site_file(tmp_path / "site", variables=signals), "--nodes", 1, *settings(dataset, run, 3)
    )
    assert wait_for_end(cluster, job, submission) == "COMPLETED", logs(submission)
    assert [past.action for past in read_history(run)] == ["finished"]


def test_where_the_judge_cannot_be_asked_the_job_ends_after_a_few_tries(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """Which are counted by themselves: preemptions before them do not matter."""
    fails = 'case "$*" in *launch.judge*) exit 3 ;; esac'
    run = tmp_path / "run"
    (job,), submission = submitted(
        cluster, "--site", site_file(tmp_path / "site", variables=fails), "--nodes", 1, *settings(dataset, run, 3)
    )
    assert wait_for_end(cluster, job, submission) == "FAILED", logs(submission)
    assert (submission / "ended").read_text() == "the judge could not be asked, 4 times in a row\n"
    assert logs(submission).count("requeue: the judge could not be asked") == 3
    assert len(read_record(run)["starts"]) == 1, "the run was finished all the while"
