"""Which samples to look at, and what they look like: the contact sheet of a dataset, by class, by shard or at random.

Where it stands: picks numbers of samples through a `Dataset`, reads and decodes those alone; `vitscale data preview` prints them, and
`data_pages.py` draws the page.

Invariants: the choice depends on the dataset, the seed and the words of the command alone; each sample of a class is as likely as any
other; picking reads the label column once and holds the samples picked so far; an image that cannot be read or decoded becomes a tile that
says why, and is never replaced by another one.

Left to others: mending (`verify` names all that is damaged).
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_tools.dataset import Dataset, DatasetError, SampleError
from data_tools.errors import UserError
from data_tools.images import decode
from data_tools.progress import Update, no_update
from data_tools.storage import Location

MOST_TILES = 5_000  # whose pictures are held


class PreviewError(UserError):
    """A class that the dataset does not have, or a number of images that makes no sense."""


@dataclass(frozen=True)
class Tile:
    """One sample as it is shown."""

    sample: int
    key: str
    shard: str
    labels: tuple[tuple[int, str, float], ...]
    """Label, name, score."""
    scored: bool
    """Whether any label has a score other than 1, which is also that of a label without one."""
    bytes: int
    width: int
    height: int
    """As samples/*.parquet has them, else the decoded image's; 0 where neither is to be had."""
    source: str
    damage: str | None
    """Why there is no image."""
    thumbnail: Image.Image | None
    """RGB."""


@dataclass(frozen=True)
class Group:
    """The tiles of one class or shard, or all of them."""

    title: str
    samples: int
    """That the group has in all."""
    bytes: int | None
    """Of a shard's tar."""
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet."""

    path: str
    name: str
    split: str
    content_hash: str
    samples: int
    by: str
    seed: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Pick:
    """The samples chosen for one group, in the dataset's order, and how many there were to choose from."""

    title: str
    samples: tuple[int, ...]
    of: int
    bytes: int | None = None


def sheet(
    path: Location,
    *,
    by: str = "class",
    groups: int = 12,
    images: int = 12,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    side: int = 192,
    progress: Update = no_update,
) -> Sheet:
    """Picks samples of the split in directory or at URL `path` and decodes them.

    Raises DatasetError, or PreviewError for words that make no sense.

    Args:
        by: class, shard or random.
        groups: classes or shards that are picked.
        images: samples of each class or shard, or in all if `by` is random.
        classes: names or numbers, instead of picked ones.
        seed: of every choice.
        side: longest side of a thumbnail; smaller images are left as they are.
        progress: called with what is done and what there is in all.
    """
    for name, value, most in (("groups", groups, 1_000), ("images", images, 10_000), ("side", side, 4_096)):
        if not 1 <= value <= most:
            raise PreviewError(f"{name}={value} must be in 1..{most}; 8 would work")
    if classes and by != "class":
        raise PreviewError(f"classes are named, and by is {by}; by class would work")
    asked = images * (1 if by == "random" else len(classes) or groups)
    if asked > MOST_TILES:
        raise PreviewError(f"{asked:,} samples are too many to look at; {MOST_TILES:,} would work")
    dataset = Dataset.open_checked(path, check_shards=False)  # a tar that is cut off or missing shows in its tiles
    if by == "class":
        picks = pick_classes(dataset, groups, images, seed, tuple(dict.fromkeys(_label_of(dataset, word) for word in classes)), progress)
    elif by == "shard":
        picks = pick_shards(dataset, groups, images, seed)
    else:
        picks = [Pick("random samples", _draw(dataset, seed, "all", 0, dataset.num_samples, images), dataset.num_kept)]
    numbers = [sample for pick in picks for sample in pick.samples]
    tiles: dict[int, Tile] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for tile in pool.map(lambda sample: look(dataset, sample, side), sorted(set(numbers))):
            tiles[tile.sample] = tile
            progress(len(tiles), len(set(numbers)))
    return Sheet(
        path=str(path),
        name=dataset.name,
        split=dataset.split,
        content_hash=dataset.content_hash,
        samples=dataset.num_kept,
        by=by,
        seed=seed,
        groups=tuple(Group(pick.title, pick.of, pick.bytes, tuple(tiles[sample] for sample in pick.samples)) for pick in picks),
    )


# -- Which samples ----------------------------------------------------------------------------------------------------------------------


def pick_classes(
    dataset: Dataset, groups: int, images: int, seed: int, labels: tuple[int, ...] = (), progress: Update = no_update
) -> list[Pick]:
    """`images` samples of each of the given classes, or of `groups` classes that have any, drawn by the seed.

    Each sample has a random number that follows from the seed; of a class those with the smallest numbers are taken. So the label column is
    read once, in any pieces, and no more than the samples taken so far are held.
    """
    chosen = np.array(labels or _draw_classes(dataset, groups, seed), np.int64)
    place = np.full(dataset.num_classes, -1, np.int64)
    place[chosen] = np.arange(len(chosen))
    best = [(np.empty(0, np.uint64), np.empty(0, np.int64))] * len(chosen)
    counts = np.zeros(len(chosen), np.int64)
    for batch in dataset.index_batches():
        group = place[batch.labels]
        kept = np.flatnonzero(group >= 0)
        row = np.searchsorted(batch.starts, kept, side="right") - 1
        group, samples = group[kept], batch.samples[row]
        counts += np.bincount(group, minlength=len(chosen))
        drawn = random_numbers(samples, seed)
        for number in np.unique(group).tolist():
            mine = group == number
            keys, numbers = (np.concatenate(both) for both in zip(best[number], (drawn[mine], samples[mine]), strict=True))
            first = np.argsort(keys, kind="stable")[:images]
            best[number] = keys[first], numbers[first]
        progress(int(batch.samples[-1]) + 1 if len(batch.samples) else 0, dataset.num_samples)
    return [
        Pick(dataset.class_name(label), tuple(sorted(numbers.tolist())), of)
        for label, (_, numbers), of in zip(chosen.tolist(), best, counts.tolist(), strict=True)
    ]


def pick_shards(dataset: Dataset, groups: int, images: int, seed: int) -> list[Pick]:
    """`images` samples of each of `groups` shards that hold any."""
    counts = dataset.shard_counts()
    there = np.flatnonzero(counts > 0).tolist()
    picks = []
    for shard in sorted(random.Random(f"{seed} shards").sample(there, min(groups, len(there)))):
        first, size = int(dataset.first_samples[shard]), int(dataset.shard_sizes[shard])
        samples = _draw(dataset, seed, f"shard {shard}", first, size, images)
        picks.append(Pick(dataset.shard_names[shard], samples, int(counts[shard]), int(dataset.shard_bytes[shard])))
    return picks


def random_numbers(values: np.ndarray, seed: int) -> np.ndarray:
    """A random uint64 for each int64, no two alike for one seed (splitmix64: Steele, Lea, Flood, OOPSLA 2014)."""
    offset = random.Random(f"{seed} samples").getrandbits(64)
    state = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(offset)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_classes(dataset: Dataset, groups: int, seed: int) -> list[int]:
    try:
        there = np.flatnonzero(dataset.used_classes()).tolist()
    except IndexError as error:
        raise DatasetError(f"{dataset.path / 'index.arrow'} is damaged: {error}; restore it or pack again") from None
    return sorted(random.Random(f"{seed} classes").sample(there, min(groups, len(there))))


def _draw(dataset: Dataset, seed: int, what: str, first: int, size: int, images: int) -> tuple[int, ...]:
    """`images` of the samples [first, first + size) that are not removed, or all where there are no more."""
    wanted = min(images, size)
    while True:
        drawn = random.Random(f"{seed} {what}").sample(range(first, first + size), wanted)
        there = [sample for sample in drawn if not dataset.overlay.is_removed(sample)]
        if len(there) >= images or wanted == size:
            return tuple(sorted(there[:images]))
        wanted = min(8 * wanted, size)


def _label_of(dataset: Dataset, word: str) -> int:
    """The class that a word names: by its name, or else by its number."""
    if dataset.class_names and word in dataset.class_names:
        return dataset.class_names.index(word)
    if word.isascii() and word.isdigit() and int(word) < dataset.num_classes:
        return int(word)
    few = ", ".join(map(dataset.class_name, range(min(5, dataset.num_classes))))
    raise PreviewError(f"{word!r} is no class of {dataset.path}: it has {dataset.num_classes}, such as {few}")


# -- What they look like ----------------------------------------------------------------------------------------------------------------


def look(dataset: Dataset, sample: int, side: int) -> Tile:
    """Reads and decodes one sample; what goes wrong becomes the tile's `damage`."""
    labels, scores = dataset.labels(np.array([sample]))
    there = labels[0] >= 0
    damage, thumbnail, size, bytes_there = None, None, (0, 0), 0
    try:
        data = dataset.read(sample)
        bytes_there = len(data)
        thumbnail = decode(data)
        size = thumbnail.size
        thumbnail.thumbnail((side, side))
    except SampleError as error:
        damage = error.reason
    except UnidentifiedImageError:  # whose text has an address in memory
        damage = "not an image that can be decoded"
    except Exception as error:  # Pillow raises nearly anything on hostile bytes; a missing tar is an OSError
        damage, thumbnail = f"{type(error).__name__}: {error}", None
    key = source = ""
    try:
        row = dataset.row(sample)
        key, source, size = row.key, row.source, (row.width, row.height)
    except Exception as error:  # a dataset may come without samples/, and damage there must not hide the image
        key = "?" if isinstance(error, FileNotFoundError) else f"? ({error})"
    named = tuple((n, _name(dataset, n), score) for n, score in zip(labels[0][there].tolist(), scores[0][there].tolist(), strict=True))
    scored = any(score != 1 for _, _, score in named)
    return Tile(sample, key, dataset.shard_of(sample), named, scored, bytes_there, *size, source, damage, thumbnail)


def _name(dataset: Dataset, label: int) -> str:
    return dataset.class_name(label) if label < dataset.num_classes else f"{label}, which is no class"  # of a damaged index


def encoded(thumbnail: Image.Image) -> tuple[str, bytes]:
    """A thumbnail as "png" where it is tiny, so that its pixels stay exact, and as "jpeg"."""
    kind = "png" if max(thumbnail.size) <= 64 else "jpeg"
    file = io.BytesIO()
    thumbnail.save(file, kind, **({} if kind == "png" else {"quality": 85}))
    return kind, file.getvalue()


def tiles(sheet: Sheet) -> Iterator[tuple[Group, Tile]]:
    """Every tile with its group."""
    for group in sheet.groups:
        for tile in group.tiles:
            yield group, tile


def as_json(sheet: Sheet) -> dict[str, Any]:
    """The sheet without its pictures, for another program."""
    told = {field.name: getattr(sheet, field.name) for field in fields(Sheet)}
    groups = [{field.name: getattr(group, field.name) for field in fields(Group)} for group in sheet.groups]
    for group, of in zip(groups, sheet.groups, strict=True):
        group["tiles"] = [
            {field.name: getattr(tile, field.name) for field in fields(Tile) if field.name != "thumbnail"}
            | {"labels": [{"label": label, "name": name, "score": score} for label, name, score in tile.labels]}
            for tile in of.tiles
        ]
    return told | {"groups": groups}
