"""Files of weights of all formats, damaged or strange in every way, each by a number; and what takes them up, in a process with limits.

    python -m tests.vitscale.damage FOLDER FIRST END

Not a test itself. A case is a file and what must become of it: its weights to the bit, or one line that says why not. The process tells of
each case whether that held; it has little more memory than torch needs, a limit of time a case, and payloads that would leave a mark.
"""

import contextlib
import faulthandler
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from tests.vitscale.models import random_vit
from vitscale.adopt import open_foreign
from vitscale.config import Format, ImportConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.formats import file_shapes, from_file, to_file
from vitscale.targets import timm_config

SMALL = ViTConfig(depth=3, width=32, mlp_dim=48, num_heads=4, patch_size=8, image_size=(32, 32), num_classes=5)
MARK = "a payload ran"
SECONDS, MEMORY = 120, 1 << 30  # of a case; beyond what the process has before
NDArray = np.ndarray[Any, Any]


@dataclass
class Case:
    """A file to take up, and what must come of it."""

    path: Path
    weights: dict[str, Tensor] | None = None
    """By our names, to the bit; None: it must be refused."""
    reason: str = ""
    """A pattern that the refusal has."""
    either: bool = False
    """It may be refused or give the weights."""
    asked: ImportConfig = field(default_factory=lambda: ImportConfig(num_heads=4))


@dataclass
class Base:
    """A whole file before it is damaged."""

    form: Format
    model: ViTConfig
    prefix: str
    ours: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """By the format's names."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """That a file may have, or not."""
    sidecars: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("safetensors", "zip", "stream")
    """Of files that such weights come in."""
    optional: tuple[str, ...] = ()
    """Names without which there is another whole model, and nothing tells that it is another."""


def _base(form: Format, model: ViTConfig, prefix: str = "", **about: Any) -> Base:
    ours = {name: p.detach() for name, p in random_vit(model).named_parameters()}
    value = to_file(form, model, prefix, lambda name, start, length: ours[name].flatten()[start : start + length])
    tensors = {name: value(name).contiguous() for name in file_shapes(form, model, prefix)}
    return Base(form, model, prefix, ours, tensors, **about)


def bases() -> dict[str, Base]:
    """A small model in each format."""
    tanh = replace(SMALL, activation="gelu_tanh")
    dino = replace(SMALL, registers=2, layer_scale=1e-5, num_classes=0, class_position=True)
    hf = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 32, "num_hidden_layers": 3,
        "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 8, "image_size": 32, "num_channels": 3, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "qkv_bias": True, "id2label": {str(number): f"class {number}" for number in range(5)},
    }  # fmt: skip
    decoder = {
        "mask_token": torch.ones(1, 1, 16),
        "decoder_embed.weight": torch.ones(16, 32),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
    }
    numpy = {"kinds": ("npz",), "optional": ("params/cls", "cls")}
    return {
        "timm": _base("timm", SMALL),
        "timm with settings": _base("timm", SMALL, sidecars={"config.json": timm_config(SMALL, 1e-6, PreprocessConfig(), None)}),
        "hf": _base("hf_vit", SMALL, "vit.", sidecars={"config.json": hf}),
        "mae": _base("timm", replace(SMALL, num_classes=0), extras=decoder),
        "dinov2": _base("dinov2", dino, optional=("register_tokens",), extras={"mask_token": torch.ones(1, 32)}),
        "big_vision": _base("big_vision", replace(tanh, class_position=False), "params/", **numpy),
        "map": _base("big_vision", replace(tanh, pool="map"), "params/", **numpy),
        "scan": _base("big_vision_scan", replace(tanh, pool="map"), "params/", **numpy),
        "vision_transformer": _base("vision_transformer", tanh, **numpy),
    }


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------------------------------------------------

SUFFIXES = {"safetensors": ".safetensors", "npz": ".npz", "zip": ".pth", "stream": ".pth"}


def content(kind: str, tensors: dict[str, Tensor]) -> bytes:
    """A file of tensors as its own library writes it."""
    file = io.BytesIO()
    if kind == "safetensors":
        return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    if kind == "npz":
        np.savez(file, **{name: _array(tensor) for name, tensor in tensors.items()})
    else:
        torch.save({"model": tensors, "epoch": 3}, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


def _array(tensor: Tensor) -> NDArray:
    """As big_vision has it: bfloat16 is nothing that numpy knows."""
    return tensor.contiguous().view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Site:
    """Where the files of one case are written, and a chance that its number makes."""

    def __init__(self, folder: Path, number: int, all_bases: dict[str, Base]) -> None:
        self.folder, self.rng = folder, random.Random(number)
        self.base = all_bases[self.rng.choice(sorted(all_bases))]
        self.all = all_bases
        self.kind = self.rng.choice(self.base.kinds)

    def of(self, *names: str, kind: str = "") -> "Site":
        """The same with one of these bases."""
        self.base = self.all[self.rng.choice(names)]
        self.kind = kind or self.rng.choice(self.base.kinds)
        return self

    def write(self, tensors: dict[str, Tensor] | None = None, sidecars: dict[str, Any] | None = None) -> Path:
        """The file of these tensors, or of the base's."""
        extras = self.base.extras if self.rng.random() < 0.5 else {}
        return self.put(content(self.kind, {**self.base.tensors, **extras} if tensors is None else tensors), sidecars)

    def put(self, data: bytes, sidecars: dict[str, Any] | None = None) -> Path:
        """A file of these bytes, with the base's settings beside it."""
        path = self.folder / f"weights{SUFFIXES[self.kind]}"
        path.write_bytes(data)
        for name, said in (self.base.sidecars if sidecars is None else sidecars).items():
            (self.folder / name).write_text(said if isinstance(said, str) else json.dumps(said))
        return path

    def one(self, *, matrix: bool = False, needed: bool = False) -> str:
        """One of the model's tensors."""
        names = [name for name, tensor in self.base.tensors.items() if tensor.ndim >= 2 or not matrix]
        return self.rng.choice([name for name in names if not (needed and name in self.base.optional)])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Kinds of damage
