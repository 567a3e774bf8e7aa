"""Overlays: other labels and removals over tars that stay as they are, held against a plain dictionary."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import amend as amend_module
from data_tools import overlay as form
from data_tools import preview
from data_tools.amend import AmendError, Changes, amend, find_samples, list_overlays, removals, write_overlay
from data_tools.dataset import Dataset, DatasetError, RemovedError
from data_tools.overlay import OverlayError
from data_tools.stats import count
from data_tools.verify import verify
from tests.command import vitscale

from .conftest import make_image, pack_one, tree, write_files


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty samples in four shards, with 0 to 3 of 7 labels each, some with scores."""
    folder = tmp_path_factory.mktemp("several")
    rng = random.Random(0)
    rows = []
    for i in range(30):
        labels = rng.sample(range(7), rng.randrange(4))
        rows.append({"image": make_image(i), "labels": labels, "scores": [i / 64] * len(labels) if i % 3 else None})
    table = pa.Table.from_pylist(rows, pa.schema({"image": pa.binary(), "labels": pa.list_(pa.int64()), "scores": pa.list_(pa.float32())}))
    pq.write_table(table, folder / "t.parquet")
    return pack_one(folder / "t.parquet", out=folder / "out", samples_per_shard=8, num_classes=7).path


def told(dataset: Dataset) -> dict[int, tuple[list[int], list[float]]]:
    """Labels and scores of all samples that are there."""
    labels, scores = dataset.labels(np.arange(dataset.num_samples))
    there = [i for i in range(dataset.num_samples) if not dataset.overlay.is_removed(i)]
    return {i: (labels[i][labels[i] >= 0].tolist(), scores[i][labels[i] >= 0].tolist()) for i in there}


def clear(dataset: Path) -> None:
    for file in dataset.glob("overlay/*"):
        file.unlink()


row = st.fixed_dictionaries(
    {
        "removed": st.sampled_from([None, None, True, False]),
        "labels": st.none() | st.lists(st.integers(0, 6), max_size=5, unique=True),
        "scored": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.integers(0, 29), row, min_size=1, max_size=30), max_size=4))
def test_any_overlays_say_what_a_dictionary_says(several: Path, overlays: list[dict[int, dict]]) -> None:
    clear(several)
    packed = Dataset.open(several)
    expected, removed = told(packed), set()
    for number, rows in enumerate(overlays):
        scores = {
            i: None if said["labels"] is None else [k / 8 for k in range(len(said["labels"]))] if said["scored"] else []
            for i, said in rows.items()
        }
        order = random.Random(number).sample(sorted(rows), len(rows))
        write_overlay(
            packed,
            f"n{number}",
            Changes(
                np.array(order),
                pa.array([rows[i]["removed"] for i in order], pa.bool_()),
                pa.array([rows[i]["labels"] for i in order], pa.list_(pa.int32())),
                pa.array([scores[i] for i in order], pa.list_(pa.float32())),
                pa.array(["because"] * len(order)),
            ),
        )
        for i, said in rows.items():
            if said["labels"] is not None:
                expected[i] = (said["labels"], scores[i] or [1.0] * len(said["labels"]))
            if said["removed"] is not None:
                (removed.add if said["removed"] else removed.discard)(i)
    dataset = Dataset.open(several)
    kept = {i: said for i, said in expected.items() if i not in removed}
    assert told(dataset) == kept
    assert dataset.overlay.num_removed == len(removed)
    assert np.flatnonzero(dataset.overlay.removed(np.arange(30))).tolist() == sorted(removed)
    shuffled = np.array(random.Random(1).sample(range(30), 30))  # any order of asking
    labels, scores_of = dataset.labels(shuffled)
    assert {int(i): row[row >= 0].tolist() for i, row in zip(shuffled, labels, strict=True)} == {i: expected[i][0] for i in range(30)}
    assert ((scores_of > 0) <= (labels >= 0)).all()
    by_batch = {}
    for batch in dataset.index_batches(rows=7):
        for at, sample in enumerate(batch.samples.tolist()):
            of_sample = slice(batch.starts[at], batch.starts[at + 1])
            by_batch[sample] = (batch.labels[of_sample].tolist(), batch.scores[of_sample].tolist())
    assert by_batch == kept
    assert np.flatnonzero(dataset.used_classes()).tolist() == sorted({label for labels, _ in kept.values() for label in labels})
    shard_of = np.searchsorted(dataset.first_samples, sorted(kept), side="right") - 1
    assert dataset.shard_counts().tolist() == np.bincount(shard_of, minlength=4).tolist()
    every = [score for _, of_sample in kept.values() for score in of_sample]
    assert dataset.score_range() == (min(every, default=1.0), max(every, default=1.0))
    assert told(Dataset.open(several, overlays=())) == told(packed)
    assert told(pickle.loads(pickle.dumps(packed))) == told(packed), "a copy uses the overlays of its original, not what came since"
    assert verify(several).problems == ()


