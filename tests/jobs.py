"""Runs that are submitted to the SLURM of the tests, and what is done to them there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import SMALL, VITSCALE
from tests.slurm import Cluster, wait_for
from vitscale import checkpoint
from vitscale.run import read_record

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
PATIENCE = 400  # seconds for a start: the machine may have much else to do


# ---------------------------------------------------------------------------------------------------------------------------------------
# Submitting
# ---------------------------------------------------------------------------------------------------------------------------------------


def submit(*words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VITSCALE, "submit", *map(str, words)], capture_output=True, text=True, env=env or os.environ, cwd=cwd)


def submitted(
    cluster: Cluster, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> tuple[list[str], Path]:  # fmt: skip
    """The ids of the jobs, and the submission's folder."""
    done = submit("--json", *words, env=cluster.environment | (env or {}), cwd=cwd)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return told["jobs"], Path(told["folder"])


def wait_for_end(cluster: Cluster, job: str, folder: Path, seconds: float = 240) -> str:
    """The state that a job ended in."""
    wait_for(lambda: cluster.state(job) in ENDED, f"end of job {job}", seconds, lambda: logs(folder))
    return cluster.state(job)


def logs(folder: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(folder.glob("job-*.log")))


def pretraining(dataset: Path, out: Path, *more: object) -> list[object]:
    return ["--", "pretrain", "tiny-digits", "--data", dataset / "train", "--eval-data", "none", "--out", out, *SMALL, *more]


# ---------------------------------------------------------------------------------------------------------------------------------------
# A run that is held at some steps
# ---------------------------------------------------------------------------------------------------------------------------------------


def site_file(folder: Path, *, without_client: bool = False, lines: str = "", variables: str = "") -> Path:
    """A site file whose Python holds runs as VITSCALE_TEST_HOLD says.

    Args:
        without_client: in the tasks no command of SLURM is found, as in most containers.
        lines: more of the file.
        variables: of each task, as bash has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"]
    if without_client:
        commands = folder / "commands"
        if not commands.exists():
            commands.mkdir()
            for place in reversed(path.split(os.pathsep)):
                for command in Path(place).glob("*"):
                    if command.name not in ("scontrol", "sbatch", "srun", "squeue", "sinfo", "scancel", "sacct", "salloc", "sattach"):
                        (commands / command.name).unlink(missing_ok=True)
                        (commands / command.name).symlink_to(command)
        path = str(commands)
    python = folder / "python"
    lines_of_it = [variables, f"export PATH={path} PYTHONPATH=$PYTHONPATH:{Path(__file__).parent / 'held'}", f'exec {sys.executable} "$@"']
    python.write_text("\n".join(["#!/bin/bash", *lines_of_it, ""]))
    python.chmod(0o755)
    site = folder / "site.toml"
    site.write_text(f'python = "{python}"\ncpus_per_task = 1\n{lines}\n')
    return site


class HeldRun:
    """A run that waits before each of some steps, for something to be done to it, and goes on at a signal or when it is let go."""

    def __init__(self, cluster: Cluster, folder: Path, site: Path, pretrain: list[object], *, held_at: list[int]) -> None:
        self.cluster, self.folder, self.site, self.pretrain = cluster, folder, site, pretrain
        self.run = Path(str(pretrain[pretrain.index("--out") + 1]))
        self._hold = {"VITSCALE_TEST_HOLD": json.dumps({"steps": held_at, "marks": str(folder)})}
        self.job, self.submission = "", Path()

    def submit(self, nodes: int, *more: object) -> None:
        (self.job,), self.submission = submitted(
            self.cluster, "--site", self.site, "--nodes", nodes, "--time", 50, *self.pretrain, *more, env=self._hold
        )

    def wait_at(self, step: int) -> None:
        """Returns once the run waits before a step, counted from 1."""
        self.wait((self.folder / f"held-{step}").exists, f"step {step}")

    def let_go(self, step: int) -> None:
        (self.folder / f"go-{step}").touch()

    def wait(self, done: Callable[[], object], what: str) -> None:
        wait_for(done, what, PATIENCE, lambda: f"{self.cluster.job(self.job)}\n{logs(self.submission)}")

    def wait_for_state(self) -> str:
        return wait_for_end(self.cluster, self.job, self.submission, PATIENCE)

    def starts(self) -> list[dict[str, Any]]:
        return read_record(self.run)["starts"]  # type: ignore[no-any-return]

    def rank(self, rank: int) -> int:
        """A rank's process."""
        return self.cluster.tasks(self.job, "launch.task")[rank]

    def newest(self) -> int:
        """The step of the newest durable checkpoint."""
        saved, _ = checkpoint.newest_durable(self.run)
        return checkpoint.step_of(saved) if saved else 0


