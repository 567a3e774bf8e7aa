"""Where a checkpoint comes from, as an export says it (`origin.py`)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vitscale.exports import SMALL, SQUASHED, evaluated
from tests.vitscale.models import random_vit, write_checkpoint
from vitscale.checkpoint import describe
from vitscale.config import InitConfig, to_dict
from vitscale.export import export
from vitscale.origin import origin_of
from vitscale.run import RunError, note_initial, read_config


def test_results_are_told_of_the_weights_and_views_that_had_them(tmp_path: Path) -> None:
    """A run evaluates its average where it keeps one, by its own preprocessing; other weights have other results."""
    step = evaluated(tmp_path / "run")
    assert origin_of(describe(step), "average")["results"]["eval_top1"] == 0.81
    assert "results" not in origin_of(describe(step), "weight")
    assert "results" not in origin_of(describe(step).evaluated_by("paper", 1.0), "average")


def test_a_card_tells_of_all_that_the_weights_came_of(tmp_path: Path) -> None:
    """Of a run that was fine-tuned from a fine-tuned one, whose runs are there no more."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for number, run in enumerate(folders):
        step = evaluated(run)
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"dataset": record["dataset"] | {"hash": f"hash-of-{run.name}"}}))
        if number:
            source = folders[number - 1]
            init = InitConfig(str(describe(source / "checkpoints/step-00000002").path), "average", "timm")
            (run / "config.json").write_text(json.dumps(to_dict(replace(read_config(run), init=init, recipe=f"recipe-of-{run.name}"))))
            note_initial(run, origin_of(describe(source / "checkpoints/step-00000002"), "average"))
            shutil.rmtree(source)
    out = export(describe(step), "average", tmp_path / "out", to="hf")
    card = (out / "README.md").read_text()
    lineage = next(line for line in card.splitlines() if line.startswith("| which came of"))
    places = [lineage.index(words) for words in ("recipe-of-second", "hash-of-second", "initialised from first@2", "hash-of-first")]
    assert places == sorted(places)
    assert "hash-of-third" not in lineage
    assert str(tmp_path) not in card
    again = export(describe(out), "average", tmp_path / "again", to="safetensors")
    assert lineage in (again / "README.md").read_text()


def test_a_run_that_begins_with_nothing_tells_of_no_origin(tmp_path: Path) -> None:
    """Though it was begun with weights once, before its first step, and then without."""
    step = evaluated(tmp_path / "run")
    note_initial(tmp_path / "run", origin_of(write_checkpoint(tmp_path / "source", random_vit(SMALL), preprocess=SQUASHED), "weight"))
    assert "initial" not in origin_of(describe(step), "average")


def test_who_begins_with_the_weights_asks_for_no_results(tmp_path: Path) -> None:
    """A line of metrics that is none is told to who exports, and hinders no run that begins with the weights."""
    step = evaluated(tmp_path / "run")
    told = origin_of(describe(step), "average")
    (tmp_path / "run" / "metrics.jsonl").write_text("no JSON\nno more\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        origin_of(describe(step), "average")
    measured = ("results", "evaluated_on")
    assert origin_of(describe(step), "average", results=False) == {name: of for name, of in told.items() if name not in measured}
