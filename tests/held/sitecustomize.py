"""With this folder on PYTHONPATH rank 0 waits before some steps, so that a fault comes at a known step however fast the machine is.

    VITSCALE_TEST_HOLD = {"steps": [9, 20], "marks": FOLDER}

Before it makes step 9 it makes FOLDER/held-9, once in the whole run, and goes on at a signal or when FOLDER/go-9 is there. The other ranks
wait for it in the step's first collective. Steps are counted from 1.
"""

import json
import os
import sys
import time
from pathlib import Path

HOLD = json.loads(os.environ.get("VITSCALE_TEST_HOLD", "{}"))


def _hold() -> None:
    from vitscale import stopping
    from vitscale.heartbeat import TRAINING, Heartbeat

    beat, marks = Heartbeat.beat, Path(HOLD["marks"])

    def beat_and_wait(self: Heartbeat, step: int, samples_seen: int, phase: str) -> None:
        beat(self, step, samples_seen, phase)
        held = marks / f"held-{step + 1}"
        if phase == TRAINING and step + 1 in HOLD["steps"] and not held.exists():
            held.touch()
            end = time.monotonic() + stopping._LOOK_EVERY  # after which RUN/stop is looked for at the step's end
            while time.monotonic() < end or not (stopping._came or (marks / f"go-{step + 1}").exists()):
                time.sleep(0.02)

    Heartbeat.beat = beat_and_wait  # type: ignore[method-assign]


if HOLD and {"vitscale.rank", "launch.task"} & set(sys.orig_argv) and os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
    _hold()
