"""`vitscale pack`: sources to dataset directories.

Where it stands: `sources.py` lists and reads, `tar.py` writes tars, `dataset.py` says what the directory holds; here
samples are dealt to splits and shards, images are judged, and the directory is put in place.

Invariants:
- the same listing and settings give the same bytes, wherever OUT lies and however the file system orders names;
- a sample's shard is planned before any image is read, so a rejected image changes no other shard;
- OUT/SPLIT appears in one rename, complete and on disk; what is unfinished has a hidden name and goes away on an error
  or Ctrl-C (after SIGKILL it stays and does no harm);
- image bytes are stored as they came.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from data_tools import dataset as fmt
from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.durable import publish_folders
from data_tools.keys import key_hashes
from data_tools.sources import MAX_IMAGE_BYTES, Images, Listing, Reject, list_sources, needs_spool
from data_tools.tar import TarWriter

Progress = Callable[[int, int, int], None]  # images done, images in all, rejected so far

INDEX_ROWS = 2**20  # a record batch of the index has this many rows or a shard more
SPLIT_SEED = 0x73706C6974  # "split": whether a key is in val must not hang on the shuffle's seed
PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
ACCEPTED = "accepted: jpeg, png, webp"
PATH_SETTINGS = ("sources", "out", "name", "split", "image_root", "class_names")  # not told in dataset.json's "made"


@dataclass(frozen=True)
class PackResult:
    """What became of one split. `reasons` counts the rejects by reason; rejects.parquet names each."""

    split: str
    path: Path
    samples: int
    shards: int
    rejects: int
    reasons: dict[str, int]
    classes: int
    empty_classes: tuple[str, ...]  # names or numbers of those that no sample of the split has
    bytes: int  # of all tars
    seconds: float
    content_hash: str


def pack(config: PackConfig, progress: Progress | None = None) -> tuple[PackResult, ...]:
    """Writes the split or splits that the config asks for, or raises PackError and leaves OUT as it was.

    Every image is decoded once in full, since nothing less finds a truncated one: 1 to 3 ms of a core for a
    photograph of 500 x 375 pixels.
    """
    config.check()
    out = Path(config.out)
    splits = ("train", "val") if config.val_fraction else (config.split,)
    _check_out(config, out, splits)
    listing = list_sources(config, _sibling(out, splits))
    plans = dict(zip(splits, plan_splits(listing.key, config), strict=True))
    for split, rows in plans.items():
        if not len(rows):
            raise PackError(f"no sample falls into {split} of {len(listing)} with val_fraction={config.val_fraction}")

    existed = out.exists()
    token = f"partial-{os.getpid()}-{secrets.token_hex(4)}"
    partials = {split: out / f".{split}.{token}" for split in splits}
    try:
        for partial in partials.values():
            partial.mkdir(parents=True)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata, and bombs, which have a limit of their own
            spool = None
            if config.shuffle_seed is not None and needs_spool(listing):
                # Has no name in the folder, so that not even a SIGKILL leaves it behind.
                spool = stack.enter_context(tempfile.TemporaryFile(dir=partials[splits[0]]))
            images = Images(listing, spool)
            tally = _Tally(progress, sum(map(len, plans.values())))
            results = []
            for split, rows in plans.items():
                results.append(_write_split(partials[split], split, rows, listing, images, config, tally))
        try:
            publish_folders({partial: out / split for split, partial in partials.items()})
        except OSError as error:
            raise PackError(f"{', '.join(splits)} cannot be put in place: {error}; was it packed meanwhile?") from None
    except BaseException:
        for partial in partials.values():
            shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                out.rmdir()
        raise
    return tuple(results)


# ----------------------------------------------------------------------------------------------- decisions


def plan_splits(keys: pa.Array, config: PackConfig) -> list[np.ndarray]:
    """Rows of the listing for each split, in the order they are packed."""
    rows = np.arange(len(keys))
    if config.shuffle_seed is not None:
        rows = np.argsort(key_hashes(keys, config.shuffle_seed), kind="stable")
    if not config.val_fraction:
        return [rows]
    in_val = key_hashes(keys, SPLIT_SEED) < np.uint64(config.val_fraction * 2**64)
    return [rows[~in_val[rows]], rows[in_val[rows]]]


def inspect_image(data: bytes, max_pixels: int) -> tuple[str, int, int] | Reject:
    """The extension (from the content), width and height of an image that decodes in full."""
    if not data:
        return Reject("empty", "0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        return Reject("too large", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    extension = _extension(data)
    if isinstance(extension, Reject):
        return extension
    try:
        with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[extension]]) as image:
            width, height = image.size
            if width * height > max_pixels:
                return Reject("too many pixels", f"{width} x {height}, max_pixels is {max_pixels}")
            image.load()
    except Image.DecompressionBombError as error:
        return Reject("too many pixels", str(error))
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        return Reject("damaged", f"{type(error).__name__}: {error}")
    return extension, width, height


def _extension(data: bytes) -> str | Reject:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    others = {b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff", b"\0\0\x01\0": "ico", b"8BPS": "psd"}
    for magic, name in others.items():
        if data.startswith(magic):
            return Reject("unsupported format", f"{name} ({ACCEPTED})")
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"avis"):
        return Reject("unsupported format", f"{data[8:12].decode()} ({ACCEPTED})")
    return Reject("not an image", f"begins with {data[:8]!r} ({ACCEPTED})")


def _check_out(config: PackConfig, out: Path, splits: tuple[str, ...]) -> None:
    if out.exists() and not out.is_dir():
        raise PackError(f"out={out} is a file; give a folder, or a path that does not exist")
    for split in splits:
        if os.path.lexists(out / split):
            raise PackError(f"{out / split} exists and is not overwritten; give another OUT, or move it away")
    for source in map(Path, config.sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise PackError(f"out={out} lies inside the source {source}; give an OUT outside of it")


def _sibling(out: Path, splits: tuple[str, ...]) -> Dataset | None:
    """Another split in OUT, whose classes the new one must share."""
    others = fmt.splits_in(out) if out.is_dir() else []
    return Dataset.open(others[0], check_shards=False) if others else None


# ------------------------------------------------------------------------------------------------- writing


class _Tally:
    """Counts over all splits, told to `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = self._rejects = 0

    def add(self, *, rejected: bool) -> None:
        self._done += 1
        self._rejects += rejected
        if self._progress is not None:
            self._progress(self._done, self._total, self._rejects)


@dataclass(frozen=True)
class _Shard:
    """A written tar and the rows that the directory's tables get for it."""

    index: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    bytes: int
    checksum: str


def _write_shard(
    path: Path, rows: list[int], images: Iterator[bytes | Reject], listing: Listing, config: PackConfig, tally: _Tally
) -> _Shard:
    """Writes the tar of these rows of the listing, whose images come next from `images`."""
    index, samples, rejects = [], [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        tar = TarWriter(file)
        for row in rows:
            image = next(images)
            key, source = listing.key[row].as_py(), listing.source(row)
            judged = image if isinstance(image, Reject) else inspect_image(image, config.max_pixels)
            if isinstance(judged, Reject):
                rejects.append({"source": source, "key": key, **asdict(judged)})
                tally.add(rejected=True)
                continue
            assert isinstance(image, bytes)  # as it was judged
            extension, width, height = judged
            labels, scores = listing.labels[row], listing.scores[row]
            offset = tar.add(f"{key}.{extension}", image)
            tar.add(f"{key}.json", json.dumps({"labels": labels, "scores": scores}).encode())
            if config.write_cls and labels:
                tar.add(f"{key}.cls", str(labels[0]).encode())
            digest = xxhash.xxh3_64_intdigest(image)
            index.append({"offset": offset, "size": len(image), "hash": digest, "labels": labels, "scores": scores})
            samples.append({"key": key, "hash": digest, "width": width, "height": height, "source": source})
            tally.add(rejected=False)
        tar.finish()
    return _Shard(index, samples, rejects, tar.bytes, tar.checksum)


def _write_split(
    folder: Path, split: str, rows: np.ndarray, listing: Listing, images: Images, config: PackConfig, tally: _Tally
) -> PackResult:
    """Writes all files of a split into `folder`, dataset.json last."""
    started = time.monotonic()
    manifest: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    max_labels, num_samples = 1, 0
    used = np.zeros(listing.num_classes, dtype=bool)
    wanted = images.read(rows.tolist())
    with _IndexWriter(folder) as index, _SamplesWriter(folder) as samples:
        for number, start in enumerate(range(0, len(rows), config.samples_per_shard)):
            name = fmt.shard_name(split, number)
            planned = rows[start : start + config.samples_per_shard].tolist()
            shard = _write_shard(folder / name, planned, wanted, listing, config, tally)
            index.write(shard.index)
            samples.write(number, shard.samples)
            rejects += shard.rejects
            counts = {"samples": len(shard.index), "bytes": shard.bytes, "first_sample": num_samples}
            manifest.append({"name": name, "checksum": shard.checksum, **counts})
            num_samples += len(shard.index)
            used[[label for row in shard.index for label in row["labels"]]] = True
            max_labels = max([max_labels, *(len(row["labels"]) for row in shard.index)])
    reasons = dict(Counter(reject["reason"] for reject in rejects).most_common())
    if not num_samples:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        example = f"{rejects[0]['source']}: {rejects[0]['reason']}, {rejects[0]['detail']}"
        raise PackError(f"no usable image is left for {split}: {found} (first: {example}); {ACCEPTED}")

    _write_parquet(folder / "manifest.parquet", manifest, fmt.MANIFEST_SCHEMA)
    if rejects:
        _write_parquet(folder / "rejects.parquet", rejects, fmt.REJECTS_SCHEMA)
    if listing.class_names is not None:
        (folder / "classes.txt").write_text("\n".join(listing.class_names) + "\n", encoding="utf-8")
    names = [Path(source).resolve().name for source in config.sources]
    # Where things lay and where they go must not change the content hash, so paths stay out.
    settings = {name: value for name, value in asdict(config).items() if name not in PATH_SETTINGS}
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tar")
    header: dict[str, Any] = {
        "format": fmt.FORMAT,
        "format_version": fmt.FORMAT_VERSION,
        "name": config.name if config.name is not None else names[0],
        "split": split,
        "num_samples": num_samples,
        "num_shards": len(manifest),
        "num_rejects": len(rejects),
        "num_classes": listing.num_classes,
        "max_labels": max_labels,
        "made": {"by": "vitscale pack", "sources": names, **settings},
        "files": {path.relative_to(folder).as_posix(): fmt.file_entry(path) for path in others},
    }
    header["content_hash"] = fmt.header_hash(header)
    (folder / "dataset.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return PackResult(
        split=split,
        path=Path(config.out) / split,
        samples=num_samples,
        shards=len(manifest),
        rejects=len(rejects),
        reasons=reasons,
        classes=listing.num_classes,
        empty_classes=tuple(listing.class_names[i] if listing.class_names else str(i) for i in np.flatnonzero(~used)),
        bytes=sum(entry["bytes"] for entry in manifest),
        seconds=time.monotonic() - started,
        content_hash=header["content_hash"],
    )


class _IndexWriter(ExitStack):
    """index.arrow, in record batches of about INDEX_ROWS: few enough to open at once, small enough to hold."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._writer = self.enter_context(pa.ipc.new_file(str(folder / "index.arrow"), fmt.INDEX_SCHEMA))
        self._pending: list[pa.Table] = []
        self.callback(self._flush)  # before the writer is closed

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._pending.append(pa.Table.from_pylist(rows, fmt.INDEX_SCHEMA))
        if sum(map(len, self._pending)) >= INDEX_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending = []


class _SamplesWriter(ExitStack):
    """samples/*.parquet: a file for each folder of shards, a row group for each shard."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        if shard % fmt.SHARDS_PER_FOLDER == 0:
            self.close()
            path = self._folder / fmt.samples_name(shard)
            path.parent.mkdir(exist_ok=True)
            self._writer = self.enter_context(pq.ParquetWriter(path, fmt.SAMPLES_SCHEMA, compression="zstd"))
        self._writer.write_table(pa.Table.from_pylist(rows, fmt.SAMPLES_SCHEMA), row_group_size=max(1, len(rows)))


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")
