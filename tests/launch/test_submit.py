"""`vitscale submit` on a real SLURM of four nodes, and what it prints and refuses without one."""

import json
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.data_verbs import PackFlags
from launch.flags import parse
from launch.question import evaluate_flags
from launch.site import Site, read_site
from launch.submit import SubmitFlags, check_flags, split_words
from launch.verbs import finetune_flags, pretrain_flags
from tests.command import VITSCALE, vitscale
from tests.jobs import logs, pretraining, site_file, submit, submitted, wait_for_end
from tests.slurm import Cluster, wait_for
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale import checkpoint
from vitscale.config import ViTConfig
from vitscale.run import is_finished, read_config, read_metrics, read_record


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster


def test_a_run_on_two_nodes_comes_to_its_end(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(f'cpus_per_task = 1\nscratch = "{tmp_path}/$SLURMD_NODENAME"\n[datasets]\nstripes = "{dataset}/train"\n')
    words = pretraining(dataset, tmp_path / "run")
    words[words.index("--data") + 1] = "stripes"  # by its name
    (job,), folder = submitted(cluster, "--site", site, "--nodes", 2, "--time", 10, *words)
    config = (folder / "config.json").read_bytes()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert wait_for_end(cluster, job, folder) == "COMPLETED", logs(folder)
    run = tmp_path / "run"
    assert is_finished(run)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    (start,) = read_record(run)["starts"]
    assert start["world_size"] == 2
    assert sorted(log.name for log in (run / "logs").iterdir()) == ["node-0000-start-000.log", "node-0001-start-000.log"]
    assert "the run is finished" in logs(folder)
    assert "step 6/6" in logs(folder)  # rank 0's progress, for who follows the job
    assert (folder / "config.json").read_bytes() == config
    assert not list(folder.rglob("*.pkl"))

    (evaluation,), told = submitted(cluster, "--", "evaluate", run, "--data", dataset / "val", "--json", cwd=tmp_path)
    assert wait_for_end(cluster, evaluation, told) == "COMPLETED", logs(told)
    assert '"top1"' in logs(told)

    # A finished run that is submitted once more trains nothing
    (again,), folder = submitted(cluster, "--nodes", 2, *pretraining(dataset, run))
    assert wait_for_end(cluster, again, folder) == "COMPLETED", logs(folder)
    assert len(read_record(run)["starts"]) == 1
    assert folder.name == "001"


def test_later_edits_change_nothing(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """The job runs the code and the config of its submission, from any folder."""
    jobs = tmp_path / "elsewhere"
    shutil.copytree(Path(__file__).parents[2] / "launch", jobs / "launch")
    (jobs / "launch" / "task.py").write_text("raise SystemExit('the code of the folder that submit was called in')\n")
    (job,), folder = submitted(cluster, "--sbatch=--hold", *pretraining(dataset, tmp_path / "run", "--steps", 2), cwd=jobs)
    (tmp_path / "run" / "config.json").unlink(missing_ok=True)
    cluster.run("scontrol", "release", job)
    assert wait_for_end(cluster, job, folder) == "COMPLETED", logs(folder)
    assert is_finished(tmp_path / "run")


def test_a_chain_goes_on_where_jobs_may_not_requeue(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text("requeue = false\n")
    run = tmp_path / "run"
    steps = ["--steps", 60, "--checkpoint-every", 100]
    jobs, folder = submitted(cluster, "--site", site, "--nodes", 2, "--chain", 3, *pretraining(dataset, run, *steps))
    assert len(jobs) == 3
    wait_for(lambda: read_metrics(run), "the first step", 120, lambda: logs(folder))
    cluster.run("scancel", "--signal=USR2", jobs[0])
    states = [wait_for_end(cluster, job, folder) for job in jobs]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"], logs(folder)  # saved and passed on; finished; nothing left to do
    first, second = read_record(run)["starts"]
    assert first["step"] == 0
    assert 0 < second["step"] < 60
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 61))  # no step is lost, and none is made twice
    assert checkpoint.verify(checkpoint.committed(run)[-1]) is None
    assert "nothing is left to do: the run is finished" in logs(folder)


def test_after_scancel_nothing_comes_back(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """Nor where the tasks have no client of SLURM, as in a container."""
    site = site_file(tmp_path / "site", without_client=True, lines="requeue = false")
    run = tmp_path / "run"
    steps = ["--steps", 5000, "--checkpoint-every", 5000]
    jobs, folder = submitted(cluster, "--site", site, "--nodes", 2, "--chain", 2, *pretraining(dataset, run, *steps))
    wait_for(lambda: read_metrics(run), "the first step", 120, lambda: logs(folder))
    cluster.run("scancel", jobs[0])
    assert wait_for_end(cluster, jobs[0], folder) == "CANCELLED"
    assert wait_for_end(cluster, jobs[1], folder) == "COMPLETED"
    assert len(read_record(run)["starts"]) == 1
    saved = checkpoint.committed(run)
    assert checkpoint.step_of(saved[-1]) == read_metrics(run)[-1]["step"]  # it saved when it was told


def test_a_pack_by_several_jobs_is_the_same_dataset(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    images = dataset.parent / "images" / "train"
    words = ["--", "pack", images, tmp_path / "packed", "--samples-per-shard", 20]
    jobs, folder = submitted(cluster, "--tasks", 3, *words, cwd=tmp_path)
    assert len(jobs) == 2
    assert wait_for_end(cluster, jobs[1], folder) == "COMPLETED", logs(folder)
    assert len(list(folder.glob("job-*_*.log"))) == 3
    hashes = [json.loads((of / "train" / "dataset.json").read_text())["content_hash"] for of in (dataset, tmp_path / "packed")]
    assert hashes[0] == hashes[1]


NEVER = "Requested node configuration is not available"


def fine_tuning(dataset: Path, folder: Path) -> list[object]:
    source = write_checkpoint(folder / "source", random_vit(ViTConfig(1, 16, 16, 2, 8, (16, 16), num_classes=7))).path
    verb = ["finetune", "tiny-finetune", "--init", source, "--data", dataset / "train", "--holdout", "0.2", "--stream.workers", "1"]
    sizes = "--model.image-size 16 24 --steps 4 --global-batch-size 8 --micro-batch-size 8 --schedule.warmup-steps 1 --log-every 1"
    return [*verb, *sizes.split()]


def test_a_sweep_is_a_job_of_each_trial_and_the_run_behind_them(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """One trial is finished before; the run takes the rate that was best, and only once."""
    run, verb = tmp_path / "run", fine_tuning(dataset, tmp_path)
    first = ["--out", run / "sweep" / "lr-0.001", "--optimizer.peak-lr", "0.001"]
    made = vitscale(*verb, *first)
    assert made.returncode == 0, made.stderr
    words = ["--", *verb, "--out", run, "--sweep", "0.001", "0.1", "0.3"]
    dry = submit("--dry-run", "--json", *words)
    assert [Path(plan["run"]).name for plan in json.loads(dry.stdout)["plans"]] == ["lr-0.1", "lr-0.3", "run"], dry.stderr
    (job,), folder = submitted(cluster, *words)
    assert wait_for_end(cluster, job, folder) == "COMPLETED", logs(folder)
    assert is_finished(run)
    noted = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [trial["state"] for trial in noted["trials"]] == ["finished"] * 3
    best = max(noted["trials"], key=lambda trial: (trial["top1"], -trial["loss"]))
    assert (noted["best"], read_config(run).optimizer.peak_lr, read_config(run).holdout) == (best["peak_lr"], best["peak_lr"], 0.0)
    assert [len(read_record(run / "sweep" / f"lr-{lr}")["starts"]) for lr in (0.001, 0.1, 0.3)] == [1, 1, 1]
    assert f"{best['peak_lr']:>9g}" in logs(folder), "the table"
    late = submit("--dry-run", *words, "0.2")
    assert (late.returncode, late.stdout) == (1, "")
    assert f"has begun, at the peak learning rate {best['peak_lr']!r}" in late.stderr
    elsewhere = ["--out", tmp_path / "other", "--holdout", "0.2", "--steps", "6"]
    shutil.copytree(run / "sweep" / "lr-0.1", tmp_path / "other" / "sweep" / "lr-0.1")
    other = submit("--dry-run", "--", *verb, *elsewhere, "--sweep", "0.1", "0.2")
    assert (other.returncode, "lr-0.1 holds a run with other settings: steps: 4 -> 6" in other.stderr) == (1, True), other.stderr


@pytest.mark.parametrize(
    ("after", "why", "status"),
    [
        ("echo thanks", "sbatch named no job", 1),
        ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", "Socket timed out on send/recv operation", 1),
        ("kill -INT $PPID; sleep 60", "interrupted while sbatch was asked", 130),
    ],
)
@pytest.mark.parametrize("chain", [0, 3])
def test_a_job_whose_number_sbatch_does_not_tell_keeps_what_it_needs(
    cluster: Cluster, dataset: Path, tmp_path: Path, after: str, why: str, status: int, chain: int
) -> None:
    """A site's own sbatch may print other words, or the answer be lost: what is said finds the job, and that is how the test finds it."""
    (tmp_path / "bin").mkdir()
    sbatch, run, real = tmp_path / "bin" / "sbatch", tmp_path / "run", shutil.which("sbatch")
    answered = "*--dependency*" if chain else "*"  # of a chain the second job
    sbatch.write_text(
        f'#!/bin/sh\ncase "$*" in *--test-only*) exec {real} "$@";; {answered}) {real} --hold "$@" >/dev/null; {after};; '
        f'*) exec {real} --hold "$@";; esac\n'
    )
    sbatch.chmod(0o755)
    (tmp_path / "site.toml").write_text("requeue = false\n" if chain else "")
    words = ["--site", tmp_path / "site.toml", *(["--chain", chain] if chain else []), *pretraining(dataset, run)]
    done = submit(*words, env=cluster.environment | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"})
    folder = run / "submissions" / "000"
    said = next(
        line for line in done.stderr.splitlines() if line.removeprefix("error: ").startswith(f"{why}, and a job may be in the queue")
    )
    found = subprocess.run(said.split("`")[1], shell=True, env=cluster.environment, capture_output=True, text=True, check=True).stdout
    jobs = [line.split()[0] for line in found.splitlines()]
    cluster.run("scancel", *jobs)
    assert done.returncode == status
    assert len(jobs) == (2 if chain else 1), "none after the one without an answer"
    assert (f"submitted before that: job {min(jobs, key=int)}" in done.stderr) == bool(chain)
    assert (folder / "config.json").is_file()


def test_of_a_sweep_that_is_submitted_in_part_the_jobs_are_named(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """SLURM takes the trials and refuses the run behind them."""
    (tmp_path / "bin").mkdir()
    sbatch, run = tmp_path / "bin" / "sbatch", tmp_path / "run"
    sbatch.write_text(
        '#!/bin/sh\ncase "$*" in *--dependency*) echo "sbatch: error: too many jobs" >&2; exit 1; esac\n'
        f'exec {shutil.which("sbatch")} --hold "$@"\n'
    )
    sbatch.chmod(0o755)
    words = ["--", *fine_tuning(dataset, tmp_path), "--out", run, "--sweep", "0.1", "0.3"]
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    done = submit(*words, env=cluster.environment | {"PATH": path})
    jobs = [(run / "sweep" / f"lr-{lr}" / "submissions" / "000" / "jobs").read_text().strip() for lr in (0.1, 0.3)]
    cluster.run("scancel", *jobs)
    assert done.returncode == 1
    named = f"submitted before that: job {', '.join(jobs)}, which `scancel {' '.join(jobs)}` takes back"
    assert done.stderr.splitlines()[-1] == f"error: sbatch refused the job: too many jobs; {named}"
    assert not (run / "submissions").exists()


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sbatch", "--partition=none-such", "--", "pretrain"], "invalid partition specified: none-such"),
        (["--nodes", 9, "--", "pretrain"], NEVER),
        (["--site", "site.toml", "--chain", 2, "--nodes", 9, "--", "pretrain"], NEVER),
        (["--sbatch", "--mem=900G", "--tasks", 3, "--", "pack", ".", "out"], NEVER),
    ],
)
def test_what_slurm_refuses_or_never_starts_is_told_in_a_line_and_leaves_nothing(
    cluster: Cluster, dataset: Path, tmp_path: Path, words: list[object], said: str, dry_run: tuple[str, ...]
) -> None:
    (tmp_path / "site.toml").write_text("requeue = false\n")
    if words[-1] == "pretrain":
        words = [*words[:-2], *pretraining(dataset, tmp_path / "run", "--global-batch-size", 36)]
    done = submit(*dry_run, *words, env=cluster.environment, cwd=tmp_path)
    assert done.returncode
    (line,) = done.stderr.splitlines()  # and no plan before it
    assert said in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["site.toml"]
    assert cluster.run("squeue", "--noheader") == ""


def test_a_job_may_wait_for_nodes_that_are_down_but_not_for_those_that_are_not(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    def plan(nodes: int) -> subprocess.CompletedProcess[str]:
        words = pretraining(dataset, tmp_path / "run", "--global-batch-size", 80)
        return submit("--dry-run", "--nodes", nodes, *words, env=cluster.environment)

    cluster.run("scontrol", "update", "nodename=n4", "state=drain", "reason=test")
    try:
        few, all_of_them, too_many = plan(2), plan(4), plan(10)
    finally:
        cluster.run("scontrol", "update", "nodename=n4", "state=resume")
    assert "down or drained" not in few.stderr
    assert all_of_them.returncode == 0
    assert "warning: SLURM could not start the job now, with 1 node down or drained, and it may wait for them: " in all_of_them.stderr
    assert too_many.returncode == 1
    assert NEVER in too_many.stderr


def test_a_run_that_is_in_the_queue_is_refused_before_anything_else_is_said(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    words = pretraining(dataset, tmp_path / "run")
    (job,), _ = submitted(cluster, "--sbatch=--hold", *words)
    done = submit(*words, env=cluster.environment)
    cluster.run("scancel", job)
    assert done.stderr.startswith(f"error: job {job} of {tmp_path / 'run'} is in SLURM's queue already")


def test_a_thousand_nodes_by_dry_run(dataset: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('gpu_type = "h100"\ngpus_per_node = 8\ncpus_per_task = 12\ntime = "24:00:00"\n')
    words = pretraining(dataset, tmp_path / "run", "--global-batch-size", 16_000, "--micro-batch-size", 2)
    told = json.loads(dry_run("--site", site, "--nodes", 1000, "--json", *words, folder=tmp_path).stdout)
    assert (told["plan"]["world_size"], told["plan"]["grad_accum_steps"]) == (8000, 1)
    assert "#SBATCH --nodes=1000\n#SBATCH --ntasks-per-node=8\n" in told["script"]
    assert "--nodes=1000 --ntasks=8000 --ntasks-per-node=8 --cpus-per-task=12 --gpus-per-node=h100:8" in told["script"]
    assert not (tmp_path / "run").exists()


def dry_run(*words: object, folder: Path, refused: bool = False) -> subprocess.CompletedProcess[str]:
    """What would be submitted from a folder, on a machine without SLURM's client."""
    done = submit("--dry-run", *words, cwd=folder, env=os.environ | {"PATH": str(folder)})
    assert bool(done.returncode) is refused, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of steps of 8 images, two micro-batches of 4."""
    run = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run([VITSCALE, *map(str, pretraining(dataset, run)[1:])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


def test_the_plan_goes_by_what_the_run_measured(dataset: Path, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    line = read_metrics(run)[-1] | {"step": 7, "images_per_second": 0.01, "save_seconds": 90.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    done = dry_run("--time", 30, *pretraining(dataset, run), folder=tmp_path)
    assert "signal_lead_seconds=120 is less than a step and a save take (890 s, measured)" in done.stderr
    assert "time limit of a job: 30m00s" in done.stderr
    assert "#SBATCH --time=30" in done.stdout


@pytest.mark.parametrize(
    ("every", "written"), [(["--checkpoint-every", 4, "--eval-every", 3], 6), (["--checkpoint-every", 3, "--eval-every", 0], 4)]
)
def test_the_plan_counts_what_evaluations_save_too(dataset: Path, tmp_path: Path, every: list[object], written: int) -> None:
    """Of ten steps: 3, 4, 6, 8, 9 and 10; and 3, 6, 9 and 10."""
    words = pretraining(dataset, tmp_path / "run", "--steps", 10, *every, "--eval-data", dataset / "val")
    told = json.loads(dry_run("--json", *words, folder=tmp_path).stdout)
    assert told["plan"]["checkpoints"] == written


def test_the_plan_counts_the_images_of_phases(dataset: Path, tmp_path: Path) -> None:
    """Ten steps, of which the first half of the samples are in steps of 4 images: 7 of those, then 3 of 8."""
    words = pretraining(dataset, tmp_path / "run", "--steps", 10, "--schedule.phases", "0.5:global_batch_size=4")
    plan = json.loads(dry_run("--json", *words, folder=tmp_path).stdout)["plan"]
    assert (plan["steps"], plan["phases"], plan["images"]) == (10, 2, 7 * 4 + 3 * 8)


@pytest.mark.parametrize(
    ("flags", "more", "said"),
    [
        (["--nodes", 3], [], "= 4 x 3; --nodes 2 or --nodes 4 --micro-batch-size 2 works"),
        (["--nodes", 4], [], "= 4 x 4; --nodes 4 --micro-batch-size 2 or --nodes 2 or --nodes 8 --micro-batch-size 1 works"),
        (["--nodes", 9], [], "= 4 x 9; --nodes 8 --micro-batch-size 1 works"),
        (["--tasks-per-node", 3], [], "= 4 x 3; no number of nodes with 3 ranks each fits it"),
        (
            ["--nodes", 2],
            ["--micro-batch-size", 3],
            "= 3 x 2; --nodes 2 --micro-batch-size 2 or --nodes 1 --micro-batch-size 2 or --nodes 4",
        ),
    ],
)
def test_of_a_run_that_has_begun_the_ranks_must_fit_its_batch(
    dataset: Path, trained: Path, tmp_path: Path, flags: list[object], more: list[object], said: str
) -> None:
    done = dry_run(*flags, *pretraining(dataset, trained, *more), folder=tmp_path, refused=True)
    assert done.stderr.startswith(
        f"error: {trained} has global_batch_size=8, which stays and is not a multiple of micro_batch_size x ranks "
    )
    assert said in done.stderr


def test_half_of_the_time_limit_is_for_work(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("signal_lead_seconds = 150\n")
    words = ["--site", "site.toml", *pretraining(dataset, tmp_path / "run")]
    done = dry_run("--time", 6, *words, folder=tmp_path, refused=True)
    assert "leave less than half of the time limit of 6m00s for work; --time 7 (minutes) works" in done.stderr
    for enough in (7, 0):  # 0 is none
        dry_run("--time", enough, *words, folder=tmp_path)


def test_a_job_that_may_not_requeue_and_has_no_chain_is_warned_of(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("requeue = false\n")
    words = ["--site", "site.toml", *pretraining(dataset, tmp_path / "run")]
    assert "warning: the site file has `requeue = false`: the run ends with its job" in dry_run(*words, folder=tmp_path).stderr
    assert "warning" not in dry_run("--chain", 2, *words, folder=tmp_path).stderr


def test_the_examples_of_the_documents_can_be_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    examples = [
        shlex.split(line, comments=True)[2:] for line in text.splitlines() if line.startswith("vitscale submit ") and "..." not in line
    ]
    verbs = {
        "pretrain": pretrain_flags,
        "finetune": finetune_flags,
        "evaluate": evaluate_flags,
        "pack": lambda words: parse(PackFlags, words, "pack"),
    }
    seen = set()
    for example in examples:
        own, (verb, *words) = split_words(example)
        flags = parse(SubmitFlags, own, "submit")
        site = Site() if flags.tasks_per_node else read_site(Path(__file__).parents[2] / "docs" / "site.toml")
        check_flags(flags, site, [verb, *words])
        verbs[verb](words)
        seen.add(verb)
    assert seen == set(verbs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "2"], "needs a verb after --"),
        (["--", "quickstart"], "`vitscale quickstart` is not submitted"),
        (["--nodes", "0", "--", "pretrain", "tiny-digits"], "nodes=0 must be at least 1"),
        (["--chain", "3", "--", "pretrain", "tiny-digits"], "sites whose jobs may not requeue"),
        (["--gpus-per-node", "8", "--tasks-per-node", "8", "--", "pretrain", "tiny-digits"], "nodes without GPUs"),
        (["--time", "soon", "--", "pretrain", "tiny-digits"], "time='soon' is no time limit"),
        (["--sbatch", "--gres=gpu:8", "--", "pretrain", "tiny-digits"], "sets itself"),
        (["--site", "none.toml", "--", "pretrain", "tiny-digits"], "none.toml does not exist"),
        (["--", "pretrain", "tiny-digits", "--nproc", "2"], "--nproc and --json"),
        (["--", "pretrain", "tiny-digits"], "no dataset is given"),
        (["--nodes", "2", "--", "evaluate", "x", "--data", "y"], "one task on one node"),
        (["--nodes", "2", "--tasks", "2", "--", "evaluate", "x", "--data", "y"], "one task on one node"),
        (["--tasks", "2", "--", "evaluate", "x", "--data", "y"], "tasks=2 is for pack; evaluate is one task"),
        (["--", "pack", "in", "out", "--task", "0/2"], "--tasks N"),
        (["--", "pretrain", "tiny-digits", "--data", "x", "--out", "a\nb"], "has '\\n', which the path of a job's files cannot have"),
    ],
)
def test_words_that_make_no_sense_cost_a_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = submit(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_takes_the_names_of_the_site_and_any_folder(dataset: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(f'[datasets]\nstripes = "{dataset}/val"\n')
    run = Path(os.path.relpath(trained, tmp_path))
    words = ["evaluate", f"{run}@6", "--data", "stripes", "--batch-size", 8, "--stage", "copies", "--json"]
    script = dry_run("--site", "site.toml", "--", *words, folder=tmp_path).stdout
    told = f"launch.main evaluate {trained}@6 --data={dataset}/val --batch-size=8 --stage={tmp_path}/copies --json <"
    assert told in script


def test_an_evaluation_of_a_live_run_or_by_several_processes_is_submitted(dataset: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps({}))
    where = ["--data", dataset / "val"]
    watched = dry_run("--", "evaluate", "--watch", os.path.relpath(trained, tmp_path), *where, "--interval", 5, folder=tmp_path).stdout
    assert f"launch.main evaluate {trained} --data={dataset}/val --watch --interval=5.0 <" in watched
    probe = ["--protocol", "fewshot", "--shots", 1, 2]
    several = ["--gpus-per-node", 4, "--", "evaluate", trained, *where, "--nproc", 3, "--out", "o.json", *probe]
    script = dry_run(*several, folder=tmp_path).stdout
    assert f"evaluate {trained} --data={dataset}/val --protocol=fewshot --shots 1 2 --out={tmp_path}/o.json --nproc=3 <" in script
    assert "#SBATCH --gpus-per-node=3\n" in script
    several[1] = 2
    assert "nproc=3 must be 0, which starts one a GPU, or 1 to 2, the GPUs" in dry_run(*several, folder=tmp_path, refused=True).stderr
    of_others = dry_run("--", "evaluate", trained, *where, "--real", "real.json", folder=tmp_path, refused=True).stderr
    assert f"{tmp_path}/real.json does not name the sample" in of_others


def test_a_pack_is_given_paths_that_mean_the_same_from_every_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "names").touch()
    (tmp_path / "site.toml").write_text('[datasets]\ncrawl = "s3://bucket/crawl"\n')
    words = ["pack", "images", "crawl", "out", "--class-names=names", "--write-cls", "--shuffle-seed", "None", "--shard-bytes", "1GB"]
    script = dry_run("--site", "site.toml", "--tasks", 2, "--", *words, folder=tmp_path).stdout
    at = tmp_path
    told = f"pack {at}/images s3://bucket/crawl {at}/out --shard-bytes=1000000000 --shuffle-seed=None --class-names={at}/names --write-cls"
    assert f"launch.main {told} <" in script
    assert f'launch.main {told} --task "$SLURM_ARRAY_TASK_ID/2" <' in script
    parse(PackFlags, told.split()[1:], "pack")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "runs/nosuch", "--data", "stripes"], "runs/nosuch does not exist; a checkpoint is"),
        (["evaluate", "RUN@5", "--data", "stripes"], "has no checkpoint of step 5"),
        (["evaluate", "RUN", "--data", "nosuch"], "nosuch is none of the site file's datasets, stripes, strips, and "),
        (["evaluate", "RUN", "--data", "/nosuch"], "error: /nosuch does not exist"),
        (["evaluate", "RUN", "--data", "stripes", "--batch-size", "0"], "batch-size=0 must be at least 1"),
        (["evaluate", "RUN", "--data", "stripes", "--cache", "c"], "--cache-bytes 200GB has both"),
        (["pretrain", "tiny-digits", "--data", "nosuch"], "nosuch is none of the site file's datasets, stripes, strips, and "),
        (["pack", "/tmp/nosuch", "out"], "/tmp/nosuch does not exist"),
        (["pack", "RUN", "out", "--class-map", "nosuch"], "nosuch does not exist"),
        (["pack", "RUN", "out", "--val-fraction", "2"], "val_fraction=2.0 must be"),
    ],
)
def test_what_is_not_there_is_not_submitted(dataset: Path, trained: Path, tmp_path: Path, words: list[str], said: str) -> None:
    site = tmp_path / "site.toml"
    site.write_text(f'[datasets]\nstripes = "{dataset}/val"\nstrips = "/nosuch"\n')
    done = dry_run("--site", site, "--", *(word.replace("RUN", str(trained)) for word in words), folder=tmp_path, refused=True)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
