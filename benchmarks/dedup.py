"""Near duplicates: what is found of changed copies of real photographs, what is taken for one wrongly, and how the search grows.

    python benchmarks/dedup.py            # needs Debian's mate-backgrounds, opencv-doc and, to compare with, findimagedupes
    python benchmarks/dedup.py --times    # the search alone, among 10,000 to 3,000,000 hashes

Recall and precision: photographs are cut into parts of at most 640 pixels that do not overlap, each a picture of its own; those that stand
there twice are left out, and the others packed. For each kind of change all pictures are changed and packed as an evaluation set, and
`vitscale data dedup --against` says which pictures of the first set are in it. Recall is the share that is found, of those that are not too
plain; precision the share of what is found for its own copy. findimagedupes (a perceptual hash of 256 bits, 90% alike, as it comes) gets
the same files in one folder; two are found if it puts them in one group.

Time: random hashes, a tenth of them with up to 31 bits of another one changed; all are searched among all, mirrored ones too.
"""

import argparse
import datetime
import io
import json
import math
import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from data_tools import dedup as module
from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.dedup import ROW, Search, dedup, hash_datasets
from data_tools.pack import pack

RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = ("/usr/share/backgrounds/mate/nature", "/usr/share/backgrounds/mate/desktop", "/usr/share/doc/opencv-doc/examples/data")
SIDE = 640
DISTANCES = (15, 31, 47)


