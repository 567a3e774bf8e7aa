"""How far a long work is: in words, on a terminal and in a log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch import terminal
from launch.terminal import _Pace, progress_bar, told

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ((0, 10, 0, 0.0, "images", ""), "0 of 10"),
        ((2_500, 100_000, 500, 2.0, "images", "3 left out"), "2,500 of 100,000, 250 images/s, 0:06:30 left, 3 left out"),
        ((10, 20, 10, 4.0, "", ""), "10 of 20, 2.5/s, 0:00:04 left"),
        ((303_000_000, 303_000_000, 1, 1.0, "MB", ""), "303,000,000 of 303,000,000, 1.0 MB/s, 0:00:00 left"),
        ((5, 10, 0, 3.0, "images", "x"), "5 of 10, x"),
    ],
)
def test_in_words(state: tuple, words: str) -> None:
    assert told(*state) == words


def test_the_rate_is_that_of_this_start_and_lines_are_rare() -> None:
    now = [100.0]
    shown: list[str] = []
    pace = _Pace("images", 30.0, lambda done, total, said: shown.append(said), lambda: now[0])
    now[0] = 110.0  # a listing, say
    for done in range(1000, 2001):  # 1,000 were there already; eight a second
        pace.update(done, 2_000, "1 left out")
        now[0] += 0.125
    left = {20: "0:01:45", 50: "0:01:15", 80: "0:00:45", 110: "0:00:15"}
    assert shown == [f"{1000 + 8 * after:,} of 2,000, 8.0 images/s, {time} left, 1 left out" for after, time in left.items()]


def test_no_terminal_gets_lines_and_quiet_gets_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    for quiet in (False, True):
        with progress_bar("packing", quiet, "images") as update:
            update(1, 3)
            update(3, 3, "1 left out")
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert (lines[0] == "packing: 1 of 3") if not quiet else not lines
        assert quiet or re.fullmatch(r"packing: 3 of 3, [\d,]+ images/s, 0:00:00 left, 1 left out", lines[1])


def photographs(folder: Path) -> Path:
    file = io.BytesIO()
    Image.effect_noise((600, 600), 90).convert("RGB").save(file, "JPEG")
    for number in range(60):
        (folder / "src/a").mkdir(parents=True, exist_ok=True)
        (folder / f"src/a/{number}.jpg").write_bytes(file.getvalue() if number % 6 else b"no image")
    return folder / "src"


def test_a_pack_on_a_terminal_shows_rate_time_and_rejects(tmp_path: Path) -> None:
    source = photographs(tmp_path)
    leader, follower = pty.openpty()
    often = "import sys; from launch import main, terminal; terminal.DRAW_EVERY = 0; sys.exit(main.main())"
    command = [sys.executable, "-c", often, "pack", str(source), str(tmp_path / "out"), "--jobs", "1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=ROOT, stderr=follower, stdout=subprocess.PIPE, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65_536)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(leader)
    assert process.returncode == 0
    assert re.search(rb"60 of 60, [\d.,]+ images/s, 0:00:00 left, 10 left out", shown), shown
    assert " images/s" not in out


def test_a_short_pack_in_a_log_says_no_more_than_its_result(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("vitscale")), "pack", str(photographs(tmp_path)), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "10 not an image" in done.stdout
