"""Odd images: what is accepted shows what docs/data.md says, and what is encoded anew shows the same, upright and small enough."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from data_tools.config import PackConfig, PackError
from data_tools.images import Reject, Rules, Stored, decode, encoders, inspect_image, prepare_image
from data_tools.pack import pack
from data_tools.verify import verify

from .conftest import contents, make_image, pack_one, tree, write_files
from .test_reject import bomb

ORIENTATION = 0x0112


def noise(*shape: int, depth: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**depth, shape, dtype=np.uint16 if depth == 16 else np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16(values: np.ndarray, color: int, *more: bytes) -> bytes:
    """A PNG of 16 bits a sample, as RFC 2083 has it; no library here writes those with colours."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join((chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))


def flat_cmyk(transform: int, *ink: int) -> bytes:
    """A JPEG of one colour that says that its channels are ink (0) or YCCK (2) in Adobe's marker; Pillow writes the first only."""
    data = encoded(Image.new("CMYK", (24, 16), ink), "JPEG", quality=100, subsampling=0)
    marker = data.index(b"Adobe") + 11
    assert data[marker] == 0
    return data[:marker] + bytes([transform]) + data[marker + 1 :]


def ycck(cyan: int, magenta: int, yellow: int, black: int) -> bytes:
    """A YCCK JPEG with that ink. Adobe's programs store CMYK inverted, and YCCK is the YCbCr of the inverse of that."""
    red, green, blue = cyan, magenta, yellow
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    stored = luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128
    return flat_cmyk(2, *(255 - round(value) for value in stored), black)  # Pillow stores the inverse of what it is given


RGB, RGBA = noise(9, 12, 3), noise(9, 12, 4)
DEEP = {channels: noise(9, 12, channels, depth=16) for channels in (1, 2, 3, 4)}
PALETTE = Image.fromarray(RGB).quantize(16)
FRAMES = [Image.fromarray(noise(9, 12, 3) ^ np.uint8(i)) for i in (0, 1, 2)]
TURNED = Image.Exif()
TURNED[ORIENTATION] = 6
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("whose", "a camera's")

