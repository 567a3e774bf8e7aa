"""What is in a dataset, counted: classes and their long tail, labels a sample, pairs, sizes, scores, rejects, and how shards differ.

Where it stands: reads a `Dataset`'s index, overlays, tables and list of rejects, never a tar; `vitscale data stats` prints what it finds,
and `data_pages.py` draws it.

Two passes over the index (the second needs the classes' counts of the first) and one over samples/*.parquet. Memory holds counts: a few for
each class and shard, pairs of the `PAIR_CLASSES` most frequent classes, and histograms of fixed size. Nothing grows with the samples.

Left to others: whether the bytes are as packed (`verify.py`), and what should be done about what is found.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_tools.dataset import Dataset, DatasetError, IndexBatch
from data_tools.progress import Update, no_update
from data_tools.storage import Location

PAIR_CLASSES = 1_024  # whose pairs are counted: 8 MiB of counts
PAIRS_SHOWN = 20
CLASSES_SHOWN = 10
EXAMPLES_SHOWN = 3  # rejects of each reason
MANY, FEW = 100, 20  # samples of a class: more than 100 are many, fewer than 20 few (Liu et al., CVPR 2019)
TOP_SHARES = (0.01, 0.1)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
GRID_STEPS = 4  # cells an octave of the width-height grid ...
GRID_OCTAVES = 18  # ... whose last row and column also hold what is larger


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in [edges[i], edges[i + 1])."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """Many numbers in few. Percentiles are nearest-rank: exact for whole numbers below 2,048, else within 0.2%."""

    count: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[str, float]
    histogram: Histogram


@dataclass(frozen=True)
class ClassCount:
    """A class and the number of samples that have it."""

    label: int
    name: str
    samples: int


@dataclass(frozen=True)
class TopClasses:
    """The most frequent hundredth or tenth of the classes that have a sample, at least one class."""

    share_of_classes: float
    classes: int
    share_of_labels: float
    share_of_samples: float
    """Samples that have at least one of these classes."""


@dataclass(frozen=True)
class Classes:
    """The class histogram and its tail."""

    total: int
    used: int
    counts: tuple[int, ...]
    """Samples that have each class, by label."""
    most: tuple[ClassCount, ...]
    middle: tuple[ClassCount, ...]
    """Around the median of the classes that have a sample."""
    fewest: tuple[ClassCount, ...]
    """Of the classes that have a sample, the rarest first."""
    empty: tuple[ClassCount, ...]
    """The first of the classes without a sample."""
    many_shot: int
    """Classes with more than MANY samples; medium_shot: FEW to MANY; few_shot: some, but under FEW."""
    medium_shot: int
    few_shot: int
    median: float
    """Samples of the median class, of those that have a sample."""
    imbalance: float
    """The largest class over the smallest that has a sample."""
    gini: float
    """0: all classes equal, 1: one has everything; empty classes count."""
    effective: float
    """exp(entropy): as many equal classes would be as uneven."""
    half: int
    """The fewest classes that hold half of all labels."""
    top: tuple[TopClasses, ...]


@dataclass(frozen=True)
class Pair:
    """Two classes that stand on the same samples."""

    first: ClassCount
    second: ClassCount
    samples: int
    share_of_rarer: float
    """Of the samples of the rarer class, those that have the other one too."""
    lift: float
    """How many times as often as if the two were independent."""


@dataclass(frozen=True)
class Pairs:
    """Co-occurrence, counted exactly among the `among` most frequent classes."""

    among: int
    counted: int
    """Pairs of labels on the same sample, both among these classes."""
    most: tuple[Pair, ...]


@dataclass(frozen=True)
class Scores:
    """The scores that labels have; those without one are not in the figures."""

    labels_with: int
    summary: Summary


@dataclass(frozen=True)
class Sizes:
    """Widths and heights, from samples/*.parquet."""

    width: Summary
    height: Summary
    short_side: Summary
    aspect_ratio: Summary
    """Width over height."""
    landscape: int
    portrait: int
    square: int
    grid: tuple[tuple[int, ...], ...]
    """Samples by width (rows) and height, a row or column a quarter of an octave, from 1 pixel."""
    without_size: int
    """Samples with a side of 0, which only `--check-images header` lets pass. In `grid` and sides, not in aspect ratios."""


@dataclass(frozen=True)
class ShardMix:
    """A tar, and how far its classes are from the whole dataset's."""

    name: str
    samples: int
    bytes: int
    labels: int
    distance: float | None
    """Total variation between its distribution of labels and the whole one: 0 equal, 1 disjoint. Small shards are never near 0."""
    excess: float | None
    """Squared deviation of its classes' counts over what a random draw of as many samples has on average: about 1 where shuffled."""


@dataclass(frozen=True)
class Shards:
    """How even the shards are."""

    shards: tuple[ShardMix, ...]
    samples: Summary
    bytes: Summary
    empty: int
    excess: float | None
    """As of one shard, over all of them."""
    threshold: float | None
    """Above which `excess` is no accident: half more than chance, and six of its standard deviations."""
    shuffled: bool | None
    """Whether `excess` is below the threshold; None where that cannot be told: one shard, or every sample has the same classes."""


@dataclass(frozen=True)
class Reason:
    """Why images were left out, how many, and a few of them as (source, detail)."""

    reason: str
    images: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stats:
    """Everything that `vitscale data stats` tells."""

    path: str
    name: str
    split: str
    content_hash: str
    samples: int
    """That are not removed: all other figures but those of files are of them."""
    removed: int
    """By overlays."""
    relabelled: int
    image_bytes: int
    tar_bytes: int
    labels: int
    labels_a_sample: tuple[int, ...]
    """Samples that have 0, 1, 2, ... labels."""
    classes: Classes
    pairs: Pairs
    scores: Scores | None
    sizes: Sizes | None
    """None where the dataset has no samples/."""
    bytes_an_image: Summary
    shards: Shards
    rejects: tuple[Reason, ...]


def count(path: Location, progress: Update = no_update) -> Stats:
    """Counts the split in directory or at URL `path`. Raises DatasetError where it is none, or damaged."""
    dataset = Dataset.open_checked(path, check_shards=False)
    if not dataset.num_kept:
        raise DatasetError(f"overlays remove all {dataset.num_samples:,} samples of {path}; there is nothing to count")
    passed = 0

    def advance(samples: int) -> None:
        nonlocal passed
        passed += samples
        progress(passed, 3 * dataset.num_kept)

    first = _FirstPass(dataset)
    for batch in dataset.index_batches():
        first.add(batch)
        advance(len(batch.sizes))
    second = _SecondPass(dataset, first)
    for batch in dataset.index_batches():
        second.add(batch)
        advance(len(batch.sizes))
    second.finish()
    sizes = _SizesPass()
    for widths, heights in dataset.shapes():
        sizes.add(widths, heights)
        advance(len(widths))
    return Stats(
        path=str(path),
        name=dataset.name,
        split=dataset.split,
        content_hash=dataset.content_hash,
        samples=dataset.num_kept,
        removed=dataset.overlay.num_removed,
        relabelled=len(dataset.overlay.samples),
        image_bytes=first.sizes.sum_of_whole,
        tar_bytes=int(dataset.shard_bytes.sum()),
        labels=int(first.classes.sum()),
        labels_a_sample=tuple(first.labels_a_sample.tolist()),
        classes=class_figures(dataset, first.classes, second.top_samples),
        pairs=pair_figures(dataset, first.classes, second.rank, second.pairs),
        scores=Scores(first.scored, second.scores.summary()) if second.scores else None,
        sizes=sizes.figures(),
        bytes_an_image=first.sizes.summary(),
        shards=shard_figures(dataset, first.classes, second.shards),
        rejects=reject_figures(dataset),
    )


# -- Histograms without a range ---------------------------------------------------------------------------------------------------------


def whole_bins(values: np.ndarray) -> np.ndarray:
    """The bin of whole numbers >= 0: one each below 2,048, then 1,024 an octave (as HdrHistogram does)."""
    values = values.astype(np.int64)
    shift = np.maximum(np.frexp(values.astype(np.float64))[1] - 11, 0)
    bins: np.ndarray = shift * 1024 + (values >> shift)
    return bins


def whole_edge(number: int) -> int:
    """The smallest value of a bin of `whole_bins`."""
    shift = max(number // 1024 - 1, 0)
    return (number - shift * 1024) << shift


RENARD = (1, 1.25, 1.6, 2, 2.5, 3.15, 4, 5, 6.3, 8)  # ten round steps a decade (ISO 3)
WHOLE_BINS = 52 * 1024  # up to 2^61
RATIO_OCTAVES, RATIO_STEPS = 16, 256


def ratio_bins(values: np.ndarray) -> np.ndarray:
    """The bin of positive ratios: 256 an octave, from 2^-16 to 2^16; a bin's middle is the ratio of whole 256ths of octaves."""
    bins: np.ndarray = (
        np.rint(np.log2(np.maximum(values, 2.0**-RATIO_OCTAVES)) * RATIO_STEPS).astype(np.int64) + RATIO_OCTAVES * RATIO_STEPS
    )
    return bins.clip(0, RATIO_BINS - 1)


def ratio_edge(number: int) -> float:
    """The lower edge of a bin of `ratio_bins`."""
    return float(2.0 ** ((number - 0.5) / RATIO_STEPS - RATIO_OCTAVES))


RATIO_BINS = 2 * RATIO_OCTAVES * RATIO_STEPS + 1


class Tally:
    """Counts of values in fine bins, with their exact smallest, largest and sum."""

    def __init__(self, bins: int, bin_of: Callable[[np.ndarray], np.ndarray], edge: Callable[[int], float], *, even: bool = False) -> None:
        """`even`: bins are equally wide, so the shown ones are too."""
        self._counts = np.zeros(bins, np.int64)
        self._bin_of, self._edge, self._even = bin_of, edge, even
        self._sum: float = 0
        self._least, self._most = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Counts the values."""
        if len(values):
            counts = np.bincount(self._bin_of(values))
            self._counts[: len(counts)] += counts
            self._sum += values.sum(dtype=np.int64 if values.dtype.kind in "iu" else np.float64).item()
            self._least, self._most = min(self._least, values.min().item()), max(self._most, values.max().item())

    @property
    def sum_of_whole(self) -> int:
        """The sum of all values, which are whole numbers."""
        return int(self._sum)

    def summary(self) -> Summary:
        """What was counted."""
        total = int(self._counts.sum())
        if not total:
            return Summary(0, 0.0, 0.0, 0.0, {}, Histogram((0.0, 1.0), (0,)))
        reached = np.cumsum(self._counts)
        percentiles = {f"p{p}": self._middle(int(np.searchsorted(reached, max(1, math.ceil(total * p / 100))))) for p in PERCENTILES}
        nice = nice_edges(self._least, self._most, whole=self._bin_of is whole_bins, even=self._even)
        first, *others = sorted({self._bin(edge) for edge in nice})  # so shown bins are made of whole fine ones
        edges = [first, *others[:-1], max(first + 1, *others[-1:], self._bin(self._most) + 1)]
        counts = [int(self._counts[low:high].sum()) for low, high in itertools.pairwise(edges)]
        shown = Histogram(tuple(float(self._edge(edge)) for edge in edges), tuple(counts))
        return Summary(total, self._sum / total, self._least, self._most, percentiles, shown)

    def _bin(self, value: float) -> int:
        return int(self._bin_of(np.array([value]))[0])

    def _middle(self, number: int) -> float:
        low, high = self._edge(number), self._edge(number + 1)
        middle = low if self._bin_of is whole_bins and high - low == 1 else (low + high) / 2
        return min(max(middle, self._least), self._most)


def nice_edges(least: float, most: float, *, whole: bool, even: bool, bins: int = 32) -> list[float]:
    """Edges of some `bins` bins that hold `least` to `most`: round steps; unless `even`, over a factor of 20, tenths of decades."""
    if least > 0 and most / least > 20 and not even:
        decades = range(math.floor(math.log10(least)), math.floor(math.log10(most)) + 2)
        edges = [step * 10.0**decade for decade in decades for step in RENARD]
        below = max(edge for edge in edges if edge <= least)
        above = min(edge for edge in edges if edge > most)
        edges = [edge for edge in edges if below <= edge <= above]
        return sorted({float(math.ceil(edge - 1e-9)) for edge in edges}) if whole else edges
    step = (most - least) / bins or abs(most) / 10 or 1.0
    power = 10.0 ** math.floor(math.log10(step))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= step * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
    start = math.floor(least / step)
    return [step * number for number in range(start, math.floor(most / step) + 2)]


# -- The passes -------------------------------------------------------------------------------------------------------------------------


class _FirstPass:
    """Counts for each class, labels a sample, bytes, the range of the scores."""

    def __init__(self, dataset: Dataset) -> None:
        self.classes = np.zeros(dataset.num_classes, np.int64)
        self.labels_a_sample = np.zeros(dataset.max_labels + 1, np.int64)
        self.sizes = Tally(WHOLE_BINS, whole_bins, whole_edge)
        self.scored = 0
        self.least_score, self.most_score = math.inf, -math.inf

    def add(self, batch: IndexBatch) -> None:
        self.classes += np.bincount(batch.labels, minlength=len(self.classes))
        self.labels_a_sample += np.bincount(np.diff(batch.starts), minlength=len(self.labels_a_sample))
        self.sizes.add(batch.sizes)
        scores = batch.scores[batch.scored]
        self.scored += len(scores)
        if len(scores):
            self.least_score = min(self.least_score, float(scores.min()))
            self.most_score = max(self.most_score, float(scores.max()))


class _SecondPass:
    """What needs the classes' counts: pairs, samples of the top classes, how far each shard is from the whole; and the scores."""

    def __init__(self, dataset: Dataset, first: _FirstPass) -> None:
        order = frequent_first(first.classes)
        self.rank = np.empty(dataset.num_classes, np.int32)  # of each class, 0 the most frequent
        self.rank[order] = np.arange(dataset.num_classes)
        self.pairs = np.zeros((min(PAIR_CLASSES, dataset.num_classes),) * 2, np.int64)
        self.top_samples = [0] * len(TOP_SHARES)
        self._top = [top_size(first.classes, share) for share in TOP_SHARES]
        self.scores = _score_tally(first.least_score, first.most_score) if first.scored else None
        self.shards: list[tuple[int, float, float]] = []  # labels, distance, squared deviation
        self._dataset, self._classes, self._counts = dataset, first.classes, dataset.shard_counts()
        self._share = first.classes / max(1, first.classes.sum())
        self._shard = np.zeros(dataset.num_classes, np.int64)

    def add(self, batch: IndexBatch) -> None:
        rank = self.rank[batch.labels]
        sample = np.repeat(np.arange(len(batch.sizes)), np.diff(batch.starts))
        for place, size in enumerate(self._top):
            self.top_samples[place] += len(np.unique(sample[rank < size]))
        kept = rank < len(self.pairs)
        add_pairs(self.pairs, sample[kept], rank[kept])
        if self.scores is not None:
            self.scores.add(batch.scores[batch.scored])
        self._add_to_shards(batch)

    def _add_to_shards(self, batch: IndexBatch) -> None:
        ends = self._dataset.first_samples + self._dataset.shard_sizes
        at = 0
        while at < len(batch.samples):
            self._close_shards_before(int(batch.samples[at]), ends)
            upto = int(np.searchsorted(batch.samples, ends[len(self.shards)]))
            self._shard += np.bincount(batch.labels[batch.starts[at] : batch.starts[upto]], minlength=len(self._shard))
            at = upto

    def _close_shards_before(self, sample: int, ends: np.ndarray) -> None:
        while len(self.shards) < len(ends) and ends[len(self.shards)] <= sample:
            size, whole = int(self._counts[len(self.shards)]), self._dataset.num_kept
            labels = int(self._shard.sum())
            distance = 0.5 * np.abs(self._shard / max(1, labels) - self._share).sum()
            deviation = np.square(self._shard - self._classes * (size / whole)).sum()
            self.shards.append((labels, float(distance), float(deviation)))
            self._shard[:] = 0

    def finish(self) -> None:
        """Closes the last shards."""
        self._close_shards_before(self._dataset.num_samples, self._dataset.first_samples + self._dataset.shard_sizes)


class _SizesPass:
    """Widths, heights and what follows from them."""

    def __init__(self) -> None:
        self._sides = [Tally(WHOLE_BINS, whole_bins, whole_edge) for _ in range(3)]
        self._ratio = Tally(RATIO_BINS, ratio_bins, ratio_edge)
        self._shapes = np.zeros(3, np.int64)  # landscape, portrait, square
        self._grid = np.zeros((GRID_OCTAVES * GRID_STEPS,) * 2, np.int64)
        self._samples, self._without = 0, 0

    def add(self, widths: np.ndarray, heights: np.ndarray) -> None:
        for tally, values in zip(self._sides, (widths, heights, np.minimum(widths, heights)), strict=True):
            tally.add(values)
        there = (widths > 0) & (heights > 0)
        self._ratio.add(widths[there] / heights[there])
        self._shapes += [(widths > heights).sum(), (widths < heights).sum(), (widths == heights).sum()]
        rows, columns = grid_cell(widths), grid_cell(heights)
        self._grid += np.bincount(rows * len(self._grid) + columns, minlength=self._grid.size).reshape(self._grid.shape)
        self._samples += len(widths)
        self._without += int((~there).sum())

    def figures(self) -> Sizes | None:
        if not self._samples:
            return None
        landscape, portrait, square = self._shapes.tolist()
        grid = tuple(tuple(row) for row in self._grid.tolist())
        sides = [tally.summary() for tally in self._sides]
        return Sizes(sides[0], sides[1], sides[2], self._ratio.summary(), landscape, portrait, square, grid, self._without)


def grid_cell(side: np.ndarray) -> np.ndarray:
    """The row or column of a side in pixels: quarters of octaves from 1."""
    cells: np.ndarray = (np.log2(np.maximum(side, 1)) * GRID_STEPS).astype(np.int64)
    return cells.clip(0, GRID_OCTAVES * GRID_STEPS - 1)


def _score_tally(least: float, most: float) -> Tally:
    """Some thousand even bins of a round width that hold `least` to `most`."""
    width = nice_edges(0, max(most - least, 1e-3), whole=False, even=True, bins=1000)[1]
    start, end = math.floor(least / width) - 1000, math.floor(most / width) + 1000  # room for the wider bins that are shown
    slack = 1e-3  # of a bin: 0.7 as float32 is a little less than 0.7, and belongs above that edge

    def bin_of(scores: np.ndarray) -> np.ndarray:
        bins: np.ndarray = np.floor(scores.astype(np.float64) / width + slack).astype(np.int64) - start
        return bins.clip(0, end - start)

    return Tally(end - start + 1, bin_of, lambda number: round((start + number) * width, 12), even=True)


def add_pairs(counts: np.ndarray, sample: np.ndarray, rank: np.ndarray) -> None:
    """Adds 1 to counts[a, b], a < b, for each two labels of one sample; of each label: its `sample` (rising) and its class's `rank`."""
    size = len(counts)
    for apart in range(1, len(sample)):
        same = np.flatnonzero(sample[apart:] == sample[:-apart])
        if not len(same):  # labels of a sample lie side by side, so farther ones are none either
            break
        one, other = rank[same].astype(np.int64), rank[same + apart].astype(np.int64)
        cells, found = np.unique(np.minimum(one, other) * size + np.maximum(one, other), return_counts=True)
        counts.reshape(-1)[cells] += found


# -- Figures from counts ----------------------------------------------------------------------------------------------------------------


def frequent_first(classes: np.ndarray) -> np.ndarray:
    """Labels by falling count; equal ones by number."""
    return np.argsort(-classes, kind="stable")


def top_size(classes: np.ndarray, share: float) -> int:
    """How many classes the top `share` of those that have a sample are."""
    used = int((classes > 0).sum())
    return math.ceil(share * used - 1e-9)


def class_figures(dataset: Dataset, classes: np.ndarray, top_samples: list[int]) -> Classes:
    """The class histogram and its tail, from each class's count and the samples that have one of the top classes."""
    order = frequent_first(classes)
    used = int((classes > 0).sum())
    falling, labels = classes[order], max(1, int(classes.sum()))
    there = falling[:used]
    share = there / labels

    def named(which: np.ndarray) -> tuple[ClassCount, ...]:
        return tuple(_class_count(dataset, classes, label) for label in which.tolist())

    middle = max(0, used // 2 - CLASSES_SHOWN // 4)
    sizes = [top_size(classes, part) for part in TOP_SHARES]
    return Classes(
        total=len(classes),
        used=used,
        counts=tuple(classes.tolist()),
        most=named(order[: min(used, CLASSES_SHOWN)]),
        middle=named(order[middle : min(used, middle + CLASSES_SHOWN // 2)]),
        fewest=named(order[max(0, used - CLASSES_SHOWN) : used][::-1]),
        empty=named(order[used : used + CLASSES_SHOWN]),
        many_shot=int((classes > MANY).sum()),
        medium_shot=int(((classes >= FEW) & (classes <= MANY)).sum()),
        few_shot=int(((classes > 0) & (classes < FEW)).sum()),
        median=float(np.median(there)) if used else 0.0,
        imbalance=float(there[0] / there[-1]) if used else 0.0,
        gini=gini(classes),
        effective=float(np.exp(-(share * np.log(share)).sum())) if used else 0.0,
        half=int(np.searchsorted(np.cumsum(there), labels / 2)) + 1 if used else 0,
        top=tuple(
            TopClasses(part, size, float(falling[:size].sum() / labels), samples / dataset.num_kept)
            for part, size, samples in zip(TOP_SHARES, sizes, top_samples, strict=True)
        ),
    )


def gini(counts: np.ndarray) -> float:
    """The Gini coefficient of counts, none of them negative."""
    total, size = int(counts.sum()), len(counts)
    if not total:
        return 0.0
    rising = np.sort(counts).astype(np.float64)
    return float(2 * (np.arange(1, size + 1) * rising).sum() / (size * total) - (size + 1) / size)


def pair_figures(dataset: Dataset, classes: np.ndarray, rank: np.ndarray, pairs: np.ndarray) -> Pairs:
    """The most frequent pairs."""
    flat = pairs.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:PAIRS_SHOWN]
    label_of = np.argsort(rank)
    most = []
    for cell in order[flat[order] > 0].tolist():
        first, second = (_class_count(dataset, classes, int(label_of[place])) for place in divmod(cell, len(pairs)))
        samples = int(flat[cell])
        lift = samples * dataset.num_kept / (first.samples * second.samples)
        most.append(Pair(first, second, samples, samples / second.samples, lift))  # the second has the higher rank, so it is the rarer one
    return Pairs(among=len(pairs), counted=int(flat.sum()), most=tuple(most))


def shard_figures(dataset: Dataset, classes: np.ndarray, shards: list[tuple[int, float, float]]) -> Shards:
    """How even the shards are, from each one's labels, distance and squared deviation.

    A random draw of n of N samples has n q of a class that a share q of all has, with the variance n q (1 - q) (N - n) / (N - 1), however
    many labels a sample has. So the squared deviation summed over classes, over the sum of those variances, is 1 on average.
    """
    samples, sizes = dataset.num_kept, dataset.shard_counts()
    q = classes / samples
    spread = q * (1 - q)
    variances = sizes * spread.sum() * (samples - sizes) / max(1, samples - 1)
    deviations = np.array([deviation for _, _, deviation in shards])
    mixes = tuple(
        ShardMix(
            name=name,
            samples=int(size),
            bytes=int(tar_bytes),
            labels=labels,
            distance=distance if labels else None,
            excess=deviation / variance if variance > 0 else None,
        )
        for name, size, tar_bytes, (labels, distance, deviation), variance in zip(
            dataset.shard_names, sizes.tolist(), dataset.shard_bytes.tolist(), shards, variances.tolist(), strict=True
        )
    )
    excess = threshold = None
    if variances.sum() > 0:
        excess = float(deviations.sum() / variances.sum())
        freedom = max(1.0, float(spread.sum() ** 2 / np.square(spread).sum()) - 1) * max(1, int((sizes > 0).sum()) - 1)
        threshold = 1 + max(0.5, 6 * math.sqrt(2 / freedom))
    tallies = [Tally(WHOLE_BINS, whole_bins, whole_edge) for _ in range(2)]
    tallies[0].add(sizes)
    tallies[1].add(dataset.shard_bytes)
    return Shards(
        shards=mixes,
        samples=tallies[0].summary(),
        bytes=tallies[1].summary(),
        empty=int((sizes == 0).sum()),
        excess=excess,
        threshold=threshold,
        shuffled=None if excess is None or threshold is None else excess <= threshold,
    )


def reject_figures(dataset: Dataset) -> tuple[Reason, ...]:
    """Rejects by reason, the most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[tuple[str, str]]] = {}
    for row in dataset.rejects():
        counts[row["reason"]] += 1
        shown = examples.setdefault(row["reason"], [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append((row["source"], row["detail"]))
    return tuple(Reason(reason, images, tuple(examples[reason])) for reason, images in counts.most_common())


def _class_count(dataset: Dataset, classes: np.ndarray, label: int) -> ClassCount:
    return ClassCount(label, dataset.class_name(label), int(classes[label]))


# -- What stands out --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A sentence on what stands out; `look` calls for a second look."""

    text: str
    tone: Literal["good", "plain", "look"]


def findings(stats: Stats) -> list[Finding]:
    """The figures that one would want to be told of, in words."""
    classes, shards, found = stats.classes, stats.shards, []

    def tell(text: str, tone: Literal["good", "plain", "look"]) -> None:
        found.append(Finding(text, tone))

    if stats.removed or stats.relabelled:
        tell(f"Overlays remove {stats.removed:,} samples, which no figure here counts, and relabel {stats.relabelled:,}.", "plain")
    if shards.shuffled:
        tell(f"No sign of sorting: the classes of shards differ {shards.excess:.2f} times as much as after a random shuffle.", "good")
    elif shards.shuffled is False:
        tell(f"Not shuffled: the classes of shards differ {shards.excess:,.3g} times as much as after a random shuffle.", "look")
    if classes.used < classes.total:
        names = ", ".join(one.name for one in classes.empty[:3])
        tell(f"Without a sample: {classes.total - classes.used:,} of {classes.total:,} classes, such as {names}.", "look")
    if classes.few_shot:
        share, rarest = classes.few_shot / classes.total, classes.fewest[0].samples
        tell(f"Fewer than {FEW} samples: {classes.few_shot:,} of {classes.total:,} classes ({share:.1%}); the rarest has {rarest}.", "look")
    if classes.used > 1:
        top = classes.top[1]
        tell(
            f"The top tenth of the classes ({top.classes:,}) holds {top.share_of_labels:.1%} of the labels; {classes.half:,} hold half.",
            "plain",
        )
    if without := stats.labels_a_sample[0]:
        tell(f"Without a label: {without:,} of {stats.samples:,} samples ({without / stats.samples:.2%}).", "look")
    if stats.rejects:
        total = sum(reason.images for reason in stats.rejects)
        reasons = ", ".join(f"{reason.images:,} {reason.reason}" for reason in stats.rejects)
        share = total / (total + stats.samples)
        tell(f"Left out by pack: {reasons} ({share:.2%} of the images).", "look" if share > 0.01 else "plain")
    if stats.sizes is None:
        tell("Widths and heights are not known: the dataset has no samples/.", "plain")
    if shards.empty:
        tell(f"Shards without a sample: {shards.empty:,} of {len(shards.shards):,}.", "plain")
    return found
