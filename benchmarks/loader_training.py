"""Training fed by the stream against training on batches that are ready, on a CPU: the model on one core, the stream on the others.

    python benchmarks/loader_training.py FOLDER      # FOLDER as loader.py prepares it

The step is `vitscale.train`'s: move, normalise, forward, loss, backward, update, through the engine. Fed and ready batches take turns,
either first in every other round; before a fed turn as many steps are left out as the stream's queue holds. A turn is compared with the
one beside it, for a machine's mood lasts longer than a turn: what is told is the median of these ratios and their middle half, and the
share of a fed turn that the step waited for its batch. First the stream alone is timed on its cores, and the model on ready batches: the
arithmetic of what must come out. The last case is one that no core could feed. Prints a line a case, and as its last line JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loader_systems import Data, measure, open_stream
from train_step import join_world_of_one

from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig
from vitscale.engine import Engine, device
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.recipes import vit
from vitscale.transfer import DeviceBatch, on_device

PREPROCESS, OBJECTIVE = PreprocessConfig(), ObjectiveConfig("softmax")
PREFETCH = 2


@dataclass(frozen=True)
class Case:
    """A model, how many images a step takes, and how many steps a turn has."""

    name: str
    model: ViTConfig
    batch: int
    steps: int
    photographs: str = "500x375"


BLOCK = ViTConfig(depth=1, width=64, mlp_dim=64, num_heads=1, patch_size=32, num_classes=1000)
CASES = (
    Case("ViT-Ti/16", vit("ti16", num_classes=1000), batch=8, steps=3),
    Case("ViT-S/16", vit("s16", num_classes=1000), batch=2, steps=3),
    Case("one block of width 64", BLOCK, batch=64, steps=20, photographs="1024x768"),
)
QUICK = (Case("one block of width 64", BLOCK, batch=4, steps=2),)


def main() -> None:
    """All cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    join_world_of_one()
    found = {case.name: run(case, Data(flags.folder / case.photographs), flags.rounds) for case in (QUICK if flags.quick else CASES)}
    dist.destroy_process_group()
    print(json.dumps(found))


def run(case: Case, data: Data, rounds: int) -> dict[str, Any]:
    """Images a second, ready and fed, and what the arithmetic says."""
    cores = sorted(os.sched_getaffinity(0))
    for_model, for_stream = cores[:1], cores[1:] or cores
    os.sched_setaffinity(0, for_stream)  # what the stream starts inherits this
    stream = open_stream(data.dataset, case.batch, workers=len(for_stream), prefetch=PREFETCH)
    batches = on_device(stream.micro_batches(0), device())
    alone = measure(batches, case.batch, seconds=2.0)["rate"]
    os.sched_setaffinity(0, for_model)
    step = training_step(case)
    ready = itertools.cycle([next(batches) for _ in range(PREFETCH)])
    timed(step, ready, 2)
    turns: dict[str, list[float]] = {"ready": [], "fed": []}
    waits = []
    for number in range(rounds):
        for kind in ("ready", "fed") if number % 2 == 0 else ("fed", "ready"):
            if kind == "fed":
                timed(step, batches, PREFETCH + 1)
            seconds, waited = timed(step, ready if kind == "ready" else batches, case.steps)
            turns[kind].append(case.steps * case.batch / seconds)
            if kind == "fed":
                waits.append(waited / seconds)
    batches.close()
    os.sched_setaffinity(0, cores)
    rates = {name: statistics.median(of) for name, of in turns.items()}
    ratios = sorted(fed / ready for fed, ready in zip(turns["fed"], turns["ready"], strict=True))
    expected = min(1.0, alone / rates["ready"])
    found = {
        "stream_alone": alone, **rates, "turns": turns, "fed_to_ready": statistics.median(ratios),
        "middle_half": (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]), "waiting": statistics.median(waits),
        "expected": expected, "cores": {"model": len(for_model), "stream": len(for_stream)},
    }  # fmt: skip
    low, high = found["middle_half"]
    needs = f"the model takes {rates['ready']:,.1f} images/s, {len(for_stream)} core(s) load {alone:,.0f}"
    verdict = "they suffice" if expected == 1 else f"bound by loading, {expected:.0%} at most"
    print(
        f"{case.name}, batch {case.batch}, {case.photographs}: {needs}: {verdict}; fed {rates['fed']:,.1f}, "
        f"{found['fed_to_ready']:.1%} of it (half of the turns {low:.1%} to {high:.1%}), waiting {found['waiting']:.2%} of the time",
        flush=True,
    )
    return found


def timed(step: Callable[[DeviceBatch], None], batches: Iterator[DeviceBatch], count: int) -> tuple[float, float]:
    """Seconds that so many steps take, loading included, and those of them that they wait for a batch."""
    waited, started = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    return time.perf_counter() - started, waited


def training_step(case: Case) -> Callable[[DeviceBatch], None]:
    """A whole step of `vitscale.train` on one batch."""
    model = ViT(case.model)
    initialize(model, 0)
    engine = Engine(model, EngineConfig(precision="fp32"), OptimizerConfig(peak_lr=1e-4), micro_batch_size=case.batch, grad_accum_steps=1)

    def step(batch: DeviceBatch) -> None:
        logits_BK = engine.forward(normalize(batch.images_BHWC, PREPROCESS), batch.keys_B)
        engine.backward(compute_loss(logits_BK, batch.labels_BL, batch.scores_BL, OBJECTIVE))
        engine.step(1e-4)

    return step


if __name__ == "__main__":
    main()
