"""What a library can say of a model, what is lost, and positions in another form (`targets.py`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vitscale.exports import SMALL, SQUARE
from tests.vitscale.models import random_images, random_vit, write_checkpoint
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.model import ViT
from vitscale.targets import position_tensors


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned_1d", "learned_2d", "sincos", "none"])
@pytest.mark.parametrize("class_position", [True, False])
def test_positions_add_up_to_the_same_in_another_form(class_position: bool, position: str, pool: str) -> None:
    model = random_vit(replace(SMALL, position=position, pool=pool))
    images, weights = random_images(SMALL, 2), dict(model.state_dict())
    after = replace(model.config, position="learned_1d", class_position=class_position)
    made = position_tensors(model.config, after, weights.__getitem__)
    baked = ViT(after).eval()
    baked.load_state_dict({name: w for name, w in weights.items() if not name.startswith("pos_embed_")} | made, strict=True)
    assert torch.equal(baked(images), model(images))


@pytest.mark.parametrize(
    ("to", "model", "preprocess", "reason"),
    [
        ("hf", SQUARE, PreprocessConfig(), "one pixel off"),
        ("hf", SMALL, PreprocessConfig(), "rectangle"),
        ("hf", SMALL, PreprocessConfig(eval_crop=1.0, eval_protocol="paper"), "paper's protocol"),
        ("timm", SMALL, PreprocessConfig(eval_protocol="big_vision"), "big_vision's protocol"),
        ("npz", SMALL, PreprocessConfig(), "tanh form of GELU"),
    ],
)
def test_a_lossy_export_is_refused_or_says_what_is_lost(
    tmp_path: Path, to: Any, model: ViTConfig, preprocess: PreprocessConfig, reason: str
) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(model), preprocess=preprocess)
    with pytest.raises(CheckpointError, match=reason) as refused:
        export(description, "weight", tmp_path / "out", to=to)
    assert "--lossy" in str(refused.value)
    out = export(description, "weight", tmp_path / "out", to=to, lossy=True)
    assert reason in (out / "README.md").read_text()
    losses = json.loads((out / "certificate/certificate.json").read_text())["losses"]
    assert [reason in loss["words"] for loss in losses] == [True]
