"""Which samples `data preview` picks, against a plain choice; what becomes of damaged ones; its page in a real browser."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_tools import data_pages, page, preview
from data_tools.config import PackConfig
from data_tools.dataset import Dataset
from data_tools.pack import pack
from data_tools.preview import PreviewError, as_json, pick_classes, pick_shards, random_numbers, sheet, tiles
from launch.data_tables import half_blocks, print_preview

from .browser import Browser, browser, need_chromium
from .conftest import make_image, pack_one
from .synthetic import write_dataset
from .test_stats import HOSTILE, assert_fits, assert_quiet, random_parts

VITSCALE = str(Path(sys.executable).with_name("vitscale"))


# -- Which samples ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_of_each_class_those_with_the_smallest_random_numbers_are_taken(tmp_path: Path, rows: int) -> None:
    parts = random_parts(2, 300, 9, 4, False) | {"rows": rows}
    dataset = Dataset.open(write_dataset(tmp_path / "train", **parts), check_shards=False)
    for seed, images in ((0, 3), (1, 1), (2, 1000)):
        picks = pick_classes(dataset, 100, images, seed)
        numbers = random_numbers(np.arange(300), seed)
        there = sorted({label for row in parts["labels"] for label in row})
        assert [pick.title for pick in picks] == [str(label) for label in there]
        for pick, label in zip(picks, there, strict=True):
            has = [number for number, row in enumerate(parts["labels"]) if label in row]
            assert pick.of == len(has)
            assert pick.samples == tuple(sorted(sorted(has, key=numbers.__getitem__)[:images]))


def test_each_sample_of_a_class_is_as_likely_as_any_other(tmp_path: Path) -> None:
    labels = [[0, 1] if number < 10 else [1] for number in range(40)]
    dataset = Dataset.open(write_dataset(tmp_path / "train", labels=labels, shard_sizes=[40], num_classes=2), check_shards=False)
    taken = [Counter[int](), Counter[int]()]
    for seed in range(1000):
        for counter, pick in zip(taken, pick_classes(dataset, 2, 4, seed), strict=True):
            counter.update(pick.samples)
    for counter, size in zip(taken, (10, 40), strict=True):
        expected = 1000 * 4 / size
        assert len(counter) == size
        assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counter.values())


@given(st.integers(0, 2**62), st.integers(-(2**31), 2**31))
def test_random_numbers_differ(first: int, seed: int) -> None:
    numbers = random_numbers(np.arange(first, first + 1000), seed)
    assert len(set(numbers.tolist())) == 1000
    assert not np.array_equal(numbers, random_numbers(np.arange(first, first + 1000), seed + 1))


def test_shards_and_the_whole_are_drawn_from_without_repeats(tmp_path: Path) -> None:
    parts = random_parts(4, 100, 3, 12, False)
    path = write_dataset(tmp_path / "train", **parts)
    dataset = Dataset.open(path, check_shards=False)
    filled = {name: size for name, size in zip(dataset.shard_names, parts["shard_sizes"], strict=True) if size}
    picks = pick_shards(dataset, 100, 5, seed=0)
    assert {pick.title: pick.of for pick in picks} == filled
    for pick in picks:
        assert len(set(pick.samples)) == len(pick.samples) == min(5, pick.of)
        assert {dataset.shard_of(sample) for sample in pick.samples} == {pick.title}
    assert len(pick_shards(dataset, 2, 5, seed=0)) == 2
    (group,) = sheet(path, by="random", images=60).groups
    numbers = [tile.sample for tile in group.tiles]
    assert len(set(numbers)) == 60
    assert numbers == [tile.sample for tile in sheet(path, by="random", images=60).groups[0].tiles]
    assert numbers != [tile.sample for tile in sheet(path, by="random", images=60, seed=1).groups[0].tiles]
    assert len(sheet(path, by="random", images=1000).groups[0].tiles) == 100


def test_classes_are_named_by_name_or_number(tmp_path: Path) -> None:
    names = ["cat", "0", "dog", "none"]
    path = write_dataset(tmp_path / "train", labels=[[0], [1], [2], [0]], shard_sizes=[4], num_classes=4, class_names=names)

    def shown(*words: str) -> list[tuple[str, int]]:
        return [(group.title, group.samples) for group in sheet(path, classes=words).groups]

    assert shown("dog", "cat", "dog") == [("dog", 1), ("cat", 2)]
    assert shown("0", "2", "none") == [("0", 1), ("dog", 1), ("none", 0)]  # a name goes before a number
    for word in ("4", "-1", "bird", "٣"):
        with pytest.raises(PreviewError, match="no class of"):
            shown(word)
    for settings in ({"images": 0}, {"groups": -1}, {"side": 0}, {"classes": ("cat",), "by": "shard"}, {"images": 5_001, "by": "random"}):
        with pytest.raises(PreviewError, match="would work"):
            sheet(path, **settings)  # type: ignore[arg-type]


# -- What they look like ----------------------------------------------------------------------------------------------------------------


def test_every_tile_is_its_sample(packed: Dataset) -> None:
    found = sheet(packed.path, by="shard", groups=5, images=5)
    assert sorted(tile.sample for _, tile in tiles(found)) == list(range(23))
    for _, tile in tiles(found):
        data = packed.read(tile.sample)
        labels, _ = packed.labels(np.array([tile.sample]))
        assert (tile.key, tile.shard, tile.bytes) == (packed.key(tile.sample), packed.shard_of(tile.sample), len(data))
        assert [label for label, _, _ in tile.labels] == labels[0][labels[0] >= 0].tolist()
        assert (tile.width, tile.height) == Image.open(io.BytesIO(data)).size == (12, 9)
        assert tile.damage is None
        assert tile.thumbnail is not None
        assert tile.thumbnail.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
        kind, encoded = preview.encoded(tile.thumbnail)
        assert kind == "png"
        assert Image.open(io.BytesIO(encoded)).tobytes() == tile.thumbnail.tobytes()


def test_large_images_are_made_small(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [make_image(0, size=(400, 100))], "label": [0]}), tmp_path / "t.parquet")
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out")
    ((_, tile),) = tiles(sheet(dataset.path, side=100))
    assert tile.thumbnail is not None
    assert (tile.width, tile.height, tile.thumbnail.size) == (400, 100, (100, 25))
    assert preview.encoded(tile.thumbnail)[0] == "jpeg"


def damaged_dataset(folder: Path) -> Dataset:
    """20 samples in four shards: one with a flipped bit, one shard cut off, one gone, and one image that never decoded."""
    garbage = bytearray(make_image(7, size=(40, 40)))
    garbage[len(garbage) // 2 : -20] = b"\xff\xc0" * ((len(garbage) - len(garbage) // 2 - 20) // 2)
    images = [make_image(number) for number in range(19)] + [bytes(garbage)]
    pq.write_table(pa.table({"image": images, "label": [number % 2 for number in range(20)]}), folder / "t.parquet")
    (folder / "names.txt").write_text(f"{HOSTILE[0]}\n{HOSTILE[1]}\n")
    settings = {"samples_per_shard": 5, "shuffle_seed": None, "check_images": "header", "class_names": str(folder / "names.txt")}
    (packed,) = pack(PackConfig((str(folder / "t.parquet"),), str(folder / "out"), **settings))  # type: ignore[arg-type]
    dataset = Dataset.open(packed.path)
    first, second, third, _ = (packed.path / name for name in dataset.shard_names)
    image = first.read_bytes().index(images[2]) + 100
    data = bytearray(first.read_bytes())
    data[image] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:700])
    third.unlink()
    return dataset


def test_damaged_samples_are_marked_and_the_others_shown(tmp_path: Path) -> None:
    dataset = damaged_dataset(tmp_path)
    found = sheet(dataset.path, by="random", images=20)
    damage = {tile.sample: tile.damage for _, tile in tiles(found) if tile.damage is not None}
    assert set(damage) == {2, *range(5, 15), 19}
    assert "xxh3_64" in str(damage[2])
    assert "FileNotFoundError" in str(damage[12])
    assert all(tile.key == dataset.key(tile.sample) for _, tile in tiles(found))
    drawn = data_pages.preview_page(found)
    assert drawn.count('class="tile damaged"') == 12
    assert drawn.count("<img ") == 8
    console = Console(file=io.StringIO(), width=200)
    print_preview(found, console)
    assert console.file.getvalue().count("damaged: ") == 12  # type: ignore[attr-defined]


def test_damaged_tables_beside_sound_images_are_no_obstacle(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Dataset, sample: int) -> None:
        raise OSError("broken table")

    monkeypatch.setattr(Dataset, "row", fails)
    for _, tile in tiles(sheet(packed.path)):
        assert tile.thumbnail is not None
        assert (tile.key, tile.width, tile.height) == ("? (broken table)", 12, 9)


# -- The command ------------------------------------------------------------------------------------------------------------------------


def test_the_command_tells_what_was_picked(packed: Dataset, tmp_path: Path) -> None:
    words = [VITSCALE, "data", "preview", packed.path, "--class", "cat", "eel", "--images", "2"]
    told = subprocess.run([*words, "--json", "--html", tmp_path / "sheet.html"], capture_output=True, text=True, check=True)
    found = sheet(packed.path, classes=("cat", "eel"), images=2)
    assert json.loads(told.stdout) == json.loads(json.dumps(as_json(found)))
    assert [group["title"] for group in json.loads(told.stdout)["groups"]] == ["cat", "eel"]
    assert (tmp_path / "sheet.html").read_text() == data_pages.preview_page(found)
    table = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "▀" not in table.stdout
    assert "\x1b" not in table.stdout
    assert all(tile.key in table.stdout for _, tile in tiles(found))
    wrong = subprocess.run([VITSCALE, "data", "preview", packed.path, "--class", "bird"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: 'bird' is no class of")


def test_a_terminal_gets_pictures_and_no_escapes_of_the_dataset(tmp_path: Path) -> None:
    names = ["a\x1b]0;owned\x07b", "[red]markup[/red]"]
    path = write_dataset(tmp_path / "train", labels=[[0, 1], [1]], shard_sizes=[2], num_classes=2, class_names=names)
    console = Console(file=io.StringIO(), width=160)
    print_preview(sheet(path), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]markup[/red]" in shown
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100)
    console.print(half_blocks(picture))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)", drawn)
    shown = np.array([cell[:6] for cell in cells], np.uint8).reshape(8, 16, 2, 3)
    assert np.array_equal(shown.transpose(0, 2, 1, 3).reshape(16, 16, 3), pixels)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=160)
    print_preview(sheet(damaged_dataset(tmp_path).path), console)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert drawn.count("▀") > 100
    assert "damaged: " in drawn


# -- The page ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_chromium()
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_page_shows_every_tile_and_asks_for_nothing(tab: Browser, tmp_path: Path) -> None:
    dataset = damaged_dataset(tmp_path)
    found = sheet(dataset.path)
    file = tmp_path / "sheet.html"
    file.write_text(data_pages.preview_page(found))
    tab.open(file, 1280)
    assert tab.value("document.querySelectorAll('.tile').length") == len(list(tiles(found))) == 20
    pictures = tab.value("[...document.images].map(one => [one.complete, one.naturalWidth, one.naturalHeight, one.alt])")
    sound = [tile for _, tile in tiles(found) if tile.thumbnail is not None]
    assert [picture[:3] for picture in pictures] == [[True, *tile.thumbnail.size] for tile in sound if tile.thumbnail is not None]
    for tile, (_, _, _, alt) in zip(sound, pictures, strict=True):
        assert alt == f"sample {tile.sample}: {', '.join(page.printable(label) for _, label, _ in tile.labels)}"
    assert tab.value("document.querySelectorAll('script,iframe,link').length") == 0
    shown = tab.value("document.body.innerText")
    for _, tile in tiles(found):
        assert tile.key in shown
        assert tile.damage is None or page.printable(tile.damage) in shown
    assert tab.value("document.title").startswith("vitscale data preview")
    assert_quiet(tab, file)
    assert_fits(tab, file)


def test_names_of_any_kind_fit_in(tab: Browser, tmp_path: Path) -> None:
    labels = [list(range(40))] + [[number % 40] for number in range(30)]
    names = list(itertools.islice(itertools.cycle(HOSTILE), 40))
    parts = {"labels": labels, "shard_sizes": [31], "num_classes": 40, "class_names": [f"{n} {name}" for n, name in enumerate(names)]}
    file = tmp_path / "sheet.html"
    file.write_text(data_pages.preview_page(sheet(write_dataset(tmp_path / "train", **parts))))  # type: ignore[arg-type]
    assert_fits(tab, file)
    assert "and 32 more" in tab.value("document.body.innerText")
    assert_quiet(tab, file)
