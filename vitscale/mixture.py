"""Several datasets read as one, as a run does that mixes them; a run of one is a mixture of one.

Where it stands: `order.py` says which sample stands at a position; here its number leads to the dataset that holds it. Samples and shards
are numbered through: sample i of component c is `first_samples[c] + i`, its shard s is `first_shards[c] + s`.

Invariants: all components have the same classes, so that a label means the same in each. By which weights they are mixed is the business of
the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.cache import Cache
from data_tools.dataset import Dataset, DatasetError, Located, Place
from data_tools.holdout import Part
from vitscale.locality import Size

Int64 = npt.NDArray[np.int64]


def class_difference(one: Dataset, other: Dataset) -> str:
    """In what the classes of two datasets differ."""
    if one.num_classes != other.num_classes:
        return f"have {one.num_classes} and {other.num_classes} classes"
    unnamed = [str(of.path) for of in (one, other) if of.class_names is None]
    return f"have classes of other names{', of which ' + unnamed[0] + ' has none' if unnamed else ''}"


class Mixture:
    """Safe for threads, for `fork` and for `pickle`, as its datasets are.

    `num_samples`, `max_labels` and `first_samples` are of all together; `num_classes` and `class_names` are those of each.
    """

    def __init__(self, components: Sequence[Dataset]) -> None:
        """Raises DatasetError where their classes differ, or where one is given twice."""
        self.components = tuple(components)
        first = self.components[0]
        for i, other in enumerate(self.components):
            if (other.num_classes, other.class_names) != (first.num_classes, first.class_names):
                raise DatasetError(
                    f"{other.path} and {first.path} {class_difference(other, first)}; what is mixed must have the same: pack or index each "
                    "with the same --class-names"
                )
            for twin in self.components[:i]:
                if twin.content_hash == other.content_hash:
                    raise DatasetError(
                        f"{other.path} is the same dataset as {twin.path}; give it once, --data-weights says how often it comes"
                    )
        names = [of.name for of in self.components]
        of_twins = [f"{of.name} (hash {of.content_hash[:12]})" for of in self.components]  # not where they lie, which may change
        self._names = [name if names.count(name) == 1 else twin for name, twin in zip(names, of_twins, strict=True)]
        sizes, shards = [of.num_samples for of in self.components], [len(of.shard_names) for of in self.components]
        self.first_samples: Int64 = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        self.first_shards: Int64 = np.cumsum([0, *shards[:-1]], dtype=np.int64)
        self.num_samples = sum(sizes)
        self.num_classes, self.class_names = first.num_classes, first.class_names
        self.max_labels = max(of.max_labels for of in self.components)

    @classmethod
    def open(
        cls, paths: Sequence[str | Path], overlays: Sequence[tuple[str, ...] | None] | None = None, stage: Path | None = None,
        cache: Cache | None = None, part: Part | None = None,
    ) -> Mixture:  # fmt: skip
        """Opens the datasets, each with its overlays (None: all there are), as `Dataset.open` does, without asking for every tar."""
        return cls([
            Dataset.open(path, overlays=of, stage=stage, cache=cache, check_shards=False, part=part)
            for path, of in zip(paths, overlays or [None] * len(paths), strict=True)
        ])  # fmt: skip

    @property
    def num_removed(self) -> int:
        """Samples that overlays remove."""
        return sum(of.overlay.num_removed for of in self.components)

    @property
    def num_kept(self) -> int:
        """Samples that no overlay removes, in the part in use."""
        return sum(of.num_kept for of in self.components)

    @property
    def is_local(self) -> bool:
        """Whether all of them lie in file systems of this machine."""
        return all(of.is_local for of in self.components)

    @property
    def size(self) -> Size:
        """What the arithmetic of reading needs of it."""
        shards = sum(len(of.shard_names) for of in self.components)
        return Size(self.num_samples, shards, self.num_bytes, len(self.components), remote=not self.is_local)

    @property
    def num_bytes(self) -> int:
        """Of all tars."""
        return sum(int(of.shard_bytes.sum()) for of in self.components)

    @property
    def bytes_per_sample(self) -> float:
        """Of a tar, on average."""
        return self.num_bytes / max(1, self.num_samples)

    def locate(self, samples: Int64) -> Located:
        """Where the images of samples lie (n,)."""
        found = Located(*(np.empty(len(samples), dtype) for dtype in (np.int64, np.int64, np.int64, np.uint64)))
        for c, places, own in self._split(samples):
            located = self.components[c].locate(own)
            for column, values in zip(found, located, strict=True):
                column[places] = values
            found.shards[places] += self.first_shards[c]
        return found

    def labels(self, samples: Int64) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Labels and scores of samples, each (n, max_labels): int32 padded with -1, and float32 padded with 0."""
        labels = np.full((len(samples), self.max_labels), -1, dtype=np.int32)
        scores = np.zeros((len(samples), self.max_labels), dtype=np.float32)
        for c, places, own in self._split(samples):
            width = self.components[c].max_labels
            labels[places, :width], scores[places, :width] = self.components[c].labels(own)
        return labels, scores

    def removed(self, samples: Int64) -> npt.NDArray[np.bool_]:
        """Whether overlays remove each of the samples, or it is not in the part in use."""
        found = np.zeros(len(samples), dtype=np.bool_)
        for c, places, own in self._split(samples):
            found[places] = self.components[c].overlay.removed(own)
        return found

    def is_remote(self, samples: Int64) -> npt.NDArray[np.bool_]:
        """Whether each of the samples lies in object storage."""
        remote = np.array([not of.is_local for of in self.components])
        found: npt.NDArray[np.bool_] = remote[self._component_of(np.asarray(samples, dtype=np.int64))]
        return found

    def is_removed(self, sample: int) -> bool:
        """Whether an overlay removes the sample, or it is not in the part in use."""
        dataset, own = self.find(sample)
        return dataset.overlay.is_removed(own)

    def read_range(self, shard: int, start: int, end: int) -> bytes:
        """The bytes [start, end) of a tar, unchecked. Raises OSError."""
        dataset, own = self._shard(shard)
        return dataset.read_range(own, start, end)

    def checked(self, sample: int, data: bytes | memoryview, place: Place) -> bytes | memoryview:
        """The sample's bytes as they were packed, as `Dataset.checked` has them. Raises SampleError, OSError and StorageError."""
        dataset, own = self.find(sample)
        return dataset.checked(own, data, place)

    def name_of(self, sample: int) -> tuple[str, str, str]:
        """Dataset, shard and key of the sample; the key is "?" where samples/ cannot be read."""
        dataset, own = self.find(sample)
        return self._names[self.components.index(dataset)], dataset.shard_of(own), dataset.key_or_not(own)

    def shard_of(self, sample: int) -> str:
        """The name of the tar that holds the sample."""
        dataset, own = self.find(sample)
        return dataset.shard_of(own)

    def tar_of(self, shard: int) -> str:
        """Where a tar lies."""
        dataset, own = self._shard(shard)
        return f"{dataset.path}/{dataset.shard_names[own]}"

    def find(self, sample: int) -> tuple[Dataset, int]:
        """The dataset that holds a sample, and its number there."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} is not in 0..{self.num_samples - 1}")
        c = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        return self.components[c], sample - int(self.first_samples[c])

    def _shard(self, shard: int) -> tuple[Dataset, int]:
        """The dataset that holds a tar, and the tar's number there."""
        c = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self.components[c], shard - int(self.first_shards[c])

    def _component_of(self, samples: Int64) -> Int64:
        return np.searchsorted(self.first_samples, samples, side="right") - 1

    def _split(self, samples: Int64) -> Iterator[tuple[int, Int64, Int64]]:
        """Of each component that holds any of the samples: its number, their places, and their numbers in it."""
        samples = np.asarray(samples, dtype=np.int64)
        if len(samples) and (samples.min() < 0 or samples.max() >= self.num_samples):
            raise IndexError(f"samples {samples.min()}..{samples.max()} are not all in 0..{self.num_samples - 1}")
        component = self._component_of(samples)
        for c in np.unique(component).tolist():
            places = np.flatnonzero(component == c)
            yield c, places, samples[places] - self.first_samples[c]

    def __reduce__(self) -> tuple[Any, ...]:
        return Mixture, (self.components,)
