"""What each setting of a training step gives: a step with it against the same step without, on one GPU or the CPU.

    python -m benchmarks.options                             every setting: on a GPU ViT-H/14 at 224 px; on a CPU ViT-Ti/16 at 96 px
    python -m benchmarks.options --only drop-path muon --model b16 --image-size 224 224 --save
    python -m benchmarks.options --only compile bf16         which a CPU leaves out unless asked: it gains nothing from either

Steps are `vitscale.engine.Engine`'s, from the same weights on the same random pixels. What is compared is in memory together and takes
turns step by step, each going first in turn, until `--seconds` have passed. A ratio is of time, on a CPU of the process's own, which other
work lengthens least: the median of those of each turn, told with their middle half; under 1 the setting is faster. Where a setting should
change nothing but rounding, the table tells the largest relative difference of the losses of all steps made; where it should, that it
learns otherwise, and nothing here says how well.

    garbage      seconds of Python's full collection with a trained engine in memory, after gc.freeze and before it
    fused        the update of AdamW alone, in plain torch, on one flat tensor (ZeRO's form) and on the model's tensors
    phases       arithmetic: FLOPs of a run with smaller images first
    clock        DeepSpeed's collectives, of which one rank has few, are watched in both steps, as that is the process's
"""

import datetime
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

import benchmarks.train_step as bench
import vitscale.config
from benchmarks.train_step import CUDA, OPTIMIZER, Batch
from vitscale.config import DROP_PATH_SUBSET_ABOVE, EngineConfig, OptimizerConfig, Phase, ScheduleConfig, TrainConfig, ViTConfig
from vitscale.engine import Engine, device
from vitscale.flops import train_flops
from vitscale.model import ViT, normalize
from vitscale.objective import compute_loss
from vitscale.recipes import vit
from vitscale.timeline import timeline_of
from vitscale.timing import BACKWARD, FORWARD, LOGGING, UPDATE, Clock

Row = dict[str, Any]
CLOCK = time.perf_counter if CUDA else time.process_time


@dataclass(frozen=True)
class OptionsConfig:
    """What is run."""

    model: str = "h14" if CUDA else "ti16"
    """A size (ti, s, b, l, h) and a patch size."""
    depth: int = 0
    """Blocks; 0: those of the model's name."""
    image_size: tuple[int, int] = (224, 224) if CUDA else (96, 96)
    batch: int = 64 if CUDA else 16
    """Images a step; four times as many where micro-batches add up."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="bf16" if CUDA else "fp32"))
    """What all steps have."""
    only: tuple[str, ...] = ()
    """Settings; none named: all, but on a CPU not compile and bf16."""
    seconds: float = 12
    """Of each comparison; at least one turn a contestant is made."""
    threads: int = 1
    """Of a CPU; those that wait for others count as working."""
    save: bool = False
    """Write a dated JSON file."""
    results: Path = Path(__file__).parent / "results"
    """Where to."""


@dataclass(frozen=True)
class Setup:
    """A whole training step."""

    model: ViTConfig
    engine: EngineConfig
    images: int
    optimizer: OptimizerConfig = OPTIMIZER
    micro_batches: int = 1
    subset_above: float = DROP_PATH_SUBSET_ABOVE
    clocked: bool = False


class Step:
    """A setup, ready to train; keeps the loss of each step."""

    def __init__(self, setup: Setup, start: dict[str, Tensor]) -> None:
        self.setup, self.losses = setup, list[Tensor]()
        model = ViT(setup.model, setup.engine.keeps)
        model.load_state_dict(start)
        self.clock = Clock(device()) if setup.clocked else None
        self.enter: Callable[[str], None] = self.clock.enter if self.clock else lambda phase: None
        micro, of = setup.images // setup.micro_batches, setup.micro_batches
        self.engine = Engine(model, setup.engine, setup.optimizer, micro_batch_size=micro, grad_accum_steps=of, clock=self.clock)

    def step(self, images_BHWC: Tensor, labels_BL: Tensor, keys_B: Tensor) -> None:
        """One optimizer step."""
        vitscale.config.DROP_PATH_SUBSET_ABOVE = self.setup.subset_above
        of, losses = self.setup.micro_batches, []
        for images, labels, keys in zip(images_BHWC.chunk(of), labels_BL.chunk(of), keys_B.chunk(of), strict=True):
            self.enter(FORWARD)
            logits_BK = self.engine.forward(normalize(images, bench.PREPROCESS), keys)
            losses.append(compute_loss(logits_BK, labels, torch.ones_like(labels, dtype=torch.float32), bench.OBJECTIVE))
            self.enter(BACKWARD)
            self.engine.backward(losses[-1])
            self.enter(UPDATE)
            self.engine.step(self.setup.optimizer.peak_lr)
            self.enter(LOGGING)
        self.losses.append(torch.stack([loss.detach() for loss in losses]).mean())
        if self.clock:
            self.clock.microseconds()


class Update:
    """AdamW's update alone, with gradients that stay."""

    def __init__(self, tensors: list[Tensor], *, fused: bool) -> None:
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        self.optimizer = torch.optim.AdamW(tensors, lr=OPTIMIZER.peak_lr, fused=fused, foreach=not fused)

    def step(self, images_BHWC: Tensor, labels_BL: Tensor, keys_B: Tensor) -> None:
        """One update."""
        self.optimizer.step()


