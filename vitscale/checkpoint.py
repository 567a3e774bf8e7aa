"""Checkpoints: there whole or not at all, read at any world size and ZeRO stage. The format is docs/design.md's "Run directory".

    RUN/checkpoints/step-00012000/
        node-0000.safetensors   flat fp32 pieces of tensors, named KIND/PARAMETER/OFFSET
        checkpoint.json         format version, model, preprocessing, class names, clock, and for every tensor its shape and pieces
        COMMIT.json             sizes and checksums of the others; written last

A folder is durable once COMMIT.json is there and its checksums hold. It is written (by `saving.py`) under a hidden name, synced, and
renamed. Finding, describing and checking checkpoints works without torch; only reading and writing tensors imports it. What is read may
have been written by anybody.
"""

import contextlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import xxhash

from data_tools.durable import publish_folder, replace_file
from data_tools.errors import UserError
from vitscale.check import check_model
from vitscale.config import UNREADABLE, EvalProtocol, Format, ObjectiveConfig, PreprocessConfig, ViTConfig, flatten, from_dict

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
EXPORT_DESCRIPTION = "vitscale.json"  # what an exported folder holds in place of checkpoint.json
WEIGHT, AVERAGE = "weight", "average"  # kinds of tensors, beside the optimizer's moments
_STEP_FOLDER = re.compile(r"step-\d{8,18}")
_FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # of files in a checkpoint: no path, and not hidden
_EXPORTED_NAME = re.compile(r"(?:certificate/)?\w[\w.-]{0,99}", re.ASCII)  # and in an export
_MOST = 2**63  # no count in a checkpoint reaches it
_LARGEST = 2**24  # of a model's sizes
_DEEPEST = 1024  # blocks


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
    updates: int | None = None
    """Updates that the optimizer has made, without the steps that were left out; None: as many as steps."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Ranges of positions, half open, that the run leaves out."""
    recent_losses: tuple[float, ...] = ()
    """What the guard against spikes compares the next losses with."""
    spikes: tuple[float, ...] = ()
    """Losses in a row up to this step that lay far above those (`guards.py`)."""
    nonfinite_steps: int = 0
    """Steps in a row up to this one that were left out."""
    form: Format | None = None
    """Of an export: how `weights` names and lays out the tensors; of a checkpoint None."""
    prefix: str = ""
    """Of an export: what stands before the names in `weights`."""
    weights: str = ""
    """Of an export: the file of the tensors."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Of an export: where its weights come from (`card.py`)."""

    @property
    def in_doubt(self) -> bool:
        """Whether its last steps may turn out to be some of those to be rolled back: made at a stop amid what seemed to go wrong."""
        return bool(self.spikes or self.nonfinite_steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors there are, weights first."""
        return tuple(dict.fromkeys(t.kind for t in sorted(self.tensors, key=lambda t: t.kind != WEIGHT)))

    def preferred(self, kind: str) -> str:
        """`average` where it is asked for and there is one, else `weight`."""
        return kind if kind in self.kinds else WEIGHT

    def evaluated_by(self, protocol: EvalProtocol | None, crop: float | None = None) -> "Description":
        """The same, with another evaluation preprocessing where one is given."""
        was = self.preprocess
        now = replace(was, eval_protocol=protocol or was.eval_protocol, eval_crop=was.eval_crop if crop is None else crop)
        return replace(self, preprocess=now)


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
    folders = (file.parent for file in (run / "checkpoints").glob("step-*/COMMIT.json"))
    return sorted((folder for folder in folders if _STEP_FOLDER.fullmatch(folder.name)), key=step_of)


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
        files = _read_commit(folder)
    except CheckpointError as error:
        return str(error)
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        faults = pool.map(lambda name: _fault(folder, name, *files[name]), files)
        return next((fault for fault in faults if fault), None)


def _read_commit(folder: Path) -> dict[str, tuple[int, str]]:
    """The size and checksum of each file, as COMMIT.json has them. Raises CheckpointError, and an OSError that is the machine's."""
    file = folder / "COMMIT.json"
    try:
        files = {}
        for name, entry in _read_object(file)["files"].items():
            if not _EXPORTED_NAME.fullmatch(name):
                raise ValueError(f"{name!r:.100} is not the name of a file in the folder")
            size, checksum = entry["size"], entry["xxh3_128"]
            if not (_is_count(size) and isinstance(checksum, str)):
                raise ValueError(f"{name} has no size and checksum")
            files[name] = (size, checksum)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: COMMIT.json is missing") from None
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: COMMIT.json cannot be read ({_words(error)})") from None
    if not files.keys() & {"checkpoint.json", EXPORT_DESCRIPTION}:
        raise CheckpointError(f"{folder}: COMMIT.json does not list the description; the file is damaged")
    return files


def _fault(folder: Path, name: str, size: int, checksum: str) -> str | None:
    """What is wrong with one file of a checkpoint."""
    path = folder / name
    if not _is_plain(path):
        return f"{folder}: {name} is {'not a plain file' if os.path.lexists(path) else 'missing'}"
    if path.stat().st_size != size:
        return f"{folder}: {name} has {path.stat().st_size} bytes, COMMIT.json says {size}"
    if file_checksum(path) != checksum:
        return f"{folder}: {name} does not have the checksum in COMMIT.json; the file is damaged"
    return None


def find_checkpoint(spec: str) -> Path:
    """The folder that a CHECKPOINT names: a run (its newest durable one), RUN@STEP, RUN@best, a step's folder or an exported folder.

    Checks that it is whole. Raises CheckpointError, and RunError where metrics.jsonl, which tells the best, cannot be read.
    """
    path = Path(spec)
    run, at, step = spec.rpartition("@")
    if not path.exists() and step == "best" and Path(run).is_dir():
        path = _best(Path(run))
    if not path.exists() and at and step.isdigit():
        path = step_folder(Path(run), int(step))
        if not path.exists():
            steps = [folder.name.removeprefix("step-").lstrip("0") or "0" for folder in committed(Path(run))]
            raise CheckpointError(f"{run} has no checkpoint of step {int(step)}; {_there_are(steps)}")
    if not path.exists():
        raise CheckpointError(f"{spec} does not exist; a checkpoint is a run, RUN@STEP, RUN@best, a step's folder or an exported folder")
    if path.is_file():
        raise CheckpointError(
            f"{spec} is a file; give the folder that it lies in, {path.parent}, where that is ours, or make it ours: "
            f"`vitscale checkpoint import {spec} OUT`"
        )
    if any((path / name).is_file() for name in (EXPORT_DESCRIPTION, "checkpoint.json", "COMMIT.json")):
        if problem := verify(path):
            raise CheckpointError(problem)
        return path
    newest, faults = newest_durable(path)
    if newest is None:
        found = f" ({len(faults)} damaged: {faults[0]})" if faults else ""
        raise CheckpointError(
            f"{spec} holds no durable checkpoint{found}; give a run that has written one, or an exported folder; `vitscale checkpoint "
            "import` makes one of others' weights"
        )
    for fault in faults:
        print(f"warning: {fault}; {newest.name} is used", file=sys.stderr)
    return newest


def is_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder that is none of ours: what others wrote, perhaps."""
    ours = (EXPORT_DESCRIPTION, "checkpoint.json", "COMMIT.json", "run.json", "checkpoints")
    return path.is_file() or (path.is_dir() and not any((path / name).exists() for name in ours))


def _best(run: Path) -> Path:
    """The checkpoint of a run that was best on its held-out split, of those that are there. Raises CheckpointError."""
    from vitscale.retention import best_of, goodness  # which know of runs, and runs of checkpoints
    from vitscale.run import read_metrics

    there, evaluated = [step_of(folder) for folder in committed(run)], goodness(read_metrics(run))
    best, ever = best_of(there, evaluated), best_of(evaluated, evaluated)
    if not there or ever is None:
        lacks = "was never evaluated on a held-out split" if there else "holds no checkpoint"
        raise CheckpointError(f"{run} {lacks}, so that none is its best; {run}@STEP names one: {_there_are(list(map(str, there)))}")
    if best is None or evaluated[best] < evaluated[ever]:
        gone = f"the best of {run} was step {ever} (top-1 {evaluated[ever]:.2%}), whose checkpoint is gone"
        if best is None:
            raise CheckpointError(f"{gone}; {_there_are(list(map(str, there)))}, never evaluated")
        print(f"warning: {gone}; step {best} ({evaluated[best]:.2%}) is used", file=sys.stderr)
    return step_folder(run, best)


def describe(folder: Path) -> Description:
    """Reads checkpoint.json, or an export's description, as what a stranger may have written. Raises CheckpointError."""
    file = folder / (EXPORT_DESCRIPTION if (folder / EXPORT_DESCRIPTION).is_file() else "checkpoint.json")
    try:
        values = _read_object(file)
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{file} has format version {values['format_version']!r:.20}; this vitscale reads {FORMAT_VERSION}")
        model = from_dict(ViTConfig, values["model"], "model")
        check_bounds(model)
        check_model(model)
        clock = {name: values[name] for name in ("samples_seen", "step")}
        clock["cursor"] = values.get("cursor", 0)  # which checkpoints of before had not, nor the next
        clock["nonfinite_steps"] = values.get("nonfinite_steps", 0)
        clock["updates"] = clock["step"] if values.get("updates") is None else values["updates"]
        for name, value in clock.items():
            if not _is_count(value):
                raise ValueError(f"{name} is {value!r:.50}, not a number of things")
        class_names = values["class_names"]
        if class_names and not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            raise ValueError("class_names are not a list of names")
        skipped = tuple((low, high) for low, high in values["skipped"])
        if not all(_is_count(low) and _is_count(high) and low < high for low, high in skipped):
            raise ValueError("skipped are not ranges of positions")
        losses, spikes = (tuple(values.get(name, ())) for name in ("recent_losses", "spikes"))
        if not all(isinstance(loss, int | float) and math.isfinite(loss) for loss in (*losses, *spikes)):
            raise ValueError("recent_losses or spikes are not finite numbers")
        exported = file.name == EXPORT_DESCRIPTION
        return Description(
            path=folder,
            model=model,
            preprocess=from_dict(PreprocessConfig, values["preprocess"], "preprocess"),
            objective=from_dict(ObjectiveConfig, values["objective"], "objective"),
            class_names=tuple(class_names) if class_names else None,
            tensors=() if exported else _read_entries(values["tensors"]),
            **(_read_export(values) if exported else {}),
            skipped=skipped,
            recent_losses=losses,
            spikes=spikes,
            **clock,
        )
    except (OSError, *UNREADABLE) as error:
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({_words(error)})") from None


def _read_export(values: dict[str, Any]) -> dict[str, Any]:
    """What an export's description has that a checkpoint's has not. Raises ValueError."""
    form, prefix, weights = values.get("form", "timm"), values.get("prefix", ""), values.get("weights", "model.safetensors")
    if form not in get_args(Format) or not (isinstance(prefix, str) and re.fullmatch(r"[\w./]{0,100}", prefix)):
        raise ValueError(f"form {form!r:.50} with prefix {prefix!r:.50} is none that is known")
    if not (isinstance(weights, str) and _FILE_NAME.fullmatch(weights)):
        raise ValueError(f"{weights!r:.100} is not the name of a file in the folder")
    origin = values.get("origin", {})
    if not isinstance(origin, dict):
        raise ValueError("origin is no object")
    return {"form": form, "prefix": prefix, "weights": weights, "origin": origin}


def check_bounds(model: ViTConfig) -> None:
    """Raises ValueError on a model that nobody could build, before anybody tries."""
    if model.depth > _DEEPEST:
        raise ValueError(f"model.depth is {model.depth}, which no model has")
    if not 0 < model.layer_norm_eps < 1:
        raise ValueError(f"model.layer_norm_eps is {model.layer_norm_eps}, which no model has")
    for name, value in flatten(asdict(model)).items():
        if any(isinstance(number, int) and number > _LARGEST for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"model.{name} is {value!r:.50}, which no model has")


def _read_entries(tensors: Any) -> tuple[TensorEntry, ...]:
    """The tensors of a description. Raises ValueError where pieces do not cover a tensor once, or what `UNREADABLE` names."""
    entries: dict[tuple[str, str], TensorEntry] = {}
    for tensor in tensors:
        name, kind, shape = tensor["name"], tensor["kind"], tuple(tensor["shape"])
        pieces = tuple(Piece(**piece) for piece in tensor["pieces"])
        if not (
            isinstance(name, str) and isinstance(kind, str) and len(shape) <= 8 and all(map(_is_count, shape)) and math.prod(shape) < _MOST
        ):
            raise ValueError(f"{kind!r:.50} {name!r:.100} of shape {shape!r:.100} is not a tensor")
        if (name, kind) in entries:
            raise ValueError(f"{kind} {name:.100} is there twice")
        for piece in pieces:
            if not (_is_count(piece.offset) and _is_count(piece.length)):
                raise ValueError(f"{kind} {name:.100} has a piece at {piece.offset!r:.50} of {piece.length!r:.50} elements")
            if not (isinstance(piece.file, str) and _FILE_NAME.fullmatch(piece.file)):
                raise ValueError(f"{piece.file!r:.100} is not the name of a file in the folder")
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.offset):
            if piece.offset != end:
                break
            end += piece.length
        if end != math.prod(shape) or end != sum(piece.length for piece in pieces):
            raise ValueError(f"the pieces of {kind} {name:.100} do not cover its {math.prod(shape)} elements, each once")
        entries[name, kind] = TensorEntry(name, kind, shape, pieces)
    return tuple(entries.values())