# ---------------------------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Site], Case]] = {}
MISFIT = "fit the model, and nothing is read|is not: |is no ViT of"


def kind(make: Callable[[Site], Case]) -> Callable[[Site], Case]:
    """One of the kinds."""
    KINDS[make.__name__.replace("_", " ")] = make
    return make


def refused(path: Path, reason: str, **about: Any) -> Case:
    return Case(path, reason=reason, **about)


def accepted(site: Site, path: Path, **about: Any) -> Case:
    return Case(path, site.base.ours, **about)


@kind
def whole(site: Site) -> Case:
    return accepted(site, site.write())


@kind
def narrow_numbers(site: Site) -> Case:
    """fp16, bf16 or fp64 in place of fp32, some or all."""
    dtype = site.rng.choice([torch.float16, torch.bfloat16, torch.float64])
    some = {name: tensor.to(dtype) if site.rng.random() < 0.7 else tensor for name, tensor in site.base.tensors.items()}
    case = accepted(site, site.write(some))
    base = site.base
    read = from_file(base.form, base.model, base.prefix, lambda name, at: (some[name] if at is None else some[name][at]).float())
    return replace(case, weights={name: read(name) for name in base.ours})


@kind
def missing_tensor(site: Site) -> Case:
    name = site.one(needed=True)
    return refused(
        site.write({other: tensor for other, tensor in site.base.tensors.items() if other != name}), f"{MISFIT}|position embeddings"
    )


@kind
def missing_block(site: Site) -> Case:
    """One in the middle; the last one where the settings say how many there are."""
    site.of(*(name for name in site.all if name != "scan"))
    told = bool(site.base.sidecars)
    number = site.rng.randrange(SMALL.depth if told else SMALL.depth - 1)
    left = {name: tensor for name, tensor in site.base.tensors.items() if not re.search(rf"[._]{number}[./]", name)}
    return refused(site.write(left), MISFIT)


@kind
def renamed_tensor(site: Site) -> Case:
    name = site.one(needed=True)
    new = site.rng.choice([f"{name}x", f"x{name}", f"other.{name}", name.replace("0", "7") + "_", name[::-1], name.upper(), f"{name} "])
    renamed = {new if other == name else other: tensor for other, tensor in site.base.tensors.items()}
    return refused(site.write(renamed), f"{MISFIT}|position embeddings")


@kind
def extra_tensor(site: Site) -> Case:
    begin = site.one().rpartition("." if site.kind != "npz" else "/")[0]
    name = site.rng.choice(
        [f"{begin}.gate", "dist_token", "blocks.0.attn.relative_position_bias_table", "head_dist.weight", "decoder.conv", "z"]
    )
    return refused(site.write({**site.base.tensors, name: torch.ones(3, 3)}), f"{re.escape(name)} .*has no place in the model")


@kind
def other_shape(site: Site) -> Case:
    name = site.one(matrix=True)
    tensor = site.base.tensors[name]
    if site.rng.random() < 0.5 and tensor.shape[-1] != tensor.shape[-2] and name not in ("pos_embed", "params/pos_embedding"):
        tensor = tensor.transpose(-1, -2).contiguous()
    else:
        axis = site.rng.randrange(tensor.ndim)
        tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    return refused(site.write({**site.base.tensors, name: tensor}), f"{MISFIT}|position embeddings|classes, and the head|has no place for")


@kind
def more_or_fewer_axes(site: Site) -> Case:
    name = site.one()
    tensor = site.base.tensors[name]
    tensor = tensor[None] if site.rng.random() < 0.5 else tensor.flatten()[: tensor.shape[0]].sum()
    return refused(site.write({**site.base.tensors, name: tensor}), f"{MISFIT}|position embeddings|classes, and the head")


