"""What is settled before any process starts: a config that leaves nothing open, and everything that can be known checked.

Where it stands: `launch` resolves what was asked, `run.open_run` writes it down, and each rank opens the data that it names.

Imports no torch: it works on login nodes.
"""

import dataclasses
import math
from pathlib import Path

from data_tools.cache import Cache
from data_tools.dataset import Dataset, DatasetError
from data_tools.holdout import part_of
from data_tools.storage import Location, Url, exists, location
from vitscale import checkpoint, unindexed
from vitscale.check import check_classes, check_config, check_schedule
from vitscale.config import ConfigError, FinetuneConfig, StreamConfig, TrainConfig, continued_run, fine_tuning_run
from vitscale.finding import find_checkpoint
from vitscale.locality import choose_order, run_locality
from vitscale.mixture import Mixture, class_difference
from vitscale.run import RunError, begun_config, is_of_tars, overlay_fields, read_config, read_record, trained_datasets, used_overlays
from vitscale.timeline import timeline_of
from vitscale.unindexed import Tars, named_tars


def resolve(asked: TrainConfig | FinetuneConfig, world_size: int) -> TrainConfig:
    """Fills in what a config leaves to the dataset and the checkpoint, and checks everything that can be known before a start.

    Writes nothing. Raises ConfigError, DatasetError or CheckpointError.
    """
    asked = dataclasses.replace(asked, out=asked.out or f"runs/{asked.recipe}")
    if not all(asked.datasets) or not asked.datasets:
        raise ConfigError("no dataset is given; --data DATASET names the directory of a training split, as `vitscale pack` writes it")
    stage, cache = stage_at(asked.stage), cache_at(asked.cache, asked.cache_bytes)
    if tars := named_tars(asked.datasets):
        return _resolve_tars(asked, tars, world_size)
    part = part_of(asked.holdout, held_out=False)
    dataset = Mixture([Dataset.open_checked(path, stage=stage, cache=cache, part=part) for path in asked.datasets])
    config = _with_checkpoint(asked, dataset.num_classes, dataset.class_names)
    check_config(config, world_size)
    classes = check_classes(config, dataset.num_classes)
    for component in dataset.components:
        if not component.num_kept:
            why = " that its overlays leave" if len(component) else ""
            why += f" and holdout={config.holdout:g} does not hold out" if config.holdout else ""
            raise DatasetError(f"{component.path} holds no samples{why}; a run needs at least one")
        if not isinstance(component.path, Url) and Path(config.out).resolve().is_relative_to(component.path.resolve()):
            raise ConfigError(f"out={config.out} lies inside the dataset {component.path}; --out runs/{config.recipe} works")
        if config.objective.soft_targets:
            _check_scores(component)
    timeline = timeline_of(config, dataset.num_samples)
    check_schedule(config, timeline.total_steps)
    unit = math.gcd(*(span.global_batch_size for span in timeline.spans))
    stream = choose_order(_begun_order(config), dataset.num_samples, unit, remote=not dataset.is_local)
    reads = run_locality(dataset.size, stream, timeline, world_size)
    if reads.reads == "windows" and reads.buffered_bytes_per_rank > stream.buffer_bytes:
        raise ConfigError(
            f"stream.reads=windows would hold {reads.buffered_bytes_per_rank:,} bytes of windows a rank, over "
            f"stream.buffer_bytes={stream.buffer_bytes:,}; --stream.reads auto works"
        )
    eval_data = _eval_data(config, dataset, stage)
    return dataclasses.replace(config, eval_data=eval_data, model=dataclasses.replace(config.model, num_classes=classes), stream=stream)


def _resolve_tars(asked: TrainConfig | FinetuneConfig, tars: Tars, world_size: int) -> TrainConfig:
    """As `resolve`, for tars without an index, of which nothing is known but their names."""
    named = f"{' '.join(asked.datasets)} has no index"
    instead = "`vitscale data index` makes one, and then it is known"
    if isinstance(asked, FinetuneConfig):
        raise ConfigError(f"{named} that tells its classes, which a new head is made for; {instead}")
    check_config(asked, world_size)
    if not asked.model.num_classes:
        raise ConfigError(f"{named} that tells its classes; give --model.num-classes, or {instead}")
    if not asked.steps:
        raise ConfigError(f"{named} that tells how long {asked.epochs:g} epochs are; give --steps, or {instead}")
    if without := next((name for name in ("data_weights", "cache", "holdout") if getattr(asked, name)), ""):
        raise ConfigError(f"{named}, which {without} needs; leave it out, or {instead}")
    asked = _with_checkpoint(asked, asked.model.num_classes, None)
    check_config(asked, world_size)
    check_schedule(asked, timeline_of(asked, 0).total_steps)
    held_out = "none"
    if asked.eval_data not in ("", "none"):
        found = Dataset.open_checked(location(asked.eval_data), stage=stage_at(asked.stage))
        if found.num_classes != asked.model.num_classes:
            raise DatasetError(
                f"{found.path} has {found.num_classes} classes, and model.num_classes={asked.model.num_classes}; give its own"
            )
        if asked.objective.soft_targets:
            _check_scores(found)
        held_out = str(found.path)
    stream = _begun_order(asked)
    return dataclasses.replace(
        asked, eval_data=held_out, stream=dataclasses.replace(stream, lanes=stream.lanes or 1, window=stream.window or unindexed.WINDOW)
    )


