"""Memory of a real ZeRO training step on the CPU, every allocation of torch counted, against the plan's.

    python -m benchmarks.memory                              sizes, checkpointing, stages 0 to 3 at 1 and 2 ranks: minutes
    python -m benchmarks.memory --only s16 --save

torch.profiler's `[memory]` events tell every allocation and release of torch's CPU allocator since before the engine was built, so their
running sum is exact: no resident set, no libraries, no rounding to pages. Bytes of rank 0, in the last of two steps, against a plan's:

    at rest        between steps: weights, masters, moments, averages, and the buffers that DeepSpeed keeps
    activations    what the last micro-batch's forward leaves for backward, logits and images among it
    peak           the most at any instant, and in which phase of the step

On a GPU other kernels keep other things; what torch saves for backward and what DeepSpeed allocates is the same.
"""

import datetime
import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.distributed import run_on_ranks
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig
from vitscale.engine import Engine, deepspeed_config
from vitscale.memory import Layout, moments
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.recipes import vit

MODELS = {
    "ti16": vit("ti16", num_classes=1000, image_size=(96, 96)),
    "s16": vit("s16", num_classes=1000, image_size=(96, 96)),
    "deep": ViTConfig(depth=24, width=128, mlp_dim=512, num_heads=4, patch_size=16, image_size=(128, 128), num_classes=100),
    "wide": ViTConfig(depth=3, width=768, mlp_dim=3072, num_heads=12, patch_size=16, image_size=(96, 96), num_classes=1000),
}
BATCH = 8
STEPS = 2
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class Case:
    """One training."""

    model: str
    world_size: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    checkpoint: int = 0
    optimizer: str = "adamw"
    average: bool = False
    accumulate: int = 1

    @property
    def engine(self) -> EngineConfig:
        """Its engine's config."""
        return EngineConfig(
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            checkpoint_every_n_blocks=self.checkpoint,
        )

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """Its optimizer's config."""
        return OptimizerConfig(name=self.optimizer, average_decay=0.999 if self.average else 0.0)  # type: ignore[arg-type]


def cases() -> list[Case]:
    """Every size, and every setting changed by itself and with the stages that it could meet."""
    found = [Case(model, checkpoint=every) for model in MODELS for every in (0, 1, 2)]
    for world in (1, 2):
        for stage in (0, 1, 2, 3):
            for precision in ("fp32", "bf16") if stage else ("fp32",):
                base = Case("s16", world, stage, precision)
                found += [base, replace(base, model="wide", accumulate=2), replace(base, average=True, checkpoint=1, optimizer="sgd")]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class MemoryConfig:
    """Which cases."""

    only: str = ""
    """Part of the cases' names."""
    save: bool = False
    """Write a dated JSON file."""
    results: Path = Path(__file__).parent / "results"
    """Where to."""


def main() -> None:
    config = tyro.cli(MemoryConfig, description=__doc__)
    chosen = [case for case in cases() if config.only in name_of(case)]
    rows = []
    for world, stage in sorted({(case.world_size, case.zero_stage) for case in chosen}):
        ours = [case for case in chosen if (case.world_size, case.zero_stage) == (world, stage)]
        with tempfile.TemporaryDirectory() as folder:
            found = run_on_ranks("benchmarks.memory:walk", world, {"cases": [asdict(case) for case in ours]}, Path(folder))
        for case, measured in zip(ours, found, strict=True):
            rows.append(asdict(case) | {"batch": BATCH} | measured | {"plan": planned(case)})
            print_row(rows[-1], case)
    if config.save:
        config.results.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = config.results / f"{today}-memory.json"
        path.write_text(json.dumps({"date": today, "versions": {"torch": torch.__version__}, "rows": rows}, indent=1) + "\n")
        print(f"saved {path}")


def name_of(case: Case) -> str:
    said = [case.model, f"{case.world_size} ranks", f"ZeRO {case.zero_stage}", case.precision, case.optimizer]
    said += [f"checkpoint {case.checkpoint}"] * bool(case.checkpoint) + ["average"] * case.average
    return ", ".join(said + [f"{case.accumulate} micro-batches"] * (case.accumulate > 1))


def planned(case: Case) -> dict[str, Any]:
    """The plan's bytes of what is measured, and of each kind at its peak."""
    given = deepspeed_config(case.engine, 1.0, BATCH, case.accumulate)  # what DeepSpeed is told, our defaults among it
    engine = replace(case.engine, deepspeed={"zero_optimization": given["zero_optimization"]})
    keeps: Any = "nothing" if case.checkpoint else "everything"
    layout = Layout(engine, case.world_size, BATCH, case.accumulate, keeps=keeps, device="cpu")
    of_step = list(moments(MODELS[case.model], case.optimizer_config, layout))
    highest = max(of_step, key=lambda memory: memory.total)
    whole = next(moments(MODELS[case.model], case.optimizer_config, replace(layout, grad_accum_steps=1)))
    return {
        "rest": whole.weights + whole.gradients + whole.optimizer + whole.average + whole.buckets,
        "activations": of_step[0].activations + of_step[0].inputs,
        "peak": highest.total, "peak_in": highest.moment, "kinds_at_peak": highest.kinds(),
    }  # fmt: skip


