"""Photographs for benchmarks: pieces of Debian's (opencv-doc, mate-backgrounds), in the sizes wanted, as files and as tars."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.config import PackConfig
from data_tools.pack import pack

SOURCES = ("/usr/share/doc/opencv-doc", "/usr/share/backgrounds")
QUALITY = 90
MOST = 60  # photographs that pieces are taken from: each is some MB of memory while it is cut
LARGEST = 2400  # pixels; the largest photographs are made smaller first, which takes less time and memory


def sources(width: int, height: int, most: int | None = None) -> list[Image.Image]:
    """The colour photographs that are at least that large, `most` of them or all, in the order of their paths."""
    found = list(itertools.islice(_sources(width, height), most))
    if not found:
        raise SystemExit(f"no photographs of {width}x{height} pixels in {' or '.join(SOURCES)}: install mate-backgrounds and opencv-doc")
    return found


def _sources(width: int, height: int) -> Iterator[Image.Image]:
    for path in sorted(path for folder in SOURCES for path in Path(folder).rglob("*.jp*g")):
        try:
            with Image.open(path) as image:
                if image.mode == "RGB" and image.width >= width and image.height >= height:
                    image.draft("RGB", (LARGEST, LARGEST))
                    yield image.convert("RGB")
        except OSError:
            continue


def piece(image: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A part of a photograph as somebody might have taken it: most of its width or height, at a random place."""
    scale = min(1.0, max(width / image.width, height / image.height) * rng.uniform(1, 1.6))
    size = max(width, int(image.width * scale)), max(height, int(image.height * scale))
    left, top = (int(rng.integers(0, room - side + 1)) for room, side in zip(size, (width, height), strict=True))
    per_pixel = image.width / size[0], image.height / size[1]
    box = left * per_pixel[0], top * per_pixel[1], (left + width) * per_pixel[0], (top + height) * per_pixel[1]
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def write(folder: Path, width: int, height: int, count: int, names: int = 1) -> list[Path]:
    """`count` different JPEG files in class folders (a class is a photograph), each under so many names; the paths of all."""
    found = sources(width, height, most=min(count, MOST))
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        label = number % len(found)
        one = folder / f"class-{label:03d}" / f"{number:05d}-0.jpg"
        one.parent.mkdir(parents=True, exist_ok=True)
        piece(found[label], width, height, rng).save(one, "JPEG", quality=QUALITY)
        paths.append(one)
        for copy in range(1, names):
            paths.append(one.with_name(f"{number:05d}-{copy}.jpg"))
            os.link(one, paths[-1])
    return paths


def packed(files: Path, out: Path, samples_per_shard: int = 200, split: str = "train") -> Path:
    """Files in class folders as a dataset of tars; its split's folder."""
    config = PackConfig((str(files),), str(out), split=split, samples_per_shard=samples_per_shard, check_images="header", jobs=1)
    (one,) = pack(config)
    return one.path
