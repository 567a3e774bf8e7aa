"""Packing from and to a real S3 server that fails one request in twenty: the bytes are those of a pack on the disk."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pickle
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import remote_out, storage
from data_tools.config import PackConfig, PackError
from data_tools.dataset import Dataset, DatasetError
from data_tools.images import Reject
from data_tools.origins import Origin, locate, read_images
from data_tools.pack import OtherPackError, pack
from data_tools.storage import Missing, RemoteFile, StorageError, Url, delete, in_turn, put, put_new, read_object, walk

from .conftest import ROOT, Server, contents, make_image, pack_one, tree, upload, write_files, write_table
from .object_server import KINDS


def objects(url: Url) -> dict[str, bytes]:
    """As `tree` of a folder."""
    return {path: read_object(url / path, 1 << 30) for path in walk(url)}  # type: ignore[misc]


def make_sources(folder: Path, images: int = 60) -> dict[str, str]:
    """Each kind of source with the same images, some of them bad, as files below the folder: kind -> name of the source."""
    data = {f"class-{i % 4}/{i:02d}.jpg": b"no image" if i % 17 == 3 else make_image(i) for i in range(images)}
    write_files(folder / "photos", {**data, "class-1/deep/er.jpg": make_image(90), "class-1/deep.jpg": make_image(91), "class-1/.no": b""})
    labels = [name.split("/")[0] for name in data]
    (folder / "tables").mkdir()
    for part, kind in enumerate(("parquet", "feather", "arrow")):
        third = slice(part * images // 3, (part + 1) * images // 3)
        table = pa.table({"image": list(data.values())[third], "label": labels[third]})
        write_table(table, folder / f"tables/part-{part}", kind)
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"photos/{n}", of) for n, of in zip(data, labels, strict=True)), ("gone.jpg", "x")]
        )
    lines = [json.dumps({"path": f"photos/{n}", "labels": [of]}) for n, of in zip(data, labels, strict=True)]
    (folder / "photos.jsonl").write_text("\n".join(lines))
    structs = [{"bytes": None, "path": f"photos/{n}"} if i % 3 else {"bytes": d, "path": n} for i, (n, d) in enumerate(data.items())]
    pq.write_table(pa.table({"image": structs, "label": labels}), folder / "structs.parquet")
    (folder / "tars").mkdir()
    for part in range(2):
        with tarfile.open(folder / f"tars/{part}.tar", "w") as tar:
            for i, image in enumerate(list(data.values())[part::2]):
                for name, content in ((f"{part}-{i:03d}.jpg", image), (f"{part}-{i:03d}.cls", str(i % 5).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    names = ("photos", "tables", "photos.csv", "photos.jsonl", "structs.parquet", "tars")
    return {Path(name).name: name for name in names} | {"table": "tables/part-0.parquet", "tar": "tars/1.tar"}


KINDS_OF_SOURCE = ("photos", "tables", "photos.csv", "photos.jsonl", "structs.parquet", "tars", "table", "tar")


def test_every_source_gives_the_bytes_that_it_gives_on_a_disk(tmp_path: Path, server: Server, bucket: Url) -> None:
    sources = make_sources(tmp_path / "here")
    there = upload(tmp_path / "here", bucket / "some" / "where")
    put(there / "photos/class-1/deep/", b"")  # as consoles make for a folder
    for number, kind in enumerate(KINDS_OF_SOURCE):
        local = pack_one(tmp_path / "here" / sources[kind], out=tmp_path / f"{kind}-here", samples_per_shard=7)
        server.set(rate=0.05, seed=number)
        pack_one(there / sources[kind], out=tmp_path / f"{kind}-there", samples_per_shard=7, jobs=1)
        assert tree(tmp_path / f"{kind}-there") == tree(tmp_path / f"{kind}-here"), kind
        assert local.num_samples
    told = server.set()
    assert told["asked"]
    both = [str(there / sources[kind]) for kind in ("photos", "tables")]
    server.set(rate=0.05, seed=99)
    pack_one(*(tmp_path / "here" / sources[kind] for kind in ("photos", "tables")), out=tmp_path / "two-here", shuffle_seed=None)
    pack_one(*both, out=tmp_path / "two-there", shuffle_seed=None)
    assert sum(server.set()["spoiled"].values()) > 0
    assert tree(tmp_path / "two-there") == tree(tmp_path / "two-here")


@pytest.mark.parametrize("kind", ["photos", "tables", "structs.parquet", "tars"])
def test_shards_end_at_the_same_bytes(tmp_path: Path, server: Server, bucket: Url, kind: str) -> None:
    sources = make_sources(tmp_path / "here")
    there = upload(tmp_path / "here", bucket / "sizes")
    local = pack_one(tmp_path / "here" / sources[kind], out=tmp_path / "out-here", shard_bytes=20_000)
    pack_one(there / sources[kind], out=tmp_path / "out-there", shard_bytes=20_000, jobs=1)
    assert len(local.shard_names) > 1
    assert tree(tmp_path / "out-there") == tree(tmp_path / "out-here")


@pytest.mark.parametrize("kind", ["photos", "tables"])
def test_a_dataset_in_a_bucket_has_the_bytes_of_one_on_a_disk(tmp_path: Path, server: Server, bucket: Url, kind: str) -> None:
    source = str(tmp_path / "here" / make_sources(tmp_path / "here")[kind])
    if kind == "photos":
        source = str(upload(Path(source), bucket / "photos"))
    how: dict[str, Any] = {"samples_per_shard": 7, "val_fraction": 0.3}
    here = pack(PackConfig((source,), str(tmp_path / "out"), **how))
    server.set(rate=0.05, seed=1)
    most: list[int] = []

    def count_tars(*_: int) -> None:
        most.append(len(list((tmp_path / "work").rglob("*.tar"))))

    config = PackConfig((source,), str(bucket / "out"), work=str(tmp_path / "work"), jobs=2, **how)
    results = pack(config, count_tars)
    asked = server.set()
    assert sum(asked["spoiled"].values()) > 0
    assert objects(bucket / "out") == tree(tmp_path / "out")
    assert [(of.content_hash, of.samples, of.bytes, of.reasons) for of in results] == [
        (of.content_hash, of.samples, of.bytes, of.reasons) for of in here
    ]
    assert [str(of.path) for of in results] == [f"{bucket}/out/train", f"{bucket}/out/val"]
    assert max(most) <= 2, "a process holds one tar"
    assert not (tmp_path / "work").exists()
    server.set()
    assert pack(config) == results, "a finished one is left alone"
    assert not any(method in ("PUT", "POST") for method, *_ in server.set()["asked"])
    with pytest.raises(PackError, match="is another dataset \\(samples_per_shard: 7 -> 8\\)"):
        pack(PackConfig(**{**vars(config), "samples_per_shard": 8}))
    assert not (tmp_path / "work").exists()


def test_shares_to_a_bucket(tmp_path: Path, server: Server, bucket: Url) -> None:
    source = upload(tmp_path / "here" / make_sources(tmp_path / "here")["photos"], bucket / "photos")
    how: dict[str, Any] = {"sources": (str(source),), "samples_per_shard": 7, "jobs": 1}
    pack(PackConfig(out=str(tmp_path / "out"), **how))
    server.set(rate=0.05, seed=2)
    how |= {"out": str(bucket / "out"), "work": str(tmp_path / "work")}
    assert pack(PackConfig(task="1/2", **how)) == ()
    assert pack(PackConfig(task="0/2", **how)) == ()
    told = server.set(rate=0.05, seed=3)
    assert sum(told["spoiled"].values()) > 0
    pack(PackConfig(**how))
    assert not any(method == "PUT" and path.endswith(".tar") for method, path, *_ in server.set()["asked"]), "the merge puts no tar"
    assert objects(bucket / "out") == tree(tmp_path / "out")


KILLED = """
import sys
from data_tools.config import PackConfig
from data_tools.pack import pack
sys.stdin.readline()
pack(PackConfig((sys.argv[1],), sys.argv[2], work=sys.argv[3], samples_per_shard=15, val_fraction=0.3, jobs=1))
"""


def test_killed_at_any_request_it_ends_in_the_same_bytes(tmp_path: Path, server: Server, bucket: Url) -> None:
    """The server kills the pack with one of its requests, before or after it has carried that out, and the pack is started again."""
    source = upload(tmp_path / "here" / make_sources(tmp_path / "here", 40)["photos"], bucket / "photos")
    pack(PackConfig((str(source),), str(tmp_path / "out"), samples_per_shard=15, val_fraction=0.3))
    command = [sys.executable, "-c", KILLED, str(source), str(bucket / "out"), str(tmp_path / "work")]
    kills = 0
    for number in itertools.count():
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        late = {"late": 1} if number % 2 else {}
        server.set(kill=process.pid, at=12 + 9 * number, rate=0.05, seed=number, **late)
        process.communicate(b"\n")
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    server.set()
    assert kills >= 6
    assert objects(bucket / "out") == tree(tmp_path / "out")
    assert tree(tmp_path / "work") == {}


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_fifty_kills_between_buckets(tmp_path: Path, server: Server, bucket: Url) -> None:
    """At random moments, with all their processes, of packs alone and in shares, while one request in twenty fails."""
    sources = make_sources(tmp_path / "here")
    there = upload(tmp_path / "here", bucket / "here")
    rng = random.Random(7)
    kills = 0
    for number in itertools.count():
        if kills >= 50:
            break
        kind, fraction, tasks = rng.choice(["photos", "tables", "photos.csv", "tars"]), rng.choice([0.0, 0.3]), rng.choice([0, 2])
        how: dict[str, Any] = {"sources": (str(there / sources[kind]),), "samples_per_shard": 7, "val_fraction": fraction}
        whole, out, work = tmp_path / f"whole-{kind}-{fraction}", bucket / f"out-{number}", tmp_path / f"work-{number}"
        if not whole.exists():
            pack(PackConfig(out=str(whole), **how))
        words = [how["sources"][0], str(out), "--work", str(work), "--samples-per-shard", "7", "--val-fraction", str(fraction)]
        for task in [*(["--task", f"{share}/{tasks}"] for share in range(tasks)), []]:
            patience = 0.0  # grows with each kill, so that it ends
            while True:
                server.set(rate=0.05, seed=rng.randrange(1000))
                command = [str(Path(sys.executable).with_name("vitscale")), "pack", *words, "--jobs", str(rng.choice([1, 2])), *task]
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                try:
                    assert process.wait(rng.uniform(0.3, 2.2) + patience) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills, patience = kills + 1, patience + 0.3
        server.set()
        assert objects(out) == tree(whole), (number, kind, fraction, tasks)
        assert not work.exists() or tree(work) == {}
    print(f"{kills} kills over {number} packs, all of them byte for byte the uninterrupted one")


def test_without_retries_it_fails_and_goes_on_with_them(
    tmp_path: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the server does fail requests, and what was done before is kept."""
    source = upload(tmp_path / "here" / make_sources(tmp_path / "here")["photos"], bucket / "photos")
    config = PackConfig((str(source),), str(bucket / "out"), work=str(tmp_path / "work"), samples_per_shard=3, jobs=1)
    pack(PackConfig(config.sources, str(tmp_path / "out"), samples_per_shard=3))
    with monkeypatch.context() as patched:
        patched.setattr(storage, "RETRIES", 0)
        patched.setattr(storage, "ATTEMPTS", 1)
        storage._store.cache_clear()
        server.set(rate=0.02, seed=4)
        with pytest.raises(StorageError, match="the same command goes on") as error:
            pack(config)
        assert "\n" not in str(error.value)
    storage._store.cache_clear()
    assert list((tmp_path / "work").rglob("pieces/*/*.arrow"))
    pack(config)
    assert objects(bucket / "out") == tree(tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_asked_again(server: Server, bucket: Url, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART", 5 << 20)
    monkeypatch.setattr(storage, "ATTEMPTS", 12)
    monkeypatch.setattr(storage, "WEB_ATTEMPTS", 12)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.01)
    large = np.random.default_rng(0).bytes(11 << 20)
    server.set(rate=0.3, kinds=kind, seed=1)
    for number in range(4):
        put(bucket / f"a/{number}", large[: 1000 + number])
        assert put_new(bucket / f"new/{number}", b"mine")
        assert not put_new(bucket / f"new/{number}", b"yours")
        assert read_object(bucket / f"a/{number}", 1 << 20) == large[: 1000 + number]
        assert walk(bucket / "a") == {str(before): 1000 + before for before in range(number + 1)}
        assert storage.entries(bucket)[0] == ["a", "new"]
        assert read_object(Url(f"{server.address}/{bucket.name}/a/{number}"), 1 << 20) == large[: 1000 + number]
    put(bucket / "large", large)
    file = RemoteFile(bucket / "large")
    file.seek(77)
    assert file.read() == large[77:]
    delete(bucket / "new/0")
    assert not storage.exists(bucket / "new/0")
    assert server.set()["spoiled"][kind] > 3


def test_what_arrives_damaged_is_put_again(tmp_path: Path, server: Server, bucket: Url) -> None:
    source = tmp_path / "here" / make_sources(tmp_path / "here")["photos"]
    config = PackConfig((str(source),), str(bucket / "out"), work=str(tmp_path / "work"), samples_per_shard=7, jobs=1)
    pack(PackConfig(config.sources, str(tmp_path / "out"), samples_per_shard=7))
    for seed in range(3):
        server.set(rate=0.3, kinds="damage", seed=seed)
        with pytest.raises((StorageError, PackError), match=r"does not hold what was put there|is being packed with another --work"):
            pack(config)
        assert server.set()["spoiled"]["damage"]
        if not (tmp_path / "work").exists():  # the first thing that is put names the pack
            delete(bucket / "out/train/.packing.json")
    pack(config)
    assert objects(bucket / "out") == tree(tmp_path / "out")


def test_a_tar_that_is_lost_before_the_end_is_made_again(tmp_path: Path, server: Server, bucket: Url) -> None:
    source = tmp_path / "here" / make_sources(tmp_path / "here")["photos"]
    how: dict[str, Any] = {"sources": (str(source),), "samples_per_shard": 7, "jobs": 1}
    pack(PackConfig(out=str(tmp_path / "out"), **how))
    how |= {"out": str(bucket / "out"), "work": str(tmp_path / "work")}
    pack(PackConfig(task="0/1", **how))
    delete(bucket / "out/train/shards/000/train-000002.tar")
    with pytest.raises(StorageError, match=r"train-000002.tar is gone"):
        pack(PackConfig(**how))
    pack(PackConfig(**how))
    assert objects(bucket / "out") == tree(tmp_path / "out")


def test_only_who_holds_a_claim_withdraws(server: Server, bucket: Url) -> None:
    remote_out.claim(bucket / "out/train", "ours")
    put(bucket / "out/train/shards/000/train-000000.tar", b"tar")
    before = objects(bucket)
    remote_out.withdraw(bucket / "out/train", "another's")
    assert objects(bucket) == before
    with pytest.raises(PackError, match="is being packed with another --work"):
        remote_out.check_free(bucket / "out/train", "another's")
    remote_out.check_free(bucket / "out/train", "ours")
    remote_out.withdraw(bucket / "out/train", "ours")
    assert objects(bucket) == {}


def test_whose_bucket_it_is(tmp_path: Path, server: Server, bucket: Url) -> None:
    """What is there is not overwritten, and two packs do not write to one place."""
    source = tmp_path / "here" / make_sources(tmp_path / "here")["photos"]
    how: dict[str, Any] = {"sources": (str(source),), "out": str(bucket / "out"), "samples_per_shard": 7, "jobs": 1}
    put(bucket / "out/train/mine.txt", b"mine")
    with pytest.raises(PackError, match="out/train exists and is not overwritten"):
        pack(PackConfig(work=str(tmp_path / "work"), **how))
    assert objects(bucket / "out") == {"train/mine.txt": b"mine"}
    assert not (tmp_path / "work").exists()
    delete(bucket / "out/train/mine.txt")
    pack(PackConfig(work=str(tmp_path / "work"), task="0/2", **how))
    before = objects(bucket / "out")
    with pytest.raises(PackError, match="is being packed with another --work"):
        pack(PackConfig(work=str(tmp_path / "other"), **how))
    assert objects(bucket / "out") == before
    assert not (tmp_path / "other").exists()
    with pytest.raises(OtherPackError, match=r"out: s3://.*/out -> s3://.*/elsewhere"):
        pack(PackConfig(work=str(tmp_path / "work"), **{**how, "out": str(bucket / "elsewhere")}))
    pack(PackConfig(work=str(tmp_path / "work"), **how))
    write_files(tmp_path / "more", {"new/a.jpg": make_image(1)})
    with pytest.raises(PackError, match="not one of the 4 class names of s3://"):
        pack(PackConfig(work=str(tmp_path / "work"), split="val", **{**how, "sources": (str(tmp_path / "more"),)}))
    assert storage.entries(bucket / "out")[0] == ["train"]


def test_what_cannot_be_packed_leaves_nothing_in_the_bucket(tmp_path: Path, server: Server, bucket: Url) -> None:
    write_files(tmp_path / "photos", {f"a/{i}.jpg": make_image(i) if i else b"" for i in range(2)})
    how: dict[str, Any] = {"samples_per_shard": 1, "jobs": 1, "work": str(tmp_path / "work"), "shuffle_seed": None}
    with pytest.raises(PackError, match="no usable image is left for val"):
        pack(PackConfig((str(tmp_path / "photos"),), str(bucket / "out"), val_fraction=find_fraction(tmp_path), **how))
    assert objects(bucket) == {}
    assert not (tmp_path / "work").exists()


def find_fraction(tmp_path: Path) -> float:
    """One by which the bad image alone falls into val."""
    from data_tools.keys import key_hashes
    from data_tools.plan import SPLIT_SEED

    bad, good = (hashed / 2**64 for hashed in key_hashes(pa.array(["a_0", "a_1"]), SPLIT_SEED).tolist())
    if bad > good:  # then it is the other one that is bad
        (tmp_path / "photos/a/0.jpg").write_bytes(make_image(0))
        (tmp_path / "photos/a/1.jpg").write_bytes(b"")
    return (bad + good) / 2


def test_a_table_that_changes_while_a_pack_is_stopped_is_refused(tmp_path: Path, server: Server, bucket: Url) -> None:
    make_sources(tmp_path / "here")
    upload(tmp_path / "here/tables", bucket / "tables")

    def stop(done: int, total: int, rejects: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    config = PackConfig((str(bucket / "tables"),), str(tmp_path / "out"), samples_per_shard=7, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        pack(config, stop)
    data = read_object(bucket / "tables/part-0.parquet", 1 << 30)
    table = pq.read_table(pa.BufferReader(data))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5)
    put(bucket / "tables/part-0.parquet", sink.getvalue())
    with pytest.raises(OtherPackError, match=r"the sources are not those .*table 0, part-0.parquet: "):
        pack(config)
    put(bucket / "tables/part-0.parquet", data)  # type: ignore[arg-type]
    assert pack(config)


def test_parquet_is_read_by_ranges(tmp_path: Path, server: Server, bucket: Url) -> None:
    """Labels are listed without the images, of which there are many more bytes."""
    noise = np.random.default_rng(0)
    table = pa.table({"label": list(range(40)), "image": [noise.bytes(400_000) for _ in range(40)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    put(bucket / "t.parquet", tmp_path / "t.parquet")
    server.set()
    with pytest.raises(PackError, match="no usable image"):
        pack(PackConfig((str(bucket / "t.parquet"),), str(tmp_path / "out"), label_column="label", jobs=1))
    asked = server.set()["asked"]
    read = [size for method, _, ranged, size in asked if method == "GET" and ranged]
    assert all(ranged for method, path, ranged, _ in asked if method == "GET" and path.endswith(".parquet"))
    size = (tmp_path / "t.parquet").stat().st_size
    assert size < sum(read) < 1.05 * size, "the images once, in one pass"


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("other", [b"b" * 100, b"b" * 200, b"b" * 20], ids=len)
def test_an_object_that_is_replaced_between_two_reads_is_named(server: Server, bucket: Url, size: int | None, other: bytes) -> None:
    """Also by one that ends before the range, which would else be told of as cut off."""
    put(bucket / "x", b"a" * 100)
    file = RemoteFile(bucket / "x", size)
    assert file.fetch(0, 50) == b"a" * 50
    put(bucket / "x", other)
    with pytest.raises(StorageError, match=r"/x has changed while it was read; start again"):
        file.fetch(50, 100)


def test_manifests_of_urls(tmp_path: Path, server: Server, bucket: Url) -> None:
    make_sources(tmp_path / "here")
    upload(tmp_path / "here/photos", bucket / "photos")
    names = sorted(name for name in tree(tmp_path / "here/photos") if name.endswith(".jpg"))
    web = f"{server.address}/{bucket.name}/photos"
    urls = [f"{(bucket / 'photos', web)[i % 2]}/{name}{'?x=1&y=2' if i % 4 == 1 else ''}" for i, name in enumerate(names)]
    labels = [name.split("/")[0] for name in names]
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(make_image(1234))
    bad = {
        f"{bucket}/photos/gone.jpg": "No such file",
        f"{server.address}/-/status/404": "the server says 404",
        f"{server.address}/-/status/410": "the server says 410",
        f"{server.address}/-/status/403": "the server says 403",
        f"{server.address}/-/redirect?to=file://{secret}": "redirects to, is no address on the web",
        f"{server.address}/-/redirect?to=file://localhost{secret}": "redirects to, is no address on the web",
        f"file://{secret}": "no place that images are read from",
        str(secret): "leads out of s3://",
        "../" * 20 + str(secret)[1:]: "leads out of s3://",
        "photos/../../out.jpg": "leads out of s3://",
        "s3://": "is no URL",
        "photos//twice.jpg": "",
    }
    manifest = io.StringIO()
    csv.writer(manifest).writerows([("path", "label"), *zip(urls, labels, strict=True), *((url, "class-0") for url in bad)])
    put(bucket / "list.csv", manifest.getvalue().encode())
    server.set(rate=0.05, seed=5)
    dataset = pack_one(bucket / "list.csv", out=tmp_path / "out", samples_per_shard=9, shuffle_seed=None, jobs=1)
    assert sum(server.set()["spoiled"].values()) > 0
    images = {image for image, *_ in contents(dataset).values()}
    assert images == {data for name, data in tree(tmp_path / "here/photos").items() if name.endswith(".jpg") and data != b"no image"}
    rejects = {row["source"]: row for row in pq.read_table(tmp_path / "out/train/rejects.parquet").to_pylist()}
    for url, detail in bad.items():
        assert rejects[url]["reason"] == "missing"
        assert detail in rejects[url]["detail"], url
    redirected = f"{server.address}/-/redirect?to={web}/{names[0]}"
    (tmp_path / "one.jsonl").write_text(json.dumps({"path": redirected, "label": 0}))
    assert pack_one(tmp_path / "one.jsonl", out=tmp_path / "one").num_samples == 1
    (tmp_path / "root.csv").write_text("path,label\n" + "".join(f"{name},{of}\n" for name, of in zip(names, labels, strict=True)))
    rooted = [pack_one(tmp_path / "root.csv", out=tmp_path / f"root-{i}", image_root=str(root)).content_hash
              for i, root in enumerate((tmp_path / "here/photos", bucket / "photos", web))]  # fmt: skip
    assert len(set(rooted)) == 1


def test_a_server_that_stays_broken_ends_the_pack(tmp_path: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.01)
    write_files(tmp_path, {"good.jpg": make_image(0)})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/x.jpg"
    for number, url in enumerate((f"{server.address}/-/status/503", nobody)):
        (tmp_path / "list.csv").write_text(f"path,label\n{tmp_path}/good.jpg,0\n{url},0\n")
        with pytest.raises(StorageError, match=f"{url} cannot be had: .* {storage.WEB_ATTEMPTS} times; the same command goes on") as error:
            pack(PackConfig((str(tmp_path / "list.csv"),), str(tmp_path / f"out-{number}"), samples_per_shard=1, shuffle_seed=None, jobs=1))
        assert "\n" not in str(error.value)
        assert list((tmp_path / f"out-{number}").rglob("pieces/*/*.arrow")), "the work is kept"


def test_a_host_is_unknown_only_where_that_is_known() -> None:
    assert storage._unknown_host(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert not storage._unknown_host(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))


@pytest.mark.parametrize("remote_root", [False, True])
def test_a_path_from_elsewhere_names_no_file_here(tmp_path: Path, remote_root: bool) -> None:
    root = Url("s3://b/images") if remote_root else tmp_path
    origin = Origin("", root, Url("s3://b/list.csv"))
    for path in ("/etc/passwd", "../../etc/passwd", "a/../../../etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd"):
        where = locate(path, origin)
        assert isinstance(where, Reject | Url), path
        if isinstance(where, Url):
            assert where.startswith("s3://b/")
    assert locate("a/b c.jpg", origin) == str(root / "a/b c.jpg")


def test_urls() -> None:
    url = Url("s3://bucket/a/b#1?.tar.parquet")
    assert (url.name, url.suffix, url.stem, url.key, url.root) == (
        "b#1?.tar.parquet", ".parquet", "b#1?.tar", "a/b#1?.tar.parquet", "s3://bucket",
    )  # fmt: skip
    assert (url.parent, Url("s3://bucket").name, Url("s3://bucket/x").parent) == ("s3://bucket/a", "bucket", "s3://bucket")
    web = Url("https://host:80/a/b.csv?sign=x/y")
    assert (web.name, web.parent, web.parent / "c d.jpg") == ("b.csv", "https://host:80/a", "https://host:80/a/c%20d.jpg")
    assert Url("https://h/a%20b").below("c d/../e f.jpg") == "https://h/a%20b/e%20f.jpg"
    lost = pickle.loads(pickle.dumps(Missing("s3://b/x", "gone")))
    assert (str(lost), lost.why, pickle.loads(pickle.dumps(web))) == ("s3://b/x: gone", "gone", web)
    for wrong in ("s3://", "file:///x", "s3:/x", "ftp://host/x"):
        with pytest.raises(StorageError, match="is no URL of a bucket or a server"):
            Url(wrong)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=60), st.integers(1, 8), st.integers(1, 100), st.data())
def test_reading_ahead_keeps_order_room_and_errors(items: list[tuple[bool, int]], requests: int, room: int, data: st.DataObject) -> None:
    fails = data.draw(st.none() | st.integers(0, max(0, len(items) - 1)))
    lock = threading.Lock()
    running = most = 0

    def read(item: tuple[int, bool, int], take: Callable[[int], None]) -> int:
        nonlocal running, most
        number, remote, size = item
        with lock:
            running += remote
            most = max(most, running)
        take(size)
        with lock:
            running -= remote
        if number == fails:
            raise ValueError(number)
        return number

    numbered = [(number, *item) for number, item in enumerate(items)]
    got: list[int] = []
    with nullcontext() if fails is None or not items else pytest.raises(ValueError, match=f"^{fails}$"):
        for number in in_turn(numbered, lambda item: item[1], read, requests, room):
            got.append(number)
    assert got == list(range(len(items) if fails is None else min(fails, len(items))))
    assert most <= requests


def test_room_is_never_passed() -> None:
    shared = storage._Room(100)
    sizes = [60, 60, 300, 10]
    taken: list[int] = []

    def take(number: int) -> None:
        shared.take(number, sizes[number])
        taken.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in (3, 1, 0, 2)]
    threads[0].start()
    threads[0].join()  # there is room for a later one
    threads[2].start()
    threads[2].join()  # and for the one whose turn it is
    for thread in (threads[1], threads[3]):
        thread.start()
    shared.next_turn(1)
    threads[1].join()
    assert taken == [3, 0, 1]
    shared.next_turn(2)  # more than all the room, but it is its turn
    threads[3].join()
    assert taken == [3, 0, 1, 2]


def test_requests_run_at_once_and_no_more_than_asked_for(server: Server, bucket: Url) -> None:
    for number in range(40):
        put(bucket / f"a/{number}", bytes([number]) * 100)
    server.set(latency=0.02)
    origin = Origin("", bucket / "a")
    got = list(read_images(((f"{number}", origin) for number in range(40)), requests=8))
    assert got == [bytes([number]) * 100 for number in range(40)]
    assert 4 <= server.set()["most"] <= 8


def test_google_cloud_storage_is_the_same_road(tmp_path: Path, server: Server, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the XML interface that both have; what only Google's servers do is not tested."""
    key = {"gcs_base_url": server.address, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "key.json").write_text(json.dumps(key))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    source = tmp_path / "here" / make_sources(tmp_path / "here", 20)["photos"]
    there = upload(source, Url(f"gs://{bucket.name}/photos"))
    server.set(rate=0.05, seed=6)
    pack(PackConfig((str(there),), f"gs://{bucket.name}/out", work=str(tmp_path / "work"), samples_per_shard=7, jobs=1))
    assert sum(server.set()["spoiled"].values()) > 0
    pack(PackConfig((str(source),), str(tmp_path / "out"), samples_per_shard=7))
    assert objects(bucket / "out") == tree(tmp_path / "out")


def run(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = f"import sys; {code}; from launch.main import main; sys.argv[0] = 'vitscale'; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", start, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["data", "repair", "s3://b/out/train"], "", "s3://b/out/train is not changed where it is; copy it to a disk"),
        (["data", "dedup", "s3://b/out/train"], "", "s3://b/out/train is not changed where it is; copy it to a disk"),
        (["data", "overlay", "s3://b/out/train", "--remove", "x"], "", "s3://b/out/train is not changed where it is; copy it to a disk"),
        (["data", "index", "s3://b/out/train"], "", "s3://b/out/train is not indexed where it is; copy it to a disk"),
        (["data", "stats", "s3://bucket-of-nobody/out/train"], "", "s3://bucket-of-nobody/out/train is not a dataset: s3://bucket-of-nobody"),
        (["pack", "s3://b/x", "OUT"], "sys.modules['obstore'] = None",
         "needs obstore, which is not installed; `pip install 'vitscale[cloud]'`"),
        (["pack", "photos", "s3://b/x"], "", "out=s3://b/x is in object storage, so work needs a folder here to go on from"),
        (["pack", "photos", "https://b/x"], "", "out=https://b/x cannot be written to"),
        (["pack", "photos", "out", "--work", "x"], "", "work=x is for an OUT in object storage"),
        (["pack", "s3://", "OUT"], "", "s3:// is no URL of a bucket or a server"),
        (["pack", "https://b/folder/", "OUT"], "", "https://b/folder is neither a table nor a tar by its name"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_one_line(tmp_path: Path, server: Server, words: list[str], code: str, said: str) -> None:
    done = run(*(str(tmp_path / "OUT") if word == "OUT" else word for word in words), code=code or "pass")
    assert (done.returncode != 0, done.stderr.count("\n"), said in done.stderr) == (True, 1, True), done.stderr
    assert not (tmp_path / "OUT").exists()


def test_what_is_not_there_or_may_not_be_had(tmp_path: Path, server: Server, bucket: Url) -> None:
    for source, said in ((bucket / "nothing", "does not exist"), (Url("s3://no-such-bucket-here/x"), "NoSuchBucket")):
        with pytest.raises((PackError, StorageError), match=said) as error:
            pack(PackConfig((str(source),), str(tmp_path / "out")))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match="no-such-bucket-here") as lost:
        pack(PackConfig((str(tmp_path),), "s3://no-such-bucket-here/out", work=str(tmp_path / "work")))
    assert "\n" not in str(lost.value)
    with pytest.raises(Missing):
        RemoteFile(bucket / "nothing")
    with pytest.raises(DatasetError, match=r"out is not a dataset: .*dataset\.json: No such file"):
        Dataset.open(bucket / "out")


def test_odd_names(tmp_path: Path, server: Server, bucket: Url) -> None:
    names = [f"cat/{odd}.jpg" for odd in ("a b", "50%", "%20", "h#1", "q?x=1", "ünï", "~*[]", "a+b&c", "quote'\"", "back\\slash")]
    write_files(tmp_path / "photos", {name: make_image(number) for number, name in enumerate(names)})
    upload(tmp_path / "photos", bucket / "odd" / "photos")
    pack_one(tmp_path / "photos", out=tmp_path / "here")
    pack_one(bucket / "odd/photos", out=tmp_path / "there")
    assert tree(tmp_path / "here") == tree(tmp_path / "there")
