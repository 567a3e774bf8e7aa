"""Crops and resizes: inside the image, of the promised area and ratio, the same as libraries that others evaluate with."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.images import MAX_SCANS, UNDECODABLE, Reject, decode, inspect_image
from tests.vitscale.pictures import png
from vitscale import images, keyed
from vitscale.config import PreprocessConfig

CONFIG = PreprocessConfig()
SIDES = st.integers(1, 1000)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draws(*keys: int) -> images.Draws:
    """The rows of some keys; of one key, its row."""
    rows = images.draws(np.array(keys, dtype=np.uint64))
    return rows[0] if len(keys) == 1 else rows


@given(SIDES, SIDES, st.integers(0, 2**64 - 1))
def test_a_crop_lies_in_the_image(width: int, height: int, key: int) -> None:
    left, top, right, bottom = images.random_crop(width, height, draws(key), CONFIG)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_areas_and_ratios_asked_for() -> None:
    boxes = np.array([images.random_crop(600, 600, row, CONFIG) for row in images.draws(keyed.mix(np.arange(4000)))])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = w * h / 600**2, w / h
    assert share.min() > 0.049
    assert share.max() <= 1.0
    areas = np.linspace(0.05, 1, 100_000)  # of a square image a crop of area a fits if |log ratio| <= -log a, and is drawn again if not
    fits = np.minimum(1, -np.log(areas) / np.log(4 / 3))
    assert share.mean() == pytest.approx((areas * fits).sum() / fits.sum(), abs=0.015)
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.01)
    assert (boxes[:, 0] == 0).any()
    assert (boxes[:, 2] == 600).any(), "the rightmost place must be reached"
    left_share = boxes[:, 0] / np.maximum(600 - w, 1)
    assert left_share.mean() == pytest.approx(0.5, abs=0.02)


def test_draws_of_many_keys_are_those_of_each() -> None:
    keys = keyed.mix(np.arange(5))
    together = images.draws(keys)
    for key, row in zip(keys, together, strict=True):
        assert row.tolist() == [float(keyed.uniform(key, draw)) for draw in range(41)]


def test_an_image_too_long_for_any_crop_is_cut_in_the_middle() -> None:
    left, top, right, bottom = images.random_crop(1000, 10, draws(5), PreprocessConfig(crop_scale=(0.9, 1.0)))
    assert (top, bottom) == (0, 10)
    assert right - left == round(10 * 4 / 3)
    assert left == pytest.approx((1000 - 13) / 2, abs=1)


def test_a_view_is_a_function_of_its_key() -> None:
    data = png(noise(50, 40))
    views = [images.training_view(data, (16, 16), 0, row, CONFIG) for row in draws(1, 1, 2)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    """Decoding one takes minutes; packing and training judge it alike."""
    file = io.BytesIO()
    noise(64, 64).convert("RGB").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]
    for what in (lambda: decode(bomb), lambda: images.training_view(bomb, (16, 16), 0, draws(1)[0], CONFIG)):
        with pytest.raises(UNDECODABLE, match="more than 256 scans"):
            what()
    assert inspect_image(bomb, 10**6) == Reject("damaged", "a JPEG of more than 256 scans")
    assert inspect_image(data, 10**6) == ("jpg", 64, 64)


def test_half_of_the_views_are_mirrored() -> None:
    data = png(Image.fromarray(np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], (32, 1, 3))))  # dark to bright
    views = [images.training_view(data, (8, 8), 0, row, CONFIG) for row in images.draws(keyed.mix(np.arange(2000)))]
    mirrored = np.mean([view[:, 0].mean() > view[:, -1].mean() for view in views])
    assert mirrored == pytest.approx(0.5, abs=0.04)
    never = PreprocessConfig(flip=0.0)
    assert all((v := images.training_view(data, (8, 8), 0, row, never))[:, 0].mean() <= v[:, -1].mean() for row in draws(*range(50)))


def test_without_crops_training_sees_the_whole_image_resized() -> None:
    image = noise(30, 20)
    view = images.training_view(png(image), (8, 12), 0, draws(9), PreprocessConfig(crop_scale=(1.0, 1.0), flip=0.0))
    assert (view == np.asarray(image.resize((12, 8), Image.Resampling.BILINEAR))).all()


@pytest.mark.parametrize(("size", "resized"), [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((64, 64), (256, 256))])
def test_evaluation_is_the_papers_resize_to_256_and_central_crop(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image = noise(*size)
    whole = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((resized[0] - 224) / 2), round((resized[1] - 224) / 2)
    expected = np.asarray(whole)[top : top + 224, left : left + 224]
    assert (images.evaluation_view(png(image), (224, 224), CONFIG) == expected).all()


def test_evaluation_with_crop_1_squashes_the_whole_image() -> None:
    image = noise(50, 20)
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))
    assert (images.evaluation_view(png(image), (16, 24), PreprocessConfig(eval_crop=1.0, interpolation="bicubic")) == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    source = noise(9, 7)
    made = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9)) if mode == "I;16" else source.convert(mode)
    made.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode(buffer.getvalue())
    assert (decoded.mode, decoded.size) == ("RGB", (9, 7))


def test_16_bit_grey_is_scaled() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None]).save(buffer, "PNG")
    assert np.asarray(decode(buffer.getvalue()))[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("damage", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_image_raises_what_the_stream_expects(damage: bytes) -> None:

    with pytest.raises(UNDECODABLE):
        decode(damage)


def test_a_truncated_image_raises_what_the_stream_expects() -> None:

    buffer = io.BytesIO()
    noise(60, 60).save(buffer, "JPEG")
    for cut in (20, 200, len(buffer.getvalue()) // 2):
        with pytest.raises(UNDECODABLE):
            decode(buffer.getvalue()[:cut])
