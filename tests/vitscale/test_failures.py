"""How often to save, and what failures cost."""

from tests.vitscale.plans import H14
from vitscale.failures import checkpoint_interval, expected_goodput
from vitscale.gpus import Cluster, gpu


def test_checkpoints_are_as_often_as_failures_ask() -> None:
    often, rarely = (Cluster(gpu("h100"), 64, 8, node_mtbf_hours=hours) for hours in (500, 50_000))
    assert checkpoint_interval(H14, often) < checkpoint_interval(H14, rarely)
    assert expected_goodput(H14, often) < expected_goodput(H14, rarely) < 1
