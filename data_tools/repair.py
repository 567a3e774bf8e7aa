"""`vitscale data repair`: makes good what `verify` finds, from the tars, a copy, or the sources; what is lost for good can be retired.

Where it stands: `verify.py` names what is damaged; `pack.py` packs a shard again as it was planned, `index.py` reads foreign tars again.

    DATASET/.repairing/        what is made, until it has proved to be what was lost; the same command goes on with it after a kill

Invariants: a file is replaced, in one rename, by nothing but the bytes that its checksum names, so a repair can be wrong about what it
cannot mend, but never about what it did; where the sources are other ones nothing is changed at all; what has not been repaired stays as
it was.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools import dataset as fmt
from data_tools import index as foreign
from data_tools import pack as packing
from data_tools.amend import removals, write_overlay
from data_tools.assemble import IndexWriter, RejectsWriter, SamplesWriter, index_rows, write_parquet
from data_tools.config import IndexConfig, PackConfig, PackError
from data_tools.dataset import Dataset, DatasetError, SampleError
from data_tools.durable import put_in_place
from data_tools.errors import UserError, message_of
from data_tools.images import MAX_IMAGE_BYTES
from data_tools.members import OpenTar, TarError, read_samples
from data_tools.overlay import FILE_NAME, FOLDER
from data_tools.peer_indices import KINDS, index_file, make_indices, write_indices, wrong_indices
from data_tools.shards import Piece, read_piece
from data_tools.tars import IMAGE_MEMBERS
from data_tools.verify import Problem, check_file, verify

WORK = ".repairing"
# The names that files of a dataset can have
TABLE = re.compile(r"manifest\.parquet|index\.arrow|classes\.txt|rejects\.parquet|samples/\d{3,}\.parquet")
PACKED_TAR = re.compile(r"shards/\d{3,}/[A-Za-z0-9_-]{1,40}-\d{6,}\.tar")
FOREIGN_TAR = re.compile(r".*\.tar", re.IGNORECASE | re.DOTALL)

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class RepairError(UserError):
    """A dataset that cannot be repaired at all, or not with these sources. Nothing has been changed."""


@dataclass(frozen=True)
class Mended:
    """A file that is whole again (or would be tried), and where its bytes come from."""

    file: str
    how: str


@dataclass(frozen=True)
class RepairReport:
    """What a repair did, and what it could not do."""

    path: str
    content_hash: str
    mended: tuple[Mended, ...]
    retired: int
    """Samples that are lost and were given tombstones."""
    broken: tuple[Problem, ...]
    """What is damaged still, samples that are retired left out."""


def repair(
    path: Path,
    sources: tuple[str, ...] = (),
    *,
    image_root: str | None = None,
    class_map: str | None = None,
    content_hash: str | None = None,
    retire: bool = False,
    dry_run: bool = False,
    jobs: int = 0,
    progress: Tell | None = None,
) -> RepairReport:
    """Makes good what is damaged in a split's directory. Raises RepairError where nothing can be done, and then nothing has changed.

    Args:
        path: the split.
        sources: what it was packed from, or copies of it.
        image_root, class_map: as it was packed with.
        content_hash: which dataset it is, where dataset.json does not say it any more.
        retire: give tombstones to samples that are lost.
        dry_run: tell only what would be tried.
        jobs: processes; 0 takes the cores there are.
        progress: is called from any thread.
    """
    tell = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(fmt.check_on_disk(path)))
    if not path.is_dir():
        raise RepairError(f"{path} is not there; give the folder of a split")
    if dry_run:
        header, how = _header(path, content_hash)
        return _Repair(path, path / WORK, header, sources, image_root, class_map, jobs, tell).plan(how, retire)
    with _held(path) as work, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        header, how = _header(path, content_hash)
        return _Repair(path, work, header, sources, image_root, class_map, jobs, tell).run(how, retire)


@contextmanager
def _held(path: Path) -> Iterator[Path]:
    """The folder for the work, held against a second start; it goes away but for shards that were packed, if the repair is ended."""
    work = path / WORK
    work.mkdir(exist_ok=True)
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RepairError(f"{path} is being repaired by another process; wait for its end, or stop it") from None
        try:
            yield work
        except UserError:  # it cannot go on, so nothing is worth keeping
            shutil.rmtree(work)
            raise
        shutil.rmtree(work)


# ----------------------------------------------------------------------------------------------------- dataset.json


def _header(path: Path, content_hash: str | None) -> tuple[dict[str, Any], bytes | None]:
    """dataset.json, and its bytes if it had to be restored. Raises RepairError."""
    try:
        header = fmt.read_header(path)
    except DatasetError as error:
        if not any((path / name).exists() for name in ("dataset.json", "manifest.parquet", "index.arrow")):
            raise  # nobody's dataset
        restored = restored_header(path, content_hash)
        if restored is None:
            raise RepairError(
                f"{error}. It cannot be derived from what is left: its content_hash must be readable, or given (`--content-hash`: a run's "
                "run.json has it), and nothing else in it be lost that no split beside it has"
            ) from None
        return json.loads(restored), restored
    if content_hash not in (None, header["content_hash"]):
        raise RepairError(f"{path} is dataset {header['content_hash']}, not {content_hash}; give its own, or none")
    return header, None


def restored_header(path: Path, content_hash: str | None = None) -> bytes | None:
    """The bytes of a damaged dataset.json, if its content_hash proves any: with one bit mended, or derived from the files."""
    file = path / "dataset.json"
    data = file.read_bytes() if file.is_file() else b""
    said = re.search(rb'"content_hash": "([0-9a-f]{64})"', data)
    wanted = content_hash or (said[1].decode() if said else None)
    for candidate in itertools.chain(_mended_bits(data), _derived(path, data) if wanted else ()):
        with suppress(ValueError, RecursionError):
            header = json.loads(candidate)
            if isinstance(header, dict) and header.get("format_version") == fmt.FORMAT_VERSION:
                found = fmt.header_hash(header)
                if found == header.get("content_hash") and content_hash in (None, found) and _complete(header):
                    return candidate
                if found == wanted and _complete(header):
                    return json.dumps({**header, "content_hash": found}, indent=2).encode() + b"\n"
    return None


def _complete(header: dict[str, Any]) -> bool:
    """Whether it has what every dataset.json has; a hash of something shorter proves nothing."""
    return {"name", "split", "num_samples", "num_shards", "num_rejects", "num_classes", "max_labels", "made", "files"} <= header.keys()


def _mended_bits(data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        for bit in range(8):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _derived(path: Path, data: bytes) -> Iterator[bytes]:
    """What dataset.json may have been, by the files that it spoke of, what of it can be read, and other splits of the same pack."""
    said: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):
        loaded = json.loads(data)
        said = loaded if isinstance(loaded, dict) else {}
    others = [said]
    for other in fmt.splits_in(path.parent):
        with suppress(UserError):
            others.append(fmt.read_header(other))
    try:
        manifest = pq.read_table(path / "manifest.parquet").to_pylist()
        rejects = path / "rejects.parquet"
        num_rejects = pq.read_metadata(rejects).num_rows if rejects.is_file() else 0
        with pa.memory_map(str(path / "index.arrow")) as mapped:
            reader = pa.ipc.open_file(mapped)
            batches = [reader.get_batch(number)["labels"] for number in range(reader.num_record_batches)]
            max_labels = max(1, *(int(np.diff(labels.offsets.to_numpy()).max(initial=0)) for labels in batches))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return
    there = ["manifest.parquet", "index.arrow", "classes.txt", "rejects.parquet"]
    names = sorted(
        name for name in [*there, *(f"samples/{file.name}" for file in path.glob("samples/*.parquet"))] if (path / name).is_file()
    )
    classes = path / "classes.txt"
    counted: list[Any] = [len(classes.read_bytes().removesuffix(b"\n").split(b"\n"))] if classes.is_file() else []
    named = re.search(r"/([A-Za-z0-9_-]+)-\d{6}\.tar$", manifest[0]["name"]) if manifest else None
    files = {name: fmt.file_entry(path / name) for name in sorted(names, key=lambda name: Path(name).parts)}
    splits = [named[1]] if named else [other.get("split") for other in others]
    numbers = counted or [other.get("num_classes") for other in others]
    for made, name, split, classes_there in itertools.product(
        [other.get("made") for other in others], [other.get("name") for other in others], splits, numbers
    ):  # fmt: skip
        header = {
            "format": fmt.FORMAT,
            "format_version": fmt.FORMAT_VERSION,
            "name": name,
            "split": split,
            "num_samples": sum(row["samples"] for row in manifest),
            "num_shards": len(manifest),
            "num_rejects": num_rejects,
            "num_classes": classes_there,
            "max_labels": max_labels,
            "made": made,
            "files": files,
        }
        yield json.dumps(header).encode()


# ------------------------------------------------------------------------------------------------------------ the repair


class _Repair:
    """One repair: what is damaged, and the ways to make it good, from the cheapest to the dearest."""

    def __init__(
        self,
        path: Path,
        work: Path,
        header: dict[str, Any],
        sources: tuple[str, ...],
        image_root: str | None,
        class_map: str | None,
        jobs: int,
        tell: Tell,
    ) -> None:
        self.path, self.work, self.header, self.jobs, self.tell = path, work, header, jobs, tell
        self.packed = header["made"].get("by") == fmt.BY_PACK
        self.copies = [Path(text) for text in sources if not self.packed or (Path(text) / "dataset.json").is_file()]
        self.sources = tuple(text for text in sources if Path(text) not in self.copies)
        self.image_root, self.class_map = image_root, class_map
        self.mended: list[Mended] = []
        self.why: dict[str, str] = {}
        """Of files that could not be mended, what was found instead."""

    # ------------------------------------------------------------------------------------------------- what to do

    def run(self, restored: bytes | None, retire: bool) -> RepairReport:
        """Does all there is to do."""
        self._check_names(self.header["files"], TABLE)
        self._check_sources()
        if restored is not None:
            made = self.work / "dataset.json"
            made.write_bytes(restored)
            self._replace("dataset.json", made, "restored from what is left of it")
        if "manifest.parquet" in self._damaged_tables():
            self._mend_manifest()
        damaged = self._damaged()
        if damaged:
            self._from_copies(damaged)
            if self.packed:
                self._from_siblings(damaged)
                self._from_sources(damaged)
                self._index_from_tars(damaged)
            else:
                self._by_indexing(damaged)
        broken = self._peer_indices(damaged)
        retired = 0
        if retire and broken:
            retired, broken = self._retire(broken)
        return RepairReport(str(self.path), self.header["content_hash"], tuple(self.mended), retired, tuple(self._explained(broken)))

    def plan(self, restored: bytes | None, retire: bool) -> RepairReport:
        """Tells what `run` would try; whether the bytes are the right ones is seen when they are made."""
        if restored is not None:
            self.mended.append(Mended("dataset.json", "would be restored"))
            return RepairReport(str(self.path), self.header["content_hash"], tuple(self.mended), 0, ())
        damaged = self._damaged()
        broken = []
        for name, problems in damaged.items():
            how = self._way(name, damaged)
            if how is not None:
                self.mended.append(Mended(name, f"would be {how}"))
            else:
                broken += problems
                self.why[name] = "its lost samples would be retired" if retire and name.endswith(".tar") else "give SOURCE, or a copy"
        return RepairReport(str(self.path), self.header["content_hash"], tuple(self.mended), 0, tuple(self._explained(broken)))

    def _way(self, name: str, damaged: dict[str, list[Problem]]) -> str | None:
        if any(self._in_copy(copy, name) for copy in self.copies):
            return "copied"
        if name.endswith(tuple(KINDS)):
            return "made again from the tar"
        if name.startswith(f"{FOLDER}/"):  # an overlay, which nothing else tells of
            return None
        if not self.packed:
            return None if name.endswith(".tar") else "made again from the tars"
        if self.sources:
            return "rebuilt from the tars" if name in ("index.arrow", "manifest.parquet") else "packed again from the sources"
        if name == "classes.txt" and any(self._siblings(name)):
            return "copied from another split"
        if name in ("index.arrow", "manifest.parquet") and not any(other.endswith(".tar") for other in damaged):
            return "rebuilt from the tars"
        return None

    def _explained(self, broken: Iterable[Problem]) -> Iterator[Problem]:
        for problem in broken:
            more = f"; {why}" if problem.sample is None and (why := self.why.get(problem.file)) else ""
            yield replace(problem, what=problem.what + more)

    def _damaged_tables(self) -> list[str]:
        return [name for name, entry in self.header["files"].items() if check_file(self.path, name, entry)]

    def _damaged(self) -> dict[str, list[Problem]]:
        """What `verify` finds, by file; strangers are nobody's damage."""
        report = verify(self.path, jobs=self.jobs, progress=lambda done, total: self.tell("reading", done, total))
        found: dict[str, list[Problem]] = {}
        for problem in report.problems:
            if problem.what != "is not a file of this dataset":
                found.setdefault(problem.file, []).append(problem)
        return found

    def _shards(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.path / "manifest.parquet").to_pylist()
        self._check_names((row["name"] for row in rows), PACKED_TAR if self.packed else FOREIGN_TAR)
        return rows

    def _check_names(self, names: Iterable[str], rule: re.Pattern[str]) -> None:
        """A dataset comes from anywhere, and no name in it may make a repair write elsewhere."""
        if (bad := next((name for name in names if not rule.fullmatch(name)), None)) is not None:
            raise RepairError(f"{self.path} names {bad!r} as a file of its own, which no dataset has; it is not repaired")

    # ------------------------------------------------------------------------------------------- putting in place

    def _replace(self, name: str, made: Path, how: str) -> None:
        """Puts a file, which has been proved, into the dataset; until then the damaged one is there."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(made, target)
        self.mended.append(Mended(name, how))

    def _offer(self, name: str, made: Path, how: str) -> bool:
        """Puts a table in place if it is the one that dataset.json names."""
        if not made.is_file() or fmt.file_entry(made) != self.header["files"][name]:
            self.why[name] = f"{how} it has other bytes, as with another version of pyarrow, or other sources"
            return False
        self._replace(name, made, how)
        return True

    def _offer_tar(self, shard: dict[str, Any], made: Path, how: str) -> bool:
        """Puts a tar in place if it is the one that the manifest names."""
        if not made.is_file() or made.stat().st_size != shard["bytes"] or fmt.tar_checksum(made) != shard["checksum"]:
            self.why[shard["name"]] = f"{how} it has other bytes: an image is another one now"
            return False
        self._replace(shard["name"], made, how)
        return True

    def _offer_overlay(self, name: str, made: Path) -> bool:
        """Puts an overlay in place if it is the one that its own name names."""
        told = FILE_NAME.fullmatch(Path(name).name)
        good = told is not None and name.startswith(f"{FOLDER}/") and fmt.file_entry(made)["sha256"].startswith(told[3])
        if good:
            self._replace(name, made, "copied")
        return good

    # -------------------------------------------------------------------------------------------- from copies

    def _from_copies(self, damaged: dict[str, list[Problem]]) -> None:
        """Files that lie whole in a copy, or in another split of the same pack."""
        shards = {shard["name"]: shard for shard in self._shards()} if "manifest.parquet" not in damaged else {}
        for name in list(damaged):
            for copy in self.copies:
                found = self._in_copy(copy, name)
                if name in damaged and found is not None:
                    made = self.work / "copied"
                    shutil.copyfile(found, made)
                    if name in self.header["files"]:
                        good = self._offer(name, made, "copied")
                    elif name in shards:
                        good = self._offer_tar(shards[name], made, "copied")
                    else:
                        good = self._offer_overlay(name, made)
                    if good:
                        del damaged[name]

    def _in_copy(self, copy: Path, name: str) -> Path | None:
        """Where a file lies in a copy, which for tars that others made may be a folder with them."""
        places = (copy / name, copy / Path(name).name) if name.endswith(".tar") else (copy / name,)
        return next((place for place in places if place.is_file() and place.resolve() != (self.path / name).resolve()), None)

    def _siblings(self, name: str) -> Iterator[Path]:
        """Files of that name in other splits, with the bytes that this one must have."""
        for file in self.path.parent.glob(f"*/{name}"):
            if file.parent.resolve() != self.path.resolve() and fmt.file_entry(file) == self.header["files"][name]:
                yield file

    def _from_siblings(self, damaged: dict[str, list[Problem]]) -> None:
        if "classes.txt" in damaged and (found := next(self._siblings("classes.txt"), None)):
            made = self.work / "copied"
            shutil.copyfile(found, made)
            if self._offer("classes.txt", made, "copied from another split"):
                del damaged["classes.txt"]

    # ---------------------------------------------------------------------------------------------- from the tars

    def _mend_manifest(self) -> None:
        """The manifest from a copy, from the tars, or, if one of those is damaged too, from the sources."""
        damaged = {"manifest.parquet": [Problem("manifest.parquet", "is damaged")]}
        self._from_copies(damaged)
        if not damaged:
            return
        if not self.packed:
            self._by_indexing(damaged)
        else:
            names = [fmt.shard_name(self.header["split"], number) for number in range(self.header["num_shards"])]
            made = False
            with suppress(OSError, TarError):
                made = self._offer_manifest(names, (_shard_row(self.path / name) for name in names), "rebuilt from the tars")
            if not made and self.sources:
                pieces = self._packed_again(range(self.header["num_shards"]))
                rows = (
                    {"samples": len(piece.rows), "bytes": piece.bytes, "checksum": piece.checksum}
                    for piece in map(pieces, range(len(names)))
                )
                self._offer_manifest(names, rows, "packed again from the sources")
        if check_file(self.path, "manifest.parquet", self.header["files"]["manifest.parquet"]):
            raise RepairError(
                f"{self.path / 'manifest.parquet'} is damaged, and what the tars give is not what it was: a tar is damaged too; "
                "give SOURCE, or restore it"
            )

    def _offer_manifest(self, names: list[str], rows: Iterable[dict[str, Any]], how: str) -> bool:
        manifest, first = [], 0
        for name, row in zip(names, rows, strict=True):
            manifest.append({"name": name, "first_sample": first, **row})
            first += row["samples"]
        made = self.work / "manifest.parquet"
        write_parquet(made, manifest, fmt.MANIFEST_SCHEMA)
        return self._offer("manifest.parquet", made, how)

    def _index_from_tars(self, damaged: dict[str, list[Problem]]) -> None:
        if "index.arrow" not in damaged:
            return
        shards = self._shards()
        try:
            with IndexWriter(self.work, index_rows(self.header["num_samples"] + self.header["num_rejects"])) as writer:
                for number, shard in enumerate(shards):
                    writer.write(_index_rows(self.path / shard["name"]))
                    self.tell("rebuilding the index", number + 1, len(shards))
        except (OSError, TarError) as error:
            self.why["index.arrow"] = f"it cannot be rebuilt: {message_of(error)}"
            return
        if self._offer("index.arrow", self.work / "index.arrow", "rebuilt from the tars"):
            del damaged["index.arrow"]

    # ------------------------------------------------------------------------------------------- from the sources

    def _check_sources(self) -> None:
        """Makes sure that the sources are the ones, before anything is changed."""
        if not self.sources:
            return
        known = {field.name for field in fields(PackConfig)}
        settings = {name: value for name, value in self.header["made"].items() if name in known and name != "sources"}
        if "classes.txt" not in self.header["files"] and settings.get("num_classes") is None:
            settings["num_classes"] = self.header["num_classes"]  # of another split, perhaps
        self.config = PackConfig(
            self.sources,
            str(self.work / "out"),
            split="train" if settings.get("val_fraction") else self.header["split"],
            name=self.header["name"],
            image_root=self.image_root,
            class_map=self.class_map,
            class_names=None if self.class_map is not None else self._class_names(),
            jobs=self.jobs,
            **settings,
        )
        self.config.check()
        shutil.rmtree(self.work / "scratch", ignore_errors=True)
        (self.work / "scratch").mkdir()
        (self.work / "pack").mkdir(exist_ok=True)
        try:
            self.job = packing.prepare(self.config, self.work / "pack", self.work / "scratch")
        except packing.OtherPackError:  # what an ended repair left is of other sources
            shutil.rmtree(self.work / "pack")
            return self._check_sources()
        if self.job.listing.digest != self.header["made"].get("listing"):
            raise RepairError(
                f"{', '.join(self.sources)} list other samples than {self.path} was packed from, so nothing was changed; "
                "give all that was packed, in the same order, as it was then"
            )

    def _class_names(self) -> str | None:
        """A whole classes.txt, of this split or of another one; without it, the names are those that the labels have."""
        entry = self.header["files"].get("classes.txt")
        if entry is None:
            return None
        whole = check_file(self.path, "classes.txt", entry) is None
        found = self.path / "classes.txt" if whole else next(self._siblings("classes.txt"), None)
        return None if found is None else str(found)

    def _packed_again(self, numbers: Iterable[int]) -> Callable[[int], Piece]:
        """Packs the shards with these numbers again, beside the dataset, and gives their pieces."""
        wanted = set(numbers)
        shards = {shard.number: shard for shard in self.job.shards if shard.split == self.header["split"]}
        todo = replace(self.job, shards=[shards[number] for number in sorted(wanted)])
        packing.write_shards(todo, self.config, lambda done, total, _: self.tell("packing", done, total))
        return lambda number: read_piece(self.job.piece(shards[number]))

    def _from_sources(self, damaged: dict[str, list[Problem]]) -> None:
        """What the tars cannot give: damaged tars, and what stood in no tar."""
        if not self.sources:
            return
        shards = self._shards()
        numbers = {shard["name"]: number for number, shard in enumerate(shards)}
        tables = [name for name in damaged if name.startswith("samples/")]
        wanted = {numbers[name] for name in damaged if name in numbers}
        wanted |= {number for number in range(len(shards)) if fmt.samples_name(number) in tables}
        if "rejects.parquet" in damaged:
            wanted = set(range(len(shards)))
        piece = self._packed_again(wanted)
        how = "packed again from the sources"
        tars = {shard.number: self.job.tar(shard) for shard in self.job.shards if shard.split == self.header["split"]}
        for name in [name for name in damaged if name in numbers]:
            if self._offer_tar(shards[numbers[name]], tars[numbers[name]], how):
                del damaged[name]
        for table in tables:
            with SamplesWriter(self.work) as samples:
                for number in range(len(shards)):
                    if fmt.samples_name(number) == table:
                        samples.write(number, piece(number).rows.select(fmt.SAMPLES_SCHEMA.names))
            if self._offer(table, self.work / table, how):
                del damaged[table]
        if "rejects.parquet" in damaged:
            with RejectsWriter(self.work) as rejects:
                for number in range(len(shards)):
                    rejects.write(piece(number).rejects)
            if self._offer("rejects.parquet", self.work / "rejects.parquet", how):
                del damaged["rejects.parquet"]
        if "classes.txt" in damaged:
            made = self.work / "classes.txt"
            made.write_text("\n".join(self.job.listing.class_names or ()) + "\n", encoding="utf-8")
            if self._offer("classes.txt", made, how):
                del damaged["classes.txt"]

    # ----------------------------------------------------------------------------------------- tars that others made

    def _by_indexing(self, damaged: dict[str, list[Problem]]) -> None:
        """The files beside tars that others made, made again."""
        tables = [name for name in damaged if name in self.header["files"]]
        if not tables or self.header["made"].get("by") != fmt.BY_INDEX:
            return
        try:
            if "manifest.parquet" in damaged:
                config = self._index_config((str(self.path),))
            else:
                config = self._index_config(tuple(str(self.path / shard["name"]) for shard in self._shards()))
            tars = foreign.find_tars(config)
            if len(tars) != self.header["num_shards"]:
                raise TarError(f"there are {len(tars)} tars in {self.path}, and the dataset has {self.header['num_shards']}")
            foreign.scan_tars(tars, self.work / "scans", config, lambda done, total: self.tell("reading", done, total))
            foreign.make_files(tars, self.work / "scans", self.work / "dataset", config)
        except (OSError, TarError, PackError) as error:
            self.why |= dict.fromkeys(tables, f"it cannot be made again: {message_of(error)}")
            return
        for name in tables:
            if self._offer(name, self.work / "dataset" / name, "made again from the tars"):
                del damaged[name]

    def _index_config(self, tars: tuple[str, ...]) -> IndexConfig:
        made = {name: self.header["made"][name] for name in (*foreign.SCANNED_WITH, "num_classes")}
        place = {"out": str(self.path), "name": self.header["name"], "split": self.header["split"]}
        return IndexConfig(tars, class_names=self._class_names(), jobs=self.jobs, **place, **made)

    # -------------------------------------------------------------------------------------------------- what is left

    def _peer_indices(self, damaged: dict[str, list[Problem]]) -> list[Problem]:
        """Makes the indices of other readers anew, and tells what stays broken."""
        kinds = tuple(kind for kind in KINDS if any(index_file(self.path / shard["name"], kind).is_file() for shard in self._shards()))
        tars = {shard["name"]: self.path / shard["name"] for shard in self._shards()}
        mended = {done.file for done in self.mended}
        broken = [problem for name, problems in damaged.items() if not name.endswith(tuple(KINDS)) for problem in problems]
        for name, tar in tars.items():
            beside = {kind: index_file(Path(name), kind).as_posix() for kind in kinds}
            if name in damaged or not (name in mended or set(beside.values()) & damaged.keys()):
                continue
            for kind, what in wrong_indices(tar, kinds).items():
                if kind in make_indices(tar, kinds):
                    write_indices([tar], [kind], replace=True)
                    self.mended.append(Mended(beside[kind], "made again from the tar"))
                else:  # of a tar without samples, which has none
                    index_file(tar, kind).unlink()
                    self.mended.append(Mended(beside[kind], f"removed: it {what}"))
        return broken

    def _retire(self, broken: list[Problem]) -> tuple[int, list[Problem]]:
        """Gives tombstones to the samples that are lost, and tells what is broken besides their tars."""
        tars = {problem.file for problem in broken if problem.file.endswith(".tar")}
        others = [problem for problem in broken if problem.file not in tars]
        if not tars or others:  # without index and keys nobody can say what is lost
            return 0, broken
        dataset = Dataset.open(self.path, check_shards=False)
        lost: list[int] = []
        reasons: list[str] = []
        for shard in self._shards():
            file = self.path / shard["name"]
            if shard["name"] not in tars:
                continue
            cut = not file.is_file() or file.stat().st_size != shard["bytes"]  # such a tar must not be read: `Dataset.open` refuses it
            for sample in range(shard["first_sample"], shard["first_sample"] + shard["samples"]):
                if not dataset.overlay.is_removed(sample) and (cut or _unreadable(dataset, sample)):
                    lost.append(sample)
                    reasons.append(f"lost: {shard['name']} {'is missing or cut' if cut else 'is damaged'}")
        if lost:
            write_overlay(dataset, "retired", removals(np.array(lost, dtype=np.int64), pa.array(reasons, pa.string())))
        return len(lost), []


def _unreadable(dataset: Dataset, sample: int) -> bool:
    try:
        dataset.read(sample)
    except SampleError:
        return True
    return False


def _shard_row(tar: Path) -> dict[str, Any]:
    """What the manifest says of a tar that `pack` wrote."""
    with tar.open("rb") as file:
        opened = OpenTar(file, str(tar), os.fstat(file.fileno()).st_size, hashed=True)
        count = sum(1 for _ in read_samples(opened, (), 0))
        return {"samples": count, "bytes": opened.size, "checksum": opened.finish()}


def _index_rows(tar: Path) -> pa.Table:
    """What the index says of a tar that `pack` wrote. Raises TarError."""
    columns: dict[str, list[Any]] = {name: [] for name in fmt.INDEX_SCHEMA.names}
    with tar.open("rb") as file:
        opened = OpenTar(file, str(tar), os.fstat(file.fileno()).st_size, hashed=False)
        for _, members in read_samples(opened, (*IMAGE_MEMBERS, "json"), MAX_IMAGE_BYTES):
            image = next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)
            try:
                assert image is not None
                told = json.loads(members["json"][1] or b"")
                values = (image[0].offset, image[0].size, xxhash.xxh3_64_intdigest(image[1] or b""), told["labels"], told["scores"])
            except (ValueError, KeyError, TypeError, AssertionError):
                raise TarError(f"{tar} has a sample without image or labels") from None
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    try:
        return pa.Table.from_pydict(columns, fmt.INDEX_SCHEMA)
    except (pa.ArrowException, OverflowError, TypeError):
        raise TarError(f"{tar} has labels or scores that are no numbers") from None
