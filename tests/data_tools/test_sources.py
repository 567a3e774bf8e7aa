"""Text tables and tars give the dataset that a Parquet table of the same samples gives."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.pack import pack

from .conftest import contents, make_image, pack_one, write_files

PATHS = [f"photos/{i:03d}.jpg" for i in range(25)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A text table in the way of its suffix."""
    with file.open("w", newline="") as opened:
        if file.suffix == ".jsonl":
            opened.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path, {path: make_image(i) for i, path in enumerate(PATHS)})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("label", ["names", "numbers"])
def test_a_text_table_is_a_table(files: Path, suffix: str, label: str) -> None:
    rows = [{"path": path, "label": f"c, {i % 3}" if label == "names" else i % 3, "id": f"{i:04d}"} for i, path in enumerate(PATHS)]
    pq.write_table(pa.Table.from_pylist(rows), files / "t.parquet")
    expected = pack_one(files / "t.parquet", out=files / "expected")
    found = pack_one(write_rows(files / f"t{suffix}", rows), out=files / "found")
    assert contents(found) == contents(expected)
    assert sorted(contents(found)) == [f"{i:04d}" for i in range(25)], "ids stay text, zeros in front and all"
    assert found.class_names == expected.class_names


def test_several_labels_and_scores_in_jsonl(files: Path) -> None:
    rows = [{"path": path, "labels": [i % 5, 5], "scores": [0.5, 0.25]} for i, path in enumerate(PATHS)]
    found = contents(pack_one(write_rows(files / "t.jsonl", rows), out=files / "out"))
    assert found["photos_007"] == (make_image(7), [2, 5], [0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "text"), [("t.csv", "path,label\na.jpg,0\nb.jpg\n"), ("t.jsonl", '{"path": "a.jpg", "label": 0}\n{"path": \n')]
)
def test_a_damaged_text_table_is_refused_in_a_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PackError, match=rf"{name} cannot be read: .*; write it again or leave it out") as error:
        pack_one(tmp_path / name, out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nulls_in_a_dictionary_are_nulls(tmp_path: Path) -> None:
    for values in ([1, None], ["a", None]):
        labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(values))
        table = pa.table({"image": [make_image(i) for i in range(3)], "label": labels})
        with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(PackError, match=r"(is|has) null"):
            pack_one(tmp_path / "t.arrow", out=tmp_path / "out")


def test_a_table_without_rows_is_no_hindrance(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 0), ("c", 2)):
        table = pa.table(
            {"image": pa.array([make_image(i) for i in range(count)], pa.binary()), "label": pa.array([0] * count, pa.int64())}
        )
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert pack_one(*(tmp_path / f"{name}.parquet" for name in "abc"), out=tmp_path / "out").num_samples == 5


def test_names_that_print_alike_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "src/cat").mkdir(parents=True)
    for number, name in enumerate((b"a\xff.jpg", b"a\\xff.jpg")):
        (tmp_path / "src/cat" / os.fsdecode(name)).write_bytes(make_image(number))
    assert pack_one(tmp_path / "src", out=tmp_path / "out").num_samples == 2


# -------------------------------------------------------------------------------------------------------------- tars


def shards_of(dataset: Dataset) -> list[Path]:
    return [dataset.path / name for name in dataset.shard_names]


def test_a_dataset_packed_again_from_its_tars_is_itself(packed: Dataset, tmp_path: Path) -> None:
    """Keys, bytes, labels; the tars too, in the same order and of the same length, one of them or a folder of them."""
    names = str(packed.path / "classes.txt")
    for number, sources in enumerate((shards_of(packed), [packed.path / "shards/000"])):
        again = pack_one(*sources, out=tmp_path / f"again-{number}", samples_per_shard=5, class_names=names)
        assert contents(again) == contents(packed)
        assert [path.read_bytes() for path in shards_of(again)] == [path.read_bytes() for path in shards_of(packed)]


