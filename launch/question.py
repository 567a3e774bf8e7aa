"""What `vitscale evaluate` is asked: its flags, whether that can be answered, and when two questions are the same.

Where it stands: before everything else. `evaluation.py` answers, `watcher.py` asks the same of each checkpoint of a run, and `submit.py`
has a job ask.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_tools.config import MAYBE_BYTES
from launch.flags import Checkpoint, Processes, UsageError, Weights, given, parse
from launch.terminal import Json
from vitscale.config import SEEDS, SHOTS, EvalProtocol, ProbeProtocol, Solver

_LONGEST = 3600.0  # seconds between two looks for a checkpoint


@dataclass(frozen=True)
class EvaluateFlags:
    """Evaluates in fp32, every sample once, on one device or on several of this machine.

    What each measure is: docs/evaluation.md."""

    checkpoint: Checkpoint
    data: str
    """Dataset directory or URL of the split to evaluate on."""
    protocol: Literal["head", ProbeProtocol] = "head"
    """What is evaluated: the checkpoint's own head, or one that is made of its features for --train-data."""
    train_data: str = ""
    """Dataset whose samples such a head learns from; empty: the sibling `train` of --data."""
    shots: tuple[int, ...] = SHOTS
    """Of --protocol fewshot: training samples of each class."""
    seeds: int = SEEDS
    """Of --protocol fewshot: draws of them."""
    solver: Solver = "lbfgs"
    """Of --protocol linear (docs/evaluation.md, "Probes")."""
    real: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Of --protocol head: reassessed labels to be evaluated against, too: ImageNet's real.json, or an object of key to labels."""
    average_precision: bool = False
    """Of --protocol head: mean average precision over the classes. Keeps all scores in memory: 4 bytes for each sample and class."""
    bootstrap: int = 0
    """Of --average-precision: resamples of the samples for its interval; 0: none. 1000 are usual."""
    seed: int = 0
    """Of --bootstrap."""
    per_class: bool = False
    """Of --protocol head: a row a class, with samples, accuracy, what it is most confused with."""
    confusions: int = 0
    """Of --protocol head: so many of the most frequent pairs of a class and another that it is taken for."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write everything there as JSON: all classes, all confusions."""
    watch: bool = False
    """Evaluate each checkpoint of the run CHECKPOINT as it comes, until the run is finished; results go to RUN/evaluations.jsonl."""
    interval: float = 30.0
    """Of --watch: seconds between two looks for a new checkpoint."""
    weights: Weights = "average"
    batch_size: int = 64
    """Of each process."""
    workers: int = 0
    """Workers of each process that decode; 0 takes the cores there are, at most 8."""
    nproc: Processes = 0
    stage: str = ""
    """As of `pretrain`."""
    cache: str = ""
    """As of `pretrain`."""
    cache_bytes: Annotated[int | None, MAYBE_BYTES] = None
    """As of `pretrain`."""
    eval_protocol: EvalProtocol | None = None
    """Another evaluation preprocessing than the run's (docs/stream.md, "Evaluation")."""
    json: Json = False


# Flags that change nothing of what is found: how the work is laid out, where it goes, and what is shown of it
_CHANGES_NOTHING = (
    "per_class", "confusions", "out", "watch", "interval", "batch_size", "workers", "nproc", "stage", "cache", "cache_bytes", "json",
)  # fmt: skip
_ONLY_WITH: tuple[tuple[tuple[str, ...], str, Callable[[EvaluateFlags], bool]], ...] = (  # flags that nothing looks at without another
    (("shots", "seeds"), "--protocol fewshot", lambda flags: flags.protocol == "fewshot"),
    (("solver",), "--protocol linear", lambda flags: flags.protocol == "linear"),
    (("train-data",), "--protocol fewshot, linear or knn", lambda flags: flags.protocol != "head"),
    (("real", "average-precision", "per-class", "confusions"), "--protocol head", lambda flags: flags.protocol == "head"),
    (("bootstrap",), "--average-precision", lambda flags: flags.average_precision),
    (("seed",), "--bootstrap", lambda flags: flags.bootstrap > 0),
    (("interval",), "--watch", lambda flags: flags.watch),
)
_PATHS = ("checkpoint", "data", "train_data", "real")  # what lies there counts, not where it lies


