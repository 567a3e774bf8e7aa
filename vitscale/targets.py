"""What the libraries that an export is for can say of a model: the form its tensors take, the files beside them, and what would be lost.

    target            a model and its preprocessing -> form, model as that library has it, JSON files, losses; or a refusal
    position_tensors  position embeddings and class token in that form

Where it stands: `export.py` asks here what to write. Pure functions. What another library computes otherwise is a `Loss`, which is refused
unless the user says `--lossy`; what it has no place for at all is refused in any case.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vitscale.config import Format, Library, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.model import grid_2d, sincos_2d


@dataclass(frozen=True)
class Loss:
    """Something that the other library does not compute as this model does."""

    what: Literal["preprocessing", "computation"]
    words: str


@dataclass(frozen=True)
class Target:
    """How a model is written for a library."""

    form: Format
    prefix: str
    weights: str
    """The file of the tensors."""
    model: ViTConfig
    """As that library has it."""
    sidecars: dict[str, dict[str, Any]]
    """JSON files beside it, by their names."""
    losses: tuple[Loss, ...] = ()


def target(
    to: Library, model: ViTConfig, preprocess: PreprocessConfig, class_names: Sequence[str] | None, *, multi_label: bool, bf16: bool
) -> Target:
    """How a model is written for a library. Raises CheckpointError where it has no place for it."""
    match to:
        case "timm":
            return _timm(model, preprocess, class_names)
        case "hf":
            return _hugging_face(model, preprocess, class_names, multi_label=multi_label, bf16=bf16)
        case "npz":
            return _npz(model, preprocess, bf16=bf16)
    return Target("timm", "", "model.safetensors", model, {})


def position_tensors(before: ViTConfig, after: ViTConfig, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The position embeddings of a model, and its class token, as another form of it has them: a table that adds up to the same.

    A class token and its position are one sum in every forward pass, so where the form has no such position the sum is the class token.
    """
    if (before.position, before.class_position) == (after.position, after.class_position):
        return {}
    position_11D = torch.zeros(1, 1, before.width)
    if before.position == "learned_1d":
        patches_1ND = read("pos_embed")
        if before.class_token and before.class_position:
            position_11D, patches_1ND = patches_1ND[:, :1], patches_1ND[:, 1:]
    elif before.position == "learned_2d":
        patches_1ND = grid_2d(read("pos_embed_rows"), read("pos_embed_columns"))
    elif before.position == "sincos":
        patches_1ND = sincos_2d(before.grid, before.width)
    else:
        patches_1ND = torch.zeros(1, before.grid[0] * before.grid[1], before.width)
    if not after.class_token:
        return {"pos_embed": patches_1ND}
    if after.class_position:
        return {"pos_embed": torch.cat([position_11D, patches_1ND], dim=1)}
    return {"pos_embed": patches_1ND, "cls_token": read("cls_token") + position_11D}


def _refuse(library: str, model: ViTConfig, *, lacks: dict[str, bool]) -> None:
    """Raises CheckpointError that names everything a library has no place for."""
    if missing := [words for words, there in lacks.items() if there]:
        head = ""
        if model.representation_size and any("representation" in words for words in missing):
            head = "--headless exports the backbone, "
        raise CheckpointError(f"{library} has no {', no '.join(missing)}; {head}--to safetensors exports this model as it is")


# ---------------------------------------------------------------------------------------------------------------------------------------
# timm (models/vision_transformer.py)
# ---------------------------------------------------------------------------------------------------------------------------------------


def _timm(model: ViTConfig, preprocess: PreprocessConfig, class_names: Sequence[str] | None) -> Target:
    _refuse("timm", model, lacks={
        f"representation layer (this model's has {model.representation_size} features, and its head was trained behind it)":
            model.representation_size > 0,
        "relative position bias in its VisionTransformer": model.position == "relative",
        "SwiGLU with attention pooling": model.mlp == "swiglu" and model.pool == "map",
    })  # fmt: skip
    after = replace(model, position="learned_1d")
    if model.registers and model.class_token:  # timm gives registers positions, unless it gives the class token none either
        after = replace(after, class_position=False)
    losses = _timm_losses(preprocess)
    eps = model.layer_norm_eps
    if eps not in (1e-6, 1e-5) or (model.mlp == "swiglu" and eps != 1e-6):
        losses += (Loss("computation", f"timm's LayerNorm has an epsilon of 1e-6 here, this model's is {model.layer_norm_eps:g}"),)
        eps = 1e-6
        after = replace(after, layer_norm_eps=eps)
    return Target("timm", "", "model.safetensors", after, {"config.json": timm_config(after, eps, preprocess, class_names)}, losses)


