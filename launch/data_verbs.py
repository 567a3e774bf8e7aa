"""The verbs that make datasets and look at them: `pack` and `data ...`. They work where torch is not installed.

As in `verbs.py`, what a verb needs is imported when it runs.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from data_tools.config import BYTES, IndexConfig, PackConfig
from data_tools.storage import location
from launch.flags import UsageError, given, parse
from launch.terminal import Json, Verb, VerbError, print_json, progress_bar

if TYPE_CHECKING:
    from data_tools.assemble import PackResult
    from data_tools.verify import Problem

Split = Annotated[
    Positional[str], tyro.conf.arg(metavar="DATASET", help="Directory of one split; to read it, also a URL: s3://bucket/data/train.")
]


@dataclass(frozen=True)
class PackFlags:
    """Flags of `vitscale pack`."""

    paths: Annotated[
        Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE... OUT", help="What to pack, and the folder for the splits.")
    ]
    config: Annotated[PackConfig, tyro.conf.arg(name="")] = PackConfig(sources=(), out="")  # noqa: RUF009 - frozen
    json: Json = False


def pack(words: list[str]) -> None:
    """Images and labels into WebDataset tar shards with an index."""
    flags = parse(PackFlags, words, "pack", description=PackConfig.__doc__)
    if len(flags.paths) < 2:
        raise UsageError(
            f"`vitscale pack` needs SOURCE... and OUT, and was given {len(flags.paths)} path; `vitscale pack images/ dataset/` is one use"
        )
    from data_tools.pack import pack as pack_sources
    from vitscale.metrics import counted

    config = dataclasses.replace(flags.config, sources=flags.paths[:-1], out=flags.paths[-1])
    with progress_bar("packing", quiet=flags.json, unit="images") as update:
        results = pack_sources(config, lambda done, total, rejects: update(done, total, f"{rejects:,} left out"))
    if flags.json:
        print_json([dataclasses.asdict(result) for result in results])
        return
    if config.task is not None and not results:
        print(f"{config.out}: share {config.task} is done; when all are, the same command without --task puts the dataset together")
    for result in results:
        size = f"{counted(result.shards, 'shard')}, {result.classes} classes, {result.bytes / 1e6:,.1f} MB"
        print(f"{result.path}: {counted(result.samples, 'sample')} in {size}")
        if empty := result.empty_classes:
            print(f"{result.path}: {counted(len(empty), 'class')} without an image: {', '.join(empty[:5])}{', ...' if empty[5:] else ''}")
        _print_rejects(result, "image")


def _print_rejects(result: "PackResult", what: str) -> None:
    from vitscale.metrics import counted

    if result.rejects:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.reasons.items())
        print(f"{result.path}: {counted(result.rejects, what)} left out ({reasons}); rejects.parquet names them")


@dataclass(frozen=True)
class VerifyFlags:
    """Reads a whole dataset and names every file, and in damaged tars every sample, that is not as it was packed. Status 1 if any."""

    dataset: Split
    decode: bool = False
    """Also decode every image."""
    share: float = 1.0
    """Of the tars to read, drawn by their names; indices and tables are read in full in any case."""
    jobs: int = 0
    """Threads; 0 takes the cores there are."""
    json: Json = False


def data_verify(words: list[str]) -> None:
    """Every byte of a dataset against its checksums."""
    flags = parse(VerifyFlags, words, "data verify")
    from data_tools.verify import STRANGER, verify
    from vitscale.metrics import counted

    with progress_bar("reading", quiet=flags.json, unit="MB") as update:
        report = verify(
            location(flags.dataset),
            jobs=flags.jobs,
            decode=flags.decode,
            share=flags.share,
            progress=lambda done, total: update(done // 10**6, total // 10**6),
        )
    if flags.json:
        print_json(dataclasses.asdict(report))
    else:
        _print_problems(flags.dataset, report.problems)
        decoded = f", {counted(report.decoded, 'image')} decoded" if flags.decode else ""
        read = f"{counted(report.files, 'file')}, {counted(report.samples, 'sample')}, {report.bytes / 1e6:,.1f} MB{decoded}"
        print(f"{flags.dataset}: {read}; {'all as packed' if not report.problems else counted(len(report.problems), 'problem')}")
    if report.problems:
        strangers = [problem.file for problem in report.problems if problem.what == STRANGER]
        if len(strangers) == len(report.problems):
            raise VerbError(f"{flags.dataset} holds files that are not its own ({strangers[0]} first); move them away")
        raise VerbError(f"{flags.dataset} is damaged ({report.problems[0].file} first); `vitscale data repair` makes good what it can")


def _print_problems(dataset: str, problems: "Iterable[Problem]") -> None:
    for problem in problems:
        sample = f" sample {problem.sample} (key {problem.key}):" if problem.sample is not None else ""
        print(f"{dataset}/{problem.file}:{sample} {problem.what}")


@dataclass(frozen=True)
class OverlayFlags:
    """Changes labels or removes samples by a small file beside the tars, which stay as they are; numbering stays too.

    A training takes it up at its next start. With no change given, lists the overlays there are."""

    dataset: Split
    changes: Annotated[
        Positional[str | None],
        tyro.conf.arg(
            metavar="CHANGES", help="CSV, TSV, JSONL or Parquet with `key` and `removed`, `labels`, `scores`, `reason`; .txt: keys."
        ),
    ] = None
    remove: tuple[str, ...] = ()
    """Keys of samples to remove."""
    restore: tuple[str, ...] = ()
    """Keys of removed samples to bring back."""
    name: str = "changes"
    """A word for the file's name."""
    reason: str = ""
    """Why, where CHANGES does not say."""
    skip_unknown: bool = False
    """Leave out keys that the dataset does not have, as where a list is for several splits."""
    json: Json = False


