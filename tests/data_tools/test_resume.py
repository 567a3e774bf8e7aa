"""A pack that is shared out, stopped and killed ends in the bytes of one that was not."""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_tools.plan as plan_module
import data_tools.sources as listing_module
from data_tools.config import PackConfig, PackError
from data_tools.images import Reject
from data_tools.origins import Origin
from data_tools.pack import OtherPackError, pack
from data_tools.verify import verify

from .conftest import make_image, tree, write_files
from .test_durable import killed_everywhere

ROOT = Path(__file__).parents[2]


def sources(folder: Path) -> dict[str, tuple[str, ...]]:
    """Folders, tables with bytes (several, so that a spill can stop between them), and both; bad images among them."""
    images = [b"no image" if i % 17 == 3 else make_image(i) for i in range(60)]
    write_files(folder / "photos", {f"class-{i % 4}/{i:02d}.jpg": image for i, image in enumerate(images)})
    for part in range(3):
        labels = [f"class-{i % 4}" for i in range(part * 20, part * 20 + 20)]
        columns = {"image": images[part * 20 : part * 20 + 20], "label": labels}
        pq.write_table(pa.table(columns), folder / f"part-{part}.parquet", row_group_size=7)
    tables = tuple(str(folder / f"part-{part}.parquet") for part in range(3))
    return {"folder": (str(folder / "photos"),), "tables": tables, "both": (str(folder / "photos"), *tables)}


@pytest.mark.parametrize("kind", ["folder", "tables", "both"])
@pytest.mark.parametrize("settings", [{"shuffle_seed": 5}, {"shuffle_seed": None}, {"shuffle_seed": 1, "val_fraction": 0.3}], ids=str)
def test_processes_and_shares_give_the_bytes_of_one(tmp_path: Path, kind: str, settings: dict) -> None:
    config = {"sources": sources(tmp_path)[kind], "samples_per_shard": 7, **settings}
    pack(PackConfig(out=str(tmp_path / "one"), jobs=1, **config))
    for jobs in (2, 3):
        pack(PackConfig(out=str(tmp_path / f"jobs-{jobs}"), jobs=jobs, **config))
        assert tree(tmp_path / f"jobs-{jobs}") == tree(tmp_path / "one")
    for number in (2, 0, 3, 1):
        assert pack(PackConfig(out=str(tmp_path / "shares"), jobs=1, task=f"{number}/4", **config)) == ()
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "shares").rglob("*.tar")}
    results = pack(PackConfig(out=str(tmp_path / "shares"), jobs=1, **config))
    assert sum(result.shards for result in results) == len(tars)
    assert {path.stat().st_mtime_ns for path in (tmp_path / "shares").rglob("*.tar")} == set(tars.values()), "the merge writes no tar"
    assert tree(tmp_path / "shares") == tree(tmp_path / "one")


