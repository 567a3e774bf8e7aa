"""An export is the model: reloaded it gives the same bits, and timm, where it is installed, gives the same logits, gradients and pixels.

The tests marked `peers` need timm and run under `make peers`.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_tools.images import decode
from tests.vitscale.models import (
    cotangent,
    gradient_errors,
    gradients,
    random_images,
    random_vit,
    relative_error,
    write_checkpoint,
)
from vitscale.checkpoint import CheckpointError, describe, find_checkpoint, verify
from vitscale.config import PreprocessConfig, ViTConfig
from vitscale.evaluate import load_model
from vitscale.export import as_timm, export, timm_config
from vitscale.finetune import resample
from vitscale.images import evaluation_view
from vitscale.model import ViT, normalize
from vitscale.recipes import vit

SMALL = ViTConfig(depth=2, width=64, mlp_dim=160, num_heads=4, patch_size=8, image_size=(24, 40), num_classes=7)
POSITIONS = ("learned_1d", "learned_2d", "relative", "sincos", "none")
OPTIONS = {
    **{position: replace(SMALL, position=position) for position in POSITIONS},
    "mean": replace(SMALL, pool="mean"),
    "map": replace(SMALL, pool="map", activation="gelu_tanh"),
    "representation": replace(SMALL, representation_size=48),
    "epsilon": replace(SMALL, layer_norm_eps=1e-3),
    "qk-norm": replace(SMALL, qk_norm=True, patch_dropout=0.5),
}


def exported(tmp_path: Path, model: ViT, to: str, *, headless: bool = False, preprocess: PreprocessConfig | None = None) -> Path:
    description = write_checkpoint(tmp_path / "step-00000002", model, preprocess=preprocess)
    return export(description, "average", tmp_path / "out", to=to, headless=headless)


# ---------------------------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_a_reloaded_export_gives_the_same_bits(tmp_path: Path, option: str) -> None:
    model, images = random_vit(OPTIONS[option]), random_images(SMALL, 2)
    out = exported(tmp_path, model, "safetensors")
    again = load_model(describe(find_checkpoint(str(out))), "average")
    assert again.config == model.config
    assert torch.equal(again(images), model(images))
    assert load_file(out / "model.safetensors").keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("to", ["safetensors", "timm"])
@pytest.mark.parametrize("option", ["learned_1d", "map", "representation"])
def test_a_headless_export_gives_the_features_before_head_and_representation(tmp_path: Path, option: str, to: str) -> None:
    model, images = random_vit(OPTIONS[option]), random_images(SMALL, 2)
    out = exported(tmp_path, model, to, headless=True)
    again = load_model(describe(out), "weight")
    assert (again.config.num_classes, again.config.representation_size) == (0, 0)
    tokens = model.tokens(images)
    expected = model.attn_pool(tokens) if model.config.pool == "map" else tokens[:, 0]
    assert torch.equal(again(images), expected)
    assert not any(name.startswith(("head", "pre_logits")) for name in load_file(out / "model.safetensors"))


def test_a_model_without_a_head_exports_as_headless(tmp_path: Path) -> None:
    model, images = random_vit(replace(SMALL, num_classes=0)), random_images(SMALL, 2)
    again = load_model(describe(exported(tmp_path, model, "timm")), "weight")
    assert torch.equal(again(images), model(images))


def test_the_average_is_exported_where_there_is_one(tmp_path: Path) -> None:
    weight, average = random_vit(SMALL, seed=0), random_vit(SMALL, seed=1)
    description = write_checkpoint(tmp_path / "step", weight, average=average)
    images = random_images(SMALL, 2)
    for kind, model in (("average", average), ("weight", weight)):
        out = export(description, kind, tmp_path / kind, to="timm", headless=False)
        assert torch.equal(load_model(describe(out), "average")(images), model(images))


def test_an_export_says_what_it_is(tmp_path: Path) -> None:
    preprocess = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic", eval_crop=0.9)
    names = tuple(f"class {i}" for i in range(7))
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=preprocess, class_names=names)
    out = export(description, "average", tmp_path / "out", to="timm", headless=False)
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "vitscale.json", "config.json", "classes.txt", "COMMIT.json"}
    assert verify(out) is None
    again = describe(out)
    assert (again.model, again.preprocess, again.class_names, again.samples_seen, again.step) == (SMALL, preprocess, names, 4096, 2)
    assert (out / "classes.txt").read_text().splitlines() == list(names)
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == list(names)
    said = config["pretrained_cfg"]
    assert (said["mean"], said["std"], said["interpolation"], said["crop_pct"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic", 0.9)
    headless = export(description, "average", tmp_path / "headless", to="timm", headless=True)
    assert not (headless / "classes.txt").exists(), "without a head its classes mean nothing"


def test_a_folder_that_exists_is_refused_and_left(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists; give a folder that does not"):
        export(description, "weight", tmp_path / "out", to="timm", headless=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "reason"),
    [("relative", "no relative position bias"), ("representation", "no representation layer"), ("epsilon", "epsilon of 1e-6")],
)
def test_what_timm_cannot_say_is_refused_and_leaves_nothing(tmp_path: Path, option: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        exported(tmp_path, random_vit(OPTIONS[option]), "timm")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002"}


def test_a_failure_in_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("vitscale.checkpoint.write_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        exported(tmp_path, random_vit(SMALL), "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002"}


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned_2d", "sincos", "none"])
def test_positions_are_written_as_learned_ones_that_add_up_to_the_same(position: str, pool: str) -> None:
    model, images = random_vit(replace(SMALL, position=position, pool=pool)), random_images(SMALL, 2)
    weights, config = as_timm(dict(model.state_dict()), model.config)
    assert config == replace(model.config, position="learned_1d")
    baked = ViT(config).eval()
    baked.load_state_dict(weights, strict=True)
    assert torch.equal(baked(images), model(images))


# ---------------------------------------------------------------------------------------------------------------------------------------
# In timm
# ---------------------------------------------------------------------------------------------------------------------------------------

IN_TIMM = {
    "cls": SMALL,
    "mean": replace(SMALL, pool="mean"),
    "map": replace(SMALL, pool="map"),
    "map-tanh": replace(SMALL, pool="map", activation="gelu_tanh"),
    "tanh": replace(SMALL, activation="gelu_tanh"),
    "qk-norm": replace(SMALL, qk_norm=True, patch_dropout=0.5),
    "qk-norm-map": replace(SMALL, qk_norm=True, pool="map"),
    "one-class": replace(SMALL, num_classes=1),
    "headless": replace(SMALL, num_classes=0),
    "headless-mean": replace(SMALL, num_classes=0, pool="mean"),
    "odd-mlp": replace(SMALL, width=704, mlp_dim=960, depth=1),  # 704 x (960 / 704) is less than 960 in floating point
    "ti16": vit("ti16", num_classes=1000),
}


def in_timm(out: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{out}", pretrained=True).eval()


@pytest.mark.peers
@pytest.mark.parametrize("case", IN_TIMM)
def test_timm_gives_the_same_logits_and_gradients(tmp_path: Path, case: str) -> None:
    ours, images = random_vit(IN_TIMM[case]), random_images(IN_TIMM[case], 2)
    theirs = in_timm(exported(tmp_path, ours, "timm"))
    logits, their_logits = ours(images), theirs(images)
    assert relative_error(logits, their_logits) < 1e-5
    (logits * cotangent(logits)).sum().backward()
    (their_logits * cotangent(logits)).sum().backward()
    errors = gradient_errors(gradients(ours), gradients(theirs))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < (3e-5 if ours.config.depth == 12 else 1e-5), worst


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
@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned_2d", "sincos", "none"])
@torch.no_grad()
def test_timm_gives_the_same_logits_with_baked_positions(tmp_path: Path, position: str, pool: str) -> None:
    ours, images = random_vit(replace(SMALL, position=position, pool=pool)), random_images(SMALL, 2)
    theirs = in_timm(exported(tmp_path, ours, "timm"))
    assert relative_error(ours(images), theirs(images)) < 1e-5


@pytest.mark.peers
@torch.no_grad()
def test_timm_drops_head_and_representation_of_a_headless_export(tmp_path: Path) -> None:
    ours, images = random_vit(OPTIONS["representation"]), random_images(SMALL, 2)
    theirs = in_timm(exported(tmp_path, ours, "timm", headless=True))
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

    model = replace(SMALL, image_size=target, num_classes=0)
    preprocess = PreprocessConfig(mean=(0.4, 0.5, 0.6), interpolation=interpolation, eval_crop=eval_crop)  # type: ignore[arg-type]
    said = json.loads(json.dumps(timm_config(model, preprocess, None)))["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(pretrained_cfg=said), is_training=False)
    data = photograph(size)
    view = evaluation_view(data, target, preprocess)
    assert view.shape == (*target, 3)
    theirs = transform(decode(data))
    pixels = ((theirs * torch.tensor(preprocess.std)[:, None, None] + torch.tensor(preprocess.mean)[:, None, None]) * 255).permute(1, 2, 0)
    np.testing.assert_array_equal(pixels.round().byte().numpy(), view)
    torch.testing.assert_close(normalize(torch.from_numpy(view.copy())[None], preprocess)[0], theirs, rtol=1e-6, atol=1e-6)


def photograph(size: tuple[int, int]) -> bytes:
    """A JPEG of given width and height: smooth shapes and noise."""
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 12, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()
