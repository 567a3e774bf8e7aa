"""An export is the model: in this program to the bit, and in each library within rounding, from what lies in the folder alone.

`exported/verify.py`, which every export has a copy of, is what loads an export here, so that what users run is tested. timm is there under
`make peers`; transformers is there in version 5, and in version 4 beside it.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vitscale.models import (
    cotangent,
    gradient_errors,
    gradients,
    photograph,
    random_images,
    random_vit,
    relative_error,
    write_checkpoint,
)
from vitscale.adopt import adopt
from vitscale.checkpoint import describe, verify
from vitscale.config import ImportConfig, ObjectiveConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.exported.verify import replay
from vitscale.finding import find_checkpoint
from vitscale.finetune import resample
from vitscale.images import evaluation_view
from vitscale.model import ViT, normalize, parameter_shapes
from vitscale.recipes import vit
from vitscale.targets import position_tensors, timm_config
from vitscale.verification import verify_export
from vitscale.weights import load_model, read_weights

SMALL = ViTConfig(depth=2, width=64, mlp_dim=160, num_heads=4, patch_size=8, image_size=(24, 40), num_classes=7)
SQUARE = replace(SMALL, image_size=(40, 40))
SQUASHED = PreprocessConfig(eval_crop=1.0, interpolation="bicubic", mean=(0.4, 0.5, 0.6))
OPTIONS = {
    "plain": SMALL,
    "one-class": replace(SMALL, num_classes=1),
    "21k-classes": replace(SMALL, depth=1, num_classes=21_843),
    "headless": replace(SMALL, num_classes=0),
    "tanh": replace(SMALL, activation="gelu_tanh"),
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
TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


def exported(tmp_path: Path, model: ViT, to: Any, *, preprocess: PreprocessConfig = SQUASHED, **asked: Any) -> Path:
    description = write_checkpoint(tmp_path / "step-00000002", model, preprocess=preprocess)
    return export(description, "average", tmp_path / "out", to=to, **asked)


def taken_back(tmp_path: Path, out: Path, model: ViTConfig) -> Path:
    """The export's weights, imported as a stranger's: by their names, shapes and the JSON files beside them."""
    file = next(file for file in out.iterdir() if file.name in ("model.safetensors", "weights.npz"))
    said = ImportConfig()
    if not (out / "config.json").exists():
        said = ImportConfig(
            image_size=model.image_size, num_heads=model.num_heads, activation=model.activation, layer_norm_eps=model.layer_norm_eps
        )
    adopt(file, tmp_path / "back", said)
    return tmp_path / "back"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Every option, for every library
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LIBRARIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_exported_exactly_or_refused(tmp_path: Path, option: str, to: str) -> None:
    """What is written gives the same logits here, as a CHECKPOINT and taken back as a stranger's file; what is refused leaves nothing."""
    model = random_vit(OPTIONS[option])
    if reason := REFUSED[to].get(option):
        with pytest.raises(CheckpointError, match=reason):
            exported(tmp_path, model, to)
        assert {path.name for path in tmp_path.iterdir()} == {"step-00000002"}
        return
    out, images = exported(tmp_path, model, to), random_images(model.config, 2)
    description = describe(find_checkpoint(str(out)))
    again = load_model(description, "average")
    assert relative_error(again(images), model(images)) < 1e-6
    if again.config == model.config:
        ours, theirs = dict(model.named_parameters()), read_weights(description, "weight", parameter_shapes(model.config))
        assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    if to == "safetensors" and model.config.position != "learned_1d":
        return  # which only vitscale.json tells
    back = load_model(describe(taken_back(tmp_path, out, again.config)), "weight")
    trained_with = replace(again.config, patch_dropout=0.0, layer_scale=1e-5 if again.config.layer_scale else 0.0)
    assert back.config == trained_with
    assert all(torch.equal(weight, dict(again.named_parameters())[name]) for name, weight in back.named_parameters())


def holds(found: dict[str, Any]) -> None:
    assert found["holds"], found["lines"]
    assert found["differences"].pop("pixels") == 0
    assert max(found["differences"].values()) < 1e-5, found["differences"]


