"""`vitscale submit`: the same verbs, as jobs of SLURM.

    vitscale submit --site SITE.toml --nodes 32 -- pretrain vit-h14-jft300m --data jft300m --out runs/h14

What a job needs is made on the login node and lies in RUN/submissions/NNN: the resolved config, the code as it is now, the script, and
later the job's logs; of evaluate and pack in submissions/NNN of the folder that one is in. Later edits change nothing, and nothing is
pickled, so that the Python of the nodes may be another one.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from data_tools.config import PackConfig
from data_tools.errors import UserError, message_of
from data_tools.storage import is_url
from launch.batch import Job, train_script, words_script
from launch.data_verbs import PackFlags
from launch.flags import UsageError, given, parse
from launch.question import EvaluateFlags, check_inputs, evaluate_flags
from launch.ranks import rank_count
from launch.site import Site, check_extra, check_time, minutes, read_site
from launch.sweep import check_alike, check_sweep_can_choose, final_run, grid_of, note_trials, rate_begun, trial_at, trials_of
from launch.terminal import Json, VerbError, print_json
from launch.verbs import FinetuneFlags, finetune_flags, pretrain_flags
from vitscale.config import FinetuneConfig, TrainConfig, grad_accum_steps, to_dict
from vitscale.flops import checkpoint_bytes
from vitscale.metrics import counted, duration
from vitscale.resolve import resolve
from vitscale.run import (
    begun_config,
    check_directory,
    check_start,
    git_commit,
    reached,
    read_metrics,
    samples_of,
    trained_datasets,
)
from vitscale.timeline import Timeline, timeline_of

PACKAGES = ("data_tools", "launch", "vitscale")
EARLY_SECONDS = 60  # that SLURM may signal before the lead
WRITTEN_BYTES_PER_SECOND = 200e6  # of one node, where a run has not measured its saves: a slow shared file system


@dataclass(frozen=True)
class SubmitFlags:
    """Runs a verb as a job of SLURM: `vitscale submit [FLAGS] -- pretrain|finetune|evaluate|pack ...`.

    A run that the cluster ends goes on by itself until it is finished: docs/operations.md."""

    site: Annotated[Path | None, tyro.conf.arg(metavar="SITE.toml", help="What the cluster wants of a job (docs/site.toml).")] = None
    nodes: int = 1
    """Nodes of a run."""
    gpus_per_node: int | None = None
    """GPUs of each, a rank on each GPU. None: the site's."""
    tasks_per_node: int = 0
    """Ranks of each node of a cluster without GPUs; 0: one."""
    time: str = ""
    """Time limit of one job (24:00:00, 1-12, minutes); empty: the site's. A run may take many jobs."""
    chain: int = 0
    """Where jobs may not requeue (`requeue = false` in the site file): so many jobs, each of which waits for the one before it."""
    tasks: int = 1
    """Of pack: jobs that share the work; one more puts the dataset together."""
    sbatch: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="ARGUMENT")] = ()
    """One more argument of sbatch: --sbatch=--exclusive; may be given several times."""
    dry_run: bool = False
    """Print the script, submit and write nothing."""
    json: Json = False


@dataclass(frozen=True)
class Plan:
    """What a job that trains will do."""

    run: str
    nodes: int
    tasks_per_node: int
    world_size: int
    steps: int
    steps_made: int
    phases: int
    """Parts whose images or batches have other sizes; batch sizes here are the last one's."""
    images: int
    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    checkpoints: int
    """That are written; evaluations save, too."""
    checkpoint_bytes: int
    """Of one; an estimate from the model and the optimizer."""
    time: str
    images_per_second: float | None
    """As the run last measured it; None: not known yet."""
    step_seconds: float | None
    save_seconds: float
    hours_left: float | None
    requeues: int | None
    warnings: tuple[str, ...]