# Of an option: what takes turns, by name, and which of it is held against which, with whether losses should be the same
Compared = tuple[dict[str, Setup], list[tuple[str, str, bool]]]


def options(base: Setup) -> dict[str, Compared]:
    def changed(part: str, **changes: Any) -> Setup:
        return replace(base, **{part: replace(getattr(base, part), **changes)})

    def pair(name: str, setup: Setup, other: str, without: Setup = base, *, same: bool) -> Compared:
        return {name: setup, other: without}, [(name, other, same)]

    paths: Compared = {"no drop-path": base}, []
    for rate in (0.3, 0.6):
        rows, zeros = f"drop-path, linear to {rate}, by rows", f"linear to {rate}, times zero"
        paths[0][rows] = changed("model", drop_path_rate=rate)
        paths[0][zeros] = replace(paths[0][rows], subset_above=1.0)
        paths[1].extend([(rows, zeros, True), (rows, "no drop-path", False)])
    kept = [changed("engine", checkpoint_every_n_blocks=1, checkpoint_keeps=keeps) for keeps in ("nothing", "products")]
    checkpointed = {f"every block keeps {setup.engine.checkpoint_keeps}": setup for setup in kept}
    B = base.images
    four = replace(base, images=4 * B)
    return {
        "drop-path": paths,
        "patch-dropout": pair("patch dropout 0.5", changed("model", patch_dropout=0.5), "none", same=False),
        "checkpointing": ({**checkpointed, "none": base}, [(name, "none", True) for name in checkpointed]),
        "accumulation": pair(f"4 x {B} images a step", replace(four, micro_batches=4), f"1 x {4 * B}", four, same=True),
        "average": pair("average of the weights", changed("optimizer", average_decay=0.999), "none", same=True),
        "muon": pair("Muon", changed("optimizer", name="muon"), "AdamW", same=False),
        "layer-decay": pair("layer decay 0.75", changed("optimizer", layer_decay=0.75), "none", same=False),
        "clock": pair("shares of time told", replace(base, clocked=True), "not", same=True),
        "compile": pair("compiled blocks", changed("engine", compile="blocks"), "eager", changed("engine", compile="none"), same=True),
        "bf16": pair("bf16", changed("engine", precision="bf16"), "fp32", changed("engine", precision="fp32"), same=True),
    }


def measure(compared: Compared, start: dict[str, Tensor], batches: list[Batch], seconds: float) -> list[Row]:
    """The rows of one option."""
    setups, comparisons = compared
    steps = {name: Step(setup, start) for name, setup in setups.items()}
    times = turns(steps, batches, seconds * len(comparisons))
    losses = {name: torch.stack(step.losses).double() for name, step in steps.items()}
    for step in steps.values():
        step.engine.close()
    rows = []
    for name, other, same in comparisons:
        apart = float((losses[name] / losses[other] - 1).abs().max())
        rows.append(row(name, other, times) | {"losses": f"the same to {apart:.0e}" if same else "learns otherwise"})
    return rows


