"""What the shapes of a stranger's tensors say of the model that they are of.

Where it stands: below `recognise.py`, which adds what shapes do not say.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitscale.config import Format
from vitscale.families import FAMILIES
from vitscale.formats import Shape, theirs_of


@dataclass(frozen=True)
class Facts:
    """What the shapes say."""

    depth: int
    width: int
    mlp_dim: int
    patch_size: int
    num_classes: int
    representation_size: int
    positions: int | None
    """Places in the table of position embeddings; None where there is none."""
    class_token: bool
    pool: Literal["cls", "mean", "map", "mean_with_cls"]
    num_heads: int | None = None
    registers: int = 0
    layer_scale: bool = False
    swiglu: bool = False
    qk_norm: bool = False
    pre_norm: bool = False
    pool_norm: bool = False


def facts_of(form: Format, prefix: str, shapes: Mapping[str, Shape]) -> Facts:
    """Of a file of a format, and what stands before its names. Raises ValueError, KeyError or IndexError where they make no sense."""
    return (_npz_facts if FAMILIES[form].is_npz else _torch_facts)(form, prefix, shapes)


def _torch_facts(form: Format, prefix: str, shapes: Mapping[str, Shape]) -> Facts:

    def shape_of(ours: str, *, swiglu: bool = False) -> Shape | None:
        names = theirs_of(form, ours, prefix, swiglu=swiglu)
        return shapes.get(names[0]) if names else None

    def needed(ours: str) -> Shape:
        shape = shape_of(ours)
        if shape is None:
            raise ValueError(f"{' or '.join(theirs_of(form, ours, prefix)) or ours} is missing")
        return shape

    def there(ours: str) -> bool:
        return shape_of(ours) is not None

    kernel = needed("patch_embed.proj.weight")
    if len(kernel) != 4:
        raise ValueError(f"the kernel of its patches has shape {sides(kernel)}, not (width x 3 x height x width of a patch)")
    D, channels, height, width = kernel
    if channels != 3 or height != width:
        raise ValueError(f"patches are {height} x {width} pixels of {channels} channels, not square ones of 3")
    depth = next(number for number in itertools.count() if not there(f"blocks.{number}.norm1.weight"))
    layers = (f"blocks.0.mlp.{layer}.weight" for layer in ("fc1", "fc2"))
    fc1, fc2 = (shape_of(layer, swiglu=True) or needed(layer) for layer in layers)
    gated = fc1[0] == 2 * fc2[1]
    position, latent = shape_of("pos_embed"), there("attn_pool.latent")
    class_token, pool_norm = there("cls_token"), there("fc_norm.weight") and not there("norm.weight")
    head = shape_of("head.weight")
    classes = 0 if head is None else head[1] if form == "open_clip" else head[0]
    pool: Literal["cls", "mean", "map", "mean_with_cls"] = "map" if latent else "cls" if class_token else "mean"
    if form == "hf_siglip" and classes:
        pool = "mean"  # SiglipForImageClassification, whatever its tower has
    if pool_norm and class_token:
        pool = "mean_with_cls"
    q_norm, registers, hidden = shape_of("blocks.0.attn.q_norm.weight"), shape_of("reg_token"), shape_of("pre_logits.fc.weight")
    return Facts(
        depth, D, fc2[1], height, classes, hidden[0] if hidden else 0, _places(position), class_token, pool,
        num_heads=D // q_norm[0] if q_norm else None, registers=registers[1] if registers else 0, layer_scale=there("blocks.0.ls1.gamma"),
        swiglu=gated, qk_norm=q_norm is not None, pre_norm=there("norm_pre.weight"), pool_norm=pool_norm,
    )  # fmt: skip


def _npz_facts(form: Format, prefix: str, shapes: Mapping[str, Shape]) -> Facts:
    kernel = shapes[f"{prefix}embedding/kernel"]
    if len(kernel) != 4:
        raise ValueError(f"the kernel of its patches has shape {sides(kernel)}, not (height x width of a patch x 3 x width)")
    height, width, channels, D = kernel
    if channels != 3 or height != width:
        raise ValueError(f"patches are {height} x {width} pixels of {channels} channels, not square ones of 3")
    names, scan = FAMILIES[form].names, FAMILIES[form].scanned
    block = f"{prefix}Transformer/encoderblock" + ("" if scan else "_0")
    query = shapes[f"{block}/{names['attn']}/query/kernel"][scan:]
    fc1 = shapes[f"{block}/{names['mlp']}/Dense_0/kernel"][scan:]
    if scan:
        depth = shapes[f"{block}/LayerNorm_0/scale"][0]
    else:
        depth = next(number for number in itertools.count() if f"{prefix}Transformer/encoderblock_{number}/LayerNorm_0/scale" not in shapes)
    position = shapes.get(f"{prefix}{names['pos_embed']}")
    class_token, latent = f"{prefix}cls" in shapes, f"{prefix}MAPHead_0/probe" in shapes
    head, hidden = shapes.get(f"{prefix}head/kernel"), shapes.get(f"{prefix}pre_logits/kernel")
    return Facts(
        depth, D, fc1[1], height, head[1] if head else 0, hidden[1] if hidden else 0, _places(position), class_token,
        "map" if latent else "cls" if class_token else "mean", num_heads=query[1],
    )  # fmt: skip


def _places(position: Shape | None) -> int | None:
    """Of a table of position embeddings. Raises ValueError."""
    if position is None:
        return None
    if len(position) < 2:
        raise ValueError(f"its position embeddings have shape {sides(position)}, not (places x width)")
    return position[-2]


def sides(shape: Shape) -> str:
    """A shape, for people."""
    return f"({' x '.join(map(str, shape))})"
