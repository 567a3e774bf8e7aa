"""What makes a file or a folder survive the loss of power; datasets and checkpoints are published with it."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
