"""Export: the weights of a checkpoint as a folder that others load, written whole or not at all, one tensor in memory at a time.

    OUT/model.safetensors, weights.npz   the tensors, as the library names them (`formats.py`)
    OUT/config.json, ...                 what timm or transformers read (`targets.py`)
    OUT/vitscale.json                    model, preprocessing, class names, origin: what makes OUT a CHECKPOINT for every verb
    OUT/README.md, classes.txt           a model card, class names
    OUT/certificate/, verify.py          what the trained model says of seeded inputs, and a script that holds the library to it
    OUT/vit.py                           with plain safetensors: the model in plain torch
    OUT/SHA256SUMS, COMMIT.json          sums for everybody, and for us

What a library cannot say exactly is refused, or with `lossy` written and told.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_tools.durable import fsync
from data_tools.progress import Update, no_update
from vitscale import checkpoint
from vitscale.card import model_card
from vitscale.certificate import outputs, seeded_inputs, write_certificate
from vitscale.checkpoint import Description, Exported, RunState
from vitscale.config import Library, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.exported.verify import difference
from vitscale.families import FAMILIES
from vitscale.formats import file_shapes, to_file
from vitscale.model import ViT, parameter_shapes
from vitscale.origin import origin_of
from vitscale.targets import Target, position_tensors, target, timm_config
from vitscale.tensorfiles import write_npz, write_safetensors
from vitscale.weights import TensorReader, check_tensors

_PROCESSED_BY = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "rescale_factor", "size", "crop_size")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    description: Description, kind: str, out: Path, *, to: Library, headless: bool = False, dtype: str = "fp32", lossy: bool = False,
    licence: str = "", progress: Update = no_update,
) -> Path:  # fmt: skip
    """Writes the folder `out`, which must not exist. Raises CheckpointError where the export would not be exact.

    Args:
        kind: `average` (where there is one) or `weight`.
        headless: leave out the head, and the representation layer before it.
        dtype: fp32 or bf16, to which weights are rounded to the nearest.
        lossy: write, too, what the library computes otherwise, and say so in it.
        licence: of the weights, for the model card.
        progress: is told (bytes written, bytes in all) of the weights.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; give a folder that does not")
    kind = description.preferred(kind)
    model = description.model
    if headless:
        model = dataclasses.replace(model, num_classes=0, representation_size=0)
    class_names = description.class_names if model.num_classes else None
    multi_label = description.objective.kind == "sigmoid"
    wanted = target(to, model, description.preprocess, class_names, multi_label=multi_label, bf16=dtype == "bf16")
    if wanted.losses and not lossy:
        raise CheckpointError(
            f"{'; '.join(loss.words for loss in wanted.losses)}. --lossy writes it all the same, and says so in the folder"
        )
    read = _reader(description, kind, model, wanted)
    exported = Exported(wanted.form, wanted.prefix, wanted.weights, origin_of(description, kind))
    about = dataclasses.replace(description, model=wanted.model, class_names=class_names, tensors=(), state=RunState(), exported=exported)
    with _place_beside(out) as hidden:
        _write_weights(hidden / wanted.weights, wanted, read, DTYPES[dtype], progress)
        for name, content in wanted.sidecars.items():
            (hidden / name).write_text(json.dumps(content, indent=1) + "\n")
        checkpoint.write_description(hidden / checkpoint.EXPORT_DESCRIPTION, about)
        if class_names:
            (hidden / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        for script in ("verify.py", "vit.py") if to == "safetensors" else ("verify.py",):
            shutil.copyfile(Path(__file__).parent / "exported" / script, hidden / script)
        with ThreadPoolExecutor(2) as behind:  # both pass over all of the weights, while the model computes
            of_weights, synced = behind.submit(_sums, hidden / wanted.weights), behind.submit(fsync, hidden / wanted.weights)
            certificate = _certify(hidden, description, kind, model, wanted, read, to, dtype, class_names)
        synced.result()
        card = model_card(out.name, wanted, about, certificate, multi_label=multi_label, licence=licence)
        files = {str(path.relative_to(hidden)): path for path in sorted(hidden.rglob("*")) if path.is_file()}
        sums = {name: of_weights.result() if name == wanted.weights else _sums(path) for name, path in files.items()}
        (hidden / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, (sha256, _) in sums.items()))
        sums["SHA256SUMS"] = _sums(hidden / "SHA256SUMS")
        (hidden / "README.md").write_text(card, encoding="utf-8", errors="replace")  # without a sum: hubs and their users write on
        checkpoint.publish(hidden, out, {name: checksum for name, (_, checksum) in sums.items()})
    return out


@contextlib.contextmanager
def _place_beside(out: Path) -> Iterator[Path]:
    """An empty hidden folder to write to, gone afterwards unless it was renamed. Raises CheckpointError where another export has it."""
    hidden = out.with_name(f".{out.name}.partial")
    hidden.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in hidden.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield hidden
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
    except BlockingIOError:
        raise CheckpointError(f"another export to {out} is under way; give another folder, or wait for it") from None
    finally:
        os.close(descriptor)


