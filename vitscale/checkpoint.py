"""Checkpoints: written at once or not at all, read at any world size and ZeRO stage. The format is docs/design.md's "Run directory".

    RUN/checkpoints/step-00012000/
        node-0000.safetensors   flat fp32 pieces of tensors, named KIND/PARAMETER/OFFSET
        checkpoint.json         format version, model, preprocessing, class names, clock, and for every tensor its shape and pieces
        COMMIT.json             sizes and checksums of the others; written last

A folder is durable once COMMIT.json is there and its checksums hold. It is written under a hidden name, synced, and renamed. Finding,
describing and checking checkpoints works without torch; only reading and writing tensors imports it.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from data_tools.durable import fsync, publish_folder, replace_file
from data_tools.errors import UserError
from vitscale.config import ConfigError, EvalProtocol, ObjectiveConfig, PreprocessConfig, ViTConfig, from_dict

if TYPE_CHECKING:
    from torch import Tensor

    from vitscale.engine import Engine

FORMAT_VERSION = 1
EXPORT_DESCRIPTION = "vitscale.json"  # what an exported folder holds in place of checkpoint.json
WEIGHT, AVERAGE = "weight", "average"  # kinds of tensors, beside the optimizer's moments


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole or not the right one; the message is one line for the user."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened tensor."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: a parameter's weight, one of its moments, or its average."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Description:
    """What a folder of weights says of itself."""

    path: Path
    """The folder."""
    model: ViTConfig
    preprocess: PreprocessConfig
    objective: ObjectiveConfig
    class_names: tuple[str, ...] | None
    samples_seen: int
    step: int
    tensors: tuple[TensorEntry, ...] = ()
    cursor: int = 0
    """Of a run on tars without an index: the shards, counted through epochs, that all ranks have used up (`foreign.py`)."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors there are, weights first."""
        return tuple(dict.fromkeys(t.kind for t in sorted(self.tensors, key=lambda t: t.kind != WEIGHT)))

    def preferred(self, kind: str) -> str:
        """`average` where it is asked for and there is one, else `weight`."""
        return kind if kind in self.kinds else WEIGHT

    def evaluated_by(self, protocol: EvalProtocol | None) -> "Description":
        """The same, with another evaluation preprocessing where one is given."""
        return replace(self, preprocess=replace(self.preprocess, eval_protocol=protocol)) if protocol else self


# ---------------------------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint in its run's folder."""
    return int(folder.name.removeprefix("step-"))


def committed(run: Path) -> list[Path]:
    """A run's committed checkpoints, oldest first; their checksums have not been looked at."""
    return sorted(folder.parent for folder in (run / "checkpoints").glob("step-*/COMMIT.json"))


