"""What is checked of every machine at each start, in seconds, before the first step: a bad one is named, and the start ends.

Each rank finds out about its own machine; all findings go to rank 0 through the store at which the ranks met (some 500 bytes a rank, so
its work is linear in ranks), where pure functions (`judge_*`) decide which nodes are bad and what is only worth a warning. Devices come
before the first collective, because that is what fails without a name on a broken one.

What is the same on more than half of the nodes is not the nodes' fault but the settings', and the start ends without blaming any.

    python -m vitscale.preflight        what of torch, DeepSpeed and this process's devices works, as JSON, for `vitscale doctor`
"""

import importlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vitscale import rendezvous
from vitscale.config import TrainConfig
from vitscale.ending import Cause, Ended
from vitscale.flops import checkpoint_bytes
from vitscale.machine import FEW_FILES, GB, MB, PROBE, Disk, available_memory, probe_disk, size, this_host
from vitscale.metrics import counted

PATIENCE = timedelta(minutes=5)  # for all answers to a question: a disk that takes so long for 64 MB is broken
MEMORY_A_RANK = 512 * MB  # less of the host's memory than this a rank, and not even torch and a stream's first windows fit
DEVICE_MEMORY_SHARE = 0.9  # of a device's memory that is free at a start; a context of CUDA takes some 0.5 GB
DEVICE_MEMORY_SLACK = 0.1  # of a device's memory that it may lack against the others': what a process that should be gone still holds
SLOW_DEVICE = 0.7  # of the median rate of products: a device that is throttled makes all others wait
SLOW_DISK = 20 * MB  # bytes a second; a checkpoint of ViT-H (8 GB) would take seven minutes
LITTLE_SCRATCH = 2 * GB
WRITERS = 4  # nodes that measure the run directory's speed; if a thousand did, they would write 64 GB and measure each other
CLOCK_TOLD = 2.0  # seconds between clocks: logs and end records of nodes come in the wrong order
CLOCK_BAD = 60.0  # the clock is not kept at all: heartbeats look stale, and munge, tokens and certificates fail soon after
FIRST_SUM = 4 * MB  # bytes of the all-reduce that is checked before any other
TIMED_SUM = 64 * MB  # and of the one that is timed, on GPUs: about what one bucket of ZeRO holds
SUM_SECONDS = 180.0  # for the first all-reduce, which sets up the communicator; thousands of ranks take a minute


@dataclass(frozen=True)
class Machine:
    """What a rank finds of where it runs."""

    host: str
    local_rank: int
    device_fault: str = ""
    flops: float = 0.0
    device_free: int = 0
    device_total: int = 0
    """0 without a GPU."""
    memory: int = 0
    """Bytes of the host's that are free to all its ranks; told by the node's first rank."""
    scratch: tuple[Disk, ...] = ()
    run: Disk | None = None

    @staticmethod
    def parse(said: Mapping) -> "Machine":
        """From what a rank sent."""
        disks = tuple(Disk(**disk) for disk in said["scratch"])
        return Machine(**{**said, "scratch": disks, "run": Disk(**said["run"]) if said["run"] else None})


@dataclass(frozen=True)
class Need:
    """What a run takes of a node."""

    checkpoint: int
    """Bytes of one."""
    memory: int
    """Of the host's: the node's share of a snapshot, and the windows of its ranks."""


