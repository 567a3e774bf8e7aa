"""What the order of a run asks of the storage, and how well it shuffles, on a manifest of 303 M samples in 30,000 shards.

    python benchmarks/order.py                     # 256 ranks, batch 4,096, as in the README
    python benchmarks/order.py --world 96 --batch 12288

No data: the order needs nothing but the number of samples in each shard. Samples are taken to be equally large, so that bytes are samples.

*Locality*: windows are read whole by the rank that has their lane. Counted for ranks all over the world: the samples of all windows that
they begin in 1,000 steps, against those that they use. A run under way has begun its first windows before; one that starts or resumes in
the middle of windows reads these whole, so both are told. Shards: a rank has some lanes, each a stretch of the list of shards.

*Shuffle quality* of a batch, beside a full permutation (`keyed.permute` over all samples) and a small model of MosaicML Streaming's py1e,
after streaming/base/shuffle/py1e.py: in each of 32 canonical nodes, shards in random order, the samples of a shard shuffled and spread
evenly over a range of 0.75 to 1.25 blocks of 2**18 around their place; a batch takes equally many neighbours of each node's list.

*Resume*: a new process makes the order and the sample numbers of a rank's first batch, at the start and in the middle.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from vitscale import keyed
from vitscale.config import StreamConfig
from vitscale.locality import choose_order
from vitscale.order import Int64, RunOrder

RESULTS = Path(__file__).parent / "results"
SHARDS, SAMPLES_A_SHARD = 30_000, 10_100
SAMPLES = SHARDS * SAMPLES_A_SHARD
STEPS, RANKS, MIDDLE = 1_000, 32, 200_000_000
NODES, BLOCK = 32, 2**18

RESUMED = """
import json, sys, time
import numpy as np
from vitscale.order import RunOrder
shards, samples_a_shard, lanes, window, batch, world, position = map(int, sys.argv[1:])
def own():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024
before, started = own(), time.perf_counter()
order = RunOrder([np.full(shards, samples_a_shard)], None, 0, lanes, window)
first = position // batch * batch
positions = order.positions_of_rank(first, batch, 0, world)
order.samples_at(positions)
order.windows_at(positions)
seconds = time.perf_counter() - started
for step in range(200):
    order.samples_at(order.positions_of_rank(first + step * batch, batch, 0, world))
print(json.dumps({"first_batch_seconds": seconds, "MiB": own() - before, "step_us": (time.perf_counter() - started - seconds) / 200 * 1e6}))
"""


def main() -> None:
    """Measures, prints a table, and writes a dated file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--world", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    stream = choose_order(StreamConfig(), SAMPLES, flags.batch)
    order = RunOrder([np.full(SHARDS, SAMPLES_A_SHARD)], None, 0, stream.lanes, stream.window)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "samples": SAMPLES, "shards": SHARDS, "world_size": flags.world, "global_batch_size": flags.batch, "lanes": stream.lanes,
        "window": stream.window,
        "locality": {
            name: locality(order, start, flags.batch, flags.world) for name, start in (("from 0", 0), (f"from {MIDDLE}", MIDDLE))
        },
        "quality": quality(order, flags.batch),
        "resume": {name: resumed(order, flags.batch, flags.world, start) for name, start in (("at 0", 0), (f"at {MIDDLE}", MIDDLE))},
    }  # fmt: skip
    flags.results.mkdir(parents=True, exist_ok=True)
    file = flags.results / f"{result['date'][:10]}-order{'' if flags.world == 256 else f'-{flags.world}'}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    for part in ("locality", "quality", "resume"):
        columns = result[part]
        print(f"\n{part:46}" + "".join(f"{name:>20}" for name in columns))
        for row in next(iter(columns.values())):
            print(f"{row.replace('_', ' '):46}" + "".join(f"{values[row]:>20,.5g}" for values in columns.values()))
    print(f"saved {file}")


