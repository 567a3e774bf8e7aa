"""The model card of an export: its code runs as it stands, and hubs read it (`card.py`)."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.vitscale.exports import LIBRARIES, OPTIONS, REFUSED, SMALL, SQUASHED, exported
from tests.vitscale.models import random_vit, relative_error, write_checkpoint
from vitscale.adopt import adopt
from vitscale.checkpoint import describe
from vitscale.config import ImportConfig, ObjectiveConfig
from vitscale.export import export
from vitscale.model import ViT


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


def test_a_head_of_sigmoids_says_so(tmp_path: Path) -> None:
    description = replace(write_checkpoint(tmp_path / "step", random_vit(SMALL), preprocess=SQUASHED), objective=ObjectiveConfig("sigmoid"))
    out = export(description, "weight", tmp_path / "out", to="hf")
    assert json.loads((out / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert "sigmoid(logit)" in (out / "README.md").read_text()
    adopt(out / "model.safetensors", tmp_path / "back", ImportConfig())
    assert describe(tmp_path / "back").objective.kind == "sigmoid"