def turns(loops: Mapping[str, Any], batches: list[Any], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each turn, after one that does not count."""
    cycles = {name: itertools.cycle(batches) for name in loops}
    bench.take_turns(loops, cycles, [0])
    times: dict[str, list[float]] = {name: [] for name in loops}
    end = time.perf_counter() + seconds
    while not next(iter(times.values())) or time.perf_counter() < end:
        for name, taken in bench.take_turns(loops, cycles, [len(times[next(iter(times))])], CLOCK).items():
            times[name] += taken
    return times


def row(name: str, other: str, times: dict[str, list[float]]) -> Row:
    milliseconds = [statistics.median(times[of]) for of in (name, other)]
    of_turns = bench.ratio_of_turns(times[name], times[other])
    return {"setting": name, "against": other, "ms": milliseconds, "turns": len(times[name])} | of_turns


def fused(start: dict[str, Tensor], seconds: float) -> list[Row]:
    rows = []
    for form, tensors in (("one flat tensor", [torch.cat([w.flatten() for w in start.values()])]), ("the tensors", list(start.values()))):
        ours, other = f"fused AdamW on {form}", f"for-each on {form}"
        updates = {name: Update([w.clone().to(device()) for w in tensors], fused=name == ours) for name in (ours, other)}
        rows.append(row(ours, other, turns(updates, [(None, None, None)], seconds)))
    return rows


def garbage(base: Setup, start: dict[str, Tensor], batch: Batch) -> list[Row]:
    step = Step(base, start)
    step.step(*batch)
    gc.collect()
    names, times = ("full collection after gc.freeze", "before it"), {}
    for name in reversed(names):
        if name == names[0]:
            gc.freeze()
        times[name] = bench.time_steps(gc.collect, 5)
    gc.unfreeze()
    step.engine.close()
    return [row(*names, times)]


def phases() -> list[Row]:
    """ViT-H/14 at 126 px for half of its samples, at 154 for three tenths, at 224 for the rest."""
    model = vit("h14", num_classes=1000)
    parts = (Phase(0.5, image_size=(126, 126)), Phase(0.8, image_size=(154, 154)))
    timeline = timeline_of(TrainConfig(model=model, steps=100_000, schedule=ScheduleConfig(phases=parts)), 0)
    small, whole = (train_flops(replace(model, image_size=size)) for size in (timeline.spans[0].image_size, model.image_size))
    share = timeline.images_left(0, model) * small / (timeline.total_samples * whole)
    return [{"setting": "phases, ViT-H/14 at 126, 154, 224 px", "against": "224 px throughout, FLOPs", "ratio": share}]


def run(config: OptionsConfig) -> dict[str, Any]:
    """All that was asked for, and where it was measured."""
    shared = {name: getattr(config, name) for name in ("model", "depth", "image_size", "batch", "engine")}
    plain = bench.BenchConfig(**shared)
    base = Setup(bench.model_config(plain), config.engine, config.batch)
    start, compared = bench.initial_weights(base.model), options(base)
    others: dict[str, Callable[[], list[Row]]] = {
        "fused": lambda: fused(start, config.seconds / 4),
        "garbage": lambda: garbage(base, start, bench.synthetic_batches(plain)[0]),
        "phases": phases,
    }
    names = config.only or [name for name in (*compared, *others) if CUDA or name not in ("compile", "bf16")]
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in compared:
            images = next(iter(compared[name][0].values())).images
            rows += measure(compared[name], start, bench.synthetic_batches(replace(plain, batch=images)), config.seconds)
        else:
            rows += others[name]()
        bench.free_memory()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": bench.machine(), "load": os.getloadavg(),
        "model": asdict(base.model), "settings": bench.to_plain(replace(config, results=Path())), "rows": rows,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    settings, of = result["settings"], result["machine"]
    print(
        f"\n{settings['model']} at {settings['image_size'][0]} px, batch {settings['batch']}, {settings['engine']['precision']}, ZeRO "
        f"{settings['engine']['zero_stage']}, on {of['device']}, {of['cores']} cores of load {result['load'][0]:.1f}; torch "
        f"{of['versions']['torch']}\n{'':40}{'against':28}{'time':>7}  {'half of turns':16}{'turns':>5}{'ms':>8}{'ms':>8}  losses"
    )
    for of in result["rows"]:
        line = f"{of['setting']:40}{of['against']:28}{of['ratio']:7.3f}"
        if "ms" in of:
            line += f"  {of['low']:.3f} to {of['high']:.3f}  {of['turns']:5}{of['ms'][0]:8.1f}{of['ms'][1]:8.1f}"
        print(f"{line}  {of.get('losses', '')}")


def main() -> None:
    config = tyro.cli(OptionsConfig, description=__doc__)
    torch.set_num_threads(config.threads)
    bench.join_world_of_one()
    result = run(config)
    print_table(result)
    if config.save:
        print(f"saved {bench.save(result, config.results, 'options')}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
