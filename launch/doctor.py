"""`vitscale doctor`: what of this machine, or of this allocation, works, what does not, and what to do about it.

Works where torch is not installed, and says what it could not look at. What there is to know of torch, DeepSpeed and the devices a process
of its own finds out (`python -m vitscale.preflight`), so that a library that ends its process ends that one. The SLURM half asks the
cluster's own client, and can write a first site file from the answers.
"""

import fcntl
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_tools.errors import UserError, message_of
from launch.flags import parse
from launch.site import Site, read_site
from launch.terminal import Json, print_json
from vitscale.machine import DESCRIPTORS, FEW_FILES, GB, MB, PROBE, available_memory, expand_nodes, probe_disk, size

LITTLE_GRACE = 60  # seconds from a preemption to the kill in which a large run cannot save
PATIENCE = 30.0  # seconds for an answer of the cluster


@dataclass(frozen=True)
class DoctorFlags:
    """Looks at this machine, or at an allocation: what works, what does not, and what to do. Exit status 1 if a check fails."""

    out: str = "."
    """The folder where runs are to lie."""
    data: tuple[str, ...] = ()
    """Datasets that runs are to read."""
    site: str = ""
    """A site file to write with what is found of the cluster; one that is there is read and checked."""
    json: Json = False


@dataclass(frozen=True)
class Check:
    """What was found of one thing. `unknown`: it cannot be looked at from here."""

    name: str
    status: Literal["ok", "warn", "fail", "unknown"]
    found: str
    to_do: str = ""


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster."""

    name: str
    is_default: bool
    max_time: str
    nodes: int
    grace: int
    """Seconds between a preemption and the kill, without KillWait."""
    preempted: bool
    """Whether its jobs can be."""
    gpus: tuple[str, ...]
    """Types of its nodes' GPUs, the most frequent first; "" where SLURM gives them none."""
    gpus_per_node: int
    cpus_per_node: int


