"""The command as a user types it, in processes of its own: help, bad input, runs without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.main import VERBS
from tests.command import SMALL, vitscale, without_torch
from vitscale import checkpoint


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "first"
    done = vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("verb", ["", *VERBS, "pretrain vit-h14-jft300m", "finetune finetune-imagenet-518"])
def test_help(verb: str) -> None:
    done = vitscale(*verb.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: vitscale" in done.stdout
    if verb in ("pretrain", "finetune"):
        assert all(
            name in done.stdout for name in ("vit-h14-jft300m",) * (verb == "pretrain") + ("finetune-imagenet-518",) * (verb == "finetune")
        )


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from launch.main import main; main(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("torch", "deepspeed", "numpy", "pyarrow", "PIL") if f"'{name}'" in loaded]


def test_a_run_maps_staged_indices(dataset: Path, tmp_path: Path) -> None:
    words = ("pretrain", "tiny-digits", "--data", dataset / "train", "--out", tmp_path / "run", *SMALL, "--stage", tmp_path / "stage")
    done = vitscale(*words, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    indices = {(dataset / split / "index.arrow").read_bytes() for split in ("train", "val")}
    assert {file.read_bytes() for file in (tmp_path / "stage").glob("*.arrow")} == indices


# What is typed, where DATA, RUN and TMP stand for a dataset, a finished run and an empty folder; and what the one line must say.
BAD_INPUT = {
    "pretrian": "(perhaps `vitscale pretrain` was meant); there are pack, data index, data ",
    "checkpoint shwo RUN": "is not a verb (perhaps `vitscale checkpoint show` was meant); there are checkpoint show, checkpoint verify",
    "pretrain": "needs a recipe as its first word; there are vit-b32-jft300m",
    "pretrain vit-h15": "no recipe is called 'vit-h15'; there are",
    "pretrain tiny-digits": "no dataset is given; --data",
    "pretrain tiny-digits --data DATA/train --model.dept 3": "--model.dept, 3 (perhaps --model.depth was meant)",
    "pretrain tiny-digits --data DATA/train --model.depth three": "--model.depth",
    "pretrain tiny-digits --data DATA/train --model.pool maximum": "'cls', 'mean', 'map'",
    "pretrain tiny-digits --data TMP/nowhere": "nowhere does not exist; a dataset is",
    "pretrain tiny-digits --data TMP": "is not a dataset",
    "pretrain tiny-digits --data DATA": "open one of its splits",
    "pretrain tiny-digits --data DATA/train --out TMP/r --nproc 3": "= 96; global_batch_size=96 works",
    "pretrain tiny-digits --data DATA/train --out TMP/r --global-batch-size 65": "is not a multiple of micro_batch_size x world_size",
    "pretrain tiny-digits --data DATA/train --out DATA/train/run": "lies inside the dataset",
    "pretrain tiny-digits --data DATA/train --out TMP/r --nproc -1": "nproc=-1 must be 0, which starts one a GPU, or 1 or more",
    "pretrain tiny-digits --data DATA/train --out TMP/r --model.image-size 16 25": "25 is not a multiple of patch_size=2; 24 is",
    "pretrain tiny-digits --data DATA/train --out TMP/r --model.num-heads 5": "is not a multiple of num_heads=5; num_heads=4 works",
    "pretrain tiny-digits --data DATA/train --out TMP/r --model.num-classes 4": "has 5 classes; --model.num-classes 5 fits it",
    "pretrain tiny-digits --data DATA/train --out TMP/r --steps 5 --epochs 7": "set exactly one above 0",
    "pretrain tiny-digits --data DATA/train --out TMP/r --engine.precision bf16 --engine.zero-stage 0": "--engine.zero-stage 1 has",
    "pretrain tiny-digits --data DATA/train --out TMP/r --optimizer.peak-lr nan": "optimizer.peak_lr=nan must be a number",
    "pretrain tiny-digits --data DATA/train --out TMP/r --steps 50": "warmup_steps=50 leaves nothing of the run's 50 steps",
    "pretrain tiny-digits --data DATA/train --out TMP/r --eval-data TMP": "is not a dataset",
    "pretrain tiny-digits --data DATA/train --out DATA": "exists and is not a run; give another --out",
    "pretrain tiny-digits --data DATA/train --out RUN": "holds a run with other settings",
    "finetune tiny-finetune --data DATA/train": "--init",
    "finetune tiny-finetune --data DATA/train --out TMP/r --init TMP/none": "none does not exist; a checkpoint is a run",
    "finetune tiny-finetune --data DATA/train --out TMP/r --init DATA/train": "holds no durable checkpoint",
    "finetune tiny-finetune --data DATA/train --out TMP/r --init RUN": "28 is not a multiple of patch_size=8; 32 is",
    "finetune tiny-finetune --data DATA/train --out TMP/r --init RUN --model.depth 4": "--model.depth, 4",
    "finetune tiny-finetune --data DATA/train --out TMP/r --init RUN --preprocess.mean 0 0 0": "--preprocess.mean, 0, 0, 0",
    "pretrain tiny-digits --data DATA/train --out TMP/r --optimizer.betas 0.9 1.0": "must both lie in [0, 1)",
    "pretrain tiny-digits --data DATA/train --out TMP/r --engine.deepspeed {\"gradient_clipping\":3}": "use --optimizer.grad-clip",
    "evaluate RUN --data TMP": "is not a dataset",
    "evaluate RUN@4 --data DATA/val": "no checkpoint of step 4; there are those of steps 3, 6",
    "evaluate RUN": "--data",
    "checkpoint show DATA": "holds no durable checkpoint",
    "checkpoint export RUN DATA": "exists; give a folder that does not",
    "checkpoint export RUN TMP/x --to onnx": "'timm', 'hf', 'npz', 'safetensors'",
    "pretrain tiny-digits --data DATA/train --out TMP/r --epochs 3 --steps 3": "epochs=3 and steps=3: set exactly one above 0",
    "pretrain tiny-digits --data DATA/train --out TMP/r --steps 60 --schedule.cooldown-steps 11": "--schedule.cooldown-steps 10 works",
    "pretrain tiny-digits --data DATA/train --out TMP/r --model.patch-dropout 1": "model.patch_dropout=1 must lie in [0, 1)",
    "pretrain tiny-digits --data DATA/train --out TMP/r --model.patch-dropout 0.5 --model.position relative": (
        "model.patch_dropout=0.5 leaves each image patches of its own"
    ),
    "pretrain tiny-digits --data DATA/train --out TMP/r --engine.checkpoint-keeps products": (
        "checkpoint_keeps=products does nothing with checkpoint_every_n_blocks=0; 1 checkpoints every block"
    ),
    "pretrain tiny-digits --data DATA/train --out TMP/r --objective.label-smoothing 1": "objective.label_smoothing=1 must lie in [0, 1)",
    "pretrain tiny-digits --data DATA/train --out TMP/r --optimizer.average-decay 1": "optimizer.average_decay=1 must lie in [0, 1)",
    'pretrain tiny-digits --data DATA/train --out TMP/r --engine.deepspeed {"zero_optimization":true}': "use --engine.zero-stage",
    'pretrain tiny-digits --data DATA/train --out TMP/r --engine.deepspeed {"bfloat16":{"enabled":true}}': "use --engine.precision",
    'pretrain tiny-digits --data DATA/train --out TMP/r --engine.deepspeed {"zero_optimization":{"offload_optimizer":{"device":"cpu"}}}':
        "the optimizer's state stays on the devices",
    "data verify TMP/none": "does not exist; a dataset is",
    "data verify DATA": "open one of its splits",
    "data verify DATA/train --share 0": "share=0 must lie in (0, 1]",
    "run status DATA": "is not a run",
    "run status TMP/none": "does not exist",
    "pack TMP": "needs SOURCE... and OUT",
    "pack TMP/none TMP/out": "none",
    "pack TMP TMP/out": "TMP",
}  # fmt: skip


@pytest.mark.parametrize("typed", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(typed: str, dataset: Path, run: Path, tmp_path: Path) -> None:
    def place(word: str) -> str:
        return word.replace("DATA", str(dataset)).replace("RUN", str(run)).replace("TMP", str(tmp_path))

    before = tree(dataset), tree(run)
    done = vitscale(*(place(word) for word in typed.split()), cwd=tmp_path)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert place(BAD_INPUT[typed]) in done.stderr
    assert (tree(dataset), tree(run)) == before
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_architecture_is_refused(run: Path, dataset: Path, tmp_path: Path) -> None:
    """Names and shapes are checked against the model that the checkpoint says it is of."""
    exported = tmp_path / "exported"
    assert vitscale("checkpoint", "export", run, exported, "--to", "safetensors").returncode == 0
    description = json.loads((exported / "vitscale.json").read_text())
    commit = json.loads((exported / "COMMIT.json").read_text())
    for change, message in (
        ({"depth": 2}, "12 of its 32 tensors are missing"),
        ({"mlp_dim": 24}, "has shape"),
        ({"pool": "mean"}, "are not the model's"),
    ):
        file = exported / "vitscale.json"
        file.write_text(json.dumps(description | {"model": description["model"] | change}))
        commit["files"][file.name] = {"size": file.stat().st_size, "xxh3_128": checkpoint.file_checksum(file)}
        (exported / "COMMIT.json").write_text(json.dumps(commit))
        done = vitscale("evaluate", exported, "--data", dataset / "val")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr


def test_json_is_json_and_agrees_with_the_run(run: Path, dataset: Path, tmp_path: Path) -> None:
    status = json.loads(vitscale("run", "status", run, "--json").stdout)
    assert (status["state"], status["step"], status["total_steps"], status["starts"]) == ("finished", 6, 6, 1)
    assert status["checkpoints"] == ["step-00000003", "step-00000006"]
    evaluated = json.loads(vitscale("evaluate", run, "--data", dataset / "val", "--json").stdout)
    assert evaluated["samples"] == 37
    assert evaluated["top1"] == pytest.approx(status["evaluation"]["eval_top1"])
    assert evaluated["loss"] == pytest.approx(status["evaluation"]["eval_loss"], rel=1e-5)
    exported = tmp_path / "exported"
    assert json.loads(vitscale("checkpoint", "export", run, exported, "--json").stdout)["out"] == str(exported)
    again = json.loads(vitscale("evaluate", exported, "--data", dataset / "val", "--json").stdout)
    assert (again["top1"], again["loss"]) == (evaluated["top1"], evaluated["loss"])
    shown = json.loads(vitscale("checkpoint", "show", run, "--json").stdout)
    assert shown["step"] == 6
    assert len([t for t in shown["tensors"] if t["kind"] == "weight"]) == 20
    packed = json.loads(vitscale("pack", dataset.parent / "images" / "val", tmp_path / "again", "--json").stdout)
    assert packed[0]["samples"] == 37


def test_a_run_can_be_evaluated_and_exported_by_another_protocol(run: Path, dataset: Path, tmp_path: Path) -> None:
    by = {
        name: json.loads(vitscale("evaluate", run, "--data", dataset / "val", "--json", "--eval-protocol", name).stdout)
        for name in ("timm", "paper")
    }
    assert {name: of["eval_protocol"] for name, of in by.items()} == {"timm": "timm", "paper": "paper"}
    assert by["timm"]["loss"] != by["paper"]["loss"]
    exported = tmp_path / "exported"
    done = vitscale("checkpoint", "export", run, exported, "--eval-protocol", "big_vision")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "--eval-protocol timm exports for timm's" in done.stderr
    assert not exported.exists()


def test_what_does_not_train_works_without_torch(run: Path, dataset: Path, tmp_path: Path) -> None:
    for words in (("pack", dataset.parent / "images" / "val", tmp_path / "out"), ("checkpoint", "show", run), ("run", "status", run)):
        done = without_torch(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    done = without_torch(tmp_path, "pretrain", "tiny-digits", "--data", dataset / "train", "--out", tmp_path / "r")
    assert (done.returncode, done.stderr) == (1, "error: torch is not installed; `pip install 'vitscale[train]'` brings it\n")


def test_the_finished_run_is_left_alone(run: Path, dataset: Path) -> None:
    before = tree(run)
    done = vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--out", run, *SMALL)
    assert done.returncode == 0
    assert "is finished" in done.stderr
    assert {name: entry for name, entry in tree(run).items() if name != "run.lock"} == {n: e for n, e in before.items() if n != "run.lock"}


def test_an_export_can_be_read_by_whom_the_user_allows(run: Path, tmp_path: Path) -> None:
    assert vitscale("checkpoint", "export", run, tmp_path / "exported").returncode == 0
    modes = {
        file.name: file.stat().st_mode & 0o777 for folder in (tmp_path / "exported", run) for file in folder.rglob("*") if file.is_file()
    }
    umask = os.umask(0o022)
    os.umask(umask)
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_the_log_tells_what_the_terminal_told(dataset: Path, tmp_path: Path) -> None:
    done = vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--out", tmp_path / "run", *SMALL)
    (log,) = (tmp_path / "run/logs").iterdir()
    assert [line for line in done.stdout.splitlines() if line] == [line for line in log.read_text().splitlines() if line in done.stdout]
    assert "tiny-digits starts on cpu" in done.stdout


def test_prune_removes_what_is_not_kept_and_says_so(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = (*SMALL, "--checkpoint-every", "1", "--keep-checkpoints", "0", "--eval-data", "none")
    assert vitscale("pretrain", "tiny-digits", "--data", dataset / "train", "--out", run, *flags).returncode == 0

    def steps() -> list[int]:
        return [int(folder.name[5:]) for folder in sorted((run / "checkpoints").glob("step-*"))]

    told = json.loads(vitscale("checkpoint", "prune", run, "--keep", "2", "--keep-every", "3", "--dry-run", "--json").stdout)
    assert (told["removed"], told["kept"], steps()) == ([1, 2, 4], [3, 5, 6], [1, 2, 3, 4, 5, 6])
    newest = run / "checkpoints/step-00000006/node-0000.safetensors"
    newest.write_bytes(b"")
    done = vitscale("checkpoint", "prune", run, "--keep", "1")
    assert (done.returncode, steps()) == (0, [5, 6]), "the newest whole one stays, and what is damaged for who wants to look at it"
    assert done.stdout.endswith("bytes\n")
    assert "4 of 5 checkpoints removed" in done.stdout
    assert "node-0000.safetensors has 0 bytes" in done.stderr
    refused = vitscale("checkpoint", "prune", tmp_path, "--keep", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