def data_overlay(words: list[str]) -> None:
    """Other labels for samples, or their removal, without touching the tars."""
    flags = parse(OverlayFlags, words, "data overlay")
    changes = flags.changes or flags.remove or flags.restore
    for flag in sorted(given(words, "remove", "restore", "reason", "name")):
        if not changes or not getattr(flags, flag):
            missing = "a key" if flag in ("remove", "restore") else "a change that it is for"
            raise UsageError(f"--{flag} lacks {missing}; `vitscale data overlay {flags.dataset} --remove KEY --reason WHY` is one use")
    from data_tools.amend import amend, list_overlays
    from data_tools.dataset import Dataset
    from vitscale.metrics import counted

    dataset = Dataset.open_checked(Path(flags.dataset))  # not of a URL: it is changed there
    unknown = 0
    if changes:
        made, unknown = amend(
            dataset, flags.name, file=Path(flags.changes) if flags.changes else None, remove=flags.remove, restore=flags.restore,
            reason=flags.reason, skip_unknown=flags.skip_unknown,
        )  # fmt: skip
        listed = [made] if made is not None else []
    else:
        listed = list_overlays(dataset.folder)
    after = Dataset.open(flags.dataset, check_shards=False).overlay
    if flags.json:
        of = {"path": str(dataset.path), "content_hash": dataset.content_hash, "overlays": [dataclasses.asdict(one) for one in listed]}
        print_json(of | {"removed": after.num_removed, "relabelled": len(after.samples), "unknown_keys": unknown})
        return
    for one in listed:
        why = f" ({one.reason})" if one.reason else ""
        print(f"{one.path}: {one.removed:,} removed, {one.restored:,} restored, {one.relabelled:,} relabelled{why}")
    if changes and not listed:
        print("nothing to change: that is what the overlays there are say already")
    skipped = f"; {counted(unknown, 'unknown key')} left out" if unknown else ""
    all_in_all = f"{after.num_removed:,} removed, {len(after.samples):,} relabelled"
    print(f"{flags.dataset}: {counted(len(after.names), 'overlay')}, all in all {all_in_all}{skipped}")


@dataclass(frozen=True)
class DedupFlags:
    """Removes pictures that stand in a dataset twice or in an evaluation set too, by an overlay; the tars stay as they are.

    Pictures are compared by perceptual hashes: scaled, compressed and mirrored copies are found, crops only if they are slight."""

    dataset: Split
    against: tuple[str, ...] = ()
    """Directories of evaluation splits: nothing that is like a picture of theirs stays in DATASET."""
    inside: bool = True
    """Also look for copies inside DATASET; the one with most pixels stays."""
    distance: int = 31
    """Bits of 256 that may differ, at most 47. More finds more cropped and marked copies, and more that are only similar."""
    min_quality: int = 50
    """Of two pictures one must have this much in it (PDQ's quality, 0 to 100); plainer ones are copies only if they are the same file."""
    mirror: bool = True
    """A mirrored copy is a copy."""
    list: str | None = None
    """CSV or Parquet file for the removals, with reasons; `vitscale data overlay` takes it, after you struck some out."""
    dry_run: bool = False
    """Remove nothing."""
    name: str = "dedup"
    """A word for the overlay's name."""
    work: str | None = None
    """Folder for the hashes (65 bytes an image), which the next search uses again. None: .dedup in DATASET."""
    jobs: int = 0
    """Processes that decode and hash; 0 takes the cores there are."""
    json: Json = False


