"""What a cluster wants of a job: one checked-in TOML file a cluster, for `vitscale submit --site SITE.toml`; docs/site.toml has every key.

A key that is not known, a value of another type and a setting that cannot work are refused with one line. Imports nothing heavy.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data_tools.errors import UserError

_ONE_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
# What `submit` sets itself: given once more among the extra arguments, one of the two would not hold
_OURS = (
    "--signal", "--requeue", "--no-requeue", "--open-mode", "--output", "--error", "--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node",
    "--gpus", "-G", "--gpus-per-node", "--gpus-per-task", "--gres", "--cpus-per-task", "-c", "--array", "-a", "--dependency", "-d",
    "--wrap", "--parsable",
)  # fmt: skip


class SiteError(UserError):
    """A site file that cannot be used; the message is one line: the key, the rule, and what would work."""


@dataclass(frozen=True)
class Container:
    """Where the tasks run, if not on the host itself; SLURM's own commands stay on the host."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: srun's --container-image; apptainer: `apptainer exec --nv`."""
    image: str
    """As the runtime takes it: nvcr.io#nvidia/pytorch:25.10-py3, /images/vitscale.sqsh, /images/vitscale.sif."""
    mounts: tuple[str, ...] = ()
    """HOST:CONTAINER, or one path for both. The run's directory is mounted in any case, under its own path."""


@dataclass(frozen=True)
class Site:
    """A cluster."""

    account: str = ""
    """As sbatch's --account; empty: the user's own."""
    partitions: tuple[str, ...] = ()
    """The job goes to whichever starts first; none: the cluster's default."""
    qos: str = ""
    gpu_type: str = ""
    """As SLURM calls it: h100. One only: ranks that wait for slower ones waste the faster, and results would differ with the place."""
    gpus_per_node: int = 0
    """A task a GPU. 0: a cluster of CPUs, with --tasks-per-node of `submit`."""
    cpus_per_task: int = 0
    """CPUs of a rank, its loader's workers included; 0: what SLURM gives."""
    mem: str = ""
    """Memory a node (500G; "0" is all of it); empty: what SLURM gives."""
    time: str = ""
    """Time limit of one job (24:00:00, 1-12, minutes): a run may take many. Empty: the partition's."""
    container: Container | None = None
    modules: tuple[str, ...] = ()
    """What `module load` is given on the host."""
    setup: tuple[str, ...] = ()
    """Lines of bash on the host, after the modules and before the ranks."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all tasks: NCCL and the fabric (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, FI_PROVIDER, ...)."""
    cpu_bind: str = ""
    """As srun's --cpu-bind: cores, rank_ldom, map_cpu:...; empty: SLURM's own."""
    scratch: str = "/tmp"
    """A folder on each node's own disk, for compiled kernels. $VARIABLES of the job may stand in it."""
    datasets: dict[str, str] = field(default_factory=dict)
    """Names of datasets, for --data, --eval-data and pack's sources, and where they lie on this cluster (directories or URLs)."""
    signal_lead_seconds: int = 120
    """How long before its time limit a job is told to save: more than a step and a save take. SLURM may tell it a minute early, and
    at least half of the limit is left for work."""
    requeue: bool = True
    """Whether a job may go back to the queue by itself. False: `submit --chain N` queues N jobs, each of which waits for the one before."""
    sbatch: tuple[str, ...] = ()
    """More arguments of sbatch: --exclusive, --constraint=..., --reservation=..."""
    python: str = ""
    """The command that runs Python, in the container where there is one. Empty: the one that `submit` runs with; in a container python3."""


def read_site(file: Path) -> Site:
    """The site of a TOML file. Raises SiteError."""
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise SiteError(f"{file} does not exist; docs/site.toml is an example of a site file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise SiteError(f"{file} is not TOML ({error})") from None
    site: Site = _typed(Site, values, str(file))
    check_site(site, str(file))
    return site


def check_site(site: Site, where: str) -> None:
    """Raises SiteError where a setting cannot work."""
    for name in ("gpus_per_node", "cpus_per_task"):
        if getattr(site, name) < 0:
            raise SiteError(f"{where}: {name}={getattr(site, name)} must be at least 0")
    if site.gpu_type and not _ONE_TYPE.fullmatch(site.gpu_type):
        raise SiteError(f"{where}: gpu_type={site.gpu_type!r} must be one type, as h100 is: a job on several waits for the slowest")
    if site.gpus_per_node and not site.gpu_type and len(site.partitions) > 1:
        raise SiteError(f"{where}: partitions {', '.join(site.partitions)} may have GPUs of several types; gpu_type says which")
    if site.signal_lead_seconds < 1:
        raise SiteError(
            f"{where}: signal_lead_seconds={site.signal_lead_seconds} must be at least 1; {Site.signal_lead_seconds} works for most"
        )
    if site.time:
        check_time(site.time, f"{where}: time")
    for name in site.environment:
        if not _VARIABLE.fullmatch(name):
            raise SiteError(f"{where}: environment.{name} is no name of a variable; letters, digits and _ make one")
    check_extra(site.sbatch, f"{where}: sbatch")


def check_time(time: str, where: str) -> None:
    """Raises SiteError unless it is a time limit as sbatch takes it."""
    if not _TIME.fullmatch(time):
        raise SiteError(f"{where}={time!r} is no time limit; 90 (minutes), 24:00:00 and 1-12:00:00 (days first) are")


def minutes(time: str) -> float:
    """A time limit as sbatch takes it, in minutes."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minute, second = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minute + second / 60
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)


def check_extra(words: tuple[str, ...], where: str) -> None:
    """Raises SiteError where an extra argument of sbatch is one that `submit` sets."""
    for word in words:
        name = word.partition("=")[0]
        if name in _OURS or (name[:2] in _OURS and not name.startswith("--")):
            raise SiteError(f"{where} has {word!r}, which `vitscale submit` sets itself, by the site file and its flags; leave it out")


def _typed(cls: type, values: dict[str, Any], where: str) -> Any:
    """The dataclass of a TOML table. Raises SiteError."""
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise SiteError(f"{where} has the unknown key {unknown[0]}; there are {', '.join(fields)}")
    for name, known in fields.items():
        if name not in values and known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING:
            raise SiteError(f"{where} lacks {name}")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, UnionType):  # of a dataclass and None, which TOML does not have
        return _typed(get_args(hint)[0], _of_type(dict, "a table", value, where), where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise SiteError(f"{where}={value!r} must be one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        return tuple(_of_type(str, "a list of texts", one, where) for one in _of_type(list, "a list of texts", value, where))
    if get_origin(hint) is dict:
        table = _of_type(dict, "a table of texts", value, where)
        return {name: _of_type(str, "a text", one, f"{where}.{name}") for name, one in table.items()}
    return _of_type(hint, {str: "a text", int: "a whole number", bool: "true or false"}[hint], value, where)


def _of_type(kind: type, called: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SiteError(f"{where}={value!r} must be {called}")
    if isinstance(value, str) and any(ord(character) < 32 for character in value):
        raise SiteError(f"{where}={value!r} has a control character; a text of one line works")
    return value
