"""A sweep as a user types it, on real runs: what it tries, what it chooses, and what it does not make again."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from data_tools.dataset import Dataset
from data_tools.holdout import Part
from launch.flags import UsageError
from launch.local import start
from launch.sweep import SweepError, Trial, best_trial, check_alike, final_run, grid_of, sweep, table, trial_at, trials_of
from launch.verbs import finetune_flags
from tests.command import vitscale
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale.config import FinetuneConfig, InitConfig, OptimizerConfig, SweepConfig, TrainConfig, ViTConfig
from vitscale.recipes import FINETUNE, recipe
from vitscale.run import is_finished, read_config, read_metrics, read_record

SOURCE = ViTConfig(depth=1, width=16, mlp_dim=16, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=7)
# What is learned in six steps depends on the rate; a gradient that is not finite ends a run at once
SMALL = (
    "--model.image-size 16 24 --steps 6 --global-batch-size 24 --micro-batch-size 24 --schedule.warmup-steps 1 --log-every 1 "
    "--eval-every 0 --guard.max-nonfinite 0 --guard.max-rollbacks 0 --stream.workers 1"
).split()


@pytest.mark.parametrize("function", FINETUNE, ids=lambda of: of.__name__)
def test_a_recipes_grid_and_share(function: object) -> None:
    name = function.__name__.replace("_", "-")  # type: ignore[attr-defined]
    asked = recipe(name, FINETUNE)
    if not asked.sweep.peak_lrs:
        with pytest.raises(UsageError, match="has no grid of learning rates; give them"):
            grid_of(asked, ())
        return
    assert asked.optimizer.peak_lr in grid_of(asked, ())
    assert {trial.holdout for trial in trials_of(asked, grid_of(asked, ()))} == {asked.sweep.holdout}


def test_trials_differ_in_their_rate_alone_and_the_run_holds_nothing_out() -> None:
    asked = FinetuneConfig(
        recipe="r", out="runs/x", eval_data="val", optimizer=OptimizerConfig("sgd", peak_lr=9.0), sweep=SweepConfig((1e-3,), 0.1)
    )
    first, second = trials_of(asked, (0.003, 1e-5))
    assert (first.out, second.out) == ("runs/x/sweep/lr-0.003", "runs/x/sweep/lr-1e-05")
    assert dataclasses.replace(second, out=first.out, optimizer=first.optimizer) == first
    assert (first.holdout, first.eval_data, first.optimizer.peak_lr, first.optimizer.momentum) == (0.1, "", 0.003, 0.9)
    final = final_run(dataclasses.replace(asked, holdout=0.3), 0.003)
    assert final == dataclasses.replace(asked, optimizer=first.optimizer)
    assert trials_of(dataclasses.replace(asked, holdout=0.3), (1.0,))[0].holdout == 0.3


def test_the_best_is_of_top1_then_loss_then_the_lower_rate() -> None:
    def trial(lr: float, top1: float, loss: float) -> Trial:
        return Trial(lr, f"lr-{lr:g}", "finished", top1, loss, 100)

    diverged, unfinished = Trial(1.0, "lr-1", "diverged"), Trial(2.0, "lr-2", "unfinished")
    assert best_trial([trial(0.1, 0.5, 9.0), trial(0.2, 0.6, 99.0), diverged]).peak_lr == 0.2
    assert best_trial([trial(0.1, 0.5, 9.0), trial(0.2, 0.5, 8.0)]).peak_lr == 0.2
    assert best_trial([trial(0.2, 0.5, 8.0), trial(0.1, 0.5, 8.0)]).peak_lr == 0.1
    with pytest.raises(SweepError, match="lr-2 is not finished"):
        best_trial([trial(0.1, 0.5, 9.0), unfinished])
    with pytest.raises(SweepError, match=r"every trial of --sweep 1 diverged; .* --sweep 0.1"):
        best_trial([diverged])
    lines = table([trial(0.1, 0.5, 9.0), trial(0.2, 0.61, 1.0), diverged], 0.1).splitlines()
    assert [line.split()[:6] for line in lines[1:]] == [
        ["0.1", "50.00%", "40.4%", "to", "59.6%", "9.0000"],  # Wilson's of 50 and 61 in 100
        ["0.2", "61.00%", "51.2%", "to", "70.0%", "1.0000"],
        ["1", "diverged", "lr-1"],
    ]
    assert [line.endswith("best") for line in lines] == [False, False, True, False]


def test_what_cannot_be_swept_is_refused() -> None:
    asked = FinetuneConfig(recipe="r")
    for odd in ((0.1, 0.1), (0.0,), (float("nan"),), (-1.0, 0.1)):
        with pytest.raises(UsageError, match="given twice or not above 0"):
            grid_of(asked, odd)
    with pytest.raises(UsageError, match="would never be evaluated"):
        grid_of(dataclasses.replace(asked, eval_data="none"), (0.1,))
    with pytest.raises(UsageError, match=r"--holdout 0\.1 works"):
        finetune_flags(["tiny-finetune", "--sweep", "0.1", "--holdout", "0"])
    with pytest.raises(UsageError, match=r"leave out --optimizer\.peak-lr"):
        finetune_flags(["tiny-finetune", "--sweep", "0.1", "--optimizer.peak-lr", "0.2"])
    runs = [TrainConfig(out=out, init=InitConfig("run", "average", "timm", f"run/checkpoints/{folder}")) for out, folder in ("ab", "cd")]
    with pytest.raises(SweepError, match="a began from run/checkpoints/b, and c is to begin from run/checkpoints/d; give another --out"):
        check_alike(runs)
    here = [TrainConfig(out="a", init=InitConfig("run", "average", "timm", folder)) for folder in ("run", str(Path("run").resolve()))]
    check_alike(here)  # is one folder


@pytest.mark.parametrize(("words", "expected"), [([], None), (["--sweep"], ()), (["--sweep", "0.1", "3e-4"], (0.1, 3e-4))])
def test_the_flag_with_values_and_without(words: list[str], expected: tuple[float, ...] | None) -> None:
    flags = finetune_flags(["finetune-pets", *words, "--seed", "3"])
    assert flags.sweep == expected
    assert flags.config == dataclasses.replace(recipe("finetune-pets", FINETUNE), seed=3)


def test_ctrl_c_too_late_for_a_trial_ends_the_sweep(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It comes right after the first trial's end."""

    def start_and_be_stopped(*asked: Any) -> int:
        ended = start(*asked)
        signal.raise_signal(signal.SIGINT)
        return ended

    monkeypatch.setattr("launch.sweep.start", start_and_be_stopped)
    source = write_checkpoint(tmp_path / "source", random_vit(SOURCE)).path
    words = ["tiny-finetune", "--init", source, "--data", dataset / "train", *SMALL, "--out", tmp_path / "run", "--holdout", "0.2"]
    assert sweep(finetune_flags(list(map(str, words))).config, (0.01, 0.02), 1, as_json=True) == 130
    output, said = capfd.readouterr()
    told = json.loads(output)
    assert ([trial["state"] for trial in told["trials"]], told["best"], told["run"]) == (["finished", "unfinished"], None, None)
    assert "stopped with 1 of 2 trials made; the same command makes the others" in said
    assert [path.name for path in (tmp_path / "run" / "sweep").glob("lr-*")] == ["lr-0.01"]


