"""Checkpoints: any cut of the pieces reads the same, damage is found, only what is whole counts."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.kills import killed_everywhere
from tests.vitscale.exports import SMALL, exported
from tests.vitscale.models import random_vit
from vitscale import checkpoint
from vitscale.checkpoint import Description, Piece, RunState, TensorEntry, describe, piece_key
from vitscale.config import ObjectiveConfig, PreprocessConfig, ViTConfig
from vitscale.errors import CheckpointError
from vitscale.finding import find_checkpoint
from vitscale.retention import Policy, remove, sizes_up_to, superfluous
from vitscale.weights import TensorReader, check_tensors

MODEL = ViTConfig(depth=1, width=8, mlp_dim=8, num_heads=2, patch_size=4, image_size=(8, 8), num_classes=3)


def write(run: Path, step: int, tensors: dict[tuple[str, str], torch.Tensor], cuts: dict[tuple[str, str], list[int]] | None = None) -> Path:
    """A checkpoint of tensors by (name, kind), each cut at the given places, the pieces dealt out to three files."""
    hidden = checkpoint.partial_folder(run, step)
    hidden.mkdir(parents=True)
    files: dict[str, dict[str, torch.Tensor]] = {}
    entries = []
    for number, ((name, kind), tensor) in enumerate(tensors.items()):
        bounds = [0, *sorted((cuts or {}).get((name, kind), [])), tensor.numel()]
        pieces = []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            file = f"node-{(number + i) % 3:04d}.safetensors"
            files.setdefault(file, {})[piece_key(name, kind, start)] = tensor.flatten()[start:end].clone()
            pieces.append(Piece(file, start, end - start))
        entries.append(TensorEntry(name, kind, tuple(tensor.shape), tuple(pieces)))
    for file, content in files.items():
        save_file(content, hidden / file)
    about = Description(run, MODEL, PreprocessConfig(), ObjectiveConfig(), ("a", "b", "c"), step * 8, step, tuple(entries))
    checkpoint.write_description(hidden / "checkpoint.json", about)
    checkpoint.commit(run, step, {file.name: checkpoint.file_checksum(file) for file in hidden.iterdir()})
    return checkpoint.step_folder(run, step)


def tensors(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"head.weight": (3, 8), "norm.bias": (8,), "scale": (1,)}
    return {(n, kind): torch.randn(s, generator=generator) for n, s in shapes.items() for kind in ("weight", "exp_avg")}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_stretch_reads_the_same_under_any_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    original = tensors()
    cuts = {key: sorted(data.draw(st.sets(st.integers(1, max(1, t.numel() - 1)), max_size=4)) - {t.numel()}) for key, t in original.items()}
    reader = TensorReader(describe(write(tmp_path_factory.mktemp("cut"), 1, original, cuts)))
    for (name, kind), tensor in original.items():
        assert torch.equal(reader.whole(name, kind), tensor)
        start = data.draw(st.integers(0, tensor.numel() - 1))
        length = data.draw(st.integers(0, tensor.numel() - start))
        assert torch.equal(reader.stretch(name, kind, start, length), tensor.flatten()[start : start + length])


def test_a_gap_between_pieces_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, tensors(), {("head.weight", "weight"): [5]})
    values = json.loads((folder / "checkpoint.json").read_text())
    del values["tensors"][0]["pieces"][0]
    (folder / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="do not cover"):
        TensorReader(describe(folder)).whole("head.weight", "weight")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Over the whole folder: whichever file a byte is flipped in, the checkpoint is not taken for whole."""
    folder = write(tmp_path, 1, tensors())
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        for at in {0, len(original) // 3, len(original) - 1}:
            file.write_bytes(original[:at] + bytes([original[at] ^ 0x01]) + original[at + 1 :])
            assert checkpoint.verify(folder) is not None, f"{file.name} at {at}"
        file.write_bytes(original)
    assert checkpoint.verify(folder) is None


def walk_flips(tmp_path: Path, seeds: range) -> None:
    """A bit anywhere in any of a checkpoint's files."""
    folder = write(tmp_path, 1, tensors())
    for seed in seeds:
        rng = random.Random(seed)
        file = rng.choice(sorted(folder.iterdir()))
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert checkpoint.verify(folder) is not None, f"{file.name}, seed {seed}"
        file.write_bytes(original)
    assert checkpoint.verify(folder) is None


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    walk_flips(tmp_path, range(100))


@pytest.mark.soak
def test_a_thousand_flipped_bits_are_found(tmp_path: Path) -> None:
    walk_flips(tmp_path, range(1000))


def test_a_bit_that_makes_two_names_one_hides_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, tensors())
    commit = (folder / "COMMIT.json").read_text()
    assert "node-0000" in commit
    assert "node-0001" in commit
    (folder / "COMMIT.json").write_text(commit.replace("node-0000", "node-0001"))
    assert "a name is there twice" in str(checkpoint.verify(folder))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no commit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    older, newer = write(tmp_path, 10, tensors(1)), write(tmp_path, 20, tensors(2))
    assert checkpoint.newest_durable(tmp_path) == (newer, [])
    file = newer / ("COMMIT.json" if damage == "no commit" else "node-0000.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-8])
    else:
        file.unlink()
    found, faults = checkpoint.newest_durable(tmp_path)
    assert found == older
    assert len(faults) == (0 if damage == "no commit" else 1)
    assert find_checkpoint(str(tmp_path)) == older
    with pytest.raises(CheckpointError, match=r"node-0000|COMMIT|no checkpoint"):
        find_checkpoint(f"{tmp_path}@20")


def test_a_checkpoint_is_found_by_run_step_and_folder(tmp_path: Path) -> None:
    folders = [write(tmp_path, step, tensors()) for step in (5, 100)]
    assert find_checkpoint(str(tmp_path)) == folders[1]
    assert find_checkpoint(f"{tmp_path}@5") == folders[0]
    assert find_checkpoint(str(folders[0])) == folders[0]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    with pytest.raises(CheckpointError, match="there are those of steps 5, 100"):
        find_checkpoint(f"{tmp_path}@7")
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="no durable checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoints"))