@pytest.mark.parametrize(
    ("option", "to"),
    [(option, to) for to in ("hf", "safetensors") for option in OPTIONS if option not in REFUSED[to]],
)
def test_transformers_and_plain_torch_give_what_was_trained(tmp_path: Path, option: str, to: str) -> None:
    """Logits, features and patch tokens of tensors and of images, whose pixels are the same to the bit."""
    holds(replay(exported(tmp_path, random_vit(OPTIONS[option]), to)))


@pytest.mark.peers
@pytest.mark.parametrize(("option", "to"), [(option, to) for to in ("timm", "npz") for option in OPTIONS if option not in REFUSED[to]])
def test_timm_gives_what_was_trained(tmp_path: Path, option: str, to: str) -> None:
    holds(replay(exported(tmp_path, random_vit(OPTIONS[option]), to)))


@pytest.mark.skipif(not TRANSFORMERS_4.is_dir() and "VITSCALE_REQUIRE_TRANSFORMERS_4" not in os.environ, reason="make test installs it")
def test_version_4_of_transformers_gives_what_was_trained(tmp_path: Path) -> None:
    """In a process of its own, for one has one version."""
    folders = []
    for option in ("plain", "21k-classes", "headless", "tanh", "sincos", "mean", "map-headless", "representation-headless"):
        folders.append(exported(tmp_path / option, random_vit(OPTIONS[option]), "hf"))
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import verify; print(json.dumps([verify.replay(f) for f in sys.argv[1:]]))"
    environment = os.environ | {"PYTHONPATH": str(TRANSFORMERS_4)}
    words = [sys.executable, "-c", code, *map(str, folders)]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) == len(folders)
    for each in found:
        assert each["library"].startswith("transformers 4.")
        holds(each)


def test_a_model_saved_by_transformers_comes_back_to_the_bit(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    for option in ("plain", "tanh", "mean"):
        model, folder = random_vit(OPTIONS[option]), tmp_path / option
        out = exported(folder, model, "hf")
        AutoModelForImageClassification.from_pretrained(out).save_pretrained(folder / "saved")
        adopt(folder / "saved", folder / "back", ImportConfig())
        back = load_model(describe(folder / "back"), "weight")
        assert back.config == load_model(describe(out), "weight").config
        assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in back.named_parameters())


@pytest.mark.peers
def test_a_model_saved_by_timm_comes_back_to_the_bit(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    for option in ("plain", "mean-rectangle", "map", "registers", "dinov2", "clip", "mae", "quick"):
        out = exported(tmp_path / option, random_vit(OPTIONS[option]), "timm")
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
        args = json.loads((out / "config.json").read_text())["model_args"]
        save_for_hf(theirs, tmp_path / option / "saved", model_args=args, safe_serialization=True)
        said = ImportConfig(image_size=SMALL.image_size, num_heads=4, activation=OPTIONS[option].activation if option != "dinov2" else None)
        adopt(tmp_path / option / "saved" / "model.safetensors", tmp_path / option / "back", said)
        back, ours = (load_model(describe(folder), "weight") for folder in (tmp_path / option / "back", out))
        assert all(torch.equal(weight, dict(ours.named_parameters())[name]) for name, weight in back.named_parameters())


@pytest.mark.parametrize("variant", ["ti16", pytest.param("s16", marks=pytest.mark.soak)])
def test_published_sizes_in_transformers(tmp_path: Path, variant: str) -> None:
    holds(replay(exported(tmp_path, random_vit(vit(variant, num_classes=1000)), "hf")))


@pytest.mark.soak
@pytest.mark.parametrize("to", ["hf", "safetensors"])
@pytest.mark.parametrize("variant", ["b16", "b32", "l16", "l32", "h14"])
def test_large_published_sizes(tmp_path: Path, variant: str, to: str) -> None:
    holds(replay(exported(tmp_path, random_vit(vit(variant, num_classes=1000)), to)))


@pytest.mark.peers
@pytest.mark.parametrize("to", ["timm", "npz"])
@pytest.mark.parametrize("variant", ["ti16", "s16", "b16", "b32", "l16", "l32", "h14"])
def test_published_sizes_in_timm(tmp_path: Path, variant: str, to: str) -> None:
    holds(replay(exported(tmp_path, random_vit(vit(variant, num_classes=1000, activation="gelu_tanh" if to == "npz" else "gelu")), to)))


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is in the folder
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "timm", "npz"])
@pytest.mark.parametrize("option", ["tanh", "map", "representation"])
def test_a_headless_export_gives_the_features_before_head_and_representation(tmp_path: Path, option: str, to: str) -> None:
    model, images = random_vit(OPTIONS[option]), random_images(OPTIONS[option], 2)
    out = exported(tmp_path, model, to, headless=True)
    again = load_model(describe(out), "weight")
    assert (again.config.num_classes, again.config.representation_size) == (0, 0)
    tokens = model.tokens(images)
    expected = model.attn_pool(tokens) if model.config.pool == "map" else tokens[:, 0]
    assert relative_error(again(images), expected) < 1e-6
    if to != "npz":
        assert not any(name.startswith(("head", "pre_logits")) for name in load_file(out / "model.safetensors"))


