"""What a file of weights is that somebody else wrote: its format, the model that its tensors are of, and what goes with it.

Shapes tell nearly all of a model. What they do not (heads, the epsilon of LayerNorm, which GELU, the grid of a rectangle) is taken from the
JSON files that lie beside the weights, else from what the family of models has, which is then told (`Recognised.assumed`), else asked for.
Nothing is guessed in silence, for names that fit with numbers that do not are what goes wrong in the field.

`recognise` looks at names and shapes alone; every tensor of the file is one of the model's, or is left out for a reason that is known
(`Recognised.left_out`), or the file is refused with a table of what does not fit.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vitscale.check import check_bounds, check_model
from vitscale.config import UNREADABLE, ConfigError, Format, ImportConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.formats import Shape, file_shapes, theirs_of
from vitscale.tensorfiles import read_json

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "interpolation": "bicubic"}
CENTRAL = 0.999999  # an eval_crop of all of the short side, which 1, the whole image squashed, is not
MAE_DECODER = "of MAE's decoder"
MASK_TOKEN = "stands for hidden patches in pre-training"
# Heads by width: of ViT (arXiv 2010.11929, table 1), Ti and S (2106.10270), g and G (2106.04560), DINOv2's giant (dinov2/models)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
# Names of timm's plain ViTs, whose entry points set nothing that a file does not show but CLIP's epsilon (vision_transformer.py)
_TIMM_PLAIN = re.compile(
    r"(vit|deit|deit3)_(tiny|small|medium|base|large|huge|giant|gigantic)_patch\d+(_reg\d)?(_clip)?(_quickgelu)?(_gap)?(_dinov2)?(_\d+)?"
)


_MOST_MODELS = 64  # in one file
_MOST_PIXELS = 2**14  # of an image's side
# Of MAE's decoder, in its own code (models_mae.py) and in transformers
_OF_DECODER: Mapping[str, re.Pattern[str]] = {
    "timm": re.compile(r"decoder_(embed|blocks|norm|pred)\.|decoder_pos_embed$"), "hf_vit_mae": re.compile(r"decoder\."),
}  # fmt: skip


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
    """What the file does not say, and was taken for granted."""


def read_sidecars(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files that may lie beside weights and say what they are. Raises CheckpointError where one cannot be read."""
    found = {}
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found[name] = read_json(file)
        except UNREADABLE as error:
            raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def recognise(shapes: Mapping[str, Shape], said: Mapping[str, dict[str, Any]], asked: ImportConfig, where: str) -> Recognised:
    """What a file is, by the names and shapes of its tensors and what lies beside it.

    Args:
        said: of `read_sidecars`.
        where: what to call the file.

    Raises CheckpointError where it is no ViT that this program has, or not all of one, or does not say enough and neither is `asked`.
    """
    _check_asked(asked)
    form, prefix = find_form(shapes, said, asked.prefix, where)
    try:
        facts = _npz_facts(form, prefix, shapes) if "/" in _marker(form) else _torch_facts(form, prefix, shapes)
        model, assumed = _model(form, facts, said, asked)
        check_bounds(model)
        check_model(model)
    except UNREADABLE as error:
        raise CheckpointError(f"{where} looks like {form}'s and is not: {' '.join(str(error).split())[:300]}") from None
    if asked.headless:
        model = replace(model, num_classes=0, representation_size=0)
    expected = file_shapes(form, model, prefix)
    left_out: list[tuple[str, str]] = []
    problems: list[tuple[str, str]] = []
    for name, shape in shapes.items():
        if name not in expected:
            why = _why_left_out(form, prefix, name, asked, model)
            (left_out if why else problems).append((name, why or f"{_sides(shape)} has no place in the model"))
        elif shape != expected[name]:
            problems.append((name, f"has shape {_sides(shape)}, the model's has {_sides(expected[name])}"))
    problems += [(name, f"{_sides(shape)} is missing") for name, shape in expected.items() if name not in shapes]
    if problems:
        fit = sum(name in shapes and shapes[name] == shape for name, shape in expected.items())
        table = "".join(f"\n  {name:.80} {why}" for name, why in problems[:20]) + (
            f"\n  and {len(problems) - 20} more" * (len(problems) > 20)
        )
        heads = ("head", "classifier", "pre_logits", "pooler", "visual_projection", "proj")
        if not asked.headless and all(name.removeprefix(prefix).startswith(heads) for name, _ in problems):
            table += "\n  these are of the head; --headless takes up the rest without it"
        raise CheckpointError(
            f"{where} is {form}'s, but only {fit} of its {len(expected)} tensors fit the model, and nothing is read:{table}"
        )
    names, multi_label = _classes(said, model, where)
    is_metas = any(why in (MAE_DECODER, MASK_TOKEN) for _, why in left_out)
    preprocess, taken = _preprocess(form, is_metas, said, asked, where)
    return Recognised(form, prefix, model, preprocess, names, multi_label, tuple(left_out), (*assumed, *taken))


