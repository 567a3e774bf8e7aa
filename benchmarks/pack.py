"""Packing speed and memory: `vitscale pack` beside `webdataset.ShardWriter` in one run, and what memory does as the set grows.

    python benchmarks/pack.py                   # speed: 8,000 photographs of some 50 KB, by CPU seconds and by the clock
    python benchmarks/pack.py --memory          # peak memory at 100,000 and 1,000,000 samples of 1 KB (some minutes)

Protocol. The contestants take turns for `--rounds` rounds on the same files, which are read once before; a figure is the median of the
rounds. Both sides write the image and a JSON of labels. Without decoding, ours still hashes every image and every tar, reads each image's
size from its header, looks for its end, and writes index, manifest and tables. fsync is off on both sides (ShardWriter has none), but for
the rows that say otherwise and those of two processes. `dd` writes as many bytes with conv=fsync. CPU seconds are those of the process and
its children.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools.config import PackConfig
from data_tools.pack import pack

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs what is asked for, prints a table, and writes a dated file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        result = memory(Path(folder)) if flags.memory else speed(Path(folder), flags.images, flags.rounds)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        **result,
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    file = flags.results / f"{result['date'][:10]}-pack-{'memory' if flags.memory else 'speed'}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {file}")


# -- Speed ------------------------------------------------------------------------------------------------------------------------------


def speed(folder: Path, images: int, rounds: int) -> dict:
    """Images a second of each contestant."""
    paths = write_photographs(folder / "images", images)
    total = sum(path.stat().st_size for path in paths)
    contestants: dict[str, Callable[[Path], None]] = {
        "webdataset.ShardWriter": lambda out: shard_writer(paths, out),
        "pack, header checks": lambda out: packed(folder, out, check_images="header"),
        "pack, header checks, 2 processes": lambda out: packed(folder, out, check_images="header", jobs=2),
        "pack, header checks, fsync": lambda out: packed(folder, out, sync=True, check_images="header"),
        "dd conv=fsync": lambda out: dd(out, total),
        "pack, decoded": lambda out: packed(folder, out),
        "pack, decoded, 2 processes": lambda out: packed(folder, out, jobs=2),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            out = folder / "out"
            before, started = cpu_seconds(), time.perf_counter()
            run(out)
            seconds[name].append((cpu_seconds() - before, time.perf_counter() - started))
            shutil.rmtree(out)
    rows = {}
    for name, measured in seconds.items():
        cpu, clock = (statistics.median(of) for of in zip(*measured, strict=True))
        rows[name] = {
            "images_per_cpu_second": images / cpu, "images_per_second": images / clock, "MB_per_second": total / clock / 1e6,
            "rounds": measured,
        }  # fmt: skip
    print(f"{images:,} images of {total / images / 1e3:.0f} KB on average")
    print(f"{'':34}{'images/CPU s':>14}{'images/s':>11}{'MB/s':>9}")
    for name, row in rows.items():
        cpu_rate = "" if name.startswith("dd") else f"{row['images_per_cpu_second']:,.0f}"
        print(f"{name:34}{cpu_rate:>14}{row['images_per_second']:>11,.0f}{row['MB_per_second']:>9,.0f}")
    ratio = rows["pack, header checks"]["images_per_cpu_second"] / rows["webdataset.ShardWriter"]["images_per_cpu_second"]
    of_disk = rows["pack, header checks, fsync"]["MB_per_second"] / rows["dd conv=fsync"]["MB_per_second"]
    scaling = rows["pack, decoded, 2 processes"]["images_per_second"] / rows["pack, decoded"]["images_per_second"]
    print(f"{ratio:.1f} x ShardWriter a CPU second; {of_disk:.0%} of the disk's own rate with fsync; {scaling:.2f} x with two processes")
    return {"images": images, "bytes": total, "rows": rows, "ratio": ratio, "of_disk": of_disk, "scaling": scaling}


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files with the size and the noise of photographs, in class folders; forty different ones, each name another file."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse).astype(int) + rng.integers(-17, 18, (375, 500, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        encoded.append(file.getvalue())
    paths = [folder / f"class-{i % 50:02d}" / f"{i:07d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[i % 40])
    for path in paths:
        path.read_bytes()  # so that all contestants find them in memory
    return paths


def shard_writer(paths: list[Path], out: Path) -> None:
    """What webdataset's documentation does."""
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=2_000, verbose=0) as sink:
        for path in paths:
            sink.write({"__key__": path.stem, "jpg": path.read_bytes(), "json": {"labels": [1], "scores": []}})


def packed(folder: Path, out: Path, *, sync: bool = False, jobs: int = 1, check_images: str = "decode") -> None:
    """`vitscale pack`; without fsync where `sync` is not set, also in its processes."""
    code = (
        "import os, sys\n"
        "from data_tools.config import PackConfig\n"
        "from data_tools.pack import pack\n"
        "pack(PackConfig((sys.argv[1],), sys.argv[2], samples_per_shard=2_000, jobs=int(sys.argv[3]), check_images=sys.argv[4]))\n"
    )
    config = PackConfig((str(folder / "images"),), str(out), samples_per_shard=2_000, jobs=jobs, check_images=check_images)  # type: ignore[arg-type]
    if jobs > 1:
        subprocess.run([sys.executable, "-c", code, *config.sources, config.out, str(jobs), check_images], check=True)
        return
    with without_fsync() if not sync else contextlib.nullcontext():
        pack(config)


@contextlib.contextmanager
def without_fsync() -> Iterator[None]:
    """For the comparison with what does not wait for the disk."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


def dd(out: Path, size: int) -> None:
    """The disk's own rate."""
    out.mkdir()
    command = ["dd", "if=/dev/zero", f"of={out / 'zeros'}", "bs=4M", f"count={size // (4 << 20)}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


# -- Memory -----------------------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from data_tools.config import PackConfig
from data_tools.pack import pack

pack(PackConfig((sys.argv[1],), sys.argv[2], jobs=1, check_images="header"))
print([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def memory(folder: Path) -> dict:
    """Peak resident memory of a pack in one process, from a table, shuffled."""
    rows = {}
    for samples in (100_000, 1_000_000):
        source = folder / f"{samples}.parquet"
        write_table(source, samples)
        done = subprocess.run([sys.executable, "-c", PEAK, str(source), str(folder / "out")], check=True, capture_output=True, text=True)
        rows[samples] = int(done.stdout) / 1024
        shutil.rmtree(folder / "out")
        source.unlink()
        print(f"{samples:>9,} samples: {rows[samples]:,.0f} MiB at the peak")
    grown = rows[1_000_000] / rows[100_000] - 1
    print(f"ten times the samples take {grown:+.0%} memory")
    return {"peak_MiB": rows, "grown": grown}


def write_table(file: Path, samples: int) -> None:
    """A Parquet file of images of some 1 KB."""
    small = []
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noise).save(encoded, "PNG")
        small.append(encoded.getvalue())
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, samples, 10_000):
            numbers = range(start, min(start + 10_000, samples))
            writer.write_table(pa.table({"image": [small[i % 40] for i in numbers], "label": [i % 1_000 for i in numbers]}, schema))


if __name__ == "__main__":
    main()