def print_row(row: dict[str, Any], case: Case) -> None:
    of = "  ".join(
        f"{kind} {row[kind] / 1e6:8.2f} MB, of the plan's {row['plan'][kind] / 1e6:8.2f} {row[kind] / row['plan'][kind]:6.3f}"
        for kind in ("rest", "activations", "peak")
    )
    print(f"{name_of(case):62}{of}  in {row['peak_in']}, {row['plan']['peak_in']}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------------------------
# On each rank
# ---------------------------------------------------------------------------------------------------------------------------------------


def walk(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """What each case was measured to take."""
    return [measure(Case(**case)) for case in payload["cases"]]


def measure(case: Case) -> dict[str, Any]:
    """Bytes of this rank: built, and trained for three steps, under torch's profiler."""
    model_config = MODELS[case.model]
    images_BHWC = torch.randint(0, 256, (BATCH, *model_config.image_size, 3), dtype=torch.uint8)
    labels_BL, scores_BL = torch.zeros(BATCH, 1, dtype=torch.int64), torch.ones(BATCH, 1)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        model = ViT(model_config, case.engine.checkpoint_every_n_blocks)
        initialize(model, 0)
        engine = Engine(model, case.engine, case.optimizer_config, micro_batch_size=BATCH, grad_accum_steps=case.accumulate)
        for _ in range(STEPS):
            for _ in range(case.accumulate):
                with record_function("phase:forward"):
                    images_BCHW = normalize(images_BHWC, PreprocessConfig())
                    logits_BK = engine.forward(images_BCHW)
                    loss = compute_loss(logits_BK, labels_BL, scores_BL, ObjectiveConfig())
                with record_function("phase:backward"):
                    engine.backward(loss)
                with record_function("phase:update"):
                    engine.step(1e-4)
                del images_BCHW, logits_BK, loss
        kinds = held(engine)
    engine.close()
    return time_line(taken, case.accumulate) | kinds


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the tensors that an engine holds between steps, each storage once."""
    groups = {
        "weights": [p.data for p in engine.parameters.values()],
        "masters": [] if engine.stage == 0 else engine._flat_weights(),
        "moments": [t for state in engine._optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)],
        "averages": engine._averages,
        "grads": [p.grad for p in engine.parameters.values() if p.grad is not None],
    }
    seen: set[int] = set()
    found = {}
    for name, tensors in groups.items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        found[name] = sum(size for where, size in storages.items() if where not in seen)
        seen |= storages.keys()
    return found


def allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes; below 0 where they are released) of torch's CPU allocator, from a profiler's tree of events."""
    for event in events:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


def time_line(taken: Any, accumulate: int) -> dict[str, Any]:
    """The running sum of allocations at the seams of the last step's phases, and at its highest."""
    marks = sorted(
        (event.start_ns(), event.end_ns(), event.name().removeprefix("phase:"))
        for event in taken.profiler.kineto_results.events()
        if event.name().startswith("phase:")
    )
    last = marks[-len(PHASES) * accumulate :]
    held_at: dict[int, int] = {}  # what was allocated under this profiler: what was before is not in the sum, and its release is not either
    level, levels = 0, []
    for when, pointer, size in sorted(allocations(taken.profiler.kineto_results.experimental_event_tree())):
        if size > 0:
            held_at[pointer] = size
        else:
            size = -held_at.pop(pointer, 0)
        level += size
        levels.append((when, level))

    def at(moment: int) -> int:
        return next((level for when, level in reversed(levels) if when < moment), 0)

    rest = at(last[0][0])
    begun, ended, _ = last[-len(PHASES)]
    in_phase = {}
    for start, end, name in last:
        top = max([at(start), *(level for when, level in levels if start <= when < end)])
        in_phase[name] = max(in_phase.get(name, 0), top)
    peak_in = max(in_phase, key=lambda name: in_phase[name])
    return {
        "rest": rest, "activations": at(ended) - at(begun), "after_backward": at(last[-1][0]), "after": at(last[-1][1]),
        "peak": in_phase[peak_in], "peak_in": peak_in, "peak_of_phase": in_phase,
    }  # fmt: skip


if __name__ == "__main__":
    main()
