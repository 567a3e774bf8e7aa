"""`vitscale evaluate`: what a checkpoint is worth on a dataset, once or for each checkpoint of a run as it comes.

A report is the same mapping everywhere: what `--json` prints, `--out` holds, and a line of RUN/evaluations.jsonl says.
"""

import dataclasses
import json
from pathlib import Path

from launch.evaluation_tables import asked_of, report_lines
from launch.question import check_inputs, evaluate_flags
from launch.terminal import need, print_json


def evaluate(words: list[str]) -> None:
    """Accuracy of a checkpoint on a dataset, or of each checkpoint of a live run."""
    from launch.ranks import rank_count, visible_gpus

    flags = evaluate_flags(words)
    flags = dataclasses.replace(flags, nproc=rank_count(flags.nproc, visible_gpus()))
    if flags.watch:
        from launch.watcher import watch

        watch(flags)
        return
    folder = check_inputs(flags)
    need("torch", "safetensors")
    from launch.evaluation import measure

    report = measure(flags, folder)
    if flags.out:
        from data_tools.durable import replace_file

        replace_file(Path(flags.out), json.dumps(report, indent=1, default=str) + "\n")
    if flags.json:
        print_json(asked_of(report, flags))
    else:
        print("\n".join(report_lines(report, flags)))
