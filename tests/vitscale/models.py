"""What the tests of models share: weights of which none is zero, how far two sets of numbers are apart, a checkpoint on disk.

Not a test itself. A parity test over freshly initialised weights proves little: zero biases, a zero class token and a zero head hide
swapped or forgotten tensors, so every comparison here starts from `randomize`.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vitscale import checkpoint
from vitscale.checkpoint import Description, Piece, TensorEntry, piece_key
from vitscale.config import EngineConfig, ObjectiveConfig, PreprocessConfig, ViTConfig
from vitscale.model import ViT


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fills every parameter with random numbers, none of them zero, on the scale that a trained model has them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.mul_(0.3).add_(1)
        elif name.endswith("weight"):
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.5)
        parameter.masked_fill_(parameter == 0, 0.1)  # a normal in fp32 is exactly zero once in some ten million


def random_vit(config: ViTConfig, seed: int = 0, **checkpointing: Any) -> ViT:
    """A model in evaluation mode, every tensor random."""
    model = ViT(config, EngineConfig(**checkpointing).keeps)
    randomize(model, seed)
    return model.eval()


def random_images(config: ViTConfig, batch_size: int, seed: int = 0) -> Tensor:
    """Normalised images (B, C, H, W)."""
    return torch.rand(batch_size, 3, *config.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def cotangent(logits_BK: Tensor) -> Tensor:
    """A fixed random direction, so that no symmetry of a real loss hides a wrong gradient."""
    return torch.randn(logits_BK.shape, generator=torch.Generator().manual_seed(7))


def gradient_errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """For each tensor the norm of the difference over max(its norm, a thousandth of the whole gradient's norm)."""
    assert ours.keys() == theirs.keys()
    whole = float(sum(float(g.square().sum()) for g in theirs.values()) ** 0.5)
    return {name: float((ours[name] - g).norm()) / max(float(g.norm()), 1e-3 * whole) for name, g in theirs.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient; all must have one."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if _has_gradient(name, parameter)}  # type: ignore[misc]


def _has_gradient(name: str, parameter: nn.Parameter) -> bool:
    assert parameter.grad is not None, f"{name} has no gradient"
    return True


def write_checkpoint(
    folder: Path,
    model: ViT,
    *,
    preprocess: PreprocessConfig | None = None,
    average: ViT | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Description:
    """A committed checkpoint as a run of one node leaves it, its moments left out."""
    hidden = folder.with_name(f".{folder.name}.partial")
    hidden.mkdir(parents=True)
    kinds = {checkpoint.WEIGHT: model} | ({checkpoint.AVERAGE: average} if average else {})
    tensors = {(name, kind): p.detach().clone() for kind, source in kinds.items() for name, p in source.named_parameters()}
    save_file({piece_key(name, kind, 0): t.flatten() for (name, kind), t in tensors.items()}, hidden / "node-0000.safetensors")
    entries = [
        TensorEntry(name, kind, tuple(t.shape), (Piece("node-0000.safetensors", 0, t.numel()),)) for (name, kind), t in tensors.items()
    ]
    about = Description(folder, model.config, preprocess or PreprocessConfig(), ObjectiveConfig(), class_names, 4096, 2, tuple(entries))
    checkpoint.write_description(hidden / "checkpoint.json", about)
    checkpoint.publish(hidden, folder, {file.name: checkpoint.file_checksum(file) for file in hidden.iterdir()})
    return checkpoint.describe(folder)


def photograph(size: tuple[int, int]) -> bytes:
    """A JPEG of given width and height: smooth shapes and noise."""
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 12, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()
