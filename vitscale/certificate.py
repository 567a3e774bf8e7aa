"""An export's certificate: inputs, and what the model that was trained says of them, for whoever loads the export to compare with.

    certificate/00.jpg ... 19.jpg       images rendered from a seed, of all sizes, so that preprocessing is proved too; no training images
    certificate/expected.safetensors    for these (`image_*`) and for seeded tensors (`inputs_BCHW`): logits, what the head sees, patch
                                        tokens, in fp32; and the pixels that the model sees of each image
    certificate/certificate.json        which library the export is for, tolerances, what a lossy export is known to change

`exported/verify.py`, which every export has a copy of, holds a library to them.
"""

import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscale.config import PreprocessConfig
from vitscale.errors import CheckpointError
from vitscale.images import evaluation_view
from vitscale.model import ViT, normalize
from vitscale.tensorfiles import write_safetensors

FOLDER = "certificate"
NUM_IMAGES, NUM_INPUTS = 20, 4
# Norms of differences over norms that are rounding: sums in another order, products of TF32 (10 bits) and of bf16 (7)
TOLERANCES = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 5e-2}
_SIZES = (  # width, height: margins of crops that are even, odd, and odd halves; far from square; smaller than any model's input
    (500, 375), (375, 500), (333, 500), (501, 377), (640, 427), (427, 641), (1024, 768), (200, 200), (64, 64), (97, 61),
    (1000, 300), (299, 903), (257, 256), (256, 259), (384, 384), (31, 47), (225, 224), (800, 801), (449, 333), (512, 290),
)  # fmt: skip


@functools.lru_cache
def rendered_images(seed: int) -> tuple[bytes, ...]:
    """Twenty JPEG files: waves, discs and noise, two of them grey and two progressive, each of its own size, quality and subsampling."""
    rng, files = np.random.default_rng(seed), []
    for number, (width, height) in enumerate(_SIZES):
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        pixels = np.full((height, width, 3), 128.0)
        for _ in range(4):
            kx, ky, phase = rng.uniform((-40, -40, 0), (40, 40, 2 * np.pi)).tolist()
            pixels += rng.uniform(10, 40, 3) * np.sin(kx * x + ky * y + phase)[..., None]
        for _ in range(6):
            centre_x, centre_y, radius = rng.uniform(0, 1, 3) * (1, height / width, 0.3)
            pixels[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] += rng.uniform(-90, 90, 3)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        file = io.BytesIO()
        image = image.convert("L") if number in (3, 12) else image
        image.save(file, "JPEG", quality=int(rng.integers(60, 98)), subsampling=int(rng.integers(0, 3)), progressive=number in (5, 16))
        files.append(file.getvalue())
    return tuple(files)


def seeded_inputs(image_size: tuple[int, int], seed: int = 0) -> Tensor:
    """Normalised images (B, C, H, W) of noise."""
    return torch.randn(NUM_INPUTS, 3, *image_size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def write_certificate(folder: Path, model: ViT, preprocess: PreprocessConfig, about: Mapping[str, Any], *, seed: int = 0) -> None:
    """Writes the certificate of a model, in evaluation mode and fp32, into an export's folder.

    Args:
        about: what certificate.json says beside tolerances.

    Raises CheckpointError where the model does not compute numbers.
    """
    (folder / FOLDER).mkdir()
    files = rendered_images(seed)
    for number, data in enumerate(files):
        (folder / FOLDER / f"{number:02d}.jpg").write_bytes(data)
    views_BHWC = torch.from_numpy(np.stack([evaluation_view(data, model.config.image_size, preprocess) for data in files]))
    inputs_BCHW = seeded_inputs(model.config.image_size, seed)
    expected = {"inputs_BCHW": inputs_BCHW, **outputs(model, inputs_BCHW), "image_views_BHWC": views_BHWC.float()}
    expected |= {f"image_{name}": value for name, value in outputs(model, normalize(views_BHWC, preprocess)).items()}
    if odd := next((name for name, value in expected.items() if not bool(torch.isfinite(value).all())), None):
        raise CheckpointError(f"the model's {odd} are not finite, so nothing can be held to them; its weights are damaged or diverged")
    write_safetensors(
        folder / FOLDER / "expected.safetensors", {name: tuple(value.shape) for name, value in expected.items()}, expected.__getitem__
    )
    said = {"tolerances": TOLERANCES, "seed": seed, **about}
    (folder / FOLDER / "certificate.json").write_text(json.dumps(said, indent=1) + "\n")


@torch.no_grad()
def outputs(model: ViT, images_BCHW: Tensor) -> dict[str, Tensor]:
    """What a model says of normalised images: logits (B, K) where it has a head, what that sees (B, D), and patch tokens (B, N, D).

    Image by image, so that the numbers are those of each alone and memory does not grow with their number.
    """
    found: list[dict[str, Tensor]] = []
    for images_1CHW in torch.split(images_BCHW, 1):
        tokens_1ND = model.tokens(images_1CHW)
        features_1D = model.pool(tokens_1ND)
        one = {"features_BD": features_1D, "tokens_BND": tokens_1ND[:, model.config.num_prefix_tokens :]}
        found.append(one | ({"logits_BK": model.head(features_1D)} if model.config.num_classes else {}))
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}
