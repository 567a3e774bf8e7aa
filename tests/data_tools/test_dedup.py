"""Duplicates: what is removed has a witness that stays, and the search misses nothing that a comparison of all pairs shows."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_tools import dedup as module
from data_tools.amend import amend, keys_of, removals, write_overlay
from data_tools.dataset import Dataset, DatasetError
from data_tools.dedup import ROW, DedupError, Search, bands, dedup, hash_datasets, perceptual_hash
from data_tools.progress import no_update
from data_tools.repair import repair
from data_tools.verify import verify
from tests.command import vitscale

from .conftest import pack_one, write_files


def picture(number: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A smooth picture with shapes of many sizes, another one for each number; large ones have the content of small ones."""
    rng = np.random.default_rng(number)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC), np.float32) / n
        for n in (3, 6, 12, 24)
    ]
    mixed = np.sum(layers, axis=0)
    return Image.fromarray(((mixed - mixed.min()) / np.ptp(mixed) * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, and of some of them: the same file, a small one, a heavily compressed one, a mirrored one, a PNG. Two plain ones."""
    folder = tmp_path_factory.mktemp("pictures")
    files = {f"a/{i:02d}.jpg": encoded(picture(i), quality=90) for i in range(20)}
    files["b/same-03.jpg"] = files["a/03.jpg"]
    files["b/small-04.jpg"] = encoded(picture(4).resize((120, 90)), quality=80)
    files["b/coarse-05.jpg"] = encoded(picture(5), quality=35)
    files["b/mirrored-06.jpg"] = encoded(ImageOps.mirror(picture(6)), quality=85)
    files["b/png-07.png"] = encoded(picture(7), "PNG")
    files["b/large-08.jpg"] = encoded(picture(8).resize((480, 360)), quality=90)
    files["b/faint-11.jpg"] = encoded(Image.eval(picture(11), lambda value: 110 + value // 16), quality=95)
    files["b/plain-grey.png"] = encoded(Image.new("RGB", (64, 64), (90, 90, 90)), "PNG")
    files["b/plain-grey-too.png"] = encoded(Image.new("RGB", (64, 64), (91, 91, 91)), "PNG")
    write_files(folder / "src", files)
    held_out = {
        "a/x.jpg": encoded(picture(9).resize((200, 150)), quality=70),
        "a/y.jpg": files["a/10.jpg"],
        "a/z.jpg": encoded(picture(77)),
    }
    write_files(folder / "held-out", {**held_out, "b/w.jpg": encoded(picture(78))})
    return folder


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Dataset:
    return pack_one(folder / "src", out=tmp_path / "packed", samples_per_shard=6)


@pytest.fixture
def held_out(folder: Path, tmp_path: Path) -> Dataset:
    return pack_one(folder / "held-out", out=tmp_path / "held-out", split="val")


EXPECTED = {  # removed: the one that stays
    "b_same-03": "a_03", "b_small-04": "a_04", "b_coarse-05": "a_05", "b_mirrored-06": "a_06", "b_png-07": "a_07", "a_08": "b_large-08",
    "b_faint-11": "a_11",
}  # fmt: skip


def removed_keys(path: Path) -> set[str]:
    dataset = Dataset.open(path)
    return {dataset.key(i) for i in range(dataset.num_samples) if dataset.overlay.is_removed(i)}


def test_copies_inside_go_and_the_largest_stays(packed: Dataset, tmp_path: Path) -> None:
    report = dedup(packed.path, listing=tmp_path / "list.csv")
    rows = {row["key"]: row for row in csv.DictReader((tmp_path / "list.csv").open())}
    pairs = {frozenset((key, row["copy_of"])) for key, row in rows.items()}
    assert pairs == {frozenset(pair) for pair in EXPECTED.items()}
    assert rows["a_08"]["copy_of"] == "b_large-08"
    assert removed_keys(packed.path) == set(rows)
    assert (report.same_file, report.near, report.plain, report.unreadable) == (1, 6, 3, 0)
    assert rows["b_same-03" if "b_same-03" in rows else "a_03"]["reason"].startswith("same file as")
    unlike = {row["key"] for row in rows.values() if row["other_labels"] == "true"}
    assert unlike == set(rows), "class a and class b are the same pictures"
    assert report.other_labels == len(rows)
    assert verify(packed.path).problems == ()
    again = dedup(packed.path)
    assert (again.same_file + again.near, again.overlay) == (0, None)


def test_every_witness_stays(tmp_path: Path) -> None:
    files = {"a/large.jpg": encoded(picture(0, (480, 360)), quality=95)}
    files |= {f"a/{name}.jpg": encoded(picture(0)) for name in ("one", "two", "three")}
    dataset = pack_one(write_files(tmp_path / "src", files), out=tmp_path / "out")
    report = dedup(dataset.path, listing=tmp_path / "list.csv")
    with (tmp_path / "list.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {row["copy_of"] for row in rows} == {"a_large"}
    assert all(row["reason"].startswith("near duplicate of a_large") for row in rows)
    assert (report.same_file, report.near) == (0, 3)


def test_what_an_evaluation_set_has_goes(packed: Dataset, held_out: Dataset) -> None:
    report = dedup(packed.path, (held_out.path,), inside=False)
    assert removed_keys(packed.path) == {"a_09", "a_10"}
    assert (report.leaked, report.near, report.same_file) == ({str(held_out.path): 2}, 0, 0)
    assert not (held_out.path / "overlay").exists()


def test_mirrored_copies_only_if_asked_for(packed: Dataset) -> None:
    dedup(packed.path, mirror=False)
    assert not removed_keys(packed.path) & {"a_06", "b_mirrored-06"}


def test_a_person_may_strike_removals_out(packed: Dataset, tmp_path: Path) -> None:
    report = dedup(packed.path, listing=tmp_path / "list.csv", dry_run=True)
    assert (report.overlay, removed_keys(packed.path)) == (None, set())
    lines = (tmp_path / "list.csv").read_text().splitlines(keepends=True)
    (tmp_path / "list.csv").write_text("".join(line for line in lines if "png-07" not in line))
    amend(packed, "dedup", file=tmp_path / "list.csv")
    assert len(removed_keys(packed.path)) == len(EXPECTED) - 1
    assert not removed_keys(packed.path) & {"b_png-07", "a_07"}


def test_what_is_removed_already_is_nobodys_witness(packed: Dataset) -> None:
    amend(packed, "takedown", remove=("a_03", "b_large-08"))
    first, second = dedup(packed.path), dedup(packed.path)
    assert (first.same_file, first.near, second.same_file + second.near) == (0, 5, 0)
    removed = removed_keys(packed.path)
    assert {"a_03", "b_large-08"} <= removed
    assert not removed & {"b_same-03", "a_08"}
    assert len(removed) == len(EXPECTED)


def test_too_far_a_distance_and_the_set_itself_are_refused(packed: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DedupError, match=r"distance=64 must be in 0\.\.47"):
        dedup(packed.path, distance=64)
    with pytest.raises(DedupError, match="is the dataset itself"):
        dedup(packed.path, (packed.path,))
    with pytest.raises(DedupError, match=r"must end in \.csv or \.parquet"):
        dedup(packed.path, listing=tmp_path / "list.txt")
    assert not (packed.path / ".dedup").exists()


def test_damage_is_counted_and_in_nobodys_way(packed: Dataset) -> None:
    name = packed.shard_of(0)
    tar = bytearray((packed.path / name).read_bytes())
    image = packed.read(0)
    at = tar.find(image)
    tar[at + 20] ^= 255
    (packed.path / name).write_bytes(tar)
    assert dedup(packed.path).unreadable == 1
    assert packed.key(0) not in removed_keys(packed.path)


def flip(dataset: Dataset, sample: int) -> None:
    tar = dataset.path / dataset.shard_of(sample)
    data = bytearray(tar.read_bytes())
    data[data.find(dataset.read(sample)) + 20] ^= 255
    tar.write_bytes(data)


def test_what_was_damaged_and_is_whole_again_is_hashed_again(packed: Dataset, tmp_path: Path) -> None:
    expected = dedup(packed.path, dry_run=True, work=tmp_path / "apart")
    copy = shutil.copytree(packed.path, tmp_path / "copy")
    for shard in range(len(packed.shard_names)):
        flip(packed, int(packed.first_samples[shard]))
    assert dedup(packed.path, dry_run=True).unreadable == len(packed.shard_names)
    repair(packed.path, (str(copy),))
    assert dedup(packed.path, dry_run=True) == expected


def test_a_file_that_is_damaged_in_an_evaluation_set_is_a_leak_all_the_same(packed: Dataset, tmp_path: Path) -> None:
    write_files(tmp_path / "same", {"c/x.jpg": packed.read(0), "c/y.jpg": encoded(picture(99))})
    held_out = pack_one(tmp_path / "same", out=tmp_path / "held")
    numbers = {held_out.read(i): i for i in range(2)}
    flip(held_out, numbers[packed.read(0)])
    dedup(packed.path, (held_out.path,), inside=False)
    assert packed.key(0) in removed_keys(packed.path)


def test_what_is_removed_from_an_evaluation_set_is_no_leak(packed: Dataset, held_out: Dataset) -> None:
    assert sum(dedup(packed.path, (held_out.path,), inside=False, dry_run=True).leaked.values()) > 0
    write_overlay(held_out, "all", removals(np.arange(len(held_out)), pa.array([""] * len(held_out))))
    assert sum(dedup(packed.path, (held_out.path,), inside=False, dry_run=True).leaked.values()) == 0


def test_a_leak_of_the_same_file_is_called_so(packed: Dataset, tmp_path: Path) -> None:
    write_files(tmp_path / "same", {"c/x.jpg": packed.read(0)})
    held_out = pack_one(tmp_path / "same", out=tmp_path / "held")
    dedup(packed.path, (held_out.path,), inside=False, listing=tmp_path / "list.csv", dry_run=True)
    with (tmp_path / "list.csv").open() as file:
        reasons = {row["key"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons[packed.key(0)].startswith("same file as c_x in ")


def test_a_tar_that_cannot_be_read_is_no_tar_of_damaged_images(packed: Dataset) -> None:
    """Only what is given up may be missing: else a folder that is not mounted would hide all copies in it."""
    tar = packed.path / packed.shard_names[0]
    whole = tar.read_bytes()
    tar.write_bytes(b"")
    with pytest.raises(DatasetError):
        dedup(packed.path, dry_run=True)
    tar.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "_check_shards", lambda self, there: None)  # as if it went away after the start
        with pytest.raises(OSError, match="No such file"):
            dedup(packed.path, dry_run=True)
    tar.write_bytes(whole)
    assert dedup(packed.path, dry_run=True).unreadable == 0


# -- the search, on hashes alone --------------------------------------------------------------------------------------------------------


class Hashed:
    """Stands for a dataset of which only hashes are known."""

    def __init__(self, size: int) -> None:
        self.num_samples = size
        self.overlay = type("", (), {"removed": staticmethod(lambda samples: np.zeros(len(samples), dtype=bool))})

    def hash_batches(self) -> list[tuple[int, np.ndarray]]:
        return [(0, np.arange(self.num_samples, dtype=np.uint64))]


def rows_with_copies(size: int, seed: int, most: int) -> np.ndarray:
    """Random hashes, a third of which have up to `most` bits of an earlier one changed, and mirrored ones likewise."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(size, ROW)
    rows["hash"], rows["mirrored"], rows["quality"] = rng.integers(0, 256, (size, 32)), rng.integers(0, 256, (size, 32)), 100
    for i in rng.choice(np.arange(1, size), size // 3, replace=False).tolist():
        flips = np.zeros(256, dtype=np.uint8)
        flips[rng.choice(256, rng.integers(0, most + 1), replace=False)] = 1
        rows["hash" if i % 4 else "mirrored"][i] = rows["hash"][rng.integers(0, i)] ^ np.packbits(flips)
    return rows


def greedy(rows: np.ndarray, distance: int, pixels: np.ndarray) -> dict[int, int]:
    """The rule by all pairs: who is removed, and how far its nearest witness is."""
    order = np.argsort(-pixels, kind="stable")
    kept: list[int] = []
    gone: dict[int, int] = {}
    for sample in order.tolist():
        both = [np.bitwise_count(rows[which][sample] ^ rows["hash"][kept]).sum(axis=1) for which in ("hash", "mirrored")]
        near = int(np.concatenate(both).min(initial=999))
        if near <= distance:
            gone[sample] = near
        else:
            kept.append(sample)
    return gone


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(2, 600),
    st.integers(0, 10**6),
    st.sampled_from([0, 9, 31, 47]),
    st.sampled_from([50, 128, 10**6]),
    st.sampled_from([0, 10**6]),
)
def test_the_search_is_the_rule_by_all_pairs(size: int, seed: int, distance: int, block: int, probed: int) -> None:
    """Whatever blocks and batches it works in, and by bands as by comparing all."""
    rows = rows_with_copies(size, seed, distance + 8)
    pixels = np.random.default_rng(seed).integers(1, 5, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_pixels", lambda dataset: pixels)
        patch.setattr(module, "BATCH", random.Random(seed).choice([1, 7, 64, 4096]))
        patch.setattr(module, "PROBED", probed)
        found = Search([Hashed(size)], [rows], distance, 50, True, block).run(inside=True)  # type: ignore[list-item]
    expected = greedy(rows, distance, pixels)
    assert found.samples.tolist() == sorted(expected)
    stays = set(range(size)) - set(expected)
    assert set(found.witness.tolist()) <= stays
    for sample, witness, far in zip(found.samples.tolist(), found.witness.tolist(), found.distance.tolist(), strict=True):
        of_both = [int(np.bitwise_count(rows[which][sample] ^ rows["hash"][witness]).sum()) for which in ("hash", "mirrored")]
        assert far == min(of_both) <= distance


def test_among_many_nothing_is_missed_up_to_the_distance_that_is_promised() -> None:
    """150,000 hashes, searched by bands of 18 bits; further apart hardly anything is."""
    size, rng = 150_000, np.random.default_rng(0)
    count, bits, flips = bands(size, 31)
    assert (bits, flips) == (18, 1)
    hashes = rng.integers(0, 256, (size, 32), dtype=np.uint8)
    index = module._index(hashes, 31)
    for far in (count * (flips + 1) - 1, 31):
        flipped = np.zeros((500, 256), dtype=np.uint8)
        for row in flipped:
            row[rng.choice(256, far, replace=False)] = 1
        lims, distances, matches = index.range_search(hashes[:500] ^ np.packbits(flipped, axis=1), 32)
        owner = np.repeat(np.arange(500), np.diff(lims).astype(np.int64))
        assert (distances[matches == owner] == far).all()
        found = np.isin(np.arange(500), owner[matches == owner]).mean()
        assert found == 1 if far < 31 else found > 0.97


@pytest.mark.parametrize("distance", [0, 15, 16, 31, 32, 47])
def test_bands_of_a_small_search_miss_nothing(distance: int) -> None:
    for size in (2, 40_000, 65_536):
        count, bits, flips = bands(size, distance)
        assert count * bits <= 256
        assert count * (flips + 1) - 1 >= distance


def test_a_hash_does_not_depend_on_size_or_coding() -> None:
    base = picture(3)
    reference = np.frombuffer(perceptual_hash(encoded(base, "PNG"))[0], np.uint8)
    for image, settings_ in ((base, {"quality": 60}), (base.resize((480, 360)), {"quality": 90}), (base.convert("L"), {"quality": 90})):
        for kind in ("JPEG", "WEBP"):
            other = np.frombuffer(perceptual_hash(encoded(image, kind, **settings_))[0], np.uint8)
            assert np.bitwise_count(reference ^ other).sum() <= 16
    plain, mirrored, quality = perceptual_hash(encoded(base, "PNG"))
    assert perceptual_hash(encoded(ImageOps.mirror(base), "PNG")) == (mirrored, plain, quality)
    assert np.bitwise_count(reference ^ np.frombuffer(mirrored, np.uint8)).sum() > 64


def test_hashes_survive_a_kill_and_are_used_again(packed: Dataset, tmp_path: Path) -> None:
    whole = dedup(packed.path, listing=tmp_path / "whole.csv", dry_run=True, work=tmp_path / "whole")
    code = (
        "import os, signal, sys; from pathlib import Path; from data_tools import dedup\n"
        "work, count = dedup._hash_shard, 0\n"
        "def stopping(*given):\n"
        "    global count; count += 1\n"
        "    if count == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    work(*given)\n"
        "dedup._hash_shard = stopping\n"
        "dedup.dedup(Path(sys.argv[1]), work=Path(sys.argv[2]), dry_run=True)"
    )
    killed = subprocess.run([sys.executable, "-c", code, packed.path, tmp_path / "work"], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    (done,) = (tmp_path / "work").glob("*.done")
    assert list(done.read_bytes()) == [1, 1, 0, 0, 0]
    assert dedup(packed.path, listing=tmp_path / "again.csv", dry_run=True, work=tmp_path / "work") == whole
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("*.rows")}
    dedup(packed.path, distance=3, dry_run=True, work=tmp_path / "work")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("*.rows")}, "nothing was hashed again"
    (rows,) = before
    rows.unlink()
    assert dedup(packed.path, dry_run=True, work=tmp_path / "work") == whole, "lost hashes are made again"


def test_processes_hash_the_same(packed: Dataset, tmp_path: Path) -> None:
    (one,) = hash_datasets([packed], _made(tmp_path / "one"), 1, no_update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES_A_PROCESS", 5)
        (three,) = hash_datasets([packed], _made(tmp_path / "three"), 3, no_update)
    assert one.tobytes() == three.tobytes()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_keys_in_any_order(packed: Dataset) -> None:
    samples = np.array(random.Random(0).choices(range(packed.num_samples), k=40))
    assert keys_of(packed, samples).to_pylist() == [packed.key(i) for i in samples.tolist()]
    assert keys_of(packed, samples[:0]).to_pylist() == []


def test_a_lost_shard_that_is_given_up_stops_nothing(packed: Dataset) -> None:
    (packed.path / packed.shard_names[0]).unlink()
    write_overlay(packed, "lost", removals(np.arange(6), pa.array(["lost"] * 6)))
    assert dedup(packed.path).samples == packed.num_samples - 6


def test_the_command(packed: Dataset, held_out: Dataset, tmp_path: Path) -> None:
    words = ("data", "dedup", str(packed.path), "--against", str(held_out.path), "--list", str(tmp_path / "list.parquet"))
    told = json.loads(vitscale(*words, "--dry-run", "--json").stdout)
    assert (told["same_file"], told["near"], told["leaked"]) == (1, 6, {str(held_out.path): 2})
    done = vitscale(*words)
    assert "9 removed" in done.stdout, done.stderr
    assert "nothing to remove" in vitscale(*words[:5]).stdout
