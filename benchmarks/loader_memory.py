"""What a rank's stream holds: memory as samples pass, and where it begins far into a large dataset.

    python benchmarks/loader_memory.py soak FOLDER --samples 1000000     # JPEGs of 64 pixels
    python benchmarks/loader_memory.py resume FOLDER --shards 30000      # the dataset of manifest.py, 303 M samples

soak: resident memory of a process that does nothing else, and of its workers, each time a twentieth of the samples has passed; what must
hold is that the last is within 10% of the first. resume: in a process of its own each, the seconds that opening the dataset takes and from
then to the first micro-batch, at sample 0 and at 200 M (two thirds of a smaller dataset), rank 0 of 256, 16 images a rank; and memory of
its own (not of mapped files) after 20 micro-batches, beyond that after the imports. Prints lines, and as its last line JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import photographs
from loader_systems import family, open_stream

SMALL = 64
FAR = 200_000_000
WORLD_SIZE, MICRO_BATCH, LANES, WINDOW, PIXELS = 256, 16, 1024, 256, 224


def main() -> None:
    """One of the two; `pass` and `begin` are their processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("soak", "pass", "resume", "begin"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=30_000)
    parser.add_argument("--at", type=int, default=0)
    flags = parser.parse_args()
    found = {
        "soak": lambda: soak(flags.folder, flags.samples),
        "pass": lambda: pass_samples(flags.folder, flags.samples),
        "resume": lambda: resume(flags.folder, flags.shards),
        "begin": lambda: begin(flags.folder, flags.at),
    }[flags.what]()
    print(json.dumps(found))


def process(what: str, folder: Path, *arguments: object) -> dict[str, Any]:
    """What a process of this script finds."""
    command = [sys.executable, __file__, what, str(folder), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def soak(folder: Path, samples: int) -> dict[str, Any]:
    """Resident memory, MiB, by the number of samples."""
    home = folder / "small"
    photographs.write(home / "files", SMALL, SMALL, count=500, names=20)
    found = process("pass", photographs.packed(home / "files", home / "packed", 1000), "--samples", samples)
    resident = found["resident_MiB"]
    first, *_, last = resident
    found["grown"] = resident[last] / resident[first] - 1
    print(
        f"{resident[first]:,.0f} MiB after {int(first):,} samples, {resident[last]:,.0f} MiB after {int(last):,}: {found['grown']:+.1%}; "
        f"{found['images_per_second']:,.0f} images/s"
    )
    return found


def pass_samples(dataset: Path, samples: int, batch_size: int = 100) -> dict[str, Any]:
    """A rank's memory as the samples pass."""
    batches = open_stream(dataset, batch_size, SMALL).micro_batches(0)
    every = max(batch_size, samples // 20 // batch_size * batch_size)
    resident: dict[int, float] = {}
    started = time.perf_counter()
    for seen in range(batch_size, samples + 1, batch_size):
        next(batches)
        if seen % every == 0:
            resident[seen] = sum(status(pid, "VmRSS") for pid in family())
    seconds = time.perf_counter() - started
    batches.close()
    return {"resident_MiB": resident, "images_per_second": samples / seconds}


def status(pid: int, field: str) -> float:
    """A figure of /proc/PID/status in MiB; 0 of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{field}:")), 0.0)


def resume(folder: Path, shards: int) -> dict[str, Any]:
    """Beginning at 0 and far in; several times, for the first start reads the index from the disk."""
    from manifest import SAMPLES_A_SHARD, build

    path = build(folder, shards)
    samples = shards * SAMPLES_A_SHARD
    far = min(FAR, samples * 2 // 3) // (WORLD_SIZE * MICRO_BATCH) * WORLD_SIZE * MICRO_BATCH
    runs: dict[int, list[dict[str, float]]] = {0: [], far: []}
    for _ in range(3):
        for at, found in runs.items():
            found.append(process("begin", path, "--at", at))
    best = {at: min(found, key=lambda run: run["first_batch_seconds"]) for at, found in runs.items()}
    for at, found in best.items():
        print(
            f"at {at:>11,} of {samples:,}: opened in {found['open_seconds']:.2f} s, first batch {found['first_batch_seconds']:.2f} s after "
            f"that; {found['own_MiB']:.0f} MiB beyond imports, of which {found['buffer_MiB']:.0f} are batches made ahead"
        )
    return {"samples": samples, "runs": {str(at): found for at, found in runs.items()}}


def begin(dataset: Path, at: int) -> dict[str, float]:
    """A rank's start."""
    import vitscale.stream  # noqa: F401  (so that imports are over)
    from vitscale.config import StreamConfig

    imported = sum(status(pid, "RssAnon") for pid in family())
    started = time.perf_counter()
    size = WORLD_SIZE * MICRO_BATCH
    stream = open_stream(dataset, size, PIXELS, lanes=LANES, window=WINDOW, micro_batch_size=MICRO_BATCH, world_size=WORLD_SIZE)
    opened = time.perf_counter()
    batches = stream.micro_batches(at)
    next(batches)
    first = time.perf_counter()
    for _ in range(20):
        next(batches)
    own = sum(status(pid, "RssAnon") for pid in family()) - imported
    batches.close()
    ahead = (StreamConfig().prefetch + 1) * MICRO_BATCH * PIXELS * PIXELS * 3 / 2**20
    return {"open_seconds": opened - started, "first_batch_seconds": first - opened, "own_MiB": own, "buffer_MiB": ahead}


if __name__ == "__main__":
    main()
