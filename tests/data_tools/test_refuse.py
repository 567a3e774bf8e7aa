"""What cannot be packed is refused in one clear line, and whatever happens nothing half-written is left."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset, DatasetError
from data_tools.pack import pack

from .conftest import make_image, pack_one, tree, write_files

IMAGE = [make_image(0)] * 3
LABELS = [0, 1, 2]

TABLES: dict[str, tuple[dict, dict]] = {
    "label -1 of t.parquet#1 is not in 0..2": ({"image": IMAGE, "label": [0, -1, 2]}, {}),
    "label 5 of t.parquet#2 is not in 0..4 (5 classes, from num_classes)": ({"image": IMAGE, "label": [0, 1, 5]}, {"num_classes": 5}),
    "label 4 of t.parquet#0 is not in 0..3": ({"image": IMAGE, "labels": [[1, 4], [], [0]]}, {"num_classes": 4}),
    "label 'ox' of t.parquet#2 is not one of the 2 class names of": ({"image": IMAGE, "label": ["a", "b", "ox"]}, {"class_names": "a\nb"}),
    "label_column=label of t.parquet is null in row 1": ({"image": IMAGE, "label": [0, None, 1]}, {}),
    "has null inside a list": ({"image": IMAGE, "label": [[0], [None], [1]]}, {}),
    "is double; labels are ints or strings": ({"image": IMAGE, "label": [0.0, 1.0, 2.0]}, {}),
    "no sample has a label": ({"image": IMAGE, "label": pa.array([[], [], []], pa.list_(pa.int32()))}, {}),
    "t.parquet#1 has 2 scores for 1 labels": ({"image": IMAGE, "label": [[0], [1], [2]], "scores": [[1.0], [0.5, 0.5], []]}, {}),
    "score nan of t.parquet#2 is not a finite": ({"image": IMAGE, "label": LABELS, "score": [0.5, None, np.nan]}, {}),
    "score inf of t.parquet#0 is not a finite": ({"image": IMAGE, "label": [[0], [1], [2]], "scores": [[1e39], [1.0], [1.0]]}, {}),
    "score nan of t.parquet#0": ({"image": IMAGE, "label": [[0], [1], [2]], "scores": [[None], [1.0], [1.0]]}, {}),
    "scores are numbers": ({"image": IMAGE, "label": LABELS, "score": ["x", "y", "z"]}, {}),
    "has no column for the image among pixels, label": ({"pixels": IMAGE, "label": LABELS}, {}),
    "has no column for the label among image; give label_column": ({"image": IMAGE}, {}),
    "image_column=nope is not a column of": ({"image": IMAGE, "label": LABELS}, {"image_column": "nope"}),
    "image_column=image of t.parquet is list": ({"image": [[1], [2], [3]], "label": LABELS}, {}),
    "class name '' from": ({"image": IMAGE, "label": LABELS}, {"class_names": "a\n\nb"}),
    "class name 'a' stands twice in": ({"image": IMAGE, "label": LABELS}, {"class_names": "a\nb\na"}),
    "num_classes=4, but": ({"image": IMAGE, "label": LABELS}, {"class_names": "a\nb\nc", "num_classes": 4}),
    "no images in t.parquet": ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}),
    "not in range": ({"image": IMAGE, "label": pa.array([0, 1, 2**64 - 1], pa.uint64())}, {}),
}


@pytest.mark.parametrize("message", TABLES)
def test_tables(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns, settings = TABLES[message]
    if "class_names" in settings:
        Path("names.txt").write_text(settings["class_names"])
        settings = {**settings, "class_names": "names.txt"}
    pq.write_table(pa.table(columns), "t.parquet")
    refuse(message, "t.parquet", **settings)


FOLDERS: dict[str, dict[str, bytes]] = {
    "splits, not classes; run vitscale pack src/train out --split train; vitscale pack src/val": {"train/a/1.jpg": b"", "val/a/1.jpg": b""},
    "src/1.jpg lies in no class folder": {"1.jpg": b"", "a/1.jpg": b""},
    "no images in src": {"a/notes.txt": b""},
    "src holds tables and also a": {"a/1.jpg": b"", "t.parquet": b""},
    "src/t.parquet cannot be read": {"t.parquet": b"not parquet"},
    "src/t.arrow cannot be read": {"t.arrow": b"not arrow at all"},
}


@pytest.mark.parametrize("message", FOLDERS)
def test_folders(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "src", FOLDERS[message])
    refuse(message, "src")


SETTINGS: dict[str, dict] = {
    "split='../x' must be": {"split": "../x"},
    "val_fraction=1 must be": {"val_fraction": 1},
    "val_fraction makes train and val": {"val_fraction": 0.1, "split": "val"},
    "no sample falls into val of 23": {"val_fraction": 1e-9},
    "samples_per_shard=0 must be": {"samples_per_shard": 0},
    "shuffle_seed=-1 must be": {"shuffle_seed": -1},
    "num_classes=0 must be": {"num_classes": 0},
    "max_pixels=0 must be": {"max_pixels": 0},
    "source nope does not exist": {"sources": ("nope",)},
    "names.txt is neither a table nor a tar by its name": {"sources": ("names.txt",)},
    "no source given": {"sources": ()},
    "lies inside the source": {"out": "photos/out"},
    "class_names=nope cannot be read": {"class_names": "nope"},
    "out=names.txt is a file": {"out": "names.txt"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings(message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("a,b")
    before = tree(tmp_path)
    with pytest.raises(PackError, match=re.escape(message)):
        pack(dataclasses.replace(PackConfig(("photos",), "out"), **SETTINGS[message]))
    assert tree(tmp_path) == before


def refuse(message: str, source: str, **settings: object) -> None:
    with pytest.raises(PackError, match=re.escape(message)) as caught:
        pack_one(source, out=Path("out"), **settings)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_names_and_numbers_do_not_mix(tmp_path: Path) -> None:
    for name, labels in (("a", LABELS), ("b", ["x", "y", "z"])):
        pq.write_table(pa.table({"image": IMAGE, "label": labels}), tmp_path / f"{name}.parquet")
    with pytest.raises(PackError, match="numbers as labels and some have names"):
        pack_one(tmp_path / "a.parquet", tmp_path / "b.parquet", out=tmp_path / "out")


def test_splits_share_their_classes(photos: Path, packed: Dataset, tmp_path: Path) -> None:
    out = packed.path.parent
    before = tree(out)
    write_files(tmp_path / "new", {"fox/1.jpg": make_image(0)})
    with pytest.raises(PackError, match=r"label 'fox' of fox/1.jpg is not one of the 3 class names of .*train/classes.txt"):
        pack_one(tmp_path / "new", out=out, split="val")
    names = write_files(tmp_path, {"names.txt": b"fox\ncat\ndog\n"}) / "names.txt"
    with pytest.raises(PackError, match=r"are not those of .*train, and splits of one dataset share them"):
        pack_one(tmp_path / "new", out=out, split="val", class_names=str(names))
    assert tree(out) == before


def test_an_existing_split_is_never_touched(photos: Path, packed: Dataset) -> None:
    before = tree(packed.path.parent)
    for settings in ({}, {"val_fraction": 0.5}):
        with pytest.raises(PackError, match=r"packed/train exists and is (another dataset|not overwritten)"):
            pack_one(photos, out=packed.path.parent, **settings)
    assert tree(packed.path.parent) == before


def test_an_error_in_mid_pack_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, rejects: int) -> None:
        if done == 9:
            raise RuntimeError("in mid-pack")

    for existing in (False, True):
        if existing:
            write_files(tmp_path / "out", {"mine.txt": b"kept"})
        with pytest.raises(RuntimeError, match="in mid-pack"):
            pack(PackConfig((str(photos),), str(tmp_path / "out"), val_fraction=0.3), stop)
        assert (tree(tmp_path / "out") == {"mine.txt": b"kept"}) if existing else not (tmp_path / "out").exists()
        assert len(list((tmp_path / "out").rglob("*"))) == existing


def test_a_split_that_appears_meanwhile_is_kept(photos: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "out", {})

    def other(done: int, total: int, rejects: int) -> None:
        write_files(tmp_path / "out/train", {"theirs": b"kept"})

    with pytest.raises(PackError, match="was it packed meanwhile"):
        pack(PackConfig((str(photos),), str(tmp_path / "out")), other)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["train", "theirs"]


KILLED = """
import os, signal, sys
from data_tools.config import PackConfig
from data_tools.pack import pack

