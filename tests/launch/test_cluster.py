"""The SLURM that tests run on (tests/slurm.py): a node's death ends what ran there alone, and nothing outlives the cluster."""

import contextlib
from pathlib import Path

from tests.slurm import Cluster, wait_for


def processes(conf: Path) -> list[str]:
    """The command lines of all processes that know of a cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={conf}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().decode())
    return found


def test_nothing_is_left_of_a_test_that_failed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "slurm")
    with contextlib.suppress(ZeroDivisionError), cluster:
        # A task and a process that has left the task's session, on each of two nodes
        job = cluster.sbatch("-N2", "--output", tmp_path / "log", "--wrap", "srun bash -c 'setsid sleep 1234 & exec sleep 4321'")
        wait_for(lambda: len(cluster.tasks(job, "4321")) == 2, "both tasks", told=(tmp_path / "log").read_text)
        cluster.kill_node(cluster.nodes_of(job)[1])
        assert set(cluster.tasks(job, "4321")) == {0}
        assert len([words for words in processes(cluster.conf) if "1234" in words and "setsid" not in words and "bash" not in words]) == 1
        raise ZeroDivisionError
    assert processes(cluster.conf) == []