def submit(words: list[str]) -> None:
    """Reads the words, and submits."""
    own, verb = split_words(words)
    flags = parse(SubmitFlags, own, "submit")
    if not verb:
        raise UsageError("`vitscale submit` needs a verb after --, as in `vitscale submit --nodes 2 -- pretrain vit-b16-imagenet1k ...`")
    site = read_site(flags.site) if flags.site else Site()
    check_flags(flags, site, verb)
    if verb[0] in ("pretrain", "finetune"):
        submit_run(flags, site, verb)
    elif verb[0] in ("evaluate", "pack"):
        submit_words(flags, site, verb)
    else:
        raise UsageError(f"`vitscale {verb[0]}` is not submitted; pretrain, finetune, evaluate and pack are")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of `submit` itself, and those of the verb after --."""
    at = words.index("--") if "--" in words else len(words)
    own, rest = words[:at], iter(words[:at])
    own = [f"--sbatch={next(rest, '')}" if word == "--sbatch" else word for word in rest]  # its value begins with a dash, too
    return own, words[at + 1 :]


def check_flags(flags: SubmitFlags, site: Site, verb: list[str]) -> None:
    """Raises UsageError, SiteError."""
    for name, least in (("nodes", 1), ("tasks", 1), ("tasks_per_node", 0), ("chain", 0), ("gpus_per_node", 0)):
        if (value := getattr(flags, name)) is not None and value < least:
            raise UsageError(f"{name.replace('_', '-')}={value} must be at least {least}")
    if flags.time:
        check_time(flags.time, "time")
    check_extra(flags.sbatch, "--sbatch")
    if flags.chain and site.requeue:
        raise UsageError(
            f"chain={flags.chain} is for sites whose jobs may not requeue (`requeue = false`); without it a run requeues itself"
        )
    if flags.tasks_per_node and gpus(flags, site):
        raise UsageError(f"tasks-per-node={flags.tasks_per_node} is for nodes without GPUs; --gpus-per-node tells the ranks of these")
    if verb[0] in ("evaluate", "pack") and (flags.nodes > 1 or flags.chain or flags.tasks_per_node):
        raise UsageError(f"{verb[0]} is one task on one node; leave out --nodes, --tasks-per-node and --chain")
    if flags.tasks > 1 and verb[0] != "pack":
        instead = "evaluate is one task" if verb[0] == "evaluate" else f"--nodes tells the ranks of {verb[0]}"
        raise UsageError(f"tasks={flags.tasks} is for pack; {instead}")


def gpus(flags: SubmitFlags, site: Site) -> int:
    """GPUs of a node."""
    return site.gpus_per_node if flags.gpus_per_node is None else flags.gpus_per_node


def with_python(site: Site) -> Site:
    """The site with the command that runs Python settled."""
    return dataclasses.replace(site, python=site.python or ("python3" if site.container else shlex.quote(sys.executable)))


# -- pretrain, finetune -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A run that is to be submitted, after everything that can be known was checked; nothing is written yet."""

    config: TrainConfig
    folder: Path
    """Of the submission."""
    script: str
    plan: Plan

    @property
    def run(self) -> Path:
        """The run's directory."""
        return Path(self.config.out)


def submit_run(flags: SubmitFlags, site: Site, verb: list[str]) -> None:
    """A job of all ranks of a run, or a chain of them; of a sweep one of each trial, and the run behind them all."""
    if given(verb, "nproc", "json"):
        raise UsageError(f"--nproc and --json of {verb[0]} are for this machine; --nodes and --json before the -- are submit's own")
    asked = (pretrain_flags if verb[0] == "pretrain" else finetune_flags)(verb[1:])
    check_lead(flags.time or site.time, site.signal_lead_seconds)
    if isinstance(asked, FinetuneFlags) and asked.sweep is not None:
        submit_sweep(flags, site, located(asked.config, site.datasets), asked.sweep)
        return
    prepared = prepare(flags, site, located(asked.config, site.datasets))
    plan = dataclasses.asdict(prepared.plan)
    if flags.dry_run:
        tell(flags, prepared.script, {"plan": plan})
        return
    jobs, run, folder = send(flags, prepared), prepared.run, prepared.folder
    if flags.json:
        print_json({"jobs": jobs, "folder": str(folder), "plan": plan})
        return
    print(f"submitted job {', '.join(jobs)}; the code and the config are in {folder}")
    print(f"watch: vitscale run status {run}; squeue -j {','.join(jobs)}; tail -f {folder}/job-{jobs[0]}.log; a log a node in {run}/logs")
    print(f"stop: vitscale run stop {run} saves first; scancel {' '.join(jobs)} gives it KillWait seconds (`scontrol show config`) to save")