def open_data(config: TrainConfig) -> Mixture | Tars:
    """What a rank of the run trains on, as the newest start found it. Raises RunError where something else lies there by now."""
    run = Path(config.out)
    record = read_record(run)
    begun_with = trained_datasets(record)
    if is_of_tars(record):
        tars = named_tars(config.datasets)
        if tars is None or tars.names_hash != begun_with[0]["names_hash"]:
            raise RunError(f"{' '.join(config.datasets)} has other tars than when the run started a moment ago; start it again")
        return tars
    overlays = used_overlays(run)
    of_each = [overlays[name] for name in overlay_fields(len(config.datasets))]
    cache, part = cache_at(config.cache, config.cache_bytes), part_of(config.holdout, held_out=False)
    mixture = Mixture.open(config.datasets, of_each, stage_at(config.stage), cache, part)
    for component, before in zip(mixture.components, begun_with, strict=True):
        if component.content_hash != before["hash"]:
            raise RunError(f"{component.path} is another dataset than when the run started a moment ago; start it again")
    return mixture


def open_held_out(config: TrainConfig) -> Dataset | None:
    """What a rank of the run evaluates on, with the overlays that the newest start found."""
    if config.eval_data == "none":
        return None
    overlays = used_overlays(Path(config.out))["eval_data"]
    # Without check_shards: every rank would ask the file system for every tar.
    return Dataset.open(
        config.eval_data,
        overlays=overlays,
        stage=stage_at(config.stage),
        cache=cache_at(config.cache, config.cache_bytes),
        check_shards=False,
        part=part_of(config.holdout, held_out=True),
    )


def _with_checkpoint(asked: TrainConfig | FinetuneConfig, num_classes: int, class_names: tuple[str, ...] | None) -> TrainConfig:
    """The run that is made of a checkpoint: fine-tuning, or pre-training that begins from one, and keeps its head where classes agree.

    A run that was started before has it written down, and needs the checkpoint no more.
    """
    if isinstance(asked, TrainConfig) and (asked.init is None or asked.init.folder):
        return asked
    if not asked.init:
        raise ConfigError(
            "no checkpoint is given; --init CHECKPOINT names a run, RUN@STEP, RUN@best, a step's folder or an exported folder"
        )
    run = Path(asked.out)
    base: TrainConfig | checkpoint.Description
    if (run / "run.json").is_file() and (started := read_config(run)).init is not None:
        base, folder, keep_head = started, started.init.folder, started.init.keep_head
    else:
        named = asked.init if isinstance(asked, FinetuneConfig) else asked.init.checkpoint
        base = checkpoint.describe(find_checkpoint(named))
        folder, keep_head = str(base.path), (base.model.num_classes, base.class_names) == (num_classes, class_names)
    if isinstance(asked, FinetuneConfig):
        return fine_tuning_run(asked, base.model, base.preprocess, folder, num_classes)
    check_classes(asked, num_classes)
    return continued_run(asked, base.model, base.preprocess, folder, num_classes, keep_head=keep_head)


def stage_at(folder: str) -> Path | None:
    """The folder that indices are mapped from, as a setting names it."""
    return Path(folder) if folder else None


def cache_at(folder: str, limit: int | None) -> Cache | None:
    """The cache that tars are read through, as settings name it. Raises ConfigError, CacheError."""
    if bool(folder) != (limit is not None):
        raise ConfigError(f"cache={folder!r} and cache_bytes={limit}: one is missing; --cache /local/disk --cache-bytes 200GB has both")
    return Cache(Path(folder), limit) if limit is not None else None


def _begun_order(config: TrainConfig) -> StreamConfig:
    """What is asked of the stream, with lanes and window of the run if it has begun: its data may lie elsewhere by now."""
    begun = begun_config(Path(config.out))
    if begun is None:
        return config.stream
    lanes, window = config.stream.lanes or begun.stream.lanes, config.stream.window or begun.stream.window
    return dataclasses.replace(config.stream, lanes=lanes, window=window)


def _eval_data(config: TrainConfig, dataset: Mixture, stage: Path | None) -> str:
    if config.eval_data == "none":
        return "none"
    if config.holdout:
        (within,) = config.datasets
        part = Dataset.open(within, stage=stage, check_shards=False, part=part_of(config.holdout, held_out=True))
        if not part.num_kept:
            raise DatasetError(f"holdout={config.holdout:g} holds out none of the {len(part):,} samples of {within}; a larger share does")
        return within
    trained_on = [location(of) for of in config.datasets]
    path = location(config.eval_data) if config.eval_data else trained_on[0].parent / "val"
    if not config.eval_data and (not _is_there(path / "dataset.json") or _resolved(path) in map(_resolved, trained_on)):
        return "none"
    held_out = Dataset.open_checked(path, stage=stage)
    if held_out.num_classes != dataset.num_classes or held_out.class_names != dataset.class_names:
        raise DatasetError(
            f"{path} and {config.datasets[0]} {class_difference(held_out, dataset.components[0])}; pack both with the same --class-names, "
            "or pass --eval-data none"
        )
    if config.objective.soft_targets:
        _check_scores(held_out)
    return str(path)


def _is_there(file: Location) -> bool:
    return exists(file) if isinstance(file, Url) else file.is_file()


def _resolved(path: Location) -> Location:
    return path if isinstance(path, Url) else path.resolve()


def _check_scores(dataset: Dataset) -> None:
    low, high = dataset.score_range()
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"soft_targets needs scores in [0, 1], {dataset.path} has them in [{low:g}, {high:g}]; scale them and pack again")
