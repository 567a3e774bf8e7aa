"""Files of tensors, read and written one tensor at a time: safetensors, numpy's npz, torch's pickles.

Where it stands: below `formats.py`, which knows what names mean. What is read may have been written by anybody: sizes are checked against
the file before anything is allocated, no code of a file is run, and whatever is wrong with one is a CheckpointError of one line. What is
written holds one tensor in memory, for a ViT-H/14 is no reason to ask for a large machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitscale.errors import CheckpointError
from vitscale.pickles import Stored, check_member, open_pickle

Shape = tuple[int, ...]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MOST_JSON = 1 << 24  # bytes of a header or an index, which Python makes up to a hundred times as many of; 100,000 tensors have fewer
_MOST_NPY_HEADER = 1 << 14  # bytes; numpy takes 10,000 at most
_MOST_TENSORS = 100_000
_MOST_UNPACKED = 32  # times the bytes of an archive: weights are noise, unless most of them are zero
_SHARD = re.compile(r"\w[\w.-]{0,200}\.(safetensors|bin)", re.ASCII)
SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MOST_WRAPPERS = 4  # one in another
WRAPPERS = ("model", "state_dict", "teacher", "model_state_dict", "module", "model_ema")  # what training scripts put the weights under


class TensorFile:
    """The tensors of one file, or of a file in shards.

    Attributes:
        path: what was opened.
        shapes: of each tensor, by its name.
        wraps: what the file holds beside the tensors, and is not read.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Shape], read: Callable[[str, int | None], Tensor], wraps: tuple[str, ...] = ()
    ) -> None:
        if odd := next((name for name in shapes if not name.isprintable()), None):
            raise ValueError(f"a tensor is called {odd!r:.100}")
        self.path, self.shapes, self.wraps = path, dict(shapes), wraps
        self._read = read

    def read(self, name: str, at: int | None = None) -> Tensor:
        """A tensor in fp32, or what is at one place of its first axis.

        Raises CheckpointError where it cannot be read, is no floating-point tensor or holds a number that is not finite.
        """
        with faults_of(self.path, name):
            tensor = self._read(name, at)
            if not tensor.is_floating_point():
                raise ValueError(f"it is of type {tensor.dtype}, not of floating point")
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError("it holds numbers that are not finite")
        return tensor


def open_tensors(path: Path) -> TensorFile:
    """A file of tensors, of the kind that its first bytes say. Raises CheckpointError."""
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} {'is no plain file' if path.exists() else 'is missing'}")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    with open(path, "rb") as file:
        begins = file.read(10)
    with faults_of(path):
        if begins[:4] == b"PK\x03\x04":
            if not zipfile.is_zipfile(path):
                raise ValueError("it begins as an archive and has not the end of one")
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            return _open_npz(path) if names and all(name.endswith(".npy") for name in names) else _open_pickle(path)
        if begins[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return _open_pickle(path)
        if begins[8:9] == b"{":
            return _open_safetensors(path)
    raise CheckpointError(f"{path} is no file of tensors: safetensors, npz and what torch.save writes are known")


@contextlib.contextmanager
def faults_of(path: Path, name: str = "") -> Iterator[None]:
    """Whatever is wrong with a file, in one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of numpy, zipfile, torch's unpickler and its C++: they raise what they like on bytes that make no sense
        words = "".join(c if c.isprintable() else "?" for c in " ".join(f"{type(error).__name__}: {error}".split())[:300])
        raise CheckpointError(f"{path}{f': {name:.100}' if name else ''} cannot be read as tensors ({words})") from None


# ---------------------------------------------------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> TensorFile:
    entries = safetensors_entries(path)

    def read(name: str, at: int | None) -> Tensor:
        entry = entries[name]
        if entry.dtype not in _DTYPES:
            raise ValueError(f"it is of type {entry.dtype}, not of floating point")
        out = torch.empty(entry.shape if at is None else entry.shape[1:], dtype=_DTYPES[entry.dtype])
        read_into(path, entry, (at or 0) * out.numel(), out)
        return out

    return TensorFile(path, {name: entry.shape for name, entry in entries.items()}, read)


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: Shape
    offset: int
    """Of its first byte in the file."""
    length: int
    """In bytes."""


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """Where the tensors of a safetensors file lie. Raises ValueError, KeyError, TypeError or OSError where its header cannot be so."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_JSON, size - 8):
            raise ValueError(f"its header says it has {length} bytes, of a file of {size}; {_MOST_JSON} are the most")
        header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_each_once)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise ValueError(f"it says it holds {len(header)} tensors")
    entries = {}
    for name, said in header.items():
        dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
        if dtype not in _DTYPES and dtype not in _OTHER_BYTES:
            raise ValueError(f"{name:.100} is of type {dtype!r:.50}")
        width = _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_BYTES[dtype]
        if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError(f"{name:.100} has shape {shape!r:.100}")
        if 8 + length + end > size:
            raise ValueError(f"it has {size:,} bytes and says {name:.100} ends at {8 + length + end:,}: it is cut short; copy it again")
        if end - begin != math.prod(shape) * width:
            raise ValueError(f"{name:.100} of shape {shape} lies at bytes {begin} to {end}, which cannot be")
        entries[name] = Entry(dtype, tuple(shape), 8 + length + begin, end - begin)
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].length)):
        if entry.offset != at:
            raise ValueError(f"{name:.100} begins at byte {entry.offset}, and the tensor before it ends at {at}")
        at += entry.length
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, of a file of {size}")
    return entries


