"""What the field's formats are, an entry each: what their files are known by, call otherwise than we do, and leave unsaid.

Where it stands: `formats.py` lays tensors out by it, `recognise.py` and `sidecars.py` tell by it what a file is. A new format is an entry
here with its names; what of its layout no other has is in `formats.py`, what may be left out of its files in `recognise.py`, what its JSON
files say in `sidecars.py`. Sources: timm/models/vision_transformer.py,
google-research/big_vision (models/vit.py) and vision_transformer (vit_jax/models_vit.py), transformers' modeling and configuration files,
facebookresearch/dinov2 and mae, openai/CLIP.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitscale.config import Activation, Format

INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "interpolation": "bicubic"}
CENTRAL = 0.999999  # an eval_crop of all of the short side, which 1, the whole image squashed, is not

# Our names, or their stems before `.weight` and `.bias`, to theirs; `{}` is the block. Several: rows of ours, evenly, one below another.
Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """A format, and what the models have in common whose files are of it."""

    kernel: str
    """The end of the name of the patches' kernel, by which a file is known, with what stands before all names."""
    has: frozenset[str] = frozenset()
    """Names that tell it from formats with the same kernel: all of these are there,"""
    some: frozenset[str] = frozenset()
    """at least one of these, if there are any,"""
    lacks: frozenset[str] = frozenset()
    """and none of these."""
    names: Names = field(default_factory=dict)
    """What it calls otherwise than we do; of npz the parts of a block, and the position embeddings."""
    gated: Names = field(default_factory=dict)
    """The same, where MLPs are SwiGLU's."""
    is_timms: bool = False
    """Whether what `names` has not is called as by us, which is timm's way, and a config.json beside it is timm's."""
    is_npz: bool = False
    """Google's: kernels the other way round, and heads apart."""
    scanned: bool = False
    """Whether all blocks lie in one tensor."""
    of_clip: bool = False
    """Whether a tower of text may lie beside, and class token and positions have no first axis."""
    head: str = ""
    """Of transformers' files: what the head is called, and nothing stands before it."""
    head_bias: bool = True
    """Whether the head has one; CLIP's projection has not."""
    config: Mapping[str, Any] | None = None
    """Of transformers' files: defaults of its configuration, which are left out of what it writes."""
    layer_norm_eps: float | None = 1e-6
    """That all have; None: it must be told."""
    activation: Activation | None = "gelu"
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    """That nearly all have; empty: nothing is known."""
    decoder: re.Pattern[str] | None = None
    """The names of MAE's decoder."""


_OPEN_CLIP: Names = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "head.weight": "proj",
    "blocks.{}.norm1": "transformer.resblocks.{}.ln_1",
    "blocks.{}.norm2": "transformer.resblocks.{}.ln_2",
    "blocks.{}.attn.qkv.weight": "transformer.resblocks.{}.attn.in_proj_weight",
    "blocks.{}.attn.qkv.bias": "transformer.resblocks.{}.attn.in_proj_bias",
    "blocks.{}.attn.proj": "transformer.resblocks.{}.attn.out_proj",
    "blocks.{}.mlp.fc1": "transformer.resblocks.{}.mlp.c_fc",
    "blocks.{}.mlp.fc2": "transformer.resblocks.{}.mlp.c_proj",
    "blocks.{}.ls1.gamma": "transformer.resblocks.{}.ls_1.gamma",
    "blocks.{}.ls2.gamma": "transformer.resblocks.{}.ls_2.gamma",
}
_HF: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pre_logits.fc": "pooler.dense",
    "blocks.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")),
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.output.dense",
}
_HF_VIT: Names = {
    **_HF,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
}
_HF_DINOV2: Names = {
    **_HF,
    "reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
_HF_CLIP: Names = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.mlp.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layers.{}.mlp.fc2",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_BIG_VISION: Names = {
    "norm2": "LayerNorm_1",
    "attn": "MultiHeadDotProductAttention_0",
    "mlp": "MlpBlock_0",
    "pos_embed": "pos_embedding",
}
_VISION_TRANSFORMER: Names = {
    "norm2": "LayerNorm_2",
    "attn": "MultiHeadDotProductAttention_1",
    "mlp": "MlpBlock_3",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
}
_DINOV2_ALONE = frozenset({"register_tokens", "blocks.0.mlp.w12.weight"})


