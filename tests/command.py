"""The command as a user types it, in a process of its own, and settings that make a run small."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

VITSCALE = str(Path(sys.executable).with_name("vitscale"))
SMALL = (
    "--model.depth 1 --model.width 16 --model.mlp-dim 16 --model.num-heads 2 --model.patch-size 8 --model.image-size 16 16 "
    "--epochs 0 --steps 6 --global-batch-size 8 --micro-batch-size 4 --schedule.warmup-steps 1 --log-every 1 --checkpoint-every 3"
).split()


def vitscale(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VITSCALE, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "100"})


def without_torch(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command in an environment that has all of this one's packages but torch and deepspeed; it is made in the folder."""
    packages = folder / "packages"
    if not packages.exists():
        packages.mkdir()
        for entry in Path(np.__file__).parents[1].iterdir():
            if not entry.name.lower().startswith(("torch", "deepspeed", "__editable__")):
                (packages / entry.name).symlink_to(entry)
    code = "from launch.main import main; main()"
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{packages}"}
    return subprocess.run([sys.executable, "-S", "-c", code, *map(str, words)], capture_output=True, text=True, env=environment)