def data_dedup(words: list[str]) -> None:
    """Removes pictures that stand in a dataset twice, or in an evaluation set too."""
    flags = parse(DedupFlags, words, "data dedup")
    if given(words, "against") and not flags.against:
        raise UsageError("--against lacks a dataset; `vitscale data dedup data/train --against data/val` is one use")
    from data_tools.dedup import dedup
    from vitscale.metrics import counted

    with progress_bar("hashing", quiet=flags.json, unit="images") as update:
        report = dedup(
            Path(flags.dataset), tuple(map(location, flags.against)), inside=flags.inside, distance=flags.distance,
            min_quality=flags.min_quality, mirror=flags.mirror, name=flags.name, listing=Path(flags.list) if flags.list else None,
            dry_run=flags.dry_run, work=Path(flags.work) if flags.work else None, jobs=flags.jobs, progress=update,
        )  # fmt: skip
    if flags.json:
        print_json(dataclasses.asdict(report))
        return
    unread = f", {report.unreadable:,} could not be decoded" if report.unreadable else ""
    print(f"{report.path}: {counted(report.samples, 'sample')} compared ({report.plain:,} too plain to tell{unread})")
    unlike = f"; {report.other_labels:,} of them have other labels than the one that stays" if report.other_labels else ""
    print(f"copies inside: {report.same_file:,} of the same file, {report.near:,} near duplicates{unlike}")
    for other, count in report.leaked.items():
        print(f"also in {other}: {count:,}")
    total = report.same_file + report.near + sum(report.leaked.values())
    if flags.list is not None:
        print(f"wrote {flags.list}")
    if report.overlay:
        print(f"{report.overlay}: {total:,} removed")
    else:
        print(f"{total:,} to remove, left as they are" if total else "nothing to remove")


Html = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="FILE",
        help="Write a page to look at, which needs nothing but itself. A file that is there is replaced if it is such a page.",
    ),
]


@dataclass(frozen=True)
class StatsFlags:
    """Counts what is in a dataset: classes and their long tail, labels, pairs, sizes, scores, rejects, and how shards differ.

    With --for-world it tells instead what training on it would ask of a cluster's memory and storage."""

    dataset: Split
    html: Html = None
    for_world: int | None = None
    """Ranks of a cluster: tells how they would read the dataset, from the manifest alone."""
    global_batch_size: int = 4096
    """With --for-world, as of a run."""
    images_per_second_per_gpu: float = 1000.0
    """With --for-world: the rate to reckon with."""
    gpus_per_node: int = 8
    """With --for-world."""
    lanes: int = 0
    """With --for-world, as of a run; 0 chooses as a run does."""
    window: int = 0
    """With --for-world, as of a run; 0 chooses as a run does."""
    buffer_bytes: Annotated[int, BYTES] = 2**30
    """With --for-world, as of a run: bytes of windows that a rank may hold."""
    json: Json = False


FOR_WORLD = ("global_batch_size", "images_per_second_per_gpu", "gpus_per_node", "lanes", "window", "buffer_bytes")


def data_stats(words: list[str]) -> None:
    """What is in a dataset: classes, labels, sizes, shards, in figures."""
    flags = parse(StatsFlags, words, "data stats")
    if flags.for_world is not None:
        _stats_for_world(flags, flags.for_world)
        return
    if unused := sorted(given(words, *(of.replace("_", "-") for of in FOR_WORLD))):
        raise UsageError(f"--{unused[0]} says how a cluster would read; it goes with --for-world RANKS")
    from data_tools import data_pages, page, stats
    from data_tools.durable import replace_file
    from launch.data_tables import print_stats

    if flags.html is not None:
        page.check_target(Path(flags.html), location(flags.dataset))
    with progress_bar("counting", quiet=flags.json, unit="samples") as update:
        found = stats.count(location(flags.dataset), update)
    if flags.html is not None:
        replace_file(Path(flags.html), data_pages.stats_page(found))
    if flags.json:
        print_json(dataclasses.asdict(found))
        return
    print_stats(found)
    if flags.html is not None:
        print(f"wrote {flags.html}")


