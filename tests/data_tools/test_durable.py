"""Files and folders that appear at once: a child is ended at each of its touches of the disk."""

import os
from pathlib import Path

import pytest

from data_tools.durable import publish_folders, replace_file
from tests.kills import killed_everywhere


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")
    seen = []
    for _ in killed_everywhere(
        lambda: replace_file(file, "new"), [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "write_text")]
    ):
        seen.append(file.read_text())
    assert len(seen) >= 5, "written, synced, renamed, and the folder synced"
    assert (seen[0], seen[-1]) == ("old", "new")
    assert set(seen) == {"old", "new"}


def test_a_file_and_its_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def spy_on_sync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def spy_on_replace(self: Path, target: Path) -> Path:
        events.append(f"{self.name} -> {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_on_sync)
    monkeypatch.setattr(Path, "replace", spy_on_replace)
    replace_file(tmp_path / "a.json", "text")
    assert events == ["sync .a.json.partial", ".a.json.partial -> a.json", f"sync {tmp_path.name}"]


def test_folders_get_their_names_together_or_not_at_all(tmp_path: Path) -> None:
    """Where one name is taken nothing has changed, whatever has been renamed by then."""
    names = {tmp_path / f".{name}": tmp_path / name for name in ("train", "val")}
    for hidden in names:
        (hidden / "deep").mkdir(parents=True)
        (hidden / "deep/file").write_text(hidden.name)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/other").write_text("here already")
    with pytest.raises(OSError, match="val"):
        publish_folders(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train", ".val", "val"]
    (tmp_path / "val/other").unlink()
    (tmp_path / "val").rmdir()
    publish_folders(names)
    assert {path.name: (path / "deep/file").read_text() for path in tmp_path.iterdir()} == {"train": ".train", "val": ".val"}
