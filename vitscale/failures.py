"""What checkpoints and failures cost a run: how often to save, and the share of the time that is left. Pure functions; imports no torch."""

import math

from vitscale.config import TrainConfig
from vitscale.flops import checkpoint_bytes
from vitscale.gpus import Cluster

SNAPSHOT_SOURCE = "benchmarks/results/2026-11-22-checkpoint-h14-state-1.json"
SNAPSHOT_BANDWIDTH = 9.0e9  # there: 5.05 GB copied in 0.56 s by one rank of a CPU


def stall_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """For which training stops while a rank's part is copied to host memory; it is written behind the training."""
    return checkpoint_bytes(config.model, config.optimizer) / cluster.world_size / SNAPSHOT_BANDWIDTH


def write_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """Until a checkpoint is durable."""
    return checkpoint_bytes(config.model, config.optimizer) / cluster.storage_bandwidth


def checkpoint_interval(config: TrainConfig, cluster: Cluster) -> float:
    """Seconds between checkpoints that lose least (Young 1974, Daly 2006): sqrt(2 x stall x mean time between failures), and never before
    the one before it is written."""
    failure = cluster.node_mtbf_hours * 3600 / cluster.nodes
    return max(math.sqrt(2 * stall_seconds(config, cluster) * failure), write_seconds(config, cluster), 60.0)


def expected_goodput(config: TrainConfig, cluster: Cluster) -> float:
    """Share of the time that goes into steps that last: less stalls, half an interval and a restart for each failure."""
    failure, interval = cluster.node_mtbf_hours * 3600 / cluster.nodes, checkpoint_interval(config, cluster)
    stalled = stall_seconds(config, cluster) / interval
    return max(0.01, 1 - stalled - (interval / 2 + write_seconds(config, cluster) + cluster.restart_seconds) / failure)
