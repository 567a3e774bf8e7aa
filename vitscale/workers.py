"""Workers of the stream: threads of this process, or processes of their own that threads here hold the other end of.

    WorkerPool(work, 8)                  eight threads call `work`; decoding releases the GIL
    WorkerPool(work, 8, processes=True)  eight processes do, each spoken to by a thread of this one

`main` is one worker process.

Invariants: a task waits for what it needs without holding a worker; the first failure is known at once (`failure`); a process that dies is
told of with what ended it; nothing outlives the process (worker processes: the thread) that started it, and nobody waits for a thread
that is stuck in a read.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_tools.errors import UserError
from data_tools.processes import die_with

Uint8 = npt.NDArray[np.uint8]
Work = Callable[..., Any]
R = TypeVar("R")

_CHUNK = 16  # samples that a worker gets at once, at most: enough that handing them over costs nothing
_LOOK_EVERY = 0.5  # seconds between looks at whether a worker has died, while waiting for another one

# What a scheduler or a user sends to all processes of a job: ranks answer it, their workers go on until the rank ends them.
_SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerError(UserError):
    """A worker that died, or that cannot be started; the message is one line for the user."""


class WorkerPool:
    """Calls `work` in so many workers.

    Args:
        work: is called with a task's arguments; for processes it, the arguments and the results must be picklable, and the last argument of
            a task may be a `Shared`.
    """

    def __init__(self, work: Work, workers: int, *, processes: bool = False) -> None:
        self.processes = processes
        self.failure: BaseException | None = None
        """What went wrong first in any worker, though perhaps in a task whose turn is yet to come."""
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], tuple[Any, ...]]] | None] = queue.SimpleQueue()
        self._remotes: list[_Process] = [_Process(number, work) for number in range(workers)] if processes else []
        self._closed = False
        runs: Sequence[Work] = self._remotes or [work] * workers
        for number, run in enumerate(runs):
            threading.Thread(target=self._serve, args=(run,), name=f"stream-{number}", daemon=True).start()

    def submit(self, task: Callable[[], tuple[Any, ...]], after: Sequence[Future[Any]] = ()) -> Future[Any]:
        """The result of `work(*task())`, once all of `after` are done; `task` is called then, and raises if they failed."""
        future: Future[Any] = Future()
        left, waiting = [len(after)], [(future, task)]
        lock = threading.Lock()

        def done(_: object) -> None:
            with lock:
                left[0] -= 1
                ready = left[0] == 0
            if ready:  # popped, as a future never lets go of `done`: with the task it would hold, in a circle, what was waited for
                self._tasks.put(waiting.pop())

        if not after:
            self._tasks.put((future, task))
        for needed in after:
            needed.add_done_callback(done)
        return future

    def results(self, futures: Sequence[Future[R]], timeout: float, stalled: Callable[[], Exception]) -> list[R]:
        """What became of some tasks. A failure of any other one is raised at once, `stalled()` where all of them take longer than that."""
        end = time.monotonic() + timeout
        for future in futures:
            while not future.done():
                if self.failure is not None:  # perhaps of a later micro-batch: why wait for its turn?
                    raise self.failure
                if time.monotonic() > end:
                    raise stalled()
                wait([future], timeout=_LOOK_EVERY)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends all workers without waiting for those that are busy; what they have not begun fails."""
        self._closed = True
        for remote in self._remotes:
            remote.kill()
        self._tasks.put(None)

    def _serve(self, run: Work) -> None:
        while (item := self._tasks.get()) is not None:
            future, task = item
            try:
                if self._closed:
                    raise WorkerError("the workers have been closed")
                future.set_result(run(*task()))
            except BaseException as error:
                if self.failure is None and not self._closed:
                    self.failure = error
                future.set_exception(error)
            del item, future, task  # or they, and all that they hold, would live until the next task comes
        self._tasks.put(None)  # for the next worker