def read_into(path: Path, entry: Entry, first: int, out: Tensor) -> None:
    """Fills a contiguous tensor, of the type that the file has, with the flattened elements of one from `first` on.

    Read and not mapped: pages of a mapped file count as memory of the process for as long as it is open.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.offset + first * out.itemsize)
        room = _bytes_of(out)
        while room:  # Linux reads 2 GiB at once, at most
            read = file.readinto(room)
            if not read:
                raise ValueError("the file ends before it")
            room = room[read:]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def write_safetensors(file: Path, shapes: Mapping[str, Shape], value: Callable[[str], Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Writes tensors of these shapes, asking for one after the other, in fp32 or rounded to bf16.

    Raises OSError; what was written by then is the caller's to remove.
    """
    kind = next(name for name, of in _DTYPES.items() if of == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = value(name).to(dtype).contiguous()
            assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
            out.write(_bytes_of(tensor))


def read_json(file: Path) -> dict[str, Any]:
    """An object that somebody else wrote. Raises what `config.UNREADABLE` names, and OSError."""
    with open(file, "rb") as opened:
        text = opened.read(_MOST_JSON + 1)
    if len(text) > _MOST_JSON:
        raise ValueError(f"it has more than {_MOST_JSON} bytes")
    values = json.loads(text, object_pairs_hook=_each_once)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _open_shards(index: Path) -> TensorFile:
    """The tensors of several files, as an index of the Hugging Face hub names them; all that are in these, and no others."""
    with faults_of(index):
        names: dict[str, str] = read_json(index)["weight_map"]
        if odd := next((name for name in names.values() if not (isinstance(name, str) and _SHARD.fullmatch(name))), None):
            raise ValueError(f"{odd!r:.100} is not the name of a file of weights in the folder")
        opened = {name: open_tensors(index.with_name(name)) for name in sorted(set(names.values()))}
        for file, tensors in opened.items():
            if unsaid := next((tensor for tensor in tensors.shapes if names.get(tensor) != file), None):
                raise ValueError(f"{file} holds {unsaid:.100}, which it does not say")
        if missing := next((tensor for tensor, file in names.items() if tensor not in opened[file].shapes), None):
            raise ValueError(f"{names[missing]} does not hold {missing:.100}")
        shapes = {tensor: opened[file].shapes[tensor] for tensor, file in names.items()}
    return TensorFile(index, shapes, lambda tensor, at: opened[names[tensor]].read(tensor, at))


# ---------------------------------------------------------------------------------------------------------------------------------------
# npz
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> TensorFile:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        if len(archive.infolist()) > _MOST_TENSORS:
            raise ValueError(f"it holds {len(archive.infolist())} arrays")
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > (1 << 24) + _MOST_UNPACKED * path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes and says it unpacks to {unpacked}")
        for info in archive.infolist():
            check_member(info)
            with archive.open(info) as member:
                said = _npy_header(member, info.filename)
            if info.file_size != said.begin + math.prod(said.shape) * said.dtype.itemsize:
                raise ValueError(f"{info.filename:.100} of shape {said.shape} has {info.file_size} bytes, which cannot be")
            shapes[info.filename.removesuffix(".npy")] = said.shape
        if len(shapes) != len(archive.infolist()):
            raise ValueError("a name is there twice")
    checked: list[str] = []

    def read(name: str, at: int | None) -> Tensor:
        if at is None:
            return _read_npy(path, name)
        if not checked:  # all sums that the archive has, once: what is read by its place is not held against them
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} does not have the checksum that the archive says")
            checked.append(name)
        return _read_npy_at(path, name, at)

    return TensorFile(path, shapes, read)