def submit_sweep(flags: SubmitFlags, site: Site, asked: FinetuneConfig, rates: Sequence[float]) -> None:
    """Jobs of the trials that are not finished, beside each other, and of the run behind them all, which takes its rate when it starts."""
    grid = grid_of(asked, rates)
    configs = trials_of(asked, grid)
    known = [trial_at(Path(trial.out), lr) for trial, lr in zip(configs, grid, strict=True)]
    check_sweep_can_choose(Path(asked.out), known)
    wanted = [trial for trial, of in zip(configs, known, strict=True) if of.state == "unfinished"]
    rate = rate_begun(Path(asked.out)) or grid[0]
    trials, final = [prepare(flags, site, trial) for trial in wanted], prepare(flags, site, final_run(asked, rate))
    resolved = [resolve(trial, final.plan.world_size) for trial in configs]
    for config in resolved:
        check_start(config)  # those that are finished, too: a result of other settings is none of this sweep's
    check_alike([*resolved, final.config])
    plans = [dataclasses.asdict(prepared.plan) for prepared in (*trials, final)]
    if flags.dry_run:
        tell(flags, "\n".join(prepared.script for prepared in (*trials, final)), {"plans": plans})
        return
    of_trials: list[list[str]] = []
    everything: list[str] = []
    with telling_of(everything):
        for prepared in trials:
            of_trials.append(send(flags, prepared))
            everything += of_trials[-1]
        jobs = send(flags, final, [chain[-1] for chain in of_trials], configs)
        everything += jobs
    if flags.json:
        print_json({"trials": of_trials, "jobs": jobs, "folder": str(final.folder), "plans": plans})
        return
    for prepared, chain in zip(trials, of_trials, strict=True):
        print(f"submitted job {', '.join(chain)}: {prepared.run}")
    print(f"submitted job {', '.join(jobs)}: {final.run}, which waits for them and takes the best rate")
    print(f"watch: vitscale run ls {final.run}/sweep; squeue -j {','.join(everything)}; stop: scancel {' '.join(everything)}")


def prepare(flags: SubmitFlags, site: Site, asked: TrainConfig | FinetuneConfig) -> Prepared:
    """Checks a run and makes its script; its plan is printed."""
    tasks_per_node = gpus(flags, site) or flags.tasks_per_node or 1
    run = Path(asked.out)
    check_name(asked.out)
    check_directory(run)
    check_ranks(asked, flags.nodes, tasks_per_node)
    config = resolve(asked, flags.nodes * tasks_per_node)
    record, *_ = check_start(config)
    if not flags.dry_run and (waiting := jobs_under_way(run)):
        raise VerbError(
            f"job {', '.join(waiting)} of {run} is in SLURM's queue already, and two would train one run; "
            f"`vitscale run stop {run} --wait` ends one that runs, and `scancel {' '.join(waiting)}` one that waits"
        )
    folder = next_folder(run / "submissions")
    job = Job(run.name, folder, flags.nodes, tasks_per_node, gpus(flags, site), flags.time or site.time, flags.sbatch)
    script = train_script(with_python(site), job, run)
    timeline = timeline_of(config, samples_of(trained_datasets(record)))
    plan = make_plan(config, flags, site, tasks_per_node, timeline, ask_slurm(script, flags.nodes))
    if not flags.json:
        print_plan(plan)
    return Prepared(config, folder, script, plan)