def locality(order: RunOrder, start: int, batch: int, world: int) -> dict[str, float]:
    """What ranks, evenly chosen, read in 1,000 steps, against their share."""
    start = start // batch * batch
    share = STEPS * batch // world
    whole, under_way, shards, own = [], [], [], []
    for rank in np.unique(np.linspace(0, world - 1, min(RANKS, world)).round().astype(int)).tolist():
        positions = np.concatenate([order.positions_of_rank(start + step * batch, batch, rank, world) for step in range(STEPS)])
        mine = positions[order.preferred_ranks(positions, batch, world) == rank]
        own.append(len(mine) / share)
        read, begun, touched = 0, 0, set()
        for window in np.unique(order.windows_at(mine), axis=0).tolist():
            runs = order.window_runs(*window)
            count = sum(count for _, count in runs)
            read += count
            touched |= {first // SAMPLES_A_SHARD for first, _ in runs}
            begun += count if start == 0 or first_position(order, window) >= start else 0
        others = np.setdiff1d(positions, mine)
        touched |= set((order.samples_at(others) // SAMPLES_A_SHARD).tolist())
        whole.append((read + len(others)) / share)
        under_way.append((begun + len(others)) / share)
        shards.append(len(touched))
    return {
        "bytes_over_share_mean": float(np.mean(whole)),
        "bytes_over_share_most": max(whole),
        "bytes_over_share_mean_of_a_run_under_way": float(np.mean(under_way)),
        "bytes_over_share_most_of_a_run_under_way": max(under_way),
        "share_of_samples_in_own_windows_least": min(own),
        "shards_of_its_share": share / SAMPLES_A_SHARD,
        "lanes_a_rank": order.lanes / world,
        "shards_touched_mean": float(np.mean(shards)),
        "shards_touched_most": max(shards),
        "shards_of_its_share_of_an_epoch": SHARDS / world,
        "shards_touched_in_an_epoch_most": shards_of_an_epoch(order, world),
    }


def first_position(order: RunOrder, window: list[int]) -> int:
    """The position of the run at which a window is begun; the run has one component."""
    _, epoch, lane, number = window
    head = 1 + lane * order.window // order.lanes if order.lanes > 1 else order.window
    place = head + (number - 1) * order.window if number else 0
    return epoch * SAMPLES + place * order.lanes + lane


def shards_of_an_epoch(order: RunOrder, world: int) -> float:
    """The most shards that a rank's lanes touch in an epoch, where each rank has equally many."""
    if order.lanes % world:
        return float("nan")
    most = 0
    for rank in range(0, world, max(1, world // 8)):
        touched = set()
        for lane in range(rank * order.lanes // world, (rank + 1) * order.lanes // world):
            for window in range(order.windows_in(0, lane)):
                touched |= {first // SAMPLES_A_SHARD for first, _ in order.window_runs(0, 0, lane, window)}
        most = max(most, len(touched))
    return most


def quality(order: RunOrder, batch: int) -> dict[str, dict[str, float]]:
    """How mixed batches are: two in a row at each of some places of an epoch, on average."""
    starts = np.linspace(0, SAMPLES - 2 * batch, 12).astype(np.int64)[1:-1] // batch * batch
    positions = [np.arange(start, start + 2 * batch) for start in starts.tolist()]
    orders = {
        "vitscale": [order.samples_at(of).reshape(2, batch) for of in positions],
        "full permutation": [keyed.permute(of, SAMPLES, 0).reshape(2, batch) for of in positions],
        "py1e": [py1e(seed, batch // NODES) for seed in range(len(positions))],
    }
    found = {name: [mixed(of, order.window) for of in batches] for name, batches in orders.items()}
    return {name: {row: float(np.mean([of[row] for of in rows])) for row in rows[0]} for name, rows in found.items()}


def mixed(samples: Int64, window: int) -> dict[str, float]:
    """Of batches (b, n): what is in them together, and how alike one is to the next."""
    shards = samples // SAMPLES_A_SHARD
    pairs = samples.shape[1] * (samples.shape[1] - 1) / 2
    counts = [np.unique(row, return_counts=True)[1] for row in shards]
    again = [np.isin(np.unique(after), before).mean() for before, after in itertools.pairwise(shards)]
    return {
        "distinct_shards_in_a_batch": float(np.mean([len(np.unique(row)) for row in shards])),
        "distinct_windows_in_a_batch": float(np.mean([len(np.unique(row // window)) for row in samples])),
        "pairs_of_the_same_shard_ppm": float(np.mean([(of * (of - 1) / 2).sum() / pairs for of in counts]) * 1e6),
        "correlation_of_neighbours": float(np.mean([np.corrcoef(row[:-1], row[1:])[0, 1] for row in samples])),
        "shards_that_the_batch_before_had_too": float(np.mean(again)),
    }


def py1e(seed: int, a_node: int) -> Int64:
    """Two batches from the middle of 32 nodes' lists, of which so many shards are made as have samples there."""
    rng = np.random.default_rng(seed)
    shards = rng.permutation(SHARDS)[: SHARDS // NODES * NODES].reshape(NODES, -1)
    taken = []
    for of_node in shards[:, :40]:
        samples = np.concatenate([rng.permutation(SAMPLES_A_SHARD) + shard * SAMPLES_A_SHARD for shard in of_node])
        reach = (rng.integers(int(0.75 * BLOCK), int(1.25 * BLOCK), len(of_node)) - SAMPLES_A_SHARD) / 2
        places = np.arange(len(samples)) + np.repeat(reach, SAMPLES_A_SHARD) * rng.uniform(-1, 1, len(samples))
        middle = len(samples) // 2
        taken.append(samples[np.argsort(places)][middle : middle + 2 * a_node].reshape(2, a_node))
    return np.concatenate(taken, axis=1)


def resumed(order: RunOrder, batch: int, world: int, position: int) -> dict[str, float]:
    """The best of five new processes."""
    words = [str(number) for number in (SHARDS, SAMPLES_A_SHARD, order.lanes, order.window, batch, world, position)]
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", RESUMED, *words])) for _ in range(5)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
