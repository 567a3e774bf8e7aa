"""Ranks that meet as at a start, each with an environment of its own, and what came of it on each.

    outcomes = meet(tmp_path, [{}, {"SLURMD_NODENAME": "n2"}])

As a program it is one rank: it meets the others and, where it is told to, goes through preflight.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ranks import free_port

ROOT = Path(__file__).parents[1]


def meet(
    folder: Path, environments: Sequence[Mapping[str, str] | None], *, arrival: float = 60, run: Path | None = None
) -> list[dict[str, Any] | None]:  # fmt: skip
    """Starts a rank a node, each under its name n1, n2, ... and with what else its environment says; None is one that never comes.

    Returns what each was told: {"line"}, or {"cause", "words", "bad_nodes"}.
    """
    folder.mkdir(exist_ok=True)
    size = str(len(environments))
    common = os.environ | {
        "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_NODELIST": f"n[1-{size}]", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = {}
    for rank, own in enumerate(environments):
        if own is not None:
            environment = common | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"} | dict(own)
            words = map(str, [folder / f"{rank}.json", arrival, *([run] if run else [])])
            with open(folder / f"{rank}.log", "wb") as log:
                command = [sys.executable, "-P", "-m", "tests.meeting", *words]
                ranks[rank] = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    for rank, process in ranks.items():
        assert process.wait() == 0, (folder / f"{rank}.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) if rank in ranks else None for rank in range(len(environments))]


def main() -> None:
    file, arrival, *run = sys.argv[1:]
    from datetime import timedelta

    import torch.distributed as dist

    from vitscale.ending import Ended
    from vitscale.engine import init_distributed
    from vitscale.preflight import preflight
    from vitscale.run import read_config

    ahead = float(os.environ.get("CLOCK_AHEAD", "0"))
    try:
        init_distributed(arrival=timedelta(seconds=float(arrival)))
        outcome = {"line": preflight(read_config(Path(run[0])), now=lambda: time.time() + ahead) if run else ""}
        dist.barrier()  # rank 0 has the store, from which the others still read
    except Ended as ended:
        outcome = {"cause": ended.cause, "words": ended.words, "bad_nodes": ended.bad_nodes}
    Path(file).write_text(json.dumps(outcome))
    os._exit(0)  # as vitscale.rank does: see there


if __name__ == "__main__":
    main()
