"""DALI's and Energon's readers take the indices that `data index` writes, of tars that `pack` wrote and of others; so do their own makers.

Those that need the libraries run under `make peers`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import IndexConfig
from data_tools.dataset import Dataset, DatasetError
from data_tools.index import index
from data_tools.members import TarError
from data_tools.peer_indices import DALI, ENERGON, KINDS, index_file, write_indices
from data_tools.verify import Problem, verify

from .conftest import make_image, pack_one, write_files
from .test_index import sample, write_tar


@pytest.fixture(params=["packed", "foreign"])
def indexed(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """A dataset with both indices."""
    if request.param == "packed":
        photos = write_files(tmp_path / "photos", {f"{i % 3}/{i:02d}.jpg": make_image(i, size=(20, 16)) for i in range(23)})
        dataset = pack_one(photos, out=tmp_path / "out", samples_per_shard=5, write_cls=True)
    else:
        folder = tmp_path / "tars"
        write_tar(folder / "a.tar", [("dir", None), *sample(0, txt=b"a"), *sample(1, "dir/sub/one")])
        write_tar(folder / "b.tar", [*sample(2, "a" * 60 + "/" + "b" * 90), *sample(3)], tarfile.PAX_FORMAT, mtime=1.5)
        write_tar(folder / "c.tar", [*sample(4, "a" * 60 + "/" + "c" * 120), *sample(5)], tarfile.GNU_FORMAT)
        index(IndexConfig((str(folder),), jobs=1))
        dataset = Dataset.open(folder)
    write_indices(tars_of(dataset), KINDS)
    return dataset


def tars_of(dataset: Dataset) -> list[Path]:
    return [dataset.path / name for name in dataset.shard_names]


def expected(dataset: Dataset) -> list[tuple[bytes, bytes]]:
    """Image and first label of each sample."""
    labels, _ = dataset.labels(np.arange(dataset.num_samples))
    return [(dataset.read(number), str(labels[number, 0]).encode()) for number in range(dataset.num_samples)]


def test_offsets_are_those_of_tarfile(indexed: Dataset) -> None:
    for tar in tars_of(indexed):
        with tarfile.open(tar) as opened:
            members = {member.name: member for member in opened.getmembers() if member.isreg()}
        lines = index_file(tar, DALI).read_text().splitlines()
        words = [word for line in lines[1:] for word in line.split()]
        told = {name: (suffix, int(at), int(size)) for suffix, at, size, name in zip(*(words[i::4] for i in range(4)), strict=True)}
        assert told == {name: (name.rpartition(".")[2], member.offset_data, member.size) for name, member in members.items()}
        starts = np.fromfile(index_file(tar, ENERGON), np.uint64)
        assert len(starts) == len(lines) == int(lines[0].split()[1]) + 1
        assert {int(start) for start in starts[:-1]} <= {member.offset for member in members.values()}
        assert tar.read_bytes()[int(starts[-1]) :].strip(b"\0") == b""


def test_every_flipped_bit_is_found_and_the_index_no_stranger(indexed: Dataset) -> None:
    assert verify(indexed.path).problems == ()
    rng = random.Random(0)
    for tar in tars_of(indexed)[:2]:
        for kind in KINDS:
            file = index_file(tar, kind)
            whole = file.read_bytes()
            name = file.relative_to(indexed.path).as_posix()
            for _ in range(15):
                data = bytearray(whole)
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                file.write_bytes(data)
                assert verify(indexed.path).problems == (Problem(name, f"is not {KINDS[kind]}'s index of this tar"),)
            file.unlink()
            assert verify(indexed.path).problems == (Problem(name, f"is missing, and other tars have {KINDS[kind]}'s index"),)
            file.write_bytes(whole)
    assert write_indices(tars_of(indexed), KINDS).written == 0


def test_another_s_file_is_not_overwritten(packed: Dataset) -> None:
    tars = tars_of(packed)
    index_file(tars[2], DALI).write_bytes(b"mine")
    with pytest.raises(DatasetError, match=r"000002.idx is there and is not DALI's index of train-000002.tar"):
        write_indices(tars, [DALI])
    assert index_file(tars[2], DALI).read_bytes() == b"mine"


def test_a_name_that_dali_cannot_read_and_a_tar_without_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample(0, "with space"))
    with pytest.raises(TarError, match=r"a.tar holds 'with space\.(jpg|cls)', which DALI's index cannot hold"):
        write_indices([tmp_path / "a.tar"], [DALI])
    assert write_indices([tmp_path / "a.tar"], [ENERGON]).written == 1
    write_tar(tmp_path / "b.tar", [])
    assert write_indices([tmp_path / "b.tar"], KINDS).written == 0


@pytest.mark.peers
def test_dali_reads_every_sample(indexed: Dataset) -> None:
    from nvidia.dali import fn, pipeline_def

    tars = tars_of(indexed)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # no GPU
    def pipeline() -> Any:
        return tuple(
            fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(index_file(tar, DALI)) for tar in tars],
                ext=["jpg;jpeg;png;webp", "cls"],
                missing_component_behavior="error",
                name="webdataset",
            )
        )

    running = pipeline()
    running.build()
    assert running.reader_meta("webdataset")["epoch_size"] == indexed.num_samples
    read = [tuple(bytes(part.at(0)) for part in running.run()) for _ in range(indexed.num_samples)]
    assert read == expected(indexed)


@pytest.mark.peers
def test_dali_s_own_tool_makes_the_same_index(indexed: Dataset, tmp_path: Path) -> None:
    for tar in tars_of(indexed):
        if tar.name == "c.tar":  # GNU's long names, of which it takes the header for the data; DALI reads ours, see above
            continue
        theirs = tmp_path / "theirs.idx"
        subprocess.run([str(Path(sys.executable).with_name("wds2idx")), str(tar), str(theirs)], check=True, capture_output=True)
        assert index_file(tar, DALI).read_bytes() == theirs.read_bytes()


@pytest.mark.peers
def test_energon_reads_every_sample_and_makes_the_same_index(indexed: Dataset) -> None:
    from megatron import energon
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    ours = {tar: index_file(tar, ENERGON).read_bytes() for tar in tars_of(indexed)}
    for tar in ours:
        index_file(tar, ENERGON).unlink()
    WebdatasetPreparator.prepare_dataset(
        indexed.path, list(indexed.shard_names), split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    assert {tar: index_file(tar, ENERGON).read_bytes() for tar in ours} == ours
    for tar in ours:
        index_file(tar, ENERGON).unlink()
    write_indices(list(ours), [ENERGON])
    assert verify(indexed.path).problems == (), "what `energon prepare` leaves is known"
    (indexed.path / ".nv-meta/dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    @energon.edataclass
    class Raw(energon.Sample):  # type: ignore[misc,name-defined]
        image: bytes
        label: bytes

    @energon.stateless  # type: ignore[misc]
    def cook(sample: dict[str, Any]) -> Raw:
        return Raw(**energon.basic_sample_keys(sample), image=sample["jpg"], label=sample["cls"])

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc,name-defined]
        decoder = None
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

    dataset = energon.get_val_dataset(
        indexed.path,
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=Encoder(),
    )
    read = [(sample.image, sample.label) for sample in energon.get_loader(dataset)]
    assert sorted(read) == sorted(expected(indexed))
