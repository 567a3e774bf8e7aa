"""What `vitscale pack` can be told, and the checks that need no file.

The command line is made from `PackConfig`, so this file imports nothing heavy: `--help` must answer at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Suppress  # the command line takes these as positional words

from data_tools.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's own warning level: 256 MiB as RGB
MAX_PIXELS_LIMIT = 2 * MAX_PIXELS  # Pillow itself refuses more, here and in training


class PackError(UserError):
    """An input or a setting that cannot be packed. Nothing has been written."""


@dataclass(frozen=True)
class PackConfig:
    """Packs images and labels into a dataset directory: OUT/train and OUT/val, or one split of them."""

    sources: Annotated[tuple[str, ...], Suppress]
    """A folder of class folders, Parquet or Arrow (Feather, IPC file or stream) tables, or folders of such tables."""

    out: Annotated[str, Suppress]
    """Folder that gets a subfolder for each split. Existing splits are never touched."""

    split: str = "train"
    """The split's name, if all samples go into one (val_fraction 0)."""

    val_fraction: float = 0.0
    """Share of the samples that go to OUT/val and the rest to OUT/train, chosen by a hash of the key. 0: one split."""

    name: str | None = None
    """The dataset's name. None: the name of the first source."""

    samples_per_shard: int = 10_000
    """Samples planned for each tar. Rejected images leave their tar shorter."""

    shuffle_seed: int | None = 0
    """Samples are shuffled over all shards with this seed. None: sorted, as listed."""

    image_column: str | None = None
    """Table column with the image's bytes, path, or {bytes, path}. None: one of the usual names (docs/data.md)."""

    image_root: str | None = None
    """Folder that paths in a table start from. None: the table's own folder."""

    label_column: str | None = None
    """Table column with labels: ints or names, or a list of either. None: one of the usual names."""

    score_column: str | None = None
    """Table column with a score for each label. None: `scores` or `score` if there, else no scores."""

    key_column: str | None = None
    """Table column to make keys from. None: one of the usual names, else the image's path, else table and row."""

    class_names: str | None = None
    """Text file with a class name a line; line n (from 0) is label n. None: those of another split in OUT, else the
    sorted names found."""

    num_classes: int | None = None
    """Number of classes when labels are ints. None: that of another split in OUT, else the largest label + 1."""

    write_cls: bool = False
    """Also write KEY.cls, the first label, for single-label readers (1,024 bytes more a sample)."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected unread (decompression bombs)."""

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
        if self.samples_per_shard < 1:
            raise PackError(f"samples_per_shard={self.samples_per_shard} must be at least 1; 10000 is usual")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**64:
            raise PackError(f"shuffle_seed={self.shuffle_seed} must be None or in 0..2**64-1; 0 would work")
        if self.num_classes is not None and not 1 <= self.num_classes < 2**31:
            raise PackError(f"num_classes={self.num_classes} must be in 1..2**31-1; 1000 would work")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise PackError(f"max_pixels={self.max_pixels} must be in 1..{MAX_PIXELS_LIMIT}; {MAX_PIXELS} is usual")
