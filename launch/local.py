"""A run's processes on one machine: starts one a rank, and ends them all when one dies or the user asks.

A rank's output goes to RUN/logs/, a file a node and a start; rank 0 gets the user's terminal for its progress lines. What ended a rank, it
writes to a file of its own, from which the one line or the traceback is shown.
"""

import contextlib
import itertools
import math
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from data_tools.errors import UserError


class LaunchError(UserError):
    """A rank ended badly; the message is what it said, one line or a traceback."""


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


def run_ranks(run: Path, nproc: int, lock: TextIO, terminal: TextIO) -> None:
    """Trains RUN on `nproc` ranks and waits for them; rank 0 writes its progress to `terminal`.

    The ranks inherit the run's `lock`, so that it is held as long as any of them lives. Raises LaunchError where a rank fails. However it
    ends, all ranks have ended.
    """
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"node-0000-start-{len(list(logs.glob('node-0000-start-*.log'))):03d}.log"
    port = free_port()
    terminal_fd = os.dup(terminal.fileno())
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as errors, open(log, "ab", buffering=0) as output:
        error_files = [Path(errors) / f"rank-{rank}" for rank in range(nproc)]
        try:
            for rank in range(nproc):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "vitscale.train", str(run)],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=os.environ | _environment(rank, nproc, port, error_files[rank], terminal_fd),
                        pass_fds=(terminal_fd, lock.fileno()),
                        start_new_session=True,  # the user's Ctrl-C reaches the launcher alone, which ends the ranks in order
                    )
                )
            ended_badly = _wait(ranks)
        finally:
            _end(ranks)
            os.close(terminal_fd)
        if ended_badly:
            failed = min(ended_badly, key=lambda rank: _cause(ranks[rank].returncode, error_files[rank]))
            raise LaunchError(f"{_last_words(ranks[failed].returncode, error_files[failed])}\n(rank {failed}; all output is in {log})")


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Returns the ranks that were found to have failed first, one or some at once, or none when all are done."""
    poll = select.poll()
    running = {os.pidfd_open(process.pid): rank for rank, process in enumerate(ranks)}
    for descriptor in running:
        poll.register(descriptor, select.POLLIN)
    try:
        while running:
            ended = []
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                ended.append(running.pop(descriptor))
                os.close(descriptor)
            if failed := [rank for rank in ended if ranks[rank].wait() != 0]:
                return failed
        return []
    finally:
        for descriptor in running:
            os.close(descriptor)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ends the ranks that still run. Nothing of theirs is lost by a kill: a checkpoint counts only once it is committed."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _cause(status: int, error_file: Path) -> tuple[bool, float]:
    """Sorts ranks that failed together: a killed one first, then by when they said why. The others failed for want of the first."""
    return status >= 0, error_file.stat().st_mtime if error_file.is_file() else math.inf


def _last_words(status: int, error_file: Path) -> str:
    if error_file.is_file():
        return error_file.read_text().rstrip()
    return f"error: a rank was killed by {signal.Signals(-status).name}" if status < 0 else f"error: a rank ended with status {status}"


def _environment(rank: int, nproc: int, port: int, error_file: Path, terminal_fd: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "VITSCALE_ERROR_FILE": str(error_file),
        "VITSCALE_LAUNCHER_PID": str(os.getpid()),
    }
    return environment | ({"VITSCALE_TERMINAL_FD": str(terminal_fd)} if rank == 0 else {})


def free_port() -> int:
    """A port for the ranks to meet at: below the range from which the system hands out ports, so that nobody takes it meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
