"""Processes of this machine as ranks: started with what `torch.distributed` reads, waited for, and ended together.

Where it stands: `local.py` runs a run's by `to_the_end`, `evaluation.py` an evaluation's by `run_ranks`. A rank leaves why it failed as an
end record (`vitscale.ending`); one that could not is given one here.
"""

import contextlib
import itertools
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from launch.flags import UsageError
from launch.terminal import LaunchError
from vitscale.ending import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_STOPPED, Cause, End, killed_by, read_ends, write_end
from vitscale.machine import this_host
from vitscale.run import reached

_GRACE_MS = 10_000  # for the cause to show, once a rank has said no more than that another one went away


def visible_gpus() -> int:
    """GPUs that processes started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",")]
        return len(list(itertools.takewhile(lambda device: device not in ("", "-1"), devices)))  # CUDA's rule: what follows is not seen
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ")


def rank_count(nproc: int, gpus: int) -> int:
    """How many ranks a machine of so many GPUs has where `nproc` are asked for: 0 is one a GPU, or one. Raises UsageError."""
    if nproc < 0 or (gpus and nproc > gpus):
        most = f"1 to {gpus}, the GPUs that there are" if gpus else "1 or more"
        raise UsageError(f"nproc={nproc} must be 0, which starts one a GPU, or {most}")
    return nproc or max(1, gpus)


@dataclass
class Stop:
    """Signals that ask a command with ranks to stop: at one they save, at a second one all ends at once, as a KeyboardInterrupt."""

    saves: bool = True
    """Whether the ranks have something to save; where not, all ends at the first signal."""
    signals: list[int] = field(default_factory=list)
    deferred: bool = False
    """Whether who waits for the ranks looks at `ends`: raised in the middle of Popen's methods, it would leave their lock held."""

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        self.signals.append(number)
        if self.ends and not self.deferred:
            raise KeyboardInterrupt
        if not self.ends:
            print("\nstopping: the ranks save at their next step; once more ends them at once", file=sys.stderr, flush=True)

    @property
    def ends(self) -> bool:
        """Whether all is to end at once."""
        return len(self.signals) > self.saves

    @property
    def exit_status(self) -> int:
        """Of a command that stopped so."""
        return EXIT_INTERRUPTED if signal.SIGINT in self.signals else EXIT_STOPPED


@contextmanager
def stopping(*, saves: bool = True) -> Iterator[Stop]:
    """Takes note of Ctrl-C and TERM; where ranks have nothing to save, the handlers of before hear of them once the ranks have ended."""
    stop = Stop(saves)
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        if saves:
            sys.exit(stop.exit_status)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.signals and saves:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command ends: one that came now would change its exit status alone
        elif stop.signals:
            if before[signal.Signals(stop.signals[0])] is signal.SIG_DFL:
                sys.exit(128 + stop.signals[0])  # as a shell has it; a death by the signal would leave files behind
            signal.raise_signal(stop.signals[0])


def run_ranks(command: Sequence[str], nproc: int, folder: Path) -> None:
    """Runs a command once on `nproc` ranks of this machine, to the end of all; however it ends, all have ended.

    Rank 0 has this process's error stream for its progress. A rank that fails leaves its end record in the folder, as in a run's; raises
    LaunchError with what the first one said.
    """
    with contextlib.ExitStack() as logs, stopping(saves=False) as stop:
        files = [logs.enter_context(open(folder / f"rank-{rank}.log", "wb")) for rank in range(nproc)]
        outputs = [(file, file if rank else None) for rank, file in enumerate(files)]
        _, failed = to_the_end(command, folder, 0, outputs, stop, of_first={})
    if failed:
        first = read_ends(folder, 0)[0]
        where = "" if first.cause in (Cause.INPUT, Cause.KILLED) else f"\n(rank {first.rank} of {nproc})"
        raise LaunchError(f"{first.words.rstrip()}{where}")


