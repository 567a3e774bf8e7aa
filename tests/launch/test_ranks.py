"""Processes of this machine as ranks: killed for real, and how many there are (`ranks.py`)."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.flags import UsageError
from launch.ranks import Stop, _wait, rank_count, visible_gpus

POLL = ("7", "73", "271")  # poll(2) and ppoll(2), as x86-64 and arm64 number them
RANKS = """
import os, signal, sys
from pathlib import Path
from launch.ranks import run_ranks
code = "import os, signal; print(os.getpid(), file=open('pids', 'w'), flush=True); DO; signal.pause()".replace("DO", sys.argv[1])
run_ranks([sys.executable, "-c", code], 2, Path("."))
"""

STOPPED_TWICE = """
import os, signal, subprocess, sys
from pathlib import Path
from launch.ranks import run_ranks, stopping, to_the_end

def second(frame, event, function):  # as one that comes right after a lock of Popen's was taken, once the first has come
    if event == "c_return" and getattr(function, "__name__", "") == "acquire" and frame.f_code.co_name == "_internal_poll":
        sys.setprofile(None)
        if sys.argv[2] == "dead":  # the rank, before its launcher looks at anything
            os.kill(frame.f_locals["self"].pid, signal.SIGTERM)
            os.waitid(os.P_PID, frame.f_locals["self"].pid, os.WEXITED | os.WNOWAIT)
        os.kill(os.getpid(), signal.SIGINT)

def first(number, frame):
    sys.setprofile(second)
    handler(number, frame)

def watched(number, to):  # a handler that is set for ranks is heard of by `second`, too
    global handler
    if number == signal.SIGINT and callable(to) and to is not default:
        handler, to = to, first
    return install(number, to)

install, default = signal.signal, signal.default_int_handler
signal.signal = watched
command = ["sh", "-c", "echo up > up; exec sleep infinity"]
try:
    if sys.argv[1] == "training":
        with stopping() as stop, open(os.devnull, "wb") as nothing:
            to_the_end(command, Path("."), 0, [(nothing, None)], stop, of_first={})
    else:
        run_ranks(command, 1, Path("."))
except (KeyboardInterrupt, SystemExit) as error:
    print("ended", getattr(error, "code", ""))
"""


def ranks(folder: Path, do: str) -> tuple["subprocess.Popen[str]", list[int]]:
    """A launcher of two ranks that do something and then wait for ever, and the ranks' pids, once both are there."""
    for name in ("pids", "go"):
        os.mkfifo(folder / name)
    launcher = subprocess.Popen([sys.executable, "-c", RANKS, do], cwd=folder, stderr=subprocess.PIPE, text=True)
    with open(os.open(folder / "pids", os.O_RDWR)) as told:  # which never ends, whoever closes it
        pids = [int(told.readline()) for _ in range(2)]
    return launcher, pids


def test_when_a_rank_is_killed_all_end_and_it_is_told_which(tmp_path: Path) -> None:
    launcher, pids = ranks(tmp_path, "os.environ['RANK'] == '1' and (open('go').read(), os.kill(os.getpid(), signal.SIGKILL))")
    (tmp_path / "go").write_text("")
    _, said = launcher.communicate()
    assert said.rstrip().endswith("LaunchError: error: rank 1 was killed by SIGKILL")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks_and_then_their_launcher(tmp_path: Path, number: signal.Signals, status: int) -> None:
    launcher, pids = ranks(tmp_path, "0")
    launcher.send_signal(number)
    assert launcher.wait() == status
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("of", "said"), [("training", "ended 130\n"), ("evaluation", "ended \n")])
@pytest.mark.parametrize("rank", ["alive", "dead"])
def test_a_second_ctrl_c_may_come_at_any_moment(tmp_path: Path, of: str, said: str, rank: str) -> None:
    """A rank that has ended by then has not failed: no record is made for it."""
    os.mkfifo(tmp_path / "up")
    launcher = subprocess.Popen([sys.executable, "-c", STOPPED_TWICE, of, rank], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    (tmp_path / "up").read_text()
    launcher.send_signal(signal.SIGINT)
    try:
        found, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert (launcher.returncode, found, (tmp_path / "ends").exists()) == (0, said, False)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_second_signal_ends_what_comes_before_the_ranks(number: signal.Signals, status: int) -> None:
    code = "from signal import raise_signal as come; from launch.ranks import stopping\nwith stopping(): come(N); print('one'); come(N)"
    launcher = subprocess.run([sys.executable, "-c", code.replace("N", str(int(number)))], capture_output=True, text=True, check=False)
    assert (launcher.returncode, launcher.stdout) == (status, "one\n"), launcher.stderr


def test_a_signal_that_does_not_interrupt_the_wait_ends_it(tmp_path: Path) -> None:
    """As one does that comes right before the wait begins: here another thread than the one that waits receives it."""
    rank: subprocess.Popen[bytes] = subprocess.Popen(["sleep", "infinity"])
    main = Path(f"/proc/self/task/{threading.get_native_id()}/syscall")

    def interrupt() -> None:
        while main.read_text().split()[0] not in POLL and rank.poll() is None:
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _wait(tmp_path, 1, [rank], Stop())
    finally:
        rank.kill()
        rank.wait()
        thread.join()


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("0,-1,1", 1), (" 0, 1", 2), ("GPU-8a,GPU-9b", 2)]
)
def test_visible_gpus_are_those_that_cuda_would_show(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


@pytest.mark.parametrize(("nproc", "gpus", "ranks"), [(0, 0, 1), (0, 8, 8), (3, 8, 3), (3, 0, 3), (8, 8, 8)])
def test_ranks_are_those_asked_for_or_one_a_gpu(nproc: int, gpus: int, ranks: int) -> None:
    assert rank_count(nproc, gpus) == ranks


@pytest.mark.parametrize(("nproc", "gpus", "most"), [(-1, 0, "1 or more"), (-1, 8, "1 to 8, the GPUs"), (9, 8, "1 to 8, the GPUs")])
def test_ranks_that_cannot_be_are_refused(nproc: int, gpus: int, most: str) -> None:
    with pytest.raises(UsageError, match=f"^nproc={nproc} must be 0, which starts one a GPU, or {most}"):
        rank_count(nproc, gpus)
