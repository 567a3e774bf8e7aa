"""`data verify` finds every flipped bit, names what is lost, and finds nothing in what is whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_tools.dataset import Dataset, DatasetError
from data_tools.verify import Problem, verify

from .conftest import make_image, pack_one, tree, write_files


@pytest.fixture
def whole(photos: Path, tmp_path: Path) -> Dataset:
    """A dataset with every kind of file there is."""
    write_files(photos, {"cat/broken.jpg": b"no image"})
    return pack_one(photos, out=tmp_path / "whole", samples_per_shard=5)


def test_a_whole_dataset_has_no_problem(whole: Dataset) -> None:
    report = verify(whole.path, decode=True)
    assert (report.problems, report.samples, report.decoded, report.content_hash) == ((), 23, 23, whole.content_hash)
    assert report.files == len(tree(whole.path)) - 1  # dataset.json is what the others are held against
    assert report.bytes == sum(len(data) for name, data in tree(whole.path).items() if name != "dataset.json")


def test_every_flipped_bit_is_found_and_its_file_named(whole: Dataset) -> None:
    """Five hundred of them, in every file of the dataset."""
    files = sorted(tree(whole.path))
    assert {name.partition(".")[2] for name in files} >= {"json", "parquet", "arrow", "txt", "tar"}
    rng = random.Random(0)
    for number in range(500):
        file = whole.path / files[number % len(files)]
        content = file.read_bytes()
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        if file.name == "dataset.json":
            with pytest.raises(DatasetError):
                verify(whole.path)
        else:
            assert file.relative_to(whole.path).as_posix() in {problem.file for problem in verify(whole.path).problems}
        file.write_bytes(content)
    assert verify(whole.path).problems == ()


def test_of_a_damaged_tar_the_lost_samples_are_named(whole: Dataset) -> None:
    file = whole.path / whole.shard_names[1]
    content = bytearray(file.read_bytes())
    content[content.find(whole.read(7)) + 9] ^= 1
    file.write_bytes(content)
    problems = verify(whole.path).problems
    assert problems[0] == Problem(whole.shard_names[1], "does not have the xxh3_128 in the manifest")
    assert [(problem.sample, problem.key) for problem in problems[1:]] == [(7, whole.key(7))]
    file.write_bytes(content[:-700])
    assert "bytes, the manifest says" in verify(whole.path).problems[0].what
    file.unlink()
    assert verify(whole.path).problems == (Problem(whole.shard_names[1], "is missing"),)


def test_what_does_not_belong_is_named(whole: Dataset) -> None:
    write_files(whole.path, {"shards/000/extra.tar": b""})
    assert verify(whole.path).problems == (Problem("shards/000/extra.tar", "is not a file of this dataset"),)


def test_images_that_do_not_decode_are_found_if_asked_for(tmp_path: Path) -> None:
    image = bytearray(make_image(0, "PNG", (64, 48)))
    image[len(image) // 2 : len(image) // 2 + 99] = bytes(99)
    write_files(tmp_path / "src", {"a/good.png": make_image(1, "PNG"), "a/bad.png": bytes(image)})
    dataset = pack_one(tmp_path / "src", out=tmp_path / "out", check_images="header")
    assert verify(dataset.path).problems == ()
    (problem,) = verify(dataset.path, decode=True).problems
    assert problem.key == "a_bad"
    assert "does not decode" in problem.what


def test_a_share_of_the_tars_is_a_share(whole: Dataset) -> None:
    shares = [verify(whole.path, share=share).samples for share in (0.01, 0.3, 0.6, 1)]
    assert shares == sorted(shares)
    assert shares[0] < 23 == shares[-1]
