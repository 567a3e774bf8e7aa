"""What a file of weights is that somebody else wrote: its format, the model that its tensors are of, and what goes with it.

Shapes tell nearly all of a model. What they do not (heads, the epsilon of LayerNorm, which GELU, the grid of a rectangle) is what the user
says, else what the JSON files beside the weights state, else what the family of models has, which is then told (`Recognised.assumed`), else
it is asked for; a word of the user's that the tensors contradict is refused.
Nothing is guessed in silence, for names that fit with numbers that do not are what goes wrong in the field.

`recognise` looks at names and shapes alone; every tensor of the file is one of the model's, or is left out for a reason that is known
(`Recognised.left_out`), or the file is refused with a table of what does not fit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from vitscale.anatomy import Facts, facts_of, sides
from vitscale.check import check_bounds, check_model, crop_problem
from vitscale.config import UNREADABLE, Activation, ConfigError, Format, ImportConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.families import FAMILIES
from vitscale.formats import Shape, file_shapes
from vitscale.sidecars import Sidecars, read_classes, read_model, read_preprocess

MAE_DECODER = "of MAE's decoder"
MASK_TOKEN = "stands for hidden patches in pre-training"
# Heads by width: of ViT (arXiv 2010.11929, table 1), Ti and S (2106.10270), g and G (2106.04560), DINOv2's giant (dinov2/models)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_MOST_MODELS = 64  # in one file


@dataclass(frozen=True)
class Recognised:
    """What a file of weights is."""

    form: Format
    prefix: str
    """Before the names of the model's tensors in the file."""
    model: ViTConfig
    preprocess: PreprocessConfig
    class_names: tuple[str, ...] | None
    multi_label: bool
    """Whether the head is one of sigmoids."""
    left_out: tuple[tuple[str, str], ...]
    """Tensors of the file that are not the model's, and why."""
    assumed: tuple[str, ...]
    """What the tensors do not tell, and where it was taken from, unless the files beside them say it."""


def recognise(shapes: Mapping[str, Shape], sidecars: Sidecars, overrides: ImportConfig, where: str) -> Recognised:
    """What a file is, by the names and shapes of its tensors and what lies beside it.

    Args:
        overrides: what the user says of it.
        where: what to call the file.

    Raises CheckpointError where it is no ViT that this program has, or not all of one, or does not say enough, with `overrides`.
    """
    _check_overrides(overrides)
    form, prefix = find_form(shapes, sidecars, overrides.prefix, where)
    try:
        model, assumed = _model(form, facts_of(form, prefix, shapes), sidecars, overrides, where)
        check_bounds(model)
        check_model(model)
    except UNREADABLE as error:
        raise CheckpointError(f"{where} looks like {form}'s and is not: {' '.join(str(error).split())[:300]}") from None
    if overrides.headless:
        model = replace(model, num_classes=0, representation_size=0)
    expected = file_shapes(form, model, prefix)
    left_out: list[tuple[str, str]] = []
    problems: list[tuple[str, str]] = []
    for name, shape in shapes.items():
        if name not in expected:
            why = _why_left_out(form, prefix, name, overrides, model)
            (left_out if why else problems).append((name, why or f"{sides(shape)} has no place in the model"))
        elif shape != expected[name]:
            problems.append((name, f"has shape {sides(shape)}, the model's has {sides(expected[name])}"))
    problems += [(name, f"{sides(shape)} is missing") for name, shape in expected.items() if name not in shapes]
    if problems:
        fit = sum(name in shapes and shapes[name] == shape for name, shape in expected.items())
        table = "".join(f"\n  {name:.80} {why}" for name, why in problems[:20]) + (
            f"\n  and {len(problems) - 20} more" * (len(problems) > 20)
        )
        heads = ("head", "classifier", "pre_logits", "pooler", "visual_projection", "proj")
        if not overrides.headless and all(name.removeprefix(prefix).startswith(heads) for name, _ in problems):
            table += "\n  these are of the head; --headless takes up the rest without it"
        raise CheckpointError(
            f"{where} is {form}'s, but only {fit} of its {len(expected)} tensors fit the model, and nothing is read:{table}"
        )
    class_names, multi_label = read_classes(sidecars, model, where)
    is_metas = any(why in (MAE_DECODER, MASK_TOKEN) for _, why in left_out)
    preprocess, taken = read_preprocess(form, is_metas, sidecars, overrides, where)
    return Recognised(form, prefix, model, preprocess, class_names, multi_label, tuple(left_out), (*assumed, *taken))


