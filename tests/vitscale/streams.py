"""A stream of small images, and all that its ranks see of each step."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from data_tools.dataset import Dataset
from vitscale.config import PreprocessConfig, StreamConfig
from vitscale.locality import choose_order
from vitscale.mixture import Mixture
from vitscale.stream import Batch, Share, TrainStream
from vitscale.timeline import Timeline, steady

IMAGE_SIZE = (8, 12)
PREPROCESS = PreprocessConfig(crop_scale=(0.3, 1.0))


def stream(
    dataset: Dataset | Mixture, tmp_path: Path, *, rank: int = 0, world_size: int = 1, batch: int = 12, micro: int | None = None,
    seed: int = 0, config: StreamConfig | None = None, weights: tuple[float, ...] = (),
    timeline: Timeline | None = None,
) -> TrainStream:  # fmt: skip
    mixture = Mixture([dataset]) if isinstance(dataset, Dataset) else dataset
    chosen = choose_order(config or StreamConfig(workers=2), mixture.num_samples, batch)
    return TrainStream(
        mixture, PREPROCESS, chosen, Share(timeline or steady(IMAGE_SIZE, batch, micro or batch // world_size), rank, world_size),
        seed=seed, quarantine=tmp_path / "quarantine.jsonl", weights=weights,
    )  # fmt: skip


def steps(dataset: Dataset, tmp_path: Path, count: int, samples_seen: int = 0, *, world_size: int, micro: int, batch: int, **rest) -> list:
    """For each step the sorted (key, sample, labels, pixels) of all ranks' micro-batches."""
    ranks = [
        stream(dataset, tmp_path, rank=rank, world_size=world_size, batch=batch, micro=micro, **rest).micro_batches(samples_seen)
        for rank in range(world_size)
    ]
    per_rank = batch // world_size // micro
    result = []
    for _ in range(count):
        rows = [row for rank in ranks for micro_batch in itertools.islice(rank, per_rank) for row in rows_of(micro_batch)]
        result.append(sorted(rows))
    return result


def rows_of(batch: Batch) -> Iterator[tuple[int, int, bytes, bytes]]:
    assert batch.valid_B.all()
    for key, sample, labels, image in zip(batch.keys_B, batch.samples_B, batch.labels_BL, batch.images_BHWC, strict=True):
        yield int(key), int(sample), labels.tobytes(), image.tobytes()
