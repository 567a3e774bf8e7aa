"""A run that begins from another's checkpoint: its weights, moments, clock and records go on, under another schedule, length or the like.

Imports no torch.
"""

import os
import shutil
import time
from pathlib import Path

from data_tools.durable import publish_folder
from vitscale import checkpoint
from vitscale.config import Phase, TrainConfig, changes, to_dict, written
from vitscale.finding import find_checkpoint
from vitscale.run import (
    RunError,
    check_same_data,
    identities,
    read_config,
    read_record,
    records_until,
    samples_of,
    trained_datasets,
    write_json,
)
from vitscale.timeline import Timeline, timeline_of

# What a checkpoint's tensors and its clock stand for: a run with others of these is not the same run continued.
_FIXED = {
    "model": "the checkpoint's tensors have these shapes",
    "seed": "it gives the order of samples, of which a part is used up",
    "data_weights": "they give the order of samples, of which a part is used up",
    "stream.lanes": "they give the order of samples, of which a part is used up",
    "stream.window": "it gives the order of samples, of which a part is used up",
    "optimizer.name": "the checkpoint holds the moments of this one",
    "optimizer.freeze": "the checkpoint holds the moments of what was trained",
    "optimizer.freeze_blocks": "the checkpoint holds the moments of what was trained",
    "init": "the weights come from the checkpoint",
    "recipe": "the command that goes on names it",
}
_FREE = ("model.drop_path_rate", "model.dropout", "model.patch_dropout")  # of the model, and no shape


def fork_point(spec: str) -> tuple[Path, checkpoint.Description]:
    """The run and the checkpoint that RUN@STEP, or a run's or a step's folder, names; it is whole. Raises CheckpointError, RunError."""
    folder = find_checkpoint(spec)
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run / "run.json").is_file():
        raise RunError(f"{spec} is not in a run directory; what is forked is a run, RUN@STEP or a step's folder in a run")
    return run, checkpoint.describe(folder)


def fork(run: Path, origin: checkpoint.Description, config: TrainConfig) -> Path:
    """Makes config.out a run that goes on from a checkpoint of `run` with `config`, which `resolve` has checked; returns it.

    It is there whole or not at all. Raises RunError where the checkpoint does not fit the settings.
    """
    out, record = Path(config.out), read_record(run)
    if out.exists():
        raise RunError(f"{out} exists; give a folder that does not")
    for name, change in changes(read_config(run), config).items():
        reason = next((reason for fixed, reason in _FIXED.items() if f"{name}.".startswith(f"{fixed}.") and name not in _FREE), None)
        if reason:
            raise RunError(f"{name}: {change}, and {reason}; a fork keeps it (`vitscale finetune --init` makes another model)")
    check_same_data(run, record, *identities(config))
    num_samples = samples_of(trained_datasets(record))
    past, timeline = (timeline_of(of, num_samples) for of in (read_config(run), config))
    if timeline.total_steps <= origin.step:
        raise RunError(f"the run would have {timeline.total_steps} steps, and the checkpoint is of step {origin.step}; give more --steps")
    if past.batches(origin.step) != timeline.batches(origin.step):
        raise RunError(
            f"the checkpoint's {origin.step} steps would have other batches than they had, and the clock counts samples in whole steps; "
            f"they keep theirs where --schedule.phases begins with {_as_made(past, origin.step, config, num_samples)}"
        )
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    folder = checkpoint.step_folder(hidden, origin.step)
    folder.mkdir(parents=True)
    for file in origin.path.iterdir():
        _link(file, folder / file.name)
    (folder.parent / "latest").write_text(folder.name + "\n")
    for name, lines in records_until(run, origin.step, origin.samples_seen).items():
        (hidden / name).write_text(lines)
    # What the run left out after the checkpoint it did for settings that the fork may not have
    skipped = [of for of in record.get("skipped", []) if tuple(of["positions"]) in origin.state.skipped]
    began = {"run": str(run.resolve()), "step": origin.step, "samples_seen": origin.samples_seen, "time": time.time()}
    before = [start for start in record["starts"] if start.get("step", origin.step) < origin.step]
    began["starts"] = [*record.get("origin", {}).get("starts", []), *before]
    write_json(hidden / "config.json", to_dict(config))
    write_json(hidden / "run.json", record | {"total_steps": timeline.total_steps, "starts": [], "skipped": skipped, "origin": began})
    publish_folder(hidden, out)
    return out


def _as_made(past: Timeline, step: int, config: TrainConfig, num_samples: int) -> str:
    """The steps made so far, as phases of the run that is to go on from them."""
    total = config.epochs * num_samples or past.samples_at(step) + (config.steps - step) * config.global_batch_size
    ends = [past.samples_at(min(end, step)) for end in past.ends]
    return " ".join(
        written(Phase(end / total, span.image_size, span.global_batch_size, span.micro_batch_size))
        for span, end in zip(past.spans, ends, strict=True)
        if span.first_step < step
    )


def _link(file: Path, beside: Path) -> None:
    """The same file under another name; a copy where the file system has no second names, or it is another one."""
    try:
        os.link(file, beside)
    except OSError:
        shutil.copy2(file, beside)
