"""Bytes a step a rank sends under ZeRO 0 to 3, counted by the kernel on gloo's sockets, against the formulas of a plan.

    python -m benchmarks.communication                       2, 3, 4 and 8 ranks, fp32 and bf16, 1 and 4 micro-batches: minutes
    python -m benchmarks.communication --worlds 2 --stages 1 3 --save

A model whose parameter counts no number of ranks divides trains for some steps; nothing is subtracted. Figures a case, bytes a step a rank:

    sent       what Linux counts on the TCP sockets of a rank (TCP_INFO: bytes sent, less those sent twice), the mean of the ranks
    asked      what the collectives of one more step would send as gloo runs them, from their kinds and sizes as torch's dispatcher sees
               them, whoever calls them: n bytes reduced for all in a ring send 2 (N - 1) / N n a rank, gathered from all (N - 1) / N n;
               gloo's reduce-scatter is an all-reduce, and so sends twice what a ring's would
    formula    what a plan says beforehand, with that same reduce-scatter of gloo's
    on a ring  the formula with a true reduce-scatter, as NCCL has it: what a plan tells

`sent` over `asked` is 1 but for gloo's headers of 48 bytes a piece; `asked` over `formula` tells whether the plan knows what DeepSpeed asks
for. Ranks are processes of this machine, so nothing here is a time.
"""

import datetime
import json
import os
import platform
import socket
import struct
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_on_ranks
from vitscale.config import EngineConfig, OptimizerConfig, ViTConfig
from vitscale.engine import Engine
from vitscale.flops import parameters
from vitscale.memory import Layout
from vitscale.model import ViT, initialize
from vitscale.traffic import collectives

# Kernels above the 100,000 elements that DeepSpeed's stage 3 would keep whole on every rank, and nothing that 2 to 8 divides
MODEL = ViTConfig(depth=3, width=325, mlp_dim=1003, num_heads=5, patch_size=8, image_size=(24, 40), num_classes=13)
KINDS = {"all-reduce": "allreduce", "all-gather": "allgather", "reduce-scatter": "reduce_scatter"}  # by torch's names
MICRO_BATCH = 2
STEPS = 3


@dataclass(frozen=True)
class CommunicationConfig:
    """Which cases."""

    worlds: tuple[int, ...] = (2, 3, 4, 8)
    """Numbers of ranks."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    accumulate: tuple[int, ...] = (1, 4)
    """Micro-batches a step."""
    save: bool = False
    """Write a dated JSON file."""
    results: Path = Path(__file__).parent / "results"
    """Where to."""


def main() -> None:
    config = tyro.cli(CommunicationConfig, description=__doc__)
    cases = [
        {"zero_stage": stage, "precision": precision, "accumulate": accumulate}
        for stage, precision, accumulate in product(config.stages, config.precisions, config.accumulate)
        if (stage, precision) != (0, "bf16")  # which a run refuses
    ]
    rows = []
    print(
        f"{'ranks':>5}{'stage':>6}{'':>6}{'micro':>6}{'sent':>13}{'asked':>13}{'formula':>13}{'sent/asked':>12}{'sent/formula':>14}"
        f"{'on a ring':>13}  collectives"
    )
    for world in config.worlds:
        with tempfile.TemporaryDirectory() as folder:
            found = run_on_ranks("benchmarks.communication:walk", world, {"cases": cases}, Path(folder))
        for case, (sent, called) in zip(cases, found, strict=True):
            row = judged(case | {"world_size": world}, sent, called)
            rows.append(row)
            print_row(row)
    if config.save:
        print(f"saved {save(rows, config.results)}")


def judged(case: dict[str, Any], sent: list[float], called: dict[str, list[int]]) -> dict[str, Any]:
    """A row: what was counted, and what it was held against."""
    mean = sum(sent) / len(sent)
    asked = wire({name: size for name, (_, size) in called.items()}, len(sent), scatter=2)
    formula = wire(planned(case), len(sent), scatter=2)
    return case | {
        "sent": mean, "sent_least": min(sent), "sent_most": max(sent), "asked": asked, "formula": formula,
        "formula_on_a_ring": wire(planned(case), len(sent), scatter=1), "sent_to_asked": mean / asked, "sent_to_formula": mean / formula,
        "collectives": called,
    }  # fmt: skip


def wire(moved: dict[str, float], world: int, *, scatter: int) -> float:
    """Bytes that a rank sends in rings; a reduce-scatter takes `scatter` turns: 1 as NCCL does it, 2 as gloo does."""

    def turns(kind: str) -> int:
        return 2 if "allreduce" in kind else scatter if "reduce_scatter" in kind else 1

    return sum(turns(kind) * size * (world - 1) / world for kind, size in moved.items())


def planned(case: dict[str, Any]) -> dict[str, float]:
    """Bytes that each kind of collective works on in a step, as a plan has them."""
    layout = Layout(engine_of(case), case["world_size"], micro_batch_size=MICRO_BATCH, grad_accum_steps=case["accumulate"])
    found: Counter[str] = Counter()
    for of in collectives(MODEL, OptimizerConfig(), layout):
        found[KINDS[of.kind]] += of.times * of.bytes
    return dict(found)


def engine_of(case: dict[str, Any]) -> EngineConfig:
    """Its engine's config."""
    return EngineConfig(zero_stage=case["zero_stage"], precision=case["precision"])


