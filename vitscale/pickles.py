"""What torch.save wrote, read as data: nothing that a file names is imported or called, no byte of a tensor is read before it is asked for.

A pickle is a program; this is the part of it that says plain values and tensors. Whatever else it would make, by calling what it likes,
becomes `OTHER`, so that training states with settings and optimizers beside the weights are read, too. torch's own `weights_only` reader
does not do: it takes compressed members for weights, lets a storage reach into its neighbours, and hashes nested tuples for ever.

Where it stands: below `tensorfiles.py`. Both layouts of torch/serialization.py are known: the archive, since torch 1.6, and the stream
of pickles before. Functions raise ValueError, and what zipfile and pickletools do; `tensorfiles.faults_of` makes a line of it.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]

_MOST_PROGRAM = 1 << 26  # bytes of a pickle without its tensors
_MOST_STEPS = 4_000_000  # of a pickle, which take seconds; the state of an optimizer of a thousand tensors has some 100,000
_MOST_DEFLATED = 1_032  # times that deflate can make bytes fewer (zlib's documentation)
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch/serialization.py's stream
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_KEYS = (str, int, float, bool, bytes, type(None))  # of a mapping: hashing nested tuples may take for ever


class Storage(NamedTuple):
    """Numbers in a row that tensors are made of."""

    dtype: torch.dtype
    key: str
    """Its name in the file."""
    length: int
    """Of elements."""


class Stored(NamedTuple):
    """A tensor that has not been read."""

    storage: Storage
    offset: int
    """Of its first element in the storage."""
    shape: Shape
    strides: tuple[int, ...]


class Other:
    """What stands for anything that is neither a plain value nor a tensor; all of them are alike."""


OTHER = Other()


class _Name(NamedTuple):
    """Of a class or function, which is never looked up."""

    words: str


def open_pickle(path: Path) -> tuple[Any, Callable[[Stored], Tensor]]:
    """The tree of a file's values, with `Stored` for tensors and `OTHER` for what is not known; and what reads one of these tensors.

    Raises ValueError where it is none of torch.save's or cannot be so.
    """
    return _open_archive(path) if zipfile.is_zipfile(path) else _open_stream(path)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The two layouts
# ---------------------------------------------------------------------------------------------------------------------------------------


def _open_archive(path: Path) -> tuple[Any, Callable[[Stored], Tensor]]:
    """FOLDER/data.pkl, and a member FOLDER/data/KEY for each storage; zipfile holds what is read against the archive's checksums."""
    archive = zipfile.ZipFile(path)
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise ValueError("a name is there twice")
    folder, _, last = min(members, default="").partition("/")
    if f"{folder}/constants.pkl" in members:
        raise ValueError("it is a program of TorchScript, which is never run; save its state_dict")
    if not last or f"{folder}/data.pkl" not in members:
        raise ValueError("it is an archive, but not one that torch.save writes")
    if f"{folder}/byteorder" in members and _member(archive, members[f"{folder}/byteorder"], 16) != b"little":
        raise ValueError("its numbers have the other order of bytes")
    tree = _tree(io.BytesIO(_member(archive, members[f"{folder}/data.pkl"], _MOST_PROGRAM)))

    def read(tensor: Stored) -> Tensor:
        info, length = members[f"{folder}/data/{tensor.storage.key}"], tensor.storage.length * tensor.storage.dtype.itemsize
        if info.file_size != length:
            raise ValueError(f"its storage has {info.file_size} bytes, not the {length} that it says")
        return _strided(tensor, _member(archive, info, length))

    return tree, read


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytearray:
    """All of a member, held against its checksum."""
    check_member(info)
    if info.file_size > most:
        raise ValueError(f"{info.filename:.100} has {info.file_size} bytes")
    found = bytearray()
    with archive.open(info) as member:
        while block := member.read(1 << 22):
            found += block
    return found


def check_member(info: zipfile.ZipInfo) -> None:
    """Raises ValueError where unpacking a member of an archive would take more than its bytes can be worth."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename:.100} is compressed as neither numpy nor torch does")
    if info.file_size > info.compress_size * _MOST_DEFLATED + 1024:
        raise ValueError(f"{info.filename:.100} has {info.file_size} bytes in {info.compress_size}, which cannot be")


def _open_stream(path: Path) -> tuple[Any, Callable[[Stored], Tensor]]:
    """Pickles of a magic number, a version, the machine, the values and the storages' keys, then each storage behind its length."""
    storages: dict[str, Storage] = {}
    with open(path, "rb") as file:
        programs = io.BytesIO(file.read(_MOST_PROGRAM))
        if (_tree(programs), _tree(programs)) != (_MAGIC, _PROTOCOL):
            raise ValueError("it is a pickle, but none that torch.save writes")
        machine, tree, keys = _tree(programs), _tree(programs, storages), _tree(programs)
        if not (isinstance(machine, dict) and machine.get("little_endian") is True):
            raise ValueError("its numbers have the other order of bytes")
        if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and sorted(keys) == sorted(storages)):
            raise ValueError("its storages are not those of its tensors")
        size, at, begins = path.stat().st_size, programs.tell(), dict[str, int]()
        for key in keys:
            file.seek(at)
            length, begins[key] = int.from_bytes(file.read(8), "little"), at + 8
            at += 8 + length * storages[key].dtype.itemsize
            if length != storages[key].length or at > size:
                raise ValueError(f"storage {key:.20} has {length} elements, of {storages[key].length}, in a file of {size} bytes")

    def read(tensor: Stored) -> Tensor:
        with open(path, "rb") as file:
            file.seek(begins[tensor.storage.key])
            return _strided(tensor, bytearray(file.read(tensor.storage.length * tensor.storage.dtype.itemsize)))

    return tree, read