class Npy(NamedTuple):
    """What the header of an array says."""

    shape: Shape
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    """Row by row, or, as numpy stores what was transposed, column by column."""
    begin: int
    """Of its numbers, in bytes behind the header's first."""


def _npy_header(member: Any, name: str) -> Npy:
    head = io.BytesIO(member.read(_MOST_NPY_HEADER))  # before numpy reads as many bytes as a header says it has
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name:.100} is of version {version}, which arrays of numbers are not")
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(head)
    if dtype.hasobject:
        raise ValueError(f"{name:.100} is a pickle, which is never read")
    if dtype.names or dtype.subdtype or not all(type(side) is int and 0 <= side < 2**48 for side in shape) or len(shape) > 8:
        raise ValueError(f"{name:.100} has shape {shape!r:.100} of {dtype!s:.100}")
    return Npy(tuple(shape), dtype, "F" if fortran else "C", head.tell())


def _read_npy(path: Path, name: str) -> Tensor:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:  # which checks the sum that the archive has of it
        array = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)
    return _as_tensor(array)


def _read_npy_at(path: Path, name: str, at: int) -> Tensor:
    """What is at one place of the first axis: where the array is stored as it is, nothing else is read."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            said = _npy_header(member, name)
        if info.compress_type != zipfile.ZIP_STORED or not said.shape:
            return _read_npy(path, name)[at]
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
        begin = info.header_offset + 30 + name_bytes + extra_bytes + said.begin
    mapped = np.memmap(path, said.dtype, "r", begin, said.shape, said.order)
    return _as_tensor(np.array(mapped[at]))


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    rows = np.ascontiguousarray(array)
    if array.dtype == np.dtype("V2"):  # bfloat16, which numpy has no name for: big_vision's utils.py reads and writes it so
        return torch.from_numpy(rows.view(np.int16).copy()).view(torch.bfloat16).view(array.shape)
    return torch.from_numpy(rows).view(array.shape)


def write_npz(file: Path, shapes: Mapping[str, Shape], value: Callable[[str], Tensor]) -> None:
    """Writes arrays of these shapes in fp32, asking for one after the other, byte for byte the same each time. Raises OSError."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, shape in shapes.items():
            tensor = value(name).float().contiguous()
            assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.numpy(), allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Pickles, which `pickles.py` reads as data
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_pickle(path: Path) -> TensorFile:
    """What torch.save wrote: the weights, under whatever a training script put them."""
    loaded, read = open_pickle(path)
    wraps: list[str] = []
    for _ in range(_MOST_WRAPPERS):  # one may hold itself
        inner = next((name for name in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)), None)
        if inner is None:
            break
        wraps += [_called(name) for name in loaded if name != inner]
        loaded = loaded[inner]
    if not isinstance(loaded, dict):
        raise ValueError("it holds a whole object or a list, not tensors by name; save its state_dict")
    tensors = {name: of for name, of in loaded.items() if isinstance(name, str) and isinstance(of, Stored)}
    wraps += [_called(name) for name in loaded if name not in tensors]
    if not tensors:
        raise ValueError(f"it holds no tensors by name, but {', '.join(wraps)[:100] or 'nothing'}")

    def read_at(name: str, at: int | None) -> Tensor:
        return read(tensors[name]) if at is None else read(tensors[name])[at]

    return TensorFile(path, {name: of.shape for name, of in tensors.items()}, read_at, tuple(wraps))


def _called(key: Any) -> str:
    """A key of a mapping, for people."""
    return key[:60] if isinstance(key, str) and key.isprintable() else f"{key!r:.60}"