def newest_durable(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and what is wrong with each newer one."""
    faults: list[str] = []
    for folder in reversed(committed(run)):
        problem = verify(folder)
        if problem is None:
            return folder, faults
        faults.append(problem)
    return None, faults


def verify(folder: Path) -> str | None:
    """None if a checkpoint is whole, otherwise what is wrong with it in one line. An OSError is the machine's, not the checkpoint's."""
    try:
        files = {
            name: (entry["size"], entry["xxh3_128"]) for name, entry in json.loads((folder / "COMMIT.json").read_text())["files"].items()
        }
    except FileNotFoundError:
        return f"{folder}: COMMIT.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: COMMIT.json cannot be read ({error})"
    if not files.keys() & {"checkpoint.json", EXPORT_DESCRIPTION}:
        return f"{folder}: COMMIT.json does not list the description; the file is damaged"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{folder}: {name} is missing"
        if path.stat().st_size != size:
            return f"{folder}: {name} has {path.stat().st_size} bytes, COMMIT.json says {size}"
        if file_checksum(path) != checksum:
            return f"{folder}: {name} does not have the checksum in COMMIT.json; the file is damaged"
    return None


def find_checkpoint(spec: str) -> Path:
    """The folder that a CHECKPOINT names: a run (its newest durable one), RUN@STEP, a step's folder or an exported folder.

    Checks that it is whole. Raises CheckpointError.
    """
    path = Path(spec)
    run, at, step = spec.rpartition("@")
    if not path.exists() and at and step.isdigit():
        path = step_folder(Path(run), int(step))
        if not path.exists():
            steps = [folder.name.removeprefix("step-").lstrip("0") or "0" for folder in committed(Path(run))]
            raise CheckpointError(f"{run} has no checkpoint of step {int(step)}; {_there_are(steps)}")
    if not path.exists():
        raise CheckpointError(f"{spec} does not exist; a checkpoint is a run, RUN@STEP, a step's folder or an exported folder")
    if path.is_file():
        raise CheckpointError(f"{spec} is a file; give the folder that it lies in: {path.parent}")
    if any((path / name).is_file() for name in (EXPORT_DESCRIPTION, "checkpoint.json", "COMMIT.json")):
        if problem := verify(path):
            raise CheckpointError(problem)
        return path
    newest, faults = newest_durable(path)
    if newest is None:
        found = f" ({len(faults)} damaged: {faults[0]})" if faults else ""
        raise CheckpointError(f"{spec} holds no durable checkpoint{found}; give a run that has written one, or an exported folder")
    for fault in faults:
        print(f"warning: {fault}; {newest.name} is used", file=sys.stderr)
    return newest


def describe(folder: Path) -> Description:
    """Reads checkpoint.json, or an export's description. Raises CheckpointError."""
    file = folder / (EXPORT_DESCRIPTION if (folder / EXPORT_DESCRIPTION).is_file() else "checkpoint.json")
    try:
        values = json.loads(file.read_text())
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{file} has format version {values['format_version']}; this vitscale reads {FORMAT_VERSION}")
        if values["skipped"]:
            raise CheckpointError(f"{file} skips positions {values['skipped']}, which this vitscale cannot; use a newer one")
        return Description(
            path=folder,
            model=from_dict(ViTConfig, values["model"], "model"),
            preprocess=from_dict(PreprocessConfig, values["preprocess"], "preprocess"),
            objective=from_dict(ObjectiveConfig, values["objective"], "objective"),
            class_names=tuple(values["class_names"]) if values["class_names"] else None,
            samples_seen=values["samples_seen"],
            step=values["step"],
            tensors=tuple(
                TensorEntry(t["name"], t["kind"], tuple(t["shape"]), tuple(Piece(**piece) for piece in t["pieces"]))
                for t in values["tensors"]
            ),
            cursor=values.get("cursor", 0),  # which checkpoints of before had not
        )
    except (OSError, KeyError, TypeError, ConfigError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------------------------


class TensorReader:
    """Reads stretches of a checkpoint's tensors, mapping files and holding nothing in memory. Safe for one thread."""

    def __init__(self, description: Description) -> None:
        self._folder = description.path
        self._entries = {(t.name, t.kind): t for t in description.tensors}
        self._exported = (description.path / EXPORT_DESCRIPTION).is_file()  # whole tensors under their own names
        self._files: dict[str, Any] = {}

    def stretch(self, name: str, kind: str, start: int, length: int) -> "Tensor":
        """Elements [start, start + length) of the flattened tensor, fp32."""
        import torch

        out = torch.empty(length, dtype=torch.float32)
        filled = 0
        for piece in self._entries[name, kind].pieces:
            low, high = max(start, piece.offset), min(start + length, piece.offset + piece.length)
            if low < high:
                file = self._open(piece.file)
                stored = file.get_tensor(name).flatten() if self._exported else file.get_slice(piece_key(name, kind, piece.offset))
                out[low - start : high - start] = stored[low - piece.offset : high - piece.offset]
                filled += high - low
        if filled != length:
            raise CheckpointError(f"{self._folder}: the pieces of {kind} {name} do not cover elements {start} to {start + length}")
        return out

    def whole(self, name: str, kind: str) -> "Tensor":
        """A tensor in its shape."""
        entry = self._entries[name, kind]
        return self.stretch(name, kind, 0, math.prod(entry.shape)).view(entry.shape)

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file]


def piece_key(name: str, kind: str, offset: int) -> str:
    """The name of a piece in its safetensors file."""
    return f"{kind}/{name}/{offset}"


def read_weights(description: Description, kind: str, shapes: dict[str, tuple[int, ...]]) -> "dict[str, Tensor]":
    """All weights of a model with these shapes. Raises CheckpointError where a tensor is missing, extra or of another shape.

    Args:
        kind: `average` (where there is one) or `weight`.
    """
    kind = description.preferred(kind)
    check_tensors(description, shapes, [kind])
    reader = TensorReader(description)
    return {name: reader.whole(name, kind) for name in shapes}


def check_tensors(description: Description, expected: dict[str, tuple[int, ...]], kinds: Iterable[str]) -> None:
    """Every expected tensor there with its shape, and none besides. Raises CheckpointError that names the first that differ."""
    for kind in kinds:
        found = {t.name: t.shape for t in description.tensors if t.kind == kind}
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or extra:
            raise CheckpointError(
                f"{description.path} does not fit the model: of kind {kind} {len(missing)} tensors are missing ({_first(missing)}) "
                f"and {len(extra)} are not the model's ({_first(extra)})"
            )
        for name, shape in found.items():
            if shape != tuple(expected[name]):
                raise CheckpointError(f"{description.path}: {name} has shape {shape}, the model's has {tuple(expected[name])}")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------------------------


def write_description(file: Path, description: Description) -> None:
    """Writes checkpoint.json or an export's description."""
    values = asdict(description)
    del values["path"]  # a folder may be moved
    # "skipped": ranges of positions that the run left out; none can be yet
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, "skipped": [], **values}, indent=1))


