"""Files of tensors, read and written one tensor at a time: safetensors, numpy's npz, torch's pickles.

Where it stands: below `formats.py`, which knows what names mean. What is read may have been written by anybody: sizes are checked against
the file before anything is allocated, no code of a file is run, and whatever is wrong with one is a CheckpointError of one line. What is
written holds one tensor in memory, for a ViT-H/14 is no reason to ask for a large machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitscale.checkpoint import CheckpointError

Shape = tuple[int, ...]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_MOST_TENSORS = 100_000
_MOST_DEFLATED = 1_032  # times that deflate can make bytes fewer (zlib's documentation)
SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
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
    ) -> None:  # fmt: skip
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
    """A file of tensors, of the kind that its first bytes say. Raises CheckpointError, and OSError where it is not there."""
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    with open(path, "rb") as file:
        begins = file.read(10)
    with faults_of(path):
        if begins[:4] == b"PK\x03\x04":
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
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
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
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise ValueError(f"its header says it has {length} bytes, of a file of {size}")
        header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_each_once)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise ValueError(f"it says it holds {len(header)} tensors")
    entries = {}
    for name, said in header.items():
        dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
        width = _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_BYTES[dtype]
        if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError(f"{name:.100} has shape {shape!r:.100}")
        if end - begin != math.prod(shape) * width or not 8 + length + end <= size:
            raise ValueError(f"{name:.100} of shape {shape} lies at bytes {begin} to {end}, which cannot be")
        entries[name] = Entry(dtype, tuple(shape), 8 + length + begin, end - begin)
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


def _open_shards(index: Path) -> TensorFile:
    """The tensors of several files, as an index of the Hugging Face hub names them."""
    with faults_of(index):
        names = json.loads(index.read_bytes())["weight_map"]
        files = {name: index.with_name(Path(name).name) for name in set(names.values())}
        opened = {name: open_tensors(file) for name, file in files.items()}
        shapes = {tensor: opened[name].shapes[tensor] for tensor, name in names.items()}
    return TensorFile(index, shapes, lambda tensor, at: opened[names[tensor]].read(tensor, at))


# ---------------------------------------------------------------------------------------------------------------------------------------
# npz
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> TensorFile:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        if len(archive.infolist()) > _MOST_TENSORS:
            raise ValueError(f"it holds {len(archive.infolist())} arrays")
        for info in archive.infolist():
            with archive.open(info) as member:
                shape, dtype = _npy_header(member)
                length = math.prod(shape) * dtype.itemsize + member.tell()
            if info.file_size != length or info.file_size > info.compress_size * _MOST_DEFLATED + 1024:
                raise ValueError(f"{info.filename:.100} of shape {shape} has {info.file_size} bytes, which cannot be")
            shapes[info.filename.removesuffix(".npy")] = shape
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


def _npy_header(member: Any) -> tuple[Shape, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("it is a pickle, which is never read")
    if fortran and len(shape) > 1:
        raise ValueError("it is stored column by column, as none of Google's files are")
    return tuple(shape), dtype


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
            shape, dtype = _npy_header(member)
            header = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or not shape:
            return _read_npy(path, name)[at]
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
        begin = info.header_offset + 30 + name_bytes + extra_bytes + header
    mapped = np.memmap(path, dtype, "r", begin, shape, "C")
    return _as_tensor(np.array(mapped[at]))


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    if array.dtype == np.dtype("V2"):  # bfloat16, which numpy has no name for: big_vision's utils.py reads and writes it so
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).view(array.shape)


def write_npz(file: Path, shapes: Mapping[str, Shape], value: Callable[[str], Tensor]) -> None:
    """Writes arrays of these shapes in fp32, asking for one after the other, byte for byte the same each time. Raises OSError."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, shape in shapes.items():
            tensor = value(name).float().contiguous()
            assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.numpy(), allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Pickles, of which nothing but tensors and plain values is made
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_pickle(path: Path) -> TensorFile:
    """What torch.save wrote. torch's own unpickler makes tensors and plain values alone (`weights_only`), here argparse's settings too."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            raise ValueError(f"torch's weights_only unpickler refuses it: {' '.join(str(error).split())[:200]}") from None
    wraps: tuple[str, ...] = ()
    while isinstance(loaded, dict) and (inner := next((name for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)):
        wraps += tuple(str(name) for name in loaded if name != inner)
        loaded = loaded[inner]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors by name")
    tensors = {name: of for name, of in loaded.items() if isinstance(name, str) and isinstance(of, Tensor)}
    wraps += tuple(str(name) for name in loaded if name not in tensors)
    if not tensors:
        raise ValueError(f"it holds no tensors by name, but {', '.join(wraps)[:100] or 'nothing'}")
    return TensorFile(
        path,
        {name: tuple(of.shape) for name, of in tensors.items()},
        lambda name, at: _dense(tensors[name] if at is None else tensors[name][at]),
        wraps,
    )


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() > tensor.untyped_storage().nbytes():
        raise ValueError("it is not stored element by element")
    return tensor.detach().clone()
