"""An export that is not what was trained is seen: by its own `exported/verify.py`, and by `vitscale checkpoint verify`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vitscale.exports import SMALL, SQUARE, SQUASHED, exported, holds, summed_again
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale.checkpoint import describe
from vitscale.config import ConfigError, PreprocessConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.exported.verify import replay
from vitscale.finding import find_checkpoint
from vitscale.verification import verify_export


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
        "torch/__init__.py", "lib.so", "weights", "certificate/20.jpg", "notes/LICENSE", "LICENSE.py", ".pth", ".cache/x.so",
    ],
)  # fmt: skip
def test_a_file_that_might_be_loaded_needs_a_sum(tmp_path: Path, name: str) -> None:
    """Nothing of it runs, for the script does not look for packages where it lies."""
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("raise SystemExit(0)")
    ran = subprocess.run([sys.executable, "verify.py"], cwd=out, capture_output=True, text=True)
    compiled = ": Python runs it in place of a script; remove it" if name.startswith("__pycache__") else ""
    assert (ran.returncode, ran.stdout) == (1, f"FAILED {name} has no line in SHA256SUMS{compiled}\n"), ran.stderr


def test_nothing_in_the_folder_runs_where_it_is_reached_by_a_link(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    (out / "torch").mkdir()
    (out / "torch" / "__init__.py").write_text("raise SystemExit(0)")
    (tmp_path / "link").symlink_to(out)
    ran = subprocess.run([sys.executable, tmp_path / "link" / "verify.py"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "FAILED torch/__init__.py has no line in SHA256SUMS\n"), ran.stderr


def test_a_link_to_a_folder_needs_a_sum(tmp_path: Path) -> None:
    """It may lead to a package that Python takes for another where it runs in the folder."""
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    (tmp_path / "elsewhere").mkdir()
    (out / "torch").symlink_to(tmp_path / "elsewhere")
    assert replay(out)["lines"] == ["FAILED torch has no line in SHA256SUMS"]


def test_line_ends_that_git_changed_are_told_as_such(tmp_path: Path) -> None:
    out = named(tmp_path, "safetensors")
    (out / "classes.txt").write_bytes((out / "classes.txt").read_bytes().replace(b"\n", b"\r\n"))
    (line,) = replay(out)["lines"]
    assert line.startswith("FAILED classes.txt has other line ends")


@pytest.mark.parametrize("rest", [{"preprocess": PreprocessConfig(), "lossy": True}, {"dtype": "bf16"}, {}], ids=["lossy", "bf16", "exact"])
def test_what_is_not_exact_is_a_failure_where_exactness_is_asked_for(tmp_path: Path, rest: dict[str, Any]) -> None:
    out = exported(tmp_path, random_vit(SQUARE), "hf", **rest)
    ran, exact = (subprocess.run([sys.executable, out / "verify.py", *more], capture_output=True, text=True) for more in ([], ["--exact"]))
    assert ran.returncode == 0, ran.stdout
    assert exact.returncode == (1 if rest else 0), exact.stdout
    assert exact.stdout.splitlines()[-1].startswith("FAILED not exact: ") == bool(rest)


@pytest.mark.parametrize(
    "change", [{"rescale_factor": 0.01}, {"do_normalize": False}, {"size": {"shortest_edge": 400}}, {"do_resize": False}]
)
def test_a_lossy_crop_is_no_leave_for_other_settings_of_the_processor(tmp_path: Path, change: dict[str, Any]) -> None:
    out, file = exported(tmp_path, random_vit(SQUARE), "hf", preprocess=PreprocessConfig(), lossy=True), "preprocessor_config.json"
    (out / file).write_text(json.dumps(json.loads((out / file).read_text()) | change))
    summed_again(out, file)
    ran = subprocess.run([sys.executable, out / "verify.py"], capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout
    assert "FAILED " in ran.stdout


def test_names_of_classes_where_there_were_none_are_seen(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "hf")
    config = json.loads((out / "config.json").read_text())
    config |= {"id2label": dict(zip("0123456", "abcdefg", strict=True)), "label2id": dict(zip("abcdefg", range(7), strict=True))}
    (out / "config.json").write_text(json.dumps(config))
    summed_again(out, "config.json")
    assert any(line.startswith("FAILED class_names is") for line in replay(out)["lines"])


def test_a_device_that_is_not_here_is_told_in_a_line(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    ran = subprocess.run([sys.executable, out / "verify.py", "--device", "xpu"], capture_output=True, text=True)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (2, 1), ran.stderr
    assert ran.stdout.startswith("NOT CHECKED: device xpu is not here (")


def test_a_device_that_is_not_here_is_no_fault_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device xpu is not here \(.*\); cpu works$"):
        verify_export(describe(exported(tmp_path, random_vit(SMALL), "safetensors")), "xpu", "fp32")


@pytest.mark.parametrize("to", ["safetensors", "timm"])
def test_a_file_without_a_sum_is_told_by_the_command_too(tmp_path: Path, to: str) -> None:
    """Also where the library that would load the export is not installed, as timm's is not here."""
    out = exported(tmp_path, random_vit(SMALL), to)
    (out / "extra.bin").write_bytes(b"")
    _, found = verify_export(describe(out), "cpu", "fp32")
    assert (found["holds"], found["lines"]) == (False, ["FAILED extra.bin has no line in SHA256SUMS"])


