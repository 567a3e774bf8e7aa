"""An export is the model: in this program to the bit, and in each library within rounding, from what lies in the folder alone.

`exported/verify.py`, which every export has a copy of, is what loads an export here, so that what users run is tested. timm is there under
`make peers`; transformers is there in version 5, and in version 4 beside it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.vitscale.exports import LIBRARIES, OPTIONS, REFUSED, SMALL, SQUASHED, exported, holds, taken_back
from tests.vitscale.models import cotangent, gradient_errors, gradients, random_images, random_vit, relative_error, write_checkpoint
from vitscale.adopt import adopt
from vitscale.checkpoint import describe, verify
from vitscale.config import ImportConfig, PreprocessConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.exported.verify import replay
from vitscale.finding import find_checkpoint
from vitscale.model import parameter_shapes
from vitscale.recipes import vit
from vitscale.verification import verify_export
from vitscale.weights import load_model, read_weights

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


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


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = random_vit(SMALL)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        exported(tmp_path, model, "hf")
    assert not (tmp_path / "out").exists()
