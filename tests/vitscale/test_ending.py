"""Why a rank ended: its cause, its words, and its record."""

import errno
import resource
from pathlib import Path

import pytest

from data_tools.errors import UserError
from vitscale.ending import Cause, End, Ended, cause_of, is_its_own, killed_by, read_ends, words_of, write_end


def end(cause: Cause, *, rank: int = 0, host: str = "n1", at: float = 100.0, **more) -> End:
    return End(cause, f"error: {cause}", 3, rank, 0, host, at, 57, **more)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("steps=0"), Cause.INPUT),
        (UserError("x cannot be written (No space left on device (os error 28))"), Cause.DISK_FULL),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.DISK_FULL),
        (OSError(errno.EFBIG, "File too large"), Cause.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Cause.DISK_FULL),
        (OSError(errno.EIO, "Input/output error"), Cause.ERROR),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), Cause.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Cause.OUT_OF_MEMORY),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:48911"), Cause.LOST_PEER),
        (RuntimeError("[gloo] Read error [127.0.0.1]:18022: Connection reset by peer"), Cause.LOST_PEER),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), Cause.LOST_PEER),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Cause.ERROR),
        (ValueError("connection closed"), Cause.ERROR),
        (ZeroDivisionError(), Cause.ERROR),
        (Ended(Cause.SPIKE, "rolled back"), Cause.SPIKE),
    ],
)
def test_an_exception_has_a_cause(error: BaseException, cause: Cause) -> None:
    assert cause_of(error) is cause


def test_what_all_ranks_have_to_say_is_not_one_ranks() -> None:
    assert not is_its_own(Ended(Cause.NONFINITE, "of all ranks"))
    assert is_its_own(Ended(Cause.LOST_PEER, "of one", alone=True))
    assert is_its_own(Ended(Cause.CORRUPT, "of all, and each may be lost", bad_nodes=("n1",)))
    assert is_its_own(ValueError("of one"))


def test_a_fault_of_the_code_says_where_and_others_one_line() -> None:
    assert words_of(UserError("steps=0")) == "error: steps=0"
    assert words_of(Ended(Cause.SPIKE, "rolled back")) == "rolled back"
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError("by nought")
    assert words_of(caught.value).startswith("Traceback")
    assert words_of(caught.value).endswith("by nought")


@pytest.mark.parametrize(("status", "name"), [(-9, "KILL"), (137, "KILL"), (143, "TERM"), (1, ""), (75, ""), (0, ""), (255, "")])
def test_a_status_tells_of_a_signal(status: int, name: str) -> None:
    assert killed_by(status) == name


def test_records_are_read_with_the_cause_first(tmp_path: Path) -> None:
    told = [
        end(Cause.LOST_PEER, rank=0, at=1.0),
        end(Cause.HANG, rank=1, at=2.0),
        end(Cause.ERROR, rank=2, at=4.0),
        end(Cause.DISK_FULL, rank=3, at=3.0, bad_nodes=("n3",)),
    ]
    for of in told:
        write_end(tmp_path, of)
    write_end(tmp_path, end(Cause.INPUT, rank=0, at=0.0))
    assert read_ends(tmp_path, 3) == [told[3], told[2], told[1], told[0]], "the first record of a rank counts"
    assert read_ends(tmp_path, 2) == []
    (tmp_path / "ends" / "start-003-rank-00003.json").write_text('{"cause": "nothing"}')
    (tmp_path / "ends" / "start-003-rank-00002.json").write_text('{"cau')
    assert read_ends(tmp_path, 3) == [told[1], told[0]]


def test_a_record_that_a_full_disk_refuses_ends_nothing(tmp_path: Path) -> None:
    """The kernel refuses to write to any file here, standard error, which is a log there, included."""
    (tmp_path / "ends").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        write_end(tmp_path, end(Cause.DISK_FULL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "ends").iterdir())