def test_the_best_is_found_by_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By top-1, of equal ones the newest; another where that one's checkpoint is gone, with a word."""
    with pytest.raises(CheckpointError, match=r"holds no checkpoint, so that none is its best; .* there are none"):
        find_checkpoint(f"{tmp_path}@best")
    folders = {step: write(tmp_path, step, tensors()) for step in (2, 4, 6, 8)}
    with pytest.raises(CheckpointError, match=r"was never evaluated on a held-out split, .* there are those of steps 2, 4, 6, 8"):
        find_checkpoint(f"{tmp_path}@best")
    lines = [{"step": step, "eval_top1": top1, "eval_loss": 1.0} for step, top1 in ((2, 0.5), (4, 0.7), (6, 0.7), (8, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 2, "loss": 1.0}, *lines]))
    assert find_checkpoint(f"{tmp_path}@best") == folders[6]
    assert not capsys.readouterr().err
    for gone, found in ((6, 4), (4, 8)):
        shutil.rmtree(folders[gone])
        assert find_checkpoint(f"{tmp_path}@best") == folders[found]
    told = f"the best of {tmp_path} was step 6 (top-1 70.00%), whose checkpoint is gone; step 8 (60.00%) is used"
    assert told in capsys.readouterr().err
    (folders[8] / "node-0000.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"COMMIT\.json says"):
        find_checkpoint(f"{tmp_path}@best")
    shutil.rmtree(folders[8])
    shutil.rmtree(folders[2])
    write(tmp_path, 10, tensors())
    with pytest.raises(CheckpointError, match=r"whose checkpoint is gone; there are those of steps 10, never evaluated"):
        find_checkpoint(f"{tmp_path}@best")
    with pytest.raises(CheckpointError, match="does not exist; a checkpoint is a run"):
        find_checkpoint(f"{tmp_path}/none@best")


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 5, tensors(1))
    again = write(tmp_path, 5, tensors(2))
    assert torch.equal(TensorReader(describe(again)).whole("scale", "weight"), tensors(2)["scale", "weight"])
    assert checkpoint.verify(again) is None