# What decoding shows, by the table in docs/data.md; all of these are accepted, and stored anew only where `normalize` is set.
ODD = {
    "16-bit grey png": (encoded(Image.fromarray(DEEP[1][..., 0]), "PNG"), np.repeat(DEEP[1] >> 8, 3, 2)),
    "16-bit grey png by hand": (png_16(DEEP[1], 0), np.repeat(DEEP[1] >> 8, 3, 2)),
    "16-bit grey png, one grey transparent": (
        png_16(DEEP[1], 0, chunk(b"tRNS", DEEP[1][0, 0].astype(">u2").tobytes())),
        np.repeat(DEEP[1] >> 8, 3, 2),
    ),
    "16-bit rgb png": (png_16(DEEP[3], 2), DEEP[3] >> 8),
    "16-bit rgba png": (png_16(DEEP[4], 6), DEEP[4][..., :3] >> 8),
    "16-bit grey and alpha png": (png_16(DEEP[2], 4), np.repeat(DEEP[2][..., :1] >> 8, 3, 2)),
    "rgba png": (encoded(Image.fromarray(RGBA), "PNG"), RGBA[..., :3]),
    "rgba webp": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGBA[..., :3]),
    "grey and alpha png": (encoded(Image.fromarray(RGBA[..., :2], "LA"), "PNG"), np.repeat(RGBA[..., :1], 3, 2)),
    "rgb png, one colour transparent": (encoded(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
    "palette png": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "palette png, one colour transparent": (encoded(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "animated png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), np.asarray(FRAMES[0])),
    "animated png with a picture of its own for other readers": (
        encoded(FRAMES[2], "PNG", save_all=True, append_images=FRAMES[:2], default_image=True),
        np.asarray(FRAMES[2]),
    ),
    "animated webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True), np.asarray(FRAMES[0])),
    "turned png": (encoded(Image.fromarray(RGB), "PNG", exif=TURNED), RGB),
    "turned webp": (encoded(Image.fromarray(RGB), "WEBP", lossless=True, exif=TURNED), RGB),
}
NO_TURN = struct.pack("<6s2sHIHHHIHHI", b"Exif\0\0", b"II", 42, 8, 1, ORIENTATION, 3, 1, 0, 0, 0)  # 0, where 1 to 8 are meant
PLAIN = {
    "grey jpeg": encoded(Image.fromarray(RGB[..., 0]), "JPEG"),
    "progressive jpeg": encoded(Image.fromarray(RGB), "JPEG", progressive=True),
    "jpeg of two pictures": encoded(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
    "grey png": encoded(Image.fromarray(RGB[..., 0]), "PNG"),
    "black and white png": encoded(Image.fromarray(RGB[..., 0] > 99), "PNG"),
    "webp": encoded(Image.fromarray(RGB), "WEBP"),
    "turned by 0": encoded(Image.fromarray(RGB), "JPEG", exif=NO_TURN),
    "EXIF that is none": encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_show_what_the_table_says_and_normalized_ones_the_same_upright(kind: str) -> None:
    data, pixels = ODD[kind]
    assert np.array_equal(np.asarray(decode(data)), pixels)
    for check in (True, False):
        extension, width, height = inspect_image(data, 10**6, decode=check)  # type: ignore[misc]
        assert (width, height) == (12, 9)
        assert prepare_image(data, Rules(decode=check)) == Stored(data, extension, 12, 9), "as it came"
        stored = prepare_image(data, Rules(decode=check, normalize=True))
        assert isinstance(stored, Stored)
        assert stored.data != data
        upright = np.rot90(pixels, -1) if "turned" in kind else pixels  # 6: the first row is the right-hand side
        assert np.array_equal(np.asarray(decode(stored.data)), upright)
        assert (stored.extension, stored.width, stored.height) == (extension, upright.shape[1], upright.shape[0])
        with Image.open(io.BytesIO(stored.data)) as image:
            assert (image.mode, getattr(image, "n_frames", 1), ORIENTATION in image.getexif()) == ("RGB", 1, False)
        assert prepare_image(stored.data, Rules(normalize=True)) == stored, "nothing is left to do"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PLAIN)
def test_what_all_readers_show_alike_is_stored_as_it_came(kind: str) -> None:
    for rules in (Rules(), Rules(normalize=True), Rules(max_side=12), Rules(normalize=True, decode=False)):
        stored = prepare_image(PLAIN[kind], rules)
        assert isinstance(stored, Stored)
        assert stored.data == PLAIN[kind]


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (200, 30, 90, 0), (20, 250, 130, 60), (0, 0, 0, 255)])
@pytest.mark.parametrize("form", ["cmyk", "ycck"])
def test_ink_becomes_light(form: str, ink: tuple[int, int, int, int]) -> None:
    data = flat_cmyk(0, *ink) if form == "cmyk" else ycck(*ink)
    light = [(255 - colour) * (255 - ink[3]) / 255 for colour in ink[:3]]
    normalized = prepare_image(data, Rules(normalize=True, quality=100))
    small = prepare_image(data, Rules(max_side=3, quality=100))
    assert isinstance(normalized, Stored)
    assert isinstance(small, Stored)
    assert (small.width, small.height) == (3, 2)
    for shown in (data, normalized.data, small.data):
        assert np.abs(np.asarray(decode(shown)).astype(float) - light).max() < 6
    with Image.open(io.BytesIO(normalized.data)) as image:
        assert (image.mode, "adobe" in image.info) == ("RGB", False)


def picture(width: int, height: int) -> Image.Image:
    """Smooth, without any symmetry, so that no turn of it looks like another."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(7 * x + 3 * y), np.cos(4 * x * y + 5 * y), x * (1 - y)]
    return Image.fromarray((127 + 120 * np.stack(waves, 2)).astype(np.uint8))


def psnr(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    error = np.mean((np.asarray(a).astype(float) - np.asarray(b)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [None, 300, 64])
def test_turned_pictures_are_stored_upright_once(kind: str, orientation: int, max_side: int | None) -> None:
    """Against Pillow's own turning, then shrinking, of the picture decoded in full; 64 takes the short way through the JPEG decoder."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(401, 263), kind, exif=exif, quality=95)
    stored = prepare_image(data, Rules(max_side=max_side, normalize=max_side is None, quality=95))
    assert isinstance(stored, Stored)
    if max_side is None and orientation == 1:
        assert stored.data == data
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    if max_side is not None:
        shorter = round(263 * max_side / 401)
        expected = expected.resize((max_side, shorter) if orientation < 5 else (shorter, max_side), Image.Resampling.LANCZOS)
    shown = decode(stored.data)
    assert shown.size == (stored.width, stored.height)
    assert psnr(shown, expected) > 36
    with Image.open(io.BytesIO(stored.data)) as image:
        assert psnr(ImageOps.exif_transpose(image).convert("RGB"), expected) > 36, "readers that heed EXIF show the same"


def test_a_turn_that_stands_behind_the_pixels_is_found() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    late = data[: -len(chunk(b"IEND", b""))] + chunk(b"eXIf", TURNED.tobytes()[6:]) + chunk(b"IEND", b"")
    stored = prepare_image(late, Rules(normalize=True))
    assert isinstance(stored, Stored)
    assert np.array_equal(np.asarray(decode(stored.data)), np.rot90(RGB, -1))


@pytest.mark.parametrize("max_side", [1, 2, 7, 63, 64, 100, 399, 400])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (400, 1), (400, 400)])
def test_sizes_are_those_asked_for_and_nothing_grows(max_side: int, width: int, height: int) -> None:
    data = encoded(picture(width, height), "PNG")
    stored = prepare_image(data, Rules(max_side=max_side))
    assert isinstance(stored, Stored)
    assert max(stored.width, stored.height) == max_side
    for side, was in ((stored.width, width), (stored.height, height)):
        assert abs(side - was * max_side / 400) <= 0.5 or side == 1
    assert (stored.data == data) == (max_side == 400)
    if max_side < 400:
        assert np.array_equal(
            np.asarray(decode(stored.data)),
            np.asarray(picture(width, height).resize((stored.width, stored.height), Image.Resampling.LANCZOS)),
        ), "PNG stays without loss"