def _hugging_face(kernel: str, names: Names, config: Mapping[str, Any], has: set[str], head: str = "classifier", **others: Any) -> Family:
    """A format of transformers, whose files do not say what their configuration says."""
    return Family(
        f"embeddings.{kernel}.weight", frozenset(has), names=names, config=config, head=head, layer_norm_eps=None, activation=None, **others
    )


def _google(block: str, names: Names, **others: Any) -> Family:
    """A format of npz."""
    has = f"Transformer/{block}/{names['mlp']}/Dense_0/kernel"
    return Family("embedding/kernel", frozenset({has}), names=names, is_npz=True, activation="gelu_tanh", **others)


FAMILIES: Mapping[Format, Family] = {
    "timm": Family(
        "patch_embed.proj.weight",
        lacks=_DINOV2_ALONE,
        is_timms=True,
        decoder=re.compile(r"decoder_(embed|blocks|norm|pred)\.|decoder_pos_embed$"),  # in MAE's own code (models_mae.py)
    ),
    "dinov2": Family(
        "patch_embed.proj.weight",
        some=_DINOV2_ALONE,
        names={"reg_token": "register_tokens"},
        gated={"blocks.{}.mlp.fc1": "blocks.{}.mlp.w12", "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3"},
        is_timms=True,
        preprocess=IMAGENET,
    ),
    "open_clip": Family(
        "conv1.weight",
        frozenset({"class_embedding", "transformer.resblocks.0.ln_1.weight"}),
        names=_OPEN_CLIP,
        of_clip=True,
        head_bias=False,
        layer_norm_eps=1e-5,
        activation=None,  # erf GELU, but QuickGELU for what OpenAI trained: no file says which
        preprocess=CLIP | {"eval_crop": CENTRAL},
    ),
    "hf_vit": _hugging_face(
        "patch_embeddings.projection",
        _HF_VIT,
        {"layer_norm_eps": 1e-12},
        has={"encoder.layer.0.layernorm_before.weight"},
        preprocess=INCEPTION | {"interpolation": "bilinear", "eval_crop": 1.0},  # ViTImageProcessor's own
    ),
    "hf_vit_mae": _hugging_face(
        "patch_embeddings.projection",
        _HF_VIT,
        {"layer_norm_eps": 1e-12},
        has={"encoder.layer.0.layernorm_before.weight"},
        preprocess=IMAGENET,
        decoder=re.compile(r"decoder\."),
    ),
    "hf_dinov2": _hugging_face(
        "patch_embeddings.projection",
        _HF_DINOV2,
        {"layer_norm_eps": 1e-6},
        has={"encoder.layer.0.layer_scale1.lambda1"},
        gated={"blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in", "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out"},
        preprocess=IMAGENET,
    ),
    "hf_siglip": _hugging_face(
        "patch_embedding",
        _HF_CLIP,
        {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
        has={"embeddings.position_embedding.weight"},
        lacks=frozenset({"embeddings.class_embedding"}),
        of_clip=True,
        preprocess=INCEPTION | {"interpolation": "bicubic", "eval_crop": 1.0},  # SiglipImageProcessor's own
    ),
    "hf_clip": _hugging_face(
        "patch_embedding",
        _HF_CLIP,
        {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        has={"embeddings.position_embedding.weight", "embeddings.class_embedding"},
        head="visual_projection",
        of_clip=True,
        head_bias=False,
        preprocess=CLIP | {"eval_crop": CENTRAL},
    ),
    "big_vision": _google("encoderblock_0", _BIG_VISION),
    "big_vision_scan": _google("encoderblock", _BIG_VISION, scanned=True),
    "vision_transformer": _google("encoderblock_0", _VISION_TRANSFORMER),
}