def test_everything_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and the folder before the rename that makes a checkpoint of it, and the folder above after it."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def spy_on_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def spy_on_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_on_sync)
    monkeypatch.setattr(Path, "rename", spy_on_rename)
    folder = write(tmp_path, 7, tensors())
    renamed = events.index(f"rename {folder.name}")
    assert {*(file.name for file in folder.iterdir()), f".{folder.name}.partial"} <= set(events[:renamed])
    assert "checkpoints" in events[renamed:]


def test_prune_never_takes_the_good_one_for_damaged_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step, tensors())
        (checkpoint.step_folder(tmp_path, step) / "node-0000.safetensors").write_bytes(b"")
    good = write(tmp_path, 5, tensors())
    remove(tmp_path, superfluous(sizes_up_to(tmp_path, 5), {}, Policy(newest=1)))
    assert checkpoint.newest_durable(tmp_path)[0] == good


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    description = describe(write(tmp_path, 1, tensors()))
    fitting = {"head.weight": (3, 8), "norm.bias": (8,), "scale": (1,)}
    check_tensors(description, fitting, {"weight": fitting.keys(), "exp_avg": fitting.keys()})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(more\)"):
        check_tensors(description, fitting | {"more": (1,)}, {"weight": [*fitting, "more"]})
    with pytest.raises(CheckpointError, match=r"1 are not the model's \(scale\)"):
        check_tensors(description, {"head.weight": (3, 8), "norm.bias": (8,)}, {"weight": ["head.weight", "norm.bias"]})
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(3, 8\), the model's has \(8, 3\)"):
        check_tensors(description, fitting | {"head.weight": (8, 3)}, {"weight": fitting.keys()})


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 99}', "[1]", '{"format_version": 1, "model": {"dept": 3}}'])
def test_an_unreadable_description_is_one_line(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 1, tensors())
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        describe(folder)
    assert "\n" not in str(error.value)


def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    """A child that writes step 20 over a damaged one, points `latest` at it and prunes step 10 ends at its n-th touch of the disk."""
    touches = [(os, "fsync"), (Path, "rename"), (Path, "write_text"), (shutil, "rmtree"), (os, "rmdir"), (os, "unlink")]
    run = tmp_path / "run"

    def begin() -> None:
        shutil.rmtree(run, ignore_errors=True)
        write(run, 10, tensors(1))
        (write(run, 20, tensors(2)) / "node-0000.safetensors").write_bytes(b"")

    def save() -> None:
        write(run, 20, tensors(3))
        remove(run, superfluous(sizes_up_to(run, 20), {}, Policy(newest=1)))

    found = []
    begin()
    for last in killed_everywhere(save, touches):
        newest, _ = checkpoint.newest_durable(run)
        assert newest is not None, f"nothing whole after touch {last}"
        step = describe(newest).step
        assert torch.equal(TensorReader(describe(newest)).whole("scale", "weight"), tensors(1 if step == 10 else 3)["scale", "weight"])
        found.append(step)
        shutil.rmtree(checkpoint.partial_folder(run, 20), ignore_errors=True)  # what a next start does, whatever the killed one left
        save()
        assert [folder.name for folder in (run / "checkpoints").glob("[!l]*")] == ["step-00000020"]
        assert (run / "checkpoints/latest").read_text() == "step-00000020\n"
        begin()
    assert len(found) > 12, "the child must have been ended at each of its writes, syncs, renames and removals"
    assert found == sorted(found), "once the new one is whole it stays"
    assert {10, 20} == set(found)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Files that anybody may have written
# ---------------------------------------------------------------------------------------------------------------------------------------

ABSURD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2**62, 2**80) | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../../secret", "/etc/passwd", "a/b", ".", "..", "", "node-0000.safetensors\n", "node-0000.safetensors"])
    | st.sampled_from([-1, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(values: object, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a value of JSON."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def with_absurdity(data: st.DataObject, text: str) -> str:
    """JSON, with one to three of its values replaced or removed."""
    values = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(values)))
        if not path:
            return json.dumps(data.draw(ABSURD))
        at = values
        for key in path[:-1]:
            at = at[key]
        if data.draw(st.booleans()):
            at[path[-1]] = data.draw(ABSURD)
        else:
            del at[path[-1]]
    return json.dumps(values)


def with_other_header(content: bytes, header: str) -> bytes:
    """A safetensors file whose header says something else of the same tensors."""
    length = int.from_bytes(content[:8], "little")
    return len(header.encode()).to_bytes(8, "little") + header.encode() + content[8 + length :]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["checkpoint.json", "COMMIT.json", "node-0000.safetensors"]))
