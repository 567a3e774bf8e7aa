"""The command as a user types it, in a process of its own, and settings that make a run small."""

import os
import subprocess
import sys
from pathlib import Path

VITSCALE = str(Path(sys.executable).with_name("vitscale"))
SMALL = (
    "--model.depth 1 --model.width 16 --model.mlp-dim 16 --model.num-heads 2 --model.patch-size 8 --model.image-size 16 16 "
    "--epochs 0 --steps 6 --global-batch-size 8 --micro-batch-size 4 --schedule.warmup-steps 1 --log-every 1 --checkpoint-every 3"
).split()


def vitscale(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VITSCALE, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "100"})
