"""What faults cost a run of two nodes on the SLURM of the tests, four nodes on this machine: wall time, by cause.

    python -m benchmarks.faults                              restarts, then a fault every 5 minutes for 40 minutes
    python -m benchmarks.faults --minutes 4 --every 1        a rehearsal
    python -m benchmarks.faults --parts restarts --repeats 5

restarts   from a fault to the first step of the next start, and to the first step that no start had made before: steps since the last
           durable checkpoint are made again in between. `judged` is when it was decided what follows, SLURM's own decisions apart
goodput    productive time of wall time (`vitscale run status`) under one fault after the other, and what each of them cost: the time to the
           first new step. It should be no more than the time between two checkpoints and the median of the measured restarts of its cause

A dead node is noticed by SLURM after SlurmdTimeout at the latest, and a hang after --guard.hang-seconds; both are in the figures, and told
beside them. Results go to benchmarks/results. Needs root, slurm-wlm and munge.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data_tools.config import PackConfig
from data_tools.pack import pack
from tests.conftest import write_images
from tests.jobs import FAULTS, SIGNAL_LEAD, HeldRun, pretraining, site_file
from tests.slurm import GRACE, KILL_WAIT, SLURMD_TIMEOUT, Cluster
from vitscale.run import read_metrics
from vitscale.status import status
from vitscale.verdict import read_history

CAUSES = ("a rank killed", "a node dies", "USR2", "a rank hangs")
HANG_SECONDS, EVERY, LOGGED = 30, 400, 5  # steps between checkpoints, and between logged steps
BATCH = ["--global-batch-size", 96, "--micro-batch-size", 8]  # steps of some 0.1 s


def run_for_ever(cluster: Cluster, folder: Path, dataset: Path) -> HeldRun:
    """A run that has made its first checkpoint, and would go on for days."""
    steps = ["--steps", 10_000_000, "--checkpoint-every", EVERY, "--log-every", LOGGED, "--guard.hang-seconds", HANG_SECONDS]
    folder.mkdir()
    site = site_file(folder, lines=SIGNAL_LEAD)
    run = HeldRun(cluster, folder, site, pretraining(dataset, folder / "run", *steps, *BATCH), held_at=[])
    run.submit(2)
    run.wait(lambda: run.newest() > 0, "checkpoint")
    return run


def last_step(run: HeldRun) -> int:
    """The newest step that metrics.jsonl tells of; the file is long, and only its end is read."""
    file = run.run / "metrics.jsonl"
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 10_000))
        told = [json.loads(line) for line in lines.read().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    return max((line["step"] for line in told), default=0)


def strike(run: HeldRun, name: str) -> dict[str, Any]:
    """Lets one fault happen; the seconds from it to what follows."""
    number, before, happened = len(run.starts()), last_step(run), time.time()
    FAULTS[name].happen(run, 0)
    run.wait(lambda: len(run.starts()) > number and "step" in run.starts()[number], "another start")
    begun = run.starts()[number]
    reached = max(before, begun["step"] + int(begun.get("lost", {}).get("steps", 0)))
    run.wait(lambda: last_step(run) > reached, "new step")
    lines = [line for line in read_metrics(run.run) if line["time"] > happened and "loss" in line]
    first = next(line["time"] for line in lines if line["step"] > begun["step"])
    new = next(line["time"] for line in lines if line["step"] > reached)
    judged = [past.time - happened for past in read_history(run.run) if past.start == number - 1]
    return {
        "fault": name,
        "judged_seconds": round(judged[0], 2) if judged else None,
        "first_step_seconds": round(first - happened, 2),
        "new_step_seconds": round(new - happened, 2),
        "steps_lost": reached - begun["step"],
    }


def restarts(run: HeldRun, repeats: int) -> list[dict[str, Any]]:
    """Each cause `repeats` times, each time after new checkpoints."""
    rows = []
    for _, name in itertools.product(range(repeats), CAUSES):
        begun = run.starts()[-1]["step"]
        run.wait(lambda begun=begun: run.newest() > begun, "another checkpoint")
        rows.append(strike(run, name))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def under_faults(run: HeldRun, minutes: float, every: float) -> dict[str, Any]:
    """A fault every so many minutes; goodput as the run's own records have it."""
    began, rows = time.monotonic(), []
    for count, name in enumerate(itertools.cycle(CAUSES), 1):
        if count * every >= minutes:
            break
        time.sleep(max(0.0, began + count * every * 60 - time.monotonic()))
        rows.append(strike(run, name))
        print(json.dumps(rows[-1]), flush=True)
    time.sleep(max(0.0, began + minutes * 60 - time.monotonic()))
    found = status(run.run)
    return {"minutes": minutes, "every": every, "goodput": found["goodput"], "starts": found["starts"], "faults": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("restarts", "goodput"), default=("restarts", "goodput"))
    parser.add_argument("--repeats", type=int, default=3, help="of each cause, for the restarts")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--every", type=float, default=5, help="minutes between faults")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    flags = parser.parse_args()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "machine": platform.processor() or platform.machine(),
        "load_before": os.getloadavg()[0], "torch": torch.__version__, "grace_seconds": GRACE, "kill_wait_seconds": KILL_WAIT,
        "slurmd_timeout_seconds": SLURMD_TIMEOUT, "hang_seconds": HANG_SECONDS, "steps_between_checkpoints": EVERY,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", 200, 0)
        pack(PackConfig(sources=(str(images),), out=str(folder / "packed"), split="train", samples_per_shard=20))
        with Cluster(folder / "slurm") as cluster:
            if "restarts" in flags.parts:
                rows = restarts(run_for_ever(cluster, folder / "restarts", folder / "packed"), flags.repeats)
                of = {cause: [row["first_step_seconds"] for row in rows if row["fault"] == cause] for cause in CAUSES}
                found["restarts"] = rows
                found["median_first_step_seconds"] = {cause: round(statistics.median(seconds), 2) for cause, seconds in of.items()}
                cancel_all(cluster)
            if "goodput" in flags.parts:
                run = run_for_ever(cluster, folder / "goodput", folder / "packed")
                found["goodput"] = under_faults(run, flags.minutes, flags.every)
                rates = [line["images_per_second"] for line in read_metrics(run.run) if "images_per_second" in line]
                interval = EVERY * BATCH[1] / statistics.median(rates)  # type: ignore[operator]
                found["goodput"]["seconds_between_checkpoints"] = round(interval, 2)
                for row in found["goodput"]["faults"] if "restarts" in flags.parts else []:
                    lost = 0 if FAULTS[row["fault"]].saves else interval
                    row["expected_at_most_seconds"] = round(lost + found["median_first_step_seconds"][row["fault"]], 2)
                cancel_all(cluster)
    flags.results.mkdir(exist_ok=True)
    file = flags.results / f"{found['date']}-faults.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def cancel_all(cluster: Cluster) -> None:
    """Ends the run, which is not wanted any more."""
    cluster.run("scancel", "--user=root")


if __name__ == "__main__":
    main()
