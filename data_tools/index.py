"""`vitscale data index`: a dataset of WebDataset tars that others made, which are read and never touched.

Where it stands: `members.py` tells what lies in a tar, `sources.py` makes keys and classes of it as for `pack`, `assemble.py` the files.

    OUT/.indexing/             the work; a start that finds it goes on with it, and it goes away when OUT/dataset.json is there
      job.json                 settings: what goes on must have the same
      scans/                   what was found in each tar, which must have stayed as it was; a tar is done when its scan is there
      dataset/                 the files, until all of them are there

Invariants: each tar is read once, front to back; a sample that cannot be used is named in rejects.parquet and nothing else of its tar is
lost; the files get their names when all are on disk, dataset.json last.

Left to others: where a tar lies. `scan_tar` takes a file object.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_tools import dataset as fmt
from data_tools.assemble import PackResult, assemble, result_of
from data_tools.config import IndexConfig, PackConfig, PackError
from data_tools.durable import fsync, put_in_place, replace_file
from data_tools.errors import UserError
from data_tools.images import MAX_IMAGE_BYTES, Reject, inspect_image
from data_tools.labels import read_class_names
from data_tools.members import OpenTar, read_samples
from data_tools.origins import Origin, Part, source_name
from data_tools.processes import in_processes
from data_tools.progress import Update, no_update
from data_tools.shards import PIECE_SCHEMA, Piece
from data_tools.sources import Listing, make_listing
from data_tools.tars import IMAGE_MEMBERS, labels_of

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
FILES = ("manifest.parquet", "index.arrow", "samples", "classes.txt", "rejects.parquet", "dataset.json")
# What the scan of a tar depends on. Settings of classes may change between a start and the next: they come after it.
SCANNED_WITH = ("label_column", "score_column", "check_images", "max_pixels")

SCAN_SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string()),  # as the tar has it
        *(fmt.INDEX_SCHEMA.field(name) for name in ("offset", "size", "hash")),
        *(fmt.SAMPLES_SCHEMA.field(name) for name in ("width", "height")),
        pa.field("reason", pa.string()),  # why the sample is left out, or null
        pa.field("detail", pa.string()),
        pa.field("names", pa.list_(pa.large_string())),  # labels, one of the two is null
        pa.field("numbers", pa.list_(pa.int64())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Tar:
    """A tar to index."""

    path: Path
    name: str
    """From the dataset's folder, with slashes."""
    size: int
    mtime_ns: int


def index(config: IndexConfig, progress: Update = no_update) -> PackResult:
    """Makes the files of a dataset for tars that are there. Raises PackError, or TarError where one cannot be read to its end.

    An index that was ended, by whatever, goes on when it is asked for again; a finished one is left alone if it is of these tars.
    """
    config.check()
    if config.class_names is not None:
        read_class_names(config.class_names)  # a wrong name is told before hours of reading
    tars = find_tars(config)
    out = Path(config.folder)
    work = out / ".indexing"
    if (out / "dataset.json").exists():
        check_unchanged(out, tars, config)
        shutil.rmtree(work, ignore_errors=True)  # of an index that was killed in its last moment
        return result_of(out)
    _check_out(out, work)
    found = work.exists()
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _held(work), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata, and bombs, which have a limit of their own
            _check_settings(work, config)
            scan_tars(tars, work / "scans", config, progress)
            _check_times(tars)
            make_files(tars, work / "scans", work / "dataset", config)
            _publish(work, out)
    except BaseException as error:
        if not found and isinstance(error, UserError) and not any(work.glob("scans/*/*.arrow")):
            shutil.rmtree(work, ignore_errors=True)  # what has done nothing yet leaves nothing
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        raise
    shutil.rmtree(work)
    return result_of(out)


# ----------------------------------------------------------------------------------------------- what there is


