"""The report on a checkpoint: measured in this process, or in several ranks of this machine, each of which runs this module as a program.

    python -m launch.evaluation FOLDER      a rank: task.json tells it what is asked, rank 0 leaves report.json, one that fails its end

Where it stands: between the verb and `vitscale.evaluate` or `vitscale.probing`, which measure.
"""

import dataclasses
import json
import os
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from data_tools.progress import Update
from launch.question import EvaluateFlags, open_data, open_train_data
from launch.terminal import progress_bar


def measure(flags: EvaluateFlags, folder: Path) -> dict[str, Any]:
    """The report on a checkpoint, made by `flags.nproc` processes."""
    if flags.nproc == 1:
        return report_on(flags, folder, quiet=flags.json)
    from launch.ranks import run_ranks

    with tempfile.TemporaryDirectory(prefix="vitscale-evaluate-") as scratch:
        task = Path(scratch) / "task.json"
        task.write_text(json.dumps({"flags": dataclasses.asdict(flags), "checkpoint": str(folder)}))
        run_ranks([sys.executable, "-m", "launch.evaluation", scratch], flags.nproc, Path(scratch))
        report: dict[str, Any] = json.loads((Path(scratch) / "report.json").read_bytes())
        return report


def report_on(flags: EvaluateFlags, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """What is found of a checkpoint; all ranks of the process group call it, and each gets the same."""
    from vitscale.checkpoint import describe
    from vitscale.evaluate import evaluate_checkpoint
    from vitscale.probing import probe
    from vitscale.reassessed import read_real_labels

    description, dataset = describe(folder).evaluated_by(flags.eval_protocol), open_data(flags)
    about = {
        "checkpoint": str(description.path),
        "data": flags.data,
        "dataset": dataset.content_hash,
        "dataset_name": dataset.name,
        "overlays": dataset.overlay.names,
        "eval_protocol": description.preprocess.eval_protocol,
        "protocol": flags.protocol,
        "weights": description.preferred(flags.weights),
        "step": description.step,
        "samples_seen": description.samples_seen,
    }

    def progress(title: str, unit: str) -> AbstractContextManager[Update]:
        return progress_bar(title, quiet, unit)

    if flags.protocol != "head":
        probed = probe(
            description, flags.weights, flags.protocol, open_train_data(flags), dataset, batch_size=flags.batch_size,
            workers=flags.workers, progress=progress, shots=flags.shots, seeds=flags.seeds, solver=flags.solver,
        )  # fmt: skip
        return about | dataclasses.asdict(probed)
    found = evaluate_checkpoint(
        description, flags.weights, dataset, batch_size=flags.batch_size, workers=flags.workers, progress=progress,
        real_NL=read_real_labels(Path(flags.real), dataset) if flags.real else None, precision=flags.average_precision,
        resamples=flags.bootstrap, seed=flags.seed,
    )  # fmt: skip
    return about | dataclasses.asdict(found)


def main() -> NoReturn:
    """One of several ranks."""
    from data_tools.durable import replace_file
    from data_tools.processes import die_with
    from vitscale.ending import EXIT_FAILED, EXIT_FINISHED, end_of_this_rank, write_end
    from vitscale.rank import leave

    die_with(int(os.environ["VITSCALE_LAUNCHER_PID"]))
    folder, leads = Path(sys.argv[1]), os.environ["RANK"] == "0"
    try:
        from vitscale.group import meet

        task = json.loads((folder / "task.json").read_bytes())
        flags = EvaluateFlags(**task["flags"] | {"shots": tuple(task["flags"]["shots"])})
        meet()
        report = report_on(flags, Path(task["checkpoint"]), quiet=flags.json or not leads)
        if leads:
            replace_file(folder / "report.json", json.dumps(report, default=str))
    except BaseException as error:
        write_end(folder, end_of_this_rank(error, start=0, step=0, stood_still=0.0))
        leave(EXIT_FAILED)
    leave(EXIT_FINISHED)


if __name__ == "__main__":
    main()