# ---------------------------------------------------------------------------------------------------------------------------------------
# What may happen to it
# ---------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that ends a start of a run that waits before a step, and what docs/operations.md says of it."""

    happen: Callable[[HeldRun, int], None]
    saves: bool
    """Whether the run has time to save."""
    causes: tuple[str, ...] = ()
    """One of which ends.jsonl tells."""
    action: str = ""
    judged: bool = True
    """Whether ends.jsonl tells of it in any case; SLURM may end the judge with the job."""


def _signal(name: str) -> Callable[[HeldRun, int], None]:
    return lambda held, step: (held.cluster.run("scancel", f"--signal={name}", held.job), None)[1]


def _preempt(held: HeldRun, step: int) -> None:
    held.cluster.sbatch("-p", "high", "-N4", "-n4", "-c2", "-o", "/dev/null", "--wrap", "sleep 1")


def _near_its_limit(held: HeldRun, step: int) -> None:
    """A limit less than `signal_lead_seconds` away, until the start has ended; the next one shall have the time that it needs."""
    start = len(held.starts()) - 1
    hours, minutes, _ = map(int, held.cluster.job(held.job)["RunTime"].split(":"))
    held.cluster.run("scontrol", "update", f"jobid={held.job}", f"TimeLimit={60 * hours + minutes + 2}")
    held.wait((held.run / "ends" / f"start-{start:03d}-rank-00000.json").exists, "end of the start")
    held.cluster.run("scontrol", "update", f"jobid={held.job}", "TimeLimit=50")


def _kill(held: HeldRun, step: int) -> None:
    os.kill(held.rank(1), signal.SIGKILL)


def _stop(held: HeldRun, step: int) -> None:
    """Hangs the last rank, not the one that waits."""
    os.kill(held.rank(max(held.cluster.tasks(held.job, "launch.task"))), signal.SIGSTOP)
    held.let_go(step)


def _kill_node(which: int) -> Callable[[HeldRun, int], None]:
    def kill(held: HeldRun, step: int) -> None:
        starts, node = len(held.starts()), held.cluster.nodes_of(held.job)[which]
        held.cluster.kill_node(node)
        held.let_go(step)
        held.wait(lambda: len(held.starts()) > starts, "another start")
        held.cluster.start_node(node)

    return kill


LOST = ("killed", "lost peer")
FAULTS = {
    "USR2": Fault(_signal("USR2"), True, ("signal",), "requeue"),
    "TERM": Fault(_signal("TERM"), True, ("signal",), "requeue"),
    "preemption": Fault(_preempt, True, ("preempted",), "requeue"),
    "time limit": Fault(_near_its_limit, True, ("signal",), "requeue"),
    "a rank killed": Fault(_kill, False, LOST, "again"),
    "a rank hangs": Fault(_stop, False, ("hang",), "again"),
    "a node dies": Fault(_kill_node(-1), False, LOST, "again", judged=False),
    "the first node dies": Fault(_kill_node(0), False, LOST, "again", judged=False),
}
SIGNAL_LEAD = "signal_lead_seconds = 120"  # more than `_near_its_limit` leaves
