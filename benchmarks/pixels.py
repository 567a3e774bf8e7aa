"""One training view of one JPEG: what decoding and resizing cost in each way there is, and how far fast pixels are from exact ones.

    python benchmarks/pixels.py [FOLDER]     # of photographs; Debian's opencv-doc and mate-backgrounds have some

Photographs of 500 x 375 and 1024 x 768 are cut out of those in the folder, as JPEGs (4:2:0) of quality 80 and 90. All ways take the same
crops to 224, in turn, image by image, on one thread; each image's time is the least of some rounds, of CPU time. Ratios of one run are what
counts.
"""

import argparse
import datetime
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data_tools.images import decode
from vitscale import images, keyed, pixels
from vitscale.config import PreprocessConfig

RESULTS = Path(__file__).parent / "results"
FOLDERS = [Path("/usr/share/doc/opencv-doc"), Path("/usr/share/backgrounds/mate")]
SIZES = (500, 375), (1024, 768)
TARGET = (224, 224)
CONFIG = PreprocessConfig()


def photographs(folders: list[Path], size: tuple[int, int], count: int) -> list[bytes]:
    """Cut out at random places and scales, so that edges are as sharp as a camera's made smaller."""
    large = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.jpg")):
        image = Image.open(path)
        if image.width >= size[0] and image.height >= size[1]:
            large.append(image.convert("RGB"))
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        image = large[i % len(large)]
        scale = min(1, max(size[0] / image.width, size[1] / image.height) * rng.uniform(1, 1.6))
        shrunk = image.resize((max(size[0], int(image.width * scale)), max(size[1], int(image.height * scale))), Image.Resampling.LANCZOS)
        left, top = rng.integers(0, shrunk.width - size[0] + 1), rng.integers(0, shrunk.height - size[1] + 1)
        file = io.BytesIO()
        shrunk.crop((left, top, left + size[0], top + size[1])).save(file, "JPEG", quality=90 if i % 2 else 80)
        made.append(file.getvalue())
    return made