def _timm_losses(preprocess: PreprocessConfig) -> tuple[Loss, ...]:
    if preprocess.eval_protocol == "timm":
        return ()
    words = f"timm does not evaluate by {preprocess.eval_protocol}'s protocol, so its figures would be others"
    return (Loss("preprocessing", f"{words}; --eval-protocol timm exports for timm's, --to safetensors keeps this one"),)


def timm_config(model: ViTConfig, eps: float, preprocess: PreprocessConfig, class_names: Sequence[str] | None) -> dict[str, Any]:
    """config.json in the form of timm's hub models (timm/models/_hub.py).

    The architecture is one of timm's names, whose settings `model_args` override; what JSON cannot say (the epsilon, the kind of MLP) is
    what the choice of the name says.
    """
    architecture = "vit_base_patch16_224" if eps == 1e-6 else "vit_base_patch16_clip_224"
    args: dict[str, Any] = {"act_layer": model.activation}
    if model.mlp == "swiglu":
        architecture, args = "vit_giant_patch14_dinov2", {}
    args |= {
        "img_size": list(model.image_size), "patch_size": model.patch_size, "embed_dim": model.width, "depth": model.depth,
        "num_heads": model.num_heads, "mlp_ratio": _mlp_ratio(model), "class_token": model.class_token, "global_pool": timm_pool(model),
        "fc_norm": model.pool_norm,  # timm's default for means is another one
        "qk_norm": model.qk_norm, "init_values": model.layer_scale or None, "reg_tokens": model.registers,
        "no_embed_class": model.registers > 0 or not model.class_position, "pre_norm": model.pre_norm,
    }  # fmt: skip
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": timm_pool(model),
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, *model.image_size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.eval_crop,
            "crop_mode": "squash" if preprocess.eval_crop == 1 else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return config | ({"label_names": list(class_names)} if class_names else {})


def timm_pool(model: ViTConfig) -> str:
    """What timm calls a model's pooling."""
    return {"cls": "token", "mean": "avg", "mean_with_cls": "avg", "map": "map"}[model.pool]


def _mlp_ratio(model: ViTConfig) -> float:
    """What timm multiplies the width by and cuts to an integer: the quotient may fall short of it by a rounding, as 960 / 704 does."""
    hidden = model.mlp_dim * (2 if model.mlp == "swiglu" else 1)
    ratio = hidden / model.width
    return ratio if int(model.width * ratio) == hidden else math.nextafter(ratio, math.inf)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Hugging Face transformers, versions 4 and 5
# ---------------------------------------------------------------------------------------------------------------------------------------