def test_a_finished_dataset_is_left_alone(tmp_path: Path) -> None:
    config = PackConfig(sources(tmp_path)["folder"], str(tmp_path / "out"), samples_per_shard=7)
    first = pack(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert pack(config) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_finished_dataset_of_other_sources_is_not_passed_off_as_theirs(tmp_path: Path) -> None:
    config = PackConfig(sources(tmp_path)["folder"], str(tmp_path / "out"), samples_per_shard=7)
    pack(config)
    before = tree(tmp_path / "out")
    (tmp_path / "photos/class-1/more.jpg").write_bytes(make_image(3))
    with pytest.raises(PackError, match="the sources list other samples than it was packed from"):
        pack(config)
    assert tree(tmp_path / "out") == before


KILLED = """
import os, signal, sys
from data_tools.config import PackConfig, PackError
from data_tools.pack import pack

def stop(done, total, rejects):
    if done >= 20:
        os.kill(os.getpid(), signal.SIGKILL)

pack(PackConfig(tuple(sys.argv[2:]), sys.argv[1], samples_per_shard=7, jobs=1), stop)
"""


def killed(out: Path, of: tuple[str, ...]) -> None:
    """A pack that ended at its twentieth image."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), *of], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def work(out: Path) -> dict[str, bytes]:
    """What a start goes on with; plans are made anew."""
    return {name: data for name, data in tree(out).items() if "/plan-" not in name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("settings", "unfinished pack with other settings \\(samples_per_shard: 7 -> 8\\)"),
        ("an image more", "the sources are not those .* was begun with .*samples: 60 -> 61"),
        ("another name", "the sources are not those .* was begun with .*listing: "),
        ("a table", "the sources are not those .* was begun with .*table 0, part-0.parquet: "),
    ],
)
def test_what_changed_since_the_kill_is_refused_and_the_work_kept(tmp_path: Path, change: str, said: str) -> None:
    of = sources(tmp_path)["tables" if change == "a table" else "folder"]
    killed(tmp_path / "out", of)
    config = {"sources": of, "out": str(tmp_path / "out"), "samples_per_shard": 7}
    image = tmp_path / "photos/class-1/01.jpg"
    if change == "settings":
        config["samples_per_shard"] = 8
    elif change == "an image more":
        image.with_name("extra.jpg").write_bytes(make_image(1))
    elif change == "another name":
        image.rename(image.with_name("renamed.jpg"))
    else:
        os.utime(of[0], (1, 1))
    before = work(tmp_path / "out")
    with pytest.raises(OtherPackError, match=said):
        pack(PackConfig(**config))  # type: ignore[arg-type]
    assert work(tmp_path / "out") == before


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    config = PackConfig(sources(tmp_path)["folder"], str(tmp_path / "out"), samples_per_shard=7, jobs=1)
    said = []

    def again(done: int, total: int, rejects: int) -> None:
        if done == 9:
            for task in (None, "0/2"):
                with pytest.raises(OtherPackError, match="is being worked on by another process") as error:
                    pack(PackConfig(config.sources, config.out, samples_per_shard=7, task=task))
                said.append(error)

    pack(config, again)
    assert len(said) == 2


def test_a_process_that_is_killed_ends_the_pack_and_the_same_command_goes_on(tmp_path: Path) -> None:
    of = sources(tmp_path)["tables"]
    config = {"sources": of, "samples_per_shard": 2}
    pack(PackConfig(out=str(tmp_path / "whole"), **config))  # type: ignore[arg-type]

    def kill_one(done: int, total: int, rejects: int) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if workers:
            os.kill(workers[0], signal.SIGKILL)

    with pytest.raises(OSError, match="a worker process ended with status -9; the same command goes on"):
        pack(PackConfig(out=str(tmp_path / "out"), jobs=2, **config), kill_one)  # type: ignore[arg-type]
    pack(PackConfig(out=str(tmp_path / "out"), jobs=2, **config))  # type: ignore[arg-type]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_fault_in_a_process_is_the_packs(tmp_path: Path) -> None:
    """An error of the file system in one of them reaches the caller as what it is."""
    of = sources(tmp_path)["folder"]
    (tmp_path / "photos/class-0/00.jpg").unlink()
    (tmp_path / "photos/class-0/00.jpg").symlink_to("/proc/self/mem")  # a plain file by its looks, and reading it is a real EIO
    with pytest.raises(OSError, match="Input/output error"):
        pack(PackConfig(of, str(tmp_path / "out"), jobs=2))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets, record batches and spilled files from a few samples, and several passes in search of equal keys."""
    monkeypatch.setattr(listing_module, "ROWS", 10)
    monkeypatch.setattr(plan_module, "ROWS", 10)


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_many_buckets_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None, fraction: float) -> None:
    of = {"sources": sources(tmp_path)["both"], "samples_per_shard": 7, "shuffle_seed": seed, "val_fraction": fraction, "jobs": 1}
    pack(PackConfig(out=str(tmp_path / "one"), **of))  # type: ignore[arg-type]
    for rows in (1, 10, 37):
        monkeypatch.setattr(listing_module, "ROWS", rows)
        monkeypatch.setattr(plan_module, "ROWS", rows)
        pack(PackConfig(out=str(tmp_path / f"rows-{rows}"), **of))  # type: ignore[arg-type]
        assert tree(tmp_path / f"rows-{rows}") == tree(tmp_path / "one")