def test_absurd_files_are_refused_in_a_line_and_lead_nowhere(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    """Whatever they say: it is refused, or every tensor that is said to be there is read, and nothing beside the folder is opened."""
    tmp_path = tmp_path_factory.mktemp("absurd")
    folder = write(tmp_path, 1, tensors(), {("head.weight", "weight"): [5, 9]})
    (tmp_path / "secret").write_text("{}")
    file = folder / name
    if name.endswith(".json"):
        file.write_text(with_absurdity(data, file.read_text()))
    else:
        content = file.read_bytes()
        file.write_bytes(with_other_header(content, with_absurdity(data, content[8 : 8 + int.from_bytes(content[:8], "little")].decode())))
    said = ""
    with opened_files() as opened:
        assert "\n" not in (checkpoint.verify(folder) or "")
        try:
            description = describe(folder)
            reader = TensorReader(description)
            for entry in description.tensors:
                assert reader.whole(entry.name, entry.kind).shape == entry.shape
        except CheckpointError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    assert all(Path(path).parent == folder for path in opened), opened


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that Python opens in the block, and those that safetensors is given."""
    global _WATCH
    _WATCH = seen = []
    opens = safetensors.safe_open
    safetensors.safe_open = lambda file, **how: seen.append(str(file)) or opens(file, **how)
    try:
        yield seen
    finally:
        _WATCH = None
        safetensors.safe_open = opens


_WATCH: list[str] | None = None
sys.addaudithook(lambda event, args: _WATCH.append(str(args[0])) if event == "open" and _WATCH is not None else None)


def test_a_tensor_of_very_many_axes_takes_no_time(tmp_path: Path) -> None:
    """The product of so many numbers would have as many digits."""
    folder = write(tmp_path, 1, tensors())
    values = json.loads((folder / "checkpoint.json").read_text())
    values["tensors"][0]["shape"] = [1] * 9 + values["tensors"][0]["shape"]
    (folder / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is not a tensor"):
        describe(folder)


def test_a_length_that_no_file_has_takes_no_memory(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, {("scale", "weight"): torch.ones(1)})
    values = json.loads((folder / "checkpoint.json").read_text())
    values["tensors"][0] |= {"shape": [2**60], "pieces": [{"file": "node-0000.safetensors", "offset": 0, "length": 2**60}]}
    (folder / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="not 1152921504606846976 elements"):
        TensorReader(describe(folder)).whole("scale", "weight")


@pytest.mark.parametrize("name", ["checkpoint.json", "COMMIT.json", "node-0000.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1, tensors())
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "plain file" in str(checkpoint.verify(folder))


def test_what_a_checkpoint_knows_of_its_run_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, tensors())
    told = dataclasses.replace(describe(folder), state=RunState(7, 2, skipped=((8, 24), (100, 200)), recent_losses=(0.5, 1.25)))
    checkpoint.write_description(folder / "checkpoint.json", told)
    assert describe(folder) == told
    values = json.loads((folder / "checkpoint.json").read_text())
    del values["updates"], values["recent_losses"], values["cursor"]  # as those of before
    (folder / "checkpoint.json").write_text(json.dumps(values | {"skipped": []}))
    assert describe(folder) == dataclasses.replace(told, state=RunState(updates=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("results", 5),
        ("results", {"eval_top1": "high"}),
        ("datasets", [1]),
        ("left_out", 5),
        ("versions", [1]),
        ("samples_seen", -1),
        ("initial", {"datasets": 5}),
    ],
)
def test_an_origin_that_is_none_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    out = exported(tmp_path, random_vit(SMALL), "safetensors")
    values = json.loads((out / "vitscale.json").read_text())
    values["origin"][name] = value
    (out / "vitscale.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"origin\.{'datasets' if name == 'initial' else name} is "):
        describe(out)