def _stats_for_world(flags: StatsFlags, world_size: int) -> None:
    """How a cluster would read a dataset."""
    from data_tools.dataset import Dataset
    from launch.data_tables import print_locality
    from vitscale.config import StreamConfig
    from vitscale.locality import Size, choose_order, locality, traffic

    if flags.html is not None:
        raise UsageError("--html shows what is in a dataset; leave out --for-world, or --html")
    for name, least in (("for_world", 1), ("global_batch_size", 1), ("gpus_per_node", 1), ("lanes", 0), ("window", 0), ("buffer_bytes", 0)):
        if getattr(flags, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(flags, name)} must be at least {least}")
    if not 0 < flags.images_per_second_per_gpu < float("inf"):
        raise UsageError(f"--images-per-second-per-gpu {flags.images_per_second_per_gpu:g} must be above 0")
    if flags.global_batch_size % world_size:
        fitting = max(1, round(flags.global_batch_size / world_size)) * world_size
        raise UsageError(f"--global-batch-size {flags.global_batch_size} is not a multiple of --for-world {world_size}; {fitting} is")
    dataset = Dataset.open(flags.dataset, check_shards=False)
    if not dataset.num_samples:
        raise VerbError(f"{flags.dataset} holds no samples")
    size = Size(dataset.num_samples, len(dataset.shard_names), int(dataset.shard_bytes.sum()), remote=not dataset.is_local)
    asked = StreamConfig(lanes=flags.lanes, window=flags.window, buffer_bytes=flags.buffer_bytes)
    chosen = choose_order(asked, size.samples, flags.global_batch_size, remote=size.remote)
    found = locality(size, chosen, global_batch_size=flags.global_batch_size, world_size=world_size)
    asks = traffic(found, flags.images_per_second_per_gpu, flags.gpus_per_node)
    if flags.json:
        print_json(dataclasses.asdict(found) | dataclasses.asdict(asks))
    else:
        print_locality(flags.dataset, found, asks)


@dataclass(frozen=True)
class PreviewFlags:
    """Shows some samples of a dataset, drawn at random: of some classes, of some shards, or of all. The same seed shows the same ones."""

    dataset: Split
    by: Literal["class", "shard", "random"] = "class"
    """What the samples are grouped by; random: one group of the whole dataset."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME...", help="Classes to show, by name or number.")] = ()
    groups: int = 12
    """Classes or shards to draw, where none are named."""
    images: int | None = None
    """Samples of each class or shard; 12 if not given. By random: in all; 48 if not given."""
    seed: int = 0
    """Of what is drawn."""
    side: int = 192
    """Pixels of a picture's longer side on the page; smaller images stay as they are."""
    html: Html = None
    json: Json = False


def data_preview(words: list[str]) -> None:
    """Samples of a dataset to look at, by class, by shard or at random."""
    flags = parse(PreviewFlags, words, "data preview")
    from data_tools import data_pages, page, preview
    from data_tools.durable import replace_file
    from launch.data_tables import print_preview

    if flags.html is not None:
        page.check_target(Path(flags.html), location(flags.dataset))
    images = flags.images if flags.images is not None else 48 if flags.by == "random" else 12
    with progress_bar("picking", quiet=flags.json) as update:
        found = preview.sheet(
            location(flags.dataset),
            by=flags.by,
            groups=flags.groups,
            images=images,
            classes=flags.classes,
            seed=flags.seed,
            side=flags.side,
            progress=update,
        )
    if flags.html is not None:
        replace_file(Path(flags.html), data_pages.preview_page(found))
    if flags.json:
        print_json(preview.as_json(found))
        return
    print_preview(found)
    if flags.html is not None:
        print(f"wrote {flags.html}")


@dataclass(frozen=True)
class IndexFlags:
    """Flags of `vitscale data index`."""

    tars: Annotated[
        Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="TARS", help="A folder with WebDataset tars in it, or tars; or a dataset that is there."),
    ]
    config: Annotated[IndexConfig, tyro.conf.arg(name="")] = IndexConfig(tars=())  # noqa: RUF009 - frozen
    dali: bool = False
    """Also write an index for DALI beside each tar, X.idx."""
    energon: bool = False
    """Also write an index for Megatron-Energon beside each tar, X.tar.idx."""
    json: Json = False


