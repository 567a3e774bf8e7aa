"""`vitscale evaluate` as a user types it: reports of one process and of several, what is refused, and a live run that is watched."""

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_tools.amend import removals, write_overlay
from data_tools.dataset import Dataset
from launch.question import EvaluateFlags, identity
from launch.watcher import UnusableError, measure_settled
from tests.command import SMALL, VITSCALE, vitscale
from vitscale import checkpoint, retention
from vitscale.run import RunError, read_evaluations
from vitscale.watch import note, recording


def train(out: Path, dataset: Path, *words: object) -> list[str]:
    command = ["pretrain", "tiny-digits", "--data", dataset / "train", "--out", out, *SMALL, "--keep-checkpoints", 0, *words]
    return [VITSCALE, *map(str, command)]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "run"
    trained = subprocess.run(train(out, dataset), capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


def report(*words: object) -> dict[str, Any]:
    done = vitscale("evaluate", *words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def watching(run: Path, dataset: Path, *words: object) -> "subprocess.Popen[str]":
    command = [VITSCALE, "evaluate", "--watch", run, "--data", dataset / "val", "--json", "--interval", 0.2, *words]
    return subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- One checkpoint -------------------------------------------------------------------------------------------------------------------


def test_several_processes_tell_what_one_tells(run: Path, dataset: Path, tmp_path: Path) -> None:
    opened = Dataset.open(dataset / "val")
    real = {opened.key(sample): [sample % 5] for sample in range(opened.num_samples)}
    (tmp_path / "real.json").write_text(json.dumps(real))
    asked = [run, "--data", dataset / "val", "--batch-size", 8, "--real", tmp_path / "real.json", "--average-precision", "--bootstrap", 9]
    tables = ["--per-class", "--confusions", 3]
    one = report(*asked, *tables, "--nproc", 1, "--out", tmp_path / "one.json")
    two = report(*asked, *tables, "--nproc", 2, "--out", tmp_path / "two.json")
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-12)
    assert one == two
    whole = json.loads((tmp_path / "one.json").read_text())
    assert len(whole["confusions"]) > len(one["confusions"]) == 3
    assert whole | {"confusions": one["confusions"]} == one | {"loss": whole["loss"]}
    assert one["real_samples"] == one["samples"] == 37
    assert sum(of["samples"] for of in one["classes"]) == 37

    said = vitscale("evaluate", *asked, *tables)
    assert said.returncode == 0
    lines = said.stdout.splitlines()
    assert lines[1] == f"top-1 {one['top1']:.2%}, top-5 {one['top5']:.2%}, loss {whole['loss']:.4f}"
    assert any(line.startswith(f"ReaL top-1 {one['real_top1']:.2%} (") for line in lines)
    assert any(line.startswith(f"mean average precision {one['mean_average_precision']:.2%} (") for line in lines)
    assert [line.split()[0] for line in lines[lines.index("") + 2 :][:5]] == [f"class-{label}" for label in range(5)]
    most = one["confusions"][0]
    assert lines[-3].split() == [most["name"], most["guess_name"], str(most["samples"])]


def test_a_probe_by_several_processes_is_that_of_one(run: Path, dataset: Path) -> None:
    """Of the training split beside; a line for each of its results."""
    asked = [run, "--data", dataset / "val", "--protocol", "fewshot", "--shots", 1, 3, "--seeds", 2, "--batch-size", 8]
    one, two = (report(*asked, "--nproc", nproc) for nproc in (1, 2))
    assert one == two
    assert (one["protocol"], one["train_samples"], one["test_samples"]) == ("fewshot", 131, 37)
    said = vitscale("evaluate", *asked)
    assert said.returncode == 0, said.stderr
    for line, result in zip(said.stdout.splitlines()[-2:], one["results"], strict=True):
        assert f"{result['shots']} shot" in line
        assert f"top-1 {result['top1']:.2%}" in line


BAD = {
    "RUN --data DATA/val --batch-size 0": "batch-size=0 must be at least 1",
    "RUN --data DATA/val --bootstrap 9": "--bootstrap is of --average-precision, without which it does nothing; give both or neither",
    "RUN --data DATA/val --average-precision --seed 1": "--seed is of --bootstrap",
    "RUN --data DATA/val --confusions -1": "confusions=-1 must be at least 0",
    "RUN --data DATA/val --nproc -1": "nproc=-1 must be 0, which starts one a GPU, or 1 or more",
    "RUN --data DATA/val --watch --interval 0": "interval=0 must be above 0 and at most 3600 seconds",
    "RUN --data DATA/val --protocol logits": "'head', 'fewshot', 'linear', 'knn'",
    "RUN --data DATA/val --protocol knn --per-class": "--per-class is of --protocol head",
    "RUN --data DATA/val --protocol knn --per_class": "--per-class is of --protocol head",
    "RUN --data DATA/val --protocol knn --shots 5": "--shots is of --protocol fewshot",
    "RUN --data DATA/val --solver ridge": "--solver is of --protocol linear",
    "RUN --data DATA/val --train-data DATA/train": "--train-data is of --protocol fewshot, linear or knn",
    "RUN --data DATA/val --interval 30": "--interval is of --watch",
    "RUN --data DATA/val --protocol knn --train-data TMP": "is not a dataset",
    "RUN --data DATA/val --protocol fewshot --shots 0 5 --nproc 2": "shots=[0, 5] and seeds=3 must be at least 1",
    "RUN --data DATA/val --protocol linear --train-data OTHER --nproc 2": "have 2 and 5 classes; a probe needs the same",
    "RUN --data DATA/val --protocol knn --train-data DATA/val --watch": "is the split that the probe is trained on",
    "RUN --data DATA/val --real TMP/none.json": "none.json cannot be read (No such file or directory)",
    "RUN --data DATA/val --out TMP/none/report.json": "is to be a file in a folder that is there",
    "RUN --data DATA/val --watch --per-class": "leave out --out, --per-class and --confusions",
    "TMP --data DATA/val --watch": "is not a run",
    "RUN/checkpoints/step-00000006 --data DATA/val --watch": "is not a run",
    "RUN --data OTHER --nproc 2": "has a head of 5 classes",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line(typed: str, run: Path, dataset: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = typed
    for name, place in {"RUN": run, "DATA": dataset, "OTHER": other, "TMP": tmp_path / "empty"}.items():
        words = words.replace(name, str(place))
    done = vitscale("evaluate", *words.split(), cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert BAD[typed] in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two classes."""
    from tests.conftest import write_images

    folder = tmp_path_factory.mktemp("other")
    assert vitscale("pack", write_images(folder / "images", 6, 0, 2), folder / "packed").returncode == 0
    return folder / "packed" / "train"


# -- A live run -----------------------------------------------------------------------------------------------------------------------


def test_a_live_run_is_watched_to_its_end(dataset: Path, tmp_path: Path) -> None:
    """Two watchers come and go, a third sees it finish: each checkpoint is evaluated once, in order, as `vitscale evaluate` does."""
    run = tmp_path / "run"
    training = subprocess.Popen(train(run, dataset, "--steps", 18, "--eval-every", 6), stdout=subprocess.PIPE, text=True)
    assert training.stdout
    for line in training.stdout:
        if line.startswith("saved"):
            break
    for _ in range(2):
        with watching(run, dataset) as watcher:
            assert watcher.stdout
            json.loads(watcher.stdout.readline())
            watcher.send_signal(signal.SIGTERM)
            _, said = watcher.communicate()
            assert (watcher.returncode, said.count("\n")) in ((75, 1), (0, 0)), said  # 0: the run was over before the signal came
    training.stdout.read()
    assert training.wait() == 0
    with watching(run, dataset) as watcher:
        _, said = watcher.communicate()
        assert (watcher.returncode, said) == (0, "")
    lines, written = read_evaluations(run), (run / "evaluations.jsonl").read_text()
    steps = [checkpoint.step_of(folder) for folder in checkpoint.committed(run)]
    assert steps == [3, 6, 9, 12, 15, 18]
    assert [line["step"] for line in lines] == steps
    for step, line in ((6, lines[1]), (18, lines[-1])):
        alone = report(f"{run}@{step}", "--data", dataset / "val")
        assert line["loss"] == pytest.approx(alone.pop("loss"), rel=1e-12)
        assert alone.items() <= line.items()
    status = vitscale("run", "status", run)
    assert f"evaluated apart at step 18 on {dataset}/val: top-1 {lines[-1]['top1']:.2%}, top-5" in status.stdout
    assert list((run / "tensorboard").glob("evaluate-*/events.*"))
    assert (
        vitscale("evaluate", run, "--watch", "--data", dataset / "val").stdout
        == f"{run} is finished, and all its checkpoints are evaluated\n"
    )
    assert (run / "evaluations.jsonl").read_text() == written


def test_another_question_is_another_evaluation(copied: Path, dataset: Path) -> None:
    for words in ([], ["--average-precision"]):
        with watching(copied, dataset, *words) as watcher:
            watcher.communicate()
            assert watcher.returncode == 0
    lines = read_evaluations(copied)
    assert [line["step"] for line in lines] == [3, 6, 3, 6]
    assert [line["mean_average_precision"] is not None for line in lines] == [False, False, True, True]


def test_a_question_is_known_by_what_changes_the_answer(dataset: Path, tmp_path: Path) -> None:
    """What lies at a path counts, not the path; a flag that is not known to change nothing counts."""
    val, train, real = (
        shutil.copytree(dataset / "val", tmp_path / "moved"),
        shutil.copytree(dataset / "train", tmp_path / "other"),
        tmp_path / "a",
    )
    real.write_text("[[1]]")
    (tmp_path / "b").write_text("[[1]]")
    head, probe = EvaluateFlags("run", str(dataset / "val"), real=str(real)), EvaluateFlags("run", str(dataset / "val"), protocol="knn")
    laid_out = {"batch_size": 8, "workers": 1, "nproc": 2, "watch": True, "interval": 1.0, "json": True, "stage": str(tmp_path / "stage")}
    for flags, elsewhere in ((head, {"real": str(tmp_path / "b")}), (probe, {"train_data": str(train)})):
        assert identity(replace(flags, **laid_out, **elsewhere, checkpoint="other", data=str(val))) == identity(flags)
    few = replace(probe, protocol="fewshot")
    said = [
        identity(flags)
        for flags in (
            head, probe, replace(head, real=""), replace(head, weights="weight"), replace(head, average_precision=True),
            replace(head, average_precision=True, bootstrap=9), replace(head, average_precision=True, bootstrap=9, seed=2),
            replace(head, eval_protocol="timm"), few, replace(few, shots=(1,)), replace(few, seeds=1), replace(probe, protocol="linear"),
            replace(probe, protocol="linear", solver="sgd"), replace(probe, data=str(dataset / "train")),
        )
    ]  # fmt: skip
    real.write_text("[[2]]")
    write_overlay(Dataset.open(train), "takedown", removals(np.array([3]), pa.array(["asked for"])))
    write_overlay(Dataset.open(val), "takedown", removals(np.array([3]), pa.array(["asked for"])))
    said += [identity(head), identity(replace(head, data=str(val))), identity(replace(probe, train_data=str(train)))]
    assert not [one for number, one in enumerate(said) if one in said[:number]]


def test_a_damaged_checkpoint_is_told_of_and_left_out(copied: Path, dataset: Path) -> None:
    file = checkpoint.step_folder(copied, 3) / "node-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with watching(copied, dataset) as watcher:
        _, said = watcher.communicate()
    assert watcher.returncode == 0
    assert said == f"warning: {file.parent}: {file.name} does not have the checksum in COMMIT.json; the file is damaged; going on\n"
    assert [line["step"] for line in read_evaluations(copied)] == [6]


@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_checkpoint_that_the_run_removes_is_told_of(copied: Path, dataset: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention takes it away before it is looked at, or once its checksums have been found to hold."""
    flags = EvaluateFlags(str(copied), str(dataset / "val"), nproc=1, watch=True, json=True)
    folder = checkpoint.step_folder(copied, 3)

    def verify_and_remove(of: Path) -> None:
        retention.remove(copied, [3])

    if when == "before":
        retention.remove(copied, [3])
    else:
        monkeypatch.setattr("vitscale.checkpoint.verify", verify_and_remove)
    with pytest.raises(UnusableError, match=f"^{folder} was removed (before|while) it was evaluated$"):
        measure_settled(flags, folder)


def test_one_writes_at_a_time_and_what_a_kill_cut_short_goes(copied: Path, dataset: Path) -> None:
    with recording(copied) as file:
        note(file, {"step": 3, "commit": "a"})
        file.write(b'{"step": 6, "com')
        with pytest.raises(RunError, match="is being written by another"), recording(copied):
            pass
        done = vitscale("evaluate", copied, "--data", dataset / "val", "--watch")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "evaluations.jsonl is being written by another `vitscale evaluate --watch`; one can run at a time" in done.stderr
    with recording(copied) as file:
        note(file, {"step": 6, "commit": "b"})
    assert [line["step"] for line in read_evaluations(copied)] == [3, 6]
    (copied / "evaluations.jsonl").write_text('{"step": "six"}\n')
    done = vitscale("run", "status", copied)
    assert "evaluations.jsonl has a line that names no checkpoint" in done.stderr