def test_tars_that_webdataset_wrote(tmp_path: Path) -> None:
    """`cls`, names in a json, a sample without an image, and metadata that is no sample."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(6):
            sink.write({"__key__": f"dir/{i}", "png": make_image(i, "PNG"), "cls": i % 3})
    with webdataset.TarWriter(str(tmp_path / "b.tar")) as sink:
        sink.write({"__key__": "x", "JPG": make_image(9), "json": {"label": 2}})
        sink.write({"__key__": "y", "txt": "no image", "json": {"labels": [0, 1], "scores": [0.5, 1]}})
        sink.write({"__key__": "z", "jpeg": make_image(10), "json": {"labels": []}})
    (result,) = pack(PackConfig((str(tmp_path / "a.tar"), str(tmp_path / "b.tar")), str(tmp_path / "out")))
    assert (result.samples, result.reasons, result.classes) == (8, {"missing": 1}, 3)
    found = contents(Dataset.open(result.path))
    assert found["dir_4"] == (make_image(4, "PNG"), [1], [1.0])
    assert found["x"] == (make_image(9), [2], [1.0])
    assert found["z"] == (make_image(10), [], [])


def test_tars_that_share_keys_are_merged(packed: Dataset, tmp_path: Path) -> None:
    copies = write_files(tmp_path / "copies", {f"{name}.tar": shards_of(packed)[0].read_bytes() for name in "ab"})
    merged = contents(pack_one(copies, out=tmp_path / "merged"))
    assert len(merged) == 2 * int(packed.shard_sizes[0])
    assert sorted(image for image, _, _ in merged.values()) == sorted(2 * [packed.read(i) for i in range(int(packed.shard_sizes[0]))])


def test_a_damaged_tar_is_refused_and_not_cut_short(packed: Dataset, tmp_path: Path) -> None:
    """tarfile, and webdataset with it, take a header whose checksum is wrong for the end of the tar."""
    whole = shards_of(packed)[0].read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 10
    for damaged in (*(whole[: at + 5] + b"\xff" + whole[at + 6 :] for at in headers), whole[: headers[4] + 700], whole[: headers[4] + 100]):
        (tmp_path / "t.tar").write_bytes(damaged)
        with pytest.raises(PackError, match=r"t.tar cannot be read: .*; write it again or leave it out"):
            pack_one(tmp_path / "t.tar", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "t.tar").write_bytes(whole.rstrip(b"\0") + bytes(600))
    assert pack_one(tmp_path / "t.tar", out=tmp_path / "out").num_samples == 5


class Bomb:
    """What a pickle may do to who opens it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def test_nothing_in_a_tar_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        members = {"a.pyd": pickle.dumps(Bomb()), "a.jpg": make_image(0), "a.cls": b"0", "../b.jpg": make_image(1), "../b.cls": b"0"}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pack_one(tmp_path / "t.tar", out=tmp_path / "out").num_samples == 2
    assert {path.name for path in tmp_path.iterdir()} == {"t.tar", "out"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.jpg": b"x"}, "sample a of .*t.tar has no label"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "sample a of .*t.tar has a damaged label"),
        ({"a.jpg": b"x", "a.json": b"{"}, "sample a of .*t.tar has a damaged label"),
        ({"a.jpg": b"x", "a.json": b"[1]"}, "has a json that is no object"),
        ({"a.jpg": b"x", "a.json": b'{"label": 1.5}'}, "has labels of float"),
        ({"a.jpg": b"x", "a.json": b'{"labels": [1, "x"]}'}, "has labels of int, str"),
        ({"a.jpg": b"x", "a.json": b'{"label": 99999999999999999999}'}, "no such numbers"),
        ({"a.jpg": b"x", "a.json": b'{"labels": [1], "scores": ["high"]}'}, "no such numbers"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(PackError, match=said) as error:
        pack_one(tmp_path / "t.tar", out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_words_that_look_like_nothing_are_class_names(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{i}.jpg": make_image(i) for i in range(4)})
    (tmp_path / "list.csv").write_text("path,label\n0.jpg,NA\n1.jpg,null\n2.jpg,nan\n3.jpg,N/A\n")
    dataset = pack_one(tmp_path / "list.csv", out=tmp_path / "out")
    assert dataset.class_names == ("N/A", "NA", "nan", "null")
    (tmp_path / "list.csv").write_text("path,label\n0.jpg,NA\n1.jpg,\n")
    with pytest.raises(PackError, match="is null in row 1"):
        pack_one(tmp_path / "list.csv", out=tmp_path / "other")


@pytest.mark.parametrize("sibling", [False, True])
def test_a_number_in_a_table_of_text_is_not_taken_for_another_class(tmp_path: Path, sibling: bool) -> None:
    write_files(tmp_path / "src", {f"{i}.jpg": make_image(i) for i in range(3)})
    how: dict = {"split": "val"}
    if sibling:
        pack_one(write_files(tmp_path / "folders", {f"0{i}/{i}.jpg": make_image(i) for i in range(1, 5)}), out=tmp_path / "out")
    else:
        (tmp_path / "names.txt").write_text("01\n02\n03\n04\n")
        how["class_names"] = str(tmp_path / "names.txt")
    (tmp_path / "src" / "t.csv").write_text("path,label\n0.jpg,00\n1.jpg,02\n2.jpg,03\n")
    with pytest.raises(PackError, match=r"label 2 of .* may be class number 2 or the class named '02'"):
        pack_one(tmp_path / "src" / "t.csv", out=tmp_path / "out", **how)
    (tmp_path / "src" / "t.jsonl").write_text("".join(f'{{"path": "{i}.jpg", "label": "0{i + 1}"}}\n' for i in range(3)))
    dataset = pack_one(tmp_path / "src" / "t.jsonl", out=tmp_path / "out", **how)
    assert {dataset.key(i): int(dataset.labels(np.array([i]))[0][0, 0]) for i in range(3)} == {"0": 0, "1": 1, "2": 2}
