"""Workers, threads and processes alike: results, failures, deaths, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.stream import StreamError, stalled
from vitscale.workers import Rows, Shared, WorkerError, WorkerPool, chunks

ROOT = Path(__file__).parents[2]


class Work:
    """Picklable; what worker processes import."""

    def __call__(self, number: int, rows: Rows | None = None) -> tuple[int, int]:
        if number == 13:
            raise ValueError("thirteen")
        if rows is not None:
            rows.array[:] = number
        if number == 99:
            threading.Event().wait()
        return number * number, os.getpid()


@pytest.fixture(params=["threads", "processes"])
def pool(request: pytest.FixtureRequest):
    pool = WorkerPool(Work(), 2, processes=request.param == "processes")
    yield pool
    pool.close()


def test_results_and_rows(pool: WorkerPool) -> None:
    rows = Rows.new((7, 2, 3, 3), shared=pool.processes)
    rows.array[:] = 0
    futures = [pool.submit(lambda i=i: (i, rows.part(i, i + 2))) for i in (1, 4)]
    assert [future.result()[0] for future in futures] == [1, 16]
    assert rows.array[:, 0, 0, 0].tolist() == [0, 1, 1, 0, 4, 4, 0]
    assert all((future.result()[1] != os.getpid()) == pool.processes for future in futures)


def test_a_task_waits_for_what_it_needs_without_a_worker(pool: WorkerPool) -> None:
    first: Future[int] = Future()
    second: Future[int] = Future()
    waiting = [pool.submit(lambda: (first.result() + second.result(),), after=[first, second]) for _ in range(5)]  # more than workers
    assert pool.submit(lambda: (3,)).result()[0] == 9
    second.set_result(2)
    assert not any(future.done() for future in waiting)
    first.set_result(3)
    assert [future.result()[0] for future in waiting] == [25] * 5


def test_a_failure_is_known_and_others_go_on(pool: WorkerPool) -> None:
    needed: Future[int] = Future()
    needed.set_exception(OSError("no such disk"))
    with pytest.raises(OSError, match="no such disk"):
        pool.submit(lambda: (needed.result(),), after=[needed]).result()
    assert isinstance(pool.failure, OSError)
    with pytest.raises((ValueError, WorkerError), match="thirteen"):
        pool.submit(lambda: (13,)).result()
    assert pool.submit(lambda: (5,)).result()[0] == 25
    assert isinstance(pool.failure, OSError), "the first one is what is told"


def test_what_a_task_needed_and_gave_is_let_go_when_it_is_done(pool: WorkerPool) -> None:
    """And not when its worker gets another one."""

    class Needed:
        number = 3

    needed, gone = Needed(), [threading.Event(), threading.Event()]
    done = pool.submit(lambda needed=needed: (needed.number,))
    assert done.result()[0] == 9
    weakref.finalize(needed, gone[0].set)
    weakref.finalize(done, gone[1].set)
    del needed, done
    assert [of.wait(10) for of in gone] == [True, True]


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_process_is_told_of(busy: bool) -> None:
    pool = WorkerPool(Work(), 1, processes=True)
    _, process = pool.submit(lambda: (1,)).result()
    waiting = pool.submit(lambda: (99,)) if busy else None
    os.kill(process, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"data worker 0 \(process {process}\) was killed by SIGKILL, as the system does where memory"):
        (waiting or pool.submit(lambda: (1,))).result(timeout=10)
    pool.close()


def test_signals_to_the_whole_job_leave_workers_alone() -> None:
    pool = WorkerPool(Work(), 1, processes=True)
    _, process = pool.submit(lambda: (1,)).result()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(process, number)
    assert pool.submit(lambda: (4,)).result() == (16, process)
    pool.close()


def test_closing_ends_stuck_workers() -> None:
    pool = WorkerPool(Work(), 2, processes=True)
    processes = {pool.submit(lambda: (1,)).result()[1] for _ in range(20)}
    stuck = [pool.submit(lambda: (99,)) for _ in range(2)]
    pool.close()
    for future in stuck:
        with pytest.raises(WorkerError, match=r"was killed by SIGKILL$|have been closed"):
            future.result(timeout=10)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "os._exit(0)", "raise SystemExit(3)"])
def test_workers_die_with_who_started_them(how: str) -> None:
    """One in the middle of a task that never ends, in which it has written its row, and one that waits for a task."""
    program = textwrap.dedent(f"""
        import os
        from tests.vitscale.test_workers import Work
        from vitscale.workers import Rows, WorkerPool
        pool = WorkerPool(Work(), 2, processes=True)
        print(*{{pool.submit(lambda: (1,)).result()[1] for _ in range(50)}}, flush=True)
        rows = Rows.new((1,), shared=True)
        rows.array[:] = 0
        pool.submit(lambda: (99, rows))
        while rows.array[0] != 99:
            os.sched_yield()
        {how}
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    processes = [int(word) for word in done.stdout.split()]
    assert processes, done.stderr
    for process in processes:
        file = Path(f"/proc/{process}/stat")
        while file.exists() and file.read_text().rpartition(")")[2].split()[0] not in "ZX":
            os.sched_yield()  # until the kernel has delivered; the suite's time-out is the bound


def test_workers_start_without_torch() -> None:
    """Or each would take seconds and hundreds of MB."""
    program = "import sys, vitscale.stream, vitscale.workers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "deepspeed", "safetensors"} & set(loaded)


def test_shared_memory_is_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    shared = Shared(1 << 20)
    shared.array()[:] = 7
    with open(shared.path, "rb") as other:
        assert other.read() == b"\7" * (1 << 20)
    array = shared.array()
    del shared
    assert array.sum() == 7 << 20, "who has the array keeps the memory"
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # a mapping holds a descriptor of its own
    del array
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(Shared(0).array(), np.empty(0, np.uint8))


@given(size=st.integers(1, 300), workers=st.integers(1, 40))
def test_chunks_cover_a_micro_batch(size: int, workers: int) -> None:
    """Each sample in one of them, in order; none is empty, over 16 or over a worker's equal share."""
    parts = chunks(size, workers)
    assert [i for first, end in parts for i in range(first, end)] == list(range(size))
    assert all(0 < end - first <= min(16, -(-size // workers)) for first, end in parts)
    assert len({end - first for first, end in parts[:-1]}) <= 1


def test_a_failure_in_a_later_chunk_is_told_at_once() -> None:
    """Though the micro-batch whose turn it is waits for a read that does not end."""
    never, failed = Future[None](), Future[None]()
    failed.set_exception(OSError("no such disk"))
    pool = WorkerPool(Future.result, 2)
    waits, later = pool.submit(lambda: (never,)), pool.submit(lambda: (failed,))
    with pytest.raises(OSError, match="no such disk"):
        later.result()
    with pytest.raises(OSError, match="no such disk"):
        pool.results([waits], 20, AssertionError)
    never.set_result(None)
    pool.close()


@pytest.mark.parametrize("timeout", [0.2, 3])
def test_a_read_that_does_not_end_is_waited_for_as_long_as_asked(timeout: float) -> None:
    never = Future[None]()
    pool = WorkerPool(Future.result, 1)
    begun = time.monotonic()
    with pytest.raises(StreamError, match=f"reading x has not ended for stream.read_timeout={timeout} seconds"):
        pool.results([pool.submit(lambda: (never,))] * 2, timeout, lambda: stalled("reading x", timeout))
    assert timeout <= time.monotonic() - begun < timeout + 2.5, "it is looked at twice a second"
    never.set_result(None)
    pool.close()