def stop(done, total, rejects):
    if done == 9:
        os.kill(os.getpid(), int(sys.argv[3]))

pack(PackConfig((sys.argv[1],), sys.argv[2], samples_per_shard=4), stop)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_in_mid_pack(number: signal.Signals, photos: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    pq.write_table(pa.table({"image": [make_image(i) for i in range(20)], "label": [0] * 20}), tmp_path / "t.parquet")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "t.parquet"), str(tmp_path / "out"), str(int(number))]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert process.returncode == -number, process.stderr
    (left,) = (tmp_path / "out").iterdir()
    assert left.name == ".packing-train"
    for folder in (tmp_path / "out", left, left / "train/dataset"):
        with pytest.raises(DatasetError, match="is not a dataset"):
            Dataset.open(folder)
    before = {path: path.stat().st_mtime_ns for path in left.rglob("*.tar")}
    assert len(before) == 2, "the shards that were finished"
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out", samples_per_shard=4)
    assert dataset.num_samples == 20
    assert {(dataset.path / path.relative_to(left / "train/dataset")).stat().st_mtime_ns for path in before} == set(before.values())
    assert tree(dataset.path) == tree(pack_one(tmp_path / "t.parquet", out=tmp_path / "whole", samples_per_shard=4).path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_names_do_not_join_a_split_whose_classes_are_numbers(tmp_path: Path) -> None:
    """Twelve of each, but sorted as text `10` is the third name: the same labels would mean other classes."""
    images = [make_image(i) for i in range(12)]
    pq.write_table(pa.table({"image": images, "label": list(range(12))}), tmp_path / "numbers.parquet")
    write_files(tmp_path / "names", {f"{i}/image.jpg": image for i, image in enumerate(images)})
    pack_one(tmp_path / "numbers.parquet", out=tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(PackError, match=r"the classes of the labels found are not those of .*out/train"):
        pack_one(tmp_path / "names", out=tmp_path / "out", split="val")
    assert tree(tmp_path / "out") == before


def test_a_dataset_is_no_place_for_others(packed: Dataset, photos: Path) -> None:
    with pytest.raises(PackError, match=rf"out={packed.path} is a dataset; give the folder above it, {packed.path.parent}"):
        pack(PackConfig((str(photos),), str(packed.path)))
    assert not (packed.path / "train").exists()
