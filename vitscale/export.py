"""Export: the weights of a checkpoint as files that others load, written whole or not at all.

    OUT/model.safetensors   fp32 weights under timm's names
    OUT/vitscale.json       model, preprocessing, class names, clock: enough to use the weights, and what makes OUT a CHECKPOINT
    OUT/config.json         format timm: what `timm.create_model("local-dir:OUT", pretrained=True)` reads
    OUT/classes.txt         class names, one a line, where the dataset had them
    OUT/COMMIT.json         sizes and checksums

What a format cannot say exactly is refused. Position embeddings that timm's model lacks but can add up to the same (2-D, sin-cos, none) are
written as its learned ones.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale import checkpoint
from vitscale.checkpoint import CheckpointError, Description, Piece, TensorEntry
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.evaluate import load_model
from vitscale.model import grid_2d, sincos_2d

WEIGHTS_FILE = "model.safetensors"


def export(description: Description, kind: str, out: Path, *, to: str, headless: bool) -> Path:
    """Writes the folder `out`, which must not exist. Raises CheckpointError where the export would not be exact.

    Args:
        kind: `average` (where there is one) or `weight`.
        to: `timm` or `safetensors`.
        headless: leave out the head, and the representation layer before it.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; give a folder that does not")
    model = load_model(description, kind)
    weights = dict(model.state_dict())
    exported = model.config
    if headless or exported.num_classes == 0:
        exported = dataclasses.replace(exported, num_classes=0, representation_size=0)
        weights = {name: w for name, w in weights.items() if not name.startswith(("head.", "pre_logits."))}
    class_names = description.class_names if exported.num_classes else None
    if to == "timm":
        weights, exported = as_timm(weights, exported)
        if description.preprocess.eval_protocol != "timm":
            raise CheckpointError(
                f"timm does not evaluate by {description.preprocess.eval_protocol}'s protocol, so its figures would be others; "
                "--eval-protocol timm exports for timm's, --to safetensors keeps this one"
            )
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        checkpoint.write_tensors(hidden / WEIGHTS_FILE, {name: weight.contiguous() for name, weight in weights.items()})
        entries = (
            TensorEntry(name, checkpoint.WEIGHT, tuple(w.shape), (Piece(WEIGHTS_FILE, 0, w.numel()),)) for name, w in weights.items()
        )
        about = dataclasses.replace(description, model=exported, class_names=class_names, tensors=tuple(entries))
        checkpoint.write_description(hidden / checkpoint.EXPORT_DESCRIPTION, about)
        if class_names:
            (hidden / "classes.txt").write_text("".join(f"{name}\n" for name in class_names))
        if to == "timm":
            (hidden / "config.json").write_text(json.dumps(timm_config(exported, description.preprocess, class_names), indent=1) + "\n")
        checkpoint.publish(hidden, out, {file.name: checkpoint.file_checksum(file) for file in hidden.iterdir()})
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return out


def as_timm(weights: dict[str, Tensor], model: ViTConfig) -> tuple[dict[str, Tensor], ViTConfig]:
    """The tensors that timm's VisionTransformer has, and the config that they are now of. Raises CheckpointError."""
    if model.representation_size:
        raise CheckpointError(
            f"timm has no representation layer (this model's has {model.representation_size} features), so the head trained behind it "
            "cannot be exported to timm; --headless exports the backbone, --to safetensors everything"
        )
    if model.layer_norm_eps != 1e-6:
        raise CheckpointError(
            f"timm's LayerNorm has an epsilon of 1e-6, this model's is {model.layer_norm_eps:g}; --to safetensors exports this model"
        )
    if model.position == "relative":
        raise CheckpointError("timm's VisionTransformer has no relative position bias; --to safetensors exports this model")
    if model.position == "learned_1d":
        return weights, model
    if model.position == "learned_2d":
        positions_1ND = grid_2d(weights["pos_embed_rows"], weights["pos_embed_columns"])
    elif model.position == "sincos":
        positions_1ND = sincos_2d(model.grid, model.width)
    else:
        positions_1ND = torch.zeros(1, model.grid[0] * model.grid[1], model.width)
    if model.pool == "cls":  # in these the class token has no position
        positions_1ND = torch.cat([torch.zeros(1, 1, model.width), positions_1ND], dim=1)
    kept = {name: w for name, w in weights.items() if not name.startswith("pos_embed_")}
    return kept | {"pos_embed": positions_1ND}, dataclasses.replace(model, position="learned_1d")


def timm_config(model: ViTConfig, preprocess: PreprocessConfig, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    """config.json in the form of timm's hub models (timm/models/_hub.py)."""
    pool = {"cls": "token", "mean": "avg", "map": "map"}[model.pool]
    config: dict[str, Any] = {
        "architecture": "vit_base_patch16_224",  # any of timm's plain ViTs; model_args say the rest
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": {
            "img_size": list(model.image_size),
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": _mlp_ratio(model),
            "class_token": model.pool == "cls",
            "global_pool": pool,
            "fc_norm": False,  # ours normalises the tokens and then pools, as big_vision does
            "act_layer": model.activation,
            "qk_norm": model.qk_norm,
        },
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


def _mlp_ratio(model: ViTConfig) -> float:
    """What timm multiplies the width by and cuts to an integer: the quotient may fall short of it by a rounding, as 960 / 704 does."""
    ratio = model.mlp_dim / model.width
    return ratio if int(model.width * ratio) == model.mlp_dim else math.nextafter(ratio, math.inf)
