"""Loading against peers: images a second a core from JPEG photographs to 224-pixel training batches, and what of that reaches training.

    python benchmarks/loader.py                                    # speed, stages, workers and training, some 12 minutes
    python benchmarks/loader.py --peers .venv-peers/bin/python     # beside the peers that `make peers` installed, 4 more
    python benchmarks/loader.py --parts memory resume              # minutes each; resume builds 11 GB of index unless --shards is less
    python benchmarks/loader.py --quick                            # that it runs; its figures mean nothing

Needs Debian's mate-backgrounds and opencv-doc. Parts:

    speed       every system of loader_systems.py: on one core (pinned, one thread, no worker process), and on all (a worker each)
    stages      where vitscale's time goes, an image, on one core, beside what decoding alone takes (loader_stages.py)
    workers     vitscale's threads and processes, 1 and as many as cores, micro-batches of 16 and 128
    training    a model fed by the stream against the same model on batches that are ready (loader_training.py)
    memory      resident memory after 50,000 and 1,000,000 samples (loader_memory.py)
    resume      first batch and memory at sample 0 and at 200 M of 303 M (loader_memory.py)

Protocol of speed: a process a system and set of cores, all started before, each idle until it is told to run; they take turns, A B C A B C,
for `--rounds`; each time the loader is made anew, two batches and a third of `--seconds` are left out, and at least `--seconds` are timed
from one batch's arrival to another's. A figure is the median of the rounds; the spread is the largest less the smallest, over the median.
The files have been read just before, so nobody waits for a disk. Ratios are against webdataset with Pillow on the same cores.
"""

import argparse
import datetime
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photographs
from loader_systems import BASELINE, LIMIT, OURS, PEERS, SYSTEMS, USUAL, versions

HERE = Path(__file__).parent
SIZES = ((500, 375), (1024, 768))
CORES = sorted(os.sched_getaffinity(0))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
DEFAULT = ("speed", "stages", "workers", "training")
PATIENCE = 300.0  # seconds for one answer, in which some systems first write their own format

Part = Callable[[Path, argparse.Namespace], dict[str, Any]]


