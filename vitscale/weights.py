"""The tensors of a checkpoint or an export: read by stretches or whole, held to the model's shapes.

Where it stands: above `checkpoint.py`, which says where tensors lie and imports no torch, and `formats.py` and `tensorfiles.py`, which know
the files of exports. What is read may have been written by anybody.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint import Description, Exported, Piece, is_plain, piece_key
from vitscale.errors import CheckpointError
from vitscale.formats import file_shapes, from_file
from vitscale.model import ViT, parameter_shapes
from vitscale.tensorfiles import faults_of, open_tensors, read_into, safetensors_entries


class TensorReader:
    """Reads stretches of a checkpoint's or an export's tensors, holding what it is asked for. Safe for one thread."""

    def __init__(self, description: Description) -> None:
        self._folder = description.path
        self._entries = {(t.name, t.kind): t for t in description.tensors}
        self._files: dict[str, Any] = {}  # what the header of each says, once it was read
        self._whole = _exported_tensors(description, description.exported) if description.exported else None
        self._last: tuple[str, Tensor] | None = None

    def stretch(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor, fp32. Raises CheckpointError where a file does not hold its pieces."""
        if self._whole:
            if not self._last or self._last[0] != name:  # parts of one tensor are asked for one after the other
                self._last = name, self._whole(name).flatten()
            return self._last[1][start : start + length]
        end = start + length
        overlapping = [p for p in self._entries[name, kind].pieces if p.offset < end and start < p.offset + p.length]
        stored = [self._stored(name, kind, piece) for piece in overlapping]  # first, for a length may be a lie
        out = torch.empty(length, dtype=torch.float32)
        for piece, read in zip(overlapping, stored, strict=True):
            low, high = max(start, piece.offset), min(end, piece.offset + piece.length)
            read(low - piece.offset, out[low - start : high - start])
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """A tensor in its shape."""
        if self._whole:
            return self._whole(name)
        entry = self._entries[name, kind]
        return self.stretch(name, kind, 0, math.prod(entry.shape)).view(entry.shape)

    def _stored(self, name: str, kind: str, piece: Piece) -> Callable[[int, Tensor], None]:
        """What reads a piece's elements from one on into a tensor; nothing has been read of it yet."""
        file, key = self._folder / piece.file, piece_key(name, kind, piece.offset)
        with faults_of(file):
            if piece.file not in self._files:
                if not is_plain(file):
                    raise ValueError("it is not a plain file")
                self._files[piece.file] = safetensors_entries(file)
            if key not in self._files[piece.file]:
                raise ValueError(f"it holds no {key:.100}")
            entry = self._files[piece.file][key]
            if entry.dtype != "F32" or math.prod(entry.shape) != piece.length:
                raise ValueError(f"{key:.100} is {entry.dtype} of shape {entry.shape}, not {piece.length} elements of F32")

        def read(first: int, out: Tensor) -> None:
            with faults_of(file, key):
                read_into(file, entry, first, out)

        return read


def _exported_tensors(description: Description, exported: Exported) -> Callable[[str], Tensor]:
    """The tensors of an export's file by our names. Raises CheckpointError where it does not hold all of its model."""
    weights = description.path / exported.weights
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing")
    file, expected = open_tensors(weights), file_shapes(exported.form, description.model, exported.prefix)
    missing, extra = sorted(expected.keys() - file.shapes.keys()), sorted(file.shapes.keys() - expected.keys())
    extra = [name for name in extra if name not in description.origin.get("left_out", {})]  # of a stranger's file: `recognise.py` knows why
    if missing or extra:
        raise CheckpointError(
            f"{weights} does not fit the model: {len(missing)} of its {len(expected)} tensors are missing ({_first(missing)}) and "
            f"{len(extra)} are not the model's ({_first(extra)})"
        )
    for name, shape in expected.items():
        if file.shapes[name] != shape:
            raise CheckpointError(f"{weights}: {name} has shape {file.shapes[name]}, the model's has {shape}")
    return from_file(exported.form, description.model, exported.prefix, file.read)


def read_weights(description: Description, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All weights of a model with these shapes. Raises CheckpointError where a tensor is missing, extra or of another shape.

    Args:
        kind: `average` (where there is one) or `weight`.
    """
    kind, reader = description.preferred(kind), TensorReader(description)
    if not description.exported:
        check_tensors(description, shapes, {kind: shapes.keys()})
    return {name: reader.whole(name, kind) for name in shapes}


def load_model(description: Description, kind: str) -> ViT:
    """The model of a checkpoint or an export, in evaluation mode on the CPU. Raises CheckpointError where a tensor is missing or extra.

    Args:
        kind: `average` (where there is one) or `weight`.
    """
    model = ViT(description.model)
    model.load_state_dict(read_weights(description, kind, parameter_shapes(description.model)))
    return model.eval()


def check_tensors(description: Description, expected: dict[str, tuple[int, ...]], kinds: Mapping[str, Collection[str]]) -> None:
    """Every expected tensor there with its shape, and none besides. Raises CheckpointError that names the first that differ.

    Args:
        kinds: kinds, and the names of the tensors that there must be of each.
    """
    for kind, names in kinds.items():
        found = {t.name: t.shape for t in description.tensors if t.kind == kind}
        missing, extra = sorted(set(names) - found.keys()), sorted(found.keys() - set(names))
        if missing or extra:
            raise CheckpointError(
                f"{description.path} does not fit the model: of kind {kind} {len(missing)} tensors are missing ({_first(missing)}) "
                f"and {len(extra)} are not the model's ({_first(extra)})"
            )
        for name, shape in found.items():
            if shape != tuple(expected[name]):
                raise CheckpointError(f"{description.path}: {name} has shape {shape}, the model's has {tuple(expected[name])}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
