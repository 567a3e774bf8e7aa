"""Runs a function of a test module on several ranks, real processes over gloo, and returns what rank 0 returned.

    results = run_on_ranks("tests.vitscale.test_zero:walk", world_size=2, payload={...}, folder=tmp_path)

One launch may walk many cases: starting processes costs more than most cases do. As a program it is one rank.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.ranks import free_port

ROOT = Path(__file__).parents[1]


def run_on_ranks(target: str, world_size: int, payload: dict[str, Any], folder: Path, *, ranks_per_node: int = 0) -> Any:
    """Calls `module:function`(payload) on every rank; raises with the output of the first rank that failed.

    Args:
        ranks_per_node: what ranks are told, as if this were several nodes, the last of them perhaps smaller; 0: all ranks on one.
    """
    ranks_per_node = ranks_per_node or world_size
    port = free_port()
    (folder / "payload.json").write_text(json.dumps(payload))
    ranks = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_per_node), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed", target, str(folder)]
        with open(folder / f"rank-{rank}.log", "wb") as output:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
    failed = [rank for rank, process in enumerate(ranks) if process.wait()]
    if failed:
        logs = "\n".join(f"-- rank {rank}\n{(folder / f'rank-{rank}.log').read_text()[-6000:]}" for rank in failed)
        raise AssertionError(f"ranks {failed} of {target} failed\n{logs}")
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    folder = Path(sys.argv[2])
    import torch.distributed as dist

    from vitscale.engine import init_distributed

    init_distributed()
    try:
        result = getattr(importlib.import_module(module), function)(json.loads((folder / "payload.json").read_text()))
        if os.environ["RANK"] == "0":
            (folder / "result.json").write_text(json.dumps(result))
        dist.destroy_process_group()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as vitscale.rank does: see there


if __name__ == "__main__":
    main()
