"""What `vitscale pack` and `vitscale data index` can be told, and the checks that read no file.

The command line is made from `PackConfig` and `IndexConfig`, so this file imports nothing heavy: `--help` must answer at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress  # the command line takes these as positional words
from tyro.constructors import PrimitiveConstructorSpec

from data_tools.errors import UserError
from data_tools.storage import Url, is_url, location

MAX_PIXELS = 89_478_485  # Pillow's own warning level: 256 MiB as RGB
MAX_PIXELS_LIMIT = 2 * MAX_PIXELS  # Pillow itself refuses more, here and in training


class PackError(UserError):
    """An input or a setting that cannot be packed. Nothing has been written."""


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """A number of bytes from a text like 500MB, 1.5GiB or 1000000. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no number of bytes; 500MB, 1GB or 64MiB would work")
    return int(Decimal(found[1]) * UNITS[found[2].upper()])


BYTES = PrimitiveConstructorSpec(
    nargs=1,
    metavar="BYTES",
    instance_from_str=lambda words: parse_bytes(words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)
MAYBE_BYTES = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{None}|BYTES",
    instance_from_str=lambda words: None if words[0] == "None" else parse_bytes(words[0]),
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class PackConfig:
    """Packs images and labels into a dataset directory: OUT/train and OUT/val, or one split of them."""

    sources: Annotated[tuple[str, ...], Suppress]
    """A folder of class folders; Parquet, Arrow (Feather, IPC), CSV, TSV or JSONL tables; WebDataset tars; or folders of tables or tars.
    Any of them may be a URL: s3://, gs://, az://; https:// for a table or a tar."""

    out: Annotated[str, Suppress]
    """Folder that gets a subfolder for each split, here or in object storage (s3://bucket/folder). Existing splits are never touched."""

    split: str = "train"
    """The split's name, if all samples go into one (val_fraction 0)."""

    val_fraction: float = 0.0
    """Share of the samples that go to OUT/val and the rest to OUT/train, chosen by a hash of the key. 0: one split."""

    name: str | None = None
    """The dataset's name. None: the name of the first source."""

    samples_per_shard: int | None = None
    """Samples planned for each tar. Rejected images leave their tar shorter. None: 10,000, or what shard_bytes takes."""

    shard_bytes: Annotated[int | None, MAYBE_BYTES] = None
    """The most bytes planned for each tar (1GB, 500MB, 64MiB or a number), by the sizes of images as they come. None: any."""

    shuffle_seed: int | None = 0
    """Samples are shuffled over all shards with this seed. None: sorted, as listed."""

    image_column: str | None = None
    """Table column with the image's bytes, path, or {bytes, path}. None: one of the usual names (docs/data.md)."""

    image_root: str | None = None
    """Folder or URL that paths in a table start from. None: the table's own folder."""

    label_column: str | None = None
    """Table column with labels: ints or names, or a list of either. None: one of the usual names."""

    score_column: str | None = None
    """Table column with a score for each label. None: `scores` or `score` if there, else no scores."""

    key_column: str | None = None
    """Table column to make keys from. None: one of the usual names, else the image's path, else table and row."""

    class_map: str | None = None
    """File that says which class each label becomes: a JSON object, or CSV or TSV with two columns; null or nothing drops the label."""

    class_names: str | None = None
    """Text file with a class name a line; line n (from 0) is label n. None: those of another split in OUT, else the
    sorted names found."""

    num_classes: int | None = None
    """Number of classes when labels are ints. None: that of another split in OUT, else the largest label + 1."""

    write_cls: bool = False
    """Also write KEY.cls, the first label, for single-label readers (1,024 bytes more a sample)."""

    jobs: int = 0
    """Processes that read, check and write images; 0 takes the cores there are. The result does not depend on it."""

    task: str | None = None
    """I/N, I from 0: do this share of the shards only, as one of N tasks on any machines that see OUT. The same command without --task does
    what is left and puts the dataset together."""

    work: str | None = None
    """Folder for the work where OUT is a URL: listing, plan, locks, and each tar until it is put in OUT; with the same one a pack goes on.
    Tasks need one that all of them see."""

    requests: int = 32
    """Requests to object storage at once, in each process."""

    check_images: Literal["decode", "header"] = "decode"
    """decode: in full, as nothing less finds every damaged image; header: format, size and end marker, many times as fast."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected unread (decompression bombs)."""

    min_side: int = 1
    """Images with a shorter side are rejected."""

    max_side: int | None = None
    """Images with a longer side are made smaller, so that it is this many pixels, and encoded anew. None: all keep their size."""

    normalize: bool = False
    """Encodes anew, as upright 8-bit RGB, what readers show differently: turned by EXIF, CMYK, palette, alpha, 16-bit, animated."""

    quality: int = 92
    """Of JPEG and lossy WebP images that are encoded anew, by max_side or normalize."""

    @property
    def source_names(self) -> list[str]:
        """The sources by their last names, wherever they lie."""
        places = [location(source) for source in self.sources]
        return [place.name if isinstance(place, Url) else place.resolve().name for place in places]

    @property
    def dataset_name(self) -> str:
        """The name that dataset.json gets."""
        return self.name if self.name is not None else self.source_names[0]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are made."""
        return ("train", "val") if self.val_fraction else (self.split,)

    @property
    def shard_samples(self) -> int | None:
        """The most samples of a shard; None where only their bytes count."""
        return 10_000 if self.samples_per_shard is None and self.shard_bytes is None else self.samples_per_shard

    @property
    def encodes(self) -> bool:
        """Whether images may be encoded anew."""
        return self.max_side is not None or self.normalize

    @property
    def share(self) -> tuple[int, int]:
        """Which of how many shares of the shards to do."""
        if self.task is None:
            return 0, 1
        number, _, count = self.task.partition("/")
        return int(number), int(count)

    def check(self) -> None:
        """Raises PackError for a value that cannot work, whatever the files say."""
        if not self.sources:
            raise PackError("no source given; name a folder of class folders or a Parquet or Arrow table")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.split):
            raise PackError(f"split={self.split!r} must be 1 to 40 of A-Z a-z 0-9 _ -; train or val would work")
        if not 0 <= self.val_fraction < 1:
            raise PackError(f"val_fraction={self.val_fraction} must be at least 0 and below 1; 0.05 would work")
        if self.val_fraction and self.split != "train":
            raise PackError(f"val_fraction makes train and val, so split={self.split!r} cannot be given too; leave one out")
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise PackError(f"samples_per_shard={self.samples_per_shard} must be at least 1; 10000 is usual")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise PackError(f"shard_bytes={self.shard_bytes} must be at least 1; 1GB is usual")
        self._check_places()
        if self.jobs < 0:
            raise PackError(f"jobs={self.jobs} must be at least 0; 0 takes the cores there are")
        if self.task is not None and not (re.fullmatch(r"\d{1,6}/[1-9]\d{0,5}", self.task) and self.share[0] < self.share[1]):
            raise PackError(f"task={self.task} must be I/N with 0 <= I < N; 0/4 is the first of four")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**64:
            raise PackError(f"shuffle_seed={self.shuffle_seed} must be None or in 0..2**64-1; 0 would work")
        if self.num_classes is not None and not 1 <= self.num_classes < 2**31:
            raise PackError(f"num_classes={self.num_classes} must be in 1..2**31-1; 1000 would work")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise PackError(f"max_pixels={self.max_pixels} must be in 1..{MAX_PIXELS_LIMIT}; {MAX_PIXELS} is usual")
        if not 1 <= self.min_side < 2**31:
            raise PackError(f"min_side={self.min_side} must be at least 1; 32 would work")
        if self.max_side is not None and self.max_side < self.min_side:
            raise PackError(f"max_side={self.max_side} must be at least min_side={self.min_side}; 512 would work, or None")
        if not 1 <= self.quality <= 100:
            raise PackError(f"quality={self.quality} must be in 1..100; 92 is usual")

    def _check_places(self) -> None:
        for source in self.sources:
            location(source)  # raises where it is no URL
        out = location(self.out)
        if not isinstance(out, Url) and self.work is not None:
            raise PackError(f"work={self.work} is for an OUT in object storage; a local one keeps the work in {self.out}, so leave it out")
        if isinstance(out, Url) and out.on_web:
            raise PackError(f"out={out} cannot be written to; give a folder, or s3://, gs:// or az:// and a bucket")
        if isinstance(out, Url) and self.work is None:
            raise PackError(f"out={out} is in object storage, so work needs a folder here to go on from; --work /scratch/pack would work")
        if not 1 <= self.requests <= 1024:
            raise PackError(f"requests={self.requests} must be in 1..1024; 32 is usual")


@dataclass(frozen=True)
class IndexConfig:
    """Makes a dataset of WebDataset tars that others made, without touching them: its files go beside them."""

    tars: Annotated[tuple[str, ...], Suppress]
    """A folder with tars in it, at any depth, or tars."""

    out: str | None = None
    """Folder for the dataset's files, which then find the tars by relative paths. None: the tars' own folder."""

    name: str | None = None
    """The dataset's name. None: its folder's."""

    split: str = "train"
    """The split's name."""

    label_column: str | None = None
    """Field of a sample's `json` with its labels. None: one of the usual names, else the number in `cls` (docs/data.md)."""

    score_column: str | None = None
    """Field of a sample's `json` with a score for each label. None: `scores`."""

    class_names: str | None = None
    """Text file with a class name a line; line n (from 0) is label n. None: the sorted names found."""

    num_classes: int | None = None
    """Number of classes when labels are ints. None: the largest label + 1."""

    check_images: Literal["decode", "header"] = "decode"
    """decode: in full, as nothing less finds every damaged image; header: format, size and end marker, many times as fast."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are left out unread (decompression bombs)."""

    jobs: int = 0
    """Processes that read tars; 0 takes the cores there are. The result does not depend on it."""

    @property
    def folder(self) -> str:
        """Where the dataset's files go."""
        if self.out is not None:
            return self.out
        return self.tars[0] if Path(self.tars[0]).is_dir() else str(Path(self.tars[0]).parent)

    def check(self) -> None:
        """Raises PackError for a value that cannot work, whatever the tars hold."""
        if not self.tars:
            raise PackError("no tar given; name a folder of WebDataset tars, or the tars")
        if url := next((text for text in (*self.tars, self.folder) if is_url(text)), None):
            raise PackError(f"{url} is not indexed where it is; copy it to a disk, or `vitscale pack` it from there")
        if self.out is None and any((tar if Path(tar).is_dir() else str(Path(tar).parent)) != self.folder for tar in self.tars):
            raise PackError("the tars lie in several folders; `--out DIR` says where the dataset's files go")
        shared = ("split", "jobs", "num_classes", "max_pixels")
        PackConfig(sources=self.tars, out=self.folder, **{name: getattr(self, name) for name in shared}).check()