def test_the_average_is_exported_where_there_is_one(tmp_path: Path) -> None:
    weight, average = random_vit(SMALL, seed=0), random_vit(SMALL, seed=1)
    description = write_checkpoint(tmp_path / "step", weight, average=average)
    images = random_images(SMALL, 2)
    for kind, model in (("average", average), ("weight", weight)):
        out = export(description, kind, tmp_path / kind, to="timm")
        assert torch.equal(load_model(describe(out), "average")(images), model(images))
        assert describe(out).origin["weights"] == kind


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_bf16_weights_are_rounded_to_the_nearest_and_certified_as_such(tmp_path: Path, to: str) -> None:
    model = random_vit(SMALL)
    out = exported(tmp_path, model, to, dtype="bf16")
    stored = load_file(out / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in stored.values())
    again = read_weights(describe(out), "weight", parameter_shapes(SMALL))
    assert all(torch.equal(again[name], weight.bfloat16().float()) for name, weight in model.named_parameters())
    holds(replay(out))
    assert all(found["holds"] for found in verify_export(describe(out), "cpu", "bf16")), "computed in bf16, too, within its tolerance"


def test_an_export_says_what_it_is(tmp_path: Path) -> None:
    preprocess = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic", eval_crop=0.9)
    names = tuple(f"class {i}" for i in range(7))
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=preprocess, class_names=names)
    out = export(description, "average", tmp_path / "out", to="timm", licence="cc-by-4.0")
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    expected = {"model.safetensors", "vitscale.json", "config.json", "classes.txt", "README.md", "verify.py", "SHA256SUMS", "COMMIT.json"}
    assert files == expected | {f"certificate/{number:02d}.jpg" for number in range(20)} | {
        "certificate/expected.safetensors",
        "certificate/certificate.json",
    }
    assert verify(out) is None
    summed = subprocess.run(["sha256sum", "-c", "SHA256SUMS", "--quiet"], cwd=out, capture_output=True, text=True)
    assert summed.returncode == 0, summed.stderr
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(files) - 3, (
        "all but itself, COMMIT.json and what people write on, README.md"
    )
    again = describe(out)
    assert (again.model, again.preprocess, again.class_names, again.samples_seen, again.step) == (SMALL, preprocess, names, 4096, 2)
    assert (out / "classes.txt").read_text().splitlines() == list(names)
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == list(names)
    said = config["pretrained_cfg"]
    assert (said["mean"], said["std"], said["interpolation"], said["crop_pct"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic", 0.9)
    card = (out / "README.md").read_text()
    assert all(
        words in card
        for words in ('license: "cc-by-4.0"', "softmax", "4,096 in 2 steps", "24 x 40 pixels", "[0.1, 0.2, 0.3]", f"0 {names[0]}")
    )
    headless = export(description, "average", tmp_path / "headless", to="timm", headless=True)
    assert not (headless / "classes.txt").exists(), "without a head its classes mean nothing"


def code_of(out: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]


def runs_as_it_stands(out: Path, model: ViT) -> None:
    """What the card says to load the model by, in the folder, without this program: it ends in what the model says of the image."""
    check = "import torch; torch.save({name: value for name, value in globals().items() if isinstance(value, torch.Tensor)}, 'said.pt')"
    code = f"{code_of(out)}\n{check}\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-I", "-c", code], cwd=out, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    said, expected = torch.load(out / "said.pt", weights_only=True), load_file(out / "certificate" / "expected.safetensors")
    name = next(name for name in ("logits_BK", "features_BD", "tokens_BND") if name in said)
    assert name == ("tokens_BND" if "tokens_BND" in said else "logits_BK" if model.config.num_classes else "features_BD")
    assert relative_error(said[name], expected[f"image_{name}"][:1]) < 1e-5


CARDS = ("tanh", "headless", "mean", "map-headless", "representation", "representation-headless", "mae", "dinov2")


@pytest.mark.parametrize(
    ("option", "to"),
    [
        pytest.param(option, to, marks=[pytest.mark.peers] * (to in ("timm", "npz")))
        for to in LIBRARIES
        for option in CARDS
        if option not in REFUSED[to]
    ],
)
def test_the_code_of_a_card_runs_as_it_stands(tmp_path: Path, option: str, to: str) -> None:
    model = random_vit(OPTIONS[option])
    out = exported(tmp_path, model, to)
    runs_as_it_stands(out, model)
    told = re.findall(r"`((?:AutoModel|timm\.create_model).*?\))[`;,]", (out / "README.md").read_text())
    assert bool(told) == (to == "timm" or (to == "hf" and option not in ("mean-headless", "map-headless"))), told
    for code in told:  # to fine-tune
        begin = "import timm\n" if to == "timm" else "from transformers import AutoModelForImageClassification\n"
        ran = subprocess.run([sys.executable, "-I", "-c", f"{begin}folder = '.'\n{code}"], cwd=out, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


def test_hubs_take_a_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = exported(tmp_path, random_vit(SMALL), "hf", licence="cc-by-4.0")
    said = ModelCard.load(out / "README.md").data
    assert (said.license, said.library_name, said.pipeline_tag) == ("cc-by-4.0", "transformers", "image-classification")


def test_what_hubs_and_people_add_changes_nothing_of_an_export(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("LICENSE", "notes.md", ".gitattributes"):
        (out / name).write_text("theirs")
    holds(replay(out))
    assert find_checkpoint(str(out)) == out


@pytest.mark.parametrize("name", ["SHA256SUMS", "certificate/certificate.json", "certificate/expected.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_what_it_is_held_to_is_held_to_its_sum(tmp_path: Path, name: str, fault: str) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    if fault == "missing":
        (out / name).unlink()
    else:
        data = (out / name).read_bytes()
        (out / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    ran = subprocess.run([sys.executable, out / "verify.py"], capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("FAILED ")


@pytest.mark.parametrize(("to", "package"), [("safetensors", "safetensors.torch"), ("safetensors", "numpy"), ("hf", "transformers")])
def test_a_package_that_is_missing_is_told_in_a_line(tmp_path: Path, to: str, package: str) -> None:
    out = exported(tmp_path, random_vit(SMALL), to)
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['verify.py']; runpy.run_path('verify.py', run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout.startswith(f"NOT CHECKED: {package.partition('.')[0]}")


def test_a_tensor_that_transformers_does_not_find_is_told_in_a_line(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "hf")
    tensors = load_file(out / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    summed_again(out, "model.safetensors")
    found = replay(out)
    assert not found["holds"]
    assert any(line.startswith("FAILED transformers") and "classifier.bias" in line for line in found["lines"]), found["lines"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("results", 5), ("results", {"eval_top1": "high"}), ("datasets", [1]), ("left_out", 5), ("versions", [1]), ("samples_seen", -1)],
)
def test_an_origin_that_is_none_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    values = json.loads((out / "vitscale.json").read_text())
    values["origin"][name] = value
    (out / "vitscale.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"origin.{name} is "):
        describe(out)


def named(tmp_path: Path, to: Any) -> Path:
    description = replace(write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED), class_names=tuple("abcdefg"))
    out = export(description, "weight", tmp_path / "out", to=to)
    holds(replay(out))
    return out


@pytest.mark.parametrize(
    ("to", "file", "change", "what"),
    [
        ("hf", "config.json", {"id2label": dict(zip("0123456", "bacdefg", strict=True)), "label2id": {}}, "class_names is ['b', 'a', 'c'"),
        ("hf", "config.json", {"problem_type": "multi_label_classification"}, "problem_type is multi_label"),
        ("hf", "preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.7]}, "mean is [0.4, 0.5, 0.7]"),
        ("hf", "preprocessor_config.json", {"resample": 2}, "interpolation is bilinear"),
        ("safetensors", "vitscale.json", {"class_names": list("abc")}, "class_names is ['a', 'b', 'c']"),
        ("safetensors", "vitscale.json", {"class_names": None}, "class_names is None"),
        pytest.param("timm", "config.json", {"label_names": list("bacdefg")}, "class_names is ['b', 'a'", marks=pytest.mark.peers),
        pytest.param("timm", "config.json", {"label_names": None}, "class_names is None", marks=pytest.mark.peers),
    ],
)
def test_what_the_library_says_is_held_to_what_was_trained(tmp_path: Path, to: str, file: str, change: dict[str, Any], what: str) -> None:
    """Whoever changes it on purpose, and the sums as well, is seen."""
    out = named(tmp_path, to)
    (out / file).write_text(json.dumps(json.loads((out / file).read_text()) | change))
    summed_again(out, file)
    found = replay(out)
    assert not found["holds"]
    assert any(line.startswith(f"FAILED {what}") for line in found["lines"]), found["lines"]


def test_a_list_of_classes_in_another_order_is_seen(tmp_path: Path) -> None:
    out = named(tmp_path, "safetensors")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in "bacdefg"))
    lines = [line for line in (out / "SHA256SUMS").read_text().splitlines() if not line.endswith("classes.txt")]
    (out / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    found = replay(out)
    assert not found["holds"]
    assert "FAILED classes.txt does not name the classes as trained" in found["lines"]


def test_a_lossy_preprocessing_is_no_leave_for_another(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SQUARE), "hf", preprocess=replace(SQUASHED, eval_crop=0.9), lossy=True)
    assert replay(out)["holds"]
    processor = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(processor | {"image_std": [1, 1, 1]}))
    summed_again(out, "preprocessor_config.json")
    assert not replay(out)["holds"]


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.safetensors.index.json", "modeling.py", "vit/__init__.py", "__pycache__/vit.cpython-311.pyc",
        "torch/__init__.py", "lib.so", "weights", "certificate/20.jpg", "notes/LICENSE",
    ],
)  # fmt: skip
def test_a_file_that_might_be_loaded_needs_a_sum(tmp_path: Path, name: str) -> None:
    """Nothing of it runs, for the script does not look for packages where it lies."""
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("raise SystemExit(0)")
    ran = subprocess.run([sys.executable, "verify.py"], cwd=out, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, f"FAILED {name} has no line in SHA256SUMS\n"), ran.stderr


def test_a_head_of_sigmoids_says_so(tmp_path: Path) -> None:
    description = replace(write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED), objective=ObjectiveConfig("sigmoid"))
    out = export(description, "weight", tmp_path / "out", to="hf")
    assert json.loads((out / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert "sigmoid(logit)" in (out / "README.md").read_text()
    adopt(out / "model.safetensors", tmp_path / "back", ImportConfig())
    assert describe(tmp_path / "back").objective.kind == "sigmoid"


def test_an_export_is_the_same_bytes_again(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED)
    for to in LIBRARIES:
        folders = [export(description, "weight", tmp_path / name / to, to=to, lossy=to == "npz") for name in ("a", "b")]  # type: ignore[arg-type]
        assert (folders[0] / "SHA256SUMS").read_text() == (folders[1] / "SHA256SUMS").read_text()


def test_an_export_of_an_export_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """Whatever format lies between, and whether its tensors are one with ours or parts of them."""
    description = write_checkpoint(tmp_path / "step", random_vit(OPTIONS["tanh"]), preprocess=SQUASHED)
    direct = export(description, "weight", tmp_path / "direct", to="hf")
    for between in ("timm", "hf", "safetensors"):
        through = export(description, "weight", tmp_path / between, to=between)  # type: ignore[arg-type]
        again = export(describe(through), "weight", tmp_path / f"{between}-hf", to="hf")
        assert (again / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
        assert describe(again).origin == describe(direct).origin


@pytest.mark.parametrize("to", ["hf", "safetensors"])
@pytest.mark.parametrize("option", ["sincos", "no-class-position"])
def test_bf16_weights_that_are_folded_are_certified_as_they_are_written(tmp_path: Path, option: str, to: str) -> None:
    """Rounded after they were added up, which is not the sum of what was rounded."""
    out = exported(tmp_path, random_vit(OPTIONS[option]), to, dtype="bf16")
    holds(replay(out))
    changed = json.loads((out / "certificate/certificate.json").read_text())["changed"]
    assert 1e-4 < changed["logits_BK"] < 2e-2, "and how far that is from what was trained is told"
    assert all(found["holds"] for found in verify_export(describe(out), "cpu", "fp32"))


def test_a_folder_that_appears_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    out = tmp_path / "out"

    def others(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("not yours")

    with pytest.raises(OSError, match="out"):
        export(description, "weight", out, to="safetensors", progress=others)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"step", "out"}


def test_a_second_export_to_the_same_folder_is_refused_and_spoils_nothing(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    refused = []

    def again(done: int, total: int) -> None:
        if not done:
            with pytest.raises(CheckpointError, match=r"another export .* is under way") as error:
                export(description, "weight", tmp_path / "out", to="safetensors")
            refused.append(error)

    out = export(description, "weight", tmp_path / "out", to="safetensors", progress=again)
    assert refused
    holds(replay(out))


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    (tmp_path / ".out.partial" / "certificate").mkdir(parents=True)
    (tmp_path / ".out.partial" / "stale.bin").write_bytes(b"half")
    out = export(description, "weight", tmp_path / "out", to="safetensors")
    assert not (out / "stale.bin").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_results_are_told_of_the_weights_and_views_that_had_them(tmp_path: Path) -> None:
    """A run evaluates its average where it keeps one, by its own preprocessing; other weights have other results."""
    from vitscale.config import OptimizerConfig, TrainConfig, to_dict
    from vitscale.origin import origin_of

    run = tmp_path / "run"
    step = write_checkpoint(run / "checkpoints/step-00000002", random_vit(SMALL), average=random_vit(SMALL, seed=1)).path
    config = TrainConfig(out=str(run), recipe="r", model=SMALL, optimizer=OptimizerConfig(average_decay=0.9))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    dataset = {"path": "d", "name": "d", "hash": "h", "samples": 9}
    (run / "run.json").write_text(
        json.dumps({"format_version": 1, "dataset": dataset, "held_out": dataset, "total_steps": 2, "starts": []})
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 2, "eval_top1": 0.81, "eval_top5": 0.9, "eval_loss": 1.0, "eval_samples": 9}) + "\n"
    )
    assert origin_of(describe(step), "average")["results"]["eval_top1"] == 0.81
    assert "results" not in origin_of(describe(step), "weight")
    assert "results" not in origin_of(describe(step).evaluated_by("paper", 1.0), "average")


def test_a_folder_that_exists_is_refused_and_left(tmp_path: Path) -> None:
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists; give a folder that does not"):
        export(description, "weight", tmp_path / "out", to="timm")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_in_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("vitscale.export.write_certificate", fail)
    with pytest.raises(OSError, match="no space left"):
        exported(tmp_path, random_vit(SMALL), "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002"}


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


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is lost, and damage
# ---------------------------------------------------------------------------------------------------------------------------------------


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


def test_a_central_crop_in_transformers_is_off_for_some_images_and_nothing_else(tmp_path: Path) -> None:
    """What --lossy says of it is what is seen: pixels of images with odd margins, while tensors are exact."""
    found = replay(exported(tmp_path, random_vit(SQUARE), "hf", preprocess=PreprocessConfig(), lossy=True))
    assert found["holds"]
    assert found["differences"]["pixels"] > 0
    assert all(difference < 1e-5 for name, difference in found["differences"].items() if not name.startswith(("image_", "pixels")))


@pytest.mark.parametrize("protocol", ["big_vision", "paper"])
def test_googles_protocols_are_kept_with_plain_tensors_and_what_is_not_checked_is_told(tmp_path: Path, protocol: Any) -> None:
    """Which is where a refusal for timm sends a user."""
    preprocess = PreprocessConfig(eval_crop=1.0, eval_protocol=protocol)
    out = exported(tmp_path, random_vit(SMALL), "safetensors", preprocess=preprocess)
    found = replay(out)
    assert found["holds"]
    assert any(line.startswith("NOT CHECKED: the pixels") for line in found["lines"])
    assert "pixels" not in found["differences"]
    assert verify_export(describe(out), "cpu", "fp32")[0]["differences"]["pixels"] == 0, "vitscale itself sees them"


def damaged(out: Path, name: str) -> None:
    """Flips a bit in the middle of a file's last tensor."""
    content = bytearray((out / name).read_bytes())
    content[-200] ^= 0x40
    (out / name).write_bytes(content)


def test_a_damaged_export_does_not_verify(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "hf")
    damaged(out, "model.safetensors")
    found = replay(out)
    assert not found["holds"]
    assert "model.safetensors does not have its SHA-256 sum" in found["lines"][0]
    with pytest.raises(CheckpointError, match="checksum"):
        find_checkpoint(str(out))


def summed_again(out: Path, name: str) -> None:
    """The line of a changed file in SHA256SUMS, as whoever changes it on purpose would have it."""
    fresh = subprocess.run(["sha256sum", name], cwd=out, capture_output=True, text=True, check=True).stdout.strip()
    lines = (out / "SHA256SUMS").read_text().splitlines()
    (out / "SHA256SUMS").write_text("".join(f"{fresh if line.endswith(f'  {name}') else line}\n" for line in lines))


def test_a_lossy_export_is_held_to_what_it_was_changed_to(tmp_path: Path) -> None:
    """Its certificate can fail: other weights are not the loss that it tells of."""
    out = exported(tmp_path, random_vit(SMALL), "npz", lossy=True)
    assert verify_export(describe(out), "cpu", "fp32")[0]["holds"]
    weights = dict(np.load(out / "weights.npz"))
    weights["params/head/kernel"] = weights["params/head/kernel"] * 1.01
    np.savez(out / "weights.npz", **weights)
    assert not verify_export(describe(out), "cpu", "fp32")[0]["holds"]


def test_a_head_of_zeros_verifies(tmp_path: Path) -> None:
    """As of a run that has not begun to learn: no difference is none, whatever it would be divided by."""
    model = random_vit(SMALL)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    out = exported(tmp_path, model, "hf")
    holds(replay(out))
    assert verify_export(describe(out), "cpu", "fp32")[0]["differences"]["logits_BK"] == 0


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = random_vit(SMALL)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        exported(tmp_path, model, "hf")
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_sum_is_told(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    lines = [line for line in (out / "SHA256SUMS").read_text().splitlines() if not line.endswith("model.safetensors")]
    (out / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    found = replay(out)
    assert not found["holds"]
    assert found["lines"] == ["FAILED model.safetensors has no line in SHA256SUMS"]


@pytest.mark.parametrize(("what", "setting", "value"), [
    ("eps", "layer_norm_eps", 1e-3), ("activation", "hidden_act", "gelu_new"), ("heads", "num_attention_heads", 8),
])  # fmt: skip
def test_numbers_that_differ_where_names_fit_are_seen(tmp_path: Path, what: str, setting: str, value: Any) -> None:
    """The certificate is no formality: what goes wrong silently in the field makes it fail, with every sum as it was told."""
    out = exported(tmp_path, random_vit(SMALL), "hf")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {setting: value}))
    summed_again(out, "config.json")
    found = replay(out)
    assert not found["holds"], what
    assert any(line.startswith("FAILED logits_BK") for line in found["lines"])


def test_an_epsilon_that_noise_does_not_show_is_seen(tmp_path: Path) -> None:
    """transformers' own default, in place of the 1e-6 that nearly all ViTs are trained with."""
    out = exported(tmp_path, random_vit(SMALL), "hf")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    summed_again(out, "config.json")
    found = replay(out)
    assert not found["holds"]
    assert any("epsilon of 1e-12, the model was trained with 1e-06" in line for line in found["lines"])
    assert found["differences"]["logits_BK"] < 1e-5, "which is why the number itself is compared"


def test_preprocessing_that_differs_is_seen(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "hf")
    said = json.loads((out / "preprocessor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(said | {"resample": 2}))
    summed_again(out, "preprocessor_config.json")
    found = replay(out)
    assert not found["holds"]
    assert found["differences"]["pixels"] > 0
    assert found["differences"]["logits_BK"] < 1e-5, "the weights are right"


# ---------------------------------------------------------------------------------------------------------------------------------------
# In timm
# ---------------------------------------------------------------------------------------------------------------------------------------


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