def test_a_trial_that_came_to_its_end_and_learned_nothing_loses(dataset: Path, tmp_path: Path) -> None:
    """Its gradient is not finite at its last step, which is left out, as the guard has it."""
    source = write_checkpoint(tmp_path / "source", random_vit(SOURCE)).path
    words = ["finetune", "tiny-finetune", "--init", source, "--data", dataset / "train", *SMALL, "--guard.max-nonfinite", "10"]
    made = vitscale(*words, "--out", tmp_path / "trial", "--holdout", "0.2", "--optimizer.peak-lr", "1e30")
    assert (made.returncode, is_finished(tmp_path / "trial")) == (0, True), made.stderr
    trial = trial_at(tmp_path / "trial", 1e30)
    assert (trial.state, trial.left_out > 0) == ("diverged", True)
    lines = table([trial, Trial(0.1, "lr-0.1", "finished", 0.5, 1e9, 100, 1)], 0.2).splitlines()
    assert lines[1].split()[1] == "diverged"
    assert lines[2].endswith("1e+09   lr-0.1  (1 step left out, not finite)  best")


def test_a_sweep_goes_on_where_it_was_and_trains_the_run_with_the_best(dataset: Path, tmp_path: Path) -> None:
    """Of three trials one is there already, made as a run of its own, and one diverges."""
    source = write_checkpoint(tmp_path / "source", random_vit(SOURCE)).path
    run = tmp_path / "run"
    words = ["finetune", "tiny-finetune", "--init", source, "--data", dataset / "train", *SMALL]
    first = vitscale(*words, "--out", run / "sweep" / "lr-0.001", "--holdout", "0.2", "--optimizer.peak-lr", "0.001")
    assert first.returncode == 0, first.stderr
    made = vitscale(*words, "--out", run, "--holdout", "0.2", "--sweep", "0.001", "0.2", "1e30", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert [(of["peak_lr"], of["state"]) for of in told["trials"]] == [(0.001, "finished"), (0.2, "finished"), (1e30, "diverged")]
    assert json.loads((run / "sweep" / "sweep.json").read_text()) == {name: told[name] for name in ("holdout", "trials", "best")}
    held_out = Dataset.open(dataset / "train", part=Part(0.2, True)).num_kept
    results = {}
    for lr in (0.001, 0.2):
        trial = run / "sweep" / f"lr-{lr:g}"
        assert len(read_record(trial)["starts"]) == 1
        assert (read_config(trial).holdout, read_config(trial).eval_data) == (0.2, str(dataset / "train"))
        last = read_metrics(trial)[-1]
        results[lr] = (last["eval_top1"], -last["eval_loss"])
        assert (last["step"], last["eval_samples"]) == (6, held_out)
        assert trial_at(trial, lr) == Trial(**told["trials"][0 if lr == 0.001 else 1])
    assert told["best"] == max(results, key=lambda lr: results[lr])
    final = read_config(run)
    assert (final.holdout, final.eval_data, final.optimizer.peak_lr) == (0.0, str(dataset / "val"), told["best"])
    assert read_metrics(run)[-1]["eval_samples"] == 37
    again = vitscale(*words, "--out", run, "--holdout", "0.2", "--sweep", "0.001", "0.2", "1e30")
    assert again.returncode == 0
    assert again.stdout.count("diverged") == 1
    assert "is finished" in again.stderr
    assert [len(read_record(of)["starts"]) for of in (run, run / "sweep" / "lr-0.2")] == [1, 1]
    fewer = vitscale(*words, "--out", run, "--holdout", "0.2", "--sweep", repr(told["best"]))
    assert fewer.returncode == 0, fewer.stderr
    assert [trial["peak_lr"] for trial in json.loads((run / "sweep" / "sweep.json").read_text())["trials"]] == [0.001, 0.2, 1e30]
    goes_on = vitscale(*words, "--out", run, "--optimizer.peak-lr", f"{told['best']!r}")
    assert (goes_on.returncode, "is finished" in goes_on.stderr) == (0, True), "as a sweep that is refused says"
    for grid in (("0.001", "0.2", "1e30", "0.1"), ("0.001" if told["best"] == 0.2 else "0.2", "1e30")):
        late = vitscale(*words, "--out", run, "--holdout", "0.2", "--sweep", *grid)
        assert (late.returncode, late.stderr.count("\n")) == (1, 1)
        assert f"has begun, at the peak learning rate {told['best']!r}" in late.stderr
        assert f"--optimizer.peak-lr {told['best']!r} without --sweep and --holdout goes on with it" in late.stderr
    assert len(list((run / "sweep").glob("lr-*"))) == 3, "nothing is trained that cannot be used"
    own = vitscale(*words, "--out", run / "sweep" / "lr-0.001", "--holdout", "0.2", "--sweep", "0.001", "0.002")
    assert "--optimizer.peak-lr 0.001 --holdout 0.2 without --sweep goes on with it" in own.stderr, "what first was told"
    for setting in (("--holdout", "0.3"), ("--optimizer.freeze", "backbone"), ("--steps", "12")):
        other = vitscale(*words, "--out", run, "--holdout", "0.2", "--sweep", "0.001", "0.2", "1e30", *setting)
        assert other.returncode == 1, "results of other settings are not this sweep's"
        assert setting[0].removeprefix("--") in other.stderr