def doctor(words: list[str]) -> None:
    """This machine or allocation: what works, what does not, and what to do."""
    flags = parse(DoctorFlags, words, "doctor")
    checks = [*_python(), *_training(), *_machine(), *_storage(Path(flags.out)), *_datasets(flags.data)]
    slurm, config, partitions = _slurm()
    checks += [*slurm, *_allocation()]
    if flags.site:
        checks.append(_site(Path(flags.site), config, partitions))
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # whose lines come mixed
    node = f"{os.environ.get('SLURMD_NODENAME') or platform.node()}: " if several else ""
    if flags.json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            print(f"{node}{check.status:<8}{check.name:<20}{check.found}" + (f"\n{node}{'':<28}-> {check.to_do}" if check.to_do else ""))
    if failed := [check.name for check in checks if check.status == "fail"]:
        raise DoctorError(f"{node}{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


class DoctorError(UserError):
    """Something that has to work does not."""


# -- Software -----------------------------------------------------------------------------------------------------------------------------


def _python() -> list[Check]:
    found = []
    for package in ("vitscale", "numpy", "pyarrow", "submitit", "safetensors", "deepspeed"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    checks = [Check("python", "ok", f"{platform.python_version()} at {sys.executable}"), Check("packages", "ok", ", ".join(found))]
    try:
        importlib.import_module("vitscale._pixels")
        checks.append(Check("native decoder", "ok", "built"))
    except ImportError as error:
        to_do = "install libjpeg-turbo's headers and a C compiler and `pip install` vitscale again; without it images decode more slowly"
        checks.append(Check("native decoder", "warn", str(error), to_do))
    return checks


def _training() -> list[Check]:
    """Torch, DeepSpeed, compilers and GPUs."""
    if importlib.util.find_spec("torch") is None:
        to_do = "nothing on a login node; `pip install 'vitscale[train]'` where ranks are to run"
        return [Check("torch", "unknown", "not installed, so DeepSpeed and the devices cannot be looked at", to_do), *_drivers(None)]
    done = subprocess.run([sys.executable, "-m", "vitscale.preflight"], capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
        return [
            Check("torch", "fail", said, "`python -m vitscale.preflight` shows the traceback; versions that work are in pyproject.toml")
        ]
    told = json.loads(done.stdout.splitlines()[-1])
    checks = [
        Check("torch", "ok", f"{told['torch']}, CUDA {told['cuda'] or 'not built in'}"),
        Check("deepspeed", "ok", f"{told['deepspeed']} imports, {told['import_seconds']:.0f} s with torch"),
        _product(told),
    ]
    missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None and not Path(sys.executable).with_name(tool).is_file()]
    if missing:
        to_do = "only DeepSpeed's own kernels (offload, fused optimizers) and torch.compile need them; install g++ and ninja for those"
        checks.append(Check("compilers", "warn", f"no {', no '.join(missing)}", to_do))
    else:
        checks.append(Check("compilers", "ok", "c++ and ninja are there"))
    return [*checks, *_drivers(told["devices"])]


def _product(told: dict) -> Check:
    where = f"on {len(told['devices'])} GPUs" if told["devices"] else "on the CPU"
    if told["faults"]:
        return Check("products", "fail", "; ".join(told["faults"]), "take this machine out of service; its results cannot be trusted")
    return Check("products", "ok", f"of matrices come out right {where}")


def _drivers(seen: list[str] | None) -> list[Check]:
    """What the driver tells of GPUs, against what torch sees (None: nobody asked it)."""
    if shutil.which("nvidia-smi") is None:
        if seen:
            return [Check("gpus", "warn", f"torch sees {len(seen)}, and there is no nvidia-smi", "")]
        return [Check("gpus", "ok", "none, and no nvidia-smi: training here runs on the CPU")]
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 3]
    if done.returncode or not rows:
        return [Check("gpus", "fail", f"nvidia-smi: {(done.stdout + done.stderr).strip()}", "the driver needs its administrator")]
    kinds = Counter(row[0] for row in rows)
    found = f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}, driver {rows[0][1]}"
    if len(kinds) > 1:
        return [Check("gpus", "fail", found, "a run takes one type: choose them by CUDA_VISIBLE_DEVICES")]
    if seen is not None and len(seen) != len(rows) and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [
            Check("gpus", "fail", f"{found}; torch sees {len(seen)}", "torch's CUDA and the driver must fit: nvidia-smi tells the newest")
        ]
    taken = [row for row in rows if row[3].isdigit() and int(row[3]) > 0.1 * int(row[2])]
    to_do = f"{len(taken)} are used by others; `nvidia-smi` shows by whom" if taken else ""
    return [Check("gpus", "warn" if taken else "ok", found, to_do)]


# -- The machine --------------------------------------------------------------------------------------------------------------------------


def _machine() -> list[Check]:
    memory = available_memory()
    few = "a rank takes some 2 GB and the windows of its stream (--stream.buffer-bytes)"
    checks = [Check("memory", "ok" if memory > 4 * GB else "warn", f"{size(memory)} free", "" if memory > 4 * GB else few)]
    if Path("/dev/shm").is_dir():
        room = os.statvfs("/dev/shm")
        free = room.f_bavail * room.f_frsize
        to_do = "" if free > GB else "NCCL wants some; start the container with --shm-size 1g or more, or --ipc host"
        checks.append(Check("shared memory", "warn" if to_do else "ok", f"{size(free)} free in /dev/shm", to_do))
    else:
        checks.append(Check("shared memory", "warn", "no /dev/shm", "NCCL wants it; mount a tmpfs there"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS
    to_do = "" if enough else f"a rank asks for {DESCRIPTORS:,}; raise `nofile` in limits.conf or slurmd's LimitNOFILE if ranks run out"
    checks.append(Check("open files", "ok" if enough else "warn", f"limit {_limit(soft)}, may be raised to {_limit(hard)}", to_do))
    return checks


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value:,}"


def _storage(out: Path) -> list[Check]:
    checks = []
    for name, folder in (("run directory", _existing(out)), ("scratch", Path(os.environ.get("TMPDIR", tempfile.gettempdir())))):
        disk = probe_disk(folder, PROBE)
        files = f", {disk.free_files:,} files" if disk.free_files is not None else ""
        if disk.fault:
            checks.append(Check(name, "fail", disk.told(), "another --out" if name == "run directory" else "another TMPDIR"))
        elif disk.free_bytes < 10 * GB or disk.rate < 50 * MB or (disk.free_files is not None and disk.free_files < FEW_FILES):
            to_do = "a checkpoint takes 12 bytes a parameter, ViT-H 8 GB; see docs/operations.md" if name == "run directory" else ""
            checks.append(Check(name, "warn", f"{folder}: {disk.told()}{files}", to_do))
        else:
            checks.append(Check(name, "ok", f"{folder}: {disk.told()}{files}"))
    return [*checks, _locks(_existing(out))]


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())