def _check_overrides(overrides: ImportConfig) -> None:
    """Raises ConfigError on what can be said of no file."""
    if overrides.layer_norm_eps is not None and not 0 < overrides.layer_norm_eps < 1:
        raise ConfigError(f"layer_norm_eps={overrides.layer_norm_eps:g} must lie in (0, 1), as 1e-6 does")
    if overrides.image_size is not None and min(overrides.image_size) < 1:
        raise ConfigError(f"image_size={overrides.image_size} must be at least 1 pixel a side; 224 224 is")
    if overrides.num_heads is not None and overrides.num_heads < 1:
        raise ConfigError(f"num_heads={overrides.num_heads} must be at least 1")
    if overrides.eval_crop is not None and (problem := crop_problem(overrides.eval_crop, "eval_crop")):
        raise ConfigError(problem)
    if overrides.std is not None and min(overrides.std) <= 0:
        raise ConfigError(f"std={overrides.std} must be above 0; 0.5 0.5 0.5 is")
    for name, values in (("mean", overrides.mean), ("std", overrides.std)):
        if values is not None and not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"{name}={values} must lie in [0, 1], for pixels do; 114 of 255 is 0.447")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whose it is
# ---------------------------------------------------------------------------------------------------------------------------------------


def find_form(shapes: Mapping[str, Shape], sidecars: Sidecars, prefix: str | None, where: str) -> tuple[Format, str]:
    """The format of a file, and what stands before its names. Raises CheckpointError."""
    found: dict[str, Format] = {}
    for form, family in FAMILIES.items():
        kernel = family.kernel
        kernels = [name for name in shapes if name.endswith(kernel) and (kernel != "conv1.weight" or len(shapes[name]) == 4)]
        begins = [begin for name in kernels if not (begin := name.removesuffix(kernel)) or begin[-1] in "./"]
        if prefix is not None:
            begins = [begin for begin in begins if begin == prefix]
        if len(begins) > _MOST_MODELS:
            raise CheckpointError(f"{where} holds {len(begins)} models; give a file of one")
        found |= {begin: form for begin in begins if _is_of(form, begin, shapes, sidecars)}
    if len(found) == 1:
        begin, form = next(iter(found.items()))
        return form, begin
    if found:
        some = ", ".join(f"{begin!r:.60}" for begin in list(found)[:5]) + (", ..." if len(found) > 5 else "")
        raise CheckpointError(f"{where} holds {len(found)} models, whose names begin with {some}; --prefix chooses one")
    some = ", ".join(f"{name:.60}" for name in list(shapes)[:3])
    raise CheckpointError(
        f"{where} is no ViT of timm, Hugging Face, DINOv2, MAE, open_clip or Google's npz: its {len(shapes)} tensors are called {some}, ..."
    )


def _is_of(form: Format, begin: str, shapes: Mapping[str, Shape], sidecars: Sidecars) -> bool:
    """Whether a file whose patches' kernel has a format's name is of this format, and not of another that has the same."""
    family, names = FAMILIES[form], {name.removeprefix(begin) for name in shapes if name.startswith(begin)}
    if form in ("hf_vit", "hf_vit_mae"):  # one encoder
        has_decoder = any(name.startswith("decoder.decoder_layers") for name in shapes)
        is_mae = has_decoder or sidecars.get("config.json", {}).get("model_type") == "vit_mae"
        if is_mae != (form == "hf_vit_mae"):
            return False
    return family.has <= names and not names & family.lacks and (not family.some or bool(names & family.some))