def _read_object(file: Path) -> dict[str, Any]:
    """A file of JSON. Raises what `UNREADABLE` names, and OSError."""
    if os.path.lexists(file) and not _is_plain(file):
        raise ValueError("it is not a plain file")
    values: dict[str, Any] = json.loads(file.read_bytes(), object_pairs_hook=_each_once)
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names are there once; of two, as a flipped bit makes of neighbours, the second would hide the first."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def _is_plain(path: Path) -> bool:
    """Whether a file is there, and is none that leads elsewhere or waits for a writer."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------------------------


class TensorReader:
    """Reads stretches of a checkpoint's or an export's tensors, holding what it is asked for. Safe for one thread."""

    def __init__(self, description: Description) -> None:
        self._folder = description.path
        self._entries = {(t.name, t.kind): t for t in description.tensors}
        self._files: dict[str, Any] = {}  # what the header of each says, once it was read
        self._whole = _exported_tensors(description) if description.form else None
        self._last: tuple[str, Tensor] | None = None

    def stretch(self, name: str, kind: str, start: int, length: int) -> "Tensor":
        """Elements [start, start + length) of the flattened tensor, fp32. Raises CheckpointError where a file does not hold its pieces."""
        import torch

        if self._whole:
            if not self._last or self._last[0] != name:  # parts of one tensor are asked for one after the other
                self._last = name, self._whole(name).flatten()
            return self._last[1][start : start + length]
        end = start + length
        overlapping = [p for p in self._entries[name, kind].pieces if p.offset < end and start < p.offset + p.length]
        stored = [self._stored(name, kind, piece) for piece in overlapping]  # first, for a length may be a lie
        out = torch.empty(length, dtype=torch.float32)
        for piece, read_into in zip(overlapping, stored, strict=True):
            low, high = max(start, piece.offset), min(end, piece.offset + piece.length)
            read_into(low - piece.offset, out[low - start : high - start])
        return out

    def whole(self, name: str, kind: str) -> "Tensor":
        """A tensor in its shape."""
        if self._whole:
            return self._whole(name)
        entry = self._entries[name, kind]
        return self.stretch(name, kind, 0, math.prod(entry.shape)).view(entry.shape)

    def _stored(self, name: str, kind: str, piece: Piece) -> "Callable[[int, Tensor], None]":
        """What reads a piece's elements from one on into a tensor; nothing has been read of it yet."""
        from vitscale.tensorfiles import faults_of, read_into, safetensors_entries

        file, key = self._folder / piece.file, piece_key(name, kind, piece.offset)
        with faults_of(file):
            if piece.file not in self._files:
                if not _is_plain(file):
                    raise ValueError("it is not a plain file")
                self._files[piece.file] = safetensors_entries(file)
            if key not in self._files[piece.file]:
                raise ValueError(f"it holds no {key:.100}")
            entry = self._files[piece.file][key]
            if entry.dtype != "F32" or math.prod(entry.shape) != piece.length:
                raise ValueError(f"{key:.100} is {entry.dtype} of shape {entry.shape}, not {piece.length} elements of F32")

        def read(first: int, out: "Tensor") -> None:
            with faults_of(file, key):
                read_into(file, entry, first, out)

        return read


