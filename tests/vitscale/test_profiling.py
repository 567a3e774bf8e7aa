"""Profiles of real runs on two ranks: they change nothing that is learned, and count what the model does."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.run_verbs import status_lines
from tests.distributed import run_on_ranks
from tests.runs import check_alike
from vitscale import flops
from vitscale import train as loop
from vitscale.breakdown import AVERAGE, breakdown
from vitscale.check import check_config
from vitscale.config import ConfigError, ProfileConfig, TrainConfig, from_dict, may_change, to_dict
from vitscale.metrics import SHARES
from vitscale.resolve import resolve
from vitscale.run import open_run, read_metrics
from vitscale.status import status

FIRST, STEPS = 4, 2


def runs(payload: dict[str, Any]) -> None:
    """As it is, profiled, with blocks that are computed again, and with a profile that the run's end breaks off."""
    some = {"steps": STEPS, "first_step": FIRST}
    profiles = {"plain": {}, "profiled": some, "again": some, "cut": {"steps": 20, "first_step": 5, "ranks": [1]}}
    for name, profile in profiles.items():
        config: TrainConfig = from_dict(TrainConfig, payload["config"] | {"profile": profile})
        engine = dataclasses.replace(config.engine, checkpoint_every_n_blocks=int(name == "again"), checkpoint_keeps="products")
        config = dataclasses.replace(config, out=str(Path(payload["folder"]) / name), engine=engine)
        run = Path(config.out)
        if dist.get_rank() == 0:
            run.mkdir()
            open_run(config, 2)
            if name == "profiled":  # what a start leaves that is killed while it writes
                (run / "profile/.step-00000004-rank-0").mkdir(parents=True)
                (run / "profile/.step-00000004-rank-0/trace.json").write_text('{"traceEvents": [')
        dist.barrier()
        loop.train(config)


def test_a_profile_tells_where_the_time_went_and_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config,
        steps=8,
        log_every=1,
        model=dataclasses.replace(config.model, drop_path_rate=0.0),
        engine=dataclasses.replace(config.engine, zero_stage=1),
        optimizer=dataclasses.replace(config.optimizer, average_decay=0.9),
    )
    config = resolve(config, 2)
    run_on_ranks("tests.vitscale.test_profiling:runs", 2, {"config": to_dict(config), "folder": str(tmp_path)}, tmp_path)
    check_alike(tmp_path / "profiled", tmp_path / "plain")
    check_alike(tmp_path / "cut", tmp_path / "plain")
    assert not (tmp_path / "cut/profile").exists()

    folder, name = tmp_path / "profiled/profile", "step-00000004-rank-0"
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.json", f"{name}.json.gz", f"{name}.md"]
    found = json.loads((folder / f"{name}.json").read_text())
    again = breakdown(json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes())))
    assert {key: found[key] for key in again} == again
    assert (found["steps"], found["on"]) == (STEPS, "host")
    assert (folder / f"{name}.md").read_text() in (tmp_path / "rank-0.log").read_text()

    # Where blocks are computed again, torch leaves them by an exception as soon as it has what it wants
    computed_again = json.loads((tmp_path / f"again/profile/{name}.json").read_text())
    for tables in (found, computed_again):
        assert 0 < tables["busy"] <= 1
        for table in ("phases", "kinds", "modules"):
            assert sum(row["ms"] for row in tables[table].values()) == pytest.approx(tables["step_ms"])
            assert min(row["ms"] for row in tables[table].values()) >= 0
    assert {"data", "forward", "backward", "communication", "update", AVERAGE, "logging"} <= found["phases"].keys()
    assert {"patch_embed", "blocks.attn", "blocks.mlp", "blocks.norm1", "blocks.norm2", "norm", "head"} <= found["modules"].keys()
    assert found["kinds"]["collectives"]["ms"] > 0
    # Every product of the model is found, forward and backward, each in its module; the first one's input needs no gradient
    model, images = config.model, config.global_batch_size // 2
    embed = 2 * model.grid[0] * model.grid[1] * 3 * model.patch_size**2 * model.width
    mlp = 3 * 2 * model.depth * model.num_tokens * 2 * model.width * model.mlp_dim
    for table in ("kinds", "modules", "phases"):
        assert sum(row.get("flops", 0) for row in found[table].values()) == images * (flops.train_flops(model) - embed), table
    assert found["modules"]["patch_embed"]["flops"] == images * 2 * embed
    assert found["modules"]["blocks.mlp"]["flops"] == images * mlp
    assert found["phases"]["backward"]["flops"] > 1.5 * found["phases"]["forward"]["flops"]

    lines = {line["step"]: line for line in read_metrics(tmp_path / "profiled")}
    marked = [step for step, line in lines.items() if line.get("profiled")]
    assert marked == [FIRST - 1, *range(FIRST, FIRST + STEPS)], "the warm-up too"
    assert [step for step, line in lines.items() if not set(SHARES) <= line.keys()] == marked
    told = status(tmp_path / "profiled")
    assert told["profile"] == str(folder / f"{name}.md")
    assert f"profile: {folder}/{name}.md" in status_lines(told)
    assert told["bound"] in "\n".join(status_lines(told))
    assert sum(told["pace"][share] for share in SHARES) == pytest.approx(1)


def test_a_profile_is_no_part_of_what_a_run_is(config: TrainConfig) -> None:
    assert all(may_change(f"profile.{name}") for name in ("steps", "first_step", "ranks"))
    old = to_dict(config)
    del old["profile"]
    assert from_dict(TrainConfig, old) == config
    with pytest.raises(ConfigError, match="first_step=1 has no step before it to warm up; 2 has"):
        check_config(dataclasses.replace(config, profile=ProfileConfig(steps=1, first_step=1)), 1)