def main() -> None:
    """Runs the parts asked for, prints their tables, and writes a dated file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT)
    parser.add_argument("--peers", type=Path, help="Python of an environment with the peers; without it they are left out")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="only these; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--images", type=int, default=400, help="different photographs of each size")
    parser.add_argument("--names", type=int, default=5, help="files that each of them is")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1_000_000, help="for memory")
    parser.add_argument("--shards", type=int, default=30_000, help="for resume, of 10,100 samples each")
    parser.add_argument("--quick", action="store_true", help="everything small")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    flags = parser.parse_args()
    if flags.quick:
        small = {"rounds": 1, "seconds": 0.1, "images": 8, "names": 4, "batch": 8, "samples": 2_000, "shards": 3}
        parser.set_defaults(**small)
        flags = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(CORES)} cores, {cpu_name()}, Python {platform.python_version()}",
        "versions": versions(),
        "settings": {name: value for name, value in vars(flags).items() if isinstance(value, int | float)},
    }
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        if set(flags.parts) & set(DEFAULT):
            result["photographs"] = prepare(Path(folder), flags)
        for part in flags.parts:
            print(f"\n{part}", flush=True)
            result[part] = PARTS[part](Path(folder), flags)
    print(f"\nsaved {save(result, flags.results, flags.parts)}")


def cpu_name() -> str:
    """As Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def save(result: dict[str, Any], folder: Path, parts: list[str]) -> Path:
    """Writes DATE-loader.json, or with the parts' names where they are not the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    what = "" if tuple(parts) == DEFAULT else "-" + "-".join(parts)
    file = folder / f"{result['date'][:10]}-loader{what}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def prepare(folder: Path, flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The photographs as files and as tars, in a folder a size; how many, and their mean size."""
    about = {}
    for width, height in SIZES:
        home = folder / name_of(width, height)
        paths = photographs.write(home / "files", width, height, flags.images, flags.names)
        photographs.packed(home / "files", home / "packed", samples_per_shard=max(1, len(paths) // 10))
        about[home.name] = {"different": flags.images, "files": len(paths), "mean_bytes": statistics.fmean(p.stat().st_size for p in paths)}
        print(
            f"{len(paths):,} files of {flags.images} photographs of {home.name}, {about[home.name]['mean_bytes'] / 1e3:.0f} KB on average"
        )
    return about


def name_of(width: int, height: int) -> str:
    """A folder's name."""
    return f"{width}x{height}"


# -- Speed --------------------------------------------------------------------------------------------------------------------------------


class Server:
    """A system in a process of its own on some cores, which loads when it is asked to."""

    def __init__(self, system: str, cores: list[int], python: Path) -> None:
        command = [str(python), str(HERE / "loader_systems.py"), system, "--cores", ",".join(map(str, cores))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)

    def ask(self, **question: Any) -> dict[str, Any]:
        """One measurement, or an error."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": f"ended with status {self.process.wait()}"}
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            return {"error": f"no answer in {PATIENCE:.0f} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def speed(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Images a second a core of each system, size and set of cores."""
    systems = [name for name in flags.systems or SYSTEMS if name not in PEERS or flags.peers]
    left_out = {name: "no --peers" for name in flags.systems or PEERS if name in PEERS and not flags.peers}
    core_sets = {"one core": CORES[:1]} | ({"all cores": CORES} if len(CORES) > 1 else {})
    servers = {
        (name, cores): Server(name, core_sets[cores], flags.peers if name in PEERS else Path(sys.executable))
        for cores in core_sets
        for name in systems
    }
    rows: dict[str, Any] = {name: {} for name in systems}
    found_versions: dict[str, dict[str, str]] = {}
    for _ in range(flags.rounds):
        for cores in core_sets:
            for size in SIZES:
                for name in [name for name in systems if name not in left_out]:
                    answer = servers[name, cores].ask(data=str(folder / name_of(*size)), batch_size=flags.batch, seconds=flags.seconds)
                    if "error" in answer:
                        left_out[name] = answer["error"]
                        continue
                    found_versions["peers" if name in PEERS else "ours"] = answer["versions"]
                    row = rows[name].setdefault(name_of(*size), {}).setdefault(cores, {"rounds": [], "share_of_cores": []})
                    row["rounds"].append(answer["rate"] / len(core_sets[cores]))
                    row["share_of_cores"].append(answer["cpu_seconds"] / answer["seconds"] / len(core_sets[cores]))
                    row |= {key: answer[key] for key in ("equal_to_torchvision",) if key in answer}
    for server in servers.values():
        server.close()
    rows = {name: row for name, row in rows.items() if name not in left_out}
    for row in rows.values():
        for size in row.values():
            for cell in size.values():
                cell |= middle(cell["rounds"])
    add_ratios(rows)
    print_speed(rows, list(core_sets), left_out)
    return {"images_per_second_per_core": rows, "left_out": left_out, "versions": found_versions}


def middle(rates: list[float]) -> dict[str, float]:
    """Median and spread."""
    median = statistics.median(rates)
    return {"median": median, "spread": (max(rates) - min(rates)) / median}


def add_ratios(rows: dict[str, Any]) -> None:
    """Each figure against the baseline's on the same cores and images."""
    for row in rows.values():
        for size, cells in row.items():
            for cores, cell in cells.items():
                if BASELINE in rows:
                    cell["ratio"] = cell["median"] / rows[BASELINE][size][cores]["median"]


def print_speed(rows: dict[str, Any], core_sets: list[str], left_out: dict[str, str]) -> None:
    """Images a second a core, spread, and the ratio to the baseline."""
    columns = [(name_of(*size), cores) for size in SIZES for cores in core_sets]
    print(f"{'images/s a core':34}" + "".join(f"{f'{size}, {cores}':>28}" for size, cores in columns))
    for name in [name for group in (USUAL, OURS, PEERS, LIMIT) for name in group if name in rows]:
        cells = [rows[name][size][cores] for size, cores in columns]
        text = (f"{c['median']:,.0f} ±{c['spread']:.0%}" + (f" {c['ratio']:.2f}x" if "ratio" in c else "") for c in cells)
        print(f"{name:34}" + "".join(f"{cell:>28}" for cell in text))
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    shares = [share for row in rows.values() for size in row.values() for share in size["one core"]["share_of_cores"]]
    if min(shares) < 0.95:
        print(f"not a quiet machine: a system that had its core to itself got {min(shares):.0%} of it")


# -- Workers ------------------------------------------------------------------------------------------------------------------------------


def workers(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """vitscale's threads against its processes; and with one, how much slower Python runs in the thread that takes the batches."""
    server = Server("vitscale exact", CORES, Path(sys.executable))
    rows: list[dict[str, Any]] = [
        {"kind": kind, "workers": count, "micro_batch": batch, "rounds": [], "python_slower": []}
        for kind in ("threads", "processes")
        for count in sorted({1, len(CORES)})
        for batch in (16, 128)
    ]
    data = str(folder / name_of(*SIZES[0]))
    for _ in range(flags.rounds):
        for row in rows:
            settings = {"processes": row["kind"] == "processes"}
            answer = server.ask(
                data=data, batch_size=row["micro_batch"], seconds=flags.seconds, workers=row["workers"], settings=settings,
                beside=row["workers"] < len(CORES),
            )  # fmt: skip
            if "error" in answer:
                raise SystemExit(f"{row}: {answer['error']}")
            row["rounds"].append(answer["rate"])
            row["python_slower"] += [answer[key] for key in ("python_slower",) if key in answer]
    server.close()
    print(f"{'':12}{'workers':>8}{'micro-batch':>13}{'images/s':>10}{'spread':>8}{'Python beside it slower by':>28}")
    for row in rows:
        row |= middle(row["rounds"])
        slower = f"{statistics.median(row['python_slower']) - 1:.0%}" if row["python_slower"] else ""
        print(f"{row['kind']:12}{row['workers']:>8}{row['micro_batch']:>13}{row['median']:>10,.0f}{row['spread']:>8.0%}{slower:>28}")
    return {"rows": rows}


# -- What runs in a script of its own -----------------------------------------------------------------------------------------------------


def child(script: str, *arguments: object) -> dict[str, Any]:
    """The last line of what a script prints, as JSON; the lines before it are shown."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), flush=True)
    found: dict[str, Any] = json.loads(last)
    return found


def stages(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an image of each stage."""
    images = min(flags.images, 400)
    return {
        name_of(*size): child("loader_stages.py", folder / name_of(*size), "--core", CORES[0], "--images", images, "--rounds", flags.rounds)
        for size in SIZES
    }


def training(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Training on the first core, its stream on the others, against batches that are ready."""
    quick = ["--quick"] if flags.quick else []
    return child("loader_training.py", folder, "--rounds", 3 * flags.rounds, *quick)


def memory(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Resident memory as samples pass."""
    return child("loader_memory.py", "soak", folder, "--samples", flags.samples)


def resume(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """First batch and memory far into a large dataset."""
    started = time.perf_counter()
    found = child("loader_memory.py", "resume", folder, "--shards", flags.shards)
    return found | {"seconds_with_building": time.perf_counter() - started}


PARTS: dict[str, Part] = {
    "speed": speed, "stages": stages, "workers": workers, "training": training, "memory": memory, "resume": resume,
}  # fmt: skip

if __name__ == "__main__":
    main()
