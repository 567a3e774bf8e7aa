"""What `verify` finds is made good bit for bit, or left as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_tools.assemble as assemble_module
import data_tools.dataset as fmt
import data_tools.pack as pack_module
from data_tools.amend import removals, write_overlay
from data_tools.config import IndexConfig, PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.errors import UserError
from data_tools.index import index
from data_tools.pack import pack
from data_tools.peer_indices import KINDS, write_indices
from data_tools.repair import RepairError, RepairReport, repair
from data_tools.verify import verify
from launch.flags import UsageError
from launch.main import dispatch

from .conftest import make_image, tree, write_files
from .test_durable import killed_everywhere
from .test_index import sample, write_tar


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, ...]:
    """Forty images, some of them none, in a folder and in two tables."""
    images = [b"no image" if i % 13 == 3 else make_image(i) for i in range(40)]
    photos = write_files(tmp_path / "photos", {f"c{i % 4}/{i:02d}.jpg": images[i] for i in range(20)})
    for part in range(2):
        columns = {"image": images[20 + part :: 2], "label": [f"c{i % 4}" for i in range(20 + part, 40, 2)]}
        pq.write_table(pa.table(columns), tmp_path / f"part-{part}.parquet", row_group_size=7)
    return (str(photos), *(str(tmp_path / f"part-{part}.parquet") for part in range(2)))


@pytest.fixture
def whole(sources: tuple[str, ...], tmp_path: Path) -> Path:
    """A train split with a sibling, and every kind of file."""
    pack(PackConfig(sources, str(tmp_path / "out"), samples_per_shard=9, val_fraction=0.3, jobs=1))
    path = tmp_path / "out/train"
    dataset = Dataset.open(path)
    write_indices([path / name for name in dataset.shard_names], KINDS)
    assert (path / "rejects.parquet").is_file()
    return path


def damage(file: Path, how: str, rng: random.Random) -> None:
    """Makes a file another one."""
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)


FROM_THE_TARS = ("manifest.parquet", "index.arrow", ".idx", "classes.txt")


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_every_kind_of_file_is_made_good(whole: Path, sources: tuple[str, ...], how: str) -> None:
    before, rng = tree(whole), random.Random(how)
    files = [name for name in sorted(before) if name != "dataset.json" and not ("00000" in name and "000000" not in name)]
    for name in files:
        damage(whole / name, how, rng)
        after = tree(whole)
        plain = repair(whole, jobs=1)
        if name.endswith(FROM_THE_TARS):
            assert (plain.broken, tree(whole)) == ((), before), name
            damage(whole / name, how, rng)
        else:
            assert {problem.file for problem in plain.broken} == {name}
            assert tree(whole) == after
        report = repair(whole, sources, jobs=1)
        assert (report.broken, [mended.file for mended in report.mended]) == ((), [name])
        assert tree(whole) == before, name
    assert repair(whole, sources, jobs=1).mended == ()


@pytest.mark.parametrize("seed", range(3))
def test_many_files_at_once(whole: Path, sources: tuple[str, ...], seed: int) -> None:
    before, rng = tree(whole), random.Random(seed)
    damaged = [name for name in sorted(before) if name != "dataset.json" and (not seed or rng.random() < 0.5)]
    for name in damaged:
        damage(whole / name, "flipped" if not seed else rng.choice(["flipped", "cut", "deleted"]), rng)
    assert repair(whole, sources, dry_run=True).mended
    report = repair(whole, sources, jobs=2)
    assert report.broken == ()
    assert tree(whole) == before


def test_dataset_json_is_restored_if_it_can_be_proved(whole: Path) -> None:
    before, rng = tree(whole), random.Random(0)
    data = before["dataset.json"]
    content_hash = json.loads(data)["content_hash"]
    for _ in range(6):
        damage(whole / "dataset.json", "flipped", rng)
        assert repair(whole).broken == ()
        assert tree(whole) == before
    for text in (
        data.replace(b'"num_samples": ', b'"num_samples": 9'),
        data.replace(b'"made": {', b'"made": {{{'),
        data[: len(data) // 3],
        b"",
    ):
        (whole / "dataset.json").write_bytes(text)
        if b'"content_hash"' not in text:
            with pytest.raises(RepairError, match="cannot be derived from what is left"):
                repair(whole)
            assert (whole / "dataset.json").read_bytes() == text
        repair(whole, content_hash=content_hash)
        assert tree(whole) == before
    with pytest.raises(RepairError, match=f"is dataset {content_hash}, not 00"):
        repair(whole, content_hash="00")
    (whole / "dataset.json").write_bytes(data.replace(b'"num_rejects": ', b'"num_rejects": 9'))
    shutil.rmtree(whole.parent / "val")
    (whole / "classes.txt").unlink()
    with pytest.raises(RepairError, match="nothing else in it be lost"):
        repair(whole)


def test_with_other_sources_nothing_is_changed(whole: Path, sources: tuple[str, ...], tmp_path: Path) -> None:
    tar = whole / Dataset.open(whole).shard_names[1]
    tar.write_bytes(tar.read_bytes()[:3000])
    (whole / "index.arrow").unlink()
    damaged = tree(whole)
    for others in ((sources[0],), (sources[0], sources[2], sources[1])):
        with pytest.raises(RepairError, match=r"list other samples than .* was packed from, so nothing was changed"):
            repair(whole, others, jobs=1)
    with pytest.raises(PackError, match="does not exist"):
        repair(whole, (str(tmp_path / "nowhere"),), jobs=1)
    assert tree(whole) == damaged
    for file in Path(sources[0]).rglob("*.jpg"):  # the same names, and another image
        file.write_bytes(make_image(77))
    report = repair(whole, sources, jobs=1)
    assert any("packed again from the sources it has other bytes" in problem.what for problem in report.broken)
    assert tree(whole) == damaged


def test_a_copy_is_a_source(whole: Path, tmp_path: Path) -> None:
    before = tree(whole)
    shutil.copytree(whole, tmp_path / "copy")
    for name in before:
        if name != "dataset.json" and not name.endswith("idx"):
            damage(whole / name, "flipped", random.Random(name))
    report = repair(whole, (str(tmp_path / "copy"),), jobs=1)
    assert report.broken == ()
    assert {mended.how for mended in report.mended} == {"copied"}
    assert tree(whole) == before


def test_a_dry_run_changes_nothing(whole: Path, sources: tuple[str, ...]) -> None:
    overlay = write_overlay(Dataset.open(whole), "takedown", removals(np.array([3]), pa.array(["asked for"])))
    overlay.write_bytes(overlay.read_bytes()[:-1])
    lost = overlay.relative_to(whole).as_posix()  # which neither tars nor sources give again
    for name in ("index.arrow", "samples/000.parquet", "classes.txt"):
        (whole / name).unlink()
    damaged = tree(whole)
    without = repair(whole, dry_run=True)
    assert {mended.file: mended.how for mended in without.mended} == {
        "index.arrow": "would be rebuilt from the tars",
        "classes.txt": "would be copied from another split",
    }
    assert sorted(problem.file for problem in without.broken) == [lost, "samples/000.parquet"]
    given = repair(whole, sources, dry_run=True)
    assert [mended.file for mended in given.mended] == ["classes.txt", "index.arrow", "samples/000.parquet"]
    assert [problem.file for problem in given.broken] == [lost]
    assert tree(whole) == damaged


TOUCHES = [(os, "fsync"), (os, "replace"), (os, "writev"), (Path, "rename"), (shutil, "rmtree")]


def test_killed_at_each_touch_of_the_disk_it_goes_on(whole: Path, sources: tuple[str, ...]) -> None:
    before = tree(whole)
    names = Dataset.open(whole).shard_names
    moments = 0

    def harm() -> None:
        for name in (names[1], "index.arrow"):
            (whole / name).write_bytes(before[name][:100])

    def go() -> RepairReport:
        return repair(whole, sources, jobs=1)

    harm()
    for _ in killed_everywhere(go, TOUCHES):
        there = {name: data for name, data in tree(whole).items() if ".repairing" not in name}
        assert all(data in (before[name], before[name][:100]) for name, data in there.items())
        go()
        assert tree(whole) == before
        harm()
        moments += 1
    assert moments > 20


def test_shards_that_were_packed_again_are_not_packed_twice(whole: Path, sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    (whole / "samples/000.parquet").unlink()
    before = verify(whole).problems
    written: list[str] = []
    write = pack_module.write_shard

    def stop_at_the_third(tar: Path, *rest: Any) -> None:
        written.append(tar.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(tar, *rest)

    monkeypatch.setattr(pack_module, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        repair(whole, sources, jobs=1)
    assert verify(whole).problems == before
    assert repair(whole, sources, jobs=1).broken == ()
    assert len(written) == len(Dataset.open(whole).shard_names) + 1


def test_the_files_beside_tars_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    for number in range(3):
        bad: list[tuple[str, bytes | None]] = [(f"bad-{number}.jpg", b"none"), (f"bad-{number}.cls", b"0")]
        write_tar(folder / f"deep/{number}.tar", [*sample(2 * number), *bad, *sample(2 * number + 1)])
    shutil.copytree(folder / "deep", tmp_path / "kept")
    names = write_files(tmp_path, {"names": b"a\nb\nc\n"}) / "names"
    index(IndexConfig((str(folder),), class_names=str(names), jobs=1))
    write_indices([folder / f"deep/{number}.tar" for number in range(3)], KINDS)
    before = tree(folder)
    for name in sorted(before):
        for how in ("flipped", "deleted"):
            damage(folder / name, how, random.Random(how + name))
            copies = (str(tmp_path / "kept"),) if name.endswith(".tar") else ()
            try:
                report = repair(folder, copies, jobs=1)
            except UserError:
                assert (name, how) in {("dataset.json", "deleted"), ("classes.txt", "flipped"), ("classes.txt", "deleted")}
                (folder / name).write_bytes(before[name])
                continue
            if name == "classes.txt":
                assert report.broken
                (folder / name).write_bytes(before[name])
            else:
                assert report.broken == (), name
            assert tree(folder) == before, (name, how)


def test_what_is_lost_is_retired(whole: Path, sources: tuple[str, ...]) -> None:
    """A tar that is gone, one that is cut, and one image in a third: tombstones, the same identity and numbers, and a repair later on."""
    before, intact = tree(whole), Dataset.open(whole)
    gone, cut, flipped = (whole / intact.shard_names[number] for number in (0, 2, 1))
    gone.unlink()
    cut.write_bytes(before[intact.shard_names[2]][:2000])
    victim = int(intact.first_samples[1]) + 1
    data = bytearray(before[intact.shard_names[1]])
    data[data.find(intact.read(victim)) + 40] ^= 4
    flipped.write_bytes(data)
    assert {problem.file for problem in repair(whole, jobs=1).broken} == {intact.shard_names[number] for number in range(3)}
    report = repair(whole, retire=True, jobs=1)
    lost = {victim, *(int(intact.first_samples[n]) + i for n in (0, 2) for i in range(int(intact.shard_sizes[n])))}
    assert (report.broken, report.retired) == ((), len(lost))
    dataset = Dataset.open(whole)
    assert (dataset.content_hash, dataset.num_samples) == (intact.content_hash, intact.num_samples)
    assert {number for number in range(len(dataset)) if dataset.overlay.is_removed(number)} == lost
    for number in set(range(len(dataset))) - lost:
        assert dataset.read(number) == make_image(int(dataset_source(dataset, number)))
    assert repair(whole, retire=True, jobs=1).retired == 0, "they are retired already"
    assert repair(whole, sources, jobs=1).broken == ()
    assert {name: data for name, data in tree(whole).items() if not name.startswith("overlay/")} == before


def dataset_source(dataset: Dataset, number: int) -> str:
    """The number of the image that a sample was packed from."""
    (row,) = [row for row in pq.read_table(dataset.path / "samples/000.parquet").to_pylist() if row["key"] == dataset.key(number)]
    name, _, place = row["source"].partition("#")
    return str(20 + int(name[-9]) + 2 * int(place)) if place else Path(name).stem


def test_an_overlay_comes_back_from_a_copy(whole: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(whole)
    file = write_overlay(dataset, "takedown", removals(np.array([3]), pa.array(["asked for"])))
    before = tree(whole)
    shutil.copytree(whole, tmp_path / "copy")
    damage(file, "flipped", random.Random(0))
    assert [problem.file for problem in repair(whole, jobs=1).broken] == [f"overlay/{file.name}"]
    assert repair(whole, (str(tmp_path / "copy"),), jobs=1).broken == ()
    assert tree(whole) == before


def test_the_verbs(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1 and one line where something stays broken; JSON for programs."""
    before = tree(whole)
    (whole / "index.arrow").unlink()
    (whole / "rejects.parquet").unlink()
    with pytest.raises(UserError, match=r"is damaged still \(rejects.parquet first\)") as error:
        dispatch(["data", "repair", str(whole), "--json"])
    assert "\n" not in str(error.value)
    told = json.loads(capsys.readouterr().out)
    assert [mended["file"] for mended in told["mended"]] == ["index.arrow"]
    (whole / "rejects.parquet").write_bytes(before["rejects.parquet"])
    dispatch(["data", "repair", str(whole)])
    assert capsys.readouterr().out.endswith("0 files mended, 0 still broken\n")
    write_tar(tmp_path / "tars/a.tar", [*sample(0), *sample(1)])
    dispatch(["data", "index", str(tmp_path / "tars"), "--energon", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["indices"]) == (2, {"written": 1, "there": 0})
    dispatch(["data", "verify", str(tmp_path / "tars")])
    for words in (["data", "index"], ["data", "index", str(whole)]):
        with pytest.raises(UsageError):
            dispatch(words)


def test_many_tables_batches_empty_shards_scores_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a large dataset has, in small: several files of samples, several record batches, shards of which nothing is left."""
    monkeypatch.setattr(fmt, "SHARDS_PER_FOLDER", 3)
    monkeypatch.setattr(assemble_module, "INDEX_ROWS", 5)
    rows = 23
    table = {
        "image": [b"none" if i in (6, 7, 8, 15) else make_image(i) for i in range(rows)],
        "labels": [[i % 5, 5] if i % 3 else [] for i in range(rows)],
        "scores": [[0.1 * i, 1 / 3] if i % 3 and i % 2 else None for i in range(rows)],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = (str(tmp_path / "t.parquet"),)
    settings: dict[str, Any] = {"samples_per_shard": 3, "shuffle_seed": None, "write_cls": True, "num_classes": 9}
    pack(PackConfig(source, str(tmp_path / "out"), split="dev", jobs=1, **settings))
    path = tmp_path / "out/dev"
    before = tree(path)
    assert 0 in Dataset.open(path).shard_sizes
    assert {"samples/000.parquet", "samples/001.parquet", "samples/002.parquet"} <= before.keys()
    for name in ("index.arrow", "manifest.parquet"):
        (path / name).write_bytes(b"")
        assert repair(path, jobs=1).broken == ()
        assert tree(path) == before
    for name in before:
        if name != "dataset.json":
            (path / name).unlink()
    assert repair(path, source, jobs=1).broken == ()
    assert tree(path) == before


def test_a_damaged_manifest_beside_a_damaged_tar_needs_the_sources(whole: Path, sources: tuple[str, ...]) -> None:
    before = tree(whole)
    for name in ("manifest.parquet", Dataset.open(whole).shard_names[1]):
        damage(whole / name, "flipped", random.Random(1))
    damaged = tree(whole)
    with pytest.raises(RepairError, match="what the tars give is not what it was: a tar is damaged too; give SOURCE"):
        repair(whole, jobs=1)
    assert tree(whole) == damaged
    assert repair(whole, sources, jobs=1).broken == ()
    assert tree(whole) == before


def test_a_dataset_that_names_files_elsewhere_is_not_repaired(whole: Path, tmp_path: Path) -> None:
    header = json.loads((whole / "dataset.json").read_text())
    evil = write_files(tmp_path / "copy/train", {"../evil": b"evil"}) / "../evil"
    header["files"]["../evil"] = fmt.file_entry(evil)
    header["content_hash"] = fmt.header_hash(header)
    for folder in (whole, tmp_path / "copy/train"):
        (folder).mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(RepairError, match=r"names '../evil' as a file of its own"):
        repair(whole, (str(tmp_path / "copy/train"),), jobs=1)
    assert not (whole.parent / "evil").exists()