def test_a_removed_image_is_not_read(packed: Dataset) -> None:
    before = tree(packed.path)
    write_overlay(packed, "takedown", removals(np.array([3, 7]), pa.array(["asked for"] * 2)))
    dataset = Dataset.open(packed.path)
    for sample in (3, 7):
        with pytest.raises(RemovedError, match=f"sample {sample} .*{packed.key(sample)}.*overlay removes"):
            dataset.read(sample)
    assert [dataset.read(i) for i in range(23) if i not in (3, 7)] == [packed.read(i) for i in range(23) if i not in (3, 7)]
    assert (dataset.content_hash, dataset.num_samples) == (packed.content_hash, 23)
    assert {name: data for name, data in tree(packed.path).items() if not name.startswith("overlay/")} == before


def test_a_shard_that_is_gone_and_all_removed_does_not_matter(packed: Dataset) -> None:
    (packed.path / packed.shard_names[1]).unlink()
    write_overlay(packed, "lost", removals(np.arange(5, 9), pa.array(["lost"] * 4)))
    with pytest.raises(DatasetError, match="is missing"):
        Dataset.open(packed.path)
    write_overlay(packed, "lost", removals(np.array([9]), pa.array(["lost"])))
    assert len(told(Dataset.open(packed.path))) == 18


