"""What tests of saving share: state that tells its step, in place of an engine, and what is read of it again. Not a test itself."""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vitscale import checkpoint
from vitscale.checkpoint import Description, TensorEntry, describe
from vitscale.config import ObjectiveConfig, PreprocessConfig, ViTConfig
from vitscale.saving import Saver
from vitscale.weights import TensorReader

MODEL = ViTConfig(depth=2, width=16, mlp_dim=20, num_heads=2, patch_size=4, image_size=(8, 8), num_classes=3)


class Held:
    """Two parameters and a moment of each, which Saver asks as it asks an engine; every element follows from the step and its place."""

    def __init__(self, elements: int) -> None:
        self.shapes = {"kernel": torch.Size([elements - 7]), "bias": torch.Size([7])}
        self.kinds = {kind: tuple(self.shapes) for kind in ("weight", "exp_avg")}
        self.state = {(name, kind): torch.empty(shape) for name, shape in self.shapes.items() for kind in self.kinds}
        self.move_to(0)

    def move_to(self, step: int) -> None:
        for tensor in self.state.values():
            torch.arange(float(len(tensor)), out=tensor).add_(step)

    def shares(self) -> dict[str, tuple[int, int]]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        cuts = {name: (rank * shape.numel() // ranks, (rank + 1) * shape.numel() // ranks) for name, shape in self.shapes.items()}
        return {name: (start, end - start) for name, (start, end) in cuts.items()}

    def stretch(self, name: str, kind: str, start: int, length: int) -> Tensor:
        return self.state[name, kind][start : start + length]


def about(run: Path, step: int, tensors: tuple[TensorEntry, ...] = ()) -> Description:
    return Description(run, MODEL, PreprocessConfig(), ObjectiveConfig(), None, step * 8, step, tensors)


def step_of_state(folder: Path | None) -> int:
    """The step that every element of a checkpoint of `Held` tells, which must be the one that it says."""
    assert folder is not None
    description = describe(folder)
    reader = TensorReader(description)
    for entry in description.tensors:
        tensor = reader.whole(entry.name, entry.kind)
        assert torch.equal(tensor, torch.arange(float(len(tensor))).add_(description.step)), entry
    return description.step


def saved(saver: Saver, held: Held, run: Path, step: int) -> None:
    """A checkpoint from its snapshot to its end, which must be whole."""
    held.move_to(step)
    assert saver.snapshot(about(run, step), patience=math.inf)
    saver.finish()
    assert saver.news()[-1] == f"saved {checkpoint.step_folder(run, step)}"
    assert checkpoint.verify(checkpoint.step_folder(run, step)) is None
