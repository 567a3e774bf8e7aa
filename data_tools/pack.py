"""`vitscale pack`: sources to dataset directories.

Where it stands: `sources.py` lists and reads, `plan.py` puts samples in order, `shards.py` writes a stretch of that order, `assemble.py`
makes the directory of the pieces; here the work is shared out to processes and tasks, survives its end, and is put in place.

    OUT/.packing-SPLIT/         the work; a start that finds it goes on with it, and it goes away when OUT/SPLIT is in place
      job.json                  settings and a hash of the listing: what goes on must be the same
      plan-*/                   listing and plan of one process, made anew at each start
      spill-I-of-N/             images from tables, by bucket
      SPLIT/dataset/shards/     tars
      SPLIT/pieces/             what the dataset's tables get for each tar; a shard is done when its piece is there

Invariants:
- the same listing and settings give the same bytes, wherever OUT lies, however many processes or tasks share the work, and however
  often it was stopped;
- OUT/SPLIT appears in one rename, complete and on disk.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools import dataset as fmt
from data_tools.assemble import PackResult, assemble, made, result_of
from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset, read_header
from data_tools.durable import fsync, publish_folders, replace_file
from data_tools.images import Reject
from data_tools.origins import read_image
from data_tools.plan import Plan, Spill, bucket_number, make_plans
from data_tools.processes import in_processes
from data_tools.shards import read_piece, write_shard
from data_tools.sizes import digest_of, planned_ends
from data_tools.sources import Listing, in_table, list_sources

Progress = Callable[[int, int, int], None]  # images done, images in all, rejected so far

IMAGES_A_PROCESS = 1_000  # fewer are not worth the start of a process


def pack(config: PackConfig, progress: Progress | None = None) -> tuple[PackResult, ...]:
    """Writes the split or splits that the config asks for; with a task, its share of the shards only, and nothing is returned.

    A pack that was ended, by whatever, goes on when it is asked for again; a finished one is left alone. Raises PackError. Every image is
    decoded once in full, since nothing less finds a truncated one: 1 to 3 ms of a core for a photograph of 500 x 375 pixels.
    """
    config.check()
    out = Path(config.out)
    work = out / f".packing-{'+'.join(config.splits)}"
    if (done := _finished(config)) is not None:
        shutil.rmtree(work, ignore_errors=True)  # of a pack that was killed in its last moment
        return done
    assembled = work / "assembled"
    found = work.exists()
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    if not assembled.is_file():
        _check_out(config, out)
    try:
        with _held(work, config):
            if not assembled.is_file():
                with _scratch(work, config) as scratch, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="PIL")  # odd metadata, and bombs, which have a limit of their own
                    job = prepare(config, work, scratch)
                    write_shards(job, config, progress)
                    if config.task is not None:
                        return ()
                    for split in config.splits:
                        assemble(
                            work / split / "dataset", split, map(read_piece, job.pieces(split)), len(job.plans[split]), job.listing, config
                        )
                replace_file(assembled, "")
            _check_settings(config, work, None)
            _publish(work, out, config)
            shutil.rmtree(work)
    except BaseException as error:
        # What cannot succeed, and what has done nothing yet, leaves nothing; what was there before or was stopped is kept, to go on with
        vain = isinstance(error, PackError) or not any((*work.glob("*/pieces/*/*.arrow"), *work.glob("spill-*/done.json")))
        if not found and config.task is None and vain and not isinstance(error, OtherPackError):
            shutil.rmtree(work, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    return tuple(result_of(out / split) for split in config.splits)


class OtherPackError(PackError):
    """The work that is there is another pack's, or somebody is at it; it is left alone."""


# ----------------------------------------------------------------------------------------------- decisions


def share_of(items: list[Any], number: int, count: int) -> list[Any]:
    """The `number`-th of `count` stretches of the items, as equal as can be."""
    return items[number * len(items) // count : (number + 1) * len(items) // count]


def _finished(config: PackConfig) -> tuple[PackResult, ...] | None:
    """What is in place already, where all of it was made of the same sources with the same settings."""
    folders = [Path(config.out) / split for split in config.splits]
    if not all((folder / "dataset.json").is_file() for folder in folders):
        return None
    for folder in folders:
        header = read_header(folder)
        there = header["made"] | {"name": header["name"]}
        if changed := _differences(there, made(config, there.get("listing")) | {"name": config.dataset_name}):
            raise PackError(f"{folder} exists and is another dataset ({changed}); give another OUT, or move it away")
    with tempfile.TemporaryDirectory(prefix=".listing-", dir=config.out) as scratch:  # as large as the plan of a pack, so not in /tmp
        beside = Path(scratch)
        plain = config.shard_bytes is None  # otherwise the digest is also of the plan
        digest = (list_sources(config, _sibling(config), beside) if plain else _planned(config, beside, beside).listing).digest
    for folder in folders:
        if read_header(folder)["made"].get("listing") != digest:
            raise PackError(
                f"{folder} exists and the sources list other samples than it was packed from; give another OUT, or move it away"
            )
    return tuple(result_of(folder) for folder in folders)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = sorted(before.keys() | now.keys())
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name))


