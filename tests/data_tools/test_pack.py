"""What goes in comes out: every source, byte for byte, and the same bytes each time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.pack import pack

from .conftest import contents, make_image, pack_one, tree, write_files, write_table

TABLE_KINDS = ["parquet", "feather", "feather-plain", "stream"]


def test_a_folder_of_classes(photos: Path, tmp_path: Path) -> None:
    dataset = pack_one(photos, out=tmp_path / "out", samples_per_shard=5)
    assert (dataset.num_samples, dataset.num_classes, dataset.max_labels) == (23, 3, 1)
    assert (dataset.name, dataset.split, dataset.class_names) == ("photos", "train", ("cat", "dog", "eel"))
    assert dataset.shard_sizes.tolist() == [5, 5, 5, 5, 3]
    assert dataset.shard_names[4] == "shards/000/train-000004.tar"
    found = contents(dataset)
    for number, name in enumerate(dataset.class_names):
        for path in (photos / name).rglob("*.*"):
            key = path.relative_to(photos).with_suffix("").as_posix().replace("/", "_")
            assert found.pop(key) == (path.read_bytes(), [number], [1.0])
    assert not found


@pytest.mark.parametrize("kind", TABLE_KINDS)
@pytest.mark.parametrize("seed", [None, 3])
def test_tables_with_bytes(kind: str, seed: int | None, tmp_path: Path) -> None:
    images = [make_image(i) for i in range(11)]
    labels = [[i % 4, 7, i % 2] if i % 3 else [] for i in range(11)]
    scores = [[0.25, 0.5, 1.0] if i % 3 and i % 2 else [] for i in range(11)]
    table = pa.table({"image": images, "labels": labels, "scores": scores, "id": list(range(100, 111)), "more": ["x"] * 11})
    dataset = pack_one(write_table(table, tmp_path / "t", kind), out=tmp_path / "out", samples_per_shard=4, shuffle_seed=seed)
    found = contents(dataset)
    if seed is None:
        assert list(found) == [str(i) for i in range(100, 111)]
    assert (dataset.num_classes, dataset.class_names) == (8, None)
    for i in range(11):
        pairs: dict[int, float] = {}
        for place, label in enumerate(labels[i]):
            pairs[label] = max(pairs.get(label, 0), scores[i][place] if scores[i] else 1.0)
        assert found[str(100 + i)] == (images[i], list(pairs), list(pairs.values()))


@pytest.mark.parametrize("kind", TABLE_KINDS)
@pytest.mark.parametrize("seed", [None, 0])
def test_tables_with_paths_and_hugging_face_structs(kind: str, seed: int | None, tmp_path: Path) -> None:
    images = write_files(tmp_path / "files", {f"{i}.png": make_image(i, "PNG") for i in range(6)})
    by_path = pa.table({"file_name": [f"{i}.png" for i in range(6)], "label": ["b", "a", "c", "a", "b", "b"]})
    structs = [{"bytes": make_image(i, "PNG"), "path": "ignored"} if i % 2 else {"bytes": None, "path": f"{i}.png"} for i in range(6)]
    by_struct = pa.table({"image": structs, "label": by_path["label"].combine_chunks().dictionary_encode()})
    for name, table in (("p", by_path), ("s", by_struct)):
        source = write_table(table, tmp_path / name, kind)
        dataset = pack_one(source, out=tmp_path / name, image_root=str(images), shuffle_seed=seed)
        assert dataset.class_names == ("a", "b", "c")
        wanted = sorted((make_image(i, "PNG"), ["bacabb"[i]]) for i in range(6))
        found = [(data, [dataset.class_names[label] for label in labels]) for data, labels, _ in contents(dataset).values()]
        assert sorted(found) == wanted


def test_several_sources_and_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write_files(tmp_path / name, {"cat/1.jpg": make_image(number)})
    pq.write_table(pa.table({"img": [make_image(2)], "label": ["dog"]}), write_files(tmp_path / "three", {"README.md": b""}) / "t.parquet")
    dataset = pack_one(tmp_path / "one", tmp_path / "two", tmp_path / "three", out=tmp_path / "out")
    assert sorted(data for data, _, _ in contents(dataset).values()) == sorted(make_image(i) for i in range(3))
    sources = pq.read_table(dataset.path / "samples")["source"].to_pylist()
    assert sorted(sources) == ["one/cat/1.jpg", "three/t.parquet#0", "two/cat/1.jpg"]


def test_the_same_input_gives_the_same_bytes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cat/empty.jpg").touch()
    pack_one(photos, out=tmp_path / "a", samples_per_shard=5)
    # Another place, another order of the file system's names (copied backwards), a relative path, another OUT.
    elsewhere = tmp_path / "x" / "photos"
    for path in sorted(photos.rglob("*.*"), reverse=True):
        (elsewhere / path.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, elsewhere / path.relative_to(photos))
    monkeypatch.chdir(tmp_path / "x")
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder: Path) -> None:
            self._entries = scandir(folder)

        def __enter__(self) -> list[os.DirEntry]:
            return sorted(self._entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    monkeypatch.setattr("data_tools.sources.os.scandir", Backwards)
    pack_one("photos", out=tmp_path / "b" / "c", samples_per_shard=5)
    monkeypatch.undo()
    assert tree(tmp_path / "a/train") == tree(tmp_path / "b/c/train")
    assert "rejects.parquet" in tree(tmp_path / "a/train")


def test_order_follows_the_seed_only(photos: Path, tmp_path: Path) -> None:
    orders = [list(contents(pack_one(photos, out=tmp_path / f"s{seed}", shuffle_seed=seed))) for seed in (None, 0, 1)]
    assert orders[0] == sorted(orders[0])
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[1]) == sorted(orders[2]) == orders[0]


def test_a_rejected_image_changes_no_other_shard(photos: Path, tmp_path: Path) -> None:
    whole = pack_one(photos, out=tmp_path / "whole", samples_per_shard=3)
    victims = [whole.key(i).replace("_", "/") + ".img" for i in range(3, 6)]  # all of shard 1
    for victim in victims:
        (photos / victim).write_bytes(b"no image")
    rest = pack_one(photos, out=tmp_path / "rest", samples_per_shard=3)
    assert rest.shard_sizes.tolist() == [3, 0, *whole.shard_sizes[2:]]
    for name in whole.shard_names[:1] + whole.shard_names[2:]:
        assert (whole.path / name).read_bytes() == (rest.path / name).read_bytes()
    assert [rest.key(i) for i in range(20)] == [whole.key(i) for i in (0, 1, 2, *range(6, 23))]
    assert rest.shard_of(3) == whole.shard_of(6)
    assert rest.read(3) == whole.read(6)


def test_train_and_val_part_the_keys_whatever_the_seed(photos: Path, tmp_path: Path) -> None:
    splits = []
    for seed in (None, 0, 7):
        train, val = pack(PackConfig((str(photos),), str(tmp_path / f"{seed}"), val_fraction=0.3, shuffle_seed=seed))
        keys = [{*contents(Dataset.open(result.path))} for result in (train, val)]
        assert not keys[0] & keys[1]
        assert len(keys[0] | keys[1]) == 23
        assert train.classes == val.classes == 3
        splits.append(keys)
    assert splits[0] == splits[1] == splits[2]


def test_tables_with_bytes_can_be_split_in_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [make_image(i) for i in range(30)], "label": [0] * 30}), tmp_path / "t.parquet")
    results = pack(PackConfig((str(tmp_path / "t.parquet"),), str(tmp_path / "out"), val_fraction=0.5, shuffle_seed=None))
    found = [data for result in results for data, _, _ in contents(Dataset.open(result.path)).values()]
    assert sorted(found) == sorted(make_image(i) for i in range(30))


def test_a_later_split_has_the_classes_of_the_first(photos: Path, tmp_path: Path) -> None:
    pack_one(photos, out=tmp_path / "out")
    later = write_files(tmp_path / "later", {"eel/1.jpg": make_image(1)})
    val = pack_one(later, out=tmp_path / "out", split="val")
    assert (val.class_names, val.split, contents(val)["eel_1"][1]) == (("cat", "dog", "eel"), "val", [2])
    test = pack_one(later, out=tmp_path / "out", split="test", class_names=str(tmp_path / "out/train/classes.txt"))
    assert test.class_names == val.class_names
    other = pack_one(later, out=tmp_path / "other", class_names=str(write_files(tmp_path, {"n.txt": b"eel\nox\n"}) / "n.txt"))
    assert other.class_names == ("eel", "ox")


def test_a_later_split_of_int_labels(tmp_path: Path) -> None:
    for name, label in (("train", 9), ("val", 3)):
        pq.write_table(pa.table({"image": [make_image(0)], "label": [label]}), tmp_path / f"{name}.parquet")
        assert pack_one(tmp_path / f"{name}.parquet", out=tmp_path / "out", split=name).num_classes == 10


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(
        st.tuples(
            st.sampled_from([*map(make_image, range(4)), b"", b"text", make_image(0)[:200]]),
            st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1, width=32)), max_size=4),
        ),
        min_size=1,
        max_size=20,
    ),
    per_shard=st.integers(1, 7),
    seed=st.none() | st.integers(0, 2**64 - 1),
    scored=st.booleans(),
)
def test_any_small_dataset(samples: list, per_shard: int, seed: int | None, scored: bool, tmp_path: Path) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    columns = {
        "image": [image for image, _ in samples],
        "labels": pa.array([[label for label, _ in pairs] for _, pairs in samples], pa.list_(pa.int64())),
        "key": [f"k{i}" for i in range(len(samples))],
    }
    if scored:
        columns["scores"] = pa.array([[score for _, score in pairs] for _, pairs in samples], pa.list_(pa.float64()))
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=3)
    good = {f"k{i}": sample for i, sample in enumerate(samples) if len(sample[0]) > 200}
    config = {"samples_per_shard": per_shard, "shuffle_seed": seed, "num_classes": 6}
    if not good:
        with pytest.raises(PackError, match="no usable image"):
            pack_one(folder / "t.parquet", out=folder / "out", **config)
        assert not (folder / "out").exists()
        return
    dataset = pack_one(folder / "t.parquet", out=folder / "out", **config)
    found = contents(dataset)
    assert found.keys() == good.keys()
    assert len(dataset.shard_sizes) == -(-len(samples) // per_shard)
    for key, (image, pairs) in good.items():
        merged: dict[int, float] = {}
        for label, score in pairs:
            merged[label] = max(merged.get(label, 0.0), score if scored else 1.0)
        assert found[key] == (image, list(merged), list(merged.values()))
    rejected = len(samples) - len(good)
    rows = pq.read_table(dataset.path / "rejects.parquet").num_rows if rejected else 0
    assert rows == rejected
