"""Where the time of vitscale's stream goes: CPU milliseconds an image of each stage, on one core, over the same photographs.

    python benchmarks/loader_stages.py FOLDER --core 0      # FOLDER as loader.py prepares it

The stages are called one after another as the stream calls them, on all images before the next stage. Decoding, cropping, resizing,
mirroring and writing into the batch's slot are one call; how much of it is decoding is what the same call takes for a view as large as what
is decoded, which resizes nothing. Times are those of the thread that runs, which others on the machine disturb least. Prints tables, and as
its last line JSON.
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loader_systems import SIZE, Data, full_decoder, open_stream
from PIL import Image

from vitscale import images, keyed, pixels
from vitscale.augment import randaugment
from vitscale.config import Decode, PreprocessConfig
from vitscale.mixture import Mixture

BATCH = 64
PREPROCESS = PreprocessConfig()


def main() -> None:
    """Times all stages in turn, `--rounds` times, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    os.sched_setaffinity(0, {flags.core})
    modes: tuple[Decode, ...] = ("exact", "fast")
    rounds = [{mode: measure(Data(flags.folder), flags.images, mode) for mode in modes} for _ in range(flags.rounds)]
    found = {mode: {name: statistics.median(taken[mode][name] for taken in rounds) for name in rounds[0][mode]} for mode in modes}
    print(f"{f'{flags.folder.name}, CPU ms an image':48}" + "".join(f"{mode:>9}" for mode in modes))
    for name in found["exact"]:
        print(f"  {name:46}" + "".join(f"{found[mode][name]:9.3f}" for mode in modes))
    print(json.dumps(found | {"decoder": pixels.path_in_use()}))


def measure(data: Data, count: int, mode: Decode) -> dict[str, float]:
    """CPU milliseconds an image of each stage, once."""
    import torch

    from vitscale.model import normalize

    torch.set_num_threads(1)
    dataset, order = Mixture.open([data.dataset]), open_stream(data.dataset, BATCH).order
    clock = Clock(count)

    positions = np.arange(count, dtype=np.int64)
    keys = keyed.key(keyed.Purpose.SAMPLE, 0, positions)
    places = [positions[start : start + BATCH] for start in range(0, count, BATCH)]
    samples = np.concatenate(clock.stage("order: positions to samples", order.samples_at, places))
    located = clock.stage("look-up in the index", lambda place: dataset.locate(samples[place]), places)
    where = [located[i // BATCH].place(i % BATCH) for i in range(count)]
    encoded = clock.stage("read", lambda place: dataset.read_range(place.shard, place.start, place.end), where, keep=False)
    clock.stage("check the hash", lambda of: dataset.checked(*of), zip(samples.tolist(), encoded, where, strict=True))
    draws = np.concatenate(clock.stage("draw crops and mirrors", lambda place: images.draws(keys[place]), places))
    slots = [np.zeros((BATCH, SIZE, SIZE, 3), np.uint8) for _ in places]
    for slot in slots:
        slot += 1  # so that its memory is there
    views = list(zip(encoded, keys.tolist(), draws, rows_of(slots), strict=False))
    clock.stage("decode, crop, resize, mirror, to its slot", lambda of: view(*of, mode), views)
    clock.stage("labels", lambda place: dataset.labels(samples[place]), places)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = clock.stage(f"transfer to {device}", lambda batch: torch.from_numpy(batch).to(device, non_blocking=True), slots)
    together = sum(clock.milliseconds.values())
    cuts = [natural_cut(data, draw, mode) for data, _, draw, _ in views]
    outs = [np.ones((cut.size[1], cut.size[0], 3), np.uint8) for cut, _ in cuts]
    clock.stage("of it decoding, at most", lambda of: decode_alone(*of), zip(encoded, cuts, outs, strict=True))
    clock.milliseconds["the stream's stages together"] = together
    clock.stage("RandAugment(2, 10), where it is asked for", lambda of: randaugment(*of, 2, 10), zip(rows_of(slots), keys, strict=False))
    clock.stage(f"normalise on {device}, which is training's", lambda batch: normalize(batch, PREPROCESS), moved)
    clock.stage("beside: libjpeg-turbo's full decode alone", full_decoder(), encoded)
    clock.stage("beside: Pillow's full decode alone", lambda jpeg: Image.open(io.BytesIO(jpeg)).load(), encoded)
    return clock.milliseconds


class Clock:
    """Runs stages and keeps what each takes."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.milliseconds: dict[str, float] = {}

    def stage(self, name: str, function: Callable[[Any], Any], items: Iterable[Any], *, keep: bool = True) -> list[Any]:
        """What the function gives for each item; without `keep` it is timed letting go of each, as a loader does, and then called again."""
        started = time.thread_time()
        results = []
        for item in items:
            result = function(item)
            if keep:
                results.append(result)
        self.milliseconds[name] = (time.thread_time() - started) * 1e3 / self.images
        return results if keep else [function(item) for item in items]


def rows_of(batches: list[pixels.Pixels]) -> Iterator[pixels.Pixels]:
    """Their images, one after another."""
    return (image for batch in batches for image in batch)


def view(data: bytes, key: int, draws: images.Draws, slot: pixels.Pixels, mode: Decode) -> None:
    """As the stream's workers call it."""
    images.training_view(data, (SIZE, SIZE), key, draws, PREPROCESS, mode, slot)


def natural_cut(data: bytes, draws: images.Draws, mode: Decode) -> tuple[pixels.Cut, int]:
    """The same crop in the size in which it is decoded, and at which part of its size that is."""
    with Image.open(io.BytesIO(data)) as image:
        region = images.random_crop(image.width, image.height, draws, PREPROCESS)
    scale = images.decoding_scale(pixels.Cut(region, (SIZE, SIZE), "bilinear")) if mode == "fast" else 1
    left, top, right, bottom = region
    return pixels.Cut(region, ((right - left) // scale, (bottom - top) // scale), "bilinear"), scale


def decode_alone(data: bytes, cut: tuple[pixels.Cut, int], out: pixels.Pixels) -> None:
    """The crop in that size."""
    pixels.cut_pixels(data, out, lambda width, height: cut[0], lambda _: cut[1])


if __name__ == "__main__":
    main()
