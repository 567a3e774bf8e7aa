"""The cache: whatever is killed, damaged, full or shared, what comes out of it is what went in, and its folder keeps to the limit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_tools import cache as module
from data_tools.cache import BLOCK, CHUNK, LEAST, Cache, CacheError, cache_advice
from data_tools.dataset import Dataset

from .conftest import ROOT, contents

STORED = BLOCK + 8 * BLOCK // CHUNK
SIZE = 6 * BLOCK + 12_345  # of a tar


def tar(number: int) -> bytes:
    """A tar's bytes, quickly made, different everywhere."""
    return (np.arange(-(-SIZE // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * number)).tobytes()[:SIZE]


TARS = [tar(number) for number in range(5)]


def read(cache: Cache, number: int, start: int, end: int, asked: list[tuple[int, int]] | None = None, **how: bool) -> bytes:
    def fetch(first: int, last: int) -> bytes:
        if asked is not None:
            asked.append((first, last))
        return TARS[number][first:last]

    return cache.read(f"0123456789abcdef/{number:06d}", SIZE, start, end, fetch, **how)


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("vitscale-blocks/*/*/*") if path.is_file())


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in blocks(folder))


def test_any_range_is_the_tar_s_and_is_fetched_once(tmp_path: Path) -> None:
    cache, rng, asked = Cache(tmp_path, LEAST), random.Random(0), list[tuple[int, int]]()
    for _ in range(300):
        start = rng.choice([rng.randrange(SIZE), rng.randrange(SIZE // CHUNK) * CHUNK, rng.randrange(6) * BLOCK])
        end = min(SIZE, start + rng.choice([0, 1, 50_000, CHUNK, BLOCK, 3 * BLOCK]))
        assert read(cache, 0, start, end, asked) == TARS[0][start:end]
    assert read(cache, 0, 0, SIZE, asked) == TARS[0]
    assert sorted(asked) == [(first, min(first + BLOCK, SIZE)) for first in range(0, SIZE, BLOCK)]
    assert held(tmp_path) <= int((tmp_path / "vitscale-blocks/bytes").read_text().split()[1]) < LEAST
    again = pickle.loads(pickle.dumps(cache))
    assert read(again, 0, 0, SIZE, asked) == TARS[0]
    assert (again.hits, again.misses, len(asked)) == (7, 0, 7)


def test_a_damaged_block_is_fetched_again(tmp_path: Path) -> None:
    cache, rng = Cache(tmp_path, LEAST), random.Random(1)
    read(cache, 0, 0, SIZE)
    for _ in range(25):
        file = rng.choice(blocks(tmp_path))
        data = bytearray(file.read_bytes())
        how = rng.choice(["flip", "cut", "grow", "other", "empty"])
        if how == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[rng.randrange(len(data)) :]
        elif how == "grow":
            data += b"x"
        elif how == "other":  # a whole and sound block, in the wrong place
            data = bytearray(blocks(tmp_path)[0 if file != blocks(tmp_path)[0] else 1].read_bytes())
        else:
            data.clear()
        file.write_bytes(data)
        assert read(cache, 0, 0, SIZE) == TARS[0], how
        asked = list[tuple[int, int]]()
        assert read(cache, 0, 0, SIZE, asked) == TARS[0]
        assert asked == [], f"after {how} the good block is kept"
    assert held(tmp_path) <= LEAST


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LEAST)
    for number in (0, 1):
        read(cache, number, 0, SIZE)
    for age, file in enumerate(reversed(blocks(tmp_path))):
        os.utime(file, (1_000_000 + age, 1_000_000 + age))
    oldest = blocks(tmp_path)[-1]
    read(cache, 1, SIZE - 1, SIZE)  # the oldest is used again
    asked = list[tuple[int, int]]()
    read(cache, 2, 0, 3 * BLOCK)
    assert held(tmp_path) <= LEAST
    gone = {
        file
        for number in (0, 1)
        for file in [tmp_path / f"vitscale-blocks/0123456789abcdef/{number:06d}/{block:06d}" for block in range(7)]
    }
    gone -= set(blocks(tmp_path))
    assert gone
    assert gone <= {tmp_path / f"vitscale-blocks/0123456789abcdef/000001/{block:06d}" for block in range(6)}, (
        "of the others those that were older"
    )
    assert oldest.is_file()
    read(cache, 1, SIZE - 1, SIZE, asked)
    assert asked == []


def test_nothing_else_is_ever_removed(tmp_path: Path) -> None:
    """Whoever names their data folder as the cache by mistake loses nothing."""
    mine = [tmp_path / name for name in ("photos/cat/000001", "a/b/c/d", "vitscale-blocks/0123456789abcdef/000000/notes.txt")]
    for file in mine:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"mine" * 2**21)
        os.utime(file, (1, 1))
    (tmp_path / "vitscale-blocks" / "link").symlink_to(tmp_path / "photos")
    cache = Cache(tmp_path, LEAST)
    for number in range(5):
        read(cache, number, 0, SIZE)
    assert sum(file.name != "notes.txt" for file in blocks(tmp_path)) < 5 * 7, "room was made"
    assert all(file.read_bytes() == b"mine" * 2**21 for file in mine)


def test_threads_fetch_a_block_once(tmp_path: Path) -> None:
    cache, asked, together = Cache(tmp_path, LEAST), list[tuple[int, int]](), threading.Barrier(8)

    def one(_: int) -> bytes:
        together.wait()
        return read(cache, 3, 10, 50_000, asked)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(8))) == {TARS[3][10:50_000]}
    assert asked == [(0, BLOCK)]


