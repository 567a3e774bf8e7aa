"""Where the time of vitscale's stream goes: CPU milliseconds an image of each stage, on one core, over the same photographs.

    python benchmarks/loader_stages.py FOLDER --core 0      # FOLDER as loader.py prepares it

The stages are called one after another as the stream calls them, on all images before the next stage. Times are those of the thread that
runs, which others on the machine disturb least. Prints a table, and as its last line JSON.
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from loader_systems import SIZE, Data, full_decoder, open_stream
from PIL import Image

from data_tools.images import decode
from vitscale import images, keyed
from vitscale.config import PreprocessConfig
from vitscale.mixture import Mixture

BATCH = 64


def main() -> None:
    """Times all stages in turn, `--rounds` times, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    os.sched_setaffinity(0, {flags.core})
    rounds = [measure(Data(flags.folder), flags.images) for _ in range(flags.rounds)]
    found = {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}
    print(f"{flags.folder.name}, CPU ms an image")
    for name, milliseconds in found.items():
        print(f"  {name:44}{milliseconds:8.3f}")
    print(json.dumps(found))


def measure(data: Data, count: int) -> dict[str, float]:
    """CPU milliseconds an image of each stage, once."""
    import torch

    from vitscale.model import normalize

    torch.set_num_threads(1)
    preprocess = PreprocessConfig()
    dataset, order = Mixture.open([data.dataset]), open_stream(data.dataset, BATCH).order
    clock = Clock(count)

    positions = np.arange(count, dtype=np.int64)
    keys = keyed.key(keyed.Purpose.SAMPLE, 0, positions)
    places = [positions[start : start + BATCH] for start in range(0, count, BATCH)]
    samples = np.concatenate(clock.stage("order: positions to samples", order.samples_at, places))
    located = clock.stage("look-up in the index", lambda place: dataset.locate(samples[place]), places)
    where = [(located[i // BATCH], i % BATCH) for i in range(count)]
    encoded = clock.stage("read", lambda of: dataset.read_range(int(of[0].shards[of[1]]), *of[0].range(of[1])), where)
    clock.stage("check the hash", lambda of: dataset.check(of[0], of[1], *of[2]), zip(samples.tolist(), encoded, where, strict=True))
    decoded = clock.stage("decode: JPEG to RGB, in full", decode, encoded)
    boxes = clock.stage(
        "draw the crop", lambda of: images.random_crop(of[0].width, of[0].height, of[1], preprocess), zip(decoded, keys, strict=True)
    )
    views = clock.stage("crop and resize", lambda of: resize(*of), zip(decoded, boxes, strict=True))
    mirrored = clock.stage("augment: mirror", lambda of: mirror(*of, preprocess), zip(views, keys, strict=True))
    slots = [np.zeros((BATCH, SIZE, SIZE, 3), np.uint8) for _ in places]
    clock.stage("collate: pixels to their slot", lambda of: slots[of[0] // BATCH].__setitem__(of[0] % BATCH, of[1]), enumerate(mirrored))
    clock.stage("collate: labels", lambda place: dataset.labels(samples[place]), places)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = clock.stage(f"transfer to {device}", lambda batch: torch.from_numpy(batch).to(device, non_blocking=True), slots)
    clock.stage(f"normalise on {device} (training, not the stream)", lambda batch: normalize(batch, preprocess), moved)
    stages = sum(clock.milliseconds[name] for name in clock.milliseconds if not name.startswith("normalise"))
    clock.milliseconds["the stream's stages together"] = stages
    clock.stage("beside: libjpeg-turbo's full decode alone", full_decoder(), encoded)
    clock.stage("beside: Pillow's full decode alone", lambda jpeg: Image.open(io.BytesIO(jpeg)).load(), encoded)
    return clock.milliseconds


class Clock:
    """Runs stages and keeps what each takes."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.milliseconds: dict[str, float] = {}

    def stage(self, name: str, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """What the function gives for each item."""
        started = time.thread_time()
        results = [function(item) for item in items]
        self.milliseconds[name] = (time.thread_time() - started) * 1e3 / self.images
        return results


def resize(image: Image.Image, box: images.Box) -> images.Pixels:
    """As `images.training_view`."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def mirror(pixels: images.Pixels, key: np.uint64, preprocess: PreprocessConfig) -> images.Pixels:
    """As `images.training_view`, where the mirrored view is copied by collating."""
    return pixels[:, ::-1] if keyed.uniform(key, 0) < preprocess.flip else pixels


if __name__ == "__main__":
    main()
