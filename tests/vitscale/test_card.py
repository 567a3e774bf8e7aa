"""The model card of an export: its code runs as it stands, and hubs read it (`card.py`)."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.vitscale.exports import LIBRARIES, OPTIONS, REFUSED, SMALL, SQUARE, SQUASHED, evaluated, exported
from tests.vitscale.models import random_vit, relative_error, write_checkpoint
from vitscale.adopt import adopt
from vitscale.checkpoint import describe
from vitscale.config import ImportConfig, ObjectiveConfig, PreprocessConfig, ViTConfig
from vitscale.export import export
from vitscale.model import ViT


def snippets_of(out: Path) -> list[str]:
    """The card's code: how it is loaded, where features and patch tokens come out, and with a new head."""
    return re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)


def what_they_say(out: Path) -> list[dict[str, torch.Tensor]]:
    """Runs them one after the other, in the folder and without this program: the tensors that there are after each.

    Beside them `kept`: of the weights that are there in the same shape after the last, whether each is the same.
    """
    snippets = snippets_of(out)
    weights = "{n.removeprefix('vit.'): w for n, w in (model['weights'].items() if isinstance(model, dict) else model.named_parameters())}"
    code = "import torch\n"
    for number, snippet in enumerate(snippets):
        code += f"logits_BK = features_BD = tokens_BND = kept = None\n{snippet}\n"
        if number == 0:
            code += f"before = {{n: w.detach().clone() for n, w in {weights}.items()}}\n"
        code += f"after = {weights}\n"
        code += "kept = torch.tensor([torch.equal(w, before[n]) for n, w in after.items() if n in before and w.shape == before[n].shape])\n"
        code += "said = {name: value for name, value in globals().items() if isinstance(value, torch.Tensor)}\n"
        code += f"torch.save(said, 'said-{number}.pt')\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-I", "-c", code], cwd=out, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return [torch.load(out / f"said-{number}.pt", weights_only=True) for number in range(len(snippets))]


CARDS = ("tanh", "square", "headless", "mean", "map-headless", "representation", "representation-headless", "mae", "dinov2")


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
    gives_what_the_model_says(exported(tmp_path, model, to), model, layer_is_lost=to == "npz" and model.config.representation_size > 0)


def gives_what_the_model_says(out: Path, model: ViT, *, layer_is_lost: bool = False) -> None:
    """Of the image, and inside; with a new head all weights but those of another shape are the same, and can be trained."""
    loaded, inside, *tuned = what_they_say(out)
    expected = load_file(out / "certificate" / "expected.safetensors")
    comes_out = "tokens_BND" if layer_is_lost else "logits_BK" if model.config.num_classes else "features_BD"
    assert relative_error(loaded[comes_out], expected[f"image_{comes_out}"][:1]) < 1e-5
    for name in ["tokens_BND"] if layer_is_lost else ["features_BD", "tokens_BND"]:
        assert relative_error(inside[name], expected[f"image_{name}"][:1]) < 1e-5, name
    assert len(tuned) == (0 if "## Fine-tune\n\nWith vitscale" in (out / "README.md").read_text() else 1)
    for new in tuned:
        assert new["logits_BK"].shape == (1, 12 if model.config.num_classes == 10 else 10)
        assert new["logits_BK"].requires_grad
        assert len(new["kept"]) > 20
        assert bool(new["kept"].all())


OTHERS = [  # than the common case: to, model, rest of the export
    ("hf", SQUARE, {"dtype": "bf16"}),
    ("hf", replace(SMALL, num_classes=10), {}),
    ("safetensors", SMALL, {"preprocess": replace(SQUASHED, eval_protocol="big_vision")}),
    pytest.param("timm", SQUARE, {"dtype": "bf16"}, marks=pytest.mark.peers),
    pytest.param("timm", replace(SMALL, num_classes=10), {}, marks=pytest.mark.peers),
    pytest.param(
        "npz", OPTIONS["tanh"], {"preprocess": PreprocessConfig(eval_crop=0.875, eval_protocol="big_vision")}, marks=pytest.mark.peers
    ),
    pytest.param("npz", replace(OPTIONS["representation"], num_classes=10), {}, marks=pytest.mark.peers),
]


