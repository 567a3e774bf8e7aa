"""What a CHECKPOINT of the command line names: the folder of weights that is meant, found whole. Imports no torch.

Where it stands: above `checkpoint.py`, which knows single folders, and `run.py` and `retention.py`, which tell the best of a run.
"""

import sys
from pathlib import Path

from vitscale.checkpoint import EXPORT_DESCRIPTION, committed, newest_durable, step_folder, step_of, verify
from vitscale.errors import CheckpointError
from vitscale.retention import best_of, goodness
from vitscale.run import read_metrics


def find_checkpoint(spec: str) -> Path:
    """The folder that a CHECKPOINT names: a run (its newest durable one), RUN@STEP, RUN@best, a step's folder or an exported folder.

    Checks that it is whole. Raises CheckpointError, and RunError where metrics.jsonl, which tells the best, cannot be read.
    """
    path = Path(spec)
    run, at, step = spec.rpartition("@")
    if not path.exists() and step == "best" and Path(run).is_dir():
        path = _best(Path(run))
    if not path.exists() and at and step.isdigit():
        path = step_folder(Path(run), int(step))
        if not path.exists():
            steps = [str(step_of(folder)) for folder in committed(Path(run))]
            raise CheckpointError(f"{run} has no checkpoint of step {int(step)}; {_there_are(steps)}")
    if not path.exists() and path.parent.name == "checkpoints" and (there := committed(path.parent.parent)):
        raise CheckpointError(
            f"{spec} does not exist (a run keeps its newest ones); {_there_are([str(step_of(folder)) for folder in there])}"
        )
    if not path.exists():
        raise CheckpointError(f"{spec} does not exist; a checkpoint is a run, RUN@STEP, RUN@best, a step's folder or an exported folder")
    if path.is_file():
        raise CheckpointError(
            f"{spec} is a file; give the folder that it lies in, {path.parent}, where that is ours, or make it ours: "
            f"`vitscale checkpoint import {spec} OUT`"
        )
    if any((path / name).is_file() for name in (EXPORT_DESCRIPTION, "checkpoint.json", "COMMIT.json")):
        if problem := verify(path):
            raise CheckpointError(problem)
        return path
    newest, faults = newest_durable(path)
    if newest is None:
        found = f" ({len(faults)} damaged: {faults[0]})" if faults else ""
        raise CheckpointError(
            f"{spec} holds no durable checkpoint{found}; give a run that has written one, or an exported folder; `vitscale checkpoint "
            "import` makes one of others' weights"
        )
    for fault in faults:
        print(f"warning: {fault}; {newest.name} is used", file=sys.stderr)
    return newest


def _best(run: Path) -> Path:
    """The checkpoint of a run that was best on its held-out split, of those that are there. Raises CheckpointError."""
    there, evaluated = [step_of(folder) for folder in committed(run)], goodness(read_metrics(run))
    best, ever = best_of(there, evaluated), best_of(evaluated, evaluated)
    if not there or ever is None:
        lacks = "was never evaluated on a held-out split" if there else "holds no checkpoint"
        raise CheckpointError(f"{run} {lacks}, so that none is its best; {run}@STEP names one: {_there_are(list(map(str, there)))}")
    if best is None or evaluated[best] < evaluated[ever]:
        gone = f"the best of {run} was step {ever} (top-1 {evaluated[ever]:.2%}), whose checkpoint is gone"
        if best is None:
            raise CheckpointError(f"{gone}; {_there_are(list(map(str, there)))}, never evaluated")
        print(f"warning: {gone}; step {best} ({evaluated[best]:.2%}) is used", file=sys.stderr)
    return step_folder(run, best)


def _there_are(steps: list[str]) -> str:
    return f"there are those of steps {', '.join(steps)}" if steps else "there are none"


def is_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder that is none of ours: what others wrote, perhaps."""
    ours = (EXPORT_DESCRIPTION, "checkpoint.json", "COMMIT.json", "run.json", "checkpoints")
    return path.is_file() or (path.is_dir() and not any((path / name).exists() for name in ours))
