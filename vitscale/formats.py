"""How the field's formats name and lay out a ViT's tensors: which stretch of which of ours each of theirs is, both ways.

    Part           one tensor of a file, or some rows of it: rows of one of ours, seen in another shape and order of axes
    parts          all of them, for a format and a model
    file_shapes    the tensors that a file of a model has
    to_file        those tensors, made of ours          from_file    ours, made of those
    theirs_of      what a format of torch calls one of ours, from which `recognise.py` learns what a file's model is

Where it stands: `export.py` writes by it, `weights.py` reads by it. Pure functions of names and shapes; what
only other names or layouts can say is exact, so all that is here is. Sources: timm/models/vision_transformer.py, google-research/big_vision
(models/vit.py) and vision_transformer (vit_jax/models_vit.py), transformers' modeling files, facebookresearch/dinov2, openai/CLIP.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitscale.config import Format, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.model import parameter_shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A tensor of a file, or some of its rows, as rows of one of ours: `ours[rows].view(view).permute(axes)`."""

    theirs: str
    ours: str
    rows: tuple[int, int] | None = None
    """Of ours; None: all."""
    view: Shape = ()
    """The shape that they are seen in; empty: their own."""
    axes: tuple[int, ...] = ()
    """The order of its axes in the file; empty: the same."""
    at: tuple[int, int] | int | None = None
    """Rows of theirs that these are, or the one place of its first axis, where the file holds all blocks in one; None: all of it."""

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Rows of ours as the file has them."""
        seen = ours.reshape(self.view) if self.view else ours
        return seen.permute(self.axes) if self.axes else seen

    def to_ours(self, theirs: Tensor, shape: Shape) -> Tensor:
        """What a file has, at its place if it has one, as our rows, of this shape."""
        taken = theirs[slice(*self.at)] if isinstance(self.at, tuple) else theirs
        if self.axes:
            taken = taken.permute(tuple(self.axes.index(axis) for axis in range(len(self.axes))))
        return taken.reshape(shape)

    def rows_shape(self, ours: Shape) -> Shape:
        """The shape of the rows of a tensor of ours."""
        return (self.rows[1] - self.rows[0], *ours[1:]) if self.rows else ours

    def shape(self, ours: Shape) -> Shape:
        """The shape in the file of what a tensor of ours contributes."""
        seen = self.view or self.rows_shape(ours)
        return tuple(seen[axis] for axis in self.axes) if self.axes else seen


# ---------------------------------------------------------------------------------------------------------------------------------------
# Formats of torch: other names, and some tensors in parts
# ---------------------------------------------------------------------------------------------------------------------------------------

# Our names, or their stems before `.weight` and `.bias`, to theirs; `{}` is the block. Several: rows of ours, evenly, one below another.
Names = Mapping[str, str | tuple[str, ...]]

_DINOV2: Names = {
    "reg_token": "register_tokens",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.w12",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3",
}
_OPEN_CLIP: Names = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "head.weight": "proj",
    **{f"blocks.{{}}.{ours}": f"transformer.resblocks.{{}}.{theirs}" for ours, theirs in {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "ls1.gamma": "ls_1.gamma", "ls2.gamma": "ls_2.gamma",
    }.items()},
}  # fmt: skip
_HF_EMBEDDINGS: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pre_logits.fc": "pooler.dense",
}
_HF_ATTENTION: Names = {
    "blocks.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")),
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.output.dense",
}
_HF_VIT: Names = {
    **_HF_EMBEDDINGS, **_HF_ATTENTION,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
}  # fmt: skip
_HF_DINOV2: Names = {
    **_HF_EMBEDDINGS, **_HF_ATTENTION,
    "reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}  # fmt: skip
_HF_DINOV2_SWIGLU: Names = {"blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in", "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out"}
_HF_CLIP: Names = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    **{f"blocks.{{}}.{ours}": f"encoder.layers.{{}}.{theirs}" for ours, theirs in {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }.items()},
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}  # fmt: skip
HEADS_WITHOUT_BIAS = ("open_clip", "hf_clip")  # their head is CLIP's projection, whose bias is zero


def names_of(form: Format, swiglu: bool) -> Names:
    """Where a format of torch has other names than ours, which are timm's; those of Hugging Face's heads are in `theirs_of`."""
    match form:
        case "dinov2":
            return _DINOV2 if swiglu else {"reg_token": _DINOV2["reg_token"]}
        case "open_clip":
            return _OPEN_CLIP
        case "hf_vit" | "hf_vit_mae":
            return _HF_VIT
        case "hf_dinov2":
            return {**_HF_DINOV2, **(_HF_DINOV2_SWIGLU if swiglu else {})}
        case "hf_siglip" | "hf_clip":
            return _HF_CLIP
    return {}


def theirs_of(form: Format, ours: str, prefix: str = "", *, swiglu: bool = False) -> tuple[str, ...]:
    """The names that one of our tensors has in a format of torch, with what the file puts before them; none where it has no place."""
    if form.startswith("hf_") and ours.startswith("head."):  # of which no file has anything before its name
        return (ours.replace("head", "visual_projection" if form == "hf_clip" else "classifier", 1),)
    names, block, template = names_of(form, swiglu), "", ours
    if ours.startswith("blocks."):
        _, block, rest = ours.split(".", 2)
        template = f"blocks.{{}}.{rest}"
    stem, _, leaf = template.rpartition(".")
    if template in names:
        found, leaf = names[template], ""
    elif stem in names:
        found, leaf = names[stem], f".{leaf}"
    else:
        found, leaf = template if form in ("timm", "dinov2") else (), ""
    return tuple(f"{prefix}{name.replace('{}', block)}{leaf}" for name in ((found,) if isinstance(found, str) else found))


def _torch_parts(form: Format, model: ViTConfig, prefix: str) -> Iterator[Part]:
    D, pooling = model.width, f"{prefix}head.attention.in_proj_"
    for ours, shape in parameter_shapes(model).items():
        if form == "hf_siglip" and ours.startswith(("attn_pool.q.", "attn_pool.kv.")):  # torch's MultiheadAttention has the three in one
            of = (0, D) if ours.startswith("attn_pool.q.") else (D, 3 * D)
            yield Part(f"{pooling}{ours.rpartition('.')[2]}", ours, at=of)
            continue
        if form in HEADS_WITHOUT_BIAS and ours == "head.bias":
            continue
        names = theirs_of(form, ours, prefix, swiglu=model.mlp == "swiglu")
        if not names:
            raise CheckpointError(f"{form} has no place for {ours}")
        if len(names) > 1:
            rows = shape[0] // len(names)
            yield from (Part(name, ours, (number * rows, (number + 1) * rows)) for number, name in enumerate(names))
        elif form == "open_clip" and ours == "head.weight":
            yield Part(names[0], ours, axes=(1, 0))
        elif form in ("open_clip", "hf_clip", "hf_siglip") and ours in ("cls_token", "pos_embed"):
            yield Part(names[0], ours, view=shape[2:] if ours == "cls_token" else shape[1:])
        else:
            yield Part(names[0], ours)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Google's npz: kernels the other way round, and heads apart
# ---------------------------------------------------------------------------------------------------------------------------------------

_NPZ_BLOCK = {
    "vision_transformer": {"norm2": "LayerNorm_2", "attn": "MultiHeadDotProductAttention_1", "mlp": "MlpBlock_3"},
    "big_vision": {"norm2": "LayerNorm_1", "attn": "MultiHeadDotProductAttention_0", "mlp": "MlpBlock_0"},
}


def _npz_parts(form: Format, model: ViTConfig, prefix: str) -> Iterator[Part]:
    D, K, R, heads = model.width, model.num_classes, model.representation_size, model.num_heads
    names = _NPZ_BLOCK["vision_transformer" if form == "vision_transformer" else "big_vision"]
    old = form == "vision_transformer"

    def norm(theirs: str, ours: str, at: int | None = None) -> Iterator[Part]:
        yield Part(f"{prefix}{theirs}/scale", f"{ours}.weight", at=at)
        yield Part(f"{prefix}{theirs}/bias", f"{ours}.bias", at=at)

    def dense(theirs: str, ours: str, at: int | None = None) -> Iterator[Part]:
        yield Part(f"{prefix}{theirs}/kernel", f"{ours}.weight", axes=(1, 0), at=at)
        yield Part(f"{prefix}{theirs}/bias", f"{ours}.bias", at=at)

    def attention(theirs: str, inputs: list[tuple[str, str, int]], out: str, at: int | None = None) -> Iterator[Part]:
        d = D // heads
        for name, ours, number in inputs:  # (D, D) as (heads, d, D) is theirs (D, heads, d)
            rows = (number * D, (number + 1) * D)
            yield Part(f"{prefix}{theirs}/{name}/kernel", f"{ours}.weight", rows, (heads, d, D), (2, 0, 1), at)
            yield Part(f"{prefix}{theirs}/{name}/bias", f"{ours}.bias", rows, (heads, d), at=at)
        yield Part(f"{prefix}{theirs}/out/kernel", f"{out}.weight", None, (D, heads, d), (1, 2, 0), at)
        yield Part(f"{prefix}{theirs}/out/bias", f"{out}.bias", at=at)

    if model.class_token:
        yield Part(f"{prefix}cls", "cls_token")
    if model.position == "learned_1d":
        yield Part(f"{prefix}Transformer/posembed_input/pos_embedding" if old else f"{prefix}pos_embedding", "pos_embed")
    yield Part(f"{prefix}embedding/kernel", "patch_embed.proj.weight", axes=(2, 3, 1, 0))
    yield Part(f"{prefix}embedding/bias", "patch_embed.proj.bias")
    for index in range(model.depth):
        ours, at = f"blocks.{index}", index if form == "big_vision_scan" else None
        theirs = "Transformer/encoderblock" + ("" if at is not None else f"_{index}")
        yield from norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1", at)
        inputs = [(name, f"{ours}.attn.qkv", number) for number, name in enumerate(("query", "key", "value"))]
        yield from attention(f"{theirs}/{names['attn']}", inputs, f"{ours}.attn.proj", at)
        yield from norm(f"{theirs}/{names['norm2']}", f"{ours}.norm2", at)
        yield from dense(f"{theirs}/{names['mlp']}/Dense_0", f"{ours}.mlp.fc1", at)
        yield from dense(f"{theirs}/{names['mlp']}/Dense_1", f"{ours}.mlp.fc2", at)
    yield from norm("Transformer/encoder_norm", "norm")
    if model.pool == "map":
        yield Part(f"{prefix}MAPHead_0/probe", "attn_pool.latent")
        inputs = [("query", "attn_pool.q", 0), ("key", "attn_pool.kv", 0), ("value", "attn_pool.kv", 1)]
        yield from attention("MAPHead_0/MultiHeadDotProductAttention_0", inputs, "attn_pool.proj")
        yield from norm("MAPHead_0/LayerNorm_0", "attn_pool.norm")
        yield from dense("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1")
        yield from dense("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2")
    if R:
        yield from dense("pre_logits", "pre_logits.fc")
    if K:
        yield from dense("head", "head")


# ---------------------------------------------------------------------------------------------------------------------------------------
# All of a model
# ---------------------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def parts(form: Format, model: ViTConfig, prefix: str = "") -> tuple[Part, ...]:
    """Where each tensor of a model lies in a format. Raises CheckpointError that names the first that has no place there.

    Args:
        prefix: what the file has before every name but a head's, as `vit.`, `visual.`, `params/`.
    """
    is_npz = form in ("big_vision", "big_vision_scan", "vision_transformer")
    found = tuple((_npz_parts if is_npz else _torch_parts)(form, model, prefix))
    shapes = parameter_shapes(model)
    covered = dict.fromkeys(shapes, 0)
    for part in found:
        if part.ours not in shapes:
            raise CheckpointError(f"{form} has {part.theirs}, which is no tensor of this model")
        covered[part.ours] += math.prod(part.rows_shape(shapes[part.ours]))
    for ours, shape in shapes.items():
        if covered[ours] != math.prod(shape) and not (form in HEADS_WITHOUT_BIAS and ours == "head.bias"):
            raise CheckpointError(f"{form} has no place for {ours}")
    return found


def file_shapes(form: Format, model: ViTConfig, prefix: str = "") -> dict[str, Shape]:
    """The tensors that a file of a model has, in the order of the model."""
    shapes, found = parameter_shapes(model), dict[str, Shape]()
    for part in parts(form, model, prefix):
        shape = part.shape(shapes[part.ours])
        if isinstance(part.at, int):
            found[part.theirs] = (model.depth, *shape)
        elif part.at:
            found[part.theirs] = (found.get(part.theirs, (0,))[0] + shape[0], *shape[1:])
        else:
            found[part.theirs] = shape
    return found


def to_file(form: Format, model: ViTConfig, prefix: str, read: Callable[[str, int, int], Tensor]) -> Callable[[str], Tensor]:
    """A file's tensors by their names, each made of what `read` gives: elements [start, start + length) of one of ours, flattened."""
    shapes = parameter_shapes(model)
    of: dict[str, list[Part]] = {}
    for part in parts(form, model, prefix):
        of.setdefault(part.theirs, []).append(part)

    def value(theirs: str) -> Tensor:
        made = []
        for part in of[theirs]:
            shape = part.rows_shape(shapes[part.ours])
            start = part.rows[0] * math.prod(shape[1:]) if part.rows else 0
            made.append(part.to_theirs(read(part.ours, start, math.prod(shape)).view(shape)))
        if isinstance(of[theirs][0].at, int):
            return torch.stack(made)
        return torch.cat(made) if len(made) > 1 else made[0]

    return value


def from_file(form: Format, model: ViTConfig, prefix: str, read: Callable[[str, int | None], Tensor]) -> Callable[[str], Tensor]:
    """Our tensors by their names, each made of those that `read` gives by their names in a file and places of their first axis."""
    shapes = parameter_shapes(model)
    of: dict[str, list[Part]] = {name: [] for name in shapes}
    for part in parts(form, model, prefix):
        of[part.ours].append(part)

    def value(ours: str) -> Tensor:
        whole = torch.zeros(shapes[ours])
        for part in of[ours]:
            theirs = read(part.theirs, part.at if isinstance(part.at, int) else None)
            rows = whole[slice(*part.rows)] if part.rows else whole
            rows.copy_(part.to_ours(theirs, part.rows_shape(shapes[ours])))
        return whole

    return value
