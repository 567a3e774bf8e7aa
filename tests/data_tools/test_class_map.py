"""Class maps: what labels become, and what is said of maps and labels that do not fit."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset
from data_tools.labels import read_class_map
from data_tools.pack import OtherPackError, pack

from .conftest import contents, make_image, pack_one, write_files


def named(dataset: Dataset) -> dict[str, list[str]]:
    """Key -> class names."""
    assert dataset.class_names is not None
    return {key: [dataset.class_names[label] for label in labels] for key, (_, labels, _) in contents(dataset).items()}


def a_map(path: Path, text: str | dict) -> str:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


def test_folders_many_to_one_and_dropped(tmp_path: Path) -> None:
    source = write_files(tmp_path / "src", {f"{name}/1.jpg": make_image(i) for i, name in enumerate(("tabby", "tiger", "poodle", "junk"))})
    for name, text in {
        "m.json": '{"tabby": "cat", "tiger": "cat", "poodle": "dog", "junk": null, "never seen": "ox"}',
        "m.csv": 'tabby,cat\ntiger,cat\npoodle,"dog"\njunk,\n\nnever seen,ox\n',
        "m.tsv": "\ufefftabby\tcat\r\ntiger\tcat\r\npoodle\tdog\r\njunk\t\r\nnever seen\tox\r\n",
        "other.json": {"tabby": "cat", "tiger": "cat", "poodle": "dog", "absent": "ox", "*": ""},
    }.items():
        dataset = pack_one(source, out=tmp_path / f"out-{name}", class_map=a_map(tmp_path / name, text))
        assert named(dataset) == {"tabby_1": ["cat"], "tiger_1": ["cat"], "poodle_1": ["dog"], "junk_1": []}
        assert dataset.class_names == ("cat", "dog", "ox"), "all classes of the map, whatever the samples"


@pytest.mark.parametrize("numbered", [False, True])
def test_numbers_become_names_or_numbers_with_their_scores(numbered: bool, tmp_path: Path) -> None:
    labels, scores = [[5, 7, 12], [7], [], [12, 5], [7, 7]], [[0.5, 0.25, 1.0], [0.75], [], None, [0.125, 0.5]]
    table = pa.table({"image": [make_image(i) for i in range(5)], "labels": labels, "scores": scores, "id": list("abcde")})
    pq.write_table(table, tmp_path / "t.parquet")
    names = {"5": "x", "7": None, "12": "x"}
    class_map = {raw: 3 if numbered and name else name for raw, name in names.items()}
    dataset = pack_one(tmp_path / "t.parquet", out=tmp_path / "out", class_map=a_map(tmp_path / "m.json", class_map))
    label = 3 if numbered else 0
    found = {key: rest for key, (_, *rest) in contents(dataset).items()}
    assert found == {"a": [[label], [1.0]], "b": [[], []], "c": [[], []], "d": [[label], [1.0]], "e": [[], []]}
    assert (dataset.num_classes, dataset.class_names) == ((4, None) if numbered else (1, ("x",)))
    index = pa.ipc.open_file(str(dataset.path / "index.arrow")).read_all()
    scored = dict(zip([dataset.key(i) for i in range(5)], index["scores"].to_pylist(), strict=True))
    assert scored["a"] == [1.0]
    assert scored["d"] == []


def test_sources_of_names_and_of_numbers_meet_in_one_map(tmp_path: Path) -> None:
    write_files(tmp_path / "src", {"cat/1.jpg": make_image(0)})
    pq.write_table(pa.table({"image": [make_image(1)], "label": [7], "key": ["row"]}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in {
            "tarred.jpg": make_image(2),
            "tarred.json": json.dumps({"labels": ["cat", "7"], "scores": [0.5, 0.25]}).encode(),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    class_map = a_map(tmp_path / "m.json", {"cat": "animal", "7": "seven"})
    sources = [tmp_path / name for name in ("src", "t.parquet", "t.tar")]
    dataset = pack_one(*sources, out=tmp_path / "out", class_map=class_map)
    assert named(dataset) == {"cat_1": ["animal"], "row": ["seven"], "tarred": ["animal", "seven"]}
    with pytest.raises(PackError, match="some sources have numbers as labels and some have names"):
        pack_one(*sources, out=tmp_path / "without")


def test_a_label_that_the_map_lacks_names_its_first_sample(tmp_path: Path) -> None:
    labels = [[1], [1, 2], [3, 1], [4]]
    pq.write_table(pa.table({"image": [make_image(i) for i in range(4)], "labels": labels}), tmp_path / "t.parquet")
    class_map = a_map(tmp_path / "m.json", {"1": "one", "2": "two"})
    with pytest.raises(PackError, match=r"label 3 of t.parquet#2 is not in class_map=.*m.json; add it, .* or '\*' for every other label"):
        pack_one(tmp_path / "t.parquet", out=tmp_path / "out", class_map=class_map)
    assert not (tmp_path / "out").exists()
    dataset = pack_one(
        tmp_path / "t.parquet", out=tmp_path / "out", class_map=a_map(tmp_path / "m.json", {"1": "one", "2": "two", "*": "more"})
    )
    assert sorted(named(dataset).values()) == [["more"], ["more", "one"], ["one"], ["one", "two"]]
    write_files(tmp_path / "src", {"a/x.jpg": make_image(0), "b/y.jpg": make_image(0), "b/z.jpg": make_image(0)})
    with pytest.raises(PackError, match=r"label 'b' of b/y.jpg is not in class_map="):
        pack_one(tmp_path / "src", out=tmp_path / "other", class_map=a_map(tmp_path / "m.json", {"a": "x"}))


@pytest.mark.parametrize(("scores", "said"), [([0.5], "1 scores for 2 labels"), ([0.5, float("nan")], "not a finite float32")])
def test_scores_are_held_against_the_labels_as_they_came(scores: list[float], said: str, tmp_path: Path) -> None:
    """Dropping a label must not make scores fit that did not."""
    pq.write_table(pa.table({"image": [make_image(0)], "labels": [["a", "b"]], "scores": [scores]}), tmp_path / "t.parquet")
    with pytest.raises(PackError, match=said):
        pack_one(tmp_path / "t.parquet", out=tmp_path / "out", class_map=a_map(tmp_path / "m.json", {"a": "x", "b": None}))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", "{", "cannot be read"),
        ("m.json", '["a", "b"]', "it is no JSON object"),
        ("m.json", "3", "it is no JSON object"),
        ("m.json", "[" * 100_000, "cannot be read"),
        ("m.json", '{"a": 1.5}', "class 1.5 of 'a'"),
        ("m.json", '{"a": true}', "class True of 'a'"),
        ("m.json", '{"a": -1}', "class -1 of 'a'"),
        ("m.json", '{"a": {"b": 1}}', "of 'a' in class_map=.* must be a name, a number from 0, or null"),
        ("m.json", '{"a": "x", "b": "y", "a": "y"}', "label 'a' has two classes in class_map=.*, 'x' and 'y'"),
        ("m.json", '{"a": "x", "b": 2}', "names some classes and numbers others"),
        ("m.json", '{"a": null, "b": ""}', "keeps no label"),
        ("m.json", "{}", "keeps no label"),
        ("m.csv", "a,b\nc\n", "row 2 has 1 columns, not 2"),
        ("m.csv", "a,b,c\n", "row 1 has 3 columns, not 2"),
        ("m.csv", "raw,class\na,1\nb,2\n", "'class', which looks like a header; leave that out"),
        ("m.csv", 'a,"b\n', "cannot be read"),
        ("m.csv", "a,x\na,\n", "label 'a' has two classes"),
        ("m.txt", b"\xff\xfe", "cannot be read"),
        ("absent.json", None, "cannot be read"),
    ],
)
def test_a_bad_map_is_one_line(name: str, text: str | bytes | None, said: str, tmp_path: Path) -> None:
    write_files(tmp_path / "src", {"a/x.jpg": make_image(0)})
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PackError, match=said) as error:
        pack_one(tmp_path / "src", out=tmp_path / "out", class_map=str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_path_is_the_same_pack_and_another_content_is_not(tmp_path: Path) -> None:
    source = write_files(tmp_path / "src", {"a/x.jpg": make_image(0), "b/y.jpg": make_image(1)})
    here, there = a_map(tmp_path / "here.json", {"a": "x", "b": "y"}), a_map(tmp_path / "there.csv", "b,y\na,x\n")
    first = pack_one(source, out=tmp_path / "out", class_map=here)
    assert pack_one(source, out=tmp_path / "out", class_map=there).content_hash == first.content_hash
    with pytest.raises(PackError, match="the sources list other samples"):
        pack_one(source, out=tmp_path / "out", class_map=a_map(tmp_path / "here.json", {"a": "y", "b": "x"}))
    for task, text in (("0/2", {"a": "x", "b": "y"}), ("1/2", {"a": "x", "b": "x"})):
        config = PackConfig((str(source),), str(tmp_path / "shares"), class_map=a_map(tmp_path / "m.json", text), task=task)
        if task == "0/2":
            assert pack(config) == ()
        else:
            with pytest.raises(OtherPackError, match=r"the sources are not those that .* was begun with .*listing: "):
                pack(config)


def test_a_second_split_keeps_the_classes(tmp_path: Path) -> None:
    class_map = a_map(tmp_path / "m.json", {"a": "x", "b": "y", "c": "z"})
    train, val = (write_files(tmp_path / name, {f"{name[0]}/1.jpg": make_image(0)}) for name in ("a-train", "c-val"))
    pack_one(train, out=tmp_path / "out", class_map=class_map)
    assert named(pack_one(val, out=tmp_path / "out", split="val", class_map=class_map)) == {"c_1": ["z"]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1, width=32)), max_size=4), min_size=1, max_size=12),
    class_map=st.dictionaries(st.integers(0, 6), st.none() | st.sampled_from("xyz"), min_size=7).filter(lambda of: any(of.values())),
    scored=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_any_map(samples: list, class_map: dict, scored: list[bool], tmp_path: Path) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    columns = {
        "image": [make_image(0)] * len(samples),
        "labels": pa.array([[label for label, _ in pairs] for pairs in samples], pa.list_(pa.int64())),
        "scores": pa.array([[s for _, s in pairs] if scored[i] else [] for i, pairs in enumerate(samples)], pa.list_(pa.float64())),
        "key": [f"k{i}" for i in range(len(samples))],
    }
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=3)
    told = a_map(folder / "m.json", {str(raw): name for raw, name in class_map.items()})
    dataset = pack_one(folder / "t.parquet", out=folder / "out", class_map=told)
    assert dataset.class_names == tuple(sorted({name for name in class_map.values() if name}))
    for i, pairs in enumerate(samples):
        merged: dict[str, float] = {}
        for raw, score in pairs:
            if name := class_map[raw]:
                merged[name] = max(merged.get(name, 0.0), score if scored[i] else 1.0)
        _, labels, weights = contents(dataset)[f"k{i}"]
        assert ([dataset.class_names[label] for label in labels], weights) == (list(merged), list(merged.values()))


def test_a_large_map_is_read_as_it_stands(tmp_path: Path) -> None:
    found = read_class_map(a_map(tmp_path / "m.csv", "".join(f"n{i:08d},{i % 1000}\n" for i in range(20_000))))
    assert (len(found.classes), found.found.largest, found.found.names) == (20_000, 999, None)


def test_a_map_tells_01_from_1(tmp_path: Path) -> None:
    """Of a CSV labels are text to it, whatever they look like."""
    write_files(tmp_path, {f"{i}.jpg": make_image(i) for i in range(4)})
    (tmp_path / "t.csv").write_text("path,label\n0.jpg,01\n1.jpg,02\n2.jpg,1\n3.jpg,03\n")
    (tmp_path / "map.json").write_text('{"01": "a", "02": "b", "1": "c", "*": "other"}')
    dataset = pack_one(tmp_path / "t.csv", out=tmp_path / "out", class_map=str(tmp_path / "map.json"))
    labels, _ = dataset.labels(np.arange(4))
    assert dataset.class_names is not None
    assert {dataset.key(i): dataset.class_names[labels[i][0]] for i in range(4)} == {"0": "a", "1": "b", "2": "c", "3": "other"}