def _locks(folder: Path) -> Check:
    """Whether a lock that one process holds keeps another out, as run.lock has to."""
    try_it = "import fcntl, sys\ntry: fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(3)"
    to_do = "two starts could train one run at once: mount with locks (Lustre: -o flock; NFS: version 4, or lockd), or start each run once"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vitscale-lock-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = subprocess.run([sys.executable, "-c", try_it, file.name], check=False, capture_output=True).returncode
            fcntl.flock(file, fcntl.LOCK_UN)
            free = subprocess.run([sys.executable, "-c", try_it, file.name], check=False, capture_output=True).returncode
    except OSError as error:
        return Check("file locks", "fail", f"{folder}: {error.strerror}", to_do)
    if (held, free) == (3, 0):
        return Check("file locks", "ok", f"flock keeps other processes out in {folder}")
    return Check("file locks", "fail", f"{folder}: a second process got a lock that was held", to_do)


def _datasets(paths: tuple[str, ...]) -> list[Check]:
    from data_tools.dataset import read_header
    from data_tools.storage import location

    checks = []
    for path in paths:
        try:
            header = read_header(location(path))
            checks.append(Check("dataset", "ok", f"{path}: {header['name']}, {header['num_samples']:,} samples"))
        except (UserError, OSError) as error:
            checks.append(Check("dataset", "fail", message_of(error)))
    return checks


# -- SLURM --------------------------------------------------------------------------------------------------------------------------------


def _slurm() -> tuple[list[Check], dict[str, str], list[Partition]]:
    """What the cluster's client tells; nothing of it where there is none."""
    missing = [tool for tool in ("sbatch", "srun", "scontrol", "squeue", "sinfo") if shutil.which(tool) is None]
    if missing:
        inside = "SLURM_JOB_ID" in os.environ
        to_do = "" if inside else "`vitscale submit` needs it: run doctor on a login node"
        why = "as in many containers; the batch script on the host requeues" if inside else "no SLURM on this machine"
        return [Check("slurm client", "unknown", f"no {', no '.join(missing)}: {why}", to_do)], {}, []
    try:
        version = _ask("sinfo", "--version").strip()
        config = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", _ask("scontrol", "show", "config"), re.MULTILINE))
        nodes = [line.split("|") for line in _ask("sinfo", "-h", "-N", "-o", "%N|%R|%G|%c").splitlines()]
        partitions = read_partitions(_ask("scontrol", "show", "partition", "-o"), nodes)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().rpartition("\n")[2]
        if "configuration source" in said:  # of a client that is installed without a cluster
            return [Check("slurm client", "unknown", "installed, and no cluster is configured", "SLURM_CONF names a slurm.conf")], {}, []
        return [Check("slurm client", "fail", f"the cluster does not answer: {said}", "`scontrol ping` and SLURM_CONF tell more")], {}, []
    checks = [Check("slurm client", "ok", f"{version}, cluster {config.get('ClusterName', '?')}")]
    return [*checks, *judge_cluster(config, partitions)], config, partitions


