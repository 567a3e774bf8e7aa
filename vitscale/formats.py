"""How the field's formats name and lay out a ViT's tensors: which stretch of which of ours each of theirs is, both ways.

    Part           one tensor of a file, or some rows of it: rows of one of ours, seen in another shape and order of axes
    parts          all of them, for a format and a model
    file_shapes    the tensors that a file of a model has
    to_file        those tensors, made of ours          from_file    ours, made of those
    theirs_of      what a format of torch calls one of ours, from which `recognise.py` learns what a file's model is

Where it stands: `export.py` writes by it, `weights.py` reads by it. Pure functions of names and shapes; what
only other names or layouts can say is exact, so all that is here is. The names are in `families.py`, with where they are from.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitscale.config import Format, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.families import FAMILIES
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


def theirs_of(form: Format, ours: str, prefix: str = "", *, swiglu: bool = False) -> tuple[str, ...]:
    """The names that one of our tensors has in a format of torch, with what the file puts before them; none where it has no place."""
    family = FAMILIES[form]
    if family.head and ours.startswith("head."):
        return (ours.replace("head", family.head, 1),)
    names, block, template = {**family.names, **(family.gated if swiglu else {})}, "", ours
    if ours.startswith("blocks."):
        _, block, rest = ours.split(".", 2)
        template = f"blocks.{{}}.{rest}"
    stem, _, leaf = template.rpartition(".")
    if template in names:
        found, leaf = names[template], ""
    elif stem in names:
        found, leaf = names[stem], f".{leaf}"
    else:
        found, leaf = template if family.is_timms else (), ""
    return tuple(f"{prefix}{name.replace('{}', block)}{leaf}" for name in ((found,) if isinstance(found, str) else found))


def _torch_parts(form: Format, model: ViTConfig, prefix: str) -> Iterator[Part]:
    family, D, pooling = FAMILIES[form], model.width, f"{prefix}head.attention.in_proj_"
    for ours, shape in parameter_shapes(model).items():
        if form == "hf_siglip" and ours.startswith(("attn_pool.q.", "attn_pool.kv.")):  # torch's MultiheadAttention has the three in one
            of = (0, D) if ours.startswith("attn_pool.q.") else (D, 3 * D)
            yield Part(f"{pooling}{ours.rpartition('.')[2]}", ours, at=of)
            continue
        if ours == "head.bias" and not family.head_bias:
            continue
        names = theirs_of(form, ours, prefix, swiglu=model.mlp == "swiglu")
        if not names:
            raise CheckpointError(f"{form} has no place for {ours}")
        if len(names) > 1:
            rows = shape[0] // len(names)
            yield from (Part(name, ours, (number * rows, (number + 1) * rows)) for number, name in enumerate(names))
        elif form == "open_clip" and ours == "head.weight":
            yield Part(names[0], ours, axes=(1, 0))
        elif family.of_clip and ours in ("cls_token", "pos_embed"):
            yield Part(names[0], ours, view=shape[2:] if ours == "cls_token" else shape[1:])
        else:
            yield Part(names[0], ours)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Google's npz: kernels the other way round, and heads apart
# ---------------------------------------------------------------------------------------------------------------------------------------


def _npz_parts(form: Format, model: ViTConfig, prefix: str) -> Iterator[Part]:
    family, D, K, R, heads = FAMILIES[form], model.width, model.num_classes, model.representation_size, model.num_heads
    names = family.names

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
        yield Part(f"{prefix}{names['pos_embed']}", "pos_embed")
    yield Part(f"{prefix}embedding/kernel", "patch_embed.proj.weight", axes=(2, 3, 1, 0))
    yield Part(f"{prefix}embedding/bias", "patch_embed.proj.bias")
    for index in range(model.depth):
        ours, at = f"blocks.{index}", index if family.scanned else None
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
    family = FAMILIES[form]
    found = tuple((_npz_parts if family.is_npz else _torch_parts)(form, model, prefix))
    shapes = parameter_shapes(model)
    covered = dict.fromkeys(shapes, 0)
    for part in found:
        if part.ours not in shapes:
            raise CheckpointError(f"{form} has {part.theirs}, which is no tensor of this model")
        covered[part.ours] += math.prod(part.rows_shape(shapes[part.ours]))
    for ours, shape in shapes.items():
        if covered[ours] != math.prod(shape) and (family.head_bias or ours != "head.bias"):
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
