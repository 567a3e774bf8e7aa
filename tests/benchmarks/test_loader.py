"""The benchmark of loading: its systems give what it says that they give, and its parts run and report; nothing here judges a time."""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.dataset import Dataset
from vitscale.config import PreprocessConfig
from vitscale.model import normalize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as when its scripts are run
import loader_memory  # noqa: E402
import loader_systems  # noqa: E402
import photographs  # noqa: E402

BATCH = 4


def bench(results: Path, script: str, *flags: str) -> tuple[dict[str, Any], str]:
    """What it saves and prints, run as a user does."""
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--results", str(results), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = results.glob("*.json")
    result: dict[str, Any] = json.loads(file.read_text())
    assert file.name.startswith(result["date"][:10])
    return result, done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> loader_systems.Data:
    folder = tmp_path_factory.mktemp("photographs")
    if not any(photographs._sources(500, 375)):
        missing = "no photographs here: install Debian's mate-backgrounds and opencv-doc"
        pytest.fail(missing) if os.environ.get("VITSCALE_REQUIRE_PHOTOGRAPHS") else pytest.skip(missing)
    photographs.write(folder / "files", 500, 375, count=6, names=2)
    photographs.packed(folder / "files", folder / "packed", samples_per_shard=4)
    return loader_systems.Data(folder)


def test_all_formats_hold_the_same_photographs(data: loader_systems.Data) -> None:
    dataset = Dataset.open(data.dataset)
    packed = sorted(dataset.read(i) for i in range(dataset.num_samples))
    assert packed == sorted(Path(path).read_bytes() for path, _ in data.labelled())
    assert len(packed) == 12
    assert len(set(packed)) == 6
    assert len(data.tars) == 3


@pytest.mark.parametrize("system", [*loader_systems.USUAL, *loader_systems.OURS])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_system_gives_whole_batches_that_differ(data: loader_systems.Data, system: str, workers: int) -> None:
    batches = iter(loader_systems.SYSTEMS[system](data, workers, BATCH))
    first, second = (np.asarray(batch) for batch in itertools.islice(batches, 2))
    if system in ("vitscale exact", "vitscale fast"):
        assert (first.shape, first.dtype) == ((BATCH, 224, 224, 3), np.uint8)
    else:
        assert (first.shape, first.dtype) == ((BATCH, 3, 224, 224), np.float32)
        assert -1 <= first.min() < -0.5 < 0.5 < first.max() <= 1
    assert first.flags.c_contiguous
    assert not np.array_equal(first, second)
    assert first.std(axis=(1, 2)).min() > 0, "an empty slot"


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_normalised_on_the_cpu_is_what_training_normalises(data: loader_systems.Data, decode: str) -> None:
    pixels = next(loader_systems.vitscale_uint8(data, 1, BATCH, decode=decode))
    expected = normalize(torch.from_numpy(pixels), PreprocessConfig()).numpy()
    assert np.array_equal(next(loader_systems.vitscale_float(data, 1, BATCH, decode=decode)), expected)


def test_memory_and_time_are_of_all_processes() -> None:
    code = "import sys; sum(range(20_000_000)); print('done', flush=True); sys.stdin.read()"
    before = loader_systems.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert {os.getpid(), child.pid} <= loader_systems.family().keys()
        spent = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        its_own = int(spent[11]) / os.sysconf("SC_CLK_TCK")
        assert loader_systems.cpu_seconds() - before >= its_own - 1e-6  # a difference of two sums of hundredths
        assert its_own > 0
        child.communicate()
    assert child.pid not in loader_systems.family()


def test_speed_and_workers(data: loader_systems.Data, tmp_path: Path) -> None:
    systems = [loader_systems.BASELINE, "vitscale exact", "FFCV"]
    flags = ["--parts", "speed", "workers", "--systems", *systems, "--peers", sys.executable, "--rounds", "2"]
    result, printed = bench(tmp_path, "loader.py", *flags)
    rows = result["speed"]["images_per_second_per_core"]
    missing = result["speed"]["left_out"]
    assert rows.keys() | missing.keys() == set(systems)
    assert {loader_systems.BASELINE, "vitscale exact"} <= rows.keys()
    assert all("No module named" in reason for reason in missing.values()), missing
    for name, row in rows.items():
        for size, cells in row.items():
            for cores, cell in cells.items():
                assert min(cell["rounds"]) > 0
                assert len(cell["rounds"]) == 2
                assert cell["median"] == pytest.approx(sum(cell["rounds"]) / 2)
                assert cell["ratio"] == pytest.approx(cell["median"] / rows[loader_systems.BASELINE][size][cores]["median"])
        assert name in printed
    kinds = {(row["kind"], row["workers"], row["micro_batch"]) for row in result["workers"]["rows"]}
    assert {(kind, 1, batch) for kind in ("threads", "processes") for batch in (16, 128)} <= kinds
    assert all(row["median"] > 0 for row in result["workers"]["rows"])


def test_stages_training_and_memory(data: loader_systems.Data, tmp_path: Path) -> None:
    result, _ = bench(tmp_path, "loader.py", "--parts", "stages", "training", "memory")
    for stages in [of[mode] for of in result["stages"].values() for mode in ("exact", "fast")]:
        parts = itertools.takewhile(lambda stage: stage[0] != "of it decoding, at most", stages.items())
        assert sum(ms for _, ms in parts) == pytest.approx(stages["the stream's stages together"])
    for case in result["training"].values():
        assert case["expected"] <= 1
        ratios = [fed / ready for fed, ready in zip(case["turns"]["fed"], case["turns"]["ready"], strict=True)]
        assert case["fed_to_ready"] == statistics.median(ratios)
        assert min(ratios) <= case["middle_half"][0] <= case["middle_half"][1] <= max(ratios)
        assert 0 < case["waiting"] < 1
    resident = result["memory"]["resident_MiB"]
    assert len(resident) == 20
    assert all(20 < mib < 2_000 for mib in resident.values())


def test_a_rank_that_begins_far_in_reports_its_memory(data: loader_systems.Data) -> None:
    command = [sys.executable, "benchmarks/loader_memory.py", "begin", str(data.dataset), "--at", str(4096 * 1000)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["first_batch_seconds"] > 0
    assert 1 < found["own_MiB"] < 1_000


@pytest.mark.soak
def test_memory_after_a_million_samples(data: loader_systems.Data, tmp_path: Path) -> None:
    found = loader_memory.soak(tmp_path, 1_000_000)
    (first, at_first), *_, (last, at_last) = found["resident_MiB"].items()
    assert (int(first), int(last)) == (50_000, 1_000_000)
    print(f"{at_first:.0f} MiB after 50,000 samples, {at_last:.0f} MiB after 1,000,000")
    assert at_last <= 1.1 * at_first


@pytest.mark.peers
def test_torchvisions_transform_without_torchvision_gives_its_pixels(data: loader_systems.Data) -> None:
    assert loader_systems.check_equal([path for path, _ in data.labelled()]) == 12


@pytest.mark.peers
@pytest.mark.parametrize("system", [name for name in loader_systems.PEERS if name != "FFCV"])
def test_every_peer_gives_normalised_batches(data: loader_systems.Data, system: str) -> None:
    batches = iter(loader_systems.SYSTEMS[system](data, 1, BATCH))
    batch = np.asarray(next(batches))
    assert (batch.shape, batch.dtype) == ((BATCH, 3, 224, 224), np.float32)
    assert -1 <= batch.min() < -0.5 < 0.5 < batch.max() <= 1
