"""Import: weights that somebody else wrote become a folder that every verb takes as a CHECKPOINT.

The folder is an export to safetensors like any other (`export.py`), with a certificate of its own; vitscale.json says where the weights
come from, what was taken for granted and what was left out. Every tensor of the file is accounted for, or nothing is written
(`recognise.py`).
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.progress import Update, no_update
from vitscale.checkpoint import EXPORT_DESCRIPTION, Description, Exported
from vitscale.config import ImportConfig, ObjectiveConfig
from vitscale.errors import CheckpointError
from vitscale.export import export
from vitscale.recognise import Recognised, recognise
from vitscale.sidecars import read_sidecars
from vitscale.tensorfiles import SHARDS, TensorFile, open_tensors

# Of a folder, the file that has the weights: what timm, transformers and open_clip write, in the order in which they look for them
_FILES = ("model.safetensors", SHARDS[0], "open_clip_model.safetensors", "pytorch_model.bin", SHARDS[1], "open_clip_pytorch_model.bin")
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Foreign:
    """A file of weights that is none of ours."""

    tensors: TensorFile
    weights: Recognised


def open_foreign(path: Path, overrides: ImportConfig) -> Foreign:
    """What a file, or the one file of weights in a folder, is. Raises CheckpointError."""
    file = weights_file(path)
    tensors = open_tensors(file)
    return Foreign(tensors, recognise(tensors.shapes, read_sidecars(file.parent), overrides, str(path)))


def weights_file(path: Path) -> Path:
    """The file of weights that is meant. Raises CheckpointError where there is none, or where there are several."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a file of weights (safetensors, npz, pth), or a folder that holds one")
    if path.is_file():
        return path
    if not path.is_dir():  # a pipe would be waited for
        raise CheckpointError(f"{path} is no plain file; give a file of weights (safetensors, npz, pth), or a folder that holds one")
    if (path / EXPORT_DESCRIPTION).is_file() or (path / "checkpoint.json").is_file() or (path / "run.json").is_file():
        raise CheckpointError(f"{path} is vitscale's own: every verb takes it as it is")
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not found:
        raise CheckpointError(f"{path} holds no durable checkpoint of vitscale's, and no file of weights of others'")
    if len(found) > 1:
        there_are = ", ".join(file.name for file in found[:5])
        raise CheckpointError(f"{path} holds {len(found)} files of weights ({there_are}); give the one that is meant")
    return found[0]


def adopt(
    path: Path,
    out: Path,
    overrides: ImportConfig,
    *,
    class_names: tuple[str, ...] | None = None,
    licence: str = "",
    progress: Update = no_update,
) -> Foreign:
    """Writes the folder `out`, which must not exist, from a file of weights, and returns what that is. Raises CheckpointError.

    Args:
        class_names: one for each output of the head; None: those that lie beside the weights, if any.
    """
    foreign = open_foreign(path, overrides)
    weights, file = foreign.weights, foreign.tensors.path
    if class_names and len(class_names) != weights.model.num_classes:
        raise CheckpointError(f"{len(class_names)} class names for a head of {weights.model.num_classes} classes; give one name a class")
    description = Description(
        path=file.parent,
        model=weights.model,
        preprocess=weights.preprocess,
        objective=ObjectiveConfig("sigmoid" if weights.multi_label else "softmax"),
        class_names=class_names or weights.class_names,
        samples_seen=0,
        step=0,
        exported=Exported(weights.form, weights.prefix, file.name, _origin(foreign)),
    )
    export(description, "weight", out, to="safetensors", licence=licence, progress=progress)
    return dataclasses.replace(foreign, weights=dataclasses.replace(weights, class_names=description.class_names))


def _origin(foreign: Foreign) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(foreign.tensors.path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {
        "imported_from": foreign.tensors.path.name,
        "sha256": digest.hexdigest(),
        "format": foreign.weights.form,
        "assumed": list(foreign.weights.assumed),
        "left_out": dict(foreign.weights.left_out),
    }


def lines(path: Path, foreign: Foreign) -> list[str]:
    """What a file of weights is, for people."""
    weights, tensors = foreign.weights, foreign.tensors
    named = f", whose names begin with {weights.prefix}" if weights.prefix else ""
    found = [f"{path}: {weights.form}'s names and layout{named}; {len(tensors.shapes)} tensors, all accounted for"]
    for part in (weights.model, weights.preprocess):
        found.append(f"{type(part).__name__}: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(part).items()))
    if weights.class_names:
        found.append(f"classes: {', '.join(weights.class_names[:5])}{', ...' if len(weights.class_names) > 5 else ''}")
    if weights.assumed:
        found.append(f"what the tensors do not tell was taken so: {'; '.join(weights.assumed)}")
    reasons: dict[str, list[str]] = {}
    for name, why in weights.left_out:
        reasons.setdefault(why, []).append(name)
    found += [
        f"left out: {len(names)} tensors {why} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for why, names in reasons.items()
    ]
    if tensors.wraps:
        found.append(f"beside the tensors, and not read: {', '.join(tensors.wraps[:10])}")
    return found