@pytest.mark.parametrize(("to", "config", "rest"), OTHERS)
def test_the_code_of_other_cards_runs_as_it_stands(tmp_path: Path, to: str, config: ViTConfig, rest: dict[str, Any]) -> None:
    """Rounded weights, as many classes as a new head would have, Google's protocols."""
    model = random_vit(config)
    gives_what_the_model_says(exported(tmp_path, model, to, **rest), model, layer_is_lost=to == "npz" and config.representation_size > 0)


@pytest.mark.parametrize("to", ["hf", "safetensors", pytest.param("timm", marks=pytest.mark.peers)])
def test_the_code_of_a_card_lists_all_classes_that_may_be_right(tmp_path: Path, to: Any) -> None:
    names = tuple("abcdefg")
    description = write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED)
    out = export(replace(description, objective=ObjectiveConfig("sigmoid"), class_names=names), "weight", tmp_path / "out", to=to)
    ran = subprocess.run([sys.executable, "-c", snippets_of(out)[0]], cwd=out, capture_output=True, text=True)
    logits_K = load_file(out / "certificate" / "expected.safetensors")["image_logits_BK"][0]
    assert ran.stdout.strip() == str([name for name, logit in zip(names, logits_K, strict=True) if logit > 0]), ran.stderr


def test_the_code_of_a_card_keeps_a_central_crop(tmp_path: Path) -> None:
    """Of images of twice the size, too: transformers resizes and crops by two sizes."""
    _, _, tuned = what_they_say(exported(tmp_path, random_vit(SQUARE), "hf", preprocess=PreprocessConfig(), lossy=True))
    assert tuned["logits_BK"].shape == (1, 10)


@pytest.mark.parametrize("to", ["hf", "safetensors", pytest.param("timm", marks=pytest.mark.peers)])
def test_a_card_names_the_classes_that_are_found(tmp_path: Path, to: Any) -> None:
    names = tuple("abcdefg")
    description = replace(write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED), class_names=names)
    out = export(description, "weight", tmp_path / "out", to=to)
    ran = subprocess.run([sys.executable, "-c", snippets_of(out)[0]], cwd=out, capture_output=True, text=True)
    expected = load_file(out / "certificate" / "expected.safetensors")["image_logits_BK"][0]
    assert ran.stdout.split() == [names[int(expected.argmax())]], ran.stderr


def test_results_are_not_those_of_weights_that_were_changed(tmp_path: Path) -> None:
    """A hub's table has only what was measured; the card says what it was measured on."""
    description = describe(evaluated(tmp_path / "run"))
    exact, rounded = (export(description, "average", tmp_path / dtype, to="hf", dtype=dtype) for dtype in ("fp32", "bf16"))
    cards = [(out / "README.md").read_text() for out in (exact, rounded)]
    assert ["model-index" in card for card in cards] == [True, False]
    assert ["top-1 81.00%" in card for card in cards] == [True, True]
    assert ["(before it was changed as said above)" in card for card in cards] == [False, True]


def test_hubs_take_a_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = exported(tmp_path, random_vit(SMALL), "hf", licence="cc-by-4.0")
    said = ModelCard.load(out / "README.md").data
    assert (said.license, said.library_name, said.pipeline_tag) == ("cc-by-4.0", "transformers", "image-classification")


def test_a_head_of_sigmoids_says_so(tmp_path: Path) -> None:
    description = replace(write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED), objective=ObjectiveConfig("sigmoid"))
    out = export(description, "weight", tmp_path / "out", to="hf")
    assert json.loads((out / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert "sigmoid(logit)" in (out / "README.md").read_text()
    adopt(out / "model.safetensors", tmp_path / "back", ImportConfig())
    assert describe(tmp_path / "back").objective.kind == "sigmoid"