TOUCHES = [(os, "fsync"), (os, "link"), (os, "writev"), (Path, "rename"), (Path, "replace"), (Path, "write_text"), (shutil, "rmtree")]


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("kind", ["folder", "tables"])
def test_killed_at_each_touch_of_the_disk_it_ends_in_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """Among them the moments between train's and val's tables, between their two names, and within the copy of a table."""
    of = {"sources": sources(tmp_path)[kind], "samples_per_shard": 30, "val_fraction": 0.4, "jobs": 1}
    pack(PackConfig(out=str(tmp_path / "whole"), **of))  # type: ignore[arg-type]
    whole = tree(tmp_path / "whole")
    out = tmp_path / "out"
    moments = 0
    for _ in killed_everywhere(lambda: pack(PackConfig(out=str(out), **of)), TOUCHES):  # type: ignore[arg-type]
        pack(PackConfig(out=str(out), **of))  # type: ignore[arg-type]
        assert tree(out) == whole
        shutil.rmtree(out)
        moments += 1
    assert moments > 40


def test_a_copy_of_tables_goes_on_with_the_table_that_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PackConfig(sources(tmp_path)["tables"], str(tmp_path / "out"), samples_per_shard=7, jobs=1)
    copied: list[str] = []
    images = plan_module.table_images

    def stop_in_the_third(origin: Origin, requests: int) -> Iterator[bytes | Reject]:
        copied.append(origin.table.name if origin.table else "")
        for number, image in enumerate(images(origin, requests)):
            if len(copied) == 3 and number == 5:
                raise KeyboardInterrupt
            yield image

    monkeypatch.setattr(plan_module, "table_images", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(config)
    pack(config)
    assert copied == ["part-0.parquet", "part-1.parquet", "part-2.parquet", "part-2.parquet"]
    pack(PackConfig(config.sources, str(tmp_path / "whole"), samples_per_shard=7, jobs=1))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("wrong", ["the source is away", "a stray file", "a wrong class_names"])
def test_an_error_on_a_resume_keeps_the_work(tmp_path: Path, wrong: str) -> None:
    of = sources(tmp_path)["folder"]
    killed(tmp_path / "out", of)
    before = work(tmp_path / "out")
    if wrong == "the source is away":
        (tmp_path / "photos").rename(tmp_path / "away")
    elif wrong == "a stray file":
        (tmp_path / "photos/stray.jpg").write_bytes(b"")
    names = str(tmp_path / "typo") if wrong == "a wrong class_names" else None
    with pytest.raises(PackError):
        pack(PackConfig(of, str(tmp_path / "out"), samples_per_shard=7, class_names=names))
    assert work(tmp_path / "out") == before


def test_shares_that_begin_at_once_agree_on_what_they_do(tmp_path: Path) -> None:
    """Started in the same moment, over and over: none fails, and one with other settings is refused whoever comes first."""
    of = sources(tmp_path)["folder"]
    command = [str(Path(sys.executable).with_name("vitscale")), "pack", *of]
    for number in range(4):
        out = tmp_path / f"out-{number}"
        flags = [["--task", f"{share}/3", "--samples-per-shard", "7"] for share in range(3)]
        shares = [subprocess.Popen([*command, str(out), *of_one], cwd=ROOT, stdout=subprocess.DEVNULL) for of_one in flags]
        assert [share.wait() for share in shares] == [0, 0, 0]
        other = subprocess.run([*command, str(out), "--task", "0/3", "--samples-per-shard", "6"], cwd=ROOT, capture_output=True, text=True)
        assert (other.returncode, "samples_per_shard: 7 -> 6" in other.stderr) == (1, True)
        pack(PackConfig(of, str(out), samples_per_shard=7))
        assert verify(out / "train").problems == ()


def test_shares_of_another_number_write_the_same_shards(tmp_path: Path) -> None:
    """One share starts in the midst of another's shard, is killed in it, and harms nothing."""
    of = {"sources": sources(tmp_path)["folder"], "samples_per_shard": 30}

    def begin_another(done: int, total: int, rejects: int) -> None:
        if done == 15 and (child := os.fork()) == 0:
            pack(PackConfig(out=str(tmp_path / "out"), task="0/1", jobs=1, **of), lambda d, t, r: os._exit(9) if d == 12 else None)  # type: ignore[arg-type]
        elif done == 15:
            os.waitpid(child, 0)

    pack(PackConfig(out=str(tmp_path / "out"), task="0/2", jobs=1, **of), begin_another)  # type: ignore[arg-type]
    pack(PackConfig(out=str(tmp_path / "out"), task="1/2", jobs=1, **of))  # type: ignore[arg-type]
    pack(PackConfig(out=str(tmp_path / "out"), **of))  # type: ignore[arg-type]
    assert verify(tmp_path / "out/train").problems == ()
    pack(PackConfig(out=str(tmp_path / "whole"), **of))  # type: ignore[arg-type]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_split_that_was_packed_meanwhile_with_other_classes_stops_the_last_step(tmp_path: Path) -> None:
    config = PackConfig(sources(tmp_path)["folder"], str(tmp_path / "out"), jobs=1)
    write_files(tmp_path / "few", {"class-2/a.jpg": make_image(0), "class-3/a.jpg": make_image(1)})

    def pack_val(done: int, total: int, rejects: int) -> None:
        if done == 10:
            pack(PackConfig((str(tmp_path / "few"),), config.out, split="val"))

    with pytest.raises(OtherPackError, match=r"out/val was packed meanwhile with other classes; move it away to go on"):
        pack(config, pack_val)
    (tmp_path / "out/val").rename(tmp_path / "val")
    (result,) = pack(config)
    assert result.classes == 4


def kills(count: int, seed: int, tmp_path: Path) -> Iterator[str]:
    """Packs over and over, killed with all its processes after a random while, and yields how often a run was killed before it finished."""
    of = sources(tmp_path)
    rng = random.Random(seed)
    for number in range(count):
        kind, jobs, fraction = rng.choice(["folder", "tables", "both"]), rng.choice([1, 2]), rng.choice(["0", "0.3"])
        whole, out = tmp_path / f"whole-{kind}-{fraction}", tmp_path / f"out-{number}"
        flags = ["--samples-per-shard", "3", "--val-fraction", fraction]
        command = [str(Path(sys.executable).with_name("vitscale")), "pack", *of[kind]]
        if not whole.exists():
            subprocess.run([*command, str(whole), *flags, "--jobs", "1"], cwd=ROOT, check=True, capture_output=True)
        killed_here = 0
        begun = time.monotonic()
        while True:
            process = subprocess.Popen([*command, str(out), *flags, "--jobs", str(jobs)], cwd=ROOT, stdout=subprocess.DEVNULL)
            descriptor = os.pidfd_open(process.pid)
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            if not poller.poll(rng.uniform(0.15, 1.6) * 1000 + 250 * killed_here):  # longer each time, so that it ends
                process.kill()
                killed_here += 1
            os.close(descriptor)
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL
            assert time.monotonic() - begun < 120
        assert tree(out) == tree(whole), f"kill {number}: {kind}, {jobs} processes, val_fraction {fraction}"
        shutil.rmtree(out)
        yield f"{killed_here} kills, {kind}"


def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    told = list(kills(3, 0, tmp_path))
    assert any(not line.startswith("0 ") for line in told), told


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_fifty_kills(tmp_path: Path) -> None:
    killed_so_far = packs = 0
    for line in kills(500, 1, tmp_path):
        killed_so_far, packs = killed_so_far + int(line.split()[0]), packs + 1
        if killed_so_far >= 50:
            break
    print(f"{killed_so_far} kills over {packs} packs, all of them byte for byte the uninterrupted one")
    assert killed_so_far >= 50


def test_a_look_at_a_finished_pack_leaves_nothing_though_it_was_killed(photos: Path, tmp_path: Path) -> None:
    """The next look takes away what a killed one left, and not what another one is at."""
    out = tmp_path / "out"
    config = PackConfig((str(photos),), str(out))
    pack(config)
    code = (
        "import os, signal, sys; from data_tools import pack; from data_tools.config import PackConfig\n"
        "pack.list_sources = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack.pack(PackConfig((sys.argv[1],), sys.argv[2]))"
    )
    assert subprocess.run([sys.executable, "-c", code, photos, out]).returncode == -signal.SIGKILL
    assert [path.name for path in out.glob(".listing-*/lock")] == ["lock"]
    other = out / ".listing-other"
    other.mkdir()
    with (other / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pack(config)
        assert list(out.glob(".listing-*")) == [other]
