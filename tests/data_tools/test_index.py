"""Tars that others made become a dataset where they lie: what their readers see, checked, and not a byte of them changed."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds
import xxhash

import data_tools.index as index_module
from data_tools.config import IndexConfig, PackError
from data_tools.dataset import Dataset
from data_tools.index import index
from data_tools.members import TarError
from data_tools.verify import verify

from .conftest import contents, make_image, tree, write_files
from .test_durable import killed_everywhere


def bad_labels() -> list[bytes]:
    """Labels and scores that are none, each for a sample of its own."""
    texts = [
        '{"labels": ["\\ud800"]}',
        '{"labels": [1, "x"]}',
        '{"labels": [-1]}',
        '{"labels": [true]}',
        '{"labels": [1.5]}',
        "[1]",
        "null",
        "{",
    ]
    texts += [
        '{"labels": [1], "scores": [NaN]}',
        '{"labels": [1], "scores": [1e999]}',
        '{"labels": [1], "scores": ["high"]}',
        '{"labels": {}}',
    ]
    texts += [
        '{"labels": [1], "scores": [1, 2]}',
        '{"labels": ' + "[" * 20_000 + "]" * 20_000 + "}",
        '{"labels": [99999999999999999999]}',
        "\xff",
    ]
    return [text.encode("latin-1") for text in texts]


def write_tar(path: Path, members: list[tuple[str, bytes | None]], kind: int = tarfile.USTAR_FORMAT, **info: Any) -> Path:
    """A tar with these members; None is a directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            member.type = tarfile.REGTYPE if data is not None else tarfile.DIRTYPE
            for field, value in info.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data or b""))
    return path


