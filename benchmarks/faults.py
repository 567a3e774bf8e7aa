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
import calendar
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
from vitscale.run import read_metrics, read_record
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


def newest_steps(run: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl that tell of steps: more than there are between two checkpoints. The whole file is long."""
    file = run / "metrics.jsonl"
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 100_000))
        whole = [json.loads(line) for line in opened.read().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    return [line for line in whole if "loss" in line]


def strike(run: HeldRun, name: str) -> dict[str, Any]:
    """Lets one fault happen; the seconds from it to what follows."""
    number, before, happened = len(run.starts()), max(line["step"] for line in newest_steps(run.run)), time.time()
    FAULTS[name].happen(run, 0)
    run.wait(lambda: "new_step_seconds" in cost(run.run, number, happened, before), "new step")
    return {"fault": name} | cost(run.run, number, happened, before)


def cost(run: Path, number: int, happened: float, before: int) -> dict[str, Any]:
    """What a fault that ended the start before this one cost, as far as the run's files tell yet.

    Args:
        number: of the start that follows.
        happened: when the fault did.
        before: the step that was reached by then.
    """
    starts = read_record(run)["starts"]
    if len(starts) <= number or "step" not in starts[number]:
        return {}
    begun, its_time = starts[number], calendar.timegm(time.strptime(starts[number]["time"], "%Y-%m-%dT%H:%M:%SZ"))
    # Lines of the start before are cut back only when the step of this one is noted already
    made = [line for line in newest_steps(run) if line["time"] >= its_time and line["step"] > begun["step"]]
    if not made:
        return {}
    reached = max(before, begun["step"] + int(begun.get("lost", {}).get("steps", 0)))
    judged = [past.time - happened for past in read_history(run) if past.start == number - 1]
    found = {
        "judged_seconds": round(judged[0], 2) if judged else None,
        "first_step_seconds": round(made[0]["time"] - happened, 2),
        "steps_lost": reached - begun["step"],
    }
    new = next((line["time"] for line in made if line["step"] > reached), None)
    return found | ({"new_step_seconds": round(new - happened, 2)} if new else {})


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