def _check_asked(asked: ImportConfig) -> None:
    """Raises ConfigError on what can be said of no file."""
    if asked.layer_norm_eps is not None and not 0 < asked.layer_norm_eps < 1:
        raise ConfigError(f"layer_norm_eps={asked.layer_norm_eps:g} must lie in (0, 1), as 1e-6 does")
    if asked.num_heads is not None and asked.num_heads < 1:
        raise ConfigError(f"num_heads={asked.num_heads} must be at least 1")
    if asked.eval_crop is not None and not 0.1 <= asked.eval_crop <= 1:
        raise ConfigError(f"eval_crop={asked.eval_crop:g} must lie in [0.1, 1]")
    for name, values in (("mean", asked.mean), ("std", asked.std)):
        if values is not None and not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"{name}={values} must lie in [0, 1], for pixels do; 114 of 255 is 0.447")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whose it is
# ---------------------------------------------------------------------------------------------------------------------------------------


def _marker(form: str) -> str:
    """The end of a name that only this format's files have, of the patches' kernel."""
    markers = {
        "timm": "patch_embed.proj.weight", "dinov2": "patch_embed.proj.weight", "open_clip": "conv1.weight",
        "hf_vit": "embeddings.patch_embeddings.projection.weight", "hf_vit_mae": "embeddings.patch_embeddings.projection.weight",
        "hf_dinov2": "embeddings.patch_embeddings.projection.weight", "hf_siglip": "embeddings.patch_embedding.weight",
        "hf_clip": "embeddings.patch_embedding.weight",
    }  # fmt: skip
    return markers.get(form, "embedding/kernel")


def find_form(shapes: Mapping[str, Shape], said: Mapping[str, dict[str, Any]], prefix: str | None, where: str) -> tuple[Format, str]:
    """The format of a file, and what stands before its names. Raises CheckpointError."""
    found: dict[str, Format] = {}
    for form in get_args(Format):
        marker = _marker(form)
        names = [name for name in shapes if name.endswith(marker) and (marker != "conv1.weight" or len(shapes[name]) == 4)]
        begins = [begin for name in names if not (begin := name.removesuffix(marker)) or begin[-1] in "./"]
        if prefix is not None:
            begins = [begin for begin in begins if begin == prefix]
        if len(begins) > _MOST_MODELS:
            raise CheckpointError(f"{where} holds {len(begins)} models; give a file of one")
        found |= {begin: form for begin in begins if _is_of(form, begin, shapes, said)}
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


