"""Checkpoints: there whole or not at all, read at any world size and ZeRO stage. The format is docs/design.md's "Run directory".

    RUN/checkpoints/step-00012000/
        node-0000.safetensors   flat fp32 pieces of tensors, named KIND/PARAMETER/OFFSET
        checkpoint.json         format version, model, preprocessing, class names, clock, and for every tensor its shape and pieces
        COMMIT.json             sizes and checksums of the others; written last

A folder is durable once COMMIT.json is there and its checksums hold. It is written (by `saving.py`) under a hidden name, synced, and
renamed. What finds, describes and checks checkpoints is here and imports no torch; `weights.py` reads their tensors. What is read may have
been written by anybody.
"""

import contextlib
import json
import math
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import xxhash

from data_tools.durable import publish_folder, replace_file
from vitscale.check import check_bounds, check_model
from vitscale.config import UNREADABLE, EvalProtocol, Format, ObjectiveConfig, PreprocessConfig, ViTConfig, from_dict
from vitscale.errors import CheckpointError

FORMAT_VERSION = 1
EXPORT_DESCRIPTION = "vitscale.json"  # what an exported folder holds in place of checkpoint.json
WEIGHT, AVERAGE = "weight", "average"  # kinds of tensors, beside the optimizer's moments
# What an export's origin holds that is not a word: an object or a list, and of what
_ORIGIN: dict[str, tuple[type, Any]] = {
    "results": (dict, (int, float)),
    "evaluated_on": (dict, (str, int)),
    "versions": (dict, str),
    "left_out": (dict, str),
    "datasets": (list, dict),
    "assumed": (list, str),
}
_STEP_FOLDER = re.compile(r"step-\d{8,18}")
_FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # of files in a checkpoint: no path, and not hidden
_EXPORTED_NAME = re.compile(r"(?:certificate/)?\w[\w.-]{0,99}", re.ASCII)  # and in an export
_MOST = 2**63  # no count in a checkpoint reaches it


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened tensor."""

    file: str
    offset: int
    length: int


def piece_key(name: str, kind: str, offset: int) -> str:
    """The name of a piece in its safetensors file."""
    return f"{kind}/{name}/{offset}"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: a parameter's weight, one of its moments, or its average."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class RunState:
    """Where a run stands at a checkpoint, beside its clock; an export has none of it."""

    cursor: int = 0
    """On tars without an index: the shards, counted through epochs, that all ranks have used up (`foreign.py`)."""
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

    @property
    def in_doubt(self) -> bool:
        """Whether its last steps may turn out to be some of those to be rolled back: made at a stop amid what seemed to go wrong."""
        return bool(self.spikes or self.nonfinite_steps)


@dataclass(frozen=True)
class Exported:
    """How an export's file holds the tensors, and where they come from."""

    form: Format
    """How the file names and lays out the tensors."""
    prefix: str
    """What stands before their names."""
    weights: str
    """The file."""
    origin: dict[str, Any]
    """Of the weights (`origin.py`)."""


@dataclass(frozen=True)
class Description:
    """What a folder of weights says of itself: a checkpoint of a run, or an export."""

    path: Path
    """The folder."""
    model: ViTConfig
    preprocess: PreprocessConfig
    objective: ObjectiveConfig
    class_names: tuple[str, ...] | None
    samples_seen: int
    step: int
    tensors: tuple[TensorEntry, ...] = ()
    """Of a checkpoint; those of an export follow from its model."""
    state: RunState = RunState()
    exported: Exported | None = None
    """Of a checkpoint None."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where an export's weights come from; nothing of a checkpoint's, whose run tells it."""
        return self.exported.origin if self.exported else {}

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
# Folders
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
    if not is_plain(path):
        return f"{folder}: {name} is {'not a plain file' if os.path.lexists(path) else 'missing'}"
    if path.stat().st_size != size:
        return f"{folder}: {name} has {path.stat().st_size} bytes, COMMIT.json says {size}"
    if file_checksum(path) != checksum:
        return f"{folder}: {name} does not have the checksum in COMMIT.json; the file is damaged"
    return None


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
        if odd := next((name for name in ("samples_seen", "step") if not _is_count(values[name])), None):
            raise ValueError(f"{odd} is {values[odd]!r:.50}, not a number of things")
        class_names = values["class_names"]
        if class_names and not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            raise ValueError("class_names are not a list of names")
        if broken := [name for name in class_names or [] if len(name.splitlines()) != 1]:
            raise ValueError(f"class_names has {broken[0]!r:.100}, which is not one line")
        exported = file.name == EXPORT_DESCRIPTION
        return Description(
            path=folder,
            model=model,
            preprocess=from_dict(PreprocessConfig, values["preprocess"], "preprocess"),
            objective=from_dict(ObjectiveConfig, values["objective"], "objective"),
            class_names=tuple(class_names) if class_names else None,
            samples_seen=values["samples_seen"],
            step=values["step"],
            tensors=() if exported else _read_entries(values["tensors"]),
            state=RunState() if exported else _read_state(values),
            exported=_read_exported(values) if exported else None,
        )
    except (OSError, *UNREADABLE) as error:
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({_words(error)})") from None