def send(flags: SubmitFlags, prepared: Prepared, after: Sequence[str] = (), trials: Sequence[FinetuneConfig] = ()) -> list[str]:
    """Submits a run; its job, or the jobs of its chain, behind those that it is to wait for.

    Args:
        trials: whose best rate the run is to take when it starts.
    """
    folder, run = prepared.folder, prepared.run
    jobs: list[str] = []
    with submission(folder, jobs):
        write_snapshot(folder, prepared.config)
        if trials:
            note_trials(folder, trials)
        for _ in range(max(1, flags.chain)):
            before = jobs[-1:] or after
            waits = [f"--dependency=afterany:{':'.join(before)}"] if before else []
            try:
                jobs.append(Submitter(folder, prepared.script, waits, jobs[-1:]).send())
            except VerbError as error:
                if not jobs or isinstance(error, UnansweredError):
                    raise
                print(f"warning: {error}; the chain has {counted(len(jobs), 'job')}", file=sys.stderr)
                break
            note_jobs(folder, jobs)
    (run / "stop").unlink(missing_ok=True)  # who submits a run wants it to go on
    return jobs


def note_jobs(folder: Path, jobs: Sequence[str]) -> None:
    """Writes down the jobs of a submission: each as soon as it is submitted, for nobody else knows of it."""
    (folder / "jobs").write_text("".join(f"{job}\n" for job in jobs))


def check_name(path: str) -> None:
    """Raises UsageError where a path cannot stand in a batch script and in the patterns of SLURM's log files."""
    if odd := {*path} & {*"\\\n\r"}:
        raise UsageError(
            f"{path!r} has {', '.join(map(repr, sorted(odd)))}, which the path of a job's files cannot have; another folder works"
        )


