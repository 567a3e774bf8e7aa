"""Exports of small models with every option, for tests: which libraries have a place for it, and what is exported."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.vitscale.models import random_vit, write_checkpoint
from vitscale.adopt import adopt
from vitscale.config import ImportConfig, OptimizerConfig, PreprocessConfig, TrainConfig, ViTConfig, to_dict
from vitscale.export import export
from vitscale.model import ViT

SMALL = ViTConfig(depth=2, width=64, mlp_dim=160, num_heads=4, patch_size=8, image_size=(24, 40), num_classes=7)
SQUARE = replace(SMALL, image_size=(40, 40))
SQUASHED = PreprocessConfig(eval_crop=1.0, interpolation="bicubic", mean=(0.4, 0.5, 0.6))
OPTIONS = {
    "plain": SMALL,
    "one-class": replace(SMALL, num_classes=1),
    "21k-classes": replace(SMALL, depth=1, num_classes=21_843),
    "headless": replace(SMALL, num_classes=0),
    "tanh": replace(SMALL, activation="gelu_tanh"),
    "square": replace(SQUARE, activation="gelu_tanh"),
    "quick": replace(SMALL, activation="quick_gelu"),
    "epsilon-1e-5": replace(SMALL, layer_norm_eps=1e-5),
    "epsilon": replace(SMALL, layer_norm_eps=1e-3),
    "no-class-position": replace(SMALL, class_position=False),
    **{position: replace(SMALL, position=position, activation="gelu_tanh") for position in ("learned_2d", "relative", "sincos", "none")},
    "mean": replace(SQUARE, pool="mean", activation="gelu_tanh"),
    "mean-sincos": replace(SQUARE, pool="mean", position="sincos"),
    "mean-rectangle": replace(SMALL, pool="mean", activation="gelu_tanh"),
    "map": replace(SMALL, pool="map", activation="gelu_tanh"),
    "map-headless": replace(SQUARE, pool="map", activation="gelu_tanh", num_classes=0),
    "representation": replace(SMALL, representation_size=48, activation="gelu_tanh"),
    "representation-headless": replace(SMALL, representation_size=48, num_classes=0),
    "qk-norm": replace(SMALL, qk_norm=True, patch_dropout=0.5),
    "odd-mlp": replace(SMALL, width=704, mlp_dim=960, depth=1),  # 704 x (960 / 704) is less than 960 in floating point
    "mae": replace(SMALL, pool="mean_with_cls", pool_norm=True),
    "clip": replace(SMALL, pre_norm=True, layer_norm_eps=1e-5, activation="quick_gelu"),
    "registers": replace(SMALL, registers=3, layer_scale=1e-5),
    "dinov2": replace(SMALL, registers=3, layer_scale=1e-5, mlp="swiglu", class_position=False),
    "everything": replace(
        SMALL, registers=2, layer_scale=0.1, pre_norm=True, pool="map", pool_norm=True, qk_norm=True, representation_size=24
    ),
}  # fmt: skip
# Where a library has no place for an option, or computes it otherwise, and a word of the reason
REFUSED = {
    "timm": {
        "epsilon": "epsilon", "relative": "relative position", "representation": "representation layer",
        "representation-headless": "representation layer", "everything": "representation layer",
    },
    "hf": {
        "relative": "relative position", "mean-rectangle": "rectangular", "map": "head behind attention pooling",
        "representation": "representation layer before a head", "qk-norm": "normalised queries", "mae": "mean beside",
        "clip": "norm before", "registers": "registers", "dinov2": "SwiGLU", "everything": "LayerScale",
    },
    "npz": {
        **dict.fromkeys(("plain", "one-class", "21k-classes", "headless", "no-class-position", "mean-sincos", "odd-mlp", "quick"), "GELU"),
        "representation-headless": "GELU", "epsilon": "epsilon", "epsilon-1e-5": "epsilon", "relative": "relative",
        "qk-norm": "normalised queries", "mae": "mean beside", "clip": "norm before", "registers": "registers", "dinov2": "SwiGLU",
        "everything": "LayerScale",
    },
    "safetensors": {},
}  # fmt: skip
LIBRARIES = ("timm", "hf", "npz", "safetensors")


def exported(tmp_path: Path, model: ViT, to: Any, *, preprocess: PreprocessConfig = SQUASHED, **asked: Any) -> Path:
    description = write_checkpoint(tmp_path / "step-00000002", model, preprocess=preprocess)
    return export(description, "average", tmp_path / "out", to=to, **asked)


def taken_back(tmp_path: Path, out: Path, model: ViTConfig) -> Path:
    """The export's weights, imported as a stranger's: by their names, shapes and the JSON files beside them."""
    file = next(file for file in out.iterdir() if file.name in ("model.safetensors", "weights.npz"))
    said = ImportConfig()
    if not (out / "config.json").exists():
        said = ImportConfig(
            image_size=model.image_size, num_heads=model.num_heads, layer_norm_eps=model.layer_norm_eps,
            activation=None if model.mlp == "swiglu" else model.activation,
        )  # fmt: skip
    adopt(file, tmp_path / "back", said)
    return tmp_path / "back"


def holds(found: dict[str, Any]) -> None:
    assert found["holds"], found["lines"]
    assert found["differences"].pop("pixels") == 0
    assert {"features_BD", "tokens_BND", "image_features_BD", "image_tokens_BND"} <= found["differences"].keys()
    assert max(found["differences"].values()) < 1e-5, found["differences"]


def evaluated(run: Path) -> Path:
    """The checkpoint of a run, with an average of its weights, which was evaluated."""
    step = write_checkpoint(
        run / "checkpoints/step-00000002", random_vit(SMALL), average=random_vit(SMALL, seed=1), preprocess=SQUASHED
    ).path
    config = TrainConfig(out=str(run), recipe="r", model=SMALL, preprocess=SQUASHED, optimizer=OptimizerConfig(average_decay=0.9))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    dataset = {"path": "d", "name": "d", "hash": "h", "samples": 9}
    (run / "run.json").write_text(
        json.dumps({"format_version": 1, "dataset": dataset, "held_out": dataset, "total_steps": 2, "starts": []})
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 2, "eval_top1": 0.81, "eval_top5": 0.9, "eval_loss": 1.0, "eval_samples": 9}) + "\n"
    )
    return step


def summed_again(out: Path, name: str) -> None:
    """The line of a changed file in SHA256SUMS, as whoever changes it on purpose would have it."""
    fresh = subprocess.run(["sha256sum", name], cwd=out, capture_output=True, text=True, check=True).stdout.strip()
    lines = (out / "SHA256SUMS").read_text().splitlines()
    (out / "SHA256SUMS").write_text("".join(f"{fresh if line.endswith(f'  {name}') else line}\n" for line in lines))
