"""A real SLURM of four nodes on one machine, in a folder of its own, started by a test and ended with it.

    with Cluster(tmp_path / "slurm") as cluster:
        job = cluster.sbatch("-N2", "--wrap", "srun hostname")
        wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the job's end")
        cluster.kill_node("n2")

Debian's packages slurm-wlm and munge; no systemd, no cgroups, root. Every node is this host under another name, so all of them see its
files, as a cluster sees a shared file system. A job's partition is `low`, which jobs of `high` preempt after 20 s of grace.
`cluster.environment` is what a command needs to talk to it.

Without the packages the tests are skipped, and fail where VITSCALE_REQUIRE_SLURM is set.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from data_tools.processes import die_with

NODES = ("n1", "n2", "n3", "n4")
GRACE, SLURMD_TIMEOUT, KILL_WAIT = 20, 20, 5  # seconds
CONF = """\
ClusterName=vitscale
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
{more}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
MpiDefault=none
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} MaxTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=60 State=UP PreemptMode=OFF
"""


def need_slurm() -> None:
    """Skips the test where SLURM's packages are missing, or fails it where they have to be there."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        why = f"{', '.join(missing)} not installed; Debian's packages are slurm-wlm and munge" if missing else "slurmd needs root"
        pytest.fail(why) if os.environ.get("VITSCALE_REQUIRE_SLURM") else pytest.skip(why)


class Cluster:
    """`preempt_send_user_signal`: preemption sends the job's own signal (`--signal`) instead of SIGTERM, as some sites have it."""

    def __init__(self, folder: Path, *, preempt_send_user_signal: bool = False) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
            "SLURM_CONF": str(self.conf)
        }
        self._more = "SlurmctldParameters=preempt_send_user_signal" if preempt_send_user_signal else ""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        need_slurm()
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        port, *ports = free_ports(1 + len(NODES))
        node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=2 RealMemory=4000"
        nodes = "\n".join(node.format(name, host, p) for name, p in zip(NODES, ports, strict=True))
        self.conf.write_text(
            CONF.format(
                folder=folder, host=host, port=port, user=getpass.getuser(), nodes=nodes, more=self._more, grace=GRACE, kill_wait=KILL_WAIT,
                slurmd_timeout=SLURMD_TIMEOUT,
            )
        )  # fmt: skip
        munge = {"key-file": key} | {f"{what}-file": folder / f"munge.{what}" for what in ("pid", "seed", "log")}
        words = [f"--{name}={value}" for name, value in munge.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *words)
        wait_for((folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-f", self.conf)
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.idle_nodes() == len(NODES), "the nodes")

    def __exit__(self, *_: object) -> None:
        """Ends every process, however the test ended; a cancelled job would be one more wait."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        while left := self._of_jobs():  # one that was just forking is found the next time
            _kill(left)

    # -- what a person would type ------------------------------------------------------------------------------------------------------

    def run(self, *words: object) -> str:
        """What a SLURM command prints; raises CalledProcessError with what it said."""
        return subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    def sbatch(self, *words: object) -> str:
        """Submits; the job's id."""
        return self.run("sbatch", "--parsable", *words)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells, by its own names: JobState, Reason, Restarts, ExitCode, NodeList..."""
        words = self.run("scontrol", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that a job runs on, the one of its batch script first."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def idle_nodes(self) -> int:
        return int(self.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") or 0)

    # -- what a cluster does to jobs ---------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, "-f", self.conf)

    def kill_node(self, node: str) -> None:
        """As a power cut: its daemon and all that it started, at once."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        while left := self._of_jobs(node):
            _kill(left)

    def tasks(self, job: str, word: str) -> dict[int, int]:
        """The processes of a job's tasks whose command line has a word, by rank."""
        found = {}
        for pid in self._of_jobs():
            variables = _variables(pid)
            if variables.get("SLURM_JOB_ID") == job and word in _words(pid) and _parent_name(pid) == "slurmstepd":
                found[int(variables["SLURM_PROCID"])] = pid
        return found

    def _of_jobs(self, node: str = "") -> list[int]:
        """SLURM's step daemons, which are known by the log that they hold open, and what they started, known by the environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            with contextlib.suppress(OSError):
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z" or pid == os.getpid():
                    continue
                if (folder / "comm").read_text().startswith("slurmstepd"):
                    log = os.readlink(folder / "fd" / "3")
                    mine = log.startswith(f"{self.folder}/slurmd.") and (not node or log == f"{self.folder}/slurmd.{node}.log")
                else:
                    variables = _variables(pid)
                    in_job = variables.get("SLURM_CONF") == str(self.conf) and "SLURM_JOB_ID" in variables
                    mine = in_job and node in ("", variables.get("SLURMD_NODENAME"))
                if mine:
                    found.append(pid)
        return found

    def _start(self, name: str, *words: object) -> None:
        parent = os.getpid()
        with open(self.folder / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [str(word) for word in words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),  # a test run that is killed leaves no daemon
            )


def _variables(pid: int) -> dict[str, str]:
    """A process's environment; none where it has ended."""
    with contextlib.suppress(OSError):
        return dict(_pairs(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")))
    return {}


def _pairs(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, _, value = word.partition("=")
        yield name, value


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _parent_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/comm").read_text().strip()
    return ""


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(done: Callable[[], object], what: str, seconds: float = 60, told: Callable[[], str] = str) -> None:
    """Returns once `done` holds; SLURM tells nobody when something happens, so it is asked. `told` is for the message of a failure."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if done():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} after {seconds:g} s {told()}")
        time.sleep(0.1)
