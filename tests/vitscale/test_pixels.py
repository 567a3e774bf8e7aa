"""Cuts of images equal Pillow's, bit for bit, in each of the ways that they are made; damaged bytes do no harm."""

import gc
import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from data_tools.images import UNDECODABLE, decode
from vitscale import images, pixels
from vitscale.config import PreprocessConfig
from vitscale.pixels import INTERPOLATIONS, Cut, Pixels

WAYS = ["native", "native resize, plain C", "simplejpeg", "simplejpeg, Pillow resize", "Pillow"]
SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "grey"]
ImageFile.MAXBLOCK = 2**20  # Pillow writes no progressive JPEG that is larger, and noise is large
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class On:
    """One of the ways, switched on for a `with`."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __enter__(self) -> None:
        self.before = pixels._native, pixels._region_decoder, pixels.simplejpeg
        if self.way != "native":
            pixels._region_decoder = None
        if "Pillow" in self.way:
            pixels._native = None
        elif pixels._native:
            pixels._native.avx2("plain C" not in self.way)
        if self.way == "Pillow":
            pixels.simplejpeg = None

    def __exit__(self, *error: object) -> None:
        pixels._native, pixels._region_decoder, pixels.simplejpeg = self.before
        if pixels._native:
            pixels._native.avx2(True)


def made(data: bytes, cut: Cut, shape: tuple[int, int], way: str, scale: int = 1) -> Pixels:
    out = np.zeros((*shape, 3), np.uint8)
    with On(way):
        pixels.cut_pixels(data, out, lambda width, height: cut, lambda cut: scale)
    return out


def by_pillow(data: bytes, cut: Cut, shape: tuple[int, int], scale: int = 1) -> Pixels:
    """The definition."""
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image = image.convert("RGB")
    left, top, right, bottom = cut.region
    region = left // scale, top // scale, -(-right // scale), -(-bottom // scale)
    box = left / scale - region[0], top / scale - region[1], right / scale - region[0], bottom / scale - region[1]
    resized = image.crop(region).resize(cut.size, RESAMPLING[cut.interpolation], box=box)
    window = np.asarray(resized)[cut.at[1] : cut.at[1] + shape[0], cut.at[0] : cut.at[0] + shape[1]]
    return window[:, ::-1] if cut.mirrored else window


def jpeg(width: int, height: int, sampling: str, seed: int, **options: Any) -> bytes:
    """Noise, in which every wrong neighbour shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (1 + height // 9, 1 + width // 9, 3), dtype=np.uint8)).resize((width, height))
    image = Image.fromarray(
        np.where(rng.random((height, width, 1)) < 0.3, rng.integers(0, 256, (height, width, 3)), np.asarray(coarse)).astype(np.uint8)
    )
    if sampling == "4:4:0":  # which Pillow does not write
        return bytes(simplejpeg.encode_jpeg(np.asarray(image), quality=85, colorsubsampling="440"))
    file = io.BytesIO()
    if sampling == "grey":
        image.convert("L").save(file, "JPEG", quality=85, **options)
    else:
        image.save(file, "JPEG", quality=85, subsampling=sampling, **options)
    return file.getvalue()


@st.composite
def cuts(draw: st.DrawFn, width: int, height: int, smallest: int = 1) -> tuple[Cut, tuple[int, int]]:
    """A cut that fits the image and the shape of its window."""
    side = st.integers(smallest, 50)
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    region = left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    size = draw(side), draw(side)
    shape = draw(st.integers(1, size[1])), draw(st.integers(1, size[0]))
    at = draw(st.integers(0, size[0] - shape[1])), draw(st.integers(0, size[1] - shape[0]))
    return Cut(region, size, draw(st.sampled_from(INTERPOLATIONS)), at, draw(st.booleans())), shape


def test_the_native_way_is_there_where_it_is_asked_for() -> None:
    """Continuous integration installs what it needs; elsewhere the tests below would pass without it."""
    if os.environ.get("VITSCALE_REQUIRE_NATIVE"):
        assert pixels.path_in_use().startswith("native, libjpeg-turbo"), pixels.path_in_use()


def test_each_way_has_a_name() -> None:
    names = []
    for way in ("native", "simplejpeg", "Pillow"):
        with On(way):
            names.append(pixels.path_in_use())
    assert names[1].startswith("simplejpeg 1")
    assert names[2].startswith("Pillow 1")
    assert names[2].endswith("Pillow resize")


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_jpegs_are_cut_as_pillow_would_in_every_way(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    options = {"progressive": data.draw(st.booleans()), "restart_marker_blocks": data.draw(st.sampled_from([0, 0, 1, 3]))}
    content = jpeg(width, height, data.draw(st.sampled_from(SAMPLINGS)), data.draw(st.integers(0, 99)), **options)
    assert pixels.plain_jpeg(content) == (width, height)
    cut, shape = data.draw(cuts(width, height))
    expected = by_pillow(content, cut, shape)
    for way in WAYS:
        np.testing.assert_array_equal(made(content, cut, shape, way), expected, err_msg=way)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_jpegs_decoded_at_a_part_of_their_size_are_the_same_in_every_way(data: st.DataObject) -> None:
    scale = data.draw(st.sampled_from([2, 4, 8]))
    width, height = data.draw(st.integers(8 * scale, 300)), data.draw(st.integers(8 * scale, 300))
    content = jpeg(width, height, data.draw(st.sampled_from(SAMPLINGS)), 7, progressive=data.draw(st.booleans()))
    cut, shape = data.draw(cuts(width, height, smallest=8))
    expected = by_pillow(content, cut, shape, scale)
    for way in WAYS:
        np.testing.assert_array_equal(made(content, cut, shape, way, scale), expected, err_msg=way)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_other_images_are_cut_as_pillow_would(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    file = io.BytesIO()
    mode = data.draw(st.sampled_from(["RGB", "L", "P", "RGBA"]))
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(
        file, "PNG", compress_level=1
    )
    cut, shape = data.draw(cuts(width, height))
    for way in WAYS:
        out = made(file.getvalue(), cut, shape, way, scale=2)
        np.testing.assert_array_equal(out, by_pillow(file.getvalue(), cut, shape), err_msg=way)


def large_weights() -> Iterator[tuple[int, int, tuple[int, int], str]]:
    for size in ((3000, 11), (11, 3000), (1, 4000), (4000, 1), (1, 1), (701, 699)):
        for target in ((1, 1), (3, 224), (224, 3), (300, 300)):
            for interpolation in INTERPOLATIONS:
                yield (*size, target, interpolation)


@pytest.mark.parametrize("way", WAYS)
def test_extreme_shapes(way: str) -> None:
    for width, height, size, interpolation in large_weights():
        content = jpeg(width, height, "4:2:0", 3)
        cut = Cut((0, 0, width, height), size, interpolation)  # type: ignore[arg-type]
        np.testing.assert_array_equal(made(content, cut, size[::-1], way), by_pillow(content, cut, size[::-1]))


def test_a_view_of_a_long_image_takes_little_memory() -> None:
    """The resized image, of which evaluation takes the middle, would have 256 x 15 million pixels."""
    content = jpeg(60_000, 1, "4:4:4", 3)
    if not pixels._native:
        pytest.skip("Pillow makes the whole of it")
    view = images.evaluation_view(content, (224, 224), PreprocessConfig())
    assert view.std() > 0


def exif_turned() -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    decode(jpeg(40, 30, "4:2:0", 1)).save(file, "JPEG", exif=exif, dpi=(72, 72))
    return file.getvalue()


def cmyk() -> bytes:
    file = io.BytesIO()
    decode(jpeg(40, 30, "4:4:4", 1)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def two_pictures() -> bytes:
    """Of which the first is shown."""
    file = io.BytesIO()
    decode(jpeg(90, 70, "4:2:0", 1)).save(file, "MPO", save_all=True, append_images=[decode(jpeg(90, 70, "4:2:0", 2))])
    return file.getvalue()


def unfinished() -> bytes:
    """A progressive JPEG without its later scans, which libjpeg smooths, from the blocks around."""
    whole = jpeg(90, 90, "4:2:0", 1, progressive=True)
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    return whole[: scans[2]] + b"\xff\xd9"


def odd_sampling() -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.asarray(decode(jpeg(90, 30, "4:4:4", 1))), colorsubsampling="411"))


def rgb_inside() -> bytes:
    """Components that an Adobe segment calls RGB."""
    file = io.BytesIO()
    decode(jpeg(40, 30, "4:4:4", 1)).save(file, "JPEG", keep_rgb=True)
    return file.getvalue()


@pytest.mark.parametrize("make", [exif_turned, cmyk, two_pictures, unfinished, odd_sampling, rgb_inside])
@pytest.mark.parametrize("way", WAYS)
def test_odd_jpegs_show_what_pillow_shows(make: Any, way: str) -> None:
    content = make()
    image = decode(content)
    cut = Cut((5, 3, image.width - 4, image.height - 2), (20, 17), "bicubic", mirrored=True)
    np.testing.assert_array_equal(made(content, cut, (17, 20), way), by_pillow(content, cut, (17, 20)))


@pytest.mark.parametrize("way", WAYS)
def test_views_from_bytes_are_those_from_pillow(way: str) -> None:
    content, config = jpeg(500, 375, "4:2:0", 2), PreprocessConfig(interpolation="bicubic")
    out = np.zeros((3, 64, 48, 3), np.uint8)
    for row in images.draws(np.arange(20)):
        with On(way):
            view = images.training_view(memoryview(content), (64, 48), 0, row, config, out=out[1])
        assert view.base is out
        image = decode(content).crop(images.random_crop(500, 375, row, config)).resize((48, 64), Image.Resampling.BICUBIC)
        expected = np.asarray(image)[:, ::-1] if row[0] < 0.5 else np.asarray(image)
        np.testing.assert_array_equal(view, expected)
    assert not out[0].any()
    assert not out[2].any(), "nothing may be written beside the view"


def test_fast_views_are_near_the_exact_ones() -> None:
    """Photographs are smoother than this; docs/data.md has their figures."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((960, 720), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90
    )
    scales, differences = set(), []
    for row in images.draws(np.arange(60)):
        exact = images.training_view(file.getvalue(), (128, 128), 0, row, PreprocessConfig())
        fast = images.training_view(file.getvalue(), (128, 128), 0, row, PreprocessConfig(), "fast")
        cut = Cut(images.random_crop(960, 720, row, PreprocessConfig()), (128, 128), "bilinear")
        scales.add(images.decoding_scale(cut))
        differences.append(np.abs(exact.astype(int) - fast))
        assert (differences[-1].max() == 0) == (images.decoding_scale(cut) == 1)
    assert scales == {1, 2, 4}
    assert np.mean(differences) < 2


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 400), st.integers(1, 400))
def test_no_crop_is_decoded_smaller_than_its_view(width: int, height: int, new_width: int, new_height: int) -> None:
    scale = images.decoding_scale(Cut((0, 0, width, height), (new_width, new_height), "bilinear"))
    assert scale == 1 or (width // scale >= new_width and height // scale >= new_height)


# ---------------------------------------------------------------------------------------------------------------------- damage


def outcome(data: bytes, cut_of: Any, shape: tuple[int, int], way: str) -> Pixels | str:
    out = np.zeros((*shape, 3), np.uint8)
    with On(way):
        try:
            pixels.cut_pixels(data, out, cut_of)
        except UNDECODABLE as error:
            return type(error).__name__
    return out


def whole_cut(width: int, height: int) -> Cut:
    return Cut((0, 0, width, height), (16, 16), "bilinear")


def part_cut(width: int, height: int) -> Cut:
    return Cut((20, 10, 50, 30), (16, 16), "bilinear")


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    kind = chance.random()
    if kind < 0.2:
        return bytes(changed[: chance.randrange(len(changed))])
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at = chance.randrange(min(len(changed), chance.choice([700, 10**9])))
        if kind < 0.8:
            changed[at] = chance.choice([0, 255, 0xD9, 0xDA, 0xC0, chance.randrange(256)])
        elif kind < 0.9:
            changed[at:at] = chance.randbytes(chance.randrange(1, 5))
        elif len(changed) > 10:
            del changed[at : at + chance.randrange(1, 9)]
    return bytes(changed)


SEEDS = [
    jpeg(61, 43, "4:2:0", 1), jpeg(61, 43, "4:2:2", 1, progressive=True), jpeg(61, 43, "grey", 1, restart_marker_blocks=2),
    jpeg(40, 40, "4:4:0", 1), exif_turned(), cmyk(),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Pillow's, of broken metadata
def test_damaged_jpegs_are_shown_or_refused_as_by_pillow() -> None:
    """The whole image is cut, so what is damaged is seen."""
    chance = random.Random(0)
    accepted = refused = 0
    for _ in range(int(os.environ.get("VITSCALE_MUTATIONS", 3000))):
        data = mutated(chance.choice(SEEDS), chance)
        expected = outcome(data, whole_cut, (16, 16), "Pillow")
        for way in ("native", "simplejpeg"):
            got = outcome(data, whole_cut, (16, 16), way)
            if isinstance(expected, str):
                refused += 1
                assert isinstance(got, str), f"{way} shows what Pillow refuses"
                assert got == expected
            else:
                accepted += 1
                assert isinstance(got, np.ndarray), f"{way} refuses what Pillow shows: {got}"
                np.testing.assert_array_equal(got, expected)
    assert accepted > 500
    assert refused > 500


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """The JPEG with segments, each of a marker and a body, before all others."""
    return data[:2] + b"".join(bytes([0xFF, marker]) + (len(of) + 2).to_bytes(2) + of for marker, of in segments) + data[2:]


REFUSED = [
    (0xE0, b"JFIF\0\1"),
    (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x1a\0\1\0\0\0\1&\0\0\0\1(\0\3\0\0\0\1\0\2\0\0\0\0\0\0"),
    (0xE1, b"Exif\0\0II*\0\x08\0\0\0\2\0\x1a\1\7\0\1\0\0\0&\0\0\0(\1\3\0\1\0\0\0\2\0\0\0\0\0\0\0"),
    (0xE1, b"Exif\0\0II\0*\x08\0\0\0\2\0\x1a\1\2\0\1\0\0\0\0\0\0\0(\1\3\0\1\0\0\0\2\0\0\0\0\0\0\0"),
    (0xE2, b"ICC_PROFILE\0\1"),
    (0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\x028B8BIM\4\4"),
    (0xEE, b"Adobe\0"),
]
SHOWN = [
    (0xE0, b"JFIF\0\1\2\1\0H\0H\0\0"),
    (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x1a\0\5\0\0\0\1\0\0\0&\1(\0\3\0\0\0\1\0\2\0\0\0\0\0\0\0\0\0H\0\0\0\1"),
    (0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x1a\1\5\0\1\0\0\0\x1a\0\0\0\0\0\0\0H\0\0\0\1\0\0\0"),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
    (0xE2, b"ICC_PROFILE\0\1\1no profile"),
    (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0\0\0\0\0"),
    (0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\x028B"),
    (0xEE, b"Adobe\0d\0\0\0\0\1"),
]


@pytest.mark.parametrize("segment", REFUSED, ids=str)
def test_segments_that_pillow_stumbles_over_are_left_to_it(segment: tuple[int, bytes]) -> None:
    data = with_segments(SEEDS[0], segment)
    assert pixels.plain_jpeg(data) is None
    assert outcome(data, whole_cut, (16, 16), "Pillow") == outcome(data, whole_cut, (16, 16), "native") == "UnidentifiedImageError"


def test_a_directory_that_goes_on_in_another_segment_is_left_to_pillow() -> None:
    """Which joins them, however innocent each is alone."""
    (_, whole), empty = REFUSED[1], b"MM\0*\0\0\0\x08\0\0"
    first, second = b"Exif\0\0MM\0*\0\0\0\x12", b"Exif\0\0" + empty + whole[14:]
    assert pixels.plain_jpeg(with_segments(SEEDS[0], (0xE1, second))) is not None
    data = with_segments(SEEDS[0], (0xE1, first), (0xE1, second))
    assert outcome(data, whole_cut, (16, 16), "Pillow") == outcome(data, whole_cut, (16, 16), "native") == "UnidentifiedImageError"


@pytest.mark.parametrize("segment", SHOWN, ids=str)
def test_usual_segments_cost_no_speed(segment: tuple[int, bytes]) -> None:
    assert pixels.plain_jpeg(with_segments(SEEDS[0], segment)) == (61, 43)


@pytest.mark.filterwarnings("ignore")
def test_odd_segments_are_read_as_by_pillow() -> None:
    """Segments of all kinds that Pillow looks into, cut off, changed and joined, under their own marker or another one."""
    chance, small = random.Random(2), jpeg(9, 7, "4:2:0", 1)
    counts = {"refused": 0, "plain": 0}
    for _ in range(int(os.environ.get("VITSCALE_MUTATIONS", 3000)) // 5):
        segments = []
        for marker, body in chance.choices(REFUSED + SHOWN, k=chance.choice([1, 1, 2])):
            body = bytearray(body + chance.choice([b"", b"", chance.choice(SHOWN)[1][-16:]]))
            for _ in range(chance.choice([0, 1, 2])):
                body[chance.randrange(len(body))] = chance.choice([0, 1, 2, 5, 255, chance.randrange(256)])
            end = chance.randrange(len(body) + 1) if chance.random() < 0.3 else len(body)
            segments.append((marker if chance.random() < 0.9 else chance.randrange(0xE0, 0xF0), bytes(body[:end])))
        data = with_segments(small, *segments)
        expected, found = (outcome(data, whole_cut, (16, 16), way) for way in ("Pillow", "native"))
        assert isinstance(found, str) == isinstance(expected, str), segments
        np.testing.assert_array_equal(found, expected, err_msg=str(segments))
        counts["refused"] += isinstance(expected, str)
        counts["plain"] += pixels.plain_jpeg(data) is not None
    assert min(counts.values()) > 50


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pixel_limit", [1000, 1311, 1312, 2622, 2623, None])
def test_an_image_of_too_many_pixels_is_refused_as_by_pillow(monkeypatch: pytest.MonkeyPatch, pixel_limit: int | None) -> None:
    """Which refuses those of over twice its limit; this one has 2,623."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixel_limit)
    expected = outcome(SEEDS[0], whole_cut, (16, 16), "Pillow")
    assert isinstance(expected, str) == (pixel_limit in (1000, 1311))
    for way in ("native", "simplejpeg"):
        np.testing.assert_array_equal(outcome(SEEDS[0], whole_cut, (16, 16), way), expected)


def test_random_bytes_behind_a_header_do_no_harm() -> None:
    chance, header = random.Random(1), SEEDS[0][: SEEDS[0].index(b"\xff\xda") + 14]
    for _ in range(300):
        data = header + chance.randbytes(chance.randrange(2000)) + b"\xff\xd9"
        with_native = outcome(data, part_cut, (16, 16), "native")
        without = outcome(data, part_cut, (16, 16), "Pillow")
        if isinstance(without, str):
            assert not isinstance(with_native, str) or with_native == without  # damage behind the region may go unseen
        else:
            np.testing.assert_array_equal(with_native, without)


def test_errors_leave_no_memory_behind() -> None:
    """300 damaged images of 1 MB each when decoded, where 20 show what is held anyway."""
    import resource

    whole = jpeg(600, 600, "4:2:0", 1, progressive=True)
    damaged = whole[: len(whole) // 2] + b"\xff\xd9"
    out = np.zeros((8, 8, 3), np.uint8)
    if not pixels._region_decoder:
        pytest.skip("built without libjpeg-turbo")

    def peak_after(count: int) -> int:
        for _ in range(count):
            arguments = (0, 0, 600, 600), (0.0, 0.0, 600.0, 600.0), (8, 8), (0, 0), False, False, True
            assert not pixels._region_decoder(out, damaged, 600, 600, 1, *arguments)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert peak_after(300) - peak_after(20) < 40 * 1024


BOX = (0.0, 0.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("region", "box", "size", "at"),
    [
        ((0, 0, 5, 4), BOX, (2, 2), (0, 0)),
        ((-1, 0, 4, 4), BOX, (2, 2), (0, 0)),
        ((0, 0, 4, 4), (0.0, 0.0, 4.5, 4.0), (2, 2), (0, 0)),
        ((0, 0, 4, 4), (0.0, 0.0, float("nan"), 4.0), (2, 2), (0, 0)),
        ((0, 0, 4, 4), (2.0, 0.0, 2.0, 4.0), (2, 2), (0, 0)),
        ((0, 0, 4, 4), BOX, (1, 2), (0, 0)),
        ((0, 0, 4, 4), BOX, (2, 2), (1, 0)),
        ((0, 0, 4, 4), BOX, (2, 2), (-1, 0)),
    ],
)
def test_the_native_module_trusts_no_argument(region: Any, box: Any, size: Any, at: Any) -> None:
    if not pixels._native:
        pytest.skip("not built")
    with pytest.raises(RuntimeError, match="does not fit"):
        pixels._native.resize(np.zeros((2, 2, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), region, box, size, at, False, False, True)


def test_the_native_module_takes_no_other_buffers() -> None:
    if not pixels._native:
        pytest.skip("not built")
    rest: Any = ((0, 0, 4, 4), BOX, (2, 2), (0, 0), False, False, True)
    good = np.zeros((4, 4, 3), np.uint8)
    for out in (
        np.zeros((2, 2), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2, 2, 3), np.int16),
        np.zeros((2, 4, 3), np.uint8)[:, ::2],
        b"12",
    ):
        with pytest.raises((TypeError, BufferError, ValueError)):
            pixels._native.resize(out, good, *rest)


# ----------------------------------------------------------------------------------------------------------------- installation


@pytest.mark.parametrize("compiler", ["none", "without libjpeg"])
def test_a_build_without_compiler_or_library_goes_on(tmp_path: Path, compiler: str) -> None:
    """And gives what can be had: nothing, or the resize alone."""
    if not shutil.which("cc"):
        pytest.skip("no compiler on this machine")
    root = Path(pixels.__file__).parents[1]
    (tmp_path / "vitscale").mkdir()
    for name in ("setup.py", "vitscale/_pixels.c"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\nexit 1\n" if compiler == "none" else '#!/bin/sh\ncase "$*" in *WITH_JPEG*) exit 1;; esac\nexec cc "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "CC": str(fake), "LDSHARED": f"{fake} -shared"}
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    modules = list((tmp_path / "vitscale").glob("_pixels*.so"))
    if compiler == "none":
        assert not modules
        return
    assert modules
    asked = "import _pixels; print(hasattr(_pixels, 'resize'), hasattr(_pixels, 'decode_resize'))"
    said = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path / "vitscale", capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False"]
