"""Every kind of bad image is left out and named; nothing good is."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.config import PackConfig, PackError
from data_tools.images import Reject, inspect_image
from data_tools.pack import pack

from .conftest import contents, make_image, pack_one, write_files


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


BAD = {
    "empty": b"",
    "damaged": make_image(1, size=(40, 40))[:700],
    "not an image": b"<html>404 not found</html>",
    "unsupported format": make_image(2, "GIF"),
    "too many pixels": bomb(),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_kind(reason: str, tmp_path: Path) -> None:
    write_files(tmp_path / "src", {"a/bad.jpg": BAD[reason], "a/good.jpg": make_image(0)})
    calls: list[tuple[int, int, int]] = []
    (result,) = pack(PackConfig((str(tmp_path / "src"),), str(tmp_path / "out")), lambda *call: calls.append(call))
    assert (result.samples, result.rejects, result.reasons) == (1, 1, {reason: 1})
    assert calls[-1] == (2, 2, 1)
    (row,) = pq.read_table(result.path / "rejects.parquet").to_pylist()
    assert (row["source"], row["key"], row["reason"]) == ("a/bad.jpg", "a_bad", reason)
    if reason in ("not an image", "unsupported format"):
        assert "jpeg, png, webp" in row["detail"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncation_is_found_wherever_it_is(kind: str) -> None:
    data = make_image(5, kind, size=(64, 48))
    assert inspect_image(data, 10**6) == ({"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], 64, 48)
    for share in (0.02, 0.3, 0.6, 0.9, 0.97):
        assert isinstance(inspect_image(data[: int(len(data) * share)], 10**6), Reject)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_without_decoding_what_is_cut_off_is_found_and_the_rest_is_not(kind: str) -> None:
    data = make_image(5, kind, size=(64, 48))
    whole = inspect_image(data, 10**6, decode=False)
    assert whole == inspect_image(data, 10**6)
    assert inspect_image(data + b"left behind", 10**6, decode=False) == whole
    for share in (0.02, 0.3, 0.6, 0.9, 0.97):
        assert isinstance(inspect_image(data[: int(len(data) * share)], 10**6, decode=False), Reject)
    assert isinstance(inspect_image(bomb(), 10**6, decode=False), Reject)
    inside = bytearray(data)
    inside[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    assert inspect_image(bytes(inside), 10**6, decode=False) == whole, "what lies between header and end is not looked at"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_named(kind: str) -> None:
    reject = inspect_image(make_image(0, kind), 10**6)
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.detail) == ("unsupported format", f"{kind.lower()} (accepted: jpeg, png, webp)")


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1"), ("WEBP", "RGBA")])
def test_every_mode_of_the_accepted_formats(kind: str, mode: str) -> None:
    assert not isinstance(inspect_image(make_image(0, kind, mode=mode), 10**6), Reject)


def test_the_pixel_limit_is_the_users() -> None:
    assert not isinstance(inspect_image(make_image(0), 108), Reject)
    assert inspect_image(make_image(0), 107) == Reject("too many pixels", "12 x 9, max_pixels is 107")


def test_animations_count_as_their_first_frame() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    assert inspect_image(file.getvalue(), 10**6) == ("webp", 8, 8)


def test_missing_and_odd_files_of_a_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_files(tmp_path, {"ok.jpg": make_image(0)})
    paths = ["ok.jpg", "gone.jpg", "pipe", ".", "ok.jpg/x", "nul\0", "x" * 300, None, "/dev/zero"]
    pq.write_table(pa.table({"path": paths, "label": [0] * len(paths)}), tmp_path / "t.parquet")
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out")
    assert list(contents(dataset)) == ["ok"]
    rejects = pq.read_table(dataset.path / "rejects.parquet").to_pylist()
    assert sorted(row["source"] for row in rejects) == sorted(path or "t.parquet#7" for path in paths[1:])
    assert {row["reason"] for row in rejects} == {"missing"}


@pytest.mark.parametrize("seed", [None, 0])
def test_null_and_empty_bytes_of_a_table(seed: int | None, tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"", "path": None}, {"bytes": None, "path": None}, None, {"bytes": make_image(0), "path": None}]})
    pq.write_table(table.append_column("label", [[0, 0, 0, 0]]), tmp_path / "t.parquet")
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out", shuffle_seed=seed)
    reasons = {row["source"]: row["reason"] for row in pq.read_table(dataset.path / "rejects.parquet").to_pylist()}
    assert reasons == {"t.parquet#0": "empty", "t.parquet#1": "missing", "t.parquet#2": "missing"}


def test_no_image_is_lost_for_its_name(tmp_path: Path) -> None:
    good = {"a/UPPER.JPEG": 0, "a/none": 1, "a/wrong.png": 2, "a/b c/ü.jpg": 3, "a/two.dots.jpg": 4, "a/x.dat": 5}
    skipped = {"a/.hidden.jpg": b"", "a/notes.txt": b"", ".cache/x.jpg": b"", "labels.json": b"{}"}
    write_files(tmp_path / "src", {**{name: make_image(i) for name, i in good.items()}, **skipped, "a/odd.bin": b"?"})
    os.symlink("../a", tmp_path / "src/a/loop")
    (tmp_path / "src/a" / os.fsdecode(b"\xff.jpg")).write_bytes(make_image(6))
    dataset = pack_one(tmp_path / "src", out=tmp_path / "out")
    assert sorted(data for data, _, _ in contents(dataset).values()) == sorted(make_image(i) for i in range(7))
    assert pq.read_table(dataset.path / "rejects.parquet")["source"].to_pylist() == ["a/odd.bin"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path / "src", {"a/x.jpg": b"", "a/y.jpg": b"", "a/z.jpg": b"?"})
    with pytest.raises(PackError, match=r"no usable image is left for train: 2 empty, 1 not an image \(first: a/"):
        pack_one(tmp_path / "src", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
