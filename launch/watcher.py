"""`vitscale evaluate --watch`: each checkpoint of a live run is measured as it comes, and noted in RUN/evaluations.jsonl.

Where it stands: `vitscale.watch` says which checkpoint is next, `evaluation.py` measures it.
"""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from data_tools.errors import UserError
from launch.evaluation import measure
from launch.evaluation_tables import asked_of, summary
from launch.question import EvaluateFlags, check_inputs, identity
from launch.terminal import need

_CURVES = ("top1", "top5", "loss", "calibration_error", "real_top1", "mean_average_precision")  # named as those that the run draws itself


def watch(flags: EvaluateFlags) -> None:
    """Evaluates each durable checkpoint of a run as it comes, oldest first, none twice, until the run is finished or a signal says stop.

    A stop leaves nothing half written, and the same command goes on. A checkpoint that the run removes meanwhile, and one that is damaged,
    are told of and left out.
    """
    from vitscale.ending import EXIT_INTERRUPTED, EXIT_STOPPED
    from vitscale.metrics import open_board
    from vitscale.run import read_evaluations
    from vitscale.watch import follow, note, recording

    run = check_inputs(flags)
    need("torch", "safetensors")
    asked_first = identity(flags)
    terminated: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        with recording(run) as file:
            done = {line["commit"] for line in read_evaluations(run) if asked_first.items() <= line.items()}
            board = open_board(run / "tensorboard" / f"evaluate-{asked_first['dataset'][:12]}")
            for folder, commit in follow(run, done, flags.interval):
                done.add(commit)
                try:
                    report, question = measure_settled(flags, folder)
                except UnusableError as error:
                    print(f"warning: {error}; going on", file=sys.stderr, flush=True)
                    continue
                line = {"time": time.time(), "commit": commit} | asked_of(report, flags) | question
                note(file, line)
                if board is not None:
                    for name in _CURVES:
                        if line.get(name) is not None:
                            board.add_scalar(f"eval_{name}", line[name], line["step"])
                    board.flush()
                print(json.dumps(line) if flags.json else f"step {line['step']}: {summary(report)}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what {run} has written since", file=sys.stderr)
        sys.exit(EXIT_STOPPED if terminated else EXIT_INTERRUPTED)
    if not flags.json:
        print(f"{run} is finished, and all its checkpoints are evaluated")


class UnusableError(UserError):
    """A checkpoint of a live run is damaged, or the run removed it before it was evaluated."""


def measure_settled(flags: EvaluateFlags, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report on a checkpoint of a live run, and the identity of what was asked, which was the same before and after.

    Raises UnusableError.
    """
    from vitscale.checkpoint import verify

    problem = verify(folder)
    if not _is_there(folder):
        raise UnusableError(f"{folder} was removed before it was evaluated")
    if problem:
        raise UnusableError(problem)
    try:
        while True:  # overlays, and files of labels, may change while the run goes on; a line says what it was measured on
            question = identity(flags)
            report = measure(flags, folder)
            if identity(flags) == question:
                return report, question
    except (UserError, OSError):
        if _is_there(folder):
            raise
        raise UnusableError(f"{folder} was removed while it was evaluated") from None


def _is_there(folder: Path) -> bool:
    return (folder / "COMMIT.json").is_file()
