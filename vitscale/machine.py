"""What can be told of the machine that a process is on, and of others: its place, free memory, disks, names of nodes. Imports no torch.

`preflight.py` asks it of every node of a start, `vitscale doctor` of the machine where it is typed.
"""

import contextlib
import errno
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MB, GB = 10**6, 10**9
DESCRIPTORS = 65_536  # files that a rank may want open: windows in shared memory and tars have a descriptor each
FEW_FILES = 10_000  # that a file system still takes: caches of compiled kernels make thousands
PROBE = 64 * MB  # bytes that tell a disk's speed: more than a controller answers for at once
_SYNC_EVERY = 8 * MB
_PROBE_SECONDS = 0.5  # after which less than that has told enough: it is a slow disk, or a busy one


class Place(NamedTuple):
    """Where a rank stands among those of its start, whose nodes have adjacent ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def node(self) -> int:
        """Which of the nodes, from 0."""
        return self.rank // self.local_world_size


def this_place() -> Place:
    """Of this process, as torchrun's variables tell it."""
    return Place(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def this_host() -> str:
    """This machine's name as SLURM knows it; the host's own outside of a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


@dataclass(frozen=True)
class Disk:
    """A folder, and what is known of the file system below it."""

    folder: str
    free_bytes: int = 0
    free_files: int | None = None
    """None where the file system does not count them (btrfs, some network file systems)."""
    rate: float = 0.0
    """Bytes a second of a written and synced file; 0 where none was written."""
    fault: str = ""
    """Why nothing can be written there."""
    full: bool = False
    """Whether that is for want of room, or of a quota."""

    def told(self) -> str:
        """For people."""
        return self.fault or f"{size(self.free_bytes)} free{f', {size(self.rate)}/s' if self.rate else ''}"


def probe_disk(folder: Path, num_bytes: int) -> Disk:
    """Writes and syncs a file of so many bytes in a folder, or of as many as half a second has room for, and takes it away again."""
    try:
        found = os.statvfs(folder)
        free_bytes, free_files = found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
        if free_bytes < num_bytes:
            return Disk(str(folder), free_bytes, free_files, fault=f"{folder} is full: {size(free_bytes)} free", full=True)
        return Disk(str(folder), free_bytes, free_files, _written(folder, num_bytes))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "is full" if error.errno == errno.ENOSPC else "cannot be written to"
        return Disk(str(folder), fault=f"{folder} {why} ({error.strerror})", full=full)


def _written(folder: Path, num_bytes: int) -> float:
    """Bytes a second, syncs included. Where nothing is to be measured, one byte tells that a file can be written."""
    file = folder / f".vitscale-probe-{this_host()}-{os.getpid()}"
    block = os.urandom(min(num_bytes, MB) or 1)  # what a file system that compresses cannot make less of
    try:
        started, written = time.perf_counter(), 0
        with open(file, "xb", buffering=0) as out:
            while True:
                if out.write(block) < len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += len(block)
                if written >= num_bytes or written % _SYNC_EVERY == 0:
                    os.fsync(out.fileno())
                    if written >= num_bytes or time.perf_counter() - started > _PROBE_SECONDS:
                        return written / (time.perf_counter() - started) if num_bytes else 0.0
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine can give out without swapping, or what this process's cgroups leave of them."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    room = [int(meminfo["MemAvailable"].split()[0]) << 10]
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            room += _room(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            room += _room(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(room)


def _room(root: Path, path: str, limit_file: str, usage_file: str, reclaimable: str) -> list[int]:
    """What each of a cgroup and those above it leaves; cached files count as free, as they do in MemAvailable."""
    room = []
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit
            limit, used = int((folder / limit_file).read_text()), int((folder / usage_file).read_text())
            cached = int(dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[reclaimable])
            room.append(limit - used + cached)
        if folder == root:
            break
    return room


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, name in ((10**12, "TB"), (GB, "GB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / MB:.0f} MB"


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names in a list of nodes as SLURM writes it: `n[1-3,7],gpu-[01-02]-ib,login`. Pure."""
    names: list[str] = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        made = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", group):
            made = [head + tail for head in made for tail in ([plain] if plain else _numbers(ranges))]
        names += made
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    found = []
    for one in ranges.split(","):
        low, _, high = one.partition("-")
        found += [f"{number:0{len(low)}}" for number in range(int(low), int(high or low) + 1)]
    return found
