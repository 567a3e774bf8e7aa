"""`vitscale doctor` on this machine, on a real SLURM, and where something is missing."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.doctor import Partition, judge_cluster, read_partitions, site_text
from launch.site import read_site
from tests.command import VITSCALE, vitscale, without_torch
from tests.slurm import Cluster
from vitscale.machine import expand_nodes


def _doctor(*words: object, **environment: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit status, the checks by name, and what went to the error stream."""
    told = subprocess.run(
        [VITSCALE, "doctor", "--json", *map(str, words)], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    return told.returncode, {check["name"]: check for check in json.loads(told.stdout)}, told.stderr


def test_this_machine_works(tmp_path: Path, dataset: Path) -> None:
    status, checks, said = _doctor("--out", tmp_path / "runs/new", "--data", dataset / "train")
    assert status == 0, said
    for name in ("python", "torch", "deepspeed", "products", "file locks", "dataset"):
        assert checks[name]["status"] == "ok", checks[name]
    assert "131 samples" in checks["dataset"]["found"]
    assert checks["run directory"]["found"].startswith(f"{tmp_path}: ")  # the nearest folder that is there
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_told_and_makes_the_exit_status(tmp_path: Path) -> None:
    told = vitscale("doctor", "--out", tmp_path, "--data", tmp_path / "nothing")
    assert told.returncode == 1
    assert [line.split()[1] for line in told.stdout.splitlines() if line.startswith("fail")] == ["dataset"]
    assert "checks failed: dataset" in told.stderr


def test_a_login_node_without_torch_is_looked_at(tmp_path: Path) -> None:
    told = without_torch(tmp_path, "doctor", "--json", "--out", tmp_path)
    checks = {check["name"]: check for check in json.loads(told.stdout)}
    assert checks["torch"]["status"] == "unknown"
    assert "deepspeed" not in checks
    assert told.returncode == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "slurm", preempt_send_user_signal=True) as cluster:
        yield cluster