def cut_photographs() -> list[Image.Image]:
    """Parts of all photographs, none of which overlap."""
    parts = []
    for file in sorted(file for folder in PHOTOGRAPHS for file in Path(folder).glob("**/*") if file.suffix in (".jpg", ".jpeg", ".png")):
        try:
            image = Image.open(file).convert("RGB")
        except OSError:
            continue
        if min(image.size) < 300:
            continue
        columns, rows = (max(1, side // 600) for side in image.size)
        for column in range(columns):
            for row in range(rows):
                box = [image.width * column // columns, image.height * row // rows]
                part = image.crop((*box, image.width * (column + 1) // columns, image.height * (row + 1) // rows))
                part.thumbnail((SIDE, SIDE))
                parts.append(part)
    return parts


def crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """Leaves that share of the area away, at a random place."""

    def change(image: Image.Image) -> Image.Image:
        width, height = (round(side * math.sqrt(1 - share)) for side in image.size)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        return image.crop((left, top, left + width, top + height))

    return change


def watermark(image: Image.Image) -> Image.Image:
    """White words, an eighth of the height, across the middle."""
    image = image.copy()
    ImageDraw.Draw(image).text((image.width * 0.1, image.height * 0.45), "SAMPLE PHOTO", fill=(255, 255, 255), font_size=image.height // 8)
    return image


def coarse(image: Image.Image) -> Image.Image:
    """JPEG at quality 30."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at quality 30": coarse,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a quarter of the size": lambda image: image.resize((image.width // 4, image.height // 4)),
    "squashed to a square": lambda image: image.resize((300, 300)),
    "mirrored": ImageOps.mirror,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "30% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "watermark": watermark,
    "2% cropped": crop(0.02),
    "5% cropped": crop(0.05),
    "10% cropped": crop(0.1),
    "20% cropped": crop(0.2),
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
}


def save(images: list[Image.Image], folder: Path) -> Path:
    """One JPEG file for each image, in a class folder."""
    (folder / "all").mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / "all" / f"{number:04d}.jpg", quality=90)
    return folder


def accuracy(folder: Path) -> dict[str, object]:
    """Recall and precision for each change and distance, and findimagedupes' beside them."""
    parts = cut_photographs()
    found: dict[str, object] = {"parts_of_photographs": len(parts)}
    (packed,) = pack(PackConfig((str(save(parts, folder / "all")),), str(folder / "packed-all")))
    dedup(packed.path, distance=47, dry_run=True, listing=folder / "own.parquet")  # what stands there twice says nothing of a change
    twice = {int(row["key"][-4:]) for row in pq.read_table(folder / "own.parquet").to_pylist()}
    parts = [part for number, part in enumerate(parts) if number not in twice]
    (packed,) = pack(PackConfig((str(save(parts, folder / "originals")),), str(folder / "packed")))
    dataset = Dataset.open(packed.path)
    (rows,) = hash_datasets([dataset], _made(folder / "work"), 0, None)
    telling = {dataset.key(i)[-4:] for i in np.flatnonzero(rows["quality"] >= 50).tolist()}
    found |= {"twice": len(twice), "too_plain": len(parts) - len(telling), "pictures": len(telling)}
    changes: dict[str, dict[str, float]] = {}
    for number, (name, change) in enumerate(CHANGES.items()):
        random.seed(number)
        changed = save([change(part) for part in parts], folder / f"change-{number}")
        (other,) = pack(PackConfig((str(changed),), str(folder / f"packed-{number}"), split="val"))
        line: dict[str, float] = {}
        for distance in DISTANCES:
            dedup(
                packed.path,
                (other.path,),
                inside=False,
                distance=distance,
                dry_run=True,
                listing=folder / "list.parquet",
                work=folder / "work",
            )
            pairs = [(row["key"][-4:], row["copy_of"][-4:]) for row in pq.read_table(folder / "list.parquet").to_pylist()]
            pairs = [pair for pair in pairs if pair[0] in telling]
            right = sum(key == copy for key, copy in pairs)
            wrong = len(pairs) - right
            line[f"recall_{distance}"] = right / len(telling)
            line[f"precision_{distance}"] = right / max(1, right + wrong)
        line |= of_findimagedupes(folder, changed, telling)
        changes[name] = line
        print(
            f"{name:24s} "
            + "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())
        )
        (folder / "list.parquet").unlink()
        shutil.rmtree(changed)
    return found | {"changes": changes}


def of_findimagedupes(folder: Path, changed: Path, telling: set[str]) -> dict[str, float]:
    """The same two sets in the existing tool."""
    if not shutil.which("findimagedupes"):
        return {}
    both = _made(folder / "both")
    for kind, source in (("original", folder / "originals"), ("changed", changed)):
        for file in (source / "all").iterdir():
            os.link(file, both / f"{kind}-{file.name}")
    done = subprocess.run(["findimagedupes", "-q", str(both)], capture_output=True, text=True, check=True)
    shutil.rmtree(both)
    right, wrong = set(), set()
    for line in done.stdout.splitlines():
        names = [Path(word).stem.split("-") for word in line.split()]
        originals, copies = ({number for kind, number in names if kind == wanted} & telling for wanted in ("original", "changed"))
        right |= originals & copies
        wrong |= {number for number in originals if copies - {number}}
    return {"findimagedupes_recall": len(right) / len(telling), "findimagedupes_precision": len(right) / max(1, len(right | wrong))}


class Hashed:
    """Stands for a dataset of which only hashes are known."""

    def __init__(self, size: int) -> None:
        self.num_samples = size
        self.overlay = type("", (), {"removed": staticmethod(lambda samples: np.zeros(len(samples), dtype=bool))})

    def hash_batches(self) -> list[tuple[int, np.ndarray]]:
        """As of a dataset."""
        return [(0, np.arange(self.num_samples, dtype=np.uint64))]


def times(sizes: list[int]) -> list[dict[str, float]]:
    """Seconds, and the share of planted copies that is found, by size."""
    module._pixels = lambda dataset: np.arange(dataset.num_samples, 0, -1)  # type: ignore[assignment, attr-defined, misc]
    lines = []
    for size in sizes:
        rng = np.random.default_rng(0)
        rows = np.zeros(size, ROW)
        rows["hash"], rows["mirrored"], rows["quality"] = (
            rng.integers(0, 256, (size, 32), dtype=np.uint8), rng.integers(0, 256, (size, 32), dtype=np.uint8), 100
        )  # fmt: skip
        copies = np.arange(size - size // 10, size)
        far = rng.integers(1, 32, len(copies))
        flips = np.argsort(rng.random((len(copies), 256)), axis=1) < far[:, None] if size <= 10**6 else None
        if flips is None:
            flips = np.concatenate([np.argsort(rng.random((len(some), 256)), axis=1) < some[:, None] for some in np.array_split(far, 20)])
        rows["hash"][copies] = rows["hash"][rng.integers(0, size - size // 10, len(copies))] ^ np.packbits(flips, axis=1)
        begun = time.perf_counter()
        found = Search([Hashed(size)], [rows], 31, 50, True, module.BLOCK).run(inside=True)  # type: ignore[list-item]
        seconds = time.perf_counter() - begun
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        lines.append(
            {"hashes": size, "seconds": seconds, "found": len(found.samples) / len(copies), "peak_mib": int(peak.split()[1]) / 1024}
        )
        print("  ".join(f"{name} {value:,.4g}" for name, value in lines[-1].items()), flush=True)
    return lines


def plot(lines: list[dict[str, float]]) -> str:
    """Time against set size, both axes logarithmic, as SVG."""
    xs, ys = [line["hashes"] for line in lines], [line["seconds"] for line in lines]
    low_x, high_x = 10 ** math.floor(math.log10(min(xs))), 10 ** math.ceil(math.log10(max(xs)))
    low_y, high_y = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            70 + 500 * math.log(x / low_x) / math.log(high_x / low_x),
            290 - 260 * math.log(y / low_y) / math.log(high_y / low_y),
        )  # fmt: skip

    drawn = []
    for power in range(round(math.log10(low_x)), round(math.log10(high_x)) + 1):
        x, _ = place(10**power, low_y)
        drawn.append(f'<path d="M{x:.1f} 30V290" stroke="#ccc"/><text x="{x:.1f}" y="308" text-anchor="middle">{10**power:,}</text>')
    for power in range(round(math.log10(low_y)), round(math.log10(high_y)) + 1):
        _, y = place(low_x, 10**power)
        drawn.append(f'<path d="M70 {y:.1f}H570" stroke="#ccc"/><text x="62" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    squared = "M" + "L".join(
        "{:.1f} {:.1f}".format(*place(x, min(high_y, ys[0] * (x / xs[0]) ** 2))) for x in xs if ys[0] * (x / xs[0]) ** 2 <= high_y
    )
    drawn.append(f'<path d="{squared}" fill="none" stroke="#999" stroke-dasharray="4"/>')
    drawn.append(f'<path d="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1f6feb"/>' for x, y in points]
    title = "Seconds to search a set for near duplicates, by images (dashed: growth of all pairs)"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 330" font-family="sans-serif" font-size="12">'
        f'<title>{title}</title><rect width="600" height="330" fill="#fff"/><text x="70" y="18">{title}</text>{"".join(drawn)}</svg>\n'
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="measure the search's time alone")
    parser.add_argument("--largest", type=int, default=3_000_000, help="hashes in the largest search")
    options = parser.parse_args()
    today = datetime.date.today().isoformat()
    machine = {"date": today, "cores": len(os.sched_getaffinity(0)), "machine": platform.processor() or platform.machine()}
    if options.times:
        sizes = [size for power in range(4, 9) for size in (10**power, 3 * 10**power) if size <= options.largest]
        lines = times(sorted({*sizes, options.largest}))
        (RESULTS / f"{today}-dedup-times.json").write_text(json.dumps(machine | {"times": lines}, indent=1) + "\n")
        (RESULTS / f"{today}-dedup-times.svg").write_text(plot(lines))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = accuracy(Path(folder))
        rates = hashing_rate(Path(folder))
    (RESULTS / f"{today}-dedup.json").write_text(json.dumps(machine | found | rates, indent=1) + "\n")


def hashing_rate(folder: Path) -> dict[str, float]:
    """Images hashed a second, decoding included."""
    dataset = Dataset.open(folder / "packed" / "train")
    begun = time.perf_counter()
    hash_datasets([dataset], _made(folder / "rate"), 1, None)
    rate = dataset.num_samples / (time.perf_counter() - begun)
    print(f"{rate:,.0f} images hashed a second on one core")
    return {"images_hashed_per_second": rate}


if __name__ == "__main__":
    main()