Stretch = Callable[[str, int, int], Tensor]  # (name, first element, how many) of one of our tensors, flattened


def _reader(description: Description, kind: str, model: ViTConfig, wanted: Target) -> Stretch:
    """The tensors as the target has them: a checkpoint's, but for position embeddings that have another form there."""
    if not description.exported:
        shapes = parameter_shapes(description.model)
        check_tensors(description, shapes, {kind: shapes.keys()})
    reader = TensorReader(description)
    made = position_tensors(model, wanted.model, lambda name: reader.whole(name, kind))
    if model.num_classes and not FAMILIES[wanted.form].head_bias and bool(reader.whole("head.bias", kind).any()):
        raise CheckpointError(f"{wanted.form} has no bias of the head, and this model's is not zero")

    def read(name: str, start: int, length: int) -> Tensor:
        return made[name].flatten()[start : start + length] if name in made else reader.stretch(name, kind, start, length)

    return read


def _write_weights(file: Path, wanted: Target, read: Stretch, dtype: torch.dtype, progress: Update) -> None:
    shapes = file_shapes(wanted.form, wanted.model, wanted.prefix)
    total, done = sum(map(math.prod, shapes.values())) * dtype.itemsize, 0
    value = to_file(wanted.form, wanted.model, wanted.prefix, read)

    def told(name: str) -> Tensor:
        nonlocal done
        progress(done, total)
        done += math.prod(shapes[name]) * dtype.itemsize
        return value(name)

    if file.suffix == ".npz":
        write_npz(file, shapes, told)
    else:
        write_safetensors(file, shapes, told, dtype)
    progress(total, total)


def _certify(
    hidden: Path, description: Description, kind: str, model: ViTConfig, wanted: Target, read: Stretch, to: Library, dtype: str,
    class_names: tuple[str, ...] | None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the certificate: of the model that was trained, or, where rounding or a lossy form changes it, of what it was changed to.

    What it was changed to is built from the checkpoint, too, and how far it is from what was trained is told. Returns what it says.
    """
    reader = TensorReader(description)
    certified = _filled(model, lambda name, size: reader.stretch(name, kind, 0, size))
    changed = {}
    if dtype != "fp32" or any(loss.what == "computation" for loss in wanted.losses):
        inputs_BCHW = seeded_inputs(model.image_size)
        trained = outputs(certified, inputs_BCHW)
        certified = _filled(wanted.model, lambda name, size: read(name, 0, size).to(DTYPES[dtype]).float())
        changed = {name: difference(value, trained[name]) for name, value in outputs(certified, inputs_BCHW).items()}
    preprocess = description.preprocess
    about: dict[str, Any] = {
        "library": to, "dtype": dtype, "losses": [dataclasses.asdict(loss) for loss in wanted.losses], "mean": preprocess.mean,
        "std": preprocess.std, "protocol": preprocess.eval_protocol, "has_head": model.num_classes > 0,
        "has_representation": model.representation_size > 0, "pool": model.pool, "layer_norm_eps": wanted.model.layer_norm_eps,
        "changed": changed, "imported": "imported_from" in description.origin, "class_names": class_names,
        "interpolation": preprocess.interpolation,
    }  # fmt: skip
    if to == "timm":
        cfg = wanted.sidecars["config.json"]["pretrained_cfg"]
        about["settings"] = {name: cfg[name] for name in ("crop_pct", "crop_mode", "input_size")}
    if to == "hf":
        processor = wanted.sidecars["preprocessor_config.json"]
        about["settings"] = {name: processor[name] for name in _PROCESSED_BY if name in processor}
        about |= {name: wanted.sidecars["config.json"].get(name) for name in ("model_type", "problem_type")}
    if to == "npz":  # timm reads these files, too
        config = timm_config(dataclasses.replace(wanted.model, representation_size=0), 1e-6, preprocess, None)
        cfg = config["pretrained_cfg"]
        names = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        about["timm"] = {
            "architecture": config["architecture"],
            "model_args": config["model_args"],
            "transform": {name: cfg[name] for name in names},
        }
    write_certificate(hidden, certified, preprocess, about)
    return about


@torch.no_grad()
def _filled(model: ViTConfig, read: Callable[[str, int], Tensor]) -> ViT:
    """A model with the weights that `read` gives by their names and sizes, flattened."""
    net = ViT(model).eval()
    for name, parameter in net.named_parameters():
        parameter.copy_(read(name, parameter.numel()).view_as(parameter))
    return net


def _sums(path: Path) -> tuple[str, str]:
    """SHA-256 and xxh3_128 of a file's bytes, in hex."""
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            xxh3.update(block)
    return sha256.hexdigest(), xxh3.hexdigest()
