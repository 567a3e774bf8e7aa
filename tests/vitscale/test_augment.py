"""RandAugment: each operation against a definition written here or another library's, draws that are even, and pixels that are the key's.

The tests marked `peers` need torchvision and timm, and run under `make peers`.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.vitscale.pictures import png
from vitscale import augment, images, keyed
from vitscale.augment import OPS, Draw
from vitscale.config import PreprocessConfig

Pixels = npt.NDArray[np.uint8]
MAGNITUDES = (0.0, 5.0, 9.0, 10.0, 15.0, 20.0)


def picture(height: int = 61, width: int = 47, seed: int = 0) -> Pixels:
    """Smooth shapes, noise, and not every grey level."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(0.8 * np.asarray(coarse) + 20 + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def applied(op: str, pixels: Pixels, magnitude: float, sign: int = 1, center: tuple[float, float] = (0.5, 0.5)) -> Pixels:
    return np.asarray(augment.apply(Image.fromarray(pixels), Draw(op, sign, center), magnitude))


def blended(degenerate: npt.NDArray[np.float64], pixels: Pixels, factor: float) -> npt.NDArray[np.float64]:
    return np.clip(degenerate + factor * (pixels - degenerate), 0, 255)


def close(ours: Pixels, wanted: npt.NDArray[np.float64], levels: float) -> None:
    assert np.abs(ours - wanted).max() <= levels