def find_tars(config: IndexConfig) -> list[Tar]:
    """The tars that the config names, in their order: as given, a folder's by path. Raises PackError."""
    out = Path(os.path.abspath(config.folder))
    paths: list[Path] = []
    for text in config.tars:
        given = Path(text)
        if given.is_dir():
            inside = sorted(_files_below(given), key=os.fsencode)
            for split in fmt.splits_in(given):
                if any(Path(path).is_relative_to(split) and path.lower().endswith(".tar") for path in inside):
                    raise PackError(f"{given} holds a dataset, {split.name}, with tars of its own; give the folder of one")
            compressed = next((path for path in inside if path.lower().endswith(COMPRESSED_SUFFIXES)), None)
            if compressed is not None:
                raise PackError(f"{compressed} is compressed, and nothing can be read from its middle; unpack it first")
            tars = [Path(path) for path in inside if path.lower().endswith(".tar")]
            if not tars:
                raise PackError(f"there is no .tar in {given}; give a folder of WebDataset tars, or the tars")
            paths += tars
        elif text.lower().endswith(COMPRESSED_SUFFIXES):
            raise PackError(f"{given} is compressed, and nothing can be read from its middle; unpack it first")
        elif not given.is_file():
            raise PackError(f"{given} does not exist; give a folder of WebDataset tars, or the tars")
        elif given.suffix.lower() != ".tar":
            raise PackError(f"{given} is no tar by its name; give a folder of WebDataset tars, or the tars")
        else:
            paths.append(given)
    found = []
    for path in paths:
        name = Path(os.path.relpath(os.path.abspath(path), out)).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            raise PackError(f"the name of {str(path)!r} is not UTF-8; rename it") from None
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe, say, which would be waited for
            raise PackError(f"{path} is not a plain file; give a folder of WebDataset tars, or the tars")
        found.append(Tar(path, name, status.st_size, status.st_mtime_ns))
    if len({tar.name for tar in found}) < len(found):
        twice = next(tar.name for tar in found if sum(other.name == tar.name for other in found) > 1)
        raise PackError(f"{twice} is named twice; name each tar once")
    return found


def _files_below(folder: Path) -> Iterator[str]:
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(at, name) for name in files if not name.startswith("."))


def check_unchanged(out: Path, tars: list[Tar], config: IndexConfig) -> None:
    """Raises PackError unless the dataset that is there is of these tars, with these settings."""
    header = fmt.read_header(out)
    if header["made"].get("by") != fmt.BY_INDEX:
        raise PackError(f"{out} is a dataset already, by {header['made'].get('by')!r}; `--dali` and `--energon` add indices to it")
    asked = told_of(config, header["made"].get("listing"))
    changed = [f"{name}: {header['made'].get(name)} -> {asked[name]}" for name in asked if header["made"].get(name) != asked[name]]
    if config.name is not None and config.name != header["name"]:
        changed.append(f"name: {header['name']} -> {config.name}")
    if config.split != header["split"]:
        changed.append(f"split: {header['split']} -> {config.split}")
    there = {row["name"]: row["bytes"] for row in pq.read_table(out / "manifest.parquet").to_pylist()}
    now = {tar.name: tar.size for tar in tars}
    others = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    changed += [f"{name}: {_told(there.get(name))} -> {_told(now.get(name))}" for name in others]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise PackError(
            f"{out} is a dataset already, of something else ({', '.join(changed[:3])}{more}); `--out` puts another one elsewhere, "
            "or remove its dataset.json to make it anew"
        )