def data_index(words: list[str]) -> None:
    """A dataset of tars that others made, which stay as they are; DALI's and Energon's indices."""
    flags = parse(IndexFlags, words, "data index", description=IndexConfig.__doc__)
    if not flags.tars:
        raise UsageError("`vitscale data index` needs a folder of tars, or tars; `vitscale data index laion-tars/` is one use")
    from data_tools.dataset import BY_INDEX, Dataset, read_header
    from data_tools.index import index
    from data_tools.peer_indices import DALI, ENERGON, write_indices
    from vitscale.metrics import counted

    config = dataclasses.replace(flags.config, tars=flags.tars)
    folder = Path(config.folder)
    kinds = [kind for kind, asked in ((DALI, flags.dali), (ENERGON, flags.energon)) if asked]
    said: dict[str, object] = {}
    packed = len(flags.tars) == 1 and (folder / "dataset.json").is_file() and read_header(folder)["made"].get("by") != BY_INDEX
    if packed and not kinds:
        raise UsageError(f"{folder} has its index already; `--dali` and `--energon` write those of other readers")
    if not packed:
        with progress_bar("indexing", quiet=flags.json, unit="MB") as update:
            result = index(config, lambda done, total: update(done // 10**6, total // 10**6))
        said = dataclasses.asdict(result)
        if not flags.json:
            size = f"{counted(result.shards, 'tar')}, {result.classes} classes, {result.bytes / 1e6:,.1f} MB"
            print(f"{result.path}: {counted(result.samples, 'sample')} in {size}")
            _print_rejects(result, "sample")
    if kinds:
        dataset = Dataset.open(folder)
        with progress_bar("indices", quiet=flags.json) as update:
            written = write_indices([folder / name for name in dataset.shard_names], kinds, config.jobs, update)
        said["indices"] = dataclasses.asdict(written)
        if not flags.json:
            print(f"{folder}: {counted(written.written, 'index file')} of other readers written, {written.there} were there")
    if flags.json:
        print_json(said)


@dataclass(frozen=True)
class RepairFlags:
    """Makes good what `data verify` finds, and replaces nothing but by the very bytes that were lost. Status 1 if anything stays broken."""

    dataset: Split
    sources: Annotated[
        Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="SOURCE", help="What the dataset was packed from, in the same order, or a copy of the dataset."),
    ] = ()
    image_root: str | None = None
    """As it was packed with."""
    class_map: str | None = None
    """As it was packed with."""
    content_hash: str | None = None
    """Which dataset it is, if dataset.json does not say it any more; a run's run.json does."""
    retire: bool = False
    """Remove samples that stay lost by an overlay: numbering and identity of the dataset stay, training replaces them."""
    dry_run: bool = False
    """Tell what would be tried, and change nothing."""
    jobs: int = 0
    """Processes; 0 takes the cores there are."""
    json: Json = False


def data_repair(words: list[str]) -> None:
    """Makes good what `data verify` finds, from the tars, a copy or the sources."""
    flags = parse(RepairFlags, words, "data repair")
    from data_tools.repair import repair
    from vitscale.metrics import counted

    with progress_bar("repairing", quiet=flags.json) as update:
        report = repair(
            Path(flags.dataset),
            flags.sources,
            image_root=flags.image_root,
            class_map=flags.class_map,
            content_hash=flags.content_hash,
            retire=flags.retire,
            dry_run=flags.dry_run,
            jobs=flags.jobs,
            progress=lambda what, done, total: update(done, total, what),
        )
    if flags.json:
        print_json(dataclasses.asdict(report))
    else:
        for mended in report.mended:
            print(f"{flags.dataset}/{mended.file}: {mended.how}")
        _print_problems(flags.dataset, report.broken)
        left = len({problem.file for problem in report.broken})
        retired = f", {counted(report.retired, 'sample')} retired" if report.retired else ""
        done = "would be mended" if flags.dry_run else "mended"
        print(f"{flags.dataset}: {counted(len(report.mended), 'file')} {done}{retired}, {left} still broken")
    if report.broken:
        raise VerbError(
            f"{flags.dataset} is damaged still ({report.broken[0].file} first); give SOURCE or a copy, or `--retire` what is lost"
        )


DATA_VERBS: dict[str, Verb] = {
    "pack": pack,
    "data index": data_index,
    "data overlay": data_overlay,
    "data dedup": data_dedup,
    "data verify": data_verify,
    "data stats": data_stats,
    "data preview": data_preview,
    "data repair": data_repair,
}