@pytest.mark.parametrize("damage", ["nothing", "a file without a sum", "other code"])
def test_results_have_the_same_fields_always(tmp_path: Path, damage: str) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    if damage == "a file without a sum":
        (out / "extra.bin").write_bytes(b"")
    elif damage == "other code":
        (out / "vit.py").write_text("raise SystemExit")
        summed_again(out, "vit.py")
    ours, theirs = verify_export(describe(out), "cpu", "bf16")
    assert ours.keys() == theirs.keys() == {"lines", "holds", "differences", "library", "precision", "inexact"}
    assert theirs["holds"] == {"nothing": True, "a file without a sum": False, "other code": None}[damage]
    assert (ours["precision"], theirs["precision"], theirs["library"].split()[0]) == ("fp32", "bf16", "torch")


def test_a_head_that_was_taken_off_is_missed(tmp_path: Path) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    said, weights = json.loads((out / "vitscale.json").read_text()), load_file(out / "model.safetensors")
    said["model"]["num_classes"] = 0
    (out / "vitscale.json").write_text(json.dumps(said))
    save_file({name: weight for name, weight in weights.items() if not name.startswith("head.")}, out / "model.safetensors")
    for name in ("vitscale.json", "model.safetensors"):
        summed_again(out, name)
    found = replay(out)
    assert not found["holds"]
    assert [line for line in found["lines"] if line.startswith("FAILED")] == [
        f"FAILED logits_BK of {of}: torch {torch.__version__} gives none" for of in ("4 tensors", "20 images")
    ]


def test_a_lack_of_the_machine_is_not_called_the_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        CheckpointError, match=r"cannot be replayed on this machine \(ModuleNotFoundError: .*safetensors.*says nothing of it"
    ):
        verify_export(describe(out), "cpu", "fp32")


@pytest.mark.parametrize("content", ["{", '{"model_type": "vit", "image_size": 32}'])
def test_what_a_library_cannot_take_is_told_in_a_line(tmp_path: Path, content: str) -> None:
    out = exported(tmp_path, random_vit(SMALL), "hf")
    (out / "config.json").write_text(content)
    summed_again(out, "config.json")
    ran = subprocess.run([sys.executable, out / "verify.py"], capture_output=True, text=True)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (1, 1), (ran.stdout, ran.stderr)
    assert ran.stdout.startswith("FAILED ")


def test_numbers_of_classes_that_contradict_each_other_are_seen(tmp_path: Path) -> None:
    out = named(tmp_path, "hf")
    config = json.loads((out / "config.json").read_text())
    config["label2id"] |= {"a": 1}
    (out / "config.json").write_text(json.dumps(config))
    summed_again(out, "config.json")
    assert any("label2id" in line for line in replay(out)["lines"])


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