# ---------------------------------------------------------------------------------------------------------------------------------------
# Operations, against plain definitions
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_point_operations(magnitude: float) -> None:
    x = picture().astype(int)
    m = magnitude / 10
    assert (applied("invert", picture(), magnitude) == 255 - x).all()
    bits = {0: 1, 2: 2, 3: 3, 4: 4, 6: 6, 8: 8}[int(4 * m)]
    assert (applied("posterize", picture(), magnitude) == x // 2 ** (8 - bits) * 2 ** (8 - bits)).all()
    threshold = {0.0: 0, 5.0: 128, 9.0: 230, 10.0: 0, 15.0: 128, 20.0: 0}[magnitude]
    assert (applied("solarize", picture(), magnitude) == np.where(x < threshold, x, 255 - x)).all()
    assert (applied("solarize_add", picture(), magnitude) == np.where(x < 128, np.minimum(255, x + int(110 * m)), x)).all()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_blends(magnitude: float) -> None:
    x, factor = picture(), 1.8 * magnitude / 10 + 0.1
    grey = (x @ [0.299, 0.587, 0.114]).round()[..., None]
    close(applied("color", x, magnitude), blended(grey, x, factor), 1 + abs(1 - factor))
    close(applied("contrast", x, magnitude), blended(np.full(x.shape, 224 * 224 / 256), x, factor), 1)
    close(applied("brightness", x, magnitude), blended(np.zeros(x.shape), x, factor), 1)
    smooth, f = x.astype(float), x.astype(float)
    smooth[1:-1, 1:-1] = sum(f[1 + i : 60 + i, 1 + j : 46 + j] * (5 if i == j == 0 else 1) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 13
    close(applied("sharpness", x, magnitude), blended(smooth, x, factor), 1 + abs(1 - factor))


def test_auto_contrast_and_equalize_use_the_whole_range_of_each_channel() -> None:
    x = picture()
    stretched = applied("auto_contrast", x, 10)
    low, high = x.min((0, 1)).astype(float), x.max((0, 1)).astype(float)
    close(stretched, (x - low) * 255 / (high - low), 1)
    even = applied("equalize", x, 10)
    for channel in range(3):
        values, counts = np.unique(x[..., channel], return_counts=True)
        step = (counts.sum() - counts[-1]) // 255
        places = dict(zip(values.tolist(), ((np.cumsum(counts) - counts + step // 2) // step).clip(0, 255), strict=True))
        assert even[..., channel].tolist() == np.vectorize(places.get)(x[..., channel]).tolist()
    flat = np.full((8, 8, 3), 77, np.uint8)
    for op in ("auto_contrast", "equalize"):
        assert (applied(op, flat, 10) == flat).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0.0, 5.3, 9.1, 15.7, 20.3])  # where no pixel's source lies on an edge between two
def test_geometry_takes_each_pixel_from_where_it_says(magnitude: float, sign: int) -> None:
    x = picture()
    height, width = x.shape[:2]
    row, column = np.mgrid[0:height, 0:width].astype(float)
    slope, turn = sign * 0.3 * magnitude / 10, np.deg2rad(sign * 3 * magnitude)
    middle_r, middle_c = (height - 1) / 2, (width - 1) / 2
    sources = {
        "shear_x": (row, column + slope * row),
        "shear_y": (row + slope * column, column),
        "translate_x": (row, column + sign * 10 * magnitude * width / 224),
        "translate_y": (row + sign * 10 * magnitude * height / 224, column),
        "rotate": (
            middle_r + np.sin(turn) * (column - middle_c) + np.cos(turn) * (row - middle_r),
            middle_c + np.cos(turn) * (column - middle_c) - np.sin(turn) * (row - middle_r),
        ),
    }
    for op, (r, c) in sources.items():
        ours = applied(op, x, magnitude, sign)
        r, c = np.floor(r + 0.5 + 1e-9).astype(int), np.floor(c + 0.5 + 1e-9).astype(int)
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        wanted = np.where(inside[..., None], x[r.clip(0, height - 1), c.clip(0, width - 1)], 128)
        assert (ours != wanted).any(-1).mean() <= (0.015 if op == "rotate" else 0.0), op  # a pixel's edge may fall to either side


@given(st.integers(1, 80), st.integers(1, 80), st.floats(0, 0.9999), st.floats(0, 0.9999), st.floats(0, 30))
def test_cutout_is_a_grey_square_around_its_centre(height: int, width: int, down: float, across: float, magnitude: float) -> None:
    x = np.zeros((height, width, 3), np.uint8)
    cut = applied("cutout", x, magnitude, center=(down, across))[..., 0] == 128
    half, r, c = int(4 * magnitude * min(height, width) / 224), int(down * height), int(across * width)
    row, column = np.mgrid[0:height, 0:width]
    assert (cut == ((row >= r - half) & (row < r + half) & (column >= c - half) & (column < c + half))).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**64 - 1), st.floats(0, 30))
def test_any_image_keeps_its_shape_and_is_not_written_to(height: int, width: int, key: int, magnitude: float) -> None:
    x = picture(height, width)
    before = x.copy()
    for op in OPS:
        assert applied(op, x, magnitude).shape == x.shape
    out = augment.randaugment(x[:, ::-1], key, 2, magnitude)
    assert (out.shape, out.dtype) == (x.shape, np.uint8)
    assert (x == before).all()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_draws_are_even_and_independent_between_layers() -> None:
    draws = [[augment.draw(int(keyed.mix(i)), layer) for layer in (0, 1)] for i in range(8000)]
    pairs = Counter((first.op, second.op) for first, second in draws)
    assert len(pairs) == len(OPS) ** 2
    expected = len(draws) / len(pairs)
    chi2 = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert chi2 < 255 + 5 * np.sqrt(2 * 255)  # 255 degrees of freedom, five deviations
    every = [d for pair in draws for d in pair]
    assert np.mean([d.sign for d in every]) == pytest.approx(0, abs=0.04)
    centers = np.array([d.center for d in every])
    np.testing.assert_allclose(centers.mean(0), 0.5, atol=0.012)
    np.testing.assert_allclose(centers.std(0), 12**-0.5, atol=0.008)
    numbers = np.array([[OPS.index(d.op), d.sign, *d.center] for d in every])
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.04


def test_pixels_are_a_function_of_the_key() -> None:
    x = picture()
    views = [augment.randaugment(x, key, 2, 10.0) for key in (5, 5, 6, 2**63 + 5)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
    assert (views[0] != views[3]).any()
    one, other = (augment.draw(5, layer) for layer in (0, 1))
    image = augment.apply(augment.apply(Image.fromarray(x), one, 10.0), other, 10.0)
    assert (views[0] == np.asarray(image)).all()


def test_training_views_are_augmented_after_crop_resize_and_flip() -> None:
    data = png(Image.fromarray(picture(90, 70)))
    off, on = PreprocessConfig(), PreprocessConfig(randaugment_layers=2, randaugment_magnitude=7.0)
    changed = 0
    for key in range(40):
        row = images.draws([key])[0]
        plain, augmented = (images.training_view(data, (32, 24), key, row, config) for config in (off, on))
        assert (augmented == augment.randaugment(plain, key, 2, 7.0)).all()
        changed += (augmented != plain).any()
    assert changed > 30
    assert (images.evaluation_view(data, (32, 24), on) == images.evaluation_view(data, (32, 24), off)).all()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("magnitude", [5.3, 9.1, 15.7])
@pytest.mark.parametrize("size", [(61, 47), (224, 224)], ids=str)
def test_operations_are_torchvisions(size: tuple[int, int], magnitude: float) -> None:
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    x, m = picture(*size), magnitude / 10
    tensor = torch.from_numpy(x).permute(2, 0, 1)
    factor, slope, angle = 1.8 * m + 0.1, 0.3 * m, 30 * m
    nearest = {"interpolation": InterpolationMode.NEAREST, "fill": [128.0]}
    theirs = {
        "auto_contrast": (tv.autocontrast(tensor), 1),
        "equalize": (tv.equalize(tensor), 0),
        "invert": (tv.invert(tensor), 0),
        "posterize": (tv.posterize(tensor, int(4 * m)), 0),
        "solarize": (tv.solarize(tensor, int(256 * m) % 256), 0),
        "brightness": (tv.adjust_brightness(tensor, factor), 1),
        "color": (tv.adjust_saturation(tensor, factor), 1 + abs(1 - factor)),
        "sharpness": (tv.adjust_sharpness(tensor, factor), 1 + abs(1 - factor)),
    }
    for op, (wanted, levels) in theirs.items():
        close(applied(op, x, magnitude), wanted.permute(1, 2, 0).numpy().astype(float), levels)
    turned = tv.rotate(tensor, angle, **nearest).permute(1, 2, 0).numpy()
    assert (turned != applied("rotate", x, magnitude)).any(-1).mean() < 0.01
    sheared = tv.affine(tensor, 0.0, [0, 0], 1.0, [float(np.rad2deg(np.arctan(slope))), 0.0], **nearest, center=[0.5, 0.5])
    assert (sheared.permute(1, 2, 0).numpy() != applied("shear_x", x, magnitude)).any(-1).mean() < 0.01


@pytest.mark.peers
@pytest.mark.parametrize("magnitude", [3.0, 9.0])
def test_operations_are_timms(magnitude: float) -> None:
    from timm.data import auto_augment as theirs

    image, m = Image.fromarray(picture(224, 224)), magnitude / 10
    fill = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.NEAREST}
    wanted = {
        "auto_contrast": theirs.auto_contrast(image),
        "equalize": theirs.equalize(image),
        "invert": theirs.invert(image),
        "rotate": theirs.rotate(image, 30 * m, **fill),
        "posterize": theirs.posterize(image, int(4 * m)),
        "solarize": theirs.solarize(image, int(256 * m)),
        "solarize_add": theirs.solarize_add(image, int(110 * m)),
        "color": theirs.color(image, 1.8 * m + 0.1),
        "brightness": theirs.brightness(image, 1.8 * m + 0.1),
        "sharpness": theirs.sharpness(image, 1.8 * m + 0.1),
        "translate_x": theirs.translate_x_abs(image, 100 * m, **fill),
        "translate_y": theirs.translate_y_abs(image, 100 * m, **fill),
    }
    for op, view in wanted.items():
        assert (np.asarray(view) == applied(op, np.asarray(image), magnitude)).all(), op
