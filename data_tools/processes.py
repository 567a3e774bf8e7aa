"""Work shared out to processes that end with the one that started them, and what processes on shared cores are told.

Where it stands: `pack.py` writes shards with it, `index.py` reads tars, `dedup.py` hashes pictures.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Tell = Callable[[int], None]  # is called for each step of the work, with a number to add up
Work = Callable[[Item, Tell], object]


def spin_little(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment for OpenMP's threads to give way soon where others want their cores; nothing where the user has a say.

    libgomp, which torch's wheels bring, has a thread that waits spin for 300,000 rounds before it sleeps (GOMP_SPINCOUNT in its manual).
    Where two processes share cores, as ranks, loaders and other people's jobs do, each waits so for threads of the other, and both crawl
    (docs/log.md).
    """
    return {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys() else {"GOMP_SPINCOUNT": "1000"}


def in_processes(count: int, work: Work[Item], todo: Sequence[Item], tell: Callable[[int, int], None]) -> None:
    """Shares the items out to processes, each taking the next one that nobody has; however it ends, all processes have ended.

    Args:
        count: of processes.
        work: what to do with an item; must be picklable.
        todo: the items.
        tell: is called with the steps that were done since the last call, and the sum of their numbers.
    """
    context = multiprocessing.get_context("spawn")  # pyarrow's threads do not survive a fork
    following = context.Value("q", 0)
    processes, told = [], []
    try:
        for _ in range(count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(there, os.getpid(), following, work, todo), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            told.append(here)
        open_pipes = list(told)
        while open_pipes:
            for pipe in wait(open_pipes):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except EOFError:
                    open_pipes.remove(pipe)
                    process = processes[told.index(pipe)]
                    process.join()
                    if process.exitcode:
                        raise OSError(f"a worker process ended with status {process.exitcode}; the same command goes on") from None
                    continue
                if isinstance(said, BaseException):
                    raise said
                tell(*said)
    finally:
        for process in processes:
            process.kill()
            process.join()


def die_with(parent: int) -> None:
    """Lets this process be killed when the one that started it ends, so that nobody is left behind who writes on."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before this line
        os._exit(1)


def _work(told: Connection, parent: int, following: Any, work: Work[Item], todo: Sequence[Item]) -> None:
    """One process: does the items that it gets hold of."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends all
    warnings.filterwarnings("ignore", module="PIL")
    counts = [0, 0]

    def tell(number: int) -> None:
        counts[0] += 1
        counts[1] += number
        if counts[0] == 100:  # a message a step would cost more than the step
            send()

    def send() -> None:
        told.send(tuple(counts))
        counts[:] = 0, 0

    try:
        while True:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= len(todo):
                return
            work(todo[number], tell)
            send()
    except BaseException as error:
        told.send(error)
