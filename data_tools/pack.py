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
from data_tools import remote_out
from data_tools.assemble import PackResult, assemble, made, result_of
from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset, read_header
from data_tools.durable import fsync, publish_folders, replace_file
from data_tools.images import Reject
from data_tools.labels import Sibling
from data_tools.origins import Origin, read_images
from data_tools.plan import Plan, Spill, bucket_number, make_plans
from data_tools.processes import in_processes
from data_tools.shards import read_piece, write_shard
from data_tools.sizes import digest_of, planned_ends
from data_tools.sources import Listing, in_table, list_sources
from data_tools.storage import Location, StorageError, Url, in_turn, location, stamp

Tell = Callable[[int, int, int], None]  # images done, images in all, rejected so far

IMAGES_A_PROCESS = 1_000  # fewer are not worth the start of a process


def pack(config: PackConfig, progress: Tell | None = None) -> tuple[PackResult, ...]:
    """Writes the split or splits that the config asks for; with a task, its share of the shards only, and nothing is returned.

    A pack that was ended, by whatever, goes on when it is asked for again; a finished one is left alone. Raises PackError. Every image is
    decoded once in full, since nothing less finds a truncated one: 1 to 3 ms of a core for a photograph of 500 x 375 pixels.
    """
    config.check()
    out = location(config.out)
    home = out if isinstance(out, Path) else Path(config.work or "")
    work = home / f".packing-{'+'.join(config.splits)}"
    with _leaving_no_empty(home):
        return _pack(config, out, home, work, progress)


def _pack(config: PackConfig, out: Location, home: Path, work: Path, progress: Tell | None) -> tuple[PackResult, ...]:
    if (done := _finished(config, out, home)) is not None:
        shutil.rmtree(work, ignore_errors=True)  # of a pack that was killed in its last moment
        return done
    assembled = work / "assembled"
    found = work.exists()
    if not assembled.is_file():
        _check_out(config, out, work)
    try:
        with _held(work, config):
            if not assembled.is_file():
                with _scratch(work, config) as scratch, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="PIL")  # odd metadata, and bombs, which have a limit of their own
                    job = prepare(config, work, scratch)
                    if isinstance(out, Url):
                        for split in config.splits:
                            remote_out.claim(out / split, _job_name(work) or "")
                    write_shards(job, config, progress)
                    if config.task is not None:
                        return ()
                    for split in config.splits:
                        (work / split / "dataset").mkdir(parents=True, exist_ok=True)  # tars in object storage have none
                        assemble(
                            work / split / "dataset", split, map(read_piece, job.pieces(split)), len(job.plans[split]), job.listing, config
                        )
                replace_file(assembled, "")
            _check_settings(config, work, None)
            if isinstance(out, Url):
                results = _publish_remote(work, out, config)
                shutil.rmtree(work)
                return results
            _publish(work, out, config)
            shutil.rmtree(work)
    except BaseException as error:
        # What cannot succeed, and what has done nothing yet, leaves nothing; what was there before or was stopped is kept, to go on with
        vain = isinstance(error, PackError) or not any((*work.glob("*/pieces/*/*.arrow"), *work.glob("spill-*/done.json")))
        if not found and config.task is None and vain and not isinstance(error, OtherPackError):
            with suppress(StorageError):  # and then the work is kept too, for the split is still ours
                if isinstance(out, Url) and (name := _job_name(work)) is not None:
                    for split in config.splits:
                        remote_out.withdraw(out / split, name)
                shutil.rmtree(work, ignore_errors=True)
        raise
    assert isinstance(out, Path)
    return tuple(result_of(out / split) for split in config.splits)


