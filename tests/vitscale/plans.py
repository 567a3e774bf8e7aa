"""Plans of ViT-H/14, and what they tell."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vitscale.config import Phase, TrainConfig
from vitscale.gpus import Cluster, gpu
from vitscale.plan import Data, Plan, dataset_of, make_plan
from vitscale.recipes import PRETRAIN, recipe
from vitscale.roofline import assumed

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
H14 = recipe("vit-h14-jft300m", PRETRAIN)
PHASES = (Phase(0.4, (126, 126), 8192), Phase(0.7, (168, 140), micro_batch_size=16))


def h14(nodes: int = 8, **changed: Any) -> Plan:
    return plan_of(replace(H14, **changed), nodes)


def plan_of(config: TrainConfig, nodes: int, name: str = "h200") -> Plan:
    cluster = Cluster(gpu(name), nodes, 8)
    return make_plan(config, cluster, Data(dataset_of(config.recipe)[0]), assumed(cluster.gpu, config.engine.precision))


def figure(plan: Plan, name: str) -> float:
    return next(f.value for section in plan.sections.values() for f in section if f.name == name)  # type: ignore[return-value]