def _why_left_out(form: Format, prefix: str, name: str, overrides: ImportConfig, model: ViTConfig) -> str:
    """Why a tensor of a file is none of the model's, where that is known and right; else nothing."""
    family, inner, headless = FAMILIES[form], name.removeprefix(prefix), overrides.headless
    if inner == "mask_token" or inner == "embeddings.mask_token":
        return MASK_TOKEN
    if family.decoder and family.decoder.match(name if family.head else inner):
        return MAE_DECODER
    is_head = name.startswith(("classifier", "visual_projection"))
    if family.of_clip and not name.startswith(prefix) and not is_head:
        return "not of the image tower"
    if overrides.prefix and not name.startswith(prefix) and not is_head:
        return "not of the model that --prefix chooses"
    if name.endswith("position_ids"):
        return "numbers the positions"
    if headless and (is_head or inner == "proj" or (inner.startswith(("head", "pre_logits")) and not family.head)):
        return "of the head, which is not wanted"
    if headless and inner.startswith("pooler."):
        return "of the layer before the head, which is not wanted"
    if form == "hf_siglip" and model.pool == "mean" and inner.startswith("head."):
        return "of attention pooling, which the classifier does not see"
    if form == "dinov2" and inner.startswith("dino_head"):
        return "of the pre-training objective"
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------------
# Its model
# ---------------------------------------------------------------------------------------------------------------------------------------


def _model(form: Format, facts: Facts, sidecars: Sidecars, overrides: ImportConfig, where: str) -> tuple[ViTConfig, list[str]]:
    """The model, and what was taken for granted of it.

    Raises CheckpointError where the user's word is not what the tensors have, or where something is said nowhere, and ValueError where the
    files beside the weights say what the tensors do not have.
    """
    _check_said(facts, overrides, where)
    stated, family = read_model(form, facts, sidecars, headless=overrides.headless), FAMILIES[form]
    said_size: tuple[int, int] | None = overrides.image_size or stated.get("image_size")
    grids = _grids(facts, said_size)
    if form == "timm" and facts.registers and facts.positions and not grids:
        raise ValueError(
            f"{facts.positions} position embeddings with {facts.registers} registers: registers with positions are not known here"
        )
    settled, assumed = _settle(form, facts, stated, overrides, where)
    if said_size and not grids:
        raise ValueError(f"an image of {said_size[0]}x{said_size[1]} is said, and there are {facts.positions} position embeddings")
    grid, class_position = grids[0]
    if facts.class_token and class_position is stated.get("no_class_position"):
        raise ValueError(
            f"config.json says no_embed_class={class_position}, and the class token has {'a' if class_position else 'no'} position"
        )
    if facts.representation_size and family.head:
        assumed.append("the layer before the head (a pooler) belongs to the features; --headless leaves it out")
    size = (grid[0] * facts.patch_size, grid[1] * facts.patch_size)
    if said_size is None:
        assumed.append(f"image_size {size[0]}x{size[1]} (a square)")
    elif said_size != size:
        assumed.append(f"image_size {size[0]}x{size[1]} ({said_size[0]}x{said_size[1]} is said, of which patches leave out the rest)")
    pool = overrides.pool or stated.get("pool") or facts.pool
    model = ViTConfig(
        depth=facts.depth, width=facts.width, mlp_dim=facts.mlp_dim, num_heads=settled.num_heads, patch_size=facts.patch_size,
        image_size=size, num_classes=facts.num_classes, pool=pool,
        position=settled.position, class_position=class_position, registers=facts.registers,
        representation_size=facts.representation_size, qk_norm=facts.qk_norm, layer_scale=1e-5 if facts.layer_scale else 0.0,
        mlp="swiglu" if facts.swiglu else "plain", activation=settled.activation, layer_norm_eps=settled.layer_norm_eps,
        pre_norm=facts.pre_norm, pool_norm=facts.pool_norm,
    )  # fmt: skip
    if model.class_token != facts.class_token:
        raise ValueError(f"pool={pool} needs a class token" if model.class_token else f"pool={pool} has no place for the class token")
    return model, assumed


