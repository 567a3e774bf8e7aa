"""What `vitscale data stats` and `vitscale data preview` print on a terminal, as tables of rich.

Names from a dataset pass `printable` and go in as Text, so neither an escape sequence nor rich's own markup in them has any effect.
"""

from collections.abc import Callable, Sequence

from PIL import Image
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from data_tools.page import byte_size, printable
from data_tools.preview import Sheet, Tile, tiles
from data_tools.stats import FEW, MANY, PERCENTILES, ClassCount, Stats, Summary, findings
from vitscale.locality import Locality, Traffic
from vitscale.metrics import duration

THUMBNAIL = (16, 8)  # columns and lines of a picture on a terminal, two pixels a line
BAR = 24


def print_locality(dataset: str, found: Locality, asks: Traffic, console: Console | None = None) -> None:
    """How a cluster would read a dataset."""
    console = console or Console(highlight=False)
    rate = f"{asks.images_per_second_per_rank:,.0f} images/s a rank"
    ranks = f"{found.world_size:,} ranks on {asks.nodes:,} nodes of {asks.ranks_per_node}"
    console.print(Text(printable(f"{dataset}: {ranks}, global batch {found.global_batch_size:,}, {rate}"), style="bold"))
    if found.global_batch_size > found.samples:
        console.print(
            f"! a step of {found.global_batch_size:,} is over all its {found.samples:,} samples; --global-batch-size says how many"
        )
    lanes = f"{found.lanes:,} lanes, {found.lanes_per_rank:,} a rank; windows of {found.window:,} samples, {byte_size(found.window_bytes)}"
    console.print(f"{lanes}; at most {found.open_shards_per_rank:,} shards open a rank")
    if found.why:
        console.print(f"single samples are read: {found.why}")
    else:
        held = f"{byte_size(found.buffered_bytes_per_rank)} a rank, {byte_size(asks.buffered_bytes_per_node)} a node"
        console.print(
            f"windows are read whole; those in use and the next of each lane take {held} (a rank may hold {byte_size(found.buffer_bytes)})"
        )
        if found.in_windows < 1:
            console.print(
                f"{found.in_windows:.0%} of the samples are taken from them, the others one by one: not all ranks have as many lanes, as "
                f"they have where {'pairs of lanes' if found.paired else 'lanes'} are a multiple of the ranks"
            )
    table = _table("", "", "a rank", "a node", "the cluster", numeric=(1, 2, 3))
    reads = (asks.reads_per_second_per_rank, asks.reads_per_second_per_node, asks.reads_per_second)
    table.add_row("reads a second", *(f"{rate:,.1f}" for rate in reads))
    of_bytes = (asks.bytes_per_second_per_rank, asks.bytes_per_second_per_node, asks.bytes_per_second)
    table.add_row("bytes a second", *(byte_size(round(rate)) for rate in of_bytes))
    console.print(table)
    console.print(
        f"{byte_size(asks.bytes_per_read)} a read; a window of a lane lasts {duration(asks.seconds_per_window)}, an epoch "
        f"{duration(asks.seconds_per_epoch)}"
    )