@kind
def not_finite(site: Site) -> Case:
    name, value = site.one(), site.rng.choice([math.nan, math.inf, -math.inf])
    tensor = site.base.tensors[name].clone()
    tensor.view(-1)[site.rng.randrange(tensor.numel())] = value
    return refused(site.write({**site.base.tensors, name: tensor}), "not finite")


@kind
def too_large_for_fp32(site: Site) -> Case:
    name = site.one()
    return refused(site.write({**site.base.tensors, name: site.base.tensors[name].double() * 1e300}), "not finite")


@kind
def other_type(site: Site) -> Case:
    name = site.one()
    dtype = site.rng.choice([torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
    return refused(site.write({**site.base.tensors, name: site.base.tensors[name].to(dtype)}), "not of floating point")


@kind
def strange_patches(site: Site) -> Case:
    """Grey images, depth maps, oblong patches, linear ones, videos."""
    site.of("timm", "hf", "dinov2")
    name = next(name for name in site.base.tensors if name.endswith(("patch_embed.proj.weight", "projection.weight")))
    shape = site.rng.choice([(32, 1, 8, 8), (32, 4, 8, 8), (32, 3, 8, 4), (32, 192), (32, 3, 2, 8, 8), (32, 3, 0, 0), (0, 3, 8, 8)])
    return refused(
        site.write({**site.base.tensors, name: torch.ones(shape)}), f"not square ones of 3|kernel of its patches|{MISFIT}|config.json"
    )


@kind
def several_models(site: Site) -> Case:
    """Student and teacher: refused, unless it is said which."""
    site.of("dinov2")
    both = {f"{whose}.backbone.{name}": tensor for whose in ("student", "teacher") for name, tensor in site.base.tensors.items()}
    both["teacher.dino_head.last_layer.weight"] = torch.ones(4, 4)
    path = site.write(both)
    if site.rng.random() < 0.5:
        return accepted(site, path, asked=ImportConfig(num_heads=4, prefix="teacher.backbone."))
    return refused(path, "holds 2 models.*--prefix chooses one")


@kind
def unprintable_name(site: Site) -> Case:
    site.of("timm", "hf", "mae")
    name = "a" + site.rng.choice("\n\r\x1b\x07\u202e") + "b"
    return refused(site.write({**site.base.tensors, name: torch.ones(2)}), "a tensor is called")


@kind
def very_many_models(site: Site) -> Case:
    site.of("timm", kind="safetensors")
    names = {f"m{number}.patch_embed.proj.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(20_000)}
    return refused(site.put(_safetensors(json.dumps(names).encode())), "holds 20000 models")


# Bytes


@kind
def truncated(site: Site) -> Case:
    data = content(site.kind, site.base.tensors)
    return refused(
        site.put(data[: site.rng.choice([site.rng.randrange(len(data)), len(data) - 1, len(data) - site.rng.randrange(1, 300)])]), ""
    )


@kind
def flipped_bit(site: Site) -> Case:
    """In an archive anywhere, which has checksums; in safetensors in the header, for its numbers have none."""
    if site.kind == "stream":
        site.kind = "zip"
    data = bytearray(content(site.kind, site.base.tensors))
    end = len(data) if site.kind != "safetensors" else 8 + int.from_bytes(data[:8], "little")
    data[site.rng.randrange(end)] ^= 1 << site.rng.randrange(8)
    return Case(site.put(bytes(data)), site.base.ours, either=True)


@kind
def zeroed_or_doubled_stretch(site: Site) -> Case:
    if site.kind in ("stream", "safetensors"):
        site.of("timm", kind="zip")
    data = bytearray(content(site.kind, site.base.tensors))
    at, length = site.rng.randrange(len(data)), site.rng.randrange(1, 2000)
    data[at : at + length] = bytes(length) if site.rng.random() < 0.5 else data[at : at + length] * 2
    return Case(site.put(bytes(data)), site.base.ours, either=True)


def _safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@kind
def lying_header(site: Site) -> Case:
    """Of safetensors: one entry of the header that cannot be."""
    site.of("timm", "hf", "dinov2", "mae", kind="safetensors")
    whole = content("safetensors", site.base.tensors)
    end = 8 + int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:end]), whole[end:]
    names = [name for name in header if name != "__metadata__"]
    name, other = site.rng.sample(names, 2)
    entry, (begin, stop) = header[name], header[name]["data_offsets"]
    lies: list[Callable[[], object]] = [
        lambda: entry.update(data_offsets=[begin + 4, stop + 4]),
        lambda: entry.update(data_offsets=[begin, stop + 4]),
        lambda: entry.update(data_offsets=[stop, begin]),
        lambda: entry.update(data_offsets=[-4, stop - begin - 4]),
        lambda: entry.update(data_offsets=[2**50, 2**50 + stop - begin]),
        lambda: entry.update(data_offsets=[0.0, float(stop)]),
        lambda: entry.update(data_offsets=[begin, stop, stop]),
        lambda: entry.update(data_offsets=header[other]["data_offsets"], shape=header[other]["shape"]),
        lambda: entry.update(shape=[2**40, 2**40]),
        lambda: entry.update(shape=[-1, *entry["shape"]]),
        lambda: entry.update(shape=[1.5]),
        lambda: entry.update(shape="32"),
        lambda: entry.update(shape=[True, *entry["shape"]]),
        lambda: entry.update(shape=[1] * 200 + entry["shape"]),
        lambda: entry.update(dtype="F64"),
        lambda: entry.update(dtype="Q4"),
        lambda: entry.update(dtype=["F32"]),
        lambda: entry.pop("dtype"),
        lambda: entry.pop("shape"),
        lambda: header.update({name: None}),
        lambda: header.update({name: [1, 2]}),
        lambda: header.update({"hole": {"dtype": "F32", "shape": [1], "data_offsets": [len(data) + 4, len(data) + 8]}}),
        lambda: header.update({"beyond": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}),
    ]
    site.rng.choice(lies)()
    return refused(site.put(_safetensors(json.dumps(header).encode(), data)), "cannot be read as tensors")


@kind
def strange_header(site: Site) -> Case:
    """Of safetensors: a header that is none."""
    site.of("timm", kind="safetensors")
    whole = content("safetensors", site.base.tensors)
    end = 8 + int.from_bytes(whole[:8], "little")
    header, data = whole[8:end], whole[end:]
    twice = b"{" + header[1:-1].rstrip(b" }") + b"}," + header[1:]
    deep = site.rng.choice([1000, 100_000, 5_000_000])
    strange: list[Callable[[], bytes]] = [
        lambda: _safetensors(
            header, data, length=site.rng.choice([0, 1, len(header) - 3, len(header) + 4, len(data) * 2, 2**33, 2**63, 2**64 - 1])
        ),
        lambda: _safetensors(b'{"a":' + b"[" * deep, data),
        lambda: _safetensors(b'{"a":' + b'{"a":' * deep + b"1" + b"}" * deep + b"}", data),
        lambda: _safetensors(b'{"a":[' + b"{}," * 6_000_000 + b"{}]}", data),
        lambda: _safetensors(b'{"a":[' + b"1.5," * 3_000_000 + b"1]}", data),
        lambda: _safetensors(b'{"a":' + b"9" * 100_000 + b"}", data),
        lambda: _safetensors(twice, data),
        lambda: _safetensors(b"{}", b""),
        lambda: _safetensors(b'{"a\xff": 1}', data),
        lambda: _safetensors(b'{"a\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'),
        lambda: _safetensors(header, data + b"more"),
        lambda: _safetensors(header, data[4:]),
        lambda: _safetensors(b"{" + b" " * 20_000_000 + b"}", data),
    ]
    return refused(site.put(site.rng.choice(strange)()), "cannot be read as tensors|is no ViT|is no file of tensors")


# npz


def _npz(arrays: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def _npy(array: NDArray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def _npy_saying(said: str, data: bytes, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    text = said.encode() + b"\n"
    form = "<H" if version == (1, 0) else "<I"
    return b"\x93NUMPY" + bytes(version) + struct.pack(form, len(text) if length is None else length) + text + data


@kind
def numpy_compressed(site: Site) -> Case:
    site.of("big_vision", "map", "scan", "vision_transformer")
    return accepted(site, site.put(_npz({name: _npy(_array(tensor)) for name, tensor in site.base.tensors.items()}, zipfile.ZIP_DEFLATED)))


@kind
def strange_array(site: Site) -> Case:
    """Of npz: one array that is none of numbers, or not as it says."""
    site.of("big_vision", "map", "scan", "vision_transformer")
    arrays = {name: _npy(_array(tensor)) for name, tensor in site.base.tensors.items()}
    name = site.one(matrix=True)
    array = _array(site.base.tensors[name])
    shape, data = array.shape, array.tobytes()
    said = "{{'descr': {!r}, 'fortran_order': {}, 'shape': {!r}, }}"
    rows = (len(array.reshape(-1)) // shape[-1], shape[-1])
    strange: list[bytes] = [
        _npy(np.array([Payload(site.folder / MARK)], dtype=object)),
        _npy(array.astype(np.int32)),
        _npy(array.astype(">f4")),
        _npy(array.astype("S4")),
        _npy(array.astype(np.complex64)),
        _npy(np.zeros(shape, dtype=[("a", "<f4"), ("b", "<i4")])),
        _npy_saying(said.format("<f4", False, (*shape[:-1], shape[-1] * 2)), data),
        _npy_saying(said.format("<f4", False, (2**40, 2**40)), data),
        _npy_saying(said.format("<f4", False, (-shape[0], -shape[1], *shape[2:])), data),
        _npy_saying(said.format("<f4", False, (1,) * 100 + shape), data),
        _npy_saying(said.format("<f4", False, [1, 2]), data),
        _npy_saying(said.format(("<f4", (shape[-1],)), False, shape[:-1]), data),
        _npy_saying(said.format("<f4", False, shape), data, (3, 0)),
        _npy_saying(said.format("<f4", False, shape), data, (9, 9)),
        _npy_saying(said.format("<f4", False, shape), data, (2, 0), length=2**32 - 1),
        _npy_saying("(" * 9000, data),
        _npy_saying("__import__('os').system('touch x')", data),
        _npy_saying("{" + " " * 15_000 + "}", data),
        b"\x93NUMPY",
        b"",
        data,
        _npy(array.reshape(rows).T.copy()) if rows[0] != rows[1] else b"no array",
    ]
    arrays[name] = site.rng.choice(strange)
    return refused(site.put(_npz(arrays)), f"cannot be read as tensors|not of floating point|{MISFIT}|position embeddings")


@kind
def strange_archive(site: Site) -> Case:
    """Of npz: names and compressions that numpy does not write."""
    site.of("big_vision", "map", "scan", "vision_transformer")
    arrays = {name: _npy(_array(tensor)) for name, tensor in site.base.tensors.items()}
    name = site.one()
    what = site.rng.choice(["twice", "bzip2", "lzma", "up", "root", "other", "bomb", "bombs", "long header"])
    path = site.put(_npz(arrays, {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.get(what, zipfile.ZIP_STORED)))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        if what == "twice":
            with contextlib.suppress(UserWarning):
                archive.writestr(f"{name}.npy", arrays[name])
        elif what in ("up", "root"):
            archive.writestr(f"{'../' * 5 if what == 'up' else '/'}tmp/{name}.npy", arrays[name])
        elif what == "other":
            archive.writestr("run.py", b"open('x', 'w')")
        elif what == "bomb":
            archive.writestr("bomb.npy", _npy(np.zeros(20_000_000, np.float32)))
        elif what == "bombs":
            zeros = _npy(np.zeros(500_000, np.float32))
            for number in range(30):
                archive.writestr(f"bomb{number}.npy", zeros)
        elif what == "long header":
            archive.writestr("long.npy", _npy_saying(" " * 50_000_000, b"", (2, 0)))
    return refused(path, f"cannot be read as tensors|{MISFIT}")


# Pickles


class Payload:
    """Would leave a mark where it is made of its pickle."""

    def __init__(self, mark: Path, how: int = 0) -> None:
        self.mark, self.how = str(mark), how

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"open({self.mark!r}, 'w').close()"
        return [(os.system, (f"touch '{self.mark}'",)), (exec, (code,)), (eval, (code,)), (open, (self.mark, "w"))][self.how % 4]


class Large:
    """Would take a terabyte."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**40,)


@kind
def payload(site: Site) -> Case:
    """In place of a tensor it is refused; beside the weights it is passed over. Neither is run."""
    site.of("timm", "mae", "dinov2", "hf", kind=site.rng.choice(["zip", "stream"]))
    evil: Any = Large() if site.rng.random() < 0.2 else Payload(site.folder / MARK, site.rng.randrange(4))
    file, beside = io.BytesIO(), site.rng.random() < 0.5
    weights = {**site.base.tensors, **({} if beside else {site.one(needed=True): evil})}
    outer: Any = {"model": weights, "settings": evil, "list": [evil, {"a": evil}]} if beside else {"model": weights}
    if site.rng.random() < 0.2:
        outer, beside = evil, False
    torch.save(outer, file, _use_new_zipfile_serialization=site.kind == "zip", pickle_protocol=site.rng.choice([2, 3, 4, 5]))
    path = site.put(file.getvalue())
    return accepted(site, path) if beside else refused(path, f"{MISFIT}|whole object|position embeddings")


@kind
def whole_object(site: Site) -> Case:
    site.of("timm", kind=site.rng.choice(["zip", "stream"]))
    file = io.BytesIO()
    torch.save(
        site.rng.choice([torch.nn.Linear(3, 3), [1, 2], 3, {"model": 3}, {}, torch.ones(3)]),
        file,
        _use_new_zipfile_serialization=site.kind == "zip",
    )
    return refused(site.put(file.getvalue()), "whole object or a list|no tensors by name")


def _rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for info in old.infolist():
            if (changed := change(info.filename, old.read(info))) is not None:
                new.writestr(info.filename, changed)
    return file.getvalue()


@kind
def pickle_zipped_again(site: Site) -> Case:
    site.of("timm", "mae", "dinov2", kind="zip")
    return accepted(site, site.put(_rezipped(content("zip", site.base.tensors), lambda name, data: data, zipfile.ZIP_DEFLATED)))


@kind
def views(site: Site) -> Case:
    """Tensors that lie otherwise in their storages, or several in one."""
    site.of("timm", "dinov2", kind=site.rng.choice(["zip", "stream"]))
    flat = torch.cat([tensor.flatten() for tensor in site.base.tensors.values()])
    at, tensors = 0, {}
    for name, tensor in site.base.tensors.items():
        tensors[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
        if tensor.ndim == 2 and site.rng.random() < 0.5:
            tensors[name] = tensor.T.contiguous().T
    return accepted(site, site.write(tensors))


@kind
def lying_pickle(site: Site) -> Case:
    """An archive of torch's whose program and storages do not agree, or that never ends."""
    site.of("timm", "mae", "dinov2", kind="zip")
    data = content("zip", site.base.tensors)
    bomb = b"\x80\x02}(K\x00K\x00\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (at, at, at + 1) for at in range(60)) + b"tK\x01s."
    huge = b"\x8a\x06\x00\x00\x00\x00\x00\x40"

    def program(change: Callable[[bytes], bytes]) -> bytes:
        return _rezipped(data, lambda name, old: change(old) if name.endswith("data.pkl") else old)

    itself = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."
    strange: list[Callable[[], bytes]] = [
        lambda: program(lambda old: old.replace(b"K K K\x86".replace(b" ", b""), b"")[:-20]),
        lambda: program(lambda old: bomb),
        lambda: program(lambda old: itself),
        lambda: program(lambda old: old.replace(b"M\x00\x06", huge)),  # elements of a matrix of 32 x 48, in its storage
        lambda: program(lambda old: old.replace(b"K0K \x86", b"K0M\x00\x10\x86")),  # the matrix reaches beyond its storage
        lambda: program(lambda old: old.replace(b"FloatStorage", b"DoubleStorage")),
        lambda: program(lambda old: old.replace(b"FloatStorage", b"OtherStorage")),
        lambda: program(lambda old: b"\x80\x02" + b"]" * 300_000 + b"."),
        lambda: program(lambda old: b"\x80\x02](" + b"(" * 300_000 + b"l" * 300_000 + b"e."),
        lambda: program(lambda old: b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x."),
        lambda: program(lambda old: b"\x80\x02X\xff\xff\xff\x7fabc."),
        lambda: program(lambda old: b"\x80\x02h\x05."),
        lambda: program(lambda old: b"\x80\x02t."),
        lambda: program(lambda old: b"."),
        lambda: program(lambda old: b""),
        lambda: program(lambda old: b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u."),
        lambda: program(lambda old: b"cos\nsystem\n(S'touch x'\ntR."),
        lambda: _rezipped(data, lambda name, old: None if re.search(r"data/0$", name) else old),
        lambda: _rezipped(data, lambda name, old: old[:-4] if name.endswith("data/0") else old),
        lambda: _rezipped(data, lambda name, old: b"big" if name.endswith("byteorder") else old),
        lambda: _rezipped(data, lambda name, old: None if name.endswith("data.pkl") else old),
        lambda: _rezipped(data, lambda name, old: b"" if name.endswith("data/0") else old),
    ]
    return refused(site.put(site.rng.choice(strange)()), f"cannot be read as tensors|{MISFIT}")


@kind
def torchscript(site: Site) -> Case:
    site.of("timm", kind="zip")
    data = content("zip", site.base.tensors)
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/constants.pkl", b"\x80\x02).")
        archive.writestr(f"{folder}/code/__torch__.py", b"import os")
    return refused(site.put(file.getvalue()), "TorchScript")


@kind
def plain_pickle(site: Site) -> Case:
    site.of("timm", kind="stream")
    held = site.rng.choice([Payload(site.folder / MARK, site.rng.randrange(4)), {"a": np.ones(3)}, 0x1950A86A20F9469CFC6C])
    return refused(site.put(pickle.dumps(held, protocol=site.rng.choice([2, 3, 4, 5]))), "cannot be read as tensors")


# What lies beside


def _with(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(config))
    *outer, name = path.split(".")
    inner = changed
    for step in outer:
        inner = inner[step]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    return changed


@kind
def settings_that_contradict(site: Site) -> Case:
    site.of("hf")
    name, values = site.rng.choice(
        [
            ("hidden_size", (64, 31, "32", -32, 10**9)), ("num_hidden_layers", (2, 4, 0, 10**9, "3")), ("intermediate_size", (64, 0, "48")),
            ("patch_size", (16, 4, 0, [8, 8])), ("num_channels", (1, 4)),
            ("num_attention_heads", (3, 5, 0, -4, 64, 10**9, 4.5, "four", None, [4], True)),
            ("image_size", (64, 0, -32, 10**9, [32], [32, 64], "large", [0, 0], 32.5, {"height": 32})),
            ("layer_norm_eps", (-1, 0, 1e9, "small", [1], math.nan, math.inf)),
            ("hidden_act", ("silu", "relu", 3, None, ["gelu"], {})), ("qkv_bias", (False, "yes", 0)),
            ("id2label", ({"0": "a"}, {str(number): "a" for number in range(9)}, ["a"])),
            ("vision_config", (3, [], "x")), ("architectures", (3,)),
        ]
    )  # fmt: skip
    path = site.write(sidecars={"config.json": _with(site.base.sidecars["config.json"], name, site.rng.choice(values))})
    return refused(path, "config.json|looks like hf_vit's and is not: .|is not in the file; --", asked=ImportConfig())


@kind
def head_that_is_not_there(site: Site) -> Case:
    site.of("hf", "timm with settings")
    left = {name: tensor for name, tensor in site.base.tensors.items() if not name.startswith(("head", "classifier"))}
    return refused(site.write(left), "there is no classifier|says num_classes=5")


@kind
def settings_of_timm_that_contradict(site: Site) -> Case:
    site.of("timm with settings")
    name, values = site.rng.choice(
        [
            ("model_args.embed_dim", (64,)), ("model_args.depth", (2, 12)), ("model_args.patch_size", (16,)),
            ("model_args.num_heads", (3, 0, "4", 10**9)),
            ("model_args.mlp_ratio", (4.0, 0, "1.5", math.nan)), ("model_args.class_token", (False,)),
            ("model_args.global_pool", ("map", "max", 3)),
            ("model_args.fc_norm", (True,)), ("model_args.qk_norm", (True,)), ("model_args.init_values", (1e-5,)),
            ("model_args.reg_tokens", (4,)),
            ("model_args.no_embed_class", (True,)), ("model_args.pre_norm", (True,)), ("model_args.act_layer", ("silu", 3, ["gelu"])),
            ("model_args.norm_layer", ("rmsnorm",)), ("model_args.qkv_bias", (False,)), ("model_args.block_fn", ("parallel",)),
            ("model_args.img_size", (64, [0, 0], [32, 64], 10**9, "x")), ("model_args", ([1], 3, "x")), ("num_classes", (1000, 0, 10**9)),
            ("num_features", (768,)), ("architecture", ("vit_base_patch16_rpn_224",)), ("pretrained_cfg", ([1], 3)),
            ("pretrained_cfg.mean", (3, [], ["a"], [0, 0])), ("pretrained_cfg.std", ([0, 0, 0], [-1, 1, 1])),
            ("pretrained_cfg.crop_pct", ("x", -1, math.nan)),
            ("pretrained_cfg.interpolation", ("lanczos", 3)), ("label_names", (["a"], ["a"] * 9)),
        ]
    )  # fmt: skip
    path = site.write(sidecars={"config.json": _with(site.base.sidecars["config.json"], name, site.rng.choice(values))})
    return refused(path, "config.json|beside the weights|looks like timm's and is not: .|is not in the file; --", asked=ImportConfig())


@kind
def settings_that_are_none(site: Site) -> Case:
    text = site.rng.choice(
        [
            "",
            "[]",
            "3",
            "{",
            '{"a": 1, "a": 1}',
            "[" * 100_000,
            "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
            "{}" + " " * 17_000_000,
        ]
    )
    name = site.rng.choice(["config.json", "preprocessor_config.json", "open_clip_config.json"])
    return refused(site.write(sidecars={name: text}), f"{name} cannot be read")


@kind
def mean_pool_is_told(site: Site) -> Case:
    """A class token that the head does not see: no tensor says it, timm's settings do."""
    site.of("timm with settings")
    path = site.write(sidecars={"config.json": _with(site.base.sidecars["config.json"], "model_args.global_pool", "avg")})
    return accepted(site, path, asked=ImportConfig())


# Places


@kind
def no_file(site: Site) -> Case:
    path = site.folder / "weights.pth"
    what = site.rng.choice(
        ["pipe", "empty folder", "two files", "loop", "dangling", "device", "empty", "text", "image", "socket", "nothing"]
    )
    good = content("safetensors", site.all["timm"].tensors)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "empty folder":
        path.mkdir()
    elif what == "two files":
        path.mkdir()
        (path / "a.safetensors").write_bytes(good)
        (path / "b.safetensors").write_bytes(good)
    elif what in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path, "dangling": site.folder / "away", "device": "/dev/zero"}[what])
    elif what == "socket":
        os.mknod(path, 0o140600)
    elif what != "nothing":
        path.write_bytes({"empty": b"", "text": b"weights\n" * 100, "image": b"\x89PNG\r\n\x1a\n" + site.rng.randbytes(100)}[what])
    return refused(path, "no plain file|files? of weights|does not exist|no file of tensors")


@kind
def random_bytes(site: Site) -> Case:
    begin = site.rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05\x95", struct.pack("<Q", 40) + b"{", b"\x93NUMPY\x01\x00"])
    return refused(site.put(begin + site.rng.randbytes(site.rng.randrange(400))), "cannot be read as tensors|no file of tensors")


@kind
def link(site: Site) -> Case:
    """As the cache of the Hugging Face hub has its files."""
    path = site.write()
    moved = path.rename(site.folder / "blob")
    path.symlink_to(moved)
    return accepted(site, path)


@kind
def shards(site: Site) -> Case:
    site.of("timm", "hf", "mae", kind="safetensors")
    names = list(site.base.tensors)
    split = site.rng.randrange(1, len(names))
    files = {"model-1.safetensors": names[:split], "model-2.safetensors": names[split:]}
    for file, held in files.items():
        save_file({name: site.base.tensors[name].contiguous() for name in held}, site.folder / file)
    site.put(b"")
    (site.folder / "weights.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    path = site.folder / "model.safetensors.index.json"
    one = site.rng.choice(names)
    what = site.rng.choice(
        ["whole", "whole", "missing", "away", "itself", "swapped", "unsaid", "unheld", "number", "list", "none", "pipe", "deep"]
    )
    if what == "missing":
        (site.folder / site.rng.choice(list(files))).unlink()
    elif what == "away":
        outside = site.folder.parent / "model-1.safetensors"
        shutil.copy(site.folder / "model-1.safetensors", outside)
        away = site.rng.choice(["../model-1.safetensors", str(outside), "./model-1.safetensors", "a/../model-1.safetensors"])
        index["weight_map"] |= dict.fromkeys(files["model-1.safetensors"], away)
    elif what == "itself":
        index["weight_map"][one] = path.name
    elif what == "swapped":
        index["weight_map"][one] = next(file for file in files if file != index["weight_map"][one])
    elif what == "unsaid":
        del index["weight_map"][one]
    elif what == "unheld":
        index["weight_map"]["more.weight"] = "model-1.safetensors"
    elif what in ("number", "list", "none"):
        index["weight_map"] = {"number": 3, "list": names, "none": {one: None}}[what]
    elif what == "pipe":
        (site.folder / "model-1.safetensors").unlink()
        os.mkfifo(site.folder / "model-1.safetensors")
    path.write_text(json.dumps(index) if what != "deep" else '{"weight_map": ' + "[" * 100_000)
    folder = site.rng.random() < 0.5
    if what == "whole":
        return accepted(site, site.folder if folder else path)
    return refused(site.folder if folder else path, "cannot be read as tensors|is missing|no plain file")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Taking them up
# ---------------------------------------------------------------------------------------------------------------------------------------


def take_up(case: Case) -> dict[str, Tensor]:
    """The weights of a file by our names. Raises CheckpointError."""
    foreign = open_foreign(case.path, case.asked)
    model = foreign.weights.model
    read = from_file(foreign.weights.form, model, foreign.weights.prefix, foreign.tensors.read)
    return {name: read(name) for name in random_vit(model).state_dict()}


def fault(case: Case) -> str:
    """What of a case is not as it must be; nothing where all is."""
    try:
        weights = take_up(case)
    except CheckpointError as error:
        return _fault_of_refusal(case, str(error))
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if case.weights is None:
        return "taken up"
    same = weights.keys() == case.weights.keys() and all(torch.equal(weights[name], case.weights[name]) for name in weights)
    return "" if same else "taken up with other weights"


def _fault_of_refusal(case: Case, said: str) -> str:
    line, *table = said.split("\n")
    if case.weights is not None and not case.either:
        return f"refused: {said}"
    if any(not row.startswith("  ") for row in table) or not all(row.isprintable() for row in (line, *table)) or len(line) > 1000:
        return f"no clear line: {said!r}"
    if re.search("memory", said, re.IGNORECASE):
        return f"would take all memory: {said}"
    if str(case.path.parent) not in said:
        return f"does not say of what: {said}"
    return "" if re.search(case.reason, said, re.DOTALL) else f"for another reason: {said}"


def main() -> None:
    """Tells of each case its kind, whether it was to be refused, and its fault."""
    folder, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    all_bases, kinds = bases(), list(KINDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    for number in range(first, end):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        site_folder = folder / f"case-{number}"
        site_folder.mkdir()
        case = KINDS[kinds[number % len(kinds)]](Site(site_folder, number, all_bases))
        found = fault(case)
        found = "a payload ran" if (site_folder / MARK).exists() else found
        print(
            json.dumps({"number": number, "kind": kinds[number % len(kinds)], "whole": case.weights is not None, "fault": found}),
            flush=True,
        )
        shutil.rmtree(site_folder)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}))


if __name__ == "__main__":
    main()
