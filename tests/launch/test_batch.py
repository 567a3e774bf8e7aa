"""The batch script as text, and what a task makes of SLURM's variables. What the script does is tested on a real SLURM (test_submit.py)."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from launch.batch import Job, train_script, words_script
from launch.site import Container, Site, read_site
from launch.task import environment, rendezvous_port

RUN = Path("/runs/a b/h14")
JOB = Job("h14", RUN / "submissions" / "000", nodes=32, tasks_per_node=8, gpus_per_node=8, time="1-00", sbatch=("--comment=two words",))
SITE = dataclasses.replace(read_site(Path(__file__).parents[2] / "docs" / "site.toml"), container=None)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def is_bash(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize("container", [None, Container("pyxis", "a#b"), Container("apptainer", "/a b.sif", ("/data",))])
@pytest.mark.parametrize("requeue", [True, False])
def test_scripts_are_bash(container: Container | None, requeue: bool) -> None:
    site = dataclasses.replace(SITE, container=container, requeue=requeue)
    assert is_bash(train_script(site, JOB, RUN))
    assert is_bash(words_script(site, JOB, ["pack", "it's", "out dir"], array=4))


def test_what_slurm_is_told() -> None:
    script = train_script(SITE, JOB, RUN)
    told = directives(script)
    assert (told["nodes"], told["ntasks-per-node"], told["gpus-per-node"], told["cpus-per-task"]) == ("32", "8", "h100:8", "12")
    assert (told["partition"], told["account"], told["time"]) == ("gpu,preempt", "vision", "1-00")
    assert told["signal"] == "USR2@180"  # to the tasks: B: would give it to the shell alone
    assert told["output"] == "'/runs/a b/h14/submissions/000/job-%j.log'"
    assert (told["constraint"], told["comment"], told["exclusive"]) == ("ib", "'two words'", "")
    assert "requeue" in told
    srun = next(line for line in script.splitlines() if "launch.task" in line).split()
    assert {"--ntasks=256", "--cpus-per-task=12", "--gpus-per-node=h100:8", "--cpu-bind=cores", "--kill-on-bad-exit=1"} <= set(srun)


def test_a_site_without_requeueing() -> None:
    script = train_script(dataclasses.replace(SITE, requeue=False), JOB, RUN)
    assert "no-requeue" in directives(script)
    assert "\nmay_requeue=\n" in script


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (Container("pyxis", "nvcr.io#x:1", ("/data", "/a:/b")), ["--container-image=nvcr.io#x:1", ":/runs/a b/h14,/data:/data,/a:/b"]),
        (Container("apptainer", "/x.sif", ("/data",)), ["apptainer exec --nv", "/data:/data", "/x.sif ", "python3 -m launch.task"]),
    ],
)
def test_ranks_and_judge_run_in_the_container(container: Container, words: list[str]) -> None:
    script = train_script(dataclasses.replace(SITE, container=container), JOB, RUN)
    for module in ("launch.task", "launch.judge"):
        line = next(line for line in script.splitlines() if module in line)
        assert all(word in line for word in [word.replace("launch.task", module) for word in words])
    assert not any("scontrol" in line for line in script.splitlines() if container.image in line)  # SLURM's client stays on the host


def test_scratch_and_environment_are_taken_literally_but_for_variables(tmp_path: Path) -> None:
    site = Site(scratch=f'{tmp_path}/$PLACE/"a`touch x`$(touch y)\\', environment={"NCCL_X": "$(touch z) 'q'"}, setup=("PLACE=here",))
    script = train_script(site, JOB, RUN).partition("run=")[0] + 'printf "%s\\n" "$TRITON_CACHE_DIR" "$NCCL_X" "$PYTHONPATH"'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    scratch = f'{tmp_path}/here/"a`touch x`$(touch y)\\/vitscale-{os.getuid()}'
    assert done.stdout.splitlines() == [f"{scratch}/triton", "$(touch z) 'q'", "/runs/a b/h14/submissions/000/code"]
    assert list(tmp_path.iterdir()) == []


def test_an_array_tells_each_job_its_share() -> None:
    script = words_script(SITE, JOB, ["pack", "in", "out"], array=4)
    told = directives(script)
    assert told["array"] == "0-3"
    assert "signal" not in told
    assert '-m launch.main pack in out --task "$SLURM_ARRAY_TASK_ID/4"' in script


SLURM = {
    "SLURM_NTASKS": "6", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_SRUN_COMM_PORT": "40000",
}  # fmt: skip


def test_a_task_becomes_a_rank() -> None:
    place = environment(SLURM, cpus=12)
    assert (place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"]) == ("4", "1", "6", "3")
    assert (place["MASTER_ADDR"], place["OMP_NUM_THREADS"]) == ("10.0.0.7", "4")
    assert environment(SLURM | {"SLURM_CPUS_PER_TASK": "5"}, cpus=12)["OMP_NUM_THREADS"] == "5"
    assert environment(SLURM, cpus=12)["GOMP_SPINCOUNT"] == "1000"
    for own in ({"GOMP_SPINCOUNT": "9"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        assert "GOMP_SPINCOUNT" not in environment(SLURM | own, cpus=12), "the user's own is inherited"


def test_each_start_has_a_port_of_its_own_that_all_its_ranks_know() -> None:
    def port(**changed: str) -> str:
        return environment(SLURM | changed, cpus=12)["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0")
    others = [port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="6"), port(SLURM_RESTART_COUNT="1"), port(SLURM_SRUN_COMM_PORT="40001")]
    assert len({port(), *others}) == 5
    assert all(10_000 <= rendezvous_port(str(job), "0") < 32_000 for job in range(1000))
