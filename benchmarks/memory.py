"""Memory of a real ZeRO training step on the CPU, every allocation of torch counted, against the plan's.

    python -m benchmarks.memory                              sizes, checkpointing, stages 0 to 3 at 1 and 2 ranks: minutes
    python -m benchmarks.memory --only s16 --save

At rest what is held is the storages of all tensors there are, each once. From there torch.profiler's memory events tell every
allocation and release of torch's CPU allocator in a step, so their running sum is exact: no resident set, no libraries, no rounding to
pages. Now and then a thread of gloo is the last to hold what was sent, and lets go of it late, and unseen: of a few steps that one counts
after which the sum is nearest to what is held, and of several such the lowest. Bytes of the rank that takes most, against a plan's:

    at rest        between steps: weights, masters, moments, averages, and the buffers that DeepSpeed keeps
    activations    what the last micro-batch's forward leaves for backward, logits and images among it; not the weights that it gathered
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
import torch.distributed as dist
import tyro
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.distributed import run_on_ranks
from vitscale.config import EngineConfig, ObjectiveConfig, OptimizerConfig, PreprocessConfig, ViTConfig
from vitscale.engine import Engine
from vitscale.memory import Layout, moments
from vitscale.model import ViT, initialize, normalize
from vitscale.objective import compute_loss
from vitscale.recipes import vit

MODELS = {
    "ti16": vit("ti16", num_classes=1000, image_size=(96, 96)),
    "s16": vit("s16", num_classes=1000, image_size=(96, 96)),
    "deep": ViTConfig(depth=24, width=128, mlp_dim=512, num_heads=4, patch_size=16, image_size=(128, 128), num_classes=100),
    "wide": ViTConfig(depth=3, width=768, mlp_dim=3072, num_heads=12, patch_size=16, image_size=(96, 96), num_classes=1000),
    "narrow": ViTConfig(depth=4, width=320, mlp_dim=1280, num_heads=5, patch_size=16, image_size=(96, 96), num_classes=100),
    "224 pixels": ViTConfig(depth=4, width=256, mlp_dim=512, num_heads=4, patch_size=16, image_size=(224, 224), num_classes=100),
    "21k classes": ViTConfig(depth=4, width=192, mlp_dim=768, num_heads=3, patch_size=16, image_size=(96, 96), num_classes=21_841,
                             qk_norm=True),
    "left out": ViTConfig(depth=6, width=256, mlp_dim=1024, num_heads=4, patch_size=16, image_size=(224, 224), num_classes=100,
                          patch_dropout=0.5, drop_path_rate=0.4),
}  # fmt: skip
UNCOUNTED = 2
STEPS = 4
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class Case:
    """One training."""

    model: str
    world_size: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    checkpoint: int = 0
    keeps: str = "nothing"
    optimizer: str = "adamw"
    average: bool = False
    accumulate: int = 1
    batch: int = 8

    @property
    def engine(self) -> EngineConfig:
        """Its engine's config."""
        return EngineConfig(
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            checkpoint_every_n_blocks=self.checkpoint,
            checkpoint_keeps=self.keeps,  # type: ignore[arg-type]
        )

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """Its optimizer's config."""
        return OptimizerConfig(name=self.optimizer, average_decay=0.999 if self.average else 0.0)  # type: ignore[arg-type]


def cases() -> list[Case]:
    """Every size, and every setting changed by itself and with the stages that it could meet."""
    found = [Case("s16", checkpoint=every) for every in (0, 1, 2)] + [Case(model) for model in MODELS]
    found += [Case("deep", checkpoint=1, keeps="products"), Case("224 pixels", batch=1), Case("left out", batch=32)]
    for world in (1, 2):
        for stage in (0, 1, 2, 3):
            for precision in ("fp32", "bf16") if stage else ("fp32",):
                base = Case("ti16", world, stage, precision, batch=4)
                found += [base, replace(base, model="wide", accumulate=2)]
                found += [replace(base, average=True, checkpoint=1, optimizer="sgd"), replace(base, model="21k classes")] * (world > 1)
    found += [Case("ti16", 4, stage, "bf16", batch=2) for stage in (1, 2, 3)]
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
            rows.append(asdict(case) | measured | {"plan": planned(case)})
            print_row(rows[-1], case)
    if config.save:
        config.results.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = config.results / f"{today}-memory.json"
        path.write_text(json.dumps({"date": today, "versions": {"torch": torch.__version__}, "rows": rows}, indent=1) + "\n")
        print(f"saved {path}")


def name_of(case: Case) -> str:
    said = [case.model, f"{case.world_size} ranks", f"ZeRO {case.zero_stage}", case.precision, case.optimizer]
    said += [f"checkpoint {case.checkpoint} {case.keeps}"] * bool(case.checkpoint) + [f"batch {case.batch}"] * (case.batch != 8)
    said += ["average"] * case.average
    return ", ".join(said + [f"{case.accumulate} micro-batches"] * (case.accumulate > 1))


