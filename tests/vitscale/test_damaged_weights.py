"""Files of weights that strangers wrote are taken up to the bit, or refused in one line that says why: no crash, no code run, nothing left.

The cases are `damage.py`'s, each made by its number; `make soak` runs many more of them than the default.
"""

import hashlib
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command import vitscale
from tests.vitscale.damage import KINDS, SMALL
from tests.vitscale.exports import summed_again
from tests.vitscale.models import random_images, random_vit
from vitscale import checkpoint
from vitscale.adopt import adopt
from vitscale.checkpoint import describe
from vitscale.config import ImportConfig
from vitscale.errors import CheckpointError
from vitscale.finding import find_checkpoint
from vitscale.verification import verify_export
from vitscale.weights import load_model

CASES, MANY = 500, 20_000
MOST_MEMORY = 600 << 20  # bytes beyond what torch has, that the cases take at most; those that would take all there is say terabytes
ASKED = ImportConfig(num_heads=4)


def run_cases(folder: Path, first: int, end: int) -> None:
    """In two processes, which import torch once each; a crash or a case without an end is seen by the results that are missing."""
    shares = [(first, (first + end) // 2), ((first + end) // 2, end)]
    children = []
    for share in shares:
        (folder / str(share[0])).mkdir()
        words = [sys.executable, "-W", "ignore", "-m", "tests.vitscale.damage", str(folder / str(share[0])), *map(str, share)]
        children.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]))
    results = []
    for child in children:
        said, errors = child.communicate()
        assert child.returncode == 0, f"after {said.splitlines()[-1:]}:\n{errors[-3000:]}"
        *cases, last = map(json.loads, said.splitlines())
        assert last["memory"] < MOST_MEMORY
        results += cases
    assert [result["number"] for result in results] == list(range(first, end))
    assert not [result for result in results if result["fault"]]
    kinds = Counter(result["kind"] for result in results)
    assert len(kinds) == len(KINDS)
    assert min(kinds.values()) >= (end - first) // len(KINDS)
    assert sum(result["whole"] for result in results) > len(results) // 8, "or refusing everything would do"


def test_damaged_and_strange_files_are_refused_or_read_right(tmp_path: Path) -> None:
    run_cases(tmp_path, 0, CASES)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_very_many_damaged_and_strange_files(tmp_path: Path) -> None:
    run_cases(tmp_path, CASES, MANY)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "stream"])
def test_a_whole_file_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = random_vit(SMALL)
    file = tmp_path / "weights.pth"
    if kind == "safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 1}, file, _use_new_zipfile_serialization=kind == "zip")
    adopt(file, tmp_path / "out", ASKED)
    images = random_images(SMALL, 2)
    with torch.no_grad():
        assert torch.equal(load_model(describe(find_checkpoint(str(tmp_path / "out"))), "weight")(images), model(images))


@pytest.mark.parametrize("damage", ["last tensor", "overflow", "pipe"])
def test_a_refusal_leaves_nothing(tmp_path: Path, damage: str) -> None:
    """Also where the damage is seen after half of the file was written, or when the model computes."""
    weights = {name: tensor.clone() for name, tensor in random_vit(SMALL).state_dict().items()}
    if damage == "last tensor":
        weights["head.bias"][-1] = float("nan")
    if damage == "overflow":
        weights["blocks.2.mlp.fc2.weight"] *= 1e38
    save_file(weights, tmp_path / "weights.safetensors")
    if damage == "pipe":
        os.mkfifo(tmp_path / "pipe")
    file = tmp_path / ("pipe" if damage == "pipe" else "weights.safetensors")
    before = sorted(tmp_path.iterdir())
    done = vitscale("checkpoint", "import", file, tmp_path / "out", "--num-heads", 4)
    assert done.returncode == 1
    reason = {"last tensor": "head.bias .*not finite", "overflow": "are not finite", "pipe": "no plain file"}[damage]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert re.search(reason, lines[0])
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------------------------
# Exports of strangers
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_file(random_vit(replace(SMALL, depth=1)).state_dict(), folder / "weights.safetensors")
    adopt(folder / "weights.safetensors", folder / "out", ASKED)
    return folder / "out"


def changed(export: Path, folder: Path, name: str, data: str) -> Path:
    """A copy with another file in it, whose sums all hold."""
    hidden = folder / ".copy"
    shutil.copytree(export, hidden)
    (hidden / name).write_text(data)
    (hidden / "COMMIT.json").unlink()
    (hidden / "SHA256SUMS").unlink()
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(hidden)}\n" for f in hidden.rglob("*") if f.is_file()]
    (hidden / "SHA256SUMS").write_text("".join(lines))
    files = [file for file in hidden.rglob("*") if file.is_file()]
    checkpoint.publish(hidden, folder / "copy", {str(file.relative_to(hidden)): checkpoint.file_checksum(file) for file in files})
    return folder / "copy"


def test_an_export_verifies_and_is_left_as_it_was(export: Path) -> None:
    before = sorted(export.rglob("*"))
    found = verify_export(describe(find_checkpoint(str(export))), "cpu", "fp32")
    assert [replay["holds"] for replay in found] == [True, True]
    assert sorted(export.rglob("*")) == before


def test_code_of_a_strangers_export_is_not_run(export: Path, tmp_path: Path) -> None:
    """Neither the model that lies in it, nor what is compiled beside the model."""
    evil = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    copy = changed(export, tmp_path, "vit.py", evil + (export / "vit.py").read_text())
    summed_again(copy, "vit.py")
    found = verify_export(describe(find_checkpoint(str(copy))), "cpu", "fp32")
    assert "is not run" in found[1]["lines"][0]
    for name in ("vit.py", "SHA256SUMS"):
        shutil.copyfile(export / name, copy / name)
    (tmp_path / "evil.py").write_text(evil)
    compiled = copy / "__pycache__" / f"vit.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(tmp_path / "evil.py"), cfile=str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    found = verify_export(describe(copy), "cpu", "fp32")[1]
    (line,) = found["lines"]
    assert line.startswith(f"FAILED __pycache__/{compiled.name} has no line in SHA256SUMS")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"library": "os"}', "[" * 100_000, '{"library": "safetensors", "tolerances": {"fp32": 1e9, "tf32": 1, "bf16": 1}}'],
)
def test_a_certificate_that_cannot_be_is_one_line(export: Path, tmp_path: Path, text: str) -> None:
    copy = changed(export, tmp_path, "certificate/certificate.json", text)
    with pytest.raises(CheckpointError, match=r"certificate cannot be replayed|is rounding in fp32; 1e-05 is the most") as caught:
        verify_export(describe(find_checkpoint(str(copy))), "cpu", "fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 10**6),
        ("depth", 0),
        ("width", 2**40),
        ("num_heads", 0),
        ("layer_norm_eps", -1.0),
        ("image_size", [0, 0]),
        ("num_classes", 10**9),
    ],
)
def test_a_model_that_nobody_has_is_refused_before_it_is_built(export: Path, tmp_path: Path, field: str, value: object) -> None:
    said = json.loads((export / "vitscale.json").read_text())
    copy = changed(export, tmp_path, "vitscale.json", json.dumps(said | {"model": said["model"] | {field: value}}))
    with pytest.raises(CheckpointError, match=f"model.{field}=|model.{field} is"):
        describe(find_checkpoint(str(copy)))
