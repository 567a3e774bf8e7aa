"""What a library can say of a model, what is lost, and positions in another form (`targets.py`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.images import decode
from tests.vitscale.exports import SMALL, SQUARE
from tests.vitscale.models import photograph, random_images, random_vit, write_checkpoint
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.images import evaluation_view
from vitscale.model import ViT, normalize
from vitscale.targets import position_tensors, timm_config


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


@pytest.mark.peers
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("target", [(224, 224), (96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (333, 1000), (257, 256)], ids=str)
def test_timm_sees_the_same_pixels(size: tuple[int, int], target: tuple[int, int], eval_crop: float, interpolation: str) -> None:
    from timm.data import create_transform, resolve_data_config

    model = replace(SMALL, image_size=target, num_classes=0)
    preprocess = PreprocessConfig(mean=(0.4, 0.5, 0.6), interpolation=interpolation, eval_crop=eval_crop)  # type: ignore[arg-type]
    said = json.loads(json.dumps(timm_config(model, 1e-6, preprocess, None)))["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(pretrained_cfg=said), is_training=False)
    data = photograph(size)
    view = evaluation_view(data, target, preprocess)
    assert view.shape == (*target, 3)
    theirs = transform(decode(data))
    pixels = ((theirs * torch.tensor(preprocess.std)[:, None, None] + torch.tensor(preprocess.mean)[:, None, None]) * 255).permute(1, 2, 0)
    np.testing.assert_array_equal(pixels.round().byte().numpy(), view)
    torch.testing.assert_close(normalize(torch.from_numpy(view.copy())[None], preprocess)[0], theirs, rtol=1e-6, atol=1e-6)
