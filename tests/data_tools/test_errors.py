"""What errors say to a person (`errors.py`)."""

from pathlib import Path

import pytest

from data_tools.errors import UserError, message_of


def test_a_system_error_says_path_and_reason_without_a_number(tmp_path: Path) -> None:
    none, other = tmp_path / "none", tmp_path / "other"
    with pytest.raises(OSError, match="No such file") as caught:
        none.read_bytes()
    assert message_of(caught.value) == f"{none}: No such file or directory"
    with pytest.raises(OSError, match="No such file") as caught:
        none.rename(other)
    assert message_of(caught.value) == f"{none} -> {other}: No such file or directory"
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space") as caught:
        full.write(b"0")
    assert message_of(caught.value) == "No space left on device"


@pytest.mark.parametrize("error", [UserError("a line"), OSError("of a library"), ValueError("3 is odd")])
def test_other_errors_say_what_they_say(error: Exception) -> None:
    assert message_of(error) == str(error)