def evaluate_flags(words: list[str]) -> EvaluateFlags:
    """What `vitscale evaluate` is told. Raises UsageError on what no checkpoint or dataset would make good."""
    flags = parse(EvaluateFlags, words, "evaluate")
    if flags.batch_size < 1 or flags.workers < 0:
        raise UsageError(f"batch-size={flags.batch_size} must be at least 1 and workers={flags.workers} at least 0")
    for name in ("bootstrap", "confusions", "seed"):
        if getattr(flags, name) < 0:
            raise UsageError(f"{name}={getattr(flags, name)} must be at least 0")
    if not 0 < flags.interval <= _LONGEST:
        raise UsageError(f"interval={flags.interval:g} must be above 0 and at most {_LONGEST:g} seconds")
    for names, other, is_there in _ONLY_WITH:
        if not is_there(flags) and (idle := given(words, *names)):
            raise UsageError(f"--{min(idle)} is of {other}, without which it does nothing; give both or neither")
    if flags.watch and (flags.out or flags.per_class or flags.confusions):
        raise UsageError("--watch writes a line a checkpoint; leave out --out, --per-class and --confusions")
    return flags


def check_inputs(flags: EvaluateFlags) -> Path:
    """Looks at what is to be read, before anything long begins or a job is submitted. The checkpoint's folder; a run's for --watch."""
    from vitscale.checkpoint import describe
    from vitscale.finding import find_checkpoint
    from vitscale.inputs import check_head, check_probe
    from vitscale.run import read_record

    if flags.out and (not Path(flags.out).parent.is_dir() or Path(flags.out).is_dir()):
        raise UsageError(f"out={flags.out} is to be a file in a folder that is there")
    folder = Path(flags.checkpoint)
    if not flags.watch:
        folder = find_checkpoint(flags.checkpoint)
    elif not (folder / "submissions").is_dir():  # of one that is submitted the first start may still be to come
        read_record(folder)
    dataset = open_data(flags)
    if flags.protocol != "head":
        check_probe(open_train_data(flags), dataset, flags.shots, flags.seeds)
    elif not flags.watch:
        check_head(describe(folder), dataset)
    if flags.real:
        from vitscale.reassessed import read_real_labels

        read_real_labels(Path(flags.real), dataset)
    return folder


def identity(flags: EvaluateFlags) -> dict[str, Any]:
    """What a line of RUN/evaluations.jsonl says of its question: the same of the same checkpoint need not be asked again.

    Data and files count by what they hold, and every flag that is not the usual one counts but those known to change nothing.
    """
    from vitscale.checkpoint import file_checksum

    usual = vars(EvaluateFlags("", ""))
    apart = {*_CHANGES_NOTHING, *_PATHS}
    asked = {name: value for name, value in vars(flags).items() if name not in apart and value != usual[name]}
    if flags.protocol != "head":
        train = open_train_data(flags)
        asked |= {"train_dataset": train.content_hash, "train_overlays": train.overlay.names}
    if flags.real:
        asked["real"] = file_checksum(Path(flags.real))
    dataset = open_data(flags)
    same = {"dataset": dataset.content_hash, "overlays": dataset.overlay.names, "asked": asked}
    read_back: dict[str, Any] = json.loads(json.dumps(same))  # lists, as a line has them
    return read_back


def open_data(flags: EvaluateFlags) -> Any:
    """The dataset to evaluate on, checked."""
    return _open(flags, flags.data)


def open_train_data(flags: EvaluateFlags) -> Any:
    """That which a probe learns from."""
    return _open(flags, flags.train_data or f"{flags.data.rstrip('/').rpartition('/')[0] or '.'}/train")


def _open(flags: EvaluateFlags, path: str) -> Any:
    from data_tools.dataset import Dataset
    from vitscale.resolve import cache_at, stage_at

    return Dataset.open_checked(path, stage=stage_at(flags.stage), cache=cache_at(flags.cache, flags.cache_bytes))