@pytest.mark.parametrize("max_side", [400, 199, 100, 33])
def test_the_short_way_through_the_jpeg_decoder_shows_what_the_long_one_does(max_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    grainy = np.clip(np.asarray(picture(803, 601)).astype(int) + rng.integers(-20, 21, (601, 803, 3)), 0, 255).astype(np.uint8)
    data = encoded(Image.fromarray(grainy), "JPEG", quality=92)
    short = prepare_image(data, Rules(max_side=max_side, quality=100))
    monkeypatch.setattr("data_tools.images.DRAFT", 1000)
    long = prepare_image(data, Rules(max_side=max_side, quality=100))
    assert isinstance(short, Stored)
    assert isinstance(long, Stored)
    assert (short.data == long.data) == (max_side == 400)
    assert psnr(decode(short.data), decode(long.data)) > 40


def test_quality_and_what_stays_without_loss() -> None:
    image = Image.fromarray(noise(80, 90, 3))
    sizes = {}
    for kind, options in {"JPEG": {}, "WEBP": {}, "lossless": {"lossless": True}, "PNG": {}}.items():
        data = encoded(image, "WEBP" if kind == "lossless" else kind, **options)
        stored = [prepare_image(data, Rules(max_side=60, quality=quality)) for quality in (50, 95, 95)]
        assert stored[1] == stored[2], "the same bytes each time"
        sizes[kind] = [len(of.data) for of in stored if isinstance(of, Stored)]
        if kind in ("PNG", "lossless"):
            assert isinstance(stored[0], Stored)
            assert np.array_equal(np.asarray(decode(stored[0].data)), np.asarray(image.resize((60, 53), Image.Resampling.LANCZOS)))
    assert sizes["PNG"][0] == sizes["PNG"][1]
    assert sizes["lossless"][0] == sizes["lossless"][1]
    assert sizes["JPEG"][0] < sizes["JPEG"][1]
    assert sizes["WEBP"][0] < sizes["WEBP"][1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_profile_goes_along_and_other_metadata_do_not(kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "a camera, and where it was"
    more = {"JPEG": {"comment": b"a camera's"}, "PNG": {"pnginfo": TEXT}, "WEBP": {"xmp": b"a camera's"}}[kind]
    data = encoded(picture(40, 30), kind, icc_profile=profile, exif=exif, **more)
    assert data.count(b"a camera") == 2
    stored = prepare_image(data, Rules(max_side=20))
    assert isinstance(stored, Stored)
    with Image.open(io.BytesIO(stored.data)) as image:
        assert image.info.get("icc_profile") == profile
        assert not dict(image.getexif())
    assert b"a camera" not in stored.data


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("CMYK", b"RGB "), ("L", b"GRAY")])
def test_a_profile_for_other_colours_than_those_stored_is_left_out(mode: str, space: bytes) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(Image.new(mode, (40, 30)), "JPEG", icc_profile=profile[:16] + space + profile[20:])
    stored = prepare_image(data, Rules(max_side=20))
    assert isinstance(stored, Stored)
    with Image.open(io.BytesIO(stored.data)) as image:
        assert "icc_profile" not in image.info


@pytest.mark.parametrize("max_side", [None, 20, 100])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("exif", [b"", TURNED], ids=["lying", "turned"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_limits_and_damage_are_told_whatever_is_encoded_anew(
    kind: str, exif: Image.Exif | bytes, normalize: bool, max_side: int | None
) -> None:
    rules = Rules(max_side=max_side, normalize=normalize)
    data = encoded(picture(64, 48), kind, exif=exif)
    for share in (0.02, 0.3, 0.6, 0.9, 0.97):
        cut = prepare_image(data[: int(len(data) * share)], rules)
        assert isinstance(cut, Reject)
        assert cut.reason in ("damaged", "not an image")
    limits = Rules(max_pixels=64 * 48 - 1, max_side=rules.max_side, normalize=rules.normalize)
    assert prepare_image(data, limits) == Reject("too many pixels", "64 x 48, max_pixels is 3071"), "before decoding"
    limits = Rules(min_side=49, max_side=rules.max_side, normalize=rules.normalize)
    assert prepare_image(data, limits) == Reject("too small", "64 x 48, min_side is 49")
    assert not isinstance(prepare_image(data, Rules(min_side=48)), Reject)
    assert prepare_image(b"", rules).reason == "empty"  # type: ignore[union-attr]
    assert prepare_image(b"<html>", rules).reason == "not an image"  # type: ignore[union-attr]
    assert prepare_image(encoded(picture(64, 48), "GIF"), rules).reason == "unsupported format"  # type: ignore[union-attr]
    assert prepare_image(bomb(), rules).reason == "too many pixels"  # type: ignore[union-attr]


def test_without_decoding_sizes_are_held_against_the_limits_too() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = make_image(0, kind)
        assert inspect_image(data, 10**6, decode=False, min_side=10) == Reject("too small", "12 x 9, min_side is 10")
        assert inspect_image(data, 107, decode=False) == Reject("too many pixels", "12 x 9, max_pixels is 107")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["grey png", "webp", "grey jpeg", "rgba png", "16-bit rgb png", "turned png", "turned webp"])
@pytest.mark.parametrize("rules", [Rules(normalize=True), Rules(max_side=5)], ids=["normalize", "max_side"])
def test_a_flipped_byte_is_no_better_hidden_by_encoding_anew(kind: str, rules: Rules) -> None:
    data = ODD[kind][0] if kind in ODD else PLAIN[kind]
    rejected = 0
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        reject = isinstance(inspect_image(flipped, 10**6), Reject)
        assert isinstance(prepare_image(flipped, rules), Reject) == reject, at
        rejected += reject
    assert rejected


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from([*ODD, *PLAIN]),
    cut=st.none() | st.integers(0, 600),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    max_side=st.none() | st.integers(1, 14),
    normalize=st.booleans(),
    check=st.booleans(),
)
def test_no_damage_ends_a_pack(
    kind: str, cut: int | None, flips: list[tuple[int, int]], max_side: int | None, normalize: bool, check: bool
) -> None:
    data = bytearray(ODD[kind][0] if kind in ODD else PLAIN[kind])[:cut]
    for at, flip in flips:
        if data:
            data[at % len(data)] ^= flip
    stored = prepare_image(bytes(data), Rules(check, 10**6, 1, max_side, 90, normalize))
    if check and isinstance(inspect_image(bytes(data), 10**6), Reject):
        assert isinstance(stored, Reject), "what does not decode is not mended by encoding it anew"
    if isinstance(stored, Reject):
        return
    if stored.data != bytes(data):
        shown = decode(stored.data)
        assert (shown.size, shown.mode) == ((stored.width, stored.height), "RGB")
        assert max_side is None or max(shown.size) <= max_side


def test_a_pack_that_encodes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"a/{name.replace(' ', '-')}": data for name, (data, _) in ODD.items()}
    rng = random.Random(0)
    files |= {f"b/{i}.jpg": encoded(picture(rng.randint(10, 90), rng.randint(10, 90)), "JPEG") for i in range(12)}
    source = write_files(tmp_path / "src", files)
    asked = {"max_side": 40, "normalize": True, "min_side": 9, "samples_per_shard": 5}
    dataset = pack_one(source, out=tmp_path / "one", jobs=1, **asked)
    pack_one(source, out=tmp_path / "two", jobs=2, **asked)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    rows = pq.read_table(dataset.path / "samples").to_pylist()
    assert len(rows) == len(files)
    found = contents(dataset)
    for row in rows:
        shown = decode(found[row["key"]][0])
        assert shown.size == (row["width"], row["height"])
        assert max(shown.size) == min(40, max(decode(files[row["source"]]).size))
    assert verify(dataset.path, decode=True).problems == ()
    made = json.loads((dataset.path / "dataset.json").read_text())["made"]
    assert made["encoders"] == encoders()
    assert "Pillow" in made["encoders"]
    monkeypatch.setattr("data_tools.assemble.encoders", lambda: "Pillow 99")
    with pytest.raises(PackError, match=r"is another dataset \(encoders: .* -> Pillow 99\)"):
        pack_one(source, out=tmp_path / "one", **asked)
    plain = pack_one(source, out=tmp_path / "plain")
    assert "encoders" not in json.loads((plain.path / "dataset.json").read_text())["made"]
    assert sorted(data for data, _, _ in contents(plain).values()) == sorted(files.values())


def test_small_images_are_left_out_and_named(tmp_path: Path) -> None:
    source = write_files(tmp_path / "src", {"a/good.png": make_image(0, "PNG", (32, 32)), "a/thin.png": make_image(1, "PNG", (400, 31))})
    (result,) = pack(PackConfig((str(source),), str(tmp_path / "out"), min_side=32))
    assert result.reasons == {"too small": 1}
    (row,) = pq.read_table(result.path / "rejects.parquet").to_pylist()
    assert (row["source"], row["detail"]) == ("a/thin.png", "400 x 31, min_side is 32")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"min_side": 0}, "min_side=0 must be at least 1"),
        ({"max_side": 0}, "max_side=0 must be at least min_side=1"),
        ({"max_side": 31, "min_side": 32}, "max_side=31 must be at least min_side=32"),
        ({"quality": 0}, "quality=0 must be in 1..100"),
        ({"quality": 101}, "quality=101 must be in 1..100"),
    ],
)
def test_settings_that_cannot_work(setting: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=said):
        pack(PackConfig(("a",), str(tmp_path / "out"), **setting))  # type: ignore[arg-type]