def preflight(config: TrainConfig, *, now: Callable[[], float] = time.time) -> str:
    """Checks this start's machines; all ranks call it, after `engine.init_distributed`, and get a line for the log, with warnings below it.

    Raises Ended on all ranks: of BAD_NODE with the nodes to leave out, DISK_FULL for the run directory, INPUT for what most nodes lack, and
    CORRUPT for a sum that came out wrong without telling where.

    Args:
        config: of a run directory that is there.
        now: this machine's clock.
    """
    started = time.perf_counter()
    meeting = rendezvous.of_process_group()
    need = needed(config, meeting.world_size, meeting.local_world_size)
    mine = asdict(inspect(config, meeting.rank, meeting.world_size, meeting.local_world_size))
    machines, warnings = meeting.ask(
        "preflight", mine, lambda said: judge_machines([Machine.parse(of) for of in said], need, meeting.local_world_size), PATIENCE
    )
    # All ranks have just heard an answer, so they are ready for a message of rank 0 with its time, and answer with their own
    sent = meeting.ask("clocks", None, lambda _: now(), PATIENCE)
    clocks, off = meeting.ask("clocks", [this_host(), now()], lambda said: judge_clocks(said, sent, now()), PATIENCE)
    summed = all_reduce(contribution(meeting.rank, FIRST_SUM // 4), meeting.world_size)
    sums = meeting.ask("all-reduce", [this_host(), *summed], lambda said: judge_sums(said, meeting.world_size), PATIENCE)
    line = f"preflight: {machines}; {clocks}; {sums}; {time.perf_counter() - started:.1f} s"
    return "\n".join([line, *(f"warning: {warning}" for warning in (*warnings, *off))])


def needed(config: TrainConfig, world_size: int, local_world_size: int) -> Need:
    """What a run takes."""
    size = checkpoint_bytes(config.model, config.optimizer)
    nodes = -(-world_size // local_world_size)
    windows = local_world_size * config.stream.buffer_bytes
    return Need(size, size // nodes + windows)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What a rank finds
# ---------------------------------------------------------------------------------------------------------------------------------------


def inspect(config: TrainConfig, rank: int, world_size: int, local_world_size: int) -> Machine:
    """This rank's device and, by a node's first rank, its memory and disks."""
    local_rank = rank % local_world_size
    fault, flops = check_device()
    device_free, device_total = torch.cuda.mem_get_info() if torch.cuda.is_available() and not fault else (0, 0)
    if local_rank:
        return Machine(this_host(), local_rank, fault, flops, device_free, device_total)
    nodes = -(-world_size // local_world_size)
    measures = rank // local_world_size in {writer * nodes // WRITERS for writer in range(WRITERS)}
    run = probe_disk(Path(config.out), PROBE if measures else 0)
    return Machine(this_host(), 0, fault, flops, device_free, device_total, available_memory(), _scratch(config), run)


def _scratch(config: TrainConfig) -> tuple[Disk, ...]:
    """The folders on the node's own disk that the run uses; the speed of a disk is measured once."""
    disks, measured = [], set()
    for setting in filter(None, (os.environ.get("TMPDIR", tempfile.gettempdir()), config.stage, config.cache)):
        folder = Path(setting)
        try:
            if setting in (config.stage, config.cache):
                folder.mkdir(parents=True, exist_ok=True)
            device = folder.stat().st_dev
        except OSError as error:
            disks.append(Disk(setting, fault=f"{setting} is not there ({error.strerror})"))
            continue
        disks.append(probe_disk(folder, 0 if device in measured else PROBE))
        measured.add(device)
    return tuple(disks)


def check_device() -> tuple[str, float]:
    """What is wrong with this rank's device, and its FLOP/s in bf16 on a GPU (0 elsewhere).

    Products of matrices of -1, 0 and 1, whose elements are whole numbers below 256 in any order of summation, so that fp32, TF32 and bf16
    all give them exactly; they are held against a vector's product by the one matrix and then the other, in fp64 on the CPU (Freivalds).
    """
    on_gpu = torch.cuda.is_available()
    generator, side = torch.Generator().manual_seed(0), 2048 if on_gpu else 256
    left, right = (torch.randint(-1, 2, (side, side), generator=generator) for _ in range(2))
    probe = torch.randint(-1000, 1000, (side, 1), generator=generator).double()
    expected = left.double() @ (right.double() @ probe)
    try:
        seconds = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (matrix.to("cuda" if on_gpu else "cpu", dtype) for matrix in (left, right))
            product = a @ b
            if not torch.equal(product.cpu().double() @ probe, expected):
                return f"a product of matrices in {str(dtype).removeprefix('torch.')} comes out wrong", 0.0
            if on_gpu:  # under load, so that a device that errs now and then has a chance to
                torch.cuda.synchronize()
                started = time.perf_counter()
                again = [a @ b for _ in range(50)]
                torch.cuda.synchronize()
                seconds = (time.perf_counter() - started) / len(again)
                if not all(torch.equal(one, product) for one in again):
                    return f"a product of matrices in {str(dtype).removeprefix('torch.')} comes out wrong now and then", 0.0
        return "", 2 * side**3 / seconds if on_gpu else 0.0
    except RuntimeError as error:
        return f"it cannot multiply matrices ({str(error).partition(chr(10))[0]})", 0.0


def contribution(rank: int, length: int) -> Tensor:
    """What a rank adds to the sum: whole numbers, whose sums over 200,000 ranks fp32 holds exactly."""
    return ((torch.arange(length) + rank) % 61).float()


def wrong_elements(total: Tensor, world_size: int) -> int:
    """How many elements of a sum of all ranks' contributions are not what they must be."""
    by_residue = ((torch.arange(61)[:, None] + torch.arange(world_size)) % 61).sum(1).float()
    expected = by_residue[torch.arange(total.numel()) % 61].to(total.device)
    return int((total != expected).sum())


def all_reduce(mine: Tensor, world_size: int) -> tuple[int, float]:
    """Sums the ranks' contributions: how many elements are wrong (-1: it did not end), and the bytes a second of each rank's links."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    total = mine.to(where)
    work = dist.all_reduce(total, async_op=True)
    deadline = time.monotonic() + SUM_SECONDS
    while work is not None and not work.is_completed():  # a wait would end the process where NCCL gives up
        if time.monotonic() > deadline:
            return -1, 0.0
        time.sleep(0.001)
    if work is not None:
        work.wait()
    if wrong := wrong_elements(total, world_size):
        return wrong, 0.0
    timed = torch.zeros((TIMED_SUM if where == "cuda" else FIRST_SUM) // 4, device=where)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        dist.all_reduce(timed)
        if where == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 0, 2 * (world_size - 1) / world_size * timed.nbytes / statistics.median(seconds)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What rank 0 makes of it: pure functions of what all ranks say
# ---------------------------------------------------------------------------------------------------------------------------------------


def judge_machines(machines: Sequence[Machine], need: Need, local_world_size: int) -> tuple[str, list[str]]:
    """The figures in words, and warnings. Raises Ended where a node is bad, or the run directory is full."""
    bad: dict[str, list[str]] = defaultdict(list)
    warnings = []
    leaders = [of for of in machines if of.local_rank == 0]
    hosts = list(dict.fromkeys(of.host for of in machines))
    usual_free = statistics.median(of.device_free for of in machines)
    usual_flops = statistics.median(of.flops for of in machines)
    for of in machines:
        device = f"GPU {of.local_rank}" if of.device_total else f"the device of local rank {of.local_rank}"
        if of.device_fault:
            bad[of.host].append(f"{device}: {of.device_fault}")
        elif of.device_free < usual_free - DEVICE_MEMORY_SLACK * of.device_total:
            bad[of.host].append(f"{device}: {size(of.device_free)} of its {size(of.device_total)} are free, on others {size(usual_free)}")
        elif of.device_free < DEVICE_MEMORY_SHARE * of.device_total:
            warnings.append(f"{of.host}, {device}: only {size(of.device_free)} of its {size(of.device_total)} are free")
        if of.flops < SLOW_DEVICE * usual_flops:
            warnings.append(f"{of.host}, {device}: {of.flops / 1e12:.0f} TFLOP/s, others {usual_flops / 1e12:.0f}")
    for of in leaders:
        if of.memory < MEMORY_A_RANK * local_world_size:
            bad[of.host].append(f"{size(of.memory)} of memory free for {local_world_size} ranks, {size(MEMORY_A_RANK)} each are needed")
        for disk in of.scratch:
            if disk.fault:
                bad[of.host].append(f"scratch: {disk.fault}")
            warnings += [f"{of.host}: {told}" for told in _scarce(disk, LITTLE_SCRATCH)]
        if of.run and of.run.fault and not of.run.full:
            bad[of.host].append(f"run directory: {of.run.fault}")
    runs = [of.run for of in leaders if of.run]
    if full := next((run for run in runs if run.full), None):
        raise Ended(Cause.DISK_FULL, f"the run directory's disk or quota: {full.fault}; a checkpoint takes {size(need.checkpoint)}")
    _end_if_bad(bad, hosts)
    tightest, least = min(runs, key=lambda run: run.free_bytes), min(leaders, key=lambda of: of.memory)
    warnings += [f"run directory: {told}" for told in _scarce(tightest, need.checkpoint, "; a checkpoint takes ")]
    if least.memory < need.memory:
        warnings.append(f"{least.host}: {size(least.memory)} of memory free; a snapshot's share and full windows take {size(need.memory)}")
    slowest = min((run for run in runs if run.rate), key=lambda run: run.rate, default=None)
    if slowest and slowest.rate < SLOW_DISK:
        warnings.append(f"run directory: {size(slowest.rate)}/s; a checkpoint of {size(need.checkpoint)} takes long")
    figures = [f"{counted(len(leaders), 'node')} of {counted(local_world_size, 'rank')}"]
    if usual_flops:
        figures.append(f"products {usual_flops / 1e12:.0f} TFLOP/s (slowest {min(of.flops for of in machines) / 1e12:.0f})")
        figures.append(f"{size(min(of.device_free for of in machines))} of device memory free")
    figures.append(f"{size(least.memory)} of memory free")
    figures.append(f"run directory {Disk('', tightest.free_bytes, rate=slowest.rate if slowest else 0).told()}")
    if scratch := [disk for of in leaders for disk in of.scratch]:
        rate = min((disk.rate for disk in scratch if disk.rate), default=0.0)
        figures.append(f"scratch {Disk('', min(disk.free_bytes for disk in scratch), rate=rate).told()}")
    return ", ".join(figures), warnings


def _scarce(disk: Disk, least: int, why: str = "") -> list[str]:
    """What of a disk may run out soon."""
    told = []
    if not disk.fault and disk.free_bytes < least:
        told.append(f"{disk.folder} has only {size(disk.free_bytes)} free{f'{why}{size(least)}' if why else ''}")
    if disk.free_files is not None and not disk.fault and disk.free_files < FEW_FILES:
        told.append(f"{disk.folder} takes only {disk.free_files:,} files more")
    return told


def judge_clocks(said: Sequence[tuple[str, float]], sent: float, received: float) -> tuple[str, list[str]]:
    """How far clocks differ, in words, and warnings. Raises Ended where a node's is off.

    Rank 0 sent its time, each rank said its own on hearing it, and by `received` rank 0 had all: a clock that shows t then is off by
    something in [t - received, t - sent]. Only what is certain by that is held against it. The middle one of all clocks is right.
    """
    offsets = {host: time_ - (sent + received) / 2 for host, time_ in said}
    unsure = (received - sent) / 2
    middle = sorted(offsets.values())
    right = min(middle[(len(middle) - 1) // 2], middle[len(middle) // 2], key=abs)  # of two, rank 0's
    off = {host: max(0.0, abs(offset - right) - unsure) for host, offset in offsets.items()}
    bad = {host: [f"its clock is off by {by:.0f} s"] for host, by in off.items() if by > CLOCK_BAD}
    _end_if_bad(bad, list(offsets))
    warnings = [f"{host}: its clock is off by {by:.1f} s; times in logs will mislead" for host, by in off.items() if by > CLOCK_TOLD]
    return f"clocks agree within {max(off.values()) + 2 * unsure:.2f} s", warnings


def judge_sums(said: Sequence[tuple[str, int, float]], world_size: int) -> str:
    """The all-reduce in words. Raises Ended where it did not end, or came out wrong on any rank."""
    stuck = [rank for rank, (_, wrong, _) in enumerate(said) if wrong < 0]
    if stuck:
        raise Ended(
            Cause.LOST_PEER, f"the first all-reduce did not end within {SUM_SECONDS:g} s on ranks {rendezvous.spans(stuck)} of {world_size}"
        )
    hosts = list(dict.fromkeys(host for host, wrong, _ in said if wrong))
    if hosts:
        ranks = rendezvous.spans([rank for rank, (_, wrong, _) in enumerate(said) if wrong])
        words = (
            f"an all-reduce of {FIRST_SUM // 4:,} numbers came out wrong in {max(wrong for _, wrong, _ in said):,} of them on rank {ranks}"
        )
        if len(hosts) == 1 and world_size > 1 and len({host for host, _, _ in said}) > 1:
            raise Ended(Cause.BAD_NODE, f"{words}, all on {hosts[0]}", bad_nodes=(hosts[0],))
        raise Ended(Cause.CORRUPT, f"{words}; which machine is at fault is not known")
    rate = min(rate for _, _, rate in said)
    return f"all-reduce right, {size(rate)}/s" if world_size > 1 else "no other rank to reduce with"


def _end_if_bad(bad: Mapping[str, Sequence[str]], hosts: Sequence[str]) -> None:
    if not bad:
        return
    told = [f"{host}: {', '.join(faults)}" for host, faults in bad.items()]
    if len(hosts) > 1 and 2 * len(bad) > len(hosts):
        raise Ended(Cause.INPUT, f"{len(bad)} of {len(hosts)} nodes fail preflight, so it is not the nodes: {told[0]}")
    more = f"; and {len(told) - 10} more" if len(told) > 10 else ""
    raise Ended(Cause.BAD_NODE, f"preflight: {'; '.join(told[:10])}{more}", bad_nodes=tuple(bad))


def main() -> None:
    """The program."""
    started = time.perf_counter()
    importlib.import_module("vitscale.engine")  # and with it DeepSpeed

    seconds = time.perf_counter() - started
    faults = []
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        faults += [f"GPU {index}: {fault}" for fault in check_device()[:1] if fault]
    if not torch.cuda.is_available():
        faults += [fault for fault in check_device()[:1] if fault]
    told = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "import_seconds": seconds,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "faults": faults,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