def _check_out(config: PackConfig, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise PackError(f"out={out} is a file; give a folder, or a path that does not exist")
    for split in config.splits:
        if os.path.lexists(out / split):
            raise PackError(f"{out / split} exists and is not overwritten; give another OUT, or move it away")
    for source in map(Path, config.sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise PackError(f"out={out} lies inside the source {source}; give an OUT outside of it")


def _sibling(config: PackConfig) -> Dataset | None:
    """Another split in OUT, whose classes the new one must share."""
    out = Path(config.out)
    others = fmt.splits_in(out) if out.is_dir() else []
    return Dataset.open(others[0], check_shards=False) if others else None


# ----------------------------------------------------------------------------------------------- the work at hand


@dataclass(frozen=True)
class _Shard:
    """A stretch of a split's plan."""

    split: str
    number: int
    first: int
    end: int


@dataclass(frozen=True)
class _Job:
    """All there is to do, and where it lies."""

    listing: Listing
    plans: dict[str, Plan]
    routes: Path
    shards: list[_Shard]
    work: Path

    def tar(self, shard: _Shard) -> Path:
        return self.work / shard.split / "dataset" / fmt.shard_name(shard.split, shard.number)

    def piece(self, shard: _Shard) -> Path:
        folder = f"{shard.number // fmt.SHARDS_PER_FOLDER:03d}"
        return self.work / shard.split / "pieces" / folder / f"{shard.number:06d}.arrow"

    def pieces(self, split: str) -> list[Path]:
        return [self.piece(shard) for shard in self.shards if shard.split == split]

    def bucket(self, split: str, bucket: int) -> int:
        return bucket_number(list(self.plans).index(split), bucket, self.listing)


@contextmanager
def _held(work: Path, config: PackConfig) -> Iterator[None]:
    """Holds the work against a second start: tasks share it, each with a number of its own, and the one who finishes has it alone."""
    work.mkdir(parents=True, exist_ok=True)
    number, count = config.share
    with ExitStack() as stack:
        wanted = {"lock": fcntl.LOCK_EX}
        if config.task is not None:
            wanted = {"lock": fcntl.LOCK_SH, f"{number}-of-{count}.lock": fcntl.LOCK_EX}
        for name, kind in wanted.items():
            file = stack.enter_context(open(work / name, "a"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OtherPackError(f"{work} is being worked on by another process; wait for its end, or stop it") from None
        yield


@contextmanager
def _scratch(work: Path, config: PackConfig) -> Iterator[Path]:
    """A folder for the listing and the plan; what killed starts of this share, or of all where it is alone, left there goes away."""
    mine = "plan-" if config.task is None else "plan-{}-of-{}-".format(*config.share)
    for left in work.glob(f"{mine}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=mine, dir=work) as folder:
        yield Path(folder)


def _settings(config: PackConfig) -> dict[str, Any]:
    where = {"sources": [str(Path(source).resolve()) for source in config.sources], "image_root": config.image_root}
    return made(config, None) | {"name": config.dataset_name, "splits": list(config.splits), **where}


def _check_settings(config: PackConfig, work: Path, sources: dict[str, Any] | None) -> None:
    """Makes sure that the work is of this pack, which it is said to be where nobody has begun it. Raises OtherPackError."""
    job_file = work / "job.json"
    asked: dict[str, Any] = {"settings": _settings(config), "sources": sources}
    if sources is not None and not job_file.is_file():
        beside = work / f".job-{secrets.token_hex(4)}"
        beside.write_text(json.dumps(asked, indent=1))
        fsync(beside)
        with suppress(FileExistsError):  # shares begin at once, and one of them is first
            os.link(beside, job_file)
        beside.unlink()
        fsync(work)
    begun = json.loads(job_file.read_text())
    if changed := _differences(begun["settings"], asked["settings"]):
        raise OtherPackError(f"{work} holds an unfinished pack with other settings ({changed}); give its own to go on, or remove it")
    if sources is not None and (changed := _differences(begun["sources"], sources)):
        raise OtherPackError(f"the sources are not those that {work} was begun with ({changed}); restore them, or remove it to start anew")


def prepare(config: PackConfig, work: Path, scratch: Path) -> _Job:
    """Lists and plans, and makes sure that the sources of work that is there have not changed."""
    if (work / "job.json").is_file():
        _check_settings(config, work, None)  # before the listing, which may be long
    job = _planned(config, scratch, work)
    _check_settings(config, work, _identity(job))
    return job


def _planned(config: PackConfig, scratch: Path, work: Path) -> _Job:
    """Lists the sources and plans the shards."""
    listing = list_sources(config, _sibling(config), scratch)
    plans, routes = make_plans(listing, config, config.splits, scratch)
    for split, plan in plans.items():
        if not len(plan):
            raise PackError(f"no sample falls into {split} of {listing.num_samples} with val_fraction={config.val_fraction}")
    if config.shard_bytes is None:
        size = config.shard_samples or listing.num_samples
        ends = {split: [min(first + size, len(plan)) for first in range(0, len(plan), size)] for split, plan in plans.items()}
    else:
        ends = planned_ends(listing, plans, config, scratch)
        listing = replace(listing, digest=digest_of(listing.digest, ends))  # which the same names and labels alone do not settle now
    shards = [
        _Shard(split, number, first, end) for split in plans for number, (first, end) in enumerate(itertools.pairwise([0, *ends[split]]))
    ]
    return _Job(listing, plans, routes, shards, work)


def _identity(job: _Job) -> dict[str, Any]:
    """What tells that sources have changed: the listing (names, labels, keys), and size and time of each table."""
    tables = {}
    for number, origin in enumerate(job.listing.origins):
        if origin.table is not None:
            status = origin.table.stat()
            tables[f"table {number}, {origin.table.name}"] = f"{status.st_size} bytes of {status.st_mtime_ns}"
    return {"samples": job.listing.num_samples, "shards": len(job.shards), "listing": job.listing.digest, **tables}


def _publish(work: Path, out: Path, config: PackConfig) -> None:
    """Gives the splits their names; after a kill between two of them, those that have none yet."""
    names = {hidden: out / split for split in config.splits if (hidden := work / split / "dataset").exists()}
    for hidden in names:
        for other in fmt.splits_in(out):  # one that was packed meanwhile
            ours, theirs = (
                ((f / "classes.txt").read_bytes() if (f / "classes.txt").is_file() else b"", read_header(f)["num_classes"])
                for f in (hidden, other)
            )
            if ours != theirs:
                raise OtherPackError(f"{other} was packed meanwhile with other classes; move it away to go on, or remove {work}")
    try:
        publish_folders(names)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise PackError(f"{', '.join(config.splits)} cannot be put in place: {error}; was it packed meanwhile?") from None


# ------------------------------------------------------------------------------------------------- writing


def write_shards(job: _Job, config: PackConfig, progress: Progress | None) -> None:
    """Writes what this task's share of the job's shards lacks, in as many processes as are worth it."""
    mine = share_of(job.shards, *config.share)
    todo = [shard for shard in mine if not job.piece(shard).is_file()]
    images = sum(shard.end - shard.first for shard in todo)
    spill = None
    if any(map(in_table, job.listing.origins)) and todo:
        number, count = config.share
        spill = Spill(job.work / f"spill-{number}-of-{count}")
        wanted = {job.bucket(s.split, b) for s in mine for b in job.plans[s.split].buckets(s.first, s.end)}
        spill.fill(job.listing, job.routes, frozenset(wanted))
    done = [sum(shard.end - shard.first for shard in mine) - images, 0]

    def tell(images: int, rejects: int) -> None:
        done[0] += images
        done[1] += rejects
        if progress is not None:
            progress(done[0], done[0] if not todo else sum(shard.end - shard.first for shard in mine), done[1])

    processes = min(config.jobs or max(1, min(len(os.sched_getaffinity(0)), images // IMAGES_A_PROCESS)), len(todo))
    if processes > 1:
        in_processes(processes, functools.partial(_write_shard, job, config=config, spill=spill), todo, tell)
    else:
        for shard in todo:
            _write_shard(job, shard, lambda rejected: tell(1, int(rejected)), config, spill)


def _write_shard(job: _Job, shard: _Shard, tell: Callable[[int], None], config: PackConfig, spill: Spill | None) -> None:
    plan = job.plans[shard.split]
    planned = plan.rows(shard.first, shard.end)
    write_shard(job.tar(shard), job.piece(shard), planned, _images(job, shard, planned, spill), job.listing.origins, config, tell)


def _images(job: _Job, shard: _Shard, planned: pa.Table, spill: Spill | None) -> Iterator[bytes | Reject]:
    """The images of a shard, in its order."""
    plan, origins = job.plans[shard.split], job.listing.origins
    for bucket in plan.buckets(shard.first, shard.end):
        first, end = max(plan.starts[bucket], shard.first) - shard.first, min(plan.starts[bucket + 1], shard.end) - shard.first
        rows = planned.slice(first, end - first).select(["place", "origin", "path"])
        for place, origin, path in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            if not in_table(origins[origin]):
                yield read_image(path, origins[origin].root)
            else:
                assert spill is not None
                yield spill.read(place, job.bucket(shard.split, bucket))