def test_damage_to_an_overlay_is_never_taken_for_none(packed: Dataset) -> None:
    """Each bit that flips is found, and so is an overlay of another dataset, or one under a name of its own."""
    path = write_overlay(packed, "takedown", removals(np.arange(4), pa.array(["why"] * 4)))
    whole = path.read_bytes()
    rng = random.Random(0)
    for at in [*rng.sample(range(len(whole)), 100), 0, len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(OverlayError, match="was changed"):
            Dataset.open(packed.path)
        assert [problem.file for problem in verify(packed.path).problems] == [f"overlay/{path.name}"]
    path.write_bytes(whole)
    (path.parent / "mine.parquet").write_bytes(whole)
    with pytest.raises(OverlayError, match="no overlay by its name"):
        Dataset.open(packed.path)
    assert [problem.file for problem in verify(packed.path).problems] == ["overlay/mine.parquet"]
    (path.parent / "mine.parquet").unlink()
    write_files(packed.path.parent / "src", {"a/1.jpg": make_image(1), "b/2.jpg": make_image(2)})
    other = pack_one(packed.path.parent / "src", out=packed.path.parent / "other")
    (other.path / "overlay").mkdir()
    path.rename(other.path / "overlay" / path.name)
    with pytest.raises(OverlayError, match="made for another dataset"):
        Dataset.open(other.path)


def test_keys_are_found_wherever_they_are(packed: Dataset) -> None:
    keys = [packed.key(i) for i in range(23)]
    asked = ["nobody", *reversed(keys), keys[3], ""]
    assert find_samples(packed, pa.array(asked)).tolist() == [-1, *reversed(range(23)), 3, -1]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_changes_come_as_tables(packed: Dataset, tmp_path: Path, kind: str) -> None:
    keys = [packed.key(i) for i in (2, 11)]
    file = tmp_path / f"changes.{kind}"
    rows = [{"key": keys[0], "removed": True, "label": None}, {"key": keys[1], "removed": None, "label": "eel"}]
    if kind in ("csv", "tsv"):
        file.write_text("key,removed,label\n{},true,\n{},,eel\n".format(*keys).replace(",", "," if kind == "csv" else "\t"))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(f"{keys[0]}\n")
    amended, unknown = amend(packed, "mine", file=file, reason="r")
    assert (amended.removed, amended.restored, amended.relabelled, amended.reason, unknown) == (1, 0, kind != "txt", "r", 0)
    dataset = Dataset.open(packed.path)
    assert 2 not in told(dataset)
    assert told(dataset)[11][0] == ([2] if kind != "txt" else told(packed)[11][0])
    assert list_overlays(packed.path) == [amended]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("key\nnobody\n", "no sample with the key 'nobody'"),
        ("name\nx\n", "no column `key`"),
        ("key,label\nKEY,dragon\n", "'dragon', which is none of the 3 classes"),
        ("key,label\nKEY,3\n", "has 3, which is none of the 3 classes"),
        ("key,label\nKEY,1\nKEY,2\n", "say two things of"),
        ("key,label,score\nKEY,1,nan\n", "not a finite number"),
        ("key,label,score\nKEY,1,high\n", "scores are numbers"),
        ("key,removed\nKEY,7\n", "conversion error to bool: invalid value '7'"),
        ("sample\n23\n", r"from 23 to 23; .* has 0\.\.22"),
        ("sample\n-1\n", "from -1 to -1"),
        ("key,label\nKEY,1,2\n", "cannot be read"),
        ("key,label,label\nKEY,1,2\n", "a column twice"),
        ("key,score\nKEY,0.5\n", "a column 'score' but none called `removed`, `label`"),
        ("key,class\nKEY,eel\n", "a column 'class' but none"),
        ("key, label\nKEY, eel\n", "a column ' label' but none"),
        ("key, removed\nKEY,false\n", "a column ' removed' but none"),
        ("key,sample\nKEY,5\n", "for sample 5, which"),
    ],
)
def test_changes_that_do_not_fit_are_refused_in_a_line(packed: Dataset, tmp_path: Path, text: str, rule: str) -> None:
    file = tmp_path / "changes.csv"
    file.write_text(text.replace("KEY", packed.key(4)))
    with pytest.raises(AmendError, match=rule):
        amend(packed, "mine", file=file)
    assert not [name for name in tree(packed.path) if name.startswith("overlay/")]


@pytest.mark.parametrize(
    ("names", "label", "said"),
    [
        (["0", "1", "2", "10"], "2", None),
        (["1", "2", "10"], "10", 1),
        (["0", "1", "2"], "2", 2),
        (["01", "02", "03"], "02", None),
        (["2012", "2013"], "2013", 1),
        (["2012", "2013"], "1", 1),
        (["cat", "7"], "cat", 1),
        (["true", "false"], "true", 1),
        (["NA", "null", "nan"], "NA", 0),
        (["2020-01-01", "2021-01-01"], "2021-01-01", 1),
    ],
)
def test_a_class_whose_name_looks_like_something_else(tmp_path: Path, names: list[str], label: str, said: int | None) -> None:
    dataset = pack_one(
        write_files(tmp_path / "src", {f"{name}/{i}.jpg": make_image(i) for i, name in enumerate(names)}), out=tmp_path / "out"
    )
    table, lines = tmp_path / "changes.csv", tmp_path / "changes.jsonl"
    table.write_text(f"sample,label\n0,{label}\n")
    lines.write_text(json.dumps({"sample": 0, "label": label}) + "\n")
    if label in names:
        amend(dataset, "lines", file=lines)
        assert told(Dataset.open(dataset.path))[0][0] == [sorted(names).index(label)], "text in JSON is a name"
    if said is None:
        with pytest.raises(AmendError, match="may be class number"):
            amend(dataset, "table", file=table)
    else:
        amend(dataset, "table", file=table)
        assert told(Dataset.open(dataset.path))[0][0] == [said]


