"""A run with a held-out part: training sees each other sample at its own position and none of these, and evaluation is on these alone."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset import Dataset, DatasetError
from data_tools.holdout import Part
from tests.distributed import run_on_ranks
from tests.runs import begin, case, check_alike, variant
from vitscale.config import ConfigError, PreprocessConfig, StreamConfig, TrainConfig
from vitscale.mixture import Mixture
from vitscale.resolve import open_data, open_held_out, resolve
from vitscale.run import RunError, note_begin, read_metrics
from vitscale.stream import Share, TrainStream, evaluation_batches
from vitscale.timeline import timeline_of
from vitscale.which import which_step

SHARE = 0.2


def held_out_of(dataset: Path) -> set[int]:
    part = Dataset.open(dataset / "train", part=Part(SHARE, True))
    return set(range(131)) - set(np.flatnonzero(part.overlay.removed(np.arange(131))).tolist())


def seen(config: TrainConfig, world_size: int, *, processes: bool = False) -> list[int]:
    """The samples at the positions of two epochs."""
    mixture, positions = open_data(config), 264  # eleven steps of 24
    samples: list[int] = []
    batches = [
        TrainStream(
            mixture, config.preprocess, dataclasses.replace(config.stream, processes=processes, workers=1),
            Share(timeline_of(config, 131), rank, world_size), seed=0, quarantine=Path(config.out) / "quarantine.jsonl",
        ).micro_batches(0, positions) for rank in range(world_size)
    ]  # fmt: skip
    for _ in range(positions // 24):
        step = np.concatenate([next(stream).samples_B for stream in batches for _ in range(24 // (4 * world_size))])
        samples += step.tolist()
    return samples


def test_each_other_sample_is_at_its_own_position_of_each_epoch(config: TrainConfig, dataset: Path) -> None:
    whole, part = (begin(dataclasses.replace(config, holdout=share, out=f"{config.out}-{share}")) for share in (0.0, SHARE))
    held_out = held_out_of(dataset)
    assert 10 < len(held_out) < 50
    before, after = seen(whole, 1), seen(part, 1)
    assert not held_out & set(after)
    assert all(was == now for was, now in zip(before, after, strict=True) if was not in held_out)
    assert set(before[:131]) == set(range(131)), "in this order a step of one rank is its positions in order"
    assert sorted(seen(part, 3)) == sorted(after)
    assert seen(part, 1, processes=True) == after
    note_begin(Path(part.out), 0)
    told = which_step(Path(part.out), 2).samples
    assert [at.sample for at in told] == after[24:48]
    replaced = [other for at in told for other in at.instead_of]
    assert {was for was in before[24:48] if was in held_out} <= {other.sample for other in replaced} <= held_out
    assert {other.reason for other in replaced} == {"it is held out"}


def test_evaluation_is_on_the_part_alone_and_takes_no_more_batches_than_it_needs(config: TrainConfig, dataset: Path) -> None:
    part = open_held_out(begin(dataclasses.replace(config, holdout=SHARE, eval_data="")))
    assert part
    for world_size in (1, 2, 3):
        of_ranks = [
            list(
                evaluation_batches(
                    Mixture([part]), (16, 24), PreprocessConfig(), StreamConfig(workers=1), batch_size=4, rank=rank, world_size=world_size
                )
            )
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in of_ranks} == {math.ceil(math.ceil(part.num_kept / world_size) / 4)}
        samples = [int(s) for batches in of_ranks for batch in batches for s in batch.samples_B[batch.valid_B]]
        assert samples == sorted(held_out_of(dataset))


def test_a_run_is_evaluated_on_what_it_holds_out_and_goes_on_bitwise(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config, holdout=SHARE, steps=6, eval_every=3, eval_data="")
    runs = {name: variant(config, tmp_path, name, world_size=2, zero_stage=1) for name in ("whole", "part", "rest")}
    assert runs["whole"].eval_data == str(dataset / "train")
    cases = {"whole": case(runs["whole"]), "part": case(runs["part"], stop_at=4)}
    run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": cases}, tmp_path)
    run_on_ranks("tests.vitscale.test_zero:walk", 2, {"cases": {"rest": case(runs["rest"], copy_of=str(tmp_path / "part"))}}, tmp_path)
    check_alike(tmp_path / "rest", tmp_path / "whole")
    evaluations = [line for line in read_metrics(tmp_path / "rest") if "eval_top1" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    told = {(line["eval_samples"], line["eval_skipped"], line["eval_removed"]) for line in evaluations}
    assert told == {(len(held_out_of(dataset)), 0, 0)}
    assert json.loads((tmp_path / "rest" / "config.json").read_text())["holdout"] == SHARE


def test_another_share_is_another_run(config: TrainConfig) -> None:
    begin(dataclasses.replace(config, holdout=SHARE, eval_data=""))
    begin(dataclasses.replace(config, holdout=SHARE, eval_data=""))
    with pytest.raises(RunError, match=r"holdout: 0.2 -> 0.1"):
        begin(dataclasses.replace(config, holdout=0.1, eval_data=""))


def test_what_cannot_be_held_out_is_refused(config: TrainConfig, dataset: Path, second: Path) -> None:
    held_out = dataclasses.replace(config, holdout=SHARE, eval_data="")
    with pytest.raises(ConfigError, match=r"holdout=0.2 evaluates on a part of the training split, and eval_data=.*val on something else"):
        resolve(dataclasses.replace(held_out, eval_data=str(dataset / "val")), 1)
    with pytest.raises(ConfigError, match="holds out a part of one dataset, and --data names 2"):
        resolve(dataclasses.replace(held_out, data=(str(dataset / "train"), str(second))), 1)
    with pytest.raises(ConfigError, match=r"holdout=1 must lie in \[0, 1\)"):
        resolve(dataclasses.replace(held_out, holdout=1.0), 1)
    with pytest.raises(DatasetError, match="holdout=1e-06 holds out none of the 131 samples"):
        resolve(dataclasses.replace(held_out, holdout=1e-6), 1)