def reads_at_random(folder: Path, limit: int, seed: int, count: int) -> int:
    """In a process of its own; returns how many bytes the folder held at most when it looked."""
    cache, rng, most = Cache(folder, limit), random.Random(seed), 0
    for _ in range(count):
        number, start = rng.randrange(5), rng.randrange(SIZE)
        end = min(SIZE, start + rng.choice([50_000, BLOCK]))
        assert read(cache, number, start, end) == TARS[number][start:end]
        try:
            most = max(most, held(folder))
        except FileNotFoundError:  # of a block that went while we looked
            continue
    return most


def test_two_processes_share_a_cache_and_its_limit(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        most = pool.starmap(reads_at_random, [(tmp_path, LEAST, seed, 80) for seed in range(2)])
    assert LEAST / 2 < max(most) <= LEAST + 2 * STORED, "but for the blocks that are being written"
    assert held(tmp_path) <= LEAST


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """Kills two processes that write the same blocks, over and over; what they leave is bounded and sound."""
    code = "import sys; from pathlib import Path; from tests.data_tools import test_cache as t; print(1, flush=True); "
    code += "t.reads_at_random(Path(sys.argv[1]), t.LEAST, int(sys.argv[2]), 10**6)"
    rng = random.Random(5)
    for _ in range(3):
        command = [sys.executable, "-c", code, str(tmp_path)]
        both = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, cwd=ROOT) for seed in range(2)]
        try:
            for process in both:
                assert process.stdout is not None
                assert process.stdout.readline() == b"1\n"
            steps = rng.randrange(1, 40)
            while steps and all(process.poll() is None for process in both):  # some blocks later, at whatever instant that is
                before = {file.name for file in tmp_path.glob("vitscale-blocks/*/*/*")}
                while {file.name for file in tmp_path.glob("vitscale-blocks/*/*/*")} == before and all(
                    process.poll() is None for process in both
                ):
                    pass
                steps -= 1
        finally:
            for process in both:
                process.kill()
                assert process.wait() == -signal.SIGKILL, "it read only what was right until then"
        assert held(tmp_path) <= LEAST + 2 * STORED
        cache = Cache(tmp_path, LEAST)
        for number in rng.sample(range(5), 2):
            assert read(cache, number, 0, SIZE) == TARS[number]
        assert held(tmp_path) <= LEAST + 2 * STORED
    assert blocks(tmp_path)
    cache = Cache(tmp_path, LEAST)
    for number in range(5):  # room is made, and what was being written goes
        read(cache, number, 0, SIZE)
    assert [file for file in blocks(tmp_path) if file.suffix == ".partial"] == []
    assert held(tmp_path) <= LEAST


def test_a_count_that_is_lost_or_of_another_start_of_the_machine(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LEAST)
    read(cache, 4, 0, SIZE)
    for number, wrong in enumerate(("", "garbage", "0000-another-boot 00000000000000000000")):
        cache = Cache(tmp_path, LEAST)
        (tmp_path / "vitscale-blocks/bytes").write_text(wrong)
        assert read(cache, number, 0, SIZE) == TARS[number]
        counted = int((tmp_path / "vitscale-blocks/bytes").read_text().split()[1])
        assert held(tmp_path) <= counted <= held(tmp_path) + module.REQUESTS * STORED, "those that were being written may count twice"
        assert held(tmp_path) <= LEAST