def sample(number: int, key: str | None = None, **members: bytes) -> list[tuple[str, bytes | None]]:
    """The members of a good sample, in some order."""
    key = key or f"{number:05d}"
    found: list[tuple[str, bytes | None]] = [(f"{key}.jpg", make_image(number)), (f"{key}.cls", str(number % 3).encode())]
    found += [(f"{key}.{suffix}", data) for suffix, data in members.items()]
    random.Random(number).shuffle(found)
    return found


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Tars of all kinds, nested, with what is not a sample among them."""
    folder = tmp_path / "foreign"
    long = "a" * 60 + "/" + "b" * 90
    write_tar(folder / "a.tar", [("dir", None), *sample(0, txt=b"a caption"), ("dir/sub", None), *sample(1, "dir/sub/one")])
    write_tar(folder / "b/pax.tar", [*sample(2, long), *sample(3, "käse/gut")], tarfile.PAX_FORMAT, mtime=1.5, pax_headers={"x": "y" * 700})
    write_tar(folder / "b/gnu.tar", [*sample(4, long + "c" * 30), *sample(5)], tarfile.GNU_FORMAT, uid=2**40)
    write_tar(folder / "b/empty.tar", [])
    bad = [("x.jpg", make_image(6)[:-40]), ("x.cls", b"1"), ("y.txt", b"no image"), ("y.cls", b"1"), ("z.jpg", make_image(7))]
    write_tar(folder / "c.tar", [*sample(8), *bad, ("w.jpg", make_image(9)), ("w.json", b"{"), *sample(10), *sample(0)])
    return folder


def streamed(tars: list[Path]) -> dict[str, tuple[bytes, list[int]]]:
    """What webdataset reads of them; of a key that is there twice, the last one."""
    found = {}
    for row in wds.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False):
        if "jpg" in row and "cls" in row:
            found[row["__key__"]] = (row["jpg"], [int(row["cls"])])
    return found


@pytest.mark.parametrize("jobs", [1, 2])
def test_tars_of_all_kinds_become_a_dataset(foreign: Path, jobs: int) -> None:
    before = tree(foreign)
    result = index(IndexConfig((str(foreign),), jobs=jobs))
    assert {name: data for name, data in tree(foreign).items() if name in before} == before
    new = {"dataset.json", "manifest.parquet", "index.arrow", "rejects.parquet", "samples/000.parquet"}
    assert tree(foreign).keys() - before.keys() == new
    dataset = Dataset.open(foreign, check_index=True)
    assert (result.samples, result.shards, result.rejects, result.classes) == (9, 5, 4, 3)
    assert dataset.shard_names == ("a.tar", "b/empty.tar", "b/gnu.tar", "b/pax.tar", "c.tar")
    theirs = streamed([foreign / name for name in dataset.shard_names])
    ours = contents(dataset)
    images = {image: labels for image, labels, _ in ours.values()}
    assert images == {image: labels for key, (image, labels) in theirs.items() if key != "x"}
    assert {"dir_sub_one", "00005", "00008", "00010"} <= ours.keys()
    assert sum(key.startswith("00000-") for key in ours) == 2, "a key that is in two tars"
    rejects = {row["key"]: row for row in pq.read_table(foreign / "rejects.parquet").to_pylist()}
    assert {key: row["reason"] for key, row in rejects.items()} == {"x": "damaged", "y": "missing", "z": "no label", "w": "no label"}
    assert rejects["x"]["source"] == "c.tar#1"
    assert "damaged label" in rejects["w"]["detail"]
    assert verify(foreign, decode=True).problems == ()


def test_names_as_labels_several_of_them_and_scores(tmp_path: Path) -> None:
    rows = {"a": {"tags": ["cat", "dog"], "sure": [0.5, 0.25]}, "b": {"tags": "eel"}, "c": {"tags": []}}
    members: list[tuple[str, bytes | None]] = []
    for key, row in rows.items():
        members += [(f"{key}.png", make_image(1, "PNG")), (f"{key}.json", json.dumps(row).encode())]
    write_tar(tmp_path / "t/t.tar", members)
    settings: dict[str, Any] = {"label_column": "tags", "score_column": "sure"}
    index(IndexConfig((str(tmp_path / "t"),), **settings))
    dataset = Dataset.open(tmp_path / "t")
    assert dataset.class_names == ("cat", "dog", "eel")
    assert {key: rest for key, (_, *rest) in contents(dataset).items()} == {"a": [[0, 1], [0.5, 0.25]], "b": [[2], [1.0]], "c": [[], []]}
    names = write_files(tmp_path, {"names": b"eel\ndog\ncat\nfox\n"}) / "names"
    index(IndexConfig((str(tmp_path / "t"),), out=str(tmp_path / "other"), class_names=str(names), **settings))
    other = Dataset.open(tmp_path / "other")
    assert (other.class_names, other.shard_names) == (("eel", "dog", "cat", "fox"), ("../t/t.tar",))
    assert contents(other)["a"][1] == [2, 1]
    assert verify(tmp_path / "other").problems == ()
    shutil.copytree(tmp_path / "t", tmp_path / "moved/t")
    shutil.copytree(tmp_path / "other", tmp_path / "moved/other")
    assert contents(Dataset.open(tmp_path / "moved/other", check_index=True)) == contents(other)


def test_labels_that_are_none_cost_their_sample_alone(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | None]] = []
    for number, told in enumerate(bad_labels()):
        members += [(f"{number}.jpg", make_image(number)), (f"{number}.json", told)]
    write_tar(tmp_path / "t/t.tar", [*members, *sample(0, "good")])
    result = index(IndexConfig((str(tmp_path / "t"),)))
    assert (result.samples, result.reasons) == (1, {"no label": len(bad_labels())})
    assert list(contents(Dataset.open(tmp_path / "t"))) == ["good"]


def test_a_folder_of_splits_is_not_made_one_dataset(packed: Dataset) -> None:
    with pytest.raises(PackError, match=r"holds a dataset, train, with tars of its own; give the folder of one"):
        index(IndexConfig((str(packed.path.parent),)))


def test_a_packed_dataset_s_tars_give_its_index(packed: Dataset, tmp_path: Path) -> None:
    shutil.copytree(packed.path / "shards", tmp_path / "tars")
    index(IndexConfig((str(tmp_path / "tars"),), class_names=str(packed.path / "classes.txt"), jobs=1))
    again = Dataset.open(tmp_path / "tars")
    assert contents(again) == contents(packed)
    assert (tmp_path / "tars/index.arrow").read_bytes() == (packed.path / "index.arrow").read_bytes()
    assert [Path(name).name for name in again.shard_names] == [Path(name).name for name in packed.shard_names]


def test_a_size_that_needs_base_256_and_gnu_tar_s_own_headers(tmp_path: Path) -> None:
    write_files(tmp_path / "src", {"b.cls": b"2", "b.jpg": make_image(1), "d" * 99 + ".jpg": make_image(2), "d" * 99 + ".cls": b"1"})
    files = sorted(path.name for path in (tmp_path / "src").iterdir())
    (tmp_path / "t").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "src", "-cf", tmp_path / "t/t.tar", *files], check=True)
    data = bytearray((tmp_path / "t/t.tar").read_bytes())
    with tarfile.open(tmp_path / "t/t.tar") as tar:
        member = tar.getmember("b.jpg")
    at = member.offset
    data[at + 124 : at + 136] = b"\x80" + member.size.to_bytes(11)
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "t/t.tar").write_bytes(data)
    index(IndexConfig((str(tmp_path / "t"),)))
    assert list(contents(Dataset.open(tmp_path / "t")).values()) == [(make_image(1), [2], [1.0]), (make_image(2), [1], [1.0])]


def test_an_index_that_is_there_is_left_alone(foreign: Path) -> None:
    config = IndexConfig((str(foreign),))
    result = index(config)
    before = {path: path.stat().st_mtime_ns for path in foreign.rglob("*")}
    assert index(config) == result
    assert {path: path.stat().st_mtime_ns for path in foreign.rglob("*")} == before
    for changed, said in ((IndexConfig((str(foreign),), max_pixels=9), "max_pixels"), (IndexConfig((str(foreign),), split="val"), "split")):
        with pytest.raises(PackError, match=f"is a dataset already, of something else \\({said}"):
            index(changed)
    write_tar(foreign / "b/more.tar", sample(77))
    with pytest.raises(PackError, match=r"b/more.tar: not there -> \d+ bytes"):
        index(config)


REFUSED = {
    "is compressed, and nothing can be read from its middle; unpack it first": {"t/a.tar.gz": gzip.compress(b"")},
    r"a.tar is compressed \(gzip\)": {"t/a.tar": gzip.compress(bytes(10240))},
    r"there is no .tar in": {"t/a.txt": b""},
    r"a.tar cannot be read: empty file": {"t/a.tar": b""},
    r"classes.txt exists and is not overwritten; `--out DIR`": {"t/a.tar": bytes(1024), "t/classes.txt": b"mine"},
    r"no images in": {"t/a.tar": bytes(1024)},
}


def test_tars_in_object_storage_are_refused_by_their_name() -> None:
    with pytest.raises(
        PackError, match=r"^s3://bucket/tars is not indexed where it is; copy it to a disk, or `vitscale pack` it from there"
    ):
        index(IndexConfig(("s3://bucket/tars",)))


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_tar_is_refused_in_a_line(tmp_path: Path, said: str) -> None:
    folder = write_files(tmp_path, REFUSED[said]) / "t"
    before = tree(folder)
    with pytest.raises((PackError, TarError), match=said) as error:
        index(IndexConfig((str(folder),)))
    assert "\n" not in str(error.value)
    assert {name: data for name, data in tree(folder).items() if ".indexing" not in name} == before


def test_sparse_files_and_damaged_headers_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.seek(2**20)
        file.write(b"end")
    (tmp_path / "t").mkdir()
    for number, kind in enumerate(("gnu", "posix")):
        tar = tmp_path / f"t/{number}.tar"
        subprocess.run(["tar", "-C", tmp_path, "--sparse", f"--format={kind}", "-cf", tar, "hole.jpg"], check=True)
        with pytest.raises(TarError, match=r"holds a sparse file, 'hole.jpg'"):
            index(IndexConfig((str(tar),), out=str(tmp_path / f"out-{number}")))
    whole = write_tar(tmp_path / "h/a.tar", [*sample(1), *sample(2)]).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 4
    cut = [whole[: headers[2] + 100], whole[: headers[1] + 600], whole[: headers[3] + 512]]
    back = whole[: headers[1] + 124] + b"\xff" * 12 + whole[headers[1] + 136 :]
    flipped = [whole[: at + 5] + b"\xff" + whole[at + 6 :] for at in headers]
    huge = whole[: headers[1] + 124] + b"77777777777\0" + whole[headers[1] + 136 :]
    for data in (*cut, *flipped, *map(with_checksums, (back, huge))):
        (tmp_path / "h/a.tar").write_bytes(data)
        with pytest.raises(TarError, match=r"a.tar cannot be read: .*; write it again or leave it out"):
            index(IndexConfig((str(tmp_path / "h"),)))
    (tmp_path / "h/a.tar").write_bytes(whole)
    assert index(IndexConfig((str(tmp_path / "h"),))).samples == 2


def with_checksums(data: bytes) -> bytes:
    """The tar with the checksum of every header made right."""
    mended = bytearray(data)
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            mended[at + 148 : at + 156] = b" " * 8
            mended[at + 148 : at + 156] = b"%06o\0 " % sum(mended[at : at + 512])
    return bytes(mended)


def test_damaged_tars_never_give_a_wrong_image_nor_a_crash(tmp_path: Path) -> None:
    """Bits flipped all over: refused, or indexed with the damaged sample left out."""
    whole = write_tar(tmp_path / "t/a.tar", [*sample(1), *sample(2), *sample(4)], tarfile.PAX_FORMAT, pax_headers={"a": "b"}).read_bytes()
    rng = random.Random(3)
    ends: dict[str, int] = {}
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "t/a.tar").write_bytes(with_checksums(bytes(data)) if rng.random() < 0.5 else data)
        try:
            result = index(IndexConfig((str(tmp_path / "t"),), jobs=1))
            rows = list(wds.WebDataset([str(tmp_path / "t/a.tar")], shardshuffle=False))
            assert len(rows) == result.samples + result.rejects, "none is lost without a word"
            assert {image for image, _, _ in contents(Dataset.open(tmp_path / "t")).values()} <= {row.get("jpg") for row in rows}
            end = "indexed"
        except (TarError, PackError) as error:
            end = type(error).__name__ if len(str(error).splitlines()) == 1 else "many lines"
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(tmp_path / "t")
        (tmp_path / "t").mkdir()
    assert min(ends.get("indexed", 0), ends.get("TarError", 0)) > 10, ends
    assert "many lines" not in ends


def test_a_tar_that_changes_is_refused(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = IndexConfig((str(foreign),), jobs=1)

    def touch(done: int, total: int) -> None:
        if 0 < done < total:
            os.utime(foreign / "c.tar", (1, 1))

    with pytest.raises(PackError, match=r"c.tar was changed while it was indexed"):
        index(config, touch)
    os.utime(foreign / "a.tar", (1, 1))
    with pytest.raises(PackError, match=r"a.tar was changed since it was read; restore it to go on, or remove .*/.indexing to start anew"):
        index(config)
    shutil.rmtree(foreign / ".indexing")
    assert index(config).samples == 9


def test_a_damaged_tar_costs_no_scan_of_the_others(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (foreign / "c.tar").read_bytes()
    (foreign / "c.tar").write_bytes(whole[:3000])
    with pytest.raises(TarError, match=r"c.tar cannot be read"):
        index(IndexConfig((str(foreign),), jobs=1))
    (foreign / "c.tar").write_bytes(whole)
    scanned = []
    scan = index_module.scan_tar
    monkeypatch.setattr(index_module, "scan_tar", lambda file, name, *rest: scanned.append(name) or scan(file, name, *rest))
    assert index(IndexConfig((str(foreign),), jobs=1)).samples == 9
    assert scanned == [str(foreign / "c.tar")]


def test_killed_at_each_touch_of_the_disk_it_ends_in_the_same_bytes(foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "whole")
    index(IndexConfig((str(tmp_path / "whole"),), name="x", jobs=1))
    whole = tree(tmp_path / "whole")
    config = IndexConfig((str(foreign),), name="x", jobs=1)
    before = tree(foreign)
    touches = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")]
    moments = 0
    for _ in killed_everywhere(lambda: index(config), touches):
        index(config)
        assert tree(foreign) == whole
        for name in whole.keys() - before.keys():
            (foreign / name).unlink()
        (foreign / "samples").rmdir()
        moments += 1
    assert moments > 20


def test_what_was_scanned_is_not_scanned_again(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are settled after the scans, so that an error in them costs no second pass."""
    scanned = []
    scan = index_module.scan_tar
    monkeypatch.setattr(index_module, "scan_tar", lambda file, name, *rest: scanned.append(name) or scan(file, name, *rest))
    with pytest.raises(PackError, match=r"label 2 of b/pax.tar#0 is not in 0..1|label 2 of"):
        index(IndexConfig((str(foreign),), num_classes=2, jobs=1))
    assert index(IndexConfig((str(foreign),), num_classes=4, jobs=1)).classes == 4
    assert len(scanned) == 5


class Dribble:
    """A stream as a network gives one: `read` and nothing else, and less than was asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + min(size, 700)]
        self._at += len(piece)
        return piece


def test_a_tar_may_come_from_anything_that_reads(foreign: Path) -> None:
    config = IndexConfig((str(foreign),))
    for tar in sorted(foreign.rglob("*.tar")):
        data = tar.read_bytes()
        with tar.open("rb") as file:
            wanted = index_module.scan_tar(file, "x.tar", len(data), config)
        found = index_module.scan_tar(Dribble(data), "x.tar", len(data), config)  # type: ignore[arg-type]
        assert found.equals(wanted, check_metadata=True)
        assert wanted.schema.metadata[b"checksum"].decode() == xxhash.xxh3_128_hexdigest(data)
        for other in (data[:-1], data + b"x"):
            with pytest.raises(TarError, match=r"x.tar has (become shorter|changed its length) while it was read|x.tar cannot be read"):
                index_module.scan_tar(Dribble(other), "x.tar", len(data), config)  # type: ignore[arg-type]
