"""What watching over a run costs, as a share of a training step.

    python -m benchmarks.guards                  ViT-B/16 at 224 pixels, one image a rank and step, two ranks over gloo
    python -m benchmarks.guards --model s16

Everything that a step has beside the training itself is done as the loop does it, many times over: telling the other ranks and hearing
them (`agreement.py`), judging the loss (`guards.py`), looking whether anybody asks to stop (`stopping.py`), the heartbeat, and the
comparison of the ranks' weights, divided by `guard.compare_every`. The step beside it is a whole one of the engine; ratios are of medians.
On a real device a step has far more images, and the messages travel while it computes; here they are waited for.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from launch.ranks import free_port
from vitscale.agreement import Agreement
from vitscale.config import EngineConfig, GuardConfig, ObjectiveConfig, OptimizerConfig
from vitscale.engine import Engine, init_distributed
from vitscale.guards import Guard
from vitscale.heartbeat import TRAINING, Heartbeat
from vitscale.machine import this_place
from vitscale.model import ViT, initialize
from vitscale.objective import compute_loss
from vitscale.recipes import vit
from vitscale.recovery import compare_ranks
from vitscale.stopping import Asked

RESULTS = Path(__file__).parent / "results"
TURNS, STEPS = 7, 3


def timed(work: Callable[[], object], times: int) -> float:
    """Seconds of one of so many."""
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times


def rank(model_name: str) -> None:
    """One rank; rank 0 prints its figures as JSON."""
    init_distributed()
    config = vit(model_name, num_classes=1000)
    model = ViT(config)
    initialize(model, 0)
    engine = Engine(model, EngineConfig(1, "fp32"), OptimizerConfig(), micro_batch_size=1, grad_accum_steps=1)
    images_BCHW, labels_BL = torch.randn(1, 3, *config.image_size), torch.zeros(1, 1, dtype=torch.int32)
    guard, losses = Guard(GuardConfig()), iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        asked, agreement = Asked(run, dist.get_rank()), Agreement[int](torch.device("cpu"))
        heartbeat = Heartbeat(run, 0, this_place(), hang_seconds=0, data_seconds=300)
        loss = torch.ones(())

        def step() -> None:
            engine.backward(compute_loss(engine.forward(images_BCHW), labels_BL, torch.ones(1, 1), ObjectiveConfig(), None))
            engine.step(1e-4)

        def watch() -> None:
            heartbeat.beat(1, 1, TRAINING)
            agreement.tell(0, loss, **asked.counts(), unwritten=0, failed=0)
            for known in agreement.heard(all_=False):
                guard.see(1, known.loss + 1e-3 * (next(losses) % 7), applied=True)

        timed(step, 1)
        timed(watch, 300)  # until the guard's window is full
        turns = [(timed(step, STEPS), timed(watch, 200), timed(lambda: compare_ranks(engine, 1), 3)) for _ in range(TURNS)]
        agreement.heard(all_=True)
        heartbeat.close()
    if dist.get_rank() == 0:
        seconds = dict(zip(("step", "watch", "compare"), (statistics.median(turn) for turn in zip(*turns, strict=True)), strict=True))
        share = (seconds["watch"] + seconds["compare"] / GuardConfig().compare_every) / seconds["step"]
        print(json.dumps({"model": model_name, "seconds": seconds, "compare_every": GuardConfig().compare_every, "share_of_step": share}))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="b16", help="a size and a patch size")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.rank:
        rank(flags.model)
    port = str(free_port())
    ranks = []
    for number in range(flags.ranks):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": flags.ranks, "LOCAL_WORLD_SIZE": flags.ranks, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "benchmarks.guards", "--rank", "--model", flags.model]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE if number == 0 else None, text=True))
    found = json.loads(ranks[0].communicate()[0].splitlines()[-1])
    found |= {"date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores", "torch": torch.__version__}
    found |= {"python": platform.python_version(), "ranks": flags.ranks}
    print(json.dumps(found, indent=1))
    if flags.save:
        (RESULTS / f"{found['date']}-guards.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