def check_ranks(asked: TrainConfig | FinetuneConfig, nodes: int, tasks_per_node: int) -> None:
    """Raises UsageError where the global batch of a run that has begun, which stays as it is, cannot be dealt to so many ranks."""
    run, most = Path(asked.out), asked.micro_batch_size
    own = [phase.global_batch_size for phase in asked.schedule.phases if phase.global_batch_size and not phase.micro_batch_size]
    batch = math.gcd(asked.global_batch_size, *own)  # what divides it divides each
    begun = begun_config(run)
    if begun is None or begun.global_batch_size != asked.global_batch_size or most < 1 or batch % (most * nodes * tasks_per_node) == 0:
        return

    def fitting(nodes: int) -> int:
        """The largest micro-batch that so many nodes can have; 0: none."""
        sizes = (size for size in range(most, 0, -1) if not (asked.mix.is_on and size % 2))
        return next((size for size in sizes if batch % (size * nodes * tasks_per_node) == 0), 0)

    fewer, more = range(nodes - 1, 0, -1), range(nodes + 1, batch // tasks_per_node + 1)
    near = [next(filter(fitting, counts), 0) for counts in ((nodes,), fewer, more)]
    ways = [f"--nodes {n}" + (f" --micro-batch-size {fitting(n)}" if fitting(n) != most else "") for n in near if n]
    ranks, batches = f"{most} x {nodes * tasks_per_node}", " and ".join(map(str, sorted({asked.global_batch_size, *own})))
    raise UsageError(
        f"{run} has global_batch_size={batches}, which stays and is not a multiple of micro_batch_size x ranks = {ranks}; "
        + (f"{' or '.join(ways)} works" if ways else f"no number of nodes with {counted(tasks_per_node, 'rank')} each fits it")
    )


def check_lead(time: str, lead: int) -> None:
    """Raises UsageError where jobs would be told to save before they have done much."""
    limit, lost = minutes(time) * 60 if time else 0, lead + EARLY_SECONDS  # a limit of 0 is none
    if 0 < limit < 2 * lost:
        raise UsageError(
            f"signal_lead_seconds={lead}, and {EARLY_SECONDS} s that SLURM may signal early, leave less than half of the time limit "
            f"of {duration(limit)} for work; --time {math.ceil(2 * lost / 60)} (minutes) works"
        )


def jobs_under_way(run: Path) -> list[str]:
    """The jobs that were submitted for a run and that SLURM still has in its queue, waiting or running."""
    noted = [job for file in (run / "submissions").glob("*/jobs") for job in file.read_text().split()]
    if not noted or shutil.which("squeue") is None:
        return []
    queue = subprocess.run(
        ["squeue", "--noheader", "--states=PENDING,RUNNING,SUSPENDED", "--format=%i", f"--user={os.getuid()}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return sorted(set(noted) & set(queue.stdout.split()))


def located(asked: Any, datasets: dict[str, str]) -> Any:
    """A config whose datasets are those that the site knows by name, and whose paths mean the same from every folder."""
    paths = tuple(dataset_at(name, datasets) for name in asked.datasets)
    changed: dict[str, Any] = {
        "data": paths if len(paths) > 1 else paths[0],
        "eval_data": asked.eval_data if asked.eval_data == "none" else dataset_at(asked.eval_data, datasets),
        "out": absolute(asked.out or f"runs/{asked.recipe}"),
        "stage": absolute(asked.stage),
        "cache": absolute(asked.cache),
    }
    if isinstance(asked, FinetuneConfig):
        changed["init"] = absolute(asked.init)
    elif asked.init:
        changed["init"] = dataclasses.replace(asked.init, checkpoint=absolute(asked.init.checkpoint))
    return dataclasses.replace(asked, **changed)


def dataset_at(name: str, datasets: dict[str, str]) -> str:
    """Where a dataset lies: one that the site knows by name, a path or a URL. Raises UsageError where it is none of them."""
    path = absolute(datasets.get(name, name))
    if name and datasets and name not in datasets and not {*"/{"} & {*name} and not os.path.exists(path):
        raise UsageError(f"{name} is none of the site file's datasets, {', '.join(datasets)}, and {path} does not exist")
    return path


def absolute(path: str) -> str:
    """A path from the root; a URL and nothing stay what they are."""
    return path if not path or is_url(path) else os.path.abspath(path)


def make_plan(config: TrainConfig, flags: SubmitFlags, site: Site, tasks_per_node: int, timeline: Timeline, warnings: list[str]) -> Plan:
    """What is known before the start, and from the run's own measurements where it has some."""
    run, world_size = Path(config.out), flags.nodes * tasks_per_node
    lines = read_metrics(run)
    made, steps = reached(run), timeline.total_steps
    rate = next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), None)
    size = checkpoint_bytes(config.model, config.optimizer)
    measured = [line["save_seconds"] for line in lines if "save_seconds" in line]
    save_seconds = max(measured) if measured else size / flags.nodes / WRITTEN_BYTES_PER_SECOND
    step_seconds = timeline.at_step(max(0, made - 1)).global_batch_size / rate if rate else None
    time = flags.time or site.time
    seconds_left = timeline.images_left(made, config.model) / rate if rate else None
    limit = minutes(time) * 60 if time else 0  # 0: the partition's, or none
    per_job = limit - site.signal_lead_seconds
    evaluates = config.eval_every if config.eval_every and config.eval_data != "none" else steps
    saves = {steps, *range(config.checkpoint_every, steps, config.checkpoint_every), *range(evaluates, steps, evaluates)}
    if not (site.requeue or flags.chain):
        warnings.append(
            "the site file has `requeue = false`: the run ends with its job, at the time limit at the latest; --chain N goes on"
        )
    if (needed := (step_seconds or 0) + save_seconds) > site.signal_lead_seconds:
        how = "measured" if measured else f"estimated at {WRITTEN_BYTES_PER_SECOND / 1e6:.0f} MB/s a node"
        warnings.append(
            f"signal_lead_seconds={site.signal_lead_seconds} is less than a step and a save take ({needed:.0f} s, {how}): what is not "
            f"saved by the time limit is lost; {math.ceil(needed * 1.5)} would do"
        )
    return Plan(
        run=str(run), nodes=flags.nodes, tasks_per_node=tasks_per_node, world_size=world_size, steps=steps, steps_made=made,
        phases=len(timeline.spans),
        images=timeline.total_samples, global_batch_size=config.global_batch_size, micro_batch_size=config.micro_batch_size,
        grad_accum_steps=grad_accum_steps(config.global_batch_size, config.micro_batch_size, world_size),
        checkpoints=len(saves), checkpoint_bytes=size, time=time, images_per_second=rate,
        step_seconds=step_seconds, save_seconds=save_seconds, hours_left=seconds_left / 3600 if seconds_left is not None else None,
        requeues=max(0, math.ceil(seconds_left / per_job) - 1) if seconds_left is not None and limit else None,
        warnings=tuple(warnings),
    )  # fmt: skip


def print_plan(plan: Plan) -> None:
    """For the person who submits, before anything is."""
    where = f"{counted(plan.nodes, 'node')} x {counted(plan.tasks_per_node, 'task')} = {counted(plan.world_size, 'rank')}"
    work = f"{plan.global_batch_size:,} images = {plan.world_size:,} x {plan.micro_batch_size} x {plan.grad_accum_steps}"
    work = f"{work} in the last of {plan.phases} phases" if plan.phases > 1 else work
    print(f"{plan.run}: {plan.steps:,} steps of {work}, {plan.images:,} images in all, on {where}", file=sys.stderr)
    done = f"{plan.steps_made:,} of them are made; " if plan.steps_made else ""
    size = f"{plan.checkpoint_bytes / 1e9:,.1f} GB" if plan.checkpoint_bytes >= 1e8 else f"{plan.checkpoint_bytes / 1e6:,.1f} MB"
    limit = "the partition's" if not plan.time else duration(minutes(plan.time) * 60) if minutes(plan.time) else "none"
    print(
        f"{done}{counted(plan.checkpoints, 'checkpoint')} of about {size}; time limit of a job: {limit}",
        file=sys.stderr,
    )
    if plan.images_per_second and plan.hours_left is not None:
        requeues = f", {counted(plan.requeues, 'requeue')}" if plan.requeues is not None else ""
        pace = f"{plan.images_per_second:,.0f} images/s, as last measured"
        print(f"{pace}: {duration(plan.hours_left * 3600)} left{requeues}", file=sys.stderr)
    else:
        print("images/s: not measured yet; `vitscale run status` will tell", file=sys.stderr)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)