_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def _hugging_face(
    model: ViTConfig, preprocess: PreprocessConfig, class_names: Sequence[str] | None, *, multi_label: bool, bf16: bool
) -> Target:
    """A class token is ViTForImageClassification's or ViTModel's; a mean or attention pool without one is SigLIP's tower."""
    siglip = model.pool in ("mean", "map")
    _refuse("transformers", model, lacks={
        "representation layer before a head": model.representation_size > 0 and model.num_classes > 0,
        "mean beside a class token in its ViT": model.pool == "mean_with_cls",
        "head behind attention pooling": model.pool == "map" and model.num_classes > 0,
        "LayerNorm of what is pooled": model.pool_norm,
        "registers in its ViT": model.registers > 0, "LayerScale in its ViT": model.layer_scale > 0,
        "SwiGLU in its ViT": model.mlp == "swiglu",
        "normalised queries and keys in its ViT": model.qk_norm, "norm before the blocks of its ViT": model.pre_norm,
        "relative position bias in its ViT": model.position == "relative",
        "rectangular images without a class token (its SigLIP)": siglip and model.image_size[0] != model.image_size[1],
    })  # fmt: skip
    after = replace(model, position="learned_1d", class_position=model.class_position or model.class_token)
    height, width = model.image_size
    config: dict[str, Any] = {
        "hidden_size": model.width, "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim, "hidden_act": _HF_ACTIVATIONS[model.activation], "layer_norm_eps": model.layer_norm_eps,
        "image_size": height if height == width else [height, width], "patch_size": model.patch_size, "num_channels": 3,
    }  # fmt: skip
    named: dict[str, Any] = {}
    if model.num_classes:
        names = list(class_names or (f"LABEL_{number}" for number in range(model.num_classes)))
        named = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in reversed(list(enumerate(names)))},
            # transformers takes one class alone for no single-label problem
            "problem_type": "multi_label_classification" if multi_label or model.num_classes == 1 else "single_label_classification",
        }
    dtype = {"torch_dtype": "bfloat16" if bf16 else "float32"}
    form: Format = "hf_siglip" if siglip else "hf_vit"
    if not siglip:
        sidecar = {
            "model_type": "vit", "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"], "qkv_bias": True,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config, **named, **dtype,
        }  # fmt: skip
        if model.representation_size:
            sidecar |= {"pooler_output_size": model.representation_size, "pooler_act": "tanh"}
        prefix = "vit." if model.num_classes else ""
    else:
        tower = config | {"model_type": "siglip_vision_model", "attention_dropout": 0.0, "vision_use_head": model.pool == "map"}
        if model.num_classes:
            sidecar = {"model_type": "siglip", "architectures": ["SiglipForImageClassification"], "vision_config": tower, **named, **dtype}
        else:
            sidecar = {**tower, "architectures": ["SiglipVisionModel"], **dtype}
        prefix = "vision_model."
    processor, losses = _hf_processor(model.image_size, preprocess)
    return Target(form, prefix, "model.safetensors", after, {"config.json": sidecar, "preprocessor_config.json": processor}, losses)


def _hf_processor(size: tuple[int, int], preprocess: PreprocessConfig) -> tuple[dict[str, Any], tuple[Loss, ...]]:
    """preprocessor_config.json, and what it cannot say."""
    height, width = size
    processor: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation], "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std), "size": {"height": height, "width": width},
    }  # fmt: skip
    if preprocess.eval_protocol != "timm":
        words = f"transformers does not evaluate by {preprocess.eval_protocol}'s protocol"
        return processor, (Loss("preprocessing", f"{words}; --eval-protocol timm exports for timm's, --to safetensors keeps this one"),)
    if preprocess.eval_crop == 1:
        return processor, ()
    short = math.floor(height / preprocess.eval_crop)
    processor |= {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "size": {"shortest_edge": short},
        "crop_size": {"height": height, "width": width},
    }
    if height != width:
        words = "transformers resizes the short side for a central crop, which for a rectangle is another crop than this model's"
    else:
        words = (
            "transformers rounds the place of a central crop down, so where the margin is an odd number of pixels it may lie one pixel off"
        )
    remedy = "an eval_crop of 1, the whole image squashed, is the same everywhere (--eval-crop 1 exports for that, with other figures)"
    return processor, (Loss("preprocessing", f"{words}; {remedy}"),)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Google's npz, as big_vision writes it (models/vit.py)
# ---------------------------------------------------------------------------------------------------------------------------------------


def _npz(model: ViTConfig, preprocess: PreprocessConfig, *, bf16: bool) -> Target:
    _refuse("big_vision's ViT", model, lacks={
        "registers": model.registers > 0, "LayerScale": model.layer_scale > 0, "SwiGLU": model.mlp == "swiglu",
        "normalised queries and keys": model.qk_norm, "norm before the blocks": model.pre_norm,
        "LayerNorm of what is pooled": model.pool_norm,
        "mean beside a class token": model.pool == "mean_with_cls", "relative position bias": model.position == "relative",
    })  # fmt: skip
    if bf16:
        raise CheckpointError("numpy's npz has no bf16; --dtype fp32 is what big_vision writes, too")
    losses = []
    if model.activation != "gelu_tanh":
        losses.append(
            Loss("computation", f"big_vision computes the tanh form of GELU (Flax's), this model was trained with {model.activation}")
        )
    if model.layer_norm_eps != 1e-6:
        losses.append(Loss("computation", f"big_vision's LayerNorm has an epsilon of 1e-6, this model's is {model.layer_norm_eps:g}"))
    after = replace(
        model,
        position="learned_1d",
        class_position=model.class_position and not model.class_token,
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
    )
    return Target("big_vision", "params/", "weights.npz", after, {}, tuple(losses))