def _is_of(form: Format, begin: str, shapes: Mapping[str, Shape], said: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a file whose patches' kernel has a format's name is of this format, and not of another that has the same."""
    has = {name.removeprefix(begin) for name in shapes if name.startswith(begin)}
    kind = str(said.get("config.json", {}).get("model_type", ""))
    match form:
        case "timm":
            return not has & {"register_tokens", "blocks.0.mlp.w12.weight"}
        case "dinov2":
            return bool(has & {"register_tokens", "blocks.0.mlp.w12.weight"})
        case "open_clip":
            return {"class_embedding", "transformer.resblocks.0.ln_1.weight"} <= has
        case "hf_vit_mae" | "hf_vit":
            mae = kind == "vit_mae" or any(name.startswith("decoder.decoder_layers") for name in shapes)
            return "encoder.layer.0.layernorm_before.weight" in has and mae == (form == "hf_vit_mae")
        case "hf_dinov2":
            return "encoder.layer.0.layer_scale1.lambda1" in has
        case "hf_siglip" | "hf_clip":
            return "embeddings.position_embedding.weight" in has and ("embeddings.class_embedding" in has) == (form == "hf_clip")
        case "vision_transformer":
            return "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in has
        case "big_vision":
            return "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel" in has
    return "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel" in has


def _why_left_out(form: Format, prefix: str, name: str, asked: ImportConfig, model: ViTConfig) -> str:
    """Why a tensor of a file is none of the model's, where that is known and right; else nothing."""
    inner, headless = name.removeprefix(prefix), asked.headless
    if inner == "mask_token" or inner == "embeddings.mask_token":
        return MASK_TOKEN
    if form in _OF_DECODER and _OF_DECODER[form].match(name if form == "hf_vit_mae" else inner):
        return MAE_DECODER
    is_head = name.startswith(("classifier", "visual_projection"))
    if form in ("open_clip", "hf_clip", "hf_siglip") and not name.startswith(prefix) and not is_head:
        return "not of the image tower"
    if asked.prefix and not name.startswith(prefix) and not is_head:
        return "not of the model that --prefix chooses"
    if name.endswith("position_ids"):
        return "numbers the positions"
    if headless and (is_head or inner == "proj" or (inner.startswith(("head", "pre_logits")) and not form.startswith("hf_"))):
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


@dataclass(frozen=True)
class _Facts:
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


def _torch_facts(form: Format, prefix: str, shapes: Mapping[str, Shape]) -> _Facts:
    """Raises ValueError, KeyError or IndexError where they make no sense."""

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
        raise ValueError(f"the kernel of its patches has shape {_sides(kernel)}, not (width x 3 x height x width of a patch)")
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
    return _Facts(
        depth, D, fc2[1], height, classes, hidden[0] if hidden else 0, position[-2] if position else None, class_token, pool,
        num_heads=D // q_norm[0] if q_norm else None, registers=registers[1] if registers else 0, layer_scale=there("blocks.0.ls1.gamma"),
        swiglu=gated, qk_norm=q_norm is not None, pre_norm=there("norm_pre.weight"), pool_norm=pool_norm,
    )  # fmt: skip


def _npz_facts(form: Format, prefix: str, shapes: Mapping[str, Shape]) -> _Facts:
    """Raises ValueError, KeyError or IndexError where they make no sense."""
    kernel = shapes[f"{prefix}embedding/kernel"]
    if len(kernel) != 4:
        raise ValueError(f"the kernel of its patches has shape {_sides(kernel)}, not (height x width of a patch x 3 x width)")
    height, width, channels, D = kernel
    if channels != 3 or height != width:
        raise ValueError(f"patches are {height} x {width} pixels of {channels} channels, not square ones of 3")
    scan, old = form == "big_vision_scan", form == "vision_transformer"
    block = f"{prefix}Transformer/encoderblock" + ("" if scan else "_0")
    query = shapes[f"{block}/MultiHeadDotProductAttention_{1 if old else 0}/query/kernel"][scan:]
    fc1 = shapes[f"{block}/MlpBlock_{3 if old else 0}/Dense_0/kernel"][scan:]
    if scan:
        depth = shapes[f"{block}/LayerNorm_0/scale"][0]
    else:
        depth = next(number for number in itertools.count() if f"{prefix}Transformer/encoderblock_{number}/LayerNorm_0/scale" not in shapes)
    position = shapes.get(f"{prefix}Transformer/posembed_input/pos_embedding" if old else f"{prefix}pos_embedding")
    class_token, latent = f"{prefix}cls" in shapes, f"{prefix}MAPHead_0/probe" in shapes
    head, hidden = shapes.get(f"{prefix}head/kernel"), shapes.get(f"{prefix}pre_logits/kernel")
    return _Facts(
        depth, D, fc1[1], height, head[1] if head else 0, hidden[1] if hidden else 0, position[-2] if position else None, class_token,
        "map" if latent else "cls" if class_token else "mean", num_heads=query[1],
    )  # fmt: skip


def _model(form: Format, facts: _Facts, said: Mapping[str, dict[str, Any]], asked: ImportConfig) -> tuple[ViTConfig, list[str]]:
    """The model, and what was taken for granted of it. Raises ValueError where what is needed is not known."""
    assumed: list[str] = []
    told, family = _told(form, facts, said, headless=asked.headless), _family(form)

    def settle(name: str, default: Any, of: str, remedy: str) -> Any:
        for value in (getattr(asked, name), told.get(name)):
            if value is not None:
                return value
        if default is None or told.get("unknown"):
            raise ValueError(f"{name} is not in the file{told.get('unknown', '')}; {remedy}")
        assumed.append(f"{name} {'x'.join(map(str, default)) if isinstance(default, tuple) else default} ({of})")
        return default

    heads = facts.num_heads or settle("num_heads", _HEADS.get(facts.width), f"as a width of {facts.width} has", "--num-heads says it")
    eps = settle("layer_norm_eps", family["layer_norm_eps"], f"{form}'s", "--layer-norm-eps says it")
    swiglu = facts.swiglu
    activation: Any = "gelu" if swiglu else settle("activation", family["activation"], f"{form}'s", "--activation says it")
    pool = asked.pool or told.get("pool") or facts.pool
    registers_placed = form == "timm" and facts.registers > 0
    position = asked.position or told.get("position") or "learned_1d"
    if facts.positions is None and position not in ("sincos", "none"):
        raise ValueError("it has no position embeddings; --position says whether they are computed (sincos, as big_vision's) or none")
    if facts.positions is not None and position in ("sincos", "none"):
        raise ValueError(f"position={position}, and the file has {facts.positions} position embeddings")
    grid, class_position = _grid(facts, asked.image_size or told.get("image_size"), registers_placed)
    if facts.class_token and class_position is told.get("no_class_position"):
        raise ValueError(
            f"config.json says no_embed_class={class_position}, and the class token has {'a' if class_position else 'no'} position"
        )
    if facts.representation_size and form.startswith("hf_"):
        assumed.append("the layer before the head (a pooler) belongs to the features; --headless leaves it out")
    if facts.positions is not None and not (asked.image_size or told.get("image_size")):
        assumed.append(f"image_size {grid[0] * facts.patch_size}x{grid[1] * facts.patch_size} (a square)")
    model = ViTConfig(
        depth=facts.depth, width=facts.width, mlp_dim=facts.mlp_dim, num_heads=heads, patch_size=facts.patch_size,
        image_size=(grid[0] * facts.patch_size, grid[1] * facts.patch_size), num_classes=facts.num_classes, pool=pool,
        position=position if facts.positions is None else "learned_1d", class_position=class_position, registers=facts.registers,
        representation_size=facts.representation_size, qk_norm=facts.qk_norm, layer_scale=1e-5 if facts.layer_scale else 0.0,
        mlp="swiglu" if swiglu else "plain", activation=activation, pre_norm=facts.pre_norm, pool_norm=facts.pool_norm, layer_norm_eps=eps,
    )  # fmt: skip
    if model.class_token != facts.class_token:
        raise ValueError(f"pool={pool} needs a class token" if model.class_token else f"pool={pool} has no place for the class token")
    return model, assumed


def _grid(facts: _Facts, image_size: tuple[int, int] | None, registers_placed: bool) -> tuple[tuple[int, int], bool]:
    """The grid of patches, and whether the class token has a position. Raises ValueError where they do not follow."""
    p = facts.patch_size
    if facts.positions is None:
        if image_size is None:
            raise ValueError("image_size is not in the file, which has no position embeddings; --image-size says it")
        return (image_size[0] // p, image_size[1] // p), True
    found = []
    for classes in {facts.class_token, False}:
        patches = facts.positions - classes
        if image_size is None:
            side = math.isqrt(patches)
            if side * side == patches:
                found.append(((side, side), bool(classes)))
        elif image_size[0] // p * (image_size[1] // p) == patches:
            found.append(((image_size[0] // p, image_size[1] // p), bool(classes)))
    if registers_placed and not found:
        raise ValueError(
            f"{facts.positions} position embeddings with {facts.registers} registers: registers with positions are not known here"
        )
    if len(found) != 1:
        of = f"an image of {image_size[0]}x{image_size[1]}" if image_size else "a square image"
        raise ValueError(
            f"{facts.positions} position embeddings are not those of {of} in patches of {p}; --image-size HEIGHT WIDTH says of which"
        )
    return found[0][0], found[0][1] or not facts.class_token


def _family(form: Format) -> dict[str, Any]:
    """What models of a format have that no file says."""
    if form == "open_clip":
        return {"layer_norm_eps": 1e-5, "activation": None}  # erf GELU, but QuickGELU for what OpenAI trained: no file says which
    if form.startswith("hf_"):
        return {"layer_norm_eps": None, "activation": None}
    if form in ("big_vision", "big_vision_scan", "vision_transformer"):
        return {"layer_norm_eps": 1e-6, "activation": "gelu_tanh"}
    return {"layer_norm_eps": 1e-6, "activation": "gelu"}


def _told(form: Format, facts: _Facts, said: Mapping[str, dict[str, Any]], *, headless: bool) -> dict[str, Any]:
    """What the JSON files beside the weights say of the model. Raises what `UNREADABLE` names, where it is not what the shapes say, too."""
    config = said.get("config.json", {})
    if form == "open_clip":
        clip = said.get("open_clip_config.json", {}).get("model_cfg", {})
        return _told_by_open_clip(facts, clip, clip["vision_cfg"]) if clip else {}
    if form.startswith("hf_") and config:
        kind, architectures = config.get("model_type"), config.get("architectures") or [""]
        if str(architectures[0]).endswith("ForImageClassification") and not (facts.num_classes or headless):
            raise ValueError(f"config.json says {architectures[0]!r:.50}, and there is no classifier")
        config = config.get("vision_config", config)
        if config.get("qkv_bias", True) is not True:
            raise ValueError("qkv_bias is false; queries, keys and values of ours have a bias")
        hidden = round(facts.width * config["mlp_ratio"]) if form == "hf_dinov2" and "mlp_ratio" in config else None
        if hidden and facts.swiglu:
            hidden = (hidden * 2 // 3 + 7) // 8 * 8  # Dinov2SwiGLUFFN
        _agree("config.json", config, {
            "hidden_size": facts.width, "num_hidden_layers": facts.depth, "patch_size": facts.patch_size, "num_channels": 3,
            "num_register_tokens": facts.registers, "use_swiglu_ffn": facts.swiglu,
        } | ({} if form == "hf_dinov2" else {"intermediate_size": facts.mlp_dim}))  # fmt: skip
        if hidden and hidden != facts.mlp_dim:
            raise ValueError(f"config.json says mlp_ratio={config['mlp_ratio']!r:.50}, and the MLPs have {facts.mlp_dim} features")
        # Defaults of transformers' configs, which are left out of what it writes
        heads = config.get("num_attention_heads", {"hf_siglip": 12, "hf_clip": 12}.get(form))
        eps = config.get(
            "layer_norm_eps",
            {"hf_siglip": 1e-6, "hf_clip": 1e-5, "hf_dinov2": 1e-6}.get(form, 1e-12 if kind in ("vit", "vit_mae") else None),
        )
        act = config.get("hidden_act", {"hf_siglip": "gelu_pytorch_tanh", "hf_clip": "quick_gelu"}.get(form, "gelu"))
        if act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act is {act!r:.50}; {', '.join(_ACTIVATIONS)} are known")
        if config.get("pooler_act", "tanh") != "tanh":
            raise ValueError(f"pooler_act is {config['pooler_act']!r:.50}, and ours is tanh")
        size = config.get("image_size", {"hf_dinov2": 224}.get(form, 224))
        return {
            "num_heads": _count("num_attention_heads", heads), "layer_norm_eps": None if eps is None else float(eps),
            "activation": _ACTIVATIONS[act], "image_size": _pair(size),
        }  # fmt: skip
    if form in ("timm", "dinov2") and "architecture" in config:
        return _told_by_timm(facts, config, config.get("model_args") or {}, config.get("pretrained_cfg") or config, headless=headless)
    return {}


def _agree(file: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError where a file says another value than the tensors do."""
    for name, value in found.items():
        if name in said and (said[name] if said[name] is not None else value) != value:
            raise ValueError(f"{file} says {name}={said[name]!r:.50}, and the tensors are those of {name}={value}")


def _told_by_open_clip(facts: _Facts, clip: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip_config.json says; its settings are those of open_clip/model.py's CLIPVisionCfg."""
    found = {"width": facts.width, "layers": facts.depth, "patch_size": facts.patch_size, "pool_type": "tok"}
    _agree("open_clip_config.json", vision, found)
    _agree("open_clip_config.json", clip, {"embed_dim": facts.num_classes} if facts.num_classes else {})
    if other := sorted(name for name in ("act_kwargs", "norm_kwargs", "attentional_pool", "timm_model_name") if vision.get(name)):
        raise ValueError(f"open_clip_config.json says {other[0]}={vision[other[0]]!r:.50}, which is not known here")
    return {
        "num_heads": facts.width // (_count("head_width", vision.get("head_width")) or 64),
        "activation": "quick_gelu" if clip.get("quick_gelu") else "gelu",
        "image_size": _pair(vision.get("image_size")),
    }


# Settings of timm's VisionTransformer that change nothing in evaluation, and those that are looked at here
_TIMM_IDLE = {"dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate",
              "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "strict_img_size", "pretrained"}  # fmt: skip
_TIMM_READ = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "global_pool", "fc_norm", "qk_norm",
              "init_values", "reg_tokens", "no_embed_class", "pre_norm", "act_layer", "norm_layer", "num_classes", "in_chans", "qkv_bias",
              "pos_embed", "num_features"}  # fmt: skip


def _told_by_timm(
    facts: _Facts, config: Mapping[str, Any], args: Mapping[str, Any], cfg: Mapping[str, Any], *, headless: bool
) -> dict[str, Any]:  # fmt: skip
    """What timm's config.json says: a name, what changes its settings, and what the weights were trained with."""
    architecture, told = str(config["architecture"]), dict[str, Any]()
    if "_rpn_" in architecture:
        raise ValueError(f"timm's {architecture:.60} has its norms behind the branches, which ours has not; no tensor shows it")
    if unknown := sorted(args.keys() - _TIMM_IDLE - _TIMM_READ):
        raise ValueError(f"model_args say {unknown[0]:.50}={args[unknown[0]]!r:.50}, which is not known here")
    said = {name: config[name] for name in ("num_classes", "num_features", "global_pool") if name in config} | dict(args)
    found = {
        "embed_dim": facts.width, "num_features": facts.width, "depth": facts.depth, "patch_size": facts.patch_size, "in_chans": 3,
        "class_token": facts.class_token, "reg_tokens": facts.registers, "qk_norm": facts.qk_norm, "pre_norm": facts.pre_norm,
        "fc_norm": facts.pool_norm, "qkv_bias": True,
    }  # fmt: skip
    _agree("config.json", said, found if headless else found | {"num_classes": facts.num_classes})
    if "mlp_ratio" in said and int(facts.width * said["mlp_ratio"]) != facts.mlp_dim * (2 if facts.swiglu else 1):
        raise ValueError(f"config.json says mlp_ratio={said['mlp_ratio']!r:.50}, and the MLPs have {facts.mlp_dim} features")
    if "init_values" in said and bool(said["init_values"]) != facts.layer_scale:
        raise ValueError(
            f"config.json says init_values={said['init_values']!r:.50}, and there is {'a' if facts.layer_scale else 'no'} LayerScale"
        )
    if pooled := said.get("global_pool"):
        pools = {"token": "cls", "avg": "mean_with_cls" if facts.class_token else "mean", "map": "map"}
        if pooled not in pools or (pooled == "map") != (facts.pool == "map") or (pooled == "token" and not facts.class_token):
            raise ValueError(f"config.json says global_pool={pooled!r:.50}, which the tensors are not for")
        told["pool"] = pools[pooled]
    told["position"] = said.get("pos_embed")
    told["no_class_position"] = said.get("no_embed_class")
    if "input_size" in cfg and "img_size" not in args:
        told["image_size"] = _pair(cfg["input_size"][1:])
    if "img_size" in args:
        told["image_size"] = _pair(args["img_size"])
    if "num_heads" in args:
        told["num_heads"] = _count("num_heads", args["num_heads"])
    if not _TIMM_PLAIN.fullmatch(architecture):
        told["unknown"] = f", and timm's {architecture} is none whose settings are known here"
        if "act_layer" not in args:
            return told
    told["layer_norm_eps"] = 1e-5 if "_clip" in architecture else 1e-6
    act = args.get("act_layer", "quick_gelu" if "quickgelu" in architecture else "gelu")
    if act not in _ACTIVATIONS:
        raise ValueError(f"act_layer is {act!r:.50}; {', '.join(_ACTIVATIONS)} are known")
    told["activation"] = _ACTIVATIONS[act]
    if "norm_layer" in args:
        raise ValueError(f"norm_layer is {args['norm_layer']!r:.50}, which timm's own name does not have")
    return told


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if not (type(height) is type(width) is int and min(height, width) > 0 and max(height, width) <= _MOST_PIXELS):
        raise ValueError(f"an image of {size!r:.50} pixels cannot be")
    return height, width


def _count(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} is {value!r:.50}, and not a number of things")
    return value


# ---------------------------------------------------------------------------------------------------------------------------------------
# What goes with it
# ---------------------------------------------------------------------------------------------------------------------------------------


def _classes(said: Mapping[str, dict[str, Any]], model: ViTConfig, where: str) -> tuple[tuple[str, ...] | None, bool]:
    """Names of the classes where they are told, and whether several may be right at once. Raises CheckpointError."""
    config = said.get("config.json", {})
    labels = config.get("id2label") or config.get("label_names")
    names: tuple[str, ...] | None = None
    if isinstance(labels, dict) and all(str(number) in labels for number in range(model.num_classes)):
        names = tuple(str(labels[str(number)]) for number in range(model.num_classes))
        names = None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
    elif isinstance(labels, list) and len(labels) == model.num_classes:
        names = tuple(map(str, labels))
    if labels and model.num_classes and len(labels) != model.num_classes:
        raise CheckpointError(f"{where}: config.json names {len(labels)} classes, and the head has {model.num_classes}")
    if names:
        names = tuple(" ".join(name.split()) for name in names)  # they are written a line each
    return names if model.num_classes else None, config.get("problem_type") == "multi_label_classification"


def _preprocess(
    form: Format, is_metas: bool, said: Mapping[str, dict[str, Any]], asked: ImportConfig, where: str
) -> tuple[PreprocessConfig, list[str]]:
    """What turns an image into the model's input, as the files beside the weights say, else as the family has it; and what was taken so.

    Raises CheckpointError.
    """
    of_family: dict[str, dict[str, Any]] = {
        "dinov2": IMAGENET, "hf_dinov2": IMAGENET, "hf_vit_mae": IMAGENET,
        "open_clip": CLIP | {"eval_crop": CENTRAL}, "hf_clip": CLIP | {"eval_crop": CENTRAL},
    }  # fmt: skip
    told: dict[str, Any] = IMAGENET if is_metas else of_family.get(form, {})
    assumed = ["ImageNet's" if is_metas else "its family's" if told else "vitscale's own"]
    config, processor = said.get("config.json", {}), said.get("preprocessor_config.json", {})
    try:
        if "pretrained_cfg" in config or ("architecture" in config and "mean" in config):
            cfg = config.get("pretrained_cfg", config)
            told, assumed = _timm_views(cfg), []
        elif "image_mean" in processor and form.startswith("hf_"):
            told, assumed = _processor_views(processor), []
        elif clip := said.get("open_clip_config.json", {}).get("preprocess_cfg", {}):
            told, assumed = _clip_views(clip), []
        told |= {f.name: value for f in fields(PreprocessConfig) if (value := getattr(asked, f.name, None)) is not None}
        found = PreprocessConfig(**told)
        if not (
            len(found.mean) == len(found.std) == 3
            and min(found.std) > 0
            and found.interpolation in ("bilinear", "bicubic")
            and 0.1 <= found.eval_crop <= 1
        ):
            raise ValueError(f"mean {found.mean}, std {found.std}, {found.interpolation}, crop {found.eval_crop} make no preprocessing")
    except UNREADABLE as error:
        raise CheckpointError(
            f"{where}: what lies beside the weights says no preprocessing ({' '.join(str(error).split())[:200]})"
        ) from None
    if assumed and asked.mean is None:
        assumed = [
            f"preprocessing ({assumed[0]}: mean {found.mean}, deviation {found.std}, {found.interpolation}, crop {found.eval_crop:g})"
        ]
    return found, assumed


def _timm_views(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's pretrained_cfg says of preprocessing. Raises what `UNREADABLE` names."""
    crop, mode = float(cfg.get("crop_pct") or 0.875), cfg.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "squash" and crop != 1):
        raise ValueError(f"crop_mode {mode!r:.50} with crop_pct {crop:g}, which is not known here; --eval-crop says another")
    found = {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg.get("interpolation", "bicubic")}
    return found | {"eval_crop": 1.0 if mode == "squash" else min(CENTRAL, crop)}


def _processor_views(processor: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' preprocessor_config.json says. Raises what `UNREADABLE` names, also where it is no preprocessing of ours."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(name, True) is not True:
            raise ValueError(f"{name} is {processor[name]!r:.50}, and images here are resized, divided by 255 and normalised")
    if abs(processor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"rescale_factor is {processor['rescale_factor']!r:.50}, and not 1/255")
    found = {"mean": tuple(processor["image_mean"]), "std": tuple(processor["image_std"]), "eval_crop": 1.0}
    found["interpolation"] = {2: "bilinear", 3: "bicubic"}[processor.get("resample", 2)]
    if processor.get("do_center_crop"):
        size, crop = processor.get("size"), processor.get("crop_size")
        short = size.get("shortest_edge") if isinstance(size, dict) else size  # a plain number is the older way to say it
        side = crop.get("height") if isinstance(crop, dict) else crop
        if not (isinstance(short, int) and isinstance(side, int) and 0 < side <= short):
            raise ValueError(f"size {size!r:.80} with a central crop of {crop!r:.80} is not known here; --eval-crop says another")
        found["eval_crop"] = min(CENTRAL, side / (short + 0.5))  # so that rounding down gives the very side that is resized to
    return found


def _clip_views(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's preprocess_cfg says. Raises what `UNREADABLE` names."""
    mode = clip.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize_mode is {mode!r:.50}; shortest and squash are known here")
    found = {"mean": tuple(clip.get("mean", CLIP["mean"])), "std": tuple(clip.get("std", CLIP["std"]))}
    return found | {"interpolation": clip.get("interpolation", "bicubic"), "eval_crop": 1.0 if mode == "squash" else CENTRAL}


def _sides(shape: Shape) -> str:
    return f"({' x '.join(map(str, shape))})"