def planned(case: Case) -> dict[str, Any]:
    """The plan's bytes of what is measured."""
    layout = Layout(case.engine, case.world_size, case.batch, case.accumulate, device="cpu")
    of_step = list(moments(MODELS[case.model], case.optimizer_config, layout))
    highest = max(of_step, key=lambda memory: memory.total)
    rest, forward = of_step[:2]
    return {
        "rest": rest.total, "activations": forward.activations + forward.inputs,
        "peak": highest.total, "peak_in": highest.moment,
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
    """What each case was measured to take, on the rank of the highest peak: a rank's share may end in a larger tensor than another's."""
    ours = [measure(Case(**case)) for case in payload["cases"]]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, ours)
    return [max(of_case, key=lambda found: found["peak"]) for of_case in zip(*of_ranks, strict=True)]


def measure(case: Case) -> dict[str, Any]:
    """Bytes of this rank in a step under torch's profiler, after one that was not."""
    model_config = MODELS[case.model]
    images_BHWC = torch.randint(0, 256, (case.batch, *model_config.image_size, 3), dtype=torch.uint8)
    labels_BL, scores_BL = torch.zeros(case.batch, 1, dtype=torch.int64), torch.ones(case.batch, 1)
    keys_B = torch.arange(case.batch)
    gc.collect()
    others = storages()
    model = ViT(model_config, case.engine.keeps)
    initialize(model, 0)
    engine = Engine(model, case.engine, case.optimizer_config, micro_batch_size=case.batch, grad_accum_steps=case.accumulate)
    gathered = 0

    def ours() -> dict[int, int]:
        gc.collect()
        return {where: size for where, size in storages().items() if where not in others}

    def step() -> None:
        nonlocal gathered
        for _ in range(case.accumulate):
            before = bytes_of(engine)
            with record_function("phase:forward"):
                images_BCHW = normalize(images_BHWC, PreprocessConfig())
                logits_BK = engine.forward(images_BCHW, keys_B)
                loss = compute_loss(logits_BK, labels_BL, scores_BL, ObjectiveConfig())
            gathered = bytes_of(engine) - before
            with record_function("phase:backward"):
                engine.backward(loss)
            with record_function("phase:update"):
                engine.step(1e-4)
            del images_BCHW, logits_BK, loss

    for _ in range(UNCOUNTED):  # stage 3 learns in the first and second in what order modules run, and then fetches ahead
        step()
    counts = []
    for _ in range(STEPS):
        held = ours()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
            step()
        found = time_line(taken, case.accumulate, held)
        counts.append(found | {"activations": found["activations"] - gathered, "lost": abs(found["left"] - sum(ours().values()))})
    engine.close()
    return min(counts, key=lambda found: (found["lost"], found["peak"]))


def storages() -> dict[int, int]:
    """The bytes of each storage that some tensor here has, by its address."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta and t.untyped_storage().nbytes()}


def bytes_of(engine: Engine) -> int:
    """Bytes of the weights that an engine's model computes with."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.parameters.values()}.values())


def allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes; below 0 where they are released) of torch's CPU allocator, from a profiler's tree of events."""
    for event in events:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


def time_line(taken: Any, accumulate: int, held: dict[int, int]) -> dict[str, Any]:
    """The running sum of allocations at the seams of a step's phases, and at its highest; `held`: address and bytes before it."""
    marks = sorted(
        (event.start_ns(), event.end_ns(), event.name().removeprefix("phase:"))
        for event in taken.profiler.kineto_results.events()
        if event.name().startswith("phase:")
    )
    last = marks[-len(PHASES) * accumulate :]
    held_at, level, levels = dict(held), sum(held.values()), []
    for when, pointer, size in sorted(allocations(taken.profiler.kineto_results.experimental_event_tree())):
        level -= held_at.pop(pointer, 0)  # where something is allocated, what was there had been released, seen or not
        if size > 0:
            held_at[pointer] = size
            level += size
        levels.append((when, level))

    def at(moment: int) -> int:
        return next((level for when, level in reversed(levels) if when < moment), sum(held.values()))

    rest = at(last[0][0])
    begun, ended, _ = last[-len(PHASES)]
    in_phase: dict[str, int] = {}
    for start, end, name in last:
        top = max([at(start), *(level for when, level in levels if start <= when < end)])
        in_phase[name] = max(in_phase.get(name, 0), top)
    peak_in = max(in_phase, key=lambda name: in_phase[name])
    return {
        "rest": rest, "activations": at(ended) - at(begun), "left": level,
        "peak": in_phase[peak_in], "peak_in": peak_in,
    }  # fmt: skip


if __name__ == "__main__":
    main()
