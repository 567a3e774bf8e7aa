"""Faults for real runs: with this folder on PYTHONPATH, ranks do at some step what VITSCALE_TEST_PLANT says.

    {"what": "nan", "steps": [9], "rank": 1, "times": 1, "marks": FOLDER}

`times` is how often it happens in the whole run, over all its starts; marks in a folder keep count. A spike happens each time that one of
its steps is made. A late record is written once the launcher has seen the other ranks end. Steps are counted from 1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

PLANT = json.loads(os.environ.get("VITSCALE_TEST_PLANT", "{}"))


def _is_its_turn(step: int) -> bool:
    """Whether the fault is to happen to this rank at this step, counted from 1, once more."""
    if int(os.environ["RANK"]) != PLANT["rank"] or step not in PLANT["steps"]:
        return False
    for number in range(PLANT["times"]):
        try:
            (Path(PLANT["marks"]) / f"{number}").touch(exist_ok=False)
            return True
        except FileExistsError:
            continue
    return False


def _plant() -> None:
    import torch

    from vitscale import ending, train
    from vitscale.engine import Engine

    write_end = ending.write_end

    def write_late(run, end):
        family = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children")
        while end.rank == PLANT["rank"] and len(family.read_text().split()) > 1:
            time.sleep(0.02)
        write_end(run, end)

    if PLANT["what"] == "late record":
        ending.write_end = write_late

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (planted)")

    if PLANT["what"] == "memory in evaluation" and int(os.environ["RANK"]) == PLANT["rank"]:
        train.evaluate = no_memory

    now = {"step": 0}
    learning_rate, compute_loss, update = train.learning_rate, train.compute_loss, Engine.step

    def begin_step(step, *rest):
        now["step"] = step + 1
        now["planted"] = step + 1 in PLANT["steps"] if PLANT["what"] == "spike" else _is_its_turn(step + 1)
        if now["planted"]:
            if PLANT["what"] in ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR2"):
                os.kill(os.getpid(), signal.Signals[PLANT["what"]])
            elif PLANT["what"] == "error":
                raise ValueError("planted")
            elif PLANT["what"] == "memory":
                no_memory()
        return learning_rate(step, *rest)

    def loss_of(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if now["planted"] and PLANT["what"] == "nan":
            return loss * torch.nan
        if now["planted"] and PLANT["what"] == "spike":
            return loss + 50
        return loss

    def step_of(engine, lr):
        applied = update(engine, lr)
        if now["planted"] and PLANT["what"] == "flip":
            now["planted"] = False
            bits = next(iter(engine.parameters.values())).data.view(-1).view(torch.int32)
            bits[0] ^= 1 << 20
        return applied

    train.learning_rate, train.compute_loss, Engine.step = begin_step, loss_of, step_of


if PLANT and {"vitscale.rank", "launch.task"} & set(sys.orig_argv):
    _plant()
