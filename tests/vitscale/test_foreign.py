"""Streams of tars that others made, written by webdataset's own writer: every sample, on every rank, through damage, failures and kills."""

import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from data_tools.errors import UserError
from data_tools.storage import Url
from tests.command import SMALL, VITSCALE, vitscale
from tests.data_tools.conftest import Server, bucket, make_image, process, server, upload  # noqa: F401 - fixtures
from tests.data_tools.mutations import mutated
from tests.vitscale.streams import IMAGE_SIZE, PREPROCESS
from vitscale import keyed
from vitscale.config import FinetuneConfig, StreamConfig, TrainConfig
from vitscale.foreign import ForeignStream, Usable, _Drawn, shard_at
from vitscale.quarantine import QuarantineError
from vitscale.resolve import open_data, resolve
from vitscale.run import locked, open_run
from vitscale.stream import Batch, Share, StreamError
from vitscale.timeline import Span, Timeline, steady
from vitscale.unindexed import WINDOW, Tars, UnindexedError, named_tars
from vitscale.workers import WorkerError

CLASSES = 200
SIZES = (9, 1, 14, 5, 7)  # samples of the tars


def image_of(number: int) -> bytes:
    """An image of one colour, which tells its number whatever is cropped."""
    file = io.BytesIO()
    Image.new("RGB", (16, 20), (number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


def write_tars(folder: Path, sizes: tuple[int, ...] = SIZES) -> Path:
    """Tars as people have them: long names (PAX headers), labels here and there, other members between; sample n has the label n."""
    folder.mkdir(parents=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        with TarWriter(str(folder / f"part-{shard:03d}.tar")) as tar:
            for place in range(size):
                number = next(numbers)
                key = f"{'näh/' * 30}{shard}-{place}"
                labels = {"cls": number} if number % 2 else {"json": {"labels": [number], "caption": "a dog"}}
                tar.write({"__key__": key, "txt": "a dog", ("png", "jpg")[number % 3 == 0]: image_of(number), **labels})
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("foreign") / "tars")


def found(*words: object) -> Tars:
    tars = named_tars(tuple(map(str, words)))
    assert tars is not None
    return tars


def stream(
    tars: Tars, tmp_path: Path, *, rank: int = 0, world_size: int = 1, batch: int = 12, micro: int = 2, cursor: int = 0, seed: int = 3,
    config: StreamConfig | None = None, timeline: Timeline | None = None,
) -> ForeignStream:  # fmt: skip
    config = config or StreamConfig(workers=2, window=4)
    config = dataclasses.replace(config, window=config.window or WINDOW)
    return ForeignStream(
        tars, PREPROCESS, config, Share(timeline or steady(IMAGE_SIZE, batch, micro), rank, world_size),
        seed=seed, quarantine=tmp_path / "quarantine.jsonl", usable=Usable(CLASSES), cursor=cursor,
    )  # fmt: skip


def take(of: ForeignStream, count: int, samples_seen: int = 0) -> list[Batch]:
    return list(itertools.islice(of.micro_batches(samples_seen), count))


def labels(batches: list[Batch]) -> list[int]:
    """Of all samples, each checked against its pixels: they came with it."""
    for batch in batches:
        assert batch.valid_B.all()
        assert (batch.images_BHWC[..., 0] == batch.labels_BL[:, 0, None, None]).all()
    return [int(label) for batch in batches for label in batch.labels_BL[:, 0]]


def bytes_of(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    return [tuple(np.ascontiguousarray(array).tobytes() for array in dataclasses.astuple(batch)) for batch in batches]


def told(tmp_path: Path) -> list[dict]:
    file = tmp_path / "quarantine.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once_an_epoch(tars: Path, tmp_path: Path, world_size: int) -> None:
    """Once all ranks have used up the shards below a cursor, each sample of those came exactly as often as its shard."""
    ranks = [stream(found(tars), tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [take(one, 60) for one in ranks]
    assert all(len(of) == 60 for of in batches), "equally many on every rank, though the shards are uneven"
    cursor = min(one.cursor for one in ranks)
    assert cursor >= 2 * len(SIZES), "or nothing is tested"
    came = Counter(label for of in batches for label in labels(of))
    first = np.cumsum([0, *SIZES])
    used_up = Counter(shard_at(3, ordinal, len(SIZES)) for ordinal in range(cursor))
    for shard, size in enumerate(SIZES):
        for number in range(first[shard], first[shard] + size):
            assert came[number] >= used_up[shard] >= 2
    if world_size == 1:  # what is in the buffer or is being read comes once more at most, or once more in the next epoch
        most = Counter(shard_at(3, ordinal, len(SIZES)) for ordinal in range(cursor + 8))
        assert all(came[number] <= most[shard] for shard in range(len(SIZES)) for number in range(first[shard], first[shard + 1]))


def test_epochs_are_in_different_orders_and_keys_are_those_of_positions(tars: Path, tmp_path: Path) -> None:
    orders = [tuple(shard_at(0, epoch * 9 + place, 9) for place in range(9)) for epoch in range(4)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len(set(orders)) == 4
    seen = take(stream(found(tars), tmp_path, config=StreamConfig(workers=1, window=20)), 12)
    assert labels(seen[:6]) != sorted(labels(seen[:6]))
    both = [take(stream(found(tars), tmp_path, rank=rank, world_size=2, batch=8, micro=2), 4) for rank in range(2)]
    keys = [
        [key for batch in of[:2] for key in batch.keys_B.tolist()] + [key for batch in of[2:] for key in batch.keys_B.tolist()]
        for of in both
    ]
    alone = [key for batch in seen[:8] for key in batch.keys_B.tolist()]  # positions 0 to 15
    assert [*keys[0][:4], *keys[1][:4], *keys[0][4:], *keys[1][4:]] == alone


@pytest.mark.parametrize("damaged", [False, True])
def test_workers_change_no_byte(tars: Path, tmp_path: Path, damaged: bool) -> None:
    if damaged:
        tars = write_damaged(tmp_path / "damaged")
    config = StreamConfig(workers=1, window=8)
    whole = bytes_of(take(stream(found(tars), tmp_path, config=config), 40))
    for workers, processes in ((4, False), (1, True), (4, True)):
        other = dataclasses.replace(config, workers=workers, processes=processes)
        assert bytes_of(take(stream(found(tars), tmp_path, config=other), 40)) == whole
    if not damaged:  # how much is begun at once decides only where the next sample stands in for another one
        other = dataclasses.replace(config, prefetch=1, buffer_bytes=2**20)
        cut = take(stream(found(tars), tmp_path, micro=6, config=other), 13)
        assert labels(cut) == labels(take(stream(found(tars), tmp_path, config=config), 39))


def test_a_resume_begins_at_a_shard_and_loses_nothing(tars: Path, tmp_path: Path) -> None:
    """From the cursor of any moment, at another world size: each shard not used up comes whole."""
    first = np.cumsum([0, *SIZES])
    for stop in range(1, 30, 4):
        before = [stream(found(tars), tmp_path, rank=rank, world_size=2) for rank in range(2)]
        came = Counter(label for one in before for label in labels(take(one, stop)[:-1]))  # the last is on its way to the device yet
        cursor = min(one.cursor for one in before)
        for ordinal in range(cursor):
            shard = shard_at(3, ordinal, len(SIZES))
            assert all(came[number] for number in range(first[shard], first[shard + 1])), "what is used up was seen"
        after = [stream(found(tars), tmp_path, rank=rank, world_size=3, cursor=cursor) for rank in range(3)]
        again = [take(one, 20, samples_seen=stop * 12) for one in after]
        assert bytes_of(take(stream(found(tars), tmp_path, world_size=3, cursor=cursor), 20, stop * 12)) == bytes_of(again[0])
        later = {label for of in again for label in labels(of)}
        for ordinal in range(cursor, min(one.cursor for one in after)):
            shard = shard_at(3, ordinal, len(SIZES))
            assert set(range(first[shard], first[shard + 1])) <= later
        assert min(one.cursor for one in after) > cursor


def test_fewer_shards_than_ranks(tmp_path: Path) -> None:
    tars = found(write_tars(tmp_path / "tars", (11,)))
    batches = [take(stream(tars, tmp_path, rank=rank, world_size=3), 30) for rank in range(3)]
    came = Counter(label for of in batches for label in labels(of))
    assert min(came.values()) >= 3 * (60 // 11 - 2)
    assert len(came) == 11
    assert "fewer than 3 ranks" in tars.guarantees(3, 4)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------------------------


def write_damaged(folder: Path) -> Path:
    """The tars, and one more of samples that cannot be used, each in its way, but for three."""
    write_tars(folder)
    png = image_of(199)
    with TarWriter(str(folder / "part-900.tar")) as tar:
        for name, members in {
            "fine": {"png": png, "cls": b"199"},
            "no-label": {"png": png},
            "no-image": {"cls": b"199", "txt": b"x"},
            "cut": {"jpg": make_image(1)[:-200], "cls": b"199"},
            "noise": {"jpg": b"\xff\xd8" + bytes(400), "cls": b"199"},
            "outside": {"png": png, "cls": b"200"},
            "negative": {"png": png, "cls": b"-1"},
            "word": {"png": png, "json": b'{"labels": ["dog"]}'},
            "true": {"png": png, "json": b'{"labels": [true]}'},
            "twice": {"png": png, "json": b'{"labels": [5, 5]}'},
            "none": {"png": png, "json": b'{"labels": []}'},
            "broken": {"png": png, "json": b"{"},
            "deep": {"png": png, "json": b"[" * 100_000},
            "list": {"png": png, "json": b"[1]"},
            "scores": {"png": png, "json": b'{"labels": [1], "scores": [NaN]}'},
            "huge-score": {"png": png, "json": b'{"labels": [1], "scores": [1e300]}'},
            "pickle": {"png": png, "pyd": b"cos\nsystem\n(S'false'\ntR.", "cls": b"199"},
            "empty": {"png": b"", "cls": b"199"},
            "last": {"webp": png, "cls": b"199"},
        }.items():
            tar.write({"__key__": name, **members})
    return folder


def test_what_cannot_be_used_is_told_and_left_out(tmp_path: Path) -> None:
    tars = write_damaged(tmp_path / "tars")
    batches = take(stream(found(tars), tmp_path), 120)
    came = Counter(labels(batches))
    fine = {"fine", "pickle", "last"}
    lines = [line for line in told(tmp_path) if line["shard"] == "part-900.tar"]
    with tarfile.open(tars / "part-900.tar") as tar:
        keys = {name.partition(".")[0] for name in tar.getnames()}
    assert {line["key"] for line in lines} == keys - fine
    assert all(line["dataset"] == str(tars) and line["reason"] for line in lines)
    assert set(came) == {*range(sum(SIZES)), 199}
    assert abs(came[199] - 3 * came[0]) <= 6
    assert (np.diff([line["position"] for line in lines][: len(keys) - len(fine)]) >= -6 * 6).all()


def test_an_undecodable_image_is_told_at_the_position_that_it_was_drawn_for(tmp_path: Path) -> None:
    """Though later ones are in the making by then: it is by the position that a resume cuts the lines back."""
    (tmp_path / "t").mkdir()
    with TarWriter(str(tmp_path / "t" / "a.tar")) as tar:
        for k in range(40):
            tar.write({"__key__": str(k), "png": image_of(k) if k % 5 else b"\x89PNG" + bytes(50), "cls": str(k)})
    config = StreamConfig(workers=1, window=1, prefetch=4)
    take(stream(found(tmp_path / "t"), tmp_path, config=config), 1)
    positions = {line["position"] for line in told(tmp_path)}
    assert positions
    assert positions <= {0, 1}, "the first micro-batch's"


def test_what_was_drawn_makes_room_again(tars: Path, tmp_path: Path) -> None:
    """Or windows would become smaller and smaller, and with them the shuffling."""
    drawn = _Drawn(
        found(tars), StreamConfig(window=16, buffer_bytes=40_000), Usable(CLASSES), seed=0, cursor=0, rank=0, world_size=1,
        unusable=lambda position, sample: None,
    )  # fmt: skip
    total = 0
    for position in range(500):
        total += len(drawn.draw(position).data)
        held = [*drawn._drawing, *drawn._filling]
        assert drawn._bytes == sum(len(sample.data) for sample in held)
        assert position < 100 or len(held) >= 15
    drawn.close()
    assert total > 20_000, "more went through than may be held"


def test_a_tar_that_ends_early_gives_what_was_read(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    cut = tars / "part-002.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tars / "part-003.tar").write_bytes(b"")
    (tars / "part-001.tar").write_bytes(bytes((tars / "part-001.tar").stat().st_size))  # a tar's end, and nothing before it
    (tars / "part-000.tar").write_bytes((tars / "part-000.tar").read_bytes() * 2)  # whose second half no reader sees
    flipped = bytearray((tars / "part-004.tar").read_bytes())
    flipped[len(flipped) // 2 // 512 * 512 : len(flipped) // 2 // 512 * 512 + 2048] = b"\x07" * 2048
    (tars / "part-004.tar").write_bytes(flipped)
    came = set(labels_used := [label for batch in take(stream(found(tars), tmp_path), 90) for label in batch.labels_BL[:, 0].tolist()])
    first = np.cumsum([0, *SIZES])
    assert set(range(first[1])) <= came
    assert came & set(range(first[2], first[3]))
    assert not came & set(range(first[3], first[4]))
    assert len(labels_used) == 180
    assert {line["shard"] for line in told(tmp_path)} == {path.name for path in tars.iterdir()}
    assert {line["shard"] for line in told(tmp_path) if "behind its end mark" in line["reason"]} == {"part-000.tar"}
    assert any(re.search(r"the tar after its sample \d+: .* cannot be read", line["reason"]) for line in told(tmp_path))


def test_mutated_tars_lose_what_is_damaged_and_nothing_else(tars: Path, tmp_path: Path) -> None:
    """Samples of whole tars come as ever; what is lost of the others is told of, or ends the run in one line."""
    first = np.cumsum([0, *SIZES])
    said: list[str] = []
    for seed in range(40):
        rng = random.Random(seed)
        copy = Path(shutil.copytree(tars, tmp_path / f"{seed}"))
        spoiled = rng.sample(range(len(SIZES)), rng.randint(1, 3))
        for shard in spoiled:
            file = copy / f"part-{shard:03d}.tar"
            content = file.read_bytes()
            file.write_bytes(
                rng.choice([mutated(content, rng), mutated(content, rng), bytes(len(content)), rng.randbytes(3000), content * 2])
            )
        try:
            batches = take(stream(found(copy), copy, config=StreamConfig(workers=2, window=8)), 60)
        except (QuarantineError, StreamError) as error:
            said.append(str(error))
            continue
        came = {label for batch in batches for label in batch.labels_BL[:, 0].tolist()}
        for shard in set(range(len(SIZES))) - set(spoiled):
            assert set(range(first[shard], first[shard + 1])) <= came, seed
        for shard in spoiled:
            if not came >= set(range(first[shard], first[shard + 1])):
                assert f"part-{shard:03d}.tar" in {line["shard"] for line in told(copy)}, seed
    assert len(said) < 20
    assert not any("\n" in line for line in said)


def test_budgets_and_sets_without_any_sample_end_in_one_line(tmp_path: Path) -> None:
    damaged = found(write_damaged(tmp_path / "tars"))
    with pytest.raises(QuarantineError, match=r"4 unusable samples in .*/tars/part-900.tar are over .*=3; `vitscale data index`"):
        take(stream(damaged, tmp_path, config=StreamConfig(workers=1, max_unusable_per_shard=3)), 120)
    for name, members in {"unlabelled": {"png": image_of(1)}, "black": {"png": b"black", "cls": b"1"}}.items():
        with TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for key in "abc":
                tar.write({"__key__": key, **members})
        (tmp_path / name).mkdir()
        with pytest.raises(StreamError, match=r"tars in a row held no sample that can be used|were all unusable") as error:
            take(stream(found(tmp_path / f"{name}.tar"), tmp_path / name, config=StreamConfig(workers=2)), 1)
        assert "\n" not in str(error.value)


def test_a_tar_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    named = found(tars)
    (tars / "part-001.tar").unlink()
    with pytest.raises(StreamError, match=r"part-001.tar is not there any more; put it back"):
        take(stream(named, tmp_path), 60)
    with pytest.raises(UnindexedError, match=r"part-001.tar cannot be read \(No such file"):
        named.identity()


def test_a_read_that_never_ends_ends_the_run(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars")
    (tars / "part-001.tar").unlink()
    os.mkfifo(tars / "part-001.tar")
    with pytest.raises(StreamError, match=r"reading .*part-001.tar has not ended for stream.read_timeout=1 seconds"):
        take(stream(found(tars), tmp_path, config=StreamConfig(workers=1, read_timeout=1)), 60)
    with pytest.raises(UnindexedError, match="is not a plain file"):
        found(tars).identity()


def test_a_killed_worker_is_named(tars: Path, tmp_path: Path) -> None:
    batches = stream(found(tars), tmp_path, config=StreamConfig(workers=1, processes=True)).micro_batches(0)
    next(batches)
    (worker,) = [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split() if is_worker(child)
    ]
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        list(itertools.islice(batches, 20))


def is_worker(pid: str) -> bool:
    return b"vitscale.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_no_thread_is_left(tars: Path, tmp_path: Path) -> None:
    """However little of the tars was used: threads that wait for room end with the stream."""
    before = set(threading.enumerate())
    for _ in range(3):
        take(stream(found(tars), tmp_path, config=StreamConfig(workers=2, window=1, buffer_bytes=1)), 3)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
    assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------------------------------------------------------------------------------
# Names, buckets, the web
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_names(tars: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"part-{shard:03d}.tar" for shard in range(5)]
    assert [shard.name for shard in found(tars).shards] == names
    assert found(tars / "part-{000..004}.tar").shards == found(*(tars / name for name in names)).shards == found(tars).shards
    assert found("https://host/x-{08..11}.tar").shards == tuple(Url(f"https://host/x-{n}.tar") for n in ("08", "09", "10", "11"))
    assert named_tars((str(dataset / "train"),)) is None
    assert named_tars((str(dataset),)) is None
    assert named_tars((str(tmp_path),)) is None
    monkeypatch.chdir(tars)
    assert found("part-{000,003}.tar").shards == (Path("part-000.tar"), Path("part-003.tar"))
    for words, line in {
        ("pipe:cat x.tar",): "would run a command",
        ("pipe:cat {1..3}.tar",): "would run a command",
        ("{pipe:touch owned,x}.tar",): "is no tar by its name",
        ("x-{0..3}.tar.gz",): "is compressed",
        ("x-{0..3}.zip",): "is no tar by its name",
        ("x-{0..3.tar",): "cannot be expanded",
        ("x-{0..3}-${NOT_SET_ANYWHERE}.tar",): "cannot be expanded",
        ("part-000.tar", "./part-000.tar"): "twice",
        (str(tars), str(dataset / "train")): "mixes tars",
    }.items():
        with pytest.raises(UnindexedError, match=line):
            found(*words)
    assert not (tars / "owned").exists()


def test_a_bucket_that_fails(tars: Path, tmp_path: Path, server: Server, bucket: Url) -> None:  # noqa: F811
    """The same batches as from a disk, though one request in five fails, by S3 and by HTTP; and what is gone ends it."""
    upload(tars, bucket / "tars")
    whole = bytes_of(take(stream(found(tars), tmp_path), 40))
    web = f"{server.address}/{bucket.name}/tars/part-{{000..004}}.tar"
    for word in (str(bucket / "tars"), str(bucket / "tars" / "part-{000..004}.tar"), web):
        server.set(rate=0.2, seed=4)
        assert bytes_of(take(stream(found(word), tmp_path), 40)) == whole
        assert sum(server.set()["spoiled"].values()) > 1
    assert found(web).identity()["hash"] == found(bucket / "tars").identity()["hash"] == found(tars).identity()["hash"]
    for word in (str(bucket / "tars" / "part-{000..005}.tar"), web.replace("004", "005")):
        with pytest.raises(UnindexedError, match=r"part-005.tar cannot be read"):
            found(word).identity()
        with pytest.raises(StreamError, match=r"part-005.tar is not there any more"):
            take(stream(found(word), tmp_path), 40)
    assert named_tars((str(bucket),)) is None
    assert not told(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_killed_and_goes_on(tars: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "pretrain", "tiny-digits", "--data", str(tars), "--out", str(run), *SMALL, "--model.num-classes", str(CLASSES), "--nproc", "2",
        "--checkpoint-every", "2", "--steps", "24", "--stream.window", "4",
    ]  # fmt: skip
    killed = subprocess.Popen([VITSCALE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert killed.stdout is not None
    said = ""
    for line in killed.stdout:
        said += line
        if "step-00000012" in line:
            killed.kill()
            break
    killed.wait()
    assert "5 tars without an index" in said, said
    assert f"`vitscale data index {tars}` makes a dataset" in said
    saved = [json.loads(file.read_text()) for file in sorted(run.glob("checkpoints/step-*/checkpoint.json"))]
    assert saved[-1]["cursor"] > 0
    done = vitscale(*words)
    assert done.returncode == 0, done.stderr
    assert "resumes at step" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))
    assert json.loads((run / "checkpoints" / "step-00000024" / "checkpoint.json").read_text())["cursor"] > saved[-1]["cursor"]
    assert "whose order cannot be told" in vitscale("run", "which", run, "--step", 3).stderr
    assert json.loads(vitscale("run", "status", run, "--json").stdout)["dataset"]["kind"] == "tars"


def test_what_a_run_takes_and_refuses(tars: Path, dataset: Path, config: TrainConfig, tmp_path: Path) -> None:
    of_tars = dataclasses.replace(config, data=str(tars), model=dataclasses.replace(config.model, num_classes=CLASSES))
    for changed, line in (
        ({"model": config.model}, "give --model.num-classes"),
        ({"steps": 0, "epochs": 3.0}, "give --steps"),
        ({"eval_data": str(dataset / "val")}, "has 5 classes"),
        ({"eval_data": str(tars)}, "is not a dataset"),
        ({"data": "pipe:cat x"}, "would run a command"),
        ({"data_weights": (1.0,)}, "which data_weights needs"),
        ({"cache": str(tmp_path), "cache_bytes": 2**30}, "which cache needs"),
        ({"steps": 2}, "leaves nothing of the run's 2 steps"),
    ):
        with pytest.raises(UserError, match=line) as error:
            resolve(dataclasses.replace(of_tars, **changed), 2)
        assert "\n" not in str(error.value)
    finetune = FinetuneConfig(data=str(tars), init=str(tmp_path), steps=3, out=str(tmp_path / "tuned"))
    with pytest.raises(UserError, match="a new head is made for"):
        resolve(finetune, 2)

    resolved = resolve(of_tars, 2)
    run = Path(resolved.out)
    with locked(run):
        assert not open_run(resolved, 2)
    assert isinstance(open_data(resolved), Tars)
    moved = shutil.copytree(tars, tmp_path / "moved")
    with locked(run):
        assert not open_run(dataclasses.replace(resolved, data=str(moved / "*.tar").replace("*", "part-{000..004}")), 2)
    with TarWriter(str(moved / "part-005.tar")) as tar:
        tar.write({"__key__": "a", "png": image_of(1), "cls": b"1"})
    with pytest.raises(UserError, match="has other tars than when the run started a moment ago"):  # a rank that comes after it
        open_data(dataclasses.replace(resolved, data=str(moved)))
    for data, line in ((moved, "6 tars without an index"), (dataset / "train", "give the same dataset")):
        with locked(run), pytest.raises(UserError, match=line):
            open_run(dataclasses.replace(resolved, data=str(data)), 2)
    with locked(run), pytest.raises(UserError, match=r"part-005.tar cannot be read \(No such"):
        open_run(dataclasses.replace(resolved, data=str(tars / "part-{000..007}.tar")), 2)


def test_steps_of_phases_have_the_positions_and_the_size_that_they_should(tars: Path, tmp_path: Path) -> None:
    """Steps of 6, then of 12 images; a start within the second phase goes on with its positions."""
    timeline = Timeline((Span(0, 0, (8, 8), 6, 1), Span(2, 12, IMAGE_SIZE, 12, 2)), 4)
    for first in (0, 3):
        ranks = [stream(found(tars), tmp_path, rank=rank, world_size=2, timeline=timeline) for rank in (0, 1)]
        batches = [list(of.micro_batches(timeline.samples_at(first), timeline.total_samples)) for of in ranks]
        sizes = [batch.images_BHWC.shape[:3] for batch in batches[0]]
        assert sizes == ([(1, 8, 8)] * 6 if first == 0 else []) + [(2, *IMAGE_SIZE)] * (6 if first == 0 else 3)
        keys = sorted(key for of in batches for batch in of for key in batch.keys_B.view(np.uint64).tolist())
        positions = np.arange(timeline.samples_at(first), timeline.total_samples)
        assert keys == sorted(keyed.key(keyed.Purpose.SAMPLE, 3, positions).tolist())
