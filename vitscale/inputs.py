"""What an evaluation is given: whether a checkpoint, datasets and settings go together.

Imports no torch: `vitscale evaluate` asks before it starts a process, `vitscale submit` before there is a job; `evaluate.py` and
`probing.py` ask again, for whoever calls them.
"""

from collections.abc import Sequence

from data_tools.dataset import Dataset, DatasetError
from vitscale.checkpoint import Description
from vitscale.config import SEEDS, SHOTS, ConfigError
from vitscale.errors import CheckpointError
from vitscale.mixture import class_difference


def check_head(description: Description, dataset: Dataset) -> None:
    """Raises CheckpointError where a checkpoint's head is not one for the dataset's classes."""
    if description.model.num_classes != dataset.num_classes:
        head = f"a head of {description.model.num_classes} classes" if description.model.num_classes else "no head"
        raise CheckpointError(
            f"{description.path} has {head}, {dataset.path} has {dataset.num_classes} classes; "
            "fine-tune the checkpoint on these classes first, or see what its features are worth: --protocol fewshot, linear or knn"
        )
    if description.class_names != dataset.class_names:
        names = ["no class names" if not of.class_names else f"{of.class_names[0]}, ..." for of in (description, dataset)]
        raise CheckpointError(
            f"{description.path} was trained on {names[0]}, {dataset.path} has {names[1]}: labels may mean other classes; pack it with the "
            "--class-names of the training split, or without"
        )


def check_probe(train: Dataset, test: Dataset, shots: Sequence[int], seeds: int) -> None:
    """Raises ConfigError where a setting of a probe cannot work, DatasetError where the splits differ in classes or are the same one."""
    if seeds < 1 or not shots or min(shots) < 1:
        raise ConfigError(f"shots={list(shots)} and seeds={seeds} must be at least 1; {list(SHOTS)} and {SEEDS} are big_vision's")
    if (train.num_classes, train.class_names) != (test.num_classes, test.class_names):
        raise DatasetError(
            f"{train.path} and {test.path} {class_difference(train, test)}; a probe needs the same: pack both with the same --class-names"
        )
    if train.content_hash == test.content_hash:
        raise DatasetError(f"{test.path} is the split that the probe is trained on ({train.path}); give one that is held out")
