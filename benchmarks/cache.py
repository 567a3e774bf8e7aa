"""What the cache costs: reads that it has, blocks that it must keep, and room made among many.

    python -m benchmarks.cache [FOLDER]        FOLDER: on the disk to measure; about 1.5 GB are written there and removed

Prints one line a figure, with its conditions. Nothing is asked of a network: `fetch` hands out memory.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.cache import BLOCK, CHUNK, LEAST, Cache

SIZE = 64 * BLOCK  # of a tar
IMAGE = 50_000  # bytes


def main(folder: Path) -> None:
    data = np.random.default_rng(0).bytes(SIZE)
    limit = 6 * SIZE
    cache = Cache(folder / "cache", limit)

    started = time.perf_counter()
    for tar in range(4):
        cache.read(f"bench/{tar:06d}", SIZE, 0, SIZE, lambda first, last: data[first:last])
    seconds = time.perf_counter() - started
    print(f"kept: {4 * SIZE / seconds / 1e6:,.0f} MB/s, {4 * SIZE / BLOCK / seconds:,.0f} blocks of {BLOCK >> 20} MiB a second, one thread")

    for threads in (1, 8):
        rng = random.Random(0)
        places = [(rng.randrange(4), rng.randrange(SIZE - IMAGE)) for _ in range(8_000)]

        def one(place: tuple[int, int]) -> int:
            tar, start = place
            return len(cache.read(f"bench/{tar:06d}", SIZE, start, start + IMAGE, lambda first, last: b""))

        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            assert sum(pool.map(one, places, chunksize=100)) == len(places) * IMAGE
        seconds = time.perf_counter() - started
        print(f"read: {len(places) / seconds:,.0f} images of {IMAGE // 1000} kB a second that are here (in memory), threads: {threads}")

    for blocks in (10_000, 50_000):
        where = folder / f"many-{blocks}"
        for number in range(blocks):
            file = where / "vitscale-blocks/bench" / f"{number // 250:06d}" / f"{number % 250:06d}"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as empty:
                empty.truncate(BLOCK + 8 * BLOCK // CHUNK)  # takes no room
        full = Cache(where, max(LEAST, blocks * (BLOCK + 8 * BLOCK // CHUNK)))
        started = time.perf_counter()
        full.read("bench/999999", SIZE, 0, 1, lambda first, last: data[first:last])
        seconds = time.perf_counter() - started
        gone = blocks + 1 - sum(1 for _ in (where / "vitscale-blocks/bench").glob("*/*"))
        print(
            f"room: {seconds:.2f} s to look at {blocks:,} blocks and remove {gone:,}, {seconds / gone * 1e6:,.0f} us for each that can come"
        )
        shutil.rmtree(where)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        main(Path(made))
