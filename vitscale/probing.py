"""A probe of a checkpoint: the features of a training and a test split (`features.py`), one protocol (`probes.py`), and the report.

What `vitscale evaluate --protocol fewshot|linear|knn` calls. The report is plain data, which `dataclasses.asdict` makes JSON of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.dataset import Dataset, DatasetError
from data_tools.progress import Progress
from vitscale.checkpoint import Description
from vitscale.config import SEEDS, SHOTS, ProbeProtocol, Solver, StreamConfig
from vitscale.features import Features, extract_features
from vitscale.group import own_device
from vitscale.inputs import check_probe
from vitscale.probes import FewShot, Linear, Neighbours, few_shot, linear_probe, neighbours
from vitscale.weights import load_model


@dataclass(frozen=True)
class ProbeReport:
    """A probe's results, and what they were found on."""

    protocol: ProbeProtocol
    width: int
    """Numbers that a feature has."""
    num_classes: int
    train_samples: int
    test_samples: int
    skipped: int
    """Samples of both splits that could not be used: damaged, or not decodable."""
    removed: int
    """That overlays remove."""
    results: tuple[FewShot, ...] | tuple[Linear, ...] | tuple[Neighbours, ...]


def probe(
    description: Description, kind: str, protocol: ProbeProtocol, train: Dataset, test: Dataset, *, batch_size: int, workers: int,
    progress: Progress, shots: Sequence[int] = SHOTS, seeds: int = SEEDS, solver: Solver = "lbfgs",
) -> ProbeReport:  # fmt: skip
    """Probes a checkpoint's features, in fp32 on one device, by the preprocessing of its evaluation.

    Raises ConfigError where a setting cannot work, DatasetError where the splits differ in classes, are the same one or cannot be read, and
    CheckpointError where a tensor is missing or extra.

    Args:
        kind: `average` (where there is one) or `weight`.
        shots, seeds: of `fewshot`.
        solver: of `linear`.
    """
    check_probe(train, test, shots, seeds)
    device = own_device()
    model = load_model(description, kind).to(device)

    def features(dataset: Dataset, of: str) -> Features:
        with progress(f"features of the {of} split", "images") as update:
            return extract_features(
                model, dataset, description.preprocess, device=device, batch_size=batch_size, stream=StreamConfig(workers=workers),
                progress=update,
            )  # fmt: skip

    of_train, of_test = features(train, "training"), features(test, "test")
    if len(of_train) < 2:
        raise DatasetError(f"{train.path} has 1 sample that can be read; a probe is trained on at least 2")
    removed = train.overlay.num_removed + test.overlay.num_removed
    results: tuple[FewShot, ...] | tuple[Linear, ...] | tuple[Neighbours, ...]
    if protocol == "fewshot":
        results = tuple(few_shot(of_train, of_test, train.num_classes, progress, shots=shots, seeds=seeds))
    elif protocol == "linear":
        results = (linear_probe(of_train, of_test, train.num_classes, solver, progress),)
    else:
        results = tuple(neighbours(of_train, of_test, train.num_classes, progress))
    skipped = train.num_samples + test.num_samples - removed - len(of_train) - len(of_test)
    return ProbeReport(protocol, of_train.features_ND.shape[1], train.num_classes, len(of_train), len(of_test), skipped, removed, results)