def _told(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"


def told_of(config: IndexConfig, listing: str | None) -> dict[str, Any]:
    """What dataset.json says of how the dataset was made."""
    return {
        "by": fmt.BY_INDEX,
        "listing": listing,
        "num_classes": config.num_classes,
        **{name: getattr(config, name) for name in SCANNED_WITH},
    }


def _check_out(out: Path, work: Path) -> None:
    if out.exists() and not out.is_dir():
        raise PackError(f"{out} is a file; give a folder as out")
    ours = json.loads((work / "publishing.json").read_text()) if (work / "publishing.json").is_file() else []
    taken = next((name for name in FILES if os.path.lexists(out / name) and name not in ours), None)
    if taken is not None:
        raise PackError(f"{out / taken} exists and is not overwritten; `--out DIR` puts the dataset's files elsewhere, or move it away")


@contextmanager
def _held(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"{work} is being worked on by another process; wait for its end, or stop it") from None
        yield


def _check_settings(work: Path, config: IndexConfig) -> None:
    """Makes sure that the work that is there was begun with these settings. Raises PackError."""
    settings = {name: getattr(config, name) for name in SCANNED_WITH}
    file = work / "job.json"
    if not file.is_file():
        replace_file(file, json.dumps(settings))
    begun = json.loads(file.read_text())
    if changed := [f"{name}: {begun.get(name)} -> {settings[name]}" for name in settings if begun.get(name) != settings[name]]:
        raise PackError(f"{work} was begun with other settings ({', '.join(changed)}); give its own to go on, or remove it to start anew")


def _check_times(tars: list[Tar]) -> None:
    for tar in tars:
        status = tar.path.stat()
        if (status.st_size, status.st_mtime_ns) != (tar.size, tar.mtime_ns):
            raise PackError(f"{tar.path} was changed while it was indexed; start again when nobody writes it")


# ------------------------------------------------------------------------------------------------- what lies in a tar


def scan_tars(tars: list[Tar], scans: Path, config: IndexConfig, progress: Update = no_update) -> None:
    """Scans the tars that have no scan yet, in processes."""
    todo = [tar for tar in tars if not scan_file(scans, tar).is_file()]
    total = sum(tar.size for tar in tars)
    done = total - sum(tar.size for tar in todo)

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    processes = min(config.jobs or len(os.sched_getaffinity(0)), len(todo))
    if processes > 1 and (config.jobs or sum(tar.size for tar in todo) > 2**26):  # less is not worth the start of a process
        in_processes(processes, functools.partial(_scan, scans=scans, config=config), todo, lambda _, size: tell(size))
    else:
        for tar in todo:
            _scan(tar, tell, scans, config)


def scan_file(scans: Path, tar: Tar) -> Path:
    """Where the scan of a tar lies; its name stays as tars come and go."""
    digest = xxhash.xxh3_128_hexdigest(tar.name.encode())
    return scans / digest[:2] / f"{digest}.arrow"


def _scan(tar: Tar, tell: Callable[[int], None], scans: Path, config: IndexConfig) -> None:
    """Scans one tar into its file."""
    with tar.path.open("rb") as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (tar.size, tar.mtime_ns):
            raise PackError(f"{tar.path} was changed while it was indexed; start again when nobody writes it")
        scan = scan_tar(file, str(tar.path), tar.size, config)
    scan = scan.replace_schema_metadata(scan.schema.metadata | {"tar": _stamp(tar)})
    target = scan_file(scans, tar)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with pa.OSFile(str(beside), "wb") as opened, pa.ipc.new_file(opened, scan.schema) as writer:
        writer.write_table(scan)
    put_in_place(beside, target)
    tell(tar.size)


def scan_tar(file: BinaryIO, name: str, size: int, config: IndexConfig) -> pa.Table:
    """What lies in a tar, of SCAN_SCHEMA; its checksum is in the metadata. `file` needs no more than `read`, and is read to its end."""
    opened = OpenTar(file, name, size, hashed=True)
    columns: dict[str, list[Any]] = {column: [] for column in SCAN_SCHEMA.names}
    packing = packing_of(config)
    for key, members in read_samples(opened, (*IMAGE_MEMBERS, "json", "cls"), MAX_IMAGE_BYTES):
        image = next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)
        judged = _judged(image[1] if image else None, image is not None, config)
        labels = _labels(key, {suffix: data for suffix, (_, data) in members.items()}, name, packing)
        reject = judged if isinstance(judged, Reject) else labels if isinstance(labels, Reject) else None
        values, scores = ([], []) if isinstance(labels, Reject) else labels
        member, data = image if image else (None, None)
        named = any(isinstance(value, str) for value in values)
        told = (
            _utf8(key),
            member.offset if member else 0,
            len(data) if data is not None else 0,
            xxhash.xxh3_64_intdigest(data) if data is not None else 0,
            *((0, 0) if isinstance(judged, Reject) else judged),
            reject.reason if reject else None,
            _utf8(reject.detail) if reject else None,
            values if named else None,
            None if named else values,
            scores,
        )
        for column, value in zip(columns.values(), told, strict=True):
            column.append(value)
    return pa.Table.from_pydict(columns, SCAN_SCHEMA.with_metadata({"checksum": opened.finish()}))


def packing_of(config: IndexConfig) -> PackConfig:
    """The same settings, for what indexing shares with packing."""
    shared = {name: getattr(config, name) for name in ("split", "class_names", "num_classes", *SCANNED_WITH)}
    return PackConfig(sources=config.tars, out=config.folder, name=config.name or Path(config.folder).resolve().name, **shared)


def _judged(data: bytes | None, there: bool, config: IndexConfig) -> tuple[int, int] | Reject:
    """Width and height of a sample's image, or why it cannot be used."""
    if not there:
        return Reject("missing", f"no member of the sample is {', '.join(IMAGE_MEMBERS)}")
    if data is None:
        return Reject("too large", f"the limit is {MAX_IMAGE_BYTES} bytes")
    judged = inspect_image(data, config.max_pixels, config.check_images == "decode")
    return judged if isinstance(judged, Reject) else judged[1:]


def _labels(key: str, members: dict[str, Any], tar: str, config: PackConfig) -> tuple[list[Any], list[float]] | Reject:
    """Labels and scores of a sample, or why it has none. Whether they are of the classes is seen when all are known."""
    try:
        labels, scores = labels_of({"__key__": key, **members}, Path(Path(tar).name), config.label_column, config.score_column)
    except (PackError, RecursionError, TypeError) as error:
        return Reject("no label", str(error) or "its json is nested too deep")
    if not (all(type(label) is str for label in labels) or all(type(label) is int and 0 <= label < 2**31 for label in labels)):
        return Reject("no label", f"labels {json.dumps(labels)[:200]} are neither all names nor all numbers from 0")
    try:
        "".join(label for label in labels if isinstance(label, str)).encode()
    except UnicodeEncodeError:  # JSON can say half of a surrogate pair
        return Reject("no label", f"labels {json.dumps(labels)[:200]} are no text")
    weights = [float(score) if type(score) in (int, float) and abs(score) < 3e38 else math.nan for score in scores]
    if len(weights) not in (0, len(labels)) or not all(map(math.isfinite, weights)):
        return Reject("no label", f"scores {json.dumps(scores)[:200]} are not a number for each of {len(labels)} labels")
    return labels, weights


