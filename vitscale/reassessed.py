"""Labels that others gave a dataset's samples, to be evaluated against beside its own: ImageNet's reassessed labels ("ReaL"). No torch.

Two forms are read. `real.json` of google-research/reassessed-imagenet: a list with an entry for each validation image, in the order
ILSVRC2012_val_00000001 and on, each a list of labels. And for other sets an object of JSON that has such a list for each key. An empty list
says that no label fits, and leaves the sample out. Labels are numbers of the dataset's classes, of ImageNet in the order of their WordNet
ids, as class folders sort.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.dataset import Dataset, DatasetError

_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


def read_real_labels(file: Path, dataset: Dataset) -> npt.NDArray[np.int32]:
    """The labels (N, L) that a file gives each of a dataset's samples, padded with -1. Raises DatasetError."""
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise DatasetError(
            f"{file} cannot be read ({error.strerror or error}); real.json of google-research/reassessed-imagenet is one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not JSON ({error})") from None
    if not isinstance(entries, list | dict):
        raise DatasetError(f"{file} holds neither a list of labels for each image nor an object of key to labels")
    lists: list[list[int]] = []
    for shard in range(len(dataset.shard_names)):
        for key in dataset.shard_keys(shard).to_pylist():
            lists.append(_checked(_entry(entries, key, file), key, file, dataset))
    real_NL = np.full((len(lists), max(1, *map(len, lists))), -1, dtype=np.int32)
    for row, labels in zip(real_NL, lists, strict=True):
        row[: len(labels)] = labels
    if (real_NL < 0).all():
        raise DatasetError(f"{file} has no label for any sample of {dataset.path}")
    return real_NL


def _entry(entries: list[Any] | dict[str, Any], key: str, file: Path) -> Any:
    """What the file says of the sample of a key."""
    if isinstance(entries, dict):
        if key not in entries:
            raise DatasetError(f"{file} does not name the sample {key}; an empty list leaves a sample out")
        return entries[key]
    found = _IMAGE.search(key)
    if not found:
        raise DatasetError(
            f"{file} is a list by ImageNet's image numbers, and the key {key} has none (as n01440764_ILSVRC2012_val_00000293 has); "
            "an object of key to labels works"
        )
    number = int(found[1])
    if not 1 <= number <= len(entries):
        raise DatasetError(f"{file} has {len(entries):,} entries, none for image {number} of the key {key}")
    return entries[number - 1]


def _checked(labels: Any, key: str, file: Path, dataset: Dataset) -> list[int]:
    """The labels, as numbers of the dataset's classes."""
    if not (isinstance(labels, list) and all(isinstance(label, int) and not isinstance(label, bool) for label in labels)):
        raise DatasetError(f"{file} has {labels!r:.50} for {key}, which is no list of labels")
    if odd := [label for label in labels if not 0 <= label < dataset.num_classes]:
        raise DatasetError(f"{file} has label {odd[0]} for {key}, and {dataset.path} has classes 0 to {dataset.num_classes - 1}")
    return labels