def _check_said(facts: Facts, overrides: ImportConfig, where: str) -> None:
    """Raises CheckpointError where the user's word is not what the tensors have."""
    if facts.num_heads and overrides.num_heads not in (None, facts.num_heads):
        raise CheckpointError(f"{where} has {facts.num_heads} heads by its tensors; leave --num-heads {overrides.num_heads} out")
    if overrides.num_heads and facts.width % overrides.num_heads:
        usual = f"; {_HEADS[facts.width]} is usual" if facts.width in _HEADS else ""
        raise CheckpointError(f"{where} has a width of {facts.width}, which --num-heads {overrides.num_heads} does not divide{usual}")
    if facts.swiglu and overrides.activation:
        raise CheckpointError(f"{where} has SwiGLU's MLPs, whose gate is SiLU; leave --activation {overrides.activation} out")
    if facts.positions is not None and overrides.position:
        raise CheckpointError(f"{where} has {facts.positions} learned position embeddings; leave --position {overrides.position} out")
    if overrides.pool and (overrides.pool in ("cls", "mean_with_cls")) != facts.class_token:
        raise CheckpointError(f"{where} has {'a' if facts.class_token else 'no'} class token; leave --pool {overrides.pool} out")
    size, p = overrides.image_size, facts.patch_size
    is_multiple = size is None or not any(side % p for side in size)
    if size and not (is_multiple and _grids(facts, size)):
        near = [tuple(max(1, (side + more) // p) * p for side in size) for more in (0, p - 1)]
        near += [(side * p, side * p) for (side, _), _ in _grids(facts, None)]
        fit = [f"{height} {width}" for height, width in dict.fromkeys(near) if _grids(facts, (height, width))]
        works = f"; {' or '.join(fit)} works" if fit else ""
        said, tokens = " ".join(map(str, size)), f"{facts.positions} position embeddings and patches of {p} pixels"
        if is_multiple:
            raise CheckpointError(f"{where} has {tokens}, which are not those of --image-size {said}{works}")
        raise CheckpointError(f"{where} has patches of {p} pixels, of which a side of --image-size {said} is no multiple{works}")


class _Settled(NamedTuple):
    """What shapes do not tell of a model."""

    num_heads: int
    layer_norm_eps: float
    activation: Activation
    position: Literal["learned_1d", "sincos", "none"]


def _settle(form: Format, facts: Facts, stated: Mapping[str, Any], overrides: ImportConfig, where: str) -> tuple[_Settled, list[str]]:
    """What shapes seldom tell: what the user says, else what the files beside the weights state, else what the family has.

    Also returns what was taken for granted so. Raises CheckpointError, of all at once, where nobody says something.
    """
    assumed: list[str] = []
    asked: dict[str, str] = {}  # what is said nowhere, and the flag that says it

    def settle(name: str, default: Any, of: str = "", values: str = "") -> Any:
        said, beside = getattr(overrides, name), stated.get(name)
        if said is not None and beside not in (None, said):
            assumed.append(f"{name} {said} (as said; the JSON beside the weights says {beside})")
        for value in (said, beside):
            if value is not None:
                return value
        if default is None or stated.get("unknown"):
            asked[name] = f"--{name.replace('_', '-')}{values}"
        else:
            assumed.append(f"{name} {default} ({of})")
        return default

    family = FAMILIES[form]
    heads: int = facts.num_heads or settle("num_heads", _HEADS.get(facts.width), f"as a width of {facts.width} has")
    eps: float = settle("layer_norm_eps", family.layer_norm_eps, f"{form}'s")
    activation: Activation = "gelu" if facts.swiglu else settle("activation", family.activation, f"{form}'s")  # SwiGLU looks at none
    position: Literal["learned_1d", "sincos", "none"] = "learned_1d"
    if facts.positions is None:
        position = settle("position", None, values=" sincos (computed, as big_vision's) or none")
    if not _grids(facts, None) or overrides.image_size:
        settle("image_size", None, values=" HEIGHT WIDTH")
    if overrides.pool and stated.get("pool") not in (None, overrides.pool):
        assumed.append(f"pool {overrides.pool} (as said; the JSON beside the weights says {stated['pool']})")
    if asked:
        raise CheckpointError(
            f"{where} is {form}'s; {' and '.join(asked)} {'is' if len(asked) == 1 else 'are'} not in the file{stated.get('unknown', '')}; "
            f"{' and '.join(asked.values())} {'says it' if len(asked) == 1 else 'say them'}"
        )
    return _Settled(heads, eps, activation, position), assumed


def _grids(facts: Facts, image_size: tuple[int, int] | None) -> list[tuple[tuple[int, int], bool]]:
    """The grids of patches that the position embeddings can be those of, and whether the class token has one of them.

    Of an image of (height, width) pixels there is one at most; without a size they are squares. Where positions are computed, any size is.
    """
    if image_size:
        height, width = (side // facts.patch_size for side in image_size)
        if facts.positions is None:
            return [((height, width), True)]
    if facts.positions is None:
        return []
    found = []
    for classes in {facts.class_token, False}:
        patches = facts.positions - classes
        if not image_size:
            height = width = math.isqrt(max(patches, 0))
        if height * width == patches > 0:
            found.append(((height, width), classes or not facts.class_token))
    return found