def _read_state(values: dict[str, Any]) -> RunState:
    """What a checkpoint's description says of its run. Raises what `UNREADABLE` names."""
    counts = {name: values.get(name, 0) for name in ("cursor", "nonfinite_steps")}  # which checkpoints of before had not, nor the next
    counts["updates"] = values["step"] if values.get("updates") is None else values["updates"]
    for name, value in counts.items():
        if not _is_count(value):
            raise ValueError(f"{name} is {value!r:.50}, not a number of things")
    skipped = tuple((low, high) for low, high in values["skipped"])
    if not all(_is_count(low) and _is_count(high) and low < high for low, high in skipped):
        raise ValueError("skipped are not ranges of positions")
    losses, spikes = (tuple(values.get(name, ())) for name in ("recent_losses", "spikes"))
    if not all(isinstance(loss, int | float) and math.isfinite(loss) for loss in (*losses, *spikes)):
        raise ValueError("recent_losses or spikes are not finite numbers")
    return RunState(skipped=skipped, recent_losses=losses, spikes=spikes, **counts)


def _read_exported(values: dict[str, Any]) -> Exported:
    """What an export's description has that a checkpoint's has not. Raises ValueError."""
    form, prefix, weights = values.get("form", "timm"), values.get("prefix", ""), values.get("weights", "model.safetensors")
    if form not in get_args(Format) or not (isinstance(prefix, str) and re.fullmatch(r"[\w./]{0,100}", prefix)):
        raise ValueError(f"form {form!r:.50} with prefix {prefix!r:.50} is none that is known")
    if not (isinstance(weights, str) and _FILE_NAME.fullmatch(weights)):
        raise ValueError(f"{weights!r:.100} is not the name of a file in the folder")
    origin = values.get("origin", {})
    _check_origin(origin)
    return Exported(form, prefix, weights, origin)


def _check_origin(origin: Any) -> None:
    """Raises ValueError where an origin is not made as `origin.py` and `adopt.py` make it, which model cards are written from."""
    if not isinstance(origin, dict):
        raise ValueError("origin is no object")
    for name, (made, of) in _ORIGIN.items():
        value = origin.get(name, made())
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, made) or not all(isinstance(one, of) for one in inner):
            raise ValueError(f"origin.{name} is {value!r:.50}, and not what an export says of it")
    for name in ("step", "samples_seen"):
        if not _is_count(origin.get(name, 0)):
            raise ValueError(f"origin.{name} is {origin[name]!r:.50}, not a number of things")
    if "initial" in origin:
        _check_origin(origin["initial"])


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
    if os.path.lexists(file) and not is_plain(file):
        raise ValueError("it is not a plain file")
    values: dict[str, Any] = json.loads(file.read_bytes(), object_pairs_hook=_each_once)
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names are there once; of two, as a flipped bit makes of neighbours, the second would hide the first."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def is_plain(path: Path) -> bool:
    """Whether a file is there, and is none that leads elsewhere or waits for a writer."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------------------------


def settings(description: Description) -> dict[str, Any]:
    """What a description says of all tensors together, as JSON has it."""
    values = asdict(replace(description, tensors=()))
    del values["path"], values["tensors"], values["state"], values["exported"]  # a folder may be moved
    # Versions of before look for `skipped` in exports, too
    return values | (asdict(description.exported) | {"skipped": []} if description.exported else asdict(description.state))


def write_description(file: Path, description: Description) -> None:
    """Writes checkpoint.json or an export's description: a setting a line, a tensor a line."""
    tensors = (json.dumps(vars(t) | {"pieces": [vars(piece) for piece in t.pieces]}) for t in description.tensors)
    head = json.dumps({"format_version": FORMAT_VERSION, **settings(description)}, indent=1, allow_nan=False).removesuffix("\n}")
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
