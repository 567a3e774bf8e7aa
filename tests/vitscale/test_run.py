"""The run directory: what may change on a resume, what is refused, what is remembered, and that an evaluation is not lost to a kill."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.amend import removals, write_overlay
from data_tools.config import PackConfig
from data_tools.dataset import Dataset, DatasetError
from data_tools.pack import pack
from tests.command import SMALL, vitscale
from tests.conftest import with_engine, write_images
from tests.disks import unreadable
from tests.distributed import run_on_ranks
from tests.runs import begin, last_start, log
from vitscale import checkpoint, stopping
from vitscale.config import ConfigError, ObjectiveConfig, TrainConfig, ViTConfig, changes, from_dict, may_change, to_dict
from vitscale.ending import Ended
from vitscale.heartbeat import EVALUATING
from vitscale.quarantine import Fault, Quarantine
from vitscale.resolve import resolve
from vitscale.run import (
    RunError,
    cut_back,
    is_finished,
    locked,
    open_run,
    read_config,
    read_metrics,
    read_record,
    unusable_line,
    used_overlays,
    was_evaluated,
    write_json,
)
from vitscale.status import status
from vitscale.train import train


def test_what_changes_on_a_resume_is_remembered(config: TrainConfig) -> None:
    begun = begin(config)
    assert last_start(config)["changed"] == {}
    again = begin(replace(with_engine(config, zero_stage=2), micro_batch_size=12), 2)
    assert last_start(config)["changed"] == {"engine.zero_stage": "0 -> 2", "micro_batch_size": "4 -> 12"}
    assert (begun != again, read_config(Path(config.out))) == (True, again)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"zero_optimization": {"reduce_bucket_size": 1000}}, True),
        ({"prescale_gradients": True}, False),
        ({"zero_optimization_of_mine": 1}, False),
    ],
)
def test_of_deepspeeds_settings_only_those_of_zero_may_change(config: TrainConfig, settings: dict, allowed: bool) -> None:
    (name,) = changes(config, with_engine(config, deepspeed=settings))
    assert may_change(name) == allowed
    begin(config)
    if allowed:
        begin(with_engine(config, deepspeed=settings))
    else:
        with pytest.raises(RunError, match="holds a run with other settings: engine"):
            begin(with_engine(config, deepspeed=settings))


@pytest.mark.parametrize("name", ["seed", "steps", "model.depth", "optimizer.peak_lr", "engine.precision", "stream.lanes", "init.weights"])
def test_what_is_learned_may_not_change(name: str) -> None:
    assert not may_change(name)


def test_a_run_that_failed_before_its_first_step_may_become_another(config: TrainConfig) -> None:
    begin(config)
    (Path(config.out) / "metrics.jsonl").unlink()
    begin(replace(config, seed=3))
    assert read_config(Path(config.out)).seed == 3
    with pytest.raises(RunError, match="seed: 3 -> 4"):
        begin(replace(config, seed=4))


def test_labels_that_were_changed_are_refused(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    """A flipped bit among the labels has no checksum of its own: the whole index is hashed at a start and before an evaluation."""
    damaged = shutil.copytree(dataset, tmp_path / "damaged")
    for split in ("train", "val"):
        file = damaged / split / "index.arrow"
        content = bytearray(file.read_bytes())
        opened = Dataset.open(damaged / split)
        first = opened.labels(np.arange(opened.num_samples))[0].astype(np.int32).tobytes()
        at = content.index(first[:60])
        content[at] ^= 1
        file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train/index.arrow was changed"):
        resolve(replace(config, data=str(damaged / "train")), 1)
    with pytest.raises(DatasetError, match=r"val/index.arrow was changed"):
        resolve(replace(config, eval_data=str(damaged / "val")), 1)


def test_a_held_out_set_with_other_class_names_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 10, 3)
    (images / "class-4").rename(images / "klasse-4")
    (other,) = pack(PackConfig((str(images),), str(tmp_path / "other"), split="val"))
    with pytest.raises(DatasetError, match="have classes of other names; pack both"):
        resolve(replace(config, eval_data=str(other.path)), 1)


def test_a_run_that_never_made_a_step_has_the_length_of_its_next_start(config: TrainConfig) -> None:
    """The first start came to an end before its first step, say for its data, and may still become another run."""
    for steps in (6, 40):
        resolved = resolve(replace(config, steps=steps), 1)
        with locked(Path(config.out)):
            assert not open_run(resolved, 1)
        assert read_record(Path(config.out))["total_steps"] == steps
    begin(replace(config, steps=40))
    with pytest.raises(RunError, match="steps: 40 -> 41"):
        begin(replace(config, steps=41))


def test_unusable_samples_are_told_by_their_commonest_reason(config: TrainConfig) -> None:
    run = Path(begin(config).out)
    assert (status(run)["unusable"], unusable_line(run)) == ({}, "")
    quarantine = Quarantine(run / "quarantine.jsonl", 0, max_samples=9, max_per_shard=9)
    quarantine.add(
        [Fault(position, sample, "d", "s", "k", reason) for position, sample, reason in ((0, 4, "cut"), (1, 5, "bent"), (2, 5, "bent"))]
    )
    quarantine.add([Fault(3, 6, "d", "s", "k", "bent")])
    assert quarantine.count() == 3
    assert status(run)["unusable"] == {"cut": 1, "bent": 2}
    told = unusable_line(run)
    assert told.startswith("warning: others came in the place of 3 unusable samples; 2 for: bent, and 1 other reason; ")
    assert told.endswith("quarantine.jsonl names them")


def test_records_are_cut_back_to_the_checkpoint(config: TrainConfig) -> None:
    begin(config)
    run, batch = Path(config.out), config.global_batch_size
    log(config, *({"step": step, "loss": 1.0} for step in (2, 3)), {"step": 3, "eval_loss": 1.0})
    positions = [0, 2 * batch - 1, 2 * batch, 9 * batch]
    (run / "quarantine.jsonl").write_text("".join(json.dumps({"position": p}) + "\n" for p in positions) + '{"posi')
    cut_back(run, 2, 2 * batch)
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert [json.loads(line)["position"] for line in (run / "quarantine.jsonl").read_text().splitlines()] == positions[:2]


@pytest.mark.parametrize("how", ["all damaged", "gone", "unreadable"])
def test_weeks_of_training_are_not_begun_anew_for_want_of_a_checkpoint(dataset: Path, tmp_path: Path, how: str) -> None:
    command = ("pretrain", "tiny-digits", "--data", dataset / "train", "--out", tmp_path / "run", "--eval-data", "none", *SMALL)
    assert vitscale(*command, "--checkpoint-every", "2").returncode == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")  # so that it is not finished
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    if how == "gone":
        (tmp_path / "run/checkpoints").rename(tmp_path / "elsewhere")
    stack = contextlib.ExitStack()
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        file = folder / ("COMMIT.json" if how == "unreadable" else "checkpoint.json")
        if how == "unreadable":
            stack.enter_context(unreadable(file))
        else:
            file.write_bytes(b"{}")
    with stack:
        done = vitscale(*command, "--checkpoint-every", "2")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0)
    assert ("Input/output error" in done.stderr) if how == "unreadable" else ("metrics.jsonl tells of step 6, yet" in done.stderr)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_another_held_out_set_is_refused(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    """One that lies elsewhere is the same; none may become one, and one none."""
    (other,) = pack(PackConfig((str(write_images(tmp_path / "images", 20, 7)),), str(tmp_path / "other"), split="val"))
    begin(config)  # with none
    begin(replace(config, eval_data=str(dataset / "val")))
    moved = shutil.copytree(dataset / "val", tmp_path / "moved")
    begin(replace(config, eval_data=str(moved)))
    begin(config)
    with pytest.raises(RunError, match=r"--eval-data .*val \(37 samples, hash \w+\); .*other/val is images \(20 samples"):
        begin(replace(config, eval_data=str(other.path)))


def test_windows_that_do_not_fit_are_refused_where_they_are_asked_for(config: TrainConfig) -> None:
    """Where nobody asks, single samples are read."""
    stream = replace(config.stream, lanes=4, window=16, buffer_bytes=20_000)
    assert resolve(replace(config, stream=stream), 1).stream == stream
    with pytest.raises(
        ConfigError, match=r"stream.reads=windows would hold \S+ bytes of windows a rank, over stream.buffer_bytes=20,000; "
    ):
        resolve(replace(config, stream=replace(stream, reads="windows")), 1)


def test_a_record_of_another_version_is_not_touched(config: TrainConfig) -> None:
    begin(config)
    file = Path(config.out) / "run.json"
    text = file.read_text().replace('"format_version": 1', '"format_version": 2')
    file.write_text(text)
    with pytest.raises(RunError, match="has format version 2; this vitscale reads 1"):
        begin(config)
    assert file.read_text() == text


def test_scores_that_cannot_weigh_the_loss_are_refused_before_a_start(tmp_path: Path) -> None:
    images = [file.read_bytes() for file in sorted(write_images(tmp_path / "images", 6, 0).rglob("*.png"))]
    for scores, said in (([[0.5], [1.5]] * 3, r"\[0.5, 1.5\]"), ([[-1.0], None] * 3, r"\[-1, 1\]"), ([[0.25], None] * 3, None)):
        table = pa.table({"image": images, "labels": [[0], [1]] * 3, "scores": scores})
        pq.write_table(table, tmp_path / "table.parquet")
        (packed,) = pack(PackConfig((str(tmp_path / "table.parquet"),), str(tmp_path / f"out{said}")))
        model = ViTConfig(depth=1, width=8, mlp_dim=8, num_heads=1, patch_size=8, image_size=(8, 8))
        asked = TrainConfig(
            data=str(packed.path), out=str(tmp_path / "run"), steps=1, global_batch_size=6, micro_batch_size=6, model=model,
            objective=ObjectiveConfig("sigmoid", soft_targets=True),
        )  # fmt: skip
        if said:
            with pytest.raises(ConfigError, match=f"soft_targets needs scores in \\[0, 1\\], .* has them in {said}"):
                resolve(asked, 1)
        else:
            resolve(asked, 1)
            held_out = replace(asked, eval_data=str(tmp_path / r"out\[0.5, 1.5\]/train"))
            with pytest.raises(ConfigError, match=r"soft_targets needs scores in \[0, 1\], .*out.*/train has them in \[0.5, 1.5\]"):
                resolve(held_out, 1)


def test_an_evaluation_that_a_kill_took_is_made_up_for(dataset: Path, tmp_path: Path) -> None:
    """A checkpoint is written before the evaluation of its step; without it a run is not finished."""
    command = ("pretrain", "tiny-digits", "--data", dataset / "train", "--out", tmp_path / "run", *SMALL, "--eval-every", "3")
    assert vitscale(*command).returncode == 0
    whole = read_metrics(tmp_path / "run")
    evaluations = [line["step"] for line in whole if "eval_loss" in line]
    assert evaluations == [3, 6]
    for killed_at, keep in ((3, 0), (3, 1), (6, 0)):  # before the evaluation was told, and after
        end = next(i for i, line in enumerate(whole) if "eval_loss" in line and line["step"] == killed_at)
        (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[: end + keep]))
        if killed_at == 3:
            shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
        assert not is_finished(tmp_path / "run")
        assert vitscale(*command).returncode == 0
        assert is_finished(tmp_path / "run")
        again = read_metrics(tmp_path / "run")
        assert [line["step"] for line in again] == [line["step"] for line in whole]
        for name in ("loss", "eval_loss", "eval_top1"):
            assert np.array_equal([line[name] for line in again if name in line], [line[name] for line in whole if name in line])


def test_a_run_takes_overlays_up_at_its_next_start(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    """Remembered for each start; ranks use those that their start found; one that was used may not go away."""
    shutil.copytree(dataset, tmp_path / "data")
    config = replace(config, data=str(tmp_path / "data" / "train"))
    packed = Dataset.open(config.data)
    begin(config)
    assert last_start(config)["overlays"] == {"data": [], "eval_data": []}
    first = write_overlay(packed, "takedown", removals(np.array([5]), pa.array(["asked for"])))
    assert used_overlays(Path(config.out)) == {"data": (), "eval_data": ()}, "the start that is under way has not seen it"
    begin(config)
    assert last_start(config)["overlays"]["data"] == [first.name]
    second = write_overlay(packed, "takedown", removals(np.array([6]), pa.array(["asked for"])))
    begin(config)
    assert used_overlays(Path(config.out))["data"] == (first.name, second.name)
    hidden = first.rename(tmp_path / first.name)
    with pytest.raises(RunError, match=f"used the overlay {first.name}, which is no more"):
        begin(config)
    hidden.rename(first)
    begin(config)
    record = json.loads((Path(config.out) / "run.json").read_text())
    del record["starts"][-1]["overlays"]
    write_json(Path(config.out) / "run.json", record)
    begin(config)
    assert used_overlays(Path(config.out))["data"] == (first.name, second.name), "a run of a version without overlays goes on"


def test_a_dataset_of_which_overlays_leave_nothing_is_refused(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "train", tmp_path / "train")
    packed = Dataset.open(tmp_path / "train")
    write_overlay(packed, "all", removals(np.arange(packed.num_samples), pa.array(["why not"] * packed.num_samples)))
    with pytest.raises(DatasetError, match="holds no samples that its overlays leave"):
        resolve(replace(config, data=str(packed.path), eval_data="none"), 1)


@pytest.mark.parametrize(
    "odd", ["[]", "null", "0", '{"loss": 1.0}', '{"step": "x", "loss": 1.0}', '{"step": 3, "loss": null}', '{"step": 3, "eval_loss": "x"}']
)
def test_a_line_of_metrics_that_is_none_is_told_of(config: TrainConfig, odd: str) -> None:
    run = Path(begin(config).out)
    (run / "metrics.jsonl").write_text(f"{odd}\n")
    with pytest.raises(RunError, match="take it out to go on"):
        status(run)


@pytest.mark.parametrize(
    "odd",
    [
        {"starts": None}, {"starts": [1]}, {"starts": [{}]}, {"starts": [{"time": "now"}]}, {"total_steps": "x"}, {"dataset": [1]},
        {"held_out": [1]}, {"origin": 1}, {"origin": {"starts": 1}}, {"skipped": [1]}, {"skipped": [{"positions": [1]}]},
        {"initial": [1]},
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_told_of(config: TrainConfig, odd: dict) -> None:
    run = Path(begin(config).out)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | odd))
    with pytest.raises(RunError, match=r"run.json is damaged .*; restore it"):
        status(run)


def stopped_in_evaluation(payload: dict) -> tuple[str, int]:
    """How a start ends that hears TERM in its first batch of evaluation, and how many of these it came to."""
    batches = 0

    def beat(step: int, samples_seen: int, phase: str) -> None:
        nonlocal batches
        if phase == EVALUATING:
            batches += 1
            stopping._came.add("TERM")

    with pytest.raises(Ended) as ended:
        train(from_dict(TrainConfig, payload), beat=beat)
    return str(ended.value), batches


def test_a_stop_breaks_an_evaluation_off(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    """After the batch in whose time all ranks have heard of it; what was trained is saved already."""
    config = begin(replace(config, eval_data=str(dataset / "val"), eval_every=2, micro_batch_size=2, global_batch_size=4))
    words, batches = run_on_ranks("tests.vitscale.test_run:stopped_in_evaluation", 1, to_dict(config), tmp_path)
    assert (words, batches) == ("stopped at step 2 by SIGTERM, and saved", 2)
    assert not was_evaluated(Path(config.out), 2)
    assert [checkpoint.step_of(folder) for folder in checkpoint.committed(Path(config.out))] == [2]