def test_a_cluster_is_described_and_gets_a_site_file(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    status, checks, said = _doctor("--out", tmp_path, "--site", site, SLURM_CONF=str(cluster.conf))
    assert status == 0, said
    assert checks["slurm client"]["found"].endswith(", cluster vitscale")
    assert checks["requeueing"]["status"] == "ok"
    assert checks["preemption"]["status"] == "warn"  # 25 s are few
    assert checks["preemption"]["found"] == "PreemptMode=REQUEUE, the signal of --signal first, KillWait 5 s"
    assert "low 25 s" in checks["preemption"]["to_do"]
    assert checks["partition low"]["found"] == "default, 4 nodes, no GPUs, 2 CPUs a node, at most 01:00:00"
    written = read_site(site)
    assert (written.partitions, written.gpus_per_node, written.time, written.requeue) == (("low",), 0, "01:00:00", True)
    again = site.read_text()
    assert _doctor("--out", tmp_path, "--site", site, SLURM_CONF=str(cluster.conf))[1]["site file"]["status"] == "ok"
    assert site.read_text() == again  # what a person has filled in stays


def test_inside_an_allocation_it_tells_of_it(cluster: Cluster, tmp_path: Path) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=1", "--output", str(tmp_path / "%t.json"), VITSCALE, "doctor", "--json"]
    subprocess.run(words, check=True, env=cluster.environment, cwd=tmp_path)
    for task in range(2):
        checks = {check["name"]: check for check in json.loads((tmp_path / f"{task}.json").read_text())}
        assert checks["allocation"]["status"] == "ok"
        assert ", 2 nodes (n1...), 2 tasks, " in checks["allocation"]["found"]


def test_on_several_nodes_each_line_begins_with_its_node(cluster: Cluster, tmp_path: Path) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=1", VITSCALE, "doctor", "--out", str(tmp_path), "--data", str(tmp_path / "nothing")]
    told = subprocess.run(words, capture_output=True, text=True, check=False, env=cluster.environment)
    nodes = {line.partition(": ")[0] for line in told.stdout.splitlines()}
    assert len(nodes) == 2
    assert nodes < {"n1", "n2", "n3", "n4"}
    assert len(re.findall(r"^n\d: fail    dataset ", told.stdout, re.MULTILINE)) == 2
    assert re.search(r"^error: n\d: 1 of \d+ checks failed: dataset$", told.stderr, re.MULTILINE)


def test_a_cluster_that_does_not_answer_fails(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=gone\nSlurmctldHost=localhost\nSlurmctldPort=1\nNodeName=n1\nPartitionName=p Nodes=n1\nMessageTimeout=2\n")
    status, checks, _ = _doctor("--out", tmp_path, SLURM_CONF=str(conf))
    assert status == 1
    assert checks["slurm client"]["status"] == "fail"


@pytest.mark.parametrize("text", ["n[1-3,7],gpu-[01-02],login", "rack[1-2]n[09-10]", "a1,a2,b[008-011,020]"])
def test_lists_of_nodes_are_read_as_slurm_reads_them(cluster: Cluster, text: str) -> None:
    assert list(expand_nodes(text)) == cluster.run("scontrol", "show", "hostnames", text).split()


# -- Decisions ----------------------------------------------------------------------------------------------------------------------------


GPUS = """\
PartitionName=gpu Default=NO GraceTime=0 MaxTime=1-00:00:00 Nodes=g[1-3] PreemptMode=REQUEUE State=UP
PartitionName=cpu Default=YES GraceTime=300 MaxTime=UNLIMITED Nodes=c1 PreemptMode=OFF State=UP
"""
NODES = [
    ["g1", "gpu", "gpu:h100:8(S:0-1)", "96"], ["g2", "gpu", "gpu:h100:8(S:0-1),nvme:1", "96"], ["g3", "gpu", "gpu:a100:4", "64"],
    ["c1", "cpu", "(null)", "32+"],
]  # fmt: skip


def test_partitions_with_gpus() -> None:
    gpu, cpu = read_partitions(GPUS, NODES)
    assert gpu == Partition("gpu", False, "1-00:00:00", 3, 0, True, ("h100", "a100"), 8, 96)
    assert cpu == Partition("cpu", True, "UNLIMITED", 1, 300, False, (), 0, 32)


def test_gpus_without_a_type() -> None:
    assert read_partitions("PartitionName=p", [["n", "p", "gpu:4", "16"]])[0].gpus_per_node == 4


def test_the_site_file_of_a_cluster_with_gpus(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(site_text({"ClusterName": "big", "JobRequeue": "0"}, read_partitions(GPUS, NODES), "/local"))
    site = read_site(file)
    assert (site.partitions, site.gpu_type, site.gpus_per_node, site.cpus_per_task) == (("gpu",), "h100", 8, 12)
    assert (site.time, site.requeue, site.scratch) == ("1-00:00:00", False, "/local")
    assert "there are also cpu" in file.read_text()
    assert "there are h100, a100" in file.read_text()


def test_what_a_clusters_settings_mean() -> None:
    def of(config: dict[str, str]) -> dict[str, tuple[str, str]]:
        return {check.name: (check.status, check.found + check.to_do) for check in judge_cluster(config, read_partitions(GPUS, NODES))}

    kind = of({"JobRequeue": "1", "PreemptMode": "REQUEUE", "KillWait": "90 sec", "SlurmctldParameters": "preempt_send_user_signal"})
    assert kind["requeueing"][0] == kind["preemption"][0] == "ok"
    assert "the signal of --signal first" in kind["preemption"][1]
    harsh = of({"JobRequeue": "0", "PreemptMode": "REQUEUE", "KillWait": "30 sec"})
    assert harsh["requeueing"][0] == harsh["preemption"][0] == "warn"
    assert "gpu 30 s" in harsh["preemption"][1]
    assert "SIGTERM first" in harsh["preemption"][1]
    assert "is cancelled" in of({"PreemptMode": "CANCEL"})["preemption"][1]
    assert kind["partition gpu"][0] == "warn"  # two types