def print_row(row: dict[str, Any]) -> None:
    called = ", ".join(f"{count} {name} ({size:,} B)" for name, (count, size) in row["collectives"].items())
    print(
        f"{row['world_size']:5}{row['zero_stage']:6}{row['precision']:>6}{row['accumulate']:6}{row['sent']:13,.0f}{row['asked']:13,.0f}"
        f"{row['formula']:13,.0f}{row['sent_to_asked']:12.4f}{row['sent_to_formula']:14.4f}{row['formula_on_a_ring']:13,.0f}  {called}",
        flush=True,
    )


def save(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Writes DATE-communication.json."""
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {"torch": torch.__version__, "linux": platform.release()}
    result = {"date": today, "versions": versions, "model": asdict(MODEL), "parameters": parameters(MODEL), "rows": rows}
    path = folder / f"{today}-communication.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------------------------
# On each rank
# ---------------------------------------------------------------------------------------------------------------------------------------


def walk(payload: dict[str, Any]) -> list[tuple[list[float], dict[str, list[int]]]]:
    """Of each case the bytes that each rank sent a step, and the collectives of a step."""
    return [count(case) for case in payload["cases"]]


def count(case: dict[str, Any]) -> tuple[list[float], dict[str, list[int]]]:
    model = ViT(MODEL)
    initialize(model, 0)
    accumulate = case["accumulate"]
    engine = Engine(model, engine_of(case), OptimizerConfig(), micro_batch_size=MICRO_BATCH, grad_accum_steps=accumulate)
    images_BCHW = torch.randn(MICRO_BATCH, 3, *MODEL.image_size)

    def steps(number: int) -> None:
        for _ in range(number * accumulate):
            engine.backward(engine.forward(images_BCHW).square().mean())
            engine.step(1e-4)

    steps(2)  # stage 3 learns the order of its parameters in the first
    dist.barrier()
    before = bytes_sent()
    steps(STEPS)
    dist.barrier()  # now all has arrived, and so has been sent
    sent: list[Any] = [None] * dist.get_world_size()
    a_step = (bytes_sent() - before) / STEPS
    dist.all_gather_object(sent, a_step)
    with Collectives() as called:
        steps(1)
    engine.close()
    return sent, called.found


def bytes_sent() -> int:
    """What this process has sent over its TCP sockets, each byte once: tcpi_bytes_sent less tcpi_bytes_retrans of linux/tcp.h."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
        except FileNotFoundError:  # the descriptor of this listing
            continue
        connection = socket.socket(fileno=int(entry.name))
        try:
            listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM and not listens:
                sent, again = struct.unpack_from("QQ", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)
                total += sent - again
        finally:
            connection.detach()  # it is gloo's
    return total


class Collectives(TorchDispatchMode):
    """The collectives that pass torch's dispatcher: of each kind how many, and the bytes of their larger sides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes a collective and lets it pass."""
        if func.namespace == "c10d":
            sides: Counter[int] = Counter()
            for position, side in enumerate(args):
                for tensor in torch.utils._pytree.tree_leaves(side):
                    if isinstance(tensor, torch.Tensor):
                        sides[position] += tensor.nbytes
            noted = self.found.setdefault(func.overloadpacket.__name__.strip("_"), [0, 0])
            noted[0] += 1
            noted[1] += max(sides.values())
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