def print_stats(found: Stats, console: Console | None = None) -> None:
    """The figures of a dataset."""
    console = console or Console(highlight=False)
    where = f"{byte_size(found.image_bytes)} of images in {len(found.shards.shards):,} shards"
    head = f"{found.samples:,} samples, {found.labels:,} labels, {where}"
    console.print(Text(printable(f"{found.name}, {found.split}: {head}"), style="bold"))
    for finding in findings(found):
        console.print(Text({"good": "+ ", "plain": "- ", "look": "! "}[finding.tone] + printable(finding.text)))
    classes = found.classes
    most = max(classes.counts, default=0)
    rows: list[tuple[str, Sequence[ClassCount]]] = [("most samples", classes.most)]
    if classes.used > len(classes.most):
        rows += [("around the median", classes.middle), ("fewest", classes.fewest)]
    rows.append(("without a sample", classes.empty))
    table = _table("classes", "", "class", "samples", "")
    for title, shown in rows:
        for number, one in enumerate(shown):
            bar = "█" * max(round(BAR * one.samples / max(1, most)), 1 if one.samples else 0)
            table.add_row(
                "" if number else title, _name(one.name), f"{one.samples:,}", Text(bar, style="blue"), end_section=one is shown[-1]
            )
    console.print(table)
    many, few = f"{classes.many_shot:,} many-shot (over {MANY})", f"{classes.few_shot:,} few-shot (under {FEW})"
    shots = f"{many}, {classes.medium_shot:,} medium-shot, {few}"
    console.print(
        f"{classes.used:,} of {classes.total:,} classes have samples: {shots}; Gini {classes.gini:.3f}, median {classes.median:,.6g}\n"
    )

    table = _table("labels a sample", "labels", "samples", "share", numeric=(0, 1, 2))
    for number, count in enumerate(found.labels_a_sample[:12]):
        table.add_row(f"{number}", f"{count:,}", f"{count / found.samples:.2%}")
    if more := sum(found.labels_a_sample[12:]):
        table.add_row("12 or more", f"{more:,}", f"{more / found.samples:.2%}")
    console.print(table)

    if found.pairs.most:
        table = _table(
            f"on the same samples, of the {found.pairs.among:,} most frequent classes", "class", "with", "samples", "of the rarer", "lift"
        )
        for pair in found.pairs.most[:10]:
            first, second = _name(pair.first.name), _name(pair.second.name)
            table.add_row(first, second, f"{pair.samples:,}", f"{pair.share_of_rarer:.1%}", f"{pair.lift:,.3g}")
        console.print(table)

    percentiles = [
        f"p{p}" for p in (PERCENTILES if console.width >= 120 else (5, 50, 95))
    ]  # figures that are broken in two are hard to read
    table = _table("images", "", "least", *percentiles, "most", "mean", numeric=range(1, len(percentiles) + 4))
    lines: list[tuple[str, Summary, Callable[[float], str]]] = [("bytes", found.bytes_an_image, byte_size)]
    if (sizes := found.sizes) is not None:
        sides = [("width", sizes.width), ("height", sizes.height), ("shorter side", sizes.short_side)]
        lines = [(name, side, "{:,.0f}".format) for name, side in sides] + [("width / height", sizes.aspect_ratio, "{:.3g}".format)] + lines
    if found.scores is not None:
        lines.append(("score", found.scores.summary, "{:.3g}".format))
    lines += [("samples a shard", found.shards.samples, "{:,.0f}".format), ("bytes a shard", found.shards.bytes, byte_size)]
    for name, summary, as_text in lines:
        values = [summary.minimum, *(summary.percentiles.get(of, 0.0) for of in percentiles), summary.maximum, summary.mean]
        table.add_row(name, *map(as_text, values))
    console.print(table)

    if found.rejects:
        table = _table("left out by pack", "reason", "images", "for example", numeric=(1,))
        for reason in found.rejects:
            table.add_row(_name(reason.reason), f"{reason.images:,}", _name(": ".join(reason.examples[0])))
        console.print(table)


def print_preview(found: Sheet, console: Console | None = None) -> None:
    """The samples that were picked; with pictures where somebody looks at a terminal."""
    console = console or Console(highlight=False)
    pictures = console.is_terminal and console.color_system in ("256", "truecolor")
    columns = ["", "number", "key", "labels", "size", "bytes"] + ["picture"] * pictures
    table = _table(f"{found.name}, {found.split}: {len(list(tiles(found))):,} of {found.samples:,} samples", *columns, numeric=(1, 5))
    for group in found.groups:
        title = _name(f"{group.title} ({group.samples:,})")
        for number, tile in enumerate(group.tiles):
            size = f"{tile.width} x {tile.height}"
            shown = Text(f"damaged: {printable(tile.damage)}", style="red") if tile.damage is not None else Text(size)
            row = [title if number == 0 else "", f"{tile.sample:,}", _name(tile.key), _labels(tile), shown, byte_size(tile.bytes)]
            picture = [half_blocks(tile.thumbnail).append("\n") if tile.thumbnail is not None else ""] * pictures
            table.add_row(*row, *picture, end_section=tile is group.tiles[-1])
        if not group.tiles:
            table.add_row(title, "", "", "", "no sample", "", end_section=True)
    console.print(table)


def half_blocks(image: Image.Image) -> Text:
    """A picture of two pixels a character: the upper one in the block's colour, the lower one in the background's."""
    scale = min(THUMBNAIL[0] / image.width, 2 * THUMBNAIL[1] / image.height)
    width, height = max(1, round(image.width * scale)), max(2, round(image.height * scale / 2) * 2)
    small = image.resize((width, height), Image.Resampling.BOX)
    pixels = list(small.tobytes())
    said = Text()
    for y in range(0, height, 2):
        for x in range(width):
            upper, lower = (pixels[3 * (row * width + x) : 3 * (row * width + x) + 3] for row in (y, y + 1))
            said.append("▀", Style(color="#{:02x}{:02x}{:02x}".format(*upper), bgcolor="#{:02x}{:02x}{:02x}".format(*lower)))
        said.append("\n" if y + 2 < height else "")
    return said


def _labels(tile: Tile) -> Text:
    shown = [f"{printable(name)} {score:.2f}" if tile.scored else printable(name) for _, name, score in tile.labels[:8]]
    more = [f"and {len(tile.labels) - 8:,} more"] * (len(tile.labels) > 8)
    return Text(", ".join(shown + more) or "no label")


def _name(value: str) -> Text:
    return Text(printable(value), overflow="fold")


def _table(title: str, *columns: str, numeric: Sequence[int] | None = None) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        right = column in ("samples", "of the rarer", "lift") if numeric is None else number in numeric
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table
