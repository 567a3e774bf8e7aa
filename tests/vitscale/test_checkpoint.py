"""Checkpoints: any cut of the pieces reads the same, damage is found, only what is whole counts."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.kills import killed_everywhere
from vitscale import checkpoint
from vitscale.checkpoint import CheckpointError, Description, Piece, TensorEntry, TensorReader, check_tensors, describe, find_checkpoint
from vitscale.config import ObjectiveConfig, PreprocessConfig, ViTConfig

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
            files.setdefault(file, {})[checkpoint.piece_key(name, kind, start)] = tensor.flatten()[start:end].clone()
            pieces.append(Piece(file, start, end - start))
        entries.append(TensorEntry(name, kind, tuple(tensor.shape), tuple(pieces)))
    for file, content in files.items():
        save_file(content, hidden / file)
    about = Description(run, MODEL, PreprocessConfig(), ObjectiveConfig(), ("a", "b", "c"), step * 8, step, tuple(entries))
    checkpoint.write_description(hidden / "checkpoint.json", about)
    checkpoint.commit(hidden, {file.name: checkpoint.file_checksum(file) for file in hidden.iterdir()})
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
            if file.name == "COMMIT.json" and json_equal(file.read_bytes(), original):
                continue
            assert checkpoint.verify(folder) is not None, f"{file.name} at {at}"
        file.write_bytes(original)
    assert checkpoint.verify(folder) is None


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


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
    checkpoint.prune(tmp_path, 1, step=5)
    assert checkpoint.newest_durable(tmp_path)[0] == good


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, tensors())
    checkpoint.prune(tmp_path, 0, step=4)
    assert len(checkpoint.committed(tmp_path)) == 4
    checkpoint.prune(tmp_path, 2, step=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    description = describe(write(tmp_path, 1, tensors()))
    fitting = {"head.weight": (3, 8), "norm.bias": (8,), "scale": (1,)}
    check_tensors(description, fitting, ("weight", "exp_avg"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(more\)"):
        check_tensors(description, fitting | {"more": (1,)}, ["weight"])
    with pytest.raises(CheckpointError, match=r"1 are not the model's \(scale\)"):
        check_tensors(description, {"head.weight": (3, 8), "norm.bias": (8,)}, ["weight"])
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(3, 8\), the model's has \(8, 3\)"):
        check_tensors(description, fitting | {"head.weight": (8, 3)}, ["weight"])


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
        checkpoint.prune(run, 1, 20)

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