def _strided(tensor: Stored, storage: bytearray) -> Tensor:
    """The tensor, of the bytes of its storage."""
    if not storage:
        return torch.empty(tensor.shape, dtype=tensor.storage.dtype)
    numbers = torch.frombuffer(storage, dtype=tensor.storage.dtype)
    return numbers.as_strided(tensor.shape, tensor.strides, tensor.offset).contiguous()


# ---------------------------------------------------------------------------------------------------------------------------------------
# The values of a pickle
# ---------------------------------------------------------------------------------------------------------------------------------------


def _tree(file: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the next pickle of a file says, which is read up to its end.

    Args:
        storages: is told of those that there are, by their keys.
    """
    stack: list[Any] = []
    marks: list[int] = []  # lengths of the stack
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def since_mark() -> list[Any]:
        begin = marks.pop()
        taken = stack[begin:]
        del stack[begin:]
        return taken

    def taken(count: int) -> list[Any]:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise ValueError("its pickle takes what is not there")
        found = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return found

    for step, (operation, said, _) in enumerate(pickletools.genops(file)):
        if step == _MOST_STEPS:
            raise ValueError(f"its pickle has more than {_MOST_STEPS} steps")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return taken(1)[0]
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(OTHER)
            case "MARK":
                marks.append(len(stack))
            case "POP":
                taken(1)
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.extend(taken(1) * 2)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken(int(operation.name[-1]))))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "LIST":
                stack.append(since_mark())
            case "DICT":
                stack.append(_put({}, since_mark()))
            case "SETITEM" | "SETITEMS":
                pairs = taken(2) if operation.name == "SETITEM" else since_mark()
                stack.append(_put(taken(1)[0], pairs))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = taken(1) if operation.name == "APPEND" else since_mark()
                (into,) = taken(1)
                if isinstance(into, list):
                    into.extend(items)
                stack.append(into)
            case "GLOBAL":
                stack.append(_Name(str(said)))
            case "STACK_GLOBAL":
                stack.append(_Name(" ".join(word for word in taken(2) if isinstance(word, str))))
            case "REDUCE" | "NEWOBJ":
                stack.append(_made(*taken(2)))
            case "NEWOBJ_EX":
                taken(3)
                stack.append(OTHER)
            case "INST" | "OBJ":
                since_mark()
                stack.append(OTHER)
            case "BUILD":  # the state of an object, as an OrderedDict's `_metadata`: no value is in it
                taken(1)
            case "BINPERSID":
                storage = _storage(*taken(1))
                if isinstance(storage, Storage) and storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key:.20} is two things at once")
                stack.append(storage)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if operation.name == "MEMOIZE" else int(said or 0)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[int(said or 0)])
            case name if name.startswith(_PLAIN):
                stack.append(said)
            case name:
                raise ValueError(f"its pickle has {name}, which torch.save does not write")
    raise ValueError("its pickle has no end")


_PLAIN = (
    "BININT",
    "INT",
    "LONG",
    "BINFLOAT",
    "FLOAT",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BIN",
    "STRING",
    "BINSTRING",
    "BINBYTES",
    "BYTEARRAY",
)


def _put(into: Any, pairs: list[Any]) -> Any:
    """A mapping with these keys and values, one behind the other; nothing else has any. Raises ValueError where one is there twice."""
    if isinstance(into, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) in _KEYS:
                if key in into:
                    raise ValueError(f"{key!r:.100} is there twice")
                into[key] = value
    return into


def _made(of: Any, values: Any) -> Any:
    """What a call would make, where it is known without calling."""
    match of, values:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor"), (Storage() as storage, offset, shape, strides, *_):
            return _stored(storage, offset, shape, strides)
        case _Name("torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state"), (Stored() as tensor, *_):
            return tensor
        case _Name("torch._tensor _rebuild_from_type_v2"), (_Name() as inner, _, tuple() as inner_values, _):
            return _made(inner, inner_values)
    return OTHER


def _storage(said: Any) -> Storage | Other:
    """Of ("storage", type, key, device, length), in a stream with a view of it besides."""
    match said:
        case ("storage", _Name(words), str() as key, _, int() as length) | (
            "storage",
            _Name(words),
            str() as key,
            _,
            int() as length,
            None,
        ):
            module, _, kind = words.rpartition(" ")
            if module in ("torch", "torch.storage") and kind in _STORAGES and length >= 0:
                return Storage(_STORAGES[kind], key, length)
    return OTHER


def _stored(storage: Storage, offset: Any, shape: Any, strides: Any) -> Stored:
    """Raises ValueError where a tensor does not lie in its storage, or says more than that has."""
    for numbers in ((offset,), shape, strides):
        if not (
            isinstance(numbers, tuple) and len(numbers) <= 8 and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        ):
            raise ValueError(f"a tensor of shape {shape!r:.100}, strides {strides!r:.100} and offset {offset!r:.100} cannot be")
    elements = math.prod(shape)
    end = offset + 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if elements else 0
    if max(end, elements) > storage.length:
        raise ValueError(f"a tensor of shape {shape} does not lie in its storage of {storage.length} elements")
    return Stored(storage, offset, shape, strides)