def save(run: Path, engine: "Engine", about: Description) -> Path:
    """Writes the checkpoint of a step, `about` with the engine's tensors, and returns its folder.

    A collective; the leader of each node writes its share of the tensors, whole ones. Raises CheckpointError or OSError on a rank that
    cannot write, and leaves the others waiting for it: the rank must end.
    """
    import torch.distributed as dist

    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    node, local_rank = divmod(dist.get_rank(), ranks_per_node)
    num_nodes = dist.get_world_size() // ranks_per_node
    hidden = partial_folder(run, about.step)
    if dist.get_rank() == 0:
        for leftover in hidden.parent.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        hidden.mkdir(parents=True)
    dist.barrier()

    mine: dict[str, Tensor] = {}
    entries = []
    for index, (kind, name) in enumerate((kind, name) for kind in engine.kinds for name in engine.shapes):
        whole = engine.gather(name, kind)
        owner = index % num_nodes
        if local_rank == 0 and owner == node:
            mine[piece_key(name, kind, 0)] = whole.flatten().cpu()
        piece = Piece(f"node-{owner:04d}.safetensors", 0, whole.numel())
        entries.append(TensorEntry(name, kind, tuple(whole.shape), (piece,)))
    checksums: dict[str, str] = {}
    if local_rank == 0 and mine:
        file = hidden / f"node-{node:04d}.safetensors"
        write_tensors(file, mine)
        fsync(file)
        checksums[file.name] = file_checksum(file)
    gathered: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, checksums)
    if dist.get_rank() == 0:
        file = hidden / "checkpoint.json"
        write_description(file, replace(about, tensors=tuple(entries)))
        commit(hidden, {name: value for part in gathered for name, value in part.items()} | {file.name: file_checksum(file)})
    dist.barrier()
    return step_folder(run, about.step)


def write_tensors(file: Path, tensors: "dict[str, Tensor]") -> None:
    """Writes a safetensors file, or leaves none and raises CheckpointError, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode  # as the user's umask has it; safetensors lets nobody else read what it writes
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        file.unlink(missing_ok=True)
        raise CheckpointError(f"{file} cannot be written ({error}); what was saved before it is whole") from None


def partial_folder(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    folder = step_folder(run, step)
    return folder.with_name(f".{folder.name}.partial")


def commit(hidden: Path, checksums: dict[str, str]) -> None:
    """Makes a written checkpoint durable and points `latest` at it."""
    folder = hidden.with_name(hidden.name.removeprefix(".").removesuffix(".partial"))
    publish(hidden, folder, checksums)
    replace_file(folder.parent / "latest", folder.name + "\n")


def publish(hidden: Path, folder: Path, checksums: dict[str, str]) -> None:
    """Gives a written folder its COMMIT.json, syncs it and renames it into place."""
    files = {name: {"size": (hidden / name).stat().st_size, "xxh3_128": checksum} for name, checksum in sorted(checksums.items())}
    (hidden / "COMMIT.json").write_text(json.dumps({"files": files}, indent=1))
    if folder.exists():  # one that did not verify, or that a run was taken back to before
        shutil.rmtree(folder)
    publish_folder(hidden, folder)


def prune(run: Path, keep: int, step: int) -> None:
    """Removes all but the newest `keep` committed checkpoints up to `step`, the one just written; 0 keeps all.

    What is newer than the one just written did not verify, or the run would have gone on from it.
    """
    kept = [folder for folder in committed(run) if folder <= step_folder(run, step)]
    for folder in kept[:-keep] if keep else []:
        doomed = folder.with_name(f".{folder.name}.doomed")
        folder.rename(doomed)  # so that a kill in mid-removal leaves nothing that looks like a checkpoint
        shutil.rmtree(doomed)
    for leftover in (run / "checkpoints").glob(".*.doomed"):
        shutil.rmtree(leftover, ignore_errors=True)


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _there_are(steps: list[str]) -> str:
    return f"there are those of steps {', '.join(steps)}" if steps else "there are none"
