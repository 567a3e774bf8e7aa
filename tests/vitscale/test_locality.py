"""The arithmetic of a cluster, against what the order really gives its ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset import Dataset
from tests.command import vitscale
from vitscale.config import StreamConfig
from vitscale.locality import Size, choose_order, locality, traffic
from vitscale.order import RunOrder

SHARDS, PER_SHARD, BYTES = 3_000, 1_010, 100_000
SIZE = Size(SHARDS * PER_SHARD, SHARDS, SHARDS * PER_SHARD * BYTES)


def order_of(lanes: int, window: int) -> RunOrder:
    return RunOrder([np.full(SHARDS, PER_SHARD)], None, 0, lanes, window)


@pytest.mark.parametrize(("lanes", "world_size"), [(64, 8), (64, 32), (64, 64), (64, 48), (256, 96)])
def test_what_is_told_is_what_ranks_do(lanes: int, world_size: int) -> None:
    """Lanes, windows begun, and the share of samples in a rank's own windows, counted over 100 steps of some ranks."""
    batch = 2 * lanes * world_size // np.gcd(2 * lanes, world_size)
    order = order_of(lanes, 64)
    told = locality(SIZE, StreamConfig(lanes=lanes, window=64, buffer_bytes=2**40), global_batch_size=int(batch),
                    world_size=world_size)  # fmt: skip
    bytes_per_read = traffic(told, 500).bytes_per_read
    assert told.reads == "windows"
    own = total = 0
    for rank in range(world_size):
        positions = np.concatenate([order.positions_of_rank(step * batch, batch, rank, world_size) for step in range(100)])
        mine = order.preferred_ranks(positions, batch, world_size) == rank
        windows = np.unique(order.windows_at(positions[mine]), axis=0)
        assert len(np.unique(windows[:, 2])) <= told.lanes_per_rank
        own, total = own + np.count_nonzero(mine), total + len(mine)
        runs = [len(order.window_runs(*window)) for window in windows.tolist()]
        if runs and told.in_windows == 1:
            assert np.mean(runs) == pytest.approx(told.window / (bytes_per_read / BYTES), rel=0.1)
    assert own / total == pytest.approx(told.in_windows, abs=0.01)


def test_the_paper_s_cluster() -> None:
    """303 M images of 100 kB in 30 k shards on 256 GPUs: figures that one can follow by hand."""
    told = locality(
        Size(303_000_000, 30_000, 303_000_000 * 100_000), choose_order(StreamConfig(), 303_000_000, 4096),
        global_batch_size=4096, world_size=256,
    )  # fmt: skip
    asks = traffic(told, 1000)
    assert (told.lanes, told.window, told.lanes_per_rank, asks.nodes) == (1024, 256, 4, 32)
    assert told.window_bytes == 25_600_000
    # Of each of four lanes the window in use, the next, and one that the 80 images in the making may still need
    assert told.buffered_bytes_per_rank == 12 * 25_600_000 < told.buffer_bytes
    assert asks.buffered_bytes_per_node == 8 * told.buffered_bytes_per_rank
    assert (told.reads, told.in_windows) == ("windows", 1.0)
    assert asks.bytes_per_second == 256 * 1000 * 100_000
    assert asks.reads_per_second_per_rank == pytest.approx(1000 / 256 * (1 + 255 / 10_100))
    assert asks.seconds_per_window == pytest.approx(1.024)
    assert asks.seconds_per_epoch == pytest.approx(303_000_000 / 256_000)


@pytest.mark.parametrize(("lanes", "world_size", "buffer_bytes", "said"), [
    (1, 8, 2**30, "one lane"), (64, 128, 2**30, "--stream.lanes 256"), (64, 8, 2**20, "MiB of windows a rank are over the 1 MiB"),
])  # fmt: skip
def test_why_single_samples_are_read(lanes: int, world_size: int, buffer_bytes: int, said: str) -> None:
    told = locality(SIZE, StreamConfig(lanes=lanes, window=64, buffer_bytes=buffer_bytes), global_batch_size=1024, world_size=world_size)
    asks = traffic(told, 500)
    assert told.reads == "samples"
    assert said in told.why
    assert asks.reads_per_second_per_rank == 500
    assert asks.bytes_per_read == BYTES
    assert told.buffered_bytes_per_rank == 0


def test_as_typed(dataset: Path) -> None:
    words = ("data", "stats", dataset / "train", "--for-world", 4, "--global-batch-size", 64, "--lanes", 16, "--window", 4)
    told = json.loads(vitscale(*words, "--json").stdout)
    assert (told["world_size"], told["lanes"], told["lanes_per_rank"], told["reads"]) == (4, 16, 4, "windows")
    assert told["bytes_per_sample"] * 131 == pytest.approx(Dataset.open(dataset / "train").shard_bytes.sum())
    shown = vitscale(*words).stdout
    assert "16 lanes, 4 a rank" in shown
    assert "the cluster" in shown
    for wrong, said in [
        (("--for-world", 3), "--global-batch-size 4096 is not a multiple of --for-world 3; 4095 is"),
        (("--for-world", 0), "--for-world 0 must be at least 1"),
        (("--for-world", 4, "--images-per-second-per-gpu", 0), "must be above 0"),
        (("--gpus-per-node", 4), "it goes with --for-world"),
        (("--for-world", 4, "--html", "x.html"), "leave out --for-world"),
    ]:
        done = vitscale("data", "stats", dataset / "train", *wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