def test_keys_that_look_like_dates_are_found_in_jsonl(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{i}.jpg": make_image(i) for i in (1, 2)})
    rows = [{"path": f"{i}.jpg", "label": 0, "key": f"2020-01-0{i}"} for i in (1, 2)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = pack_one(tmp_path / "t.jsonl", out=tmp_path / "dated")
    assert {dataset.key(0), dataset.key(1)} == {"2020-01-01", "2020-01-02"}
    (tmp_path / "changes.jsonl").write_text('{"key": "2020-01-02"}\n')
    amend(dataset, "dated", file=tmp_path / "changes.jsonl")
    (gone,) = np.flatnonzero(Dataset.open(dataset.path).overlay.removed(np.arange(2))).tolist()
    assert dataset.key(gone) == "2020-01-02"


ROWS = {
    "sample": [1, 4],
    "key": ["a", "b"],
    "removed": [None, True],
    "labels": [[0, 1], None],
    "scores": [[0.5, 1.0], None],
    "reason": ["", ""],
}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("sample", [4, 1]),
        ("sample", [4, 4]),
        ("sample", [1, 23]),
        ("sample", [-1, 4]),
        ("labels", [[0, 3], None]),
        ("labels", [[0, -1], None]),
        ("scores", [[0.5], None]),
    ],
)
def test_an_overlay_that_does_not_fit_is_refused_whoever_wrote_it(packed: Dataset, column: str, values: list) -> None:
    """Its hash is right, so it is what somebody meant; rows in one group, and in groups of their own."""
    schema = form.SCHEMA.with_metadata({"vitscale": json.dumps({"format_version": 1, "dataset": packed.content_hash})})
    (packed.path / "overlay").mkdir()
    for told, group in itertools.product((ROWS, ROWS | {column: values}), (1, 2)):
        file = packed.path / "overlay" / "new"
        pq.write_table(pa.table(told, schema), file, row_group_size=group)
        file = file.rename(file.with_name(f"0000-mine-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.parquet"))
        if told is ROWS:
            Dataset.open(packed.path)
        else:
            with pytest.raises(OverlayError, match="does not fit the dataset"):
                Dataset.open(packed.path)
        file.unlink()


def test_long_lists_are_written_and_keys_looked_through_in_pieces(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear(several)
    packed = Dataset.open(several)
    keys = [packed.key(i) for i in range(30)]
    monkeypatch.setattr(amend_module, "ROWS", 4)
    assert find_samples(packed, pa.array(reversed(keys))).tolist() == [*reversed(range(30))]
    path = write_overlay(packed, "most", removals(np.arange(1, 30), pa.array(["r"] * 29)))
    assert pq.read_table(path)["key"].to_pylist() == keys[1:]
    assert Dataset.open(several).overlay.removed(np.arange(30)).tolist() == [False] + [True] * 29


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([{"sample": 3, "labels": [1, 1]}], "a label twice in row 0"),
        ([{"sample": 3, "labels": [1], "scores": [0.5]}, {"sample": 3, "labels": [1], "scores": [0.25]}], "say two things"),
        ([{"sample": 3, "labels": [1, 2], "scores": [0.5]}], "has 1 for 2 labels"),
    ],
)
def test_lists_that_do_not_fit_are_refused(packed: Dataset, tmp_path: Path, rows: list[dict], rule: str) -> None:
    (tmp_path / "changes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AmendError, match=rule):
        amend(packed, "mine", file=tmp_path / "changes.jsonl")


def test_after_the_last_number_nothing_is_written(packed: Dataset) -> None:
    path = write_overlay(packed, "one", removals(np.array([0]), pa.array([""])))
    path.rename(path.with_name("9999" + path.name[4:]))
    with pytest.raises(AmendError, match="no number is above"):
        write_overlay(packed, "two", removals(np.array([1]), pa.array([""])))
    assert Dataset.open(packed.path).overlay.num_removed == 1


def test_the_same_change_twice_is_one_overlay_and_an_undo_is_another(packed: Dataset) -> None:
    key = packed.key(9)
    first, _ = amend(packed, "mine", remove=(key, key))
    assert amend(packed, "mine", remove=(key,)) == (None, 0), "it is so already"
    assert list_overlays(packed.path) == [first]
    path = write_overlay(packed, "mine", removals(np.array([9]), pa.array([""])))
    assert str(path) == first.path, "the same file is not written twice"
    amend(packed, "mine", restore=(key,))
    assert told(Dataset.open(packed.path)) == told(packed)
    amend(packed, "mine", remove=(key,))
    assert [one.removed for one in list_overlays(packed.path)] == [1, 0, 1]
    assert 9 not in told(Dataset.open(packed.path))


def test_writers_at_once_get_a_number_each(packed: Dataset) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_overlay(packed, f"n{i}", removals(np.array([i]), pa.array([""]))), range(16)))
    dataset = Dataset.open(packed.path)
    assert [name[:4] for name in dataset.overlay.names] == [f"{i:04d}" for i in range(16)]
    assert dataset.overlay.num_removed == 16