def ways() -> dict[str, Callable[[bytes, images.Draws], Any]]:
    """What is measured: each takes an image's bytes and its draws."""
    out = np.empty((*TARGET, 3), np.uint8)

    def cut(data: bytes, row: images.Draws) -> pixels.Cut:
        width, height = pixels.plain_jpeg(data) or (0, 0)
        return pixels.Cut(
            images.random_crop(width, height, row, CONFIG), TARGET[::-1], CONFIG.interpolation, mirrored=bool(row[0] < CONFIG.flip)
        )

    def by_pillow(data: bytes, row: images.Draws) -> Any:
        wanted = cut(data, row)
        view = np.asarray(decode(data).crop(wanted.region).resize(wanted.size, Image.Resampling.BILINEAR))
        return np.copyto(out, view[:, ::-1] if wanted.mirrored else view)

    def by_torch(data: bytes, row: images.Draws) -> Any:
        wanted = cut(data, row)
        left, top, right, bottom = wanted.region
        scale = images.decoding_scale(wanted)
        size = pixels.plain_jpeg(data) or (0, 0)
        decoded = torch.from_numpy(simplejpeg.decode_jpeg(data, min_width=-(-size[0] // scale), min_height=-(-size[1] // scale)))
        part = decoded[top // scale : -(-bottom // scale), left // scale : -(-right // scale)].permute(2, 0, 1)[None]
        view = torch.nn.functional.interpolate(part, size=TARGET, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        return np.copyto(out, view[:, ::-1] if wanted.mirrored else view)

    def in_the_way(native: bool, region_decoder: bool, mode: Any, data: bytes, row: images.Draws) -> None:
        before = pixels._native, pixels._region_decoder
        pixels._native, pixels._region_decoder = before[0] if native else None, before[1] if region_decoder else None
        images.training_view(data, TARGET, 0, row, CONFIG, mode, out)
        pixels._native, pixels._region_decoder = before

    decoded: dict[bytes, pixels.Pixels] = {}

    def resize(native: bool, data: bytes, row: images.Draws) -> None:
        if data not in decoded:
            decoded[data] = np.asarray(decode(data))
        source = decoded[data]
        wanted = cut(data, row)
        if native:
            pixels._resize(source, out, wanted.region, pixels._whole(wanted.region), wanted)
        else:
            Image.fromarray(source).crop(wanted.region).resize(wanted.size, Image.Resampling.BILINEAR)

    return {
        "Pillow: decode, crop, resize": by_pillow,
        "Pillow: decode alone": lambda data, row: decode(data),
        "Pillow: crop and resize alone": partial(resize, False),
        "simplejpeg: decode the whole alone": lambda data, row: simplejpeg.decode_jpeg(data),
        "ours: crop and resize alone": partial(resize, True),
        "ours: header and crop alone": cut,
        "exact, native": partial(in_the_way, True, True, "exact"),
        "exact, simplejpeg and native resize": partial(in_the_way, True, False, "exact"),
        "exact, simplejpeg and Pillow": partial(in_the_way, False, False, "exact"),
        "fast, native": partial(in_the_way, True, True, "fast"),
        "fast, simplejpeg and native resize": partial(in_the_way, True, False, "fast"),
        "fast, simplejpeg and torch's resize": by_torch,
    }


def measure(data: list[bytes], rows: images.Draws, rounds: int) -> dict[str, float]:
    """Milliseconds an image."""
    best: dict[str, list[float]] = {name: [np.inf] * len(data) for name in ways()}
    calls = ways()
    for _ in range(rounds):
        for i, (content, row) in enumerate(zip(data, rows, strict=True)):
            for name, call in calls.items():
                begun = time.thread_time()
                call(content, row)
                best[name][i] = min(best[name][i], time.thread_time() - begun)
    return {name: float(np.mean(times)) * 1000 for name, times in best.items()}


def difference(data: list[bytes], rows: images.Draws) -> dict[str, float]:
    """Of fast from exact, in levels of 255, over all views and over those that are decoded at a part of their size."""
    means, largest, shares = [], [], []
    for content, row in zip(data, rows, strict=True):
        exact = images.training_view(content, TARGET, 0, row, CONFIG).astype(int)
        apart = np.abs(images.training_view(content, TARGET, 0, row, CONFIG, "fast") - exact)
        if apart.any():
            means.append(float(apart.mean()))
            largest.append(float(apart.max()))
            shares.append(float((apart <= 3).mean()))
    return {
        "views_scaled": len(means) / len(data),
        "mean_of_scaled": float(np.mean(means)) if means else 0.0,
        "within_3_of_scaled": float(np.mean(shares)) if means else 1.0,
        "max": max(largest, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="photographs; those of Debian's packages if not given")
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"path": pixels.path_in_use(), "sizes": {}}
    print(f"JPEGs by: {pixels.path_in_use()}")
    for size in SIZES:
        data = photographs([args.folder] if args.folder else FOLDERS, size, args.count)
        rows = images.draws(keyed.mix(np.arange(len(data))))
        times, apart = measure(data, rows, args.rounds), difference(data, rows)
        print(f"\n{size[0]} x {size[1]} to {TARGET[0]}, {sum(map(len, data)) / len(data) / 1000:.0f} kB an image")
        for name, milliseconds in times.items():
            print(f"  {name:38s} {milliseconds:7.3f} ms   x {times['Pillow: decode, crop, resize'] / milliseconds:.2f}")
        print(
            f"  fast against exact: {apart['views_scaled']:.0%} of the views scaled; of those {apart['mean_of_scaled']:.2f} of 255 apart "
            f"on average, {apart['within_3_of_scaled']:.1%} of the numbers within 3, the largest {apart['max']:.0f}"
        )
        result["sizes"][f"{size[0]}x{size[1]}"] = {"milliseconds": times, "fast_against_exact": apart}
    target = RESULTS / f"{datetime.date.today()}-pixels.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {target}")


if __name__ == "__main__":
    main()
