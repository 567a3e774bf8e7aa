"""Shards by bytes: none is larger than asked for, none could take the next sample, and the bytes are those of any other way to pack."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_tools.plan as plan_module
import data_tools.sources as listing_module
from data_tools.config import PackConfig, PackError, parse_bytes
from data_tools.dataset import Dataset
from data_tools.pack import OtherPackError, pack
from data_tools.sizes import shard_ends
from data_tools.sources import table_images

from .conftest import contents, make_image, pack_one, tree, write_files, write_table
from .test_resume import sources


@given(
    sizes=st.lists(st.integers(0, 12), max_size=60),
    pieces=st.lists(st.integers(0, 60), max_size=5),
    most_bytes=st.integers(0, 40),
    most_samples=st.integers(1, 8),
)
def test_ends_are_those_of_filling_one_after_the_other(sizes: list[int], pieces: list[int], most_bytes: int, most_samples: int) -> None:
    expected, held, count = [], 0, 0
    for place, size in enumerate(sizes):
        if count and (held + size > most_bytes or count == most_samples):
            expected.append(place)
            held = count = 0
        held, count = held + size, count + 1
    expected += [len(sizes)] if sizes else []
    cut = np.split(np.array(sizes, np.int64), sorted(min(piece, len(sizes)) for piece in pieces))
    assert shard_ends(cut, most_bytes, most_samples) == expected


def odd_tar(path: Path, images: list[bytes]) -> Path:
    """A tar with all that readers skip: folders, metadata, links, upper case, long names, samples without an image."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mtime = kind, len(data), 0.5  # a float makes an extended header
            tar.addfile(member, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        add("__meta__", b"not a sample's")
        add("__meta__/x.jpg", b"nor this")
        add("no-suffix", b"nor this one")
        for number, image in enumerate(images):
            key = f"folder/{'x' * 120 if number == 3 else ''}{number}"
            add(f"{key}.cls", str(number % 3).encode())
            if number != 2:
                add(f"{key}.{('JPG', 'jpg', 'png')[number % 3]}", image)
            add(f"{key}.seg.jpg", b"a second one")
        add("__last__.jpg", images[0])
        add("__last__.cls", b"1")
    return path


def every_source(folder: Path) -> dict[str, tuple[list[Path], dict]]:
    images = [make_image(i, size=(10 + 7 * (i % 5), 9 + i)) for i in range(32)]
    labels = [[i % 3] * (i % 2) + [4, 5] for i in range(32)]
    scores = [[0.1 * (j + 1) for j in range(len(of))] if i % 4 else [] for i, of in enumerate(labels)]
    files = write_files(folder / "files", {f"{i}.img": image for i, image in enumerate(images)})
    plain = pa.table({"image": images, "labels": labels, "scores": scores})
    structs = [{"bytes": image, "path": "ignored"} if i % 3 else {"bytes": None, "path": f"{i}.img"} for i, image in enumerate(images)]
    structs[9], structs[12] = {"bytes": None, "path": None}, None  # type: ignore[call-overload]
    paths = [f"{i}.img" if i != 5 else "gone.img" for i in range(32)]
    return {
        "folder": ([write_files(folder / "photos", {f"c{i % 3}/{i}.jpg": image for i, image in enumerate(images)})], {}),
        "parquet": ([write_table(plain, folder / "plain", "parquet")], {}),
        "feather": ([write_table(plain, folder / "plain", "feather")], {}),
        "structs": ([write_table(plain.set_column(0, "image", [structs]), folder / "structs", "parquet")], {"image_root": str(files)}),
        "paths": ([write_table(plain.set_column(0, "path", [paths]), folder / "paths", "parquet")], {"image_root": str(files)}),
        "tar": ([odd_tar(folder / "t.tar", images[:30])], {"num_classes": 3}),
        "several": ([folder / "plain.parquet", odd_tar(folder / "u.tar", images[:30])], {"num_classes": 6}),
    }


@pytest.mark.parametrize("kind", ["folder", "parquet", "feather", "structs", "paths", "tar", "several"])
@pytest.mark.parametrize("more", [{}, {"shuffle_seed": None, "write_cls": True}, {"val_fraction": 0.4, "samples_per_shard": 4}], ids=str)
def test_tars_are_as_full_as_they_may_be(kind: str, more: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, settings = every_source(tmp_path)[kind]
    most = 12_000
    config = {"sources": tuple(map(str, of)), "shard_bytes": most, "jobs": 1, **settings, **more}
    results = pack(PackConfig(out=str(tmp_path / "out"), **config))  # type: ignore[arg-type]
    for result in results:
        dataset = Dataset.open(result.path, check_index=True)
        tars = [dataset.path / name for name in dataset.shard_names]
        assert len(tars) > 2
        for tar, after in zip(tars, [*tars[1:], None], strict=True):
            with tarfile.open(tar) as opened:
                keys = {member.name.partition(".")[0] for member in opened}
            assert tar.stat().st_size <= most or len(keys) == 1
            assert len(keys) <= more.get("samples_per_shard", 100)
            if after is None or kind in ("structs", "paths", "tar", "several"):  # where some are left out, which had been given room
                continue
            with tarfile.open(after) as opened:
                members = opened.getmembers()
            first = [member for member in members if member.name.partition(".")[0] == members[0].name.partition(".")[0]]
            taken = sum(512 + -(-member.size // 512) * 512 for member in first)
            assert tar.stat().st_size + taken > most or len(keys) == more.get("samples_per_shard"), "the next sample had found room"
        assert bool(result.rejects) <= (kind in ("structs", "paths", "tar", "several"))
    for rows in (1, 7):  # whatever the stretches in which listing and plan are held
        monkeypatch.setattr(listing_module, "ROWS", rows)
        monkeypatch.setattr(plan_module, "ROWS", rows)
        pack(PackConfig(out=str(tmp_path / f"rows-{rows}"), **config))  # type: ignore[arg-type]
        assert tree(tmp_path / f"rows-{rows}") == tree(tmp_path / "out")


def test_the_sizes_of_a_tars_samples_are_those_of_its_images(tmp_path: Path) -> None:
    from data_tools.sizes import _cell_sizes

    origin = listing_module.Origin("", tmp_path, odd_tar(tmp_path / "t.tar", [make_image(i) for i in range(9)]))
    assert list(_cell_sizes(origin)) == [len(image) if isinstance(image, bytes) else 0 for image in table_images(origin, 4)]


def test_long_labels_are_planned_as_they_are_written(tmp_path: Path) -> None:
    """JSON of more than a block, with scores of many digits."""
    labels = [list(range(1000, 1000 + 9 * i)) for i in range(12)]
    scores = [[float(np.float32(0.1 + j / 7)) for j in range(len(of))] for of in labels]
    pq.write_table(pa.table({"image": [make_image(i) for i in range(12)], "labels": labels, "scores": scores}), tmp_path / "t.parquet")
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "whole", shuffle_seed=None)
    (whole,) = dataset.shard_bytes.tolist()
    assert len(pack_one(tmp_path / "t.parquet", out=tmp_path / "fits", shuffle_seed=None, shard_bytes=whole).shard_names) == 1
    assert len(pack_one(tmp_path / "t.parquet", out=tmp_path / "two", shuffle_seed=None, shard_bytes=whole - 1).shard_names) == 2


@pytest.mark.parametrize("kind", ["folder", "tables", "both"])
def test_processes_and_shares_give_the_bytes_of_one(tmp_path: Path, kind: str) -> None:
    config = {"sources": sources(tmp_path)[kind], "shard_bytes": 20_000, "val_fraction": 0.3}
    first = pack(PackConfig(out=str(tmp_path / "one"), jobs=1, **config))  # type: ignore[arg-type]
    pack(PackConfig(out=str(tmp_path / "jobs"), jobs=2, **config))  # type: ignore[arg-type]
    assert tree(tmp_path / "jobs") == tree(tmp_path / "one")
    for number in (2, 0, 1):
        pack(PackConfig(out=str(tmp_path / "shares"), jobs=1, task=f"{number}/3", **config))  # type: ignore[arg-type]
    pack(PackConfig(out=str(tmp_path / "shares"), jobs=1, **config))  # type: ignore[arg-type]
    assert tree(tmp_path / "shares") == tree(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    assert pack(PackConfig(out=str(tmp_path / "one"), jobs=1, **config)) == first, "a finished one is left alone"  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == before


def test_sizes_that_change_the_plan_are_refused_and_others_are_not(tmp_path: Path) -> None:
    of = sources(tmp_path)["folder"]
    config = {"sources": of, "out": str(tmp_path / "out"), "shard_bytes": 20_000}
    assert pack(PackConfig(task="0/2", **config)) == ()  # type: ignore[arg-type]
    image = tmp_path / "photos/class-1/01.jpg"
    data = image.read_bytes()
    image.write_bytes(data + bytes(-len(data) % 512))  # fills its last block
    assert pack(PackConfig(task="1/2", **config)) == ()  # type: ignore[arg-type]
    image.write_bytes(data + bytes(15_000))
    for task in ("1/2", None):
        with pytest.raises(OtherPackError, match=r"the sources are not those .* was begun with .*listing: .*shards: \d+ -> \d+"):
            pack(PackConfig(task=task, **config))  # type: ignore[arg-type]
    image.write_bytes(data)
    pack(PackConfig(**config))  # type: ignore[arg-type]
    image.write_bytes(data + bytes(15_000))
    with pytest.raises(PackError, match="the sources list other samples than it was packed from"):
        pack(PackConfig(**config))  # type: ignore[arg-type]


def test_what_vanishes_counts_nothing_and_is_a_reject(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg", "gone.jpg", "nul\0", None, "."], "label": [0] * 5}), tmp_path / "t.parquet")
    write_files(tmp_path, {"a.jpg": make_image(0)})
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out", shard_bytes=2 * 512 + 4 * 1024, shuffle_seed=None)
    assert list(contents(dataset)) == ["a"]
    assert pq.read_table(dataset.path / "rejects.parquet")["reason"].to_pylist() == ["missing"] * 4


def test_without_samples_per_shard_only_bytes_count(tmp_path: Path) -> None:
    assert PackConfig(("a",), "b").shard_samples == 10_000
    assert PackConfig(("a",), "b", shard_bytes=1).shard_samples is None
    assert PackConfig(("a",), "b", shard_bytes=1, samples_per_shard=3).shard_samples == 3
    with pytest.raises(PackError, match="shard_bytes=0 must be at least 1; 1GB is usual"):
        pack(PackConfig(("a",), "b", shard_bytes=0))


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("500MB", 500_000_000), ("1GB", 10**9), ("1.5 GiB", 3 * 2**29), ("64mib", 2**26), ("0.1KB", 100), ("2TB", 2 * 10**12)],
)
def test_bytes_as_people_write_them(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 apple", "1e9", "1,5GB", "٣MB", "1G B", "nan"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of bytes; 500MB, 1GB or 64MiB would work"):
        parse_bytes(text)
