"""Opening a dataset of 303 M samples in 30,000 shards, and looking samples up in it.

    python benchmarks/manifest.py               # needs some 11 GB of disk, and writes it once
    python benchmarks/manifest.py --shards 300  # a hundredth of it

The dataset is synthetic but for its bytes: one tar of 10,100 real images, packed by `vitscale pack`, stands 30,000 times under other names
(as hard links), with an index and a manifest of their full length; `samples/`, which nothing but people reads, is left out. A new process
opens it, as each rank of a training does: seconds, peak memory, and the cost of a position (order, index and image). Another one counts
it as `vitscale data stats` does, and picks 12 samples of each of 12 classes as `vitscale data preview` does.
"""

import argparse
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools import dataset as fmt
from data_tools.assemble import index_rows
from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.pack import pack

RESULTS = Path(__file__).parent / "results"
SAMPLES_A_SHARD = 10_100

OPENED = """
import json, sys, time
started = time.perf_counter()
from data_tools.dataset import Dataset
imported = time.perf_counter()
dataset = Dataset.open(sys.argv[1], check_shards=False)
opened = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak, own = (int(status[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon"))
Dataset.open(sys.argv[1])
checked = time.perf_counter()
import numpy as np
from vitscale.order import EpochOrder
order = EpochOrder(dataset.shard_sizes, 0, 0, 1024, 256)
positions = np.random.default_rng(0).integers(0, len(dataset), 4096)

def best(action, count):
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return min(times) / count * 1e6

samples = order.samples_at(positions)
few = samples[:200].tolist()
print(json.dumps({
    "import_seconds": imported - started,
    "open_seconds": opened - imported,
    "open_and_ask_for_each_tar_seconds": checked - opened,
    "peak_MiB_after_opening": peak,
    "of_it_its_own_and_not_of_mapped_files": own,
    "order_us_a_position": best(lambda: order.samples_at(positions), 4096),
    "labels_us_a_sample": best(lambda: dataset.labels(samples), 4096),
    "shard_of_us": best(lambda: [dataset.shard_of(s) for s in few], 200),
    "read_us_a_sample": best(lambda: [dataset.read(s) for s in few], 200),
}))
"""

LOOKED_AT = """
import json, sys, threading, time
from pathlib import Path
from data_tools import preview, stats

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.02):
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, int(status["RssAnon"].split()[0]) / 1024)

watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
found = stats.count(Path(sys.argv[1]))
counted = time.perf_counter()
preview.sheet(Path(sys.argv[1]), images=12)
picked = time.perf_counter()
done.set()
watcher.join()
assert found.samples == sum(shard.samples for shard in found.shards.shards)
print(json.dumps({
    "data_stats_seconds": counted - started,
    "data_preview_seconds": picked - counted,
    "peak_MiB_of_both_its_own": peak,
}))
"""


def main() -> None:
    """Builds, measures in a process of its own, and writes a dated file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=30_000)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        path = build(Path(folder), flags.shards)
        index = (path / "index.arrow").stat().st_size
        measured = {}
        for script in (OPENED, LOOKED_AT):
            done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
            measured |= json.loads(done.stdout)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "samples": flags.shards * SAMPLES_A_SHARD,
        "shards": flags.shards,
        "index_bytes": index,
        **measured,
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    file = flags.results / f"{result['date'][:10]}-manifest.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['samples']:,} samples in {flags.shards:,} shards, index of {index / 1e9:.1f} GB")
    for name, value in measured.items():
        print(f"{name.replace('_', ' '):36}{value:>10.3f}")
    print(f"saved {file}")


def build(folder: Path, shards: int) -> Path:
    """A dataset of one packed shard, many times over."""
    table = folder / "images.parquet"
    write_images(table)
    (one,) = pack(PackConfig((str(table),), str(folder / "one"), samples_per_shard=SAMPLES_A_SHARD, num_classes=18_291))
    source = Dataset.open(one.path)
    with pa.OSFile(str(one.path / "index.arrow")) as file:
        rows = pa.ipc.open_file(file).read_all().combine_chunks()
    path = folder / "many"
    path.mkdir()
    together = -(-index_rows(shards * SAMPLES_A_SHARD) // SAMPLES_A_SHARD)
    batch = pa.concat_tables([rows] * together).combine_chunks()
    with pa.ipc.new_file(str(path / "index.arrow"), fmt.INDEX_SCHEMA) as writer:
        for number in range(0, shards, together):
            writer.write_table(batch.slice(0, min(together, shards - number) * SAMPLES_A_SHARD))
    names = [fmt.shard_name("train", number) for number in range(shards)]
    tar = one.path / source.shard_names[0]
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(tar, path / name)  # a file may have 65,000 names on ext4
    checksum = pq.read_table(one.path / "manifest.parquet")["checksum"][0].as_py()
    manifest = {
        "name": names,
        "samples": [SAMPLES_A_SHARD] * shards,
        "bytes": [tar.stat().st_size] * shards,
        "checksum": [checksum] * shards,
        "first_sample": np.arange(shards) * SAMPLES_A_SHARD,
    }
    pq.write_table(pa.table(manifest, fmt.MANIFEST_SCHEMA), path / "manifest.parquet", compression="zstd")
    header = fmt.read_header(one.path) | {
        "num_samples": shards * SAMPLES_A_SHARD,
        "num_shards": shards,
        "files": {name: fmt.file_entry(path / name) for name in ("index.arrow", "manifest.parquet")},
    }
    header["content_hash"] = fmt.header_hash(header)
    (path / "dataset.json").write_text(json.dumps(header))
    return path


def write_images(file: Path) -> None:
    """PNG files of noise, some 1 KB each, with 1.2 labels on average."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(SAMPLES_A_SHARD):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(encoded, "PNG", compress_level=1)
        images.append(encoded.getvalue())
        labels.append(rng.choice(18_291, 1 + int(rng.random() < 0.2), replace=False).tolist())
    scores = [rng.random(len(of)).tolist() for of in labels]
    pq.write_table(pa.table({"image": images, "labels": labels, "scores": scores}), file, row_group_size=1_000)


if __name__ == "__main__":
    main()