def test_stats_and_previews_are_of_what_is_there(several: Path) -> None:
    """As of a dataset that was packed without what is removed, and with the other labels."""
    clear(several)
    packed = Dataset.open(several)
    gone = np.array([0, 1, 2, 3, 4, 5, 6, 7, 13, 29])  # the first shard is one of them
    write_overlay(packed, "takedown", removals(gone, pa.array([""] * 10)))
    new = pa.array([[6]] * 3, pa.list_(pa.int32()))
    relabel = Changes(
        np.array([8, 9, 13]), pa.nulls(3, pa.bool_()), new, pa.array([[]] * 3, pa.list_(pa.float32())), pa.array([""] * 3)
    )  # fmt: skip
    write_overlay(packed, "relabel", relabel)
    kept = told(Dataset.open(several))
    found = count(several)
    labels = [label for of, _ in kept.values() for label in of]
    assert (found.samples, found.removed, found.relabelled, found.labels) == (20, 10, 3, len(labels))
    assert found.classes.counts == tuple(np.bincount(labels, minlength=7).tolist())
    assert list(found.labels_a_sample) == np.bincount([len(of) for of, _ in kept.values()], minlength=4).tolist()
    assert found.sizes is not None
    assert found.sizes.width.count == found.bytes_an_image.count == 20
    assert [shard.samples for shard in found.shards.shards] == [0, 7, 8, 5]
    assert [shard.labels for shard in found.shards.shards] == [
        sum(len(kept[i][0]) for i in kept if i // 8 == shard) for shard in range(4)
    ]  # fmt: skip
    for by in ("class", "shard", "random"):
        sheet = preview.sheet(several, by=by, images=100 if by != "random" else 40, groups=8)
        shown = [tile.sample for _, tile in preview.tiles(sheet)]
        assert set(shown) == (set(kept) if by != "class" else {i for i, (of, _) in kept.items() if of})
        assert sheet.samples == 20


def test_the_command(packed: Dataset, tmp_path: Path) -> None:
    path, keys = str(packed.path), [packed.key(i) for i in (0, 1)]
    told = json.loads(vitscale("data", "overlay", path, "--remove", *keys, "--name", "takedown", "--reason", "asked", "--json").stdout)
    assert (told["removed"], told["overlays"][0]["reason"]) == (2, "asked")
    (tmp_path / "list.txt").write_text(f"{keys[0]}\nnobody\n")
    refused = vitscale("data", "overlay", path, str(tmp_path / "list.txt"))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "'nobody' (1 of the list's keys)" in refused.stderr
    done = vitscale("data", "overlay", path, str(tmp_path / "list.txt"), "--skip-unknown")
    assert "1 unknown key left out" in done.stdout
    assert vitscale("data", "overlay", path).stdout.count("removed") == 2
    assert "nothing to change" in done.stdout
    for forgotten in (["--remove"], ["--reason", "takedown"], ["--remove", "--reason", "takedown"], ["--restore"]):
        refused = vitscale("data", "overlay", path, *forgotten)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "lacks a" in refused.stderr