def _ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout


def read_partitions(told: str, nodes: list[list[str]]) -> list[Partition]:
    """From `scontrol show partition -o` and from rows of name, partition, gres and CPUs of each node. Pure."""
    found = []
    for line in told.splitlines():
        of = dict(re.findall(r"(\w+)=(\S+)", line))
        if "PartitionName" not in of:
            continue
        own = [row for row in nodes if row[1] == of["PartitionName"]]
        gres = Counter(_gpus(row[2]) for row in own if _gpus(row[2])[1])
        kinds = tuple(dict.fromkeys(kind for (kind, _), _ in gres.most_common()))
        most = gres.most_common(1)[0][0][1] if gres else 0
        cpus = Counter(int(row[3].rstrip("+")) for row in own).most_common(1)
        found.append(
            Partition(
                of["PartitionName"], of.get("Default") == "YES", of.get("MaxTime", ""), len(own), int(of.get("GraceTime", "0")),
                of.get("PreemptMode", "OFF") not in ("OFF", "SUSPEND,GANG", "GANG,SUSPEND"), kinds, most, cpus[0][0] if cpus else 0,
            )
        )  # fmt: skip
    return found


def _gpus(gres: str) -> tuple[str, int]:
    """Type and number of the GPUs in a node's gres: gpu:h100:8(S:0-1)."""
    found = re.search(r"\bgpu(?::([A-Za-z_][\w.-]*))?:(\d+)", gres)
    return (found[1] or "", int(found[2])) if found else ("", 0)


def judge_cluster(config: dict[str, str], partitions: list[Partition]) -> list[Check]:
    """What the cluster's settings mean for a run. Pure."""
    checks = []
    if config.get("JobRequeue") == "1":
        checks.append(Check("requeueing", "ok", "jobs may go back to the queue (JobRequeue=1)"))
    else:
        to_do = "submit passes --requeue, which may still be allowed; if not, `requeue = false` in the site file chains jobs instead"
        checks.append(Check("requeueing", "warn", f"jobs do not by themselves (JobRequeue={config.get('JobRequeue', '?')})", to_do))
    kill_wait = int((re.match(r"\d+", config.get("KillWait", "")) or ["0"])[0])
    sends = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    mode = config.get("PreemptMode", "?")
    found = f"PreemptMode={mode}, {'the signal of --signal' if sends else 'SIGTERM'} first, KillWait {kill_wait} s"
    preempted = [partition for partition in partitions if partition.preempted and mode != "OFF"]
    short = [partition for partition in preempted if partition.grace + kill_wait < LITTLE_GRACE]
    if "CANCEL" in mode:
        checks.append(Check("preemption", "warn", found, "a preempted job is cancelled, not requeued: ask for PreemptMode=REQUEUE"))
    elif short:
        told = ", ".join(f"{partition.name} {partition.grace + kill_wait} s" for partition in short)
        to_do = f"from notice to kill: {told}; a save that takes longer loses the steps since the last checkpoint: --checkpoint-every less"
        checks.append(Check("preemption", "warn", found, to_do))
    else:
        checks.append(Check("preemption", "ok", found))
    for partition in partitions:
        gpus = f"{partition.gpus_per_node} x {' or '.join(partition.gpus) or 'gpu'} a node" if partition.gpus_per_node else "no GPUs"
        told = f"{'default, ' if partition.is_default else ''}{partition.nodes} nodes, {gpus}, {partition.cpus_per_node} CPUs a node"
        mixed = "`gpu_type` in the site file chooses one type; a run takes no mixture" if len(partition.gpus) > 1 else ""
        name = f"partition {partition.name}"
        checks.append(Check(name, "warn" if mixed else "ok", f"{told}, at most {partition.max_time}", mixed))
    checks.append(
        Check(
            "signal lead",
            "ok",
            f"{Site.signal_lead_seconds} s suggested",
            "SLURM may signal 60 s early; raise it where a step and a save take longer",
        )
    )
    return checks