def _utf8(text: str) -> str:
    """Names in tars are bytes, and Arrow's texts are UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------ the files


def make_files(tars: list[Tar], scans: Path, folder: Path, config: IndexConfig) -> None:
    """Makes the dataset's files of the scans of all tars in `folder`, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packing = packing_of(config)
    with tempfile.TemporaryDirectory(prefix="listing-", dir=folder.parent) as scratch:
        parts = ((_origin(tar), [_part(_read_scan(scans, tar))]) for tar in tars)
        listing = make_listing(parts, set(), packing, None, Path(scratch))
        pieces = _pieces(tars, scans, listing)
        names = [tar.name for tar in tars]
        assemble(
            folder, config.split, pieces, listing.num_samples, listing, packing, shard_names=names, told=told_of(config, listing.digest)
        )  # fmt: skip


def _origin(tar: Tar) -> Origin:
    within = Path(tar.name).parent.as_posix()
    return Origin("" if within == "." else f"{within}/", tar.path.parent, tar.path)


def _read_scan(scans: Path, tar: Tar) -> pa.Table:
    with pa.OSFile(str(scan_file(scans, tar))) as file:
        scan = pa.ipc.open_file(file).read_all()
    if scan.schema.metadata[b"tar"].decode() != _stamp(tar):
        raise PackError(f"{tar.path} was changed since it was read; restore it to go on, or remove {scans.parent} to start anew")
    return scan


def _stamp(tar: Tar) -> str:
    return f"{tar.name}: {tar.size} bytes of {tar.mtime_ns}"


def _part(scan: pa.Table) -> Part:
    """The samples of a tar as candidates, those that will be left out too: keys must be unique among all of them."""
    scan = scan.combine_chunks()
    used = [name for name in ("names", "numbers") if len(pc.list_flatten(scan[name]))]
    if len(used) > 1:
        raise PackError("some samples have numbers as labels and some have names; give all of them names or all numbers")
    labels = scan[used[0] if used else "numbers"]
    return Part(
        row=np.arange(len(scan), dtype=np.int64),
        path=pa.nulls(len(scan), pa.large_binary()),
        raw_key=_one(scan["key"]),
        label_lengths=_lengths(labels),
        labels=_one(pc.list_flatten(labels)),
        score_lengths=_lengths(scan["scores"]),
        scores=_one(pc.list_flatten(scan["scores"])),
    )


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    return lengths


def _pieces(tars: list[Tar], scans: Path, listing: Listing) -> Iterator[Piece]:
    """What the tables get for each tar: its scan, with keys and labels as the listing has them."""
    rows = itertools.chain.from_iterable(batch.select(["key", "labels", "scores"]).to_pylist() for batch in listing.batches())
    for tar in tars:
        scan = _read_scan(scans, tar)
        listed = list(itertools.islice(rows, len(scan)))
        sources = [source_name(_origin(tar), row, None) for row in range(len(scan))]
        columns = {name: scan[name] for name in ("offset", "size", "hash", "width", "height")}
        columns |= {name: pa.array([row[name] for row in listed], PIECE_SCHEMA.field(name).type) for name in ("key", "labels", "scores")}
        columns["source"] = pa.array(sources, pa.string())
        table = pa.Table.from_pydict({name: columns[name] for name in PIECE_SCHEMA.names}, PIECE_SCHEMA)
        reasons, details = scan["reason"].to_pylist(), scan["detail"].to_pylist()
        rejects = [
            {"source": sources[row], "key": listed[row]["key"], **asdict(Reject(reason, details[row]))}
            for row, reason in enumerate(reasons)
            if reason is not None
        ]
        checksum = scan.schema.metadata[b"checksum"].decode()
        yield Piece(table.filter(pc.is_null(scan["reason"])), tar.size, checksum, rejects)


def _publish(work: Path, out: Path) -> None:
    """Gives the files their names, dataset.json last; a start after a kill in between does it again."""
    made = work / "dataset"
    for path in [*made.rglob("*"), made]:
        fsync(path)
    replace_file(work / "publishing.json", json.dumps(FILES))
    for name in FILES:
        if (out / name).is_dir():  # ours, of a start that was killed
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
        if (made / name).exists():
            os.replace(made / name, out / name)
    fsync(out)