@contextmanager
def _leaving_no_empty(home: Path) -> Iterator[None]:
    """Removes what folders were made and hold nothing."""
    missing = [folder for folder in (home, *home.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


class OtherPackError(PackError):
    """The work that is there is another pack's, or somebody is at it; it is left alone."""


# ----------------------------------------------------------------------------------------------- decisions


def share_of(items: list[Any], number: int, count: int) -> list[Any]:
    """The `number`-th of `count` stretches of the items, as equal as can be."""
    return items[number * len(items) // count : (number + 1) * len(items) // count]


def _finished(config: PackConfig, out: Location, home: Path) -> tuple[PackResult, ...] | None:
    """What is in place already, where all of it was made of the same sources with the same settings."""
    headers: dict[Location, dict[str, Any]] = {}
    for split in config.splits:
        if (header := _header(out / split)) is None:
            return None
        headers[out / split] = header
    for folder, header in headers.items():
        there = header["made"] | {"name": header["name"]}
        if changed := _differences(there, made(config, there.get("listing")) | {"name": config.dataset_name}):
            raise PackError(f"{folder} exists and is another dataset ({changed}); give another OUT, or move it away")
    home.mkdir(parents=True, exist_ok=True)
    with _passing_folder(home) as beside:  # which gets as large as the plan of a pack, so it is not in /tmp
        plain = config.shard_bytes is None  # otherwise the digest is also of the plan
        digest = (list_sources(config, _sibling(out), beside) if plain else _planned(config, beside, beside).listing).digest
        for folder, header in headers.items():
            if header["made"].get("listing") != digest:
                raise PackError(
                    f"{folder} exists and the sources list other samples than it was packed from; give another OUT, or move it away"
                )
        results = []
        for folder, header in headers.items():
            if isinstance(folder, Path):
                results.append(result_of(folder))
            else:
                remote_out.release(folder)  # of a pack that was killed in its last moment
                results.append(result_of(remote_out.fetch(folder, header, beside / header["split"]), folder))
    return tuple(results)


def _header(folder: Location) -> dict[str, Any] | None:
    """dataset.json of a split, if it is there."""
    if isinstance(folder, Url):
        return remote_out.header(folder)
    return read_header(folder) if (folder / "dataset.json").is_file() else None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = sorted(before.keys() | now.keys())
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name))


def _check_out(config: PackConfig, out: Location, work: Path) -> None:
    if isinstance(out, Url):
        for split in config.splits:
            remote_out.check_free(out / split, _job_name(work))
        for prefix in config.sources:
            if f"{out}/".startswith(f"{prefix.rstrip('/')}/"):
                raise PackError(f"out={out} lies inside the source {prefix}; give an OUT outside of it")
        return
    if out.exists() and not out.is_dir():
        raise PackError(f"out={out} is a file; give a folder, or a path that does not exist")
    if (out / "dataset.json").is_file():
        raise PackError(f"out={out} is a dataset; give the folder above it, {out.parent}, which gets a folder for each split")
    for split in config.splits:
        if os.path.lexists(out / split):
            raise PackError(f"{out / split} exists and is not overwritten; give another OUT, or move it away")
    for source in map(Path, config.sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise PackError(f"out={out} lies inside the source {source}; give an OUT outside of it")


def _sibling(out: Location) -> Sibling | None:
    """Another split in OUT, whose classes the new one must share."""
    if isinstance(out, Url):
        return remote_out.sibling(out)
    others = fmt.splits_in(out) if out.is_dir() else []
    if not others:
        return None
    dataset = Dataset.open(others[0], check_shards=False)
    return Sibling(dataset.path, dataset.class_names, dataset.num_classes)


# ----------------------------------------------------------------------------------------------- the work at hand


@dataclass(frozen=True)
class Shard:
    """A stretch of a split's plan."""

    split: str
    number: int
    first: int
    end: int


@dataclass(frozen=True)
class Job:
    """All there is to do, and where it lies."""

    listing: Listing
    plans: dict[str, Plan]
    routes: Path
    shards: list[Shard]
    work: Path
    passing: Path | None
    """Where tars lie until they are put in object storage, if that is where OUT is."""

    def tar(self, shard: Shard) -> Path:
        """Where the shard's tar is written."""
        folder = self.work / shard.split / "dataset" if self.passing is None else self.passing / shard.split
        return folder / fmt.shard_name(shard.split, shard.number)

    def piece(self, shard: Shard) -> Path:
        """The shard's piece, which is there when it is done."""
        return piece_file(self.work, shard.split, shard.number)

    def pieces(self, split: str) -> list[Path]:
        """All pieces of a split, in the order of its shards."""
        return [self.piece(shard) for shard in self.shards if shard.split == split]

    def bucket(self, split: str, bucket: int) -> int:
        """How `routes` names a bucket of a split."""
        return bucket_number(list(self.plans).index(split), bucket, self.listing)


def piece_file(work: Path, split: str, number: int) -> Path:
    """Where the piece of a shard lies in the work."""
    return work / split / "pieces" / f"{number // fmt.SHARDS_PER_FOLDER:03d}" / f"{number:06d}.arrow"


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


@contextmanager
def _passing_folder(home: Path) -> Iterator[Path]:
    """A folder that goes away, as those do that killed starts left; those of others who are at work are held by them."""
    for lock in home.glob(".listing-*/lock"):
        with suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=".listing-", dir=home) as folder, (Path(folder) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Path(folder)


def _settings(config: PackConfig) -> dict[str, Any]:
    places = [location(source) for source in config.sources]
    where: dict[str, Any] = {"sources": [str(place) if isinstance(place, Url) else str(place.resolve()) for place in places]}
    where["image_root"] = config.image_root
    if isinstance(out := location(config.out), Url):  # for the work does not lie in it
        where["out"] = str(out)
    return made(config, None) | {"name": config.dataset_name, "splits": list(config.splits), **where}


def _check_settings(config: PackConfig, work: Path, sources: dict[str, Any] | None) -> None:
    """Makes sure that the work is of this pack, which it is said to be where nobody has begun it. Raises OtherPackError."""
    job_file = work / "job.json"
    asked: dict[str, Any] = {"settings": _settings(config), "sources": sources}
    if sources is not None and not job_file.is_file():
        beside = work / f".job-{secrets.token_hex(4)}"
        beside.write_text(json.dumps({"name": secrets.token_hex(16), **asked}, indent=1))
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


def prepare(config: PackConfig, work: Path, scratch: Path) -> Job:
    """Lists and plans, and makes sure that the sources of work that is there have not changed."""
    if (work / "job.json").is_file():
        _check_settings(config, work, None)  # before the listing, which may be long
    job = _planned(config, scratch, work)
    _check_settings(config, work, _identity(job, config.requests))
    return job


def _planned(config: PackConfig, scratch: Path, work: Path) -> Job:
    """Lists the sources and plans the shards."""
    out = location(config.out)
    listing = list_sources(config, _sibling(out), scratch)
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
        Shard(split, number, first, end) for split in plans for number, (first, end) in enumerate(itertools.pairwise([0, *ends[split]]))
    ]
    return Job(listing, plans, routes, shards, work, scratch / "tars" if isinstance(out, Url) else None)


def _job_name(work: Path) -> str | None:
    """What the work is called among all there are; None where it has not begun."""
    try:
        name: str = json.loads((work / "job.json").read_text())["name"]
    except FileNotFoundError:
        return None
    return name


def _identity(job: Job, requests: int) -> dict[str, Any]:
    """What tells that sources have changed: the listing (names, labels, keys), and size and time, or version, of each table."""
    origins = job.listing.origins
    named = {f"table {number}, {of.table.name}": of.table for number, of in enumerate(origins) if of.table is not None}
    stamps = in_turn(named.values(), lambda table: isinstance(table, Url), lambda table, _: stamp(table), requests)
    tables = dict(zip(named, stamps, strict=True))
    return {"samples": job.listing.num_samples, "shards": len(job.shards), "listing": job.listing.digest, **tables}


def _publish(work: Path, out: Path, config: PackConfig) -> None:
    """Gives the splits their names; after a kill between two of them, those that have none yet."""
    names = {hidden: out / split for split in config.splits if (hidden := work / split / "dataset").exists()}
    for hidden in names:
        _check_classes(hidden, [(str(other), _classes_of(other)) for other in fmt.splits_in(out)], work)
    try:
        publish_folders(names)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise PackError(f"{', '.join(config.splits)} cannot be put in place: {error}; was it packed meanwhile?") from None


def _check_classes(hidden: Path, others: list[tuple[str, Any]], work: Path) -> None:
    """Raises OtherPackError where a split that was packed meanwhile has other classes."""
    for other, classes in others:
        if classes != _classes_of(hidden):
            raise OtherPackError(f"{other} was packed meanwhile with other classes; move it away to go on, or remove {work}")


def _classes_of(folder: Location) -> tuple[str | None, int]:
    """What must be the same in all splits of an OUT."""
    header = _header(folder)
    assert header is not None
    return header["files"].get("classes.txt", {}).get("sha256"), header["num_classes"]


def _publish_remote(work: Path, out: Url, config: PackConfig) -> tuple[PackResult, ...]:
    """Puts in object storage what has no place there yet; after a kill anywhere in it, the same again."""
    hidden = {out / split: work / split / "dataset" for split in config.splits}
    for url, folder in hidden.items():
        _check_classes(folder, [(str(other), _classes_of(other)) for other in remote_out.splits_in(out) if other not in hidden], work)
        if (name := remote_out.lost(folder, url)) is not None:
            piece_file(work, folder.parent.name, int(Path(name).stem.rpartition("-")[2])).unlink()
            (work / "assembled").unlink()
            raise StorageError(f"{url / name} is gone, or is not what was put there; the same command makes it again")
    for url, folder in hidden.items():
        remote_out.publish(folder, url)
    for url in hidden:
        remote_out.release(url)
    return tuple(result_of(folder, url) for url, folder in hidden.items())


# ------------------------------------------------------------------------------------------------- writing


def write_shards(job: Job, config: PackConfig, progress: Tell | None) -> None:
    """Writes what this task's share of the job's shards lacks, in as many processes as are worth it."""
    mine = share_of(job.shards, *config.share)
    todo = [shard for shard in mine if not job.piece(shard).is_file()]
    images = sum(shard.end - shard.first for shard in todo)
    spill = None
    if any(map(in_table, job.listing.origins)) and todo:
        number, count = config.share
        spill = Spill(job.work / f"spill-{number}-of-{count}")
        wanted = {job.bucket(s.split, b) for s in mine for b in job.plans[s.split].buckets(s.first, s.end)}
        spill.fill(job.listing, job.routes, frozenset(wanted), config.requests)
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


def _write_shard(job: Job, shard: Shard, tell: Callable[[int], None], config: PackConfig, spill: Spill | None) -> None:
    plan = job.plans[shard.split]
    planned = plan.rows(shard.first, shard.end)
    images = read_images(_images(job, shard, planned, spill), config.requests)
    out = location(config.out)
    keep = None
    if isinstance(out, Url):
        keep = functools.partial(remote_out.keep, url=out / shard.split / fmt.shard_name(shard.split, shard.number))
    write_shard(job.tar(shard), job.piece(shard), planned, images, job.listing.origins, config, tell, keep)


def _images(
    job: Job, shard: Shard, planned: pa.Table, spill: Spill | None
) -> Iterator[tuple[bytes, Origin] | Callable[[], bytes | Reject]]:
    """How the images of a shard are to be had, in its order."""
    plan, origins = job.plans[shard.split], job.listing.origins
    for bucket in plan.buckets(shard.first, shard.end):
        first, end = max(plan.starts[bucket], shard.first) - shard.first, min(plan.starts[bucket + 1], shard.end) - shard.first
        rows = planned.slice(first, end - first).select(["place", "origin", "path"])
        for place, origin, path in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            if not in_table(origins[origin]):
                yield path, origins[origin]
            else:
                assert spill is not None
                yield functools.partial(spill.read, place, job.bucket(shard.split, bucket))