def to_the_end(
    command: Sequence[str], folder: Path, start: int, outputs: Sequence[tuple[IO[bytes], IO[bytes] | None]], stop: Stop, *,
    of_first: dict[str, str], pass_fds: tuple[int, ...] = (),
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Runs a command on so many ranks of this machine as have outputs; however it ends, all have ended.

    Returns the exit statuses of all, and the ranks that failed first, as `_wait` has them.

    Args:
        folder, start: where a rank leaves its end record.
        outputs: of each rank the files for its standard output and its errors; None: this process's.
        stop: at a signal the ranks are asked to save; where it `ends`, this raises KeyboardInterrupt.
        of_first: what rank 0 alone has in its environment.
        pass_fds: descriptors that all inherit.
    """
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    stop.deferred = True
    try:
        for rank, (output, errors) in enumerate(outputs):
            ranks.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=os.environ | _environment(rank, len(outputs), port) | (of_first if rank == 0 else {}),
                    pass_fds=pass_fds,
                    start_new_session=True,  # the user's Ctrl-C reaches the launcher alone, which ends the ranks in order
                )
            )
        failed = _wait(folder, start, ranks, stop)
    finally:
        _end(ranks)
        stop.deferred = False
    return [process.returncode for process in ranks], failed


def _wait(run: Path, start: int, ranks: list[subprocess.Popen[bytes]], stop: Stop) -> list[int]:
    """Returns the ranks that failed first, once one of them is known to be the cause, or none when all have ended well.

    One that left no record is given one. At a signal that `stop` has noted the ranks are asked to save; where it `ends`, this raises
    KeyboardInterrupt.
    """
    running = {os.pidfd_open(process.pid): rank for rank, process in enumerate(ranks)}
    failed: list[int] = []
    told = False
    try:
        with _signals() as signals:
            poll = select.poll()
            for descriptor in (signals, *running):
                poll.register(descriptor, select.POLLIN)
            while running:
                if stop.ends:
                    raise KeyboardInterrupt
                if stop.signals and not told:
                    told = True
                    for process in ranks:
                        process.send_signal(signal.SIGTERM)  # nothing is sent to one that was waited for
                ready = [descriptor for descriptor, _ in poll.poll(_GRACE_MS if failed else None)]
                if signals in ready:
                    os.read(signals, 1024)
                    continue  # to hear of it first: a rank that it ended has not failed, and stays ready
                for descriptor in [one for one in ready if one in running]:
                    poll.unregister(descriptor)
                    rank = running.pop(descriptor)
                    os.close(descriptor)
                    status = ranks[rank].wait()
                    if status not in (EXIT_FINISHED, EXIT_STOPPED):
                        failed.append(rank)
                        _see_to_a_record(run, start, rank, status)
                if failed and (not ready or any(end.cause is not Cause.LOST_PEER for end in read_ends(run, start))):
                    break
        return failed
    finally:
        for descriptor in running:
            os.close(descriptor)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that can be read once a signal with a handler has come.

    One that comes between Python's last look for signals and poll(2) does not interrupt poll(2): its handler would wait until a rank ends.
    """
    signals, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(write)
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(before)
        os.close(signals)
        os.close(write)


def _see_to_a_record(run: Path, start: int, rank: int, status: int) -> None:
    """Writes an end record for a rank that could not, or leaves the one that is there."""
    name = killed_by(status)
    words = f"error: rank {rank} was killed by SIG{name}" if name else f"error: rank {rank} ended with status {status} and without a word"
    cause = Cause.KILLED if name else Cause.ERROR
    write_end(run, End(cause, words, start, rank, 0, this_host(), time.time(), reached(run), signal=name))


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ends the ranks that still run. Nothing of theirs is lost by a kill: a checkpoint counts only once it is committed."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "VITSCALE_LAUNCHER_PID": str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # a run's folder named as a module of somebody else's would be imported from where the command was given
    }


def free_port() -> int:
    """A port for the ranks to meet at: below the range from which the system hands out ports, so that nobody takes it meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
