"""The held-out part of a split: samples that training leaves alone and evaluation is on, though they lie among the others.

Where it stands: `Dataset.open` is given a `Part` and then takes all samples that are not in it for removed ones, as if an overlay said so;
nothing is written into the dataset's directory.

Invariants: a sample is held out where the hash of its image's bytes (xxh3_64, in the index), read as a number in [0, 1), lies below the
share. So the parts depend on no order, seed or number of processes, copies of an image are never on both sides, and what a smaller share
holds out a larger one holds out, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """One of the two parts that a held-out share makes of a split."""

    share: float
    """Of the samples, those held out."""
    held_out: bool
    """Which part: what is held out, or all else."""

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Whether images with these hashes (uint64) are in it (bool)."""
        below: np.ndarray = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.share
        return below if self.held_out else ~below

    def outside(self, hash_batches: Iterable[tuple[int, np.ndarray]], num_samples: int) -> np.ndarray:
        """A bit a sample (uint8, lowest first), set where it is not in this part.

        Args:
            hash_batches: as `Dataset.hash_batches` has them.
        """
        outside = np.zeros(num_samples, dtype=bool)
        for first, hashes in hash_batches:
            outside[first : first + len(hashes)] = ~self.holds(hashes)
        return np.packbits(outside, bitorder="little")


def part_of(share: float, *, held_out: bool) -> Part | None:
    """The part of a split that a run trains on, or the held-out one; None, the whole of it, where nothing is held out."""
    return Part(share, held_out) if share else None