def test_the_folder_may_be_removed_while_it_is_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache, rng, done = Cache(tmp_path, LEAST), random.Random(0), threading.Event()

    def remove() -> None:
        while not done.is_set():
            shutil.rmtree(tmp_path / "vitscale-blocks", ignore_errors=True)

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove)
        for _ in range(100):
            number, start = rng.randrange(5), rng.randrange(SIZE - 50_000)
            assert read(cache, number, start, start + 50_000) == TARS[number][start : start + 50_000]
        done.set()
        removing.result()
    assert capfd.readouterr().err == ""
    asked = list[tuple[int, int]]()
    for _ in range(2):
        read(cache, 0, 0, 1, asked)
    assert len(asked) <= 1, "and it goes on"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_full_or_broken_disk_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: int
) -> None:  # fmt: skip
    cache = Cache(tmp_path, LEAST)
    read(cache, 0, 0, BLOCK)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(module.os, "write", full)
    for number in (0, 1, 0):
        assert read(cache, number, 0, SIZE) == TARS[number]
    monkeypatch.undo()
    said = capfd.readouterr().err
    assert said == f"warning: the cache {tmp_path} cannot be used ({os.strerror(error)}); this process goes on without it\n"
    assert read(Cache(tmp_path, LEAST), 1, 0, SIZE) == TARS[1]
    assert all(file.suffix != ".partial" for file in blocks(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache", LEAST)
    for _ in range(2):
        assert read(cache, 0, 5, BLOCK + 5) == TARS[0][5 : BLOCK + 5]
    assert capfd.readouterr().err.count("\n") == 1


def test_a_holder_that_is_stopped_is_not_waited_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    cache, fetching, go_on = Cache(tmp_path, LEAST), threading.Event(), threading.Event()

    def slow(first: int, last: int) -> bytes:
        fetching.set()
        assert go_on.wait(60)
        return TARS[0][first:last]

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cache.read, "0123456789abcdef/000000", SIZE, 0, 10, slow)
        assert fetching.wait(60)
        assert read(cache, 0, 0, 10) == TARS[0][:10]
        go_on.set()
        assert future.result() == TARS[0][:10]
    assert len(blocks(tmp_path)) == 1


def test_an_error_of_the_source_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LEAST)

    def broken(first: int, last: int) -> bytes:
        raise OSError("the network")

    with pytest.raises(OSError, match="the network"):
        cache.read("0123456789abcdef/000000", SIZE, 0, 10, broken)
    assert blocks(tmp_path) == []
    assert cache.read("0123456789abcdef/000000", SIZE, 0, 10, lambda first, last: b"short") == b"short"
    assert blocks(tmp_path) == [], "what is not whole is not kept"
    assert read(cache, 0, 0, 10) == TARS[0][:10]


def test_a_dataset_on_a_shared_file_system_through_the_cache(packed: Dataset, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", LEAST)
    dataset = Dataset.open(packed.path, cache=cache)
    assert contents(dataset) == contents(packed)
    assert (cache.misses, len(blocks(tmp_path / "cache"))) == (len(packed.shard_names), len(packed.shard_names))
    # What was spoiled before it came here has a checksum that holds; the sample's own hash finds it, and it is replaced.
    other = Cache(tmp_path / "cache", LEAST)
    name, size = f"{packed.content_hash[:16]}/000000", int(packed.shard_bytes[0])
    other.read(name, size, 0, 1, lambda first, last: bytes(last - first), fresh=True)
    assert other.read(name, size, 0, 10, lambda first, last: b"") == bytes(10)
    assert contents(dataset) == contents(packed)
    assert other.read(name, size, 0, 10, lambda first, last: b"") == packed.read_range(0, 0, 10)


def test_advice() -> None:
    with pytest.raises(CacheError, match="cache_bytes=5 must be at least 67108864, 16 blocks of 4 MiB; 200GB is usual"):
        Cache(Path("x"), 5)
    assert len(cache_advice(200 * 10**9, 10**12, 50_000, full_shuffle=False)) == 1
    assert len(cache_advice(10**12, 10**12, 50_000, full_shuffle=True)) == 1
    room, warning = cache_advice(200 * 10**9, 10**12, 50_000, full_shuffle=True)
    assert room == f"cache: room for {200 * 10**9 // STORED:,} blocks of 4 MiB, 20% of the 1,000.0 GB of tars"
    assert warning.startswith("warning: with a full shuffle 80% of the reads will fetch 4,194 kB for an image of 50 kB; give --")
