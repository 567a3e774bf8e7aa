"""Disks of a test's own, and files that cannot be read: what only the kernel can make so."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def need_mounts() -> None:
    """Skips the test, loudly, where nothing can be mounted; with VITSCALE_REQUIRE_MOUNTS, as in CI as root, it fails instead."""
    if os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0:
        return
    said = "NOT CHECKED: mounting takes root, so no real full disk and no unreadable file was tried"
    if os.environ.get("VITSCALE_REQUIRE_MOUNTS"):
        pytest.fail(said)
    print(said, file=sys.stderr)
    pytest.skip(said)


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """`mount HOW FOLDER`, until the end of the block."""
    subprocess.run(["mount", *how, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int, files: int = 0) -> Iterator[Path]:
    """An empty disk of so many bytes, and at most so many files where that is given."""
    need_mounts()
    folder.mkdir(parents=True, exist_ok=True)
    with mounted(folder, "-t", "tmpfs", "-o", f"size={num_bytes},nr_inodes={files}", "tmpfs"):
        yield folder


@contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """A file whose first bytes give EIO, for real: the memory of this process, where nothing lies at address 0."""
    need_mounts()
    with mounted(file, "--bind", f"/proc/{os.getpid()}/mem"):
        yield