def worker_count(asked: int) -> int:
    """Workers to decode with: as many as asked for, or the cores this process may use, at most 8."""
    return asked or min(8, len(os.sched_getaffinity(0)))


def chunks(size: int, workers: int) -> list[tuple[int, int]]:
    """Where the parts of a micro-batch begin and end that workers get one by one: an equal share each, if that is not too many."""
    step = min(_CHUNK, -(-size // workers))
    return [(first, min(first + step, size)) for first in range(0, size, step)]


class Shared:
    """Memory that worker processes reach too: no file system holds it, and it goes with the last process that has it mapped."""

    _fd = -1

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("vitscale")
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size) if size else b""
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        """Where another process of this user opens it, as long as this object lives."""

    def array(self) -> Uint8:
        """All of it, without a copy; lives on when this object does not."""
        return np.frombuffer(self._map, dtype=np.uint8)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch's pixels: what a worker writes into, here or in another process."""

    array: Uint8
    memory: Shared | None
    """Where it lies, if other processes are to reach it."""
    offset: int = 0
    """In bytes, of the array in that memory."""

    @classmethod
    def new(cls, shape: tuple[int, ...], shared: bool) -> Rows:
        """All rows of a batch, with whatever was in memory."""
        memory = Shared(math.prod(shape)) if shared else None
        return cls(memory.array().reshape(shape) if memory else np.empty(shape, np.uint8), memory)

    def part(self, first: int, end: int) -> Rows:
        """The rows [first, end)."""
        return Rows(self.array[first:end], self.memory, self.offset + first * math.prod(self.array.shape[1:]))

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.memory is not None
        return _attached, (self.memory.path, self.array.shape, self.offset)


def _attached(path: str, shape: tuple[int, ...], offset: int) -> Rows:
    file = os.open(path, os.O_RDWR)
    try:
        whole = mmap.mmap(file, 0)
    finally:
        os.close(file)
    return Rows(np.frombuffer(whole, np.uint8, count=math.prod(shape), offset=offset).reshape(shape), None)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------------------------

_PROGRAM = "from vitscale.workers import main; main()"  # not `-m`, whose classes are those of a module of another name


class _Process:
    """This process's end of a worker process; called, it has the work done there."""

    def __init__(self, number: int, work: Work) -> None:
        self._number = number
        here, there = socket.socketpair()
        with there:
            # Not `multiprocessing`, whose processes import the program anew: for a rank that is torch and DeepSpeed
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(there.fileno()), str(os.getpid())], pass_fds=(there.fileno(),)
            )
        self._pipe = Connection(here.detach())
        self._ended_here = False
        self._send(pickle.dumps(work))

    def __call__(self, *task: Any) -> Any:
        self._send(pickle.dumps(task))
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(result, BaseException):
            raise result
        return result

    def kill(self) -> None:
        """Ends the process; a thread that waits for its answer is told so."""
        self._ended_here = True
        self._process.kill()
        self._process.wait()

    def _send(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError:
            raise self._death() from None

    def _death(self) -> WorkerError:
        status = self._process.wait()
        if status >= 0:
            how = f"ended with status {status}; its last words are above"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL and not self._ended_here:
                how += ", as the system does where memory runs out; fewer --stream.workers or a smaller --stream.prefetch take less"
        return WorkerError(f"data worker {self._number} (process {self._process.pid}) {how}")


def main() -> None:
    """One worker process: the first message is the work, each other one a task, and the end of the pipe is the end."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    for number in _SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    pipe = Connection(descriptor)
    try:
        work = pickle.loads(pipe.recv_bytes())
        while True:
            task = pickle.loads(pipe.recv_bytes())
            try:
                result = work(*task)
            except Exception as error:
                error.__traceback__ = None
                result = error
                if not isinstance(error, UserError | OSError):
                    result = WorkerError(traceback.format_exc())
            pipe.send(result)
            del task, result
    except EOFError:
        pass