# -- evaluate, pack -----------------------------------------------------------------------------------------------------------------------


def submit_words(flags: SubmitFlags, site: Site, verb: list[str]) -> None:
    """A job of one task; of pack an array of them, and one more that puts the dataset together after all have ended well."""
    words = (pack_words if verb[0] == "pack" else evaluate_words)(verb[1:], site.datasets)
    folder = next_folder(Path("submissions").absolute())
    check_name(str(folder))
    on_gpus = gpus_of_evaluation(verb[1:], gpus(flags, site)) if verb[0] == "evaluate" else 0
    job = Job(verb[0], folder, 1, 1, on_gpus, flags.time or site.time, flags.sbatch)
    merge = words_script(with_python(site), job, words)
    share = words_script(with_python(site), job, words, array=flags.tasks) if flags.tasks > 1 else ""
    for warning in ask_slurm(share or merge, 1):
        print(f"warning: {warning}", file=sys.stderr)
    if flags.dry_run:
        tell(flags, share + merge, {})
        return
    jobs: list[str] = []
    with submission(folder, jobs):
        write_snapshot(folder, None)
        if share:
            jobs.append(Submitter(folder, share, [], []).send())
            note_jobs(folder, jobs)
        after = [f"--dependency=afterok:{jobs[0]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(Submitter(folder, merge, after, []).send())
        note_jobs(folder, jobs)
    if flags.json:
        print_json({"jobs": jobs, "folder": str(folder)})
        return
    what = f" ({counted(flags.tasks, 'share')}, and the one that puts the dataset together)" if share else ""
    print(f"submitted job {', '.join(jobs)}{what}")
    print(f"watch: squeue -j {','.join(jobs)}; their output: {folder}/job-*.log; stop: scancel {' '.join(jobs)}")


def gpus_of_evaluation(words: list[str], there: int) -> int:
    """One for each of its processes, of those that a node has. Raises UsageError."""
    nproc = rank_count(evaluate_flags(words).nproc, there)
    return min(there, nproc)


def evaluate_words(words: list[str], datasets: dict[str, str]) -> list[str]:
    """`evaluate` as a job is given it, checked as the verb checks it."""
    asked = evaluate_flags(words)
    places: dict[str, Any] = {name: absolute(getattr(asked, name)) for name in ("checkpoint", "stage", "cache", "real", "out")}
    places |= {name: dataset_at(path, datasets) for name in ("data", "train_data") if (path := getattr(asked, name))}
    asked = dataclasses.replace(asked, **places)
    check_inputs(asked)
    return ["evaluate", asked.checkpoint, *options(asked, EvaluateFlags(asked.checkpoint, data=""))]


def pack_words(words: list[str], datasets: dict[str, str]) -> list[str]:
    """`pack` as a job is given it, checked but for what lies in the sources: to list them takes long."""
    flags = parse(PackFlags, words, "pack")
    if flags.config.task is not None:
        raise UsageError(f"--task {flags.config.task} is set for each job; `vitscale submit --tasks N` says how many there are")
    if len(flags.paths) < 2:
        raise UsageError("`vitscale pack` needs SOURCE... and OUT; `vitscale submit --tasks 8 -- pack images/ dataset/` is one use")
    sources, out = tuple(dataset_at(source, datasets) for source in flags.paths[:-1]), absolute(flags.paths[-1])
    read: dict[str, Any] = {
        name: absolute(path) for name in ("image_root", "class_map", "class_names") if (path := getattr(flags.config, name))
    }
    work = flags.config.work and absolute(flags.config.work)
    config = dataclasses.replace(flags.config, sources=sources, out=out, work=work, **read)
    config.check()
    for path in (*sources, *read.values()):
        if not is_url(path) and not os.path.exists(path):
            raise UsageError(f"{path} does not exist; `vitscale pack --help` tells what may be packed")
    default = PackConfig(sources, out)
    return ["pack", *sources, out, *options(config, default), *(["--json"] if flags.json else [])]


def options(asked: Any, default: Any) -> list[str]:
    """The flags, a word each, that make of the defaults what is asked; of several values each has a word of its own."""
    words: list[str] = []
    for setting, value in vars(asked).items():
        name = setting.replace("_", "-")
        if value == getattr(default, setting):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    return words


# -- what both share ----------------------------------------------------------------------------------------------------------------------


def tell(flags: SubmitFlags, script: str, more: dict[str, Any]) -> None:
    """The result of a dry run."""
    if flags.json:
        print_json({"script": script} | more)
    else:
        print(script)


def ask_slurm(script: str, nodes: int) -> list[str]:
    """Warnings, where SLURM would not start a job as things are. Raises VerbError where it would refuse it, or let it wait for ever.

    Where there is no client, or one without a cluster, nobody is asked.
    """
    if shutil.which("sbatch") is None:
        return []
    said = test_only(script)
    if not said or "configuration source" in said:
        return []
    # It goes by the nodes that are up, and says the same where they are too few for now and for ever
    down = len(set(subprocess.run(["sinfo", *_NODES_DOWN], capture_output=True, text=True, check=False).stdout.split()))
    if _NO_SUCH_NODES in said and down and (down >= nodes or not test_only(script, f"--nodes={nodes - down}")):
        return [f"SLURM could not start the job now, with {counted(down, 'node')} down or drained, and it may wait for them: {said}"]
    raise VerbError(f"sbatch refused the job: {said}")


_NO_SUCH_NODES = "Requested node configuration is not available"
_NODES_DOWN = ("--Node", "--noheader", "--states=down,drain,fail,maint", "--format=%N")


def test_only(script: str, *options: str) -> str:
    """Why SLURM would not take a job; nothing where it would."""
    done = subprocess.run(["sbatch", "--test-only", *options], input=script, capture_output=True, text=True, check=False)
    return in_a_line(done.stderr) or "it did not say why" if done.returncode else ""


def in_a_line(said: str) -> str:
    """What sbatch said."""
    return "; ".join(line.removeprefix("sbatch: error: ") for line in said.strip().splitlines())


def next_folder(submissions: Path) -> Path:
    """The next submission's folder, which is not made."""
    numbers = [int(entry.name) for entry in submissions.iterdir() if entry.name.isdigit()] if submissions.is_dir() else []
    return submissions / f"{max(numbers, default=-1) + 1:03d}"


class UnansweredError(VerbError):
    """A job may be in SLURM's queue, and its number is not known: what it needs has to stay."""


class UnansweredInterrupt(KeyboardInterrupt):
    """Ctrl-C while sbatch was asked, of which the same is true."""


@contextlib.contextmanager
def telling_of(jobs: Sequence[str]) -> Iterator[None]:
    """Where something fails, the error names the jobs that are submitted by then."""
    try:
        yield
    except (UserError, OSError) as error:
        if not jobs:
            raise
        raise VerbError(
            f"{message_of(error)}; submitted before that: job {', '.join(jobs)}, which `scancel {' '.join(jobs)}` takes back"
        ) from None
    except KeyboardInterrupt:
        if jobs:
            print(f"submitted before that: job {', '.join(jobs)}, which `scancel {' '.join(jobs)}` takes back", file=sys.stderr)
        raise


@contextlib.contextmanager
def submission(folder: Path, jobs: Sequence[str]) -> Iterator[None]:
    """Makes a submission's folder, for its owner alone; what was made goes where it is known that nothing is submitted.

    Args:
        jobs: those that are submitted so far, which need the folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        with telling_of(jobs):
            yield
    except BaseException as error:
        if jobs or isinstance(error, UnansweredError | UnansweredInterrupt):
            raise
        shutil.rmtree(folder)
        for path in made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write_snapshot(folder: Path, config: TrainConfig | None) -> None:
    """The code as it is, its commit, and the config."""
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        shutil.copytree(root / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (folder / "code" / "COMMIT").write_text(f"{git_commit() or ''}\n")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")


class Submitter(SlurmExecutor):  # type: ignore[misc]
    """submitit's way to sbatch, with a script of our own."""

    def __init__(self, folder: Path, script: str, options: list[str], arguments: list[str]) -> None:
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise VerbError("sbatch is not here: this machine submits to no SLURM; --dry-run prints what would be submitted")
        super().__init__(folder)
        self._script, self._options, self._arguments = script, options, arguments

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path), *self._arguments]

    def send(self) -> str:
        """Submits; the job's id. Raises VerbError with what sbatch said, UnansweredError where there may be a job."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what it raises as well
                job: SlurmJob[Any] = self._submit_command("")
        except FailedJobError as error:
            if "timed out" in str(error).lower():  # it may have been taken, and only the answer be lost
                raise UnansweredError(self._may_be_queued(in_a_line(str(error)))) from None
            raise VerbError(f"sbatch refused the job: {in_a_line(str(error)) or 'it did not say why'}") from None
        except FailedSubmissionError:
            raise UnansweredError(self._may_be_queued("sbatch named no job")) from None
        except KeyboardInterrupt:
            print(f"\n{self._may_be_queued('interrupted while sbatch was asked')}", file=sys.stderr)
            raise UnansweredInterrupt from None
        return str(job.job_id)

    def _may_be_queued(self, why: str) -> str:
        queue = f"`squeue --me --noheader --format='%i %o' | grep -F -- {shlex.quote(str(self.folder))}` tells"
        return f"{why}, and a job may be in the queue: {queue}; {self.folder}, which it would need, is kept"
