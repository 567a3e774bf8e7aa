"""timm beside this program: gradients, a published size, resampled positions, pixels (under `make peers`)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.vitscale.exports import OPTIONS, SMALL, exported
from tests.vitscale.models import (
    cotangent,
    gradient_errors,
    gradients,
    photograph,
    random_images,
    random_vit,
    relative_error,
)
from vitscale.checkpoint import describe
from vitscale.config import PreprocessConfig
from vitscale.finetune import resample
from vitscale.images import evaluation_view
from vitscale.model import normalize
from vitscale.recipes import vit
from vitscale.targets import timm_config
from vitscale.weights import load_model


@pytest.mark.peers
@pytest.mark.parametrize("case", ["plain", "mean", "map", "tanh", "qk-norm", "headless", "dinov2", "clip", "mae"])
def test_timm_gives_the_same_gradients(tmp_path: Path, case: str) -> None:
    import timm

    ours = random_vit(replace(OPTIONS[case], patch_dropout=0.0))
    out = exported(tmp_path, ours, "timm")
    exact, images = load_model(describe(out), "weight"), random_images(ours.config, 2)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    logits, their_logits = exact(images), theirs(images)
    assert relative_error(logits, their_logits) < 1e-5
    (logits * cotangent(logits)).sum().backward()
    (their_logits * cotangent(logits)).sum().backward()
    errors = gradient_errors(gradients(exact), gradients(theirs))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, worst


@pytest.mark.peers
@pytest.mark.parametrize("variant", ["b16"])
def test_timm_gives_the_same_logits_at_a_published_size(tmp_path: Path, variant: str) -> None:
    """And under timm's own name for it, strictly: the tensors are those that timm's model of that name has."""
    import timm

    ours = random_vit(vit(variant, num_classes=1000))
    out = exported(tmp_path, ours, "timm")
    theirs = timm.create_model("vit_base_patch16_224").eval()
    theirs.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    with torch.no_grad():
        images = random_images(ours.config, 2)
        assert relative_error(ours(images), theirs(images)) < 1e-5


@pytest.mark.peers
@torch.no_grad()
def test_timm_drops_head_and_representation_of_a_headless_export(tmp_path: Path) -> None:
    import timm

    ours, images = random_vit(OPTIONS["representation"]), random_images(SMALL, 2)
    theirs = timm.create_model(f"local-dir:{exported(tmp_path, ours, 'timm', headless=True)}", pretrained=True).eval()
    assert relative_error(ours.tokens(images)[:, 0], theirs(images)) < 1e-5
    assert theirs.reset_classifier(3) is None
    assert theirs(images).shape == (2, 3), "ready to be fine-tuned"


@pytest.mark.peers
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("new", [(12, 12), (3, 10), (5, 6), (2, 4)], ids=str)
def test_our_resampling_named_timm_is_timms(pool: str, new: tuple[int, int]) -> None:
    from timm.layers import resample_abs_pos_embed

    old = replace(SMALL, image_size=(40, 48), pool=pool)  # 5 x 6 patches; 3 x 10 are as many
    embeddings = random_vit(old).pos_embed.detach()
    wanted = replace(old, image_size=(new[0] * 8, new[1] * 8))
    theirs = resample_abs_pos_embed(embeddings, list(new), [5, 6], num_prefix_tokens=int(pool == "cls"))
    assert torch.equal(resample("pos_embed", embeddings, old, wanted, "timm"), theirs)


@pytest.mark.peers
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("target", [(224, 224), (96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (333, 1000), (257, 256)], ids=str)
def test_timm_sees_the_same_pixels(size: tuple[int, int], target: tuple[int, int], eval_crop: float, interpolation: str) -> None:
    from timm.data import create_transform, resolve_data_config

    from data_tools.images import decode

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
