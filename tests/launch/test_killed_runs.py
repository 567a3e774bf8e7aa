"""Runs that are killed at any moment, and checkpoints with a wrong bit: the same command goes on from a durable one, to the same bits."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import SMALL, VITSCALE
from tests.runs import check_alike
from tests.slurm import wait_for
from vitscale import checkpoint
from vitscale.run import is_finished, locked, read_metrics, read_record

KILLS, FLIPS = 20, 5  # by `make soak`
SAMPLE = 3  # of the kills, each time; and one flip
STEPS = 60
HELD = str(Path(__file__).parents[1] / "held")


def start(dataset: Path, out: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    settings = f"--steps {STEPS} --checkpoint-every 4 --keep-checkpoints 3 --nproc 2 --eval-data none".split()
    command = [VITSCALE, "pretrain", "tiny-digits", "--data", str(dataset / "train"), "--out", str(out), *SMALL, *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}))


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nothing happens to, and the seconds that it took."""
    out, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    run = start(dataset, out)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return out, time.monotonic() - began


def starts(out: Path) -> list[dict]:
    return read_record(out)["starts"] if (out / "run.json").is_file() else []


def kill(dataset: Path, folder: Path, whole: Path, seconds: float, moments: list[float]) -> None:
    """Kills the launcher, with which its ranks end, at moments of a run's length, 0 to 1; where a run came to its end another is begun."""
    for number in itertools.count():
        out, durable = folder / f"run-{number}", {}  # what each start is to go on from
        while not is_finished(out):
            run = start(dataset, out)
            try:
                _, errors = run.communicate(timeout=moments.pop() * seconds if moments else None)
                assert run.returncode == 0, errors
            except subprocess.TimeoutExpired:
                run.kill()
                run.communicate()
                with locked(out, 60):  # all its ranks have ended
                    saved, faults = checkpoint.newest_durable(out)
                assert not faults, "what is committed is whole"
                durable[len(starts(out))] = checkpoint.step_of(saved) if saved else 0
        begun = {index: start["step"] for index, start in enumerate(starts(out)) if "step" in start}  # some were killed before they knew
        assert begun == {index: durable.get(index, 0) for index in begun}
        print(f"killed {len(durable)} times, went on from {list(durable.values())}")
        check_alike(out, whole)
        if not moments:
            return


def moments(kills: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.random() for _ in range(kills)]


@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_ends_as_if_it_never_was(dataset: Path, tmp_path: Path, whole: tuple[Path, float]) -> None:
    kill(dataset, tmp_path, *whole, moments(SAMPLE, 0))


@pytest.mark.soak
@pytest.mark.timeout(6000)
def test_runs_killed_at_many_moments(dataset: Path, tmp_path: Path, whole: tuple[Path, float]) -> None:
    kill(dataset, tmp_path, *whole, moments(KILLS, 1))


def test_a_run_that_is_killed_before_its_first_checkpoint_is_whole_starts_anew(
    dataset: Path, tmp_path: Path, whole: tuple[Path, float]
) -> None:  # fmt: skip
    """Checkpoints are written behind the training: rank 0 waits where two steps more are made than the first one holds."""
    hold = {"steps": [7], "marks": str(tmp_path)}
    run = start(dataset, tmp_path / "run", {"VITSCALE_TEST_HOLD": json.dumps(hold), "PYTHONPATH": os.pathsep.join([HELD, *sys.path])})
    wait_for((tmp_path / "held-7").exists, "step 7", 300)
    run.kill()
    run.communicate()
    with locked(tmp_path / "run", 60):
        assert not checkpoint.committed(tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5
    run = start(dataset, tmp_path / "run")
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    check_alike(tmp_path / "run", whole[0])


def flip(dataset: Path, out: Path, whole: Path, seed: int) -> None:
    """Turns over a bit of the last checkpoint of the finished run's copy; the same command makes the steps since the one before again."""
    rng = random.Random(seed)
    shutil.copytree(whole, out)
    newest, before = checkpoint.committed(out)[-1], checkpoint.committed(out)[-2]
    file = rng.choice(sorted(file for file in newest.iterdir() if file.name != "COMMIT.json"))
    content, at = bytearray(file.read_bytes()), rng.randrange(8 * file.stat().st_size)
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)
    run = start(dataset, out)
    output, errors = run.communicate()
    assert run.returncode == 0, errors
    assert f"{newest.name}: {file.name} does not have the checksum in COMMIT.json" in output
    assert f"{before.name} is used" in output
    assert [start["step"] for start in starts(out)] == [0, checkpoint.step_of(before)]
    check_alike(out, whole)


def test_a_wrong_bit_costs_the_steps_since_the_checkpoint_before(dataset: Path, tmp_path: Path, whole: tuple[Path, float]) -> None:
    flip(dataset, tmp_path / "run", whole[0], 0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, FLIPS))
def test_wrong_bits(dataset: Path, tmp_path: Path, whole: tuple[Path, float], seed: int) -> None:
    flip(dataset, tmp_path / "run", whole[0], seed)
