"""The start from a checkpoint's weights, made to fit a new image size and a new head (arXiv 2010.11929, section 3.2).

In fine-tuning the representation layer is dropped and the head is new and zero; pre-training that goes on may keep both. Position
embeddings are interpolated in two dimensions. Grids are compared by their height and width, never by their number of tokens: 14 x 14 and
7 x 28 have equally many.

Axes: N tokens, D width, h and w sides of a grid of patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.checkpoint import Description
from vitscale.config import HEAD, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.model import initialize_parameter, parameter_shapes
from vitscale.weights import read_weights

# By whose code: how it resamples. Norm kept from 16x16 to 37x37 differs by up to 20% between them, so a name is part of a recipe.
METHODS: dict[str, dict[str, object]] = {
    "timm": {"mode": "bicubic", "antialias": True},  # timm/layers/pos_embed.py, resample_abs_pos_embed
    "deit": {"mode": "bicubic"},  # DeiT, MAE, Hugging Face
    "timm_npz": {"mode": "bilinear"},  # timm's loader of Google's npz files
    "paper": {"mode": "bilinear", "align_corners": True},  # google-research/vision_transformer: scipy.ndimage.zoom(order=1)
}


def fine_tuned_weights(
    description: Description, kind: str, model: ViTConfig, method: str, seed: int, *, keep_head: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """Every weight of the model to train on, from a checkpoint's: head and representation layer too where they are kept, else new ones.

    Raises CheckpointError where a tensor of the checkpoint is missing, extra or of another shape.
    """
    old = description.model
    before, wanted = read_weights(description, kind, parameter_shapes(old)), parameter_shapes(model)
    weights = {}
    for name, shape in wanted.items():
        if name.startswith(HEAD) and not keep_head:
            weights[name] = torch.empty(shape)
            initialize_parameter(name, weights[name], seed, model)
        else:
            weights[name] = resample(name, before[name], old, model, method)
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{description.path}: {name} has shape {tuple(weights[name].shape)}, the model's has {shape}")
    return weights


def resample(name: str, weight: Tensor, old: ViTConfig, new: ViTConfig, method: str) -> Tensor:
    """A position embedding on the new model's grid; any other weight as it is."""
    if old.grid == new.grid:
        return weight
    if name == "pos_embed":
        prefix = weight.shape[1] - old.grid[0] * old.grid[1]  # the class token's position stays as it is
        return torch.cat([weight[:, :prefix], resample_grid(weight[:, prefix:], old.grid, new.grid, method)], dim=1)
    if name in ("pos_embed_rows", "pos_embed_columns"):
        axis = 0 if name == "pos_embed_rows" else 1
        return resample_grid(weight[None], (weight.shape[0], 1), (new.grid[axis], 1), method)[0]
    if name.endswith("rel_pos_bias"):
        before, after = ((2 * h - 1, 2 * w - 1) for h, w in (old.grid, new.grid))
        offsets = before[0] * before[1]
        return torch.cat([resample_grid(weight[None, :offsets], before, after, method)[0], weight[offsets:]])
    return weight


def resample_grid(embeddings_1ND: Tensor, old: tuple[int, int], new: tuple[int, int], method: str) -> Tensor:
    """Embeddings (1, h*w, D) of one grid on another, row by row, in fp32."""
    if old == new:
        return embeddings_1ND
    grid_1Dhw = embeddings_1ND.float().view(1, *old, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(grid_1Dhw, size=new, **METHODS[method])  # type: ignore[arg-type]
    return resampled.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