def _exported_tensors(description: Description) -> "Callable[[str], Tensor]":
    """The tensors of an export's file by our names. Raises CheckpointError where it does not hold all of its model."""
    from vitscale.formats import file_shapes, from_file
    from vitscale.tensorfiles import open_tensors

    assert description.form
    weights = description.path / description.weights
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing")
    file, expected = open_tensors(weights), file_shapes(description.form, description.model, description.prefix)
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
    return from_file(description.form, description.model, description.prefix, file.read)


def piece_key(name: str, kind: str, offset: int) -> str:
    """The name of a piece in its safetensors file."""
    return f"{kind}/{name}/{offset}"


def read_weights(description: Description, kind: str, shapes: dict[str, tuple[int, ...]]) -> "dict[str, Tensor]":
    """All weights of a model with these shapes. Raises CheckpointError where a tensor is missing, extra or of another shape.

    Args:
        kind: `average` (where there is one) or `weight`.
    """
    kind, reader = description.preferred(kind), TensorReader(description)
    if not description.form:
        check_tensors(description, shapes, {kind: shapes.keys()})
    return {name: reader.whole(name, kind) for name in shapes}


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


# ---------------------------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------------------------


def write_description(file: Path, description: Description) -> None:
    """Writes checkpoint.json or an export's description: a setting a line, a tensor a line."""
    values = asdict(replace(description, tensors=()))
    del values["path"], values["tensors"]  # a folder may be moved
    if not description.form:
        del values["form"], values["prefix"], values["weights"], values["origin"]
    tensors = (json.dumps(vars(t) | {"pieces": [vars(piece) for piece in t.pieces]}) for t in description.tensors)
    head = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1, allow_nan=False).removesuffix("\n}")
    file.write_text(f"{head},\n " + '"tensors": [\n' + ",\n".join(tensors) + "\n]}\n")


def partial_folder(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    folder = step_folder(run, step)
    return folder.with_name(f".{folder.name}.partial")


def commit(run: Path, step: int, checksums: dict[str, str]) -> None:
    """Makes a written checkpoint durable, in place of one of that step that did not verify, and points `latest` at it."""
    folder = step_folder(run, step)
    if folder.exists():  # one that did not verify, or that a run was taken back to before
        shutil.rmtree(folder)
    publish(partial_folder(run, step), folder, checksums)
    with contextlib.suppress(OSError):  # it is for people and other tools; the checkpoint is there without
        replace_file(folder.parent / "latest", folder.name + "\n")


def publish(hidden: Path, folder: Path, checksums: dict[str, str]) -> None:
    """Gives a written folder its COMMIT.json, syncs it and renames it into place."""
    files = {name: {"size": (hidden / name).stat().st_size, "xxh3_128": checksum} for name, checksum in sorted(checksums.items())}
    (hidden / "COMMIT.json").write_text(json.dumps({"files": files}, indent=1))
    publish_folder(hidden, folder)


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