def _allocation() -> list[Check]:
    if "SLURM_JOB_ID" not in os.environ:
        return []
    nodes = expand_nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    tasks = os.environ.get("SLURM_NTASKS", "?")
    told = f"job {os.environ['SLURM_JOB_ID']}, {len(nodes)} nodes ({nodes[0] if nodes else '?'}...), {tasks} tasks, here {platform.node()}"
    return [Check("allocation", "ok", told, "`srun vitscale doctor` looks at all of its nodes")]


# -- The site file ------------------------------------------------------------------------------------------------------------------------


def _site(file: Path, config: dict[str, str], partitions: list[Partition]) -> Check:
    if file.exists():
        try:
            read_site(file)
            return Check("site file", "ok", f"{file} is there, and can be read")
        except UserError as error:
            return Check("site file", "fail", str(error), "correct it, or take it away for a new one")
    if not partitions:
        return Check("site file", "fail", f"{file} was not written: nothing is known of a cluster", "run doctor on a login node")
    file.write_text(site_text(config, partitions, os.environ.get("TMPDIR", "/tmp")))
    read_site(file)
    return Check("site file", "ok", f"{file} is written", "look through it, fill in what its comments ask for, and check it in")


def site_text(config: dict[str, str], partitions: list[Partition], scratch: str) -> str:
    """A first site file from what was found of a cluster. Pure.

    It has the default partition, or the one with the most GPUs.
    """
    with_gpus = [partition for partition in partitions if partition.gpus_per_node]
    chosen = max(with_gpus or partitions, key=lambda partition: (partition.is_default, partition.nodes * partition.gpus_per_node))
    others = [partition.name for partition in partitions if partition is not chosen]
    gpu_type = chosen.gpus[0] if chosen.gpus else ""
    cpus = chosen.cpus_per_node // chosen.gpus_per_node if chosen.gpus_per_node else 0
    types = f"; there are {', '.join(chosen.gpus)}" if len(chosen.gpus) > 1 else ""
    limit = "" if chosen.max_time in ("UNLIMITED", "INFINITE", "") else chosen.max_time
    return f"""\
# Cluster {config.get("ClusterName", "")}, as `vitscale doctor` found it; what is commented out is for you to fill in (docs/operations.md).

# account = "..."                       # as sbatch's --account; leave it out where there is none
partitions = [{_text(chosen.name)}]{f"    # there are also {', '.join(others)}" if others else ""}
# qos = "..."
gpu_type = {_text(gpu_type)}            # one type a run{types}
gpus_per_node = {chosen.gpus_per_node}
cpus_per_task = {cpus}                       # of a rank, its loader's workers included; 0: what SLURM gives
# mem = "0"                             # memory a node; "0": all of it
time = {_text(limit)}                   # of one job; a run takes as many as it needs
# modules = ["cuda/12.8"]
# setup = ["source /shared/vitscale/bin/activate"]
# python = "python3"
# cpu_bind = "cores"
scratch = {_text(scratch)}              # on each node's own disk; $VARIABLES of the job may stand in it
signal_lead_seconds = {Site.signal_lead_seconds}
requeue = {"true" if config.get("JobRequeue") == "1" else "false"}
# sbatch = ["--exclusive"]

# [container]
# runtime = "pyxis"                     # or "apptainer"
# image = "/shared/images/vitscale.sqsh"
# mounts = ["/shared"]

[environment]
# NCCL_SOCKET_IFNAME = "ib0"            # the fabric's interface
# NCCL_IB_HCA = "mlx5"

[datasets]
# jft = "/shared/data/jft300m"          # --data jft
"""


def _text(value: str) -> str:
    return json.dumps(value)  # a JSON text is a TOML text
