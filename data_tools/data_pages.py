"""The pages of `vitscale data stats` and `vitscale data preview`: what was counted or picked, as one HTML file each.

Where it stands: pure functions from `stats.Stats` and `preview.Sheet` to text; `page.py` has the frame, the charts and the escaping.

Left to others: what is counted, which samples are picked, where the file goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from data_tools import preview, stats
from data_tools.page import (
    BASE,
    DARK,
    LIGHT,
    Axis,
    Bar,
    bars,
    byte_size,
    cards,
    curve,
    document,
    heat,
    inline,
    name,
    section,
    short,
    text,
)
from data_tools.preview import Group, Sheet, Tile
from data_tools.stats import ClassCount, Classes, Shards, Sizes, Stats, Summary

CURVE_POINTS = 160
SHARD_BARS = 120
LABELS_SHOWN = 8  # on one tile


# -- stats ------------------------------------------------------------------------------------------------------------------------------


def stats_page(found: Stats) -> str:
    """The page of `vitscale data stats`."""
    title = f"{found.name}, {found.split}"
    per_sample = found.labels / found.samples
    figures = [
        (short(found.samples) if found.samples >= 1e6 else f"{found.samples:,}", "samples", "var(--blue)"),
        (byte_size(found.image_bytes), f"of images in {len(found.shards.shards):,} shards", "var(--teal)"),
        (f"{found.classes.used:,}", f"classes with samples, of {found.classes.total:,}", "var(--orange)"),
        (f"{per_sample:.3g}", "labels a sample", "var(--ink)"),
    ]
    told = "".join(f'<li class="{one.tone}">{text(one.text)}</li>' for one in stats.findings(found))
    sections = [
        _head("vitscale data stats", title, found.content_hash, figures),
        section("What stands out", f'<ul class="findings">{told}</ul>') if told else "",
        section("Classes", _classes(found.classes, found.labels)),
        section("Labels", _labels(found)),
        section("Images", _images(found.sizes, found.bytes_an_image)),
        section("Shards", _shards(found.shards)),
        section("Left out by pack", _rejects(found)) if found.rejects else "",
    ]
    return document(f"vitscale data stats: {title}", LIGHT + DARK + BASE + STYLE, "".join(sections))


def _head(eyebrow: str, title: str, content_hash: str, figures: Sequence[tuple[str, str, str]]) -> str:
    return (
        f'<header><p class="eyebrow">{text(eyebrow)}</p><h1>{name(title)}</h1>'
        f'<p class="id">dataset <code>{text(content_hash)}</code></p>{cards(figures)}</header>'
    )


def _classes(classes: Classes, labels: int) -> str:
    falling = sorted((count for count in classes.counts if count), reverse=True)
    charts = ""
    if len(falling) > 1:
        ranks = spaced(len(falling))
        tail = curve(
            "Samples of each class, most frequent first",
            f"from {falling[0]:,} samples down to {falling[-1]:,}, over {len(falling):,} classes; both axes by powers of ten",
            [(rank, falling[rank - 1]) for rank in ranks],
            Axis("rank of the class", 1, len(falling), log=True),
            Axis("samples", 1, max(10.0, 10.0 ** math.ceil(math.log10(falling[0]))), log=True),
            [(stats.MANY, f"many-shot above {stats.MANY}"), (stats.FEW, f"few-shot below {stats.FEW}")],
        )
        reached = [0, *itertools.accumulate(falling)]
        held = curve(
            "Share of the labels that the most frequent classes hold",
            f"half of all labels lie in {classes.half:,} of {len(falling):,} classes; Gini coefficient {classes.gini:.2f}",
            [(100 * rank / len(falling), 100 * reached[rank] / labels) for rank in (0, *ranks)],
            Axis("% of the classes that have a sample", 0, 100),
            Axis("% of labels", 0, 100),
            [(50, "half of the labels")],
        )
        charts = f'<div class="two">{tail}{held}</div>'
    shots = [
        (f"many-shot, over {stats.MANY} samples", classes.many_shot, "blue"),
        (f"medium-shot, {stats.FEW} to {stats.MANY}", classes.medium_shot, "teal"),
        (f"few-shot, 1 to {stats.FEW - 1}", classes.few_shot, "orange"),
        ("empty", classes.total - classes.used, "grey"),
    ]
    parts = "".join(f'<i style="flex:{count};background:var(--{color})"></i>' for _, count, color in shots if count)
    legend = "".join(f'<li><b style="background:var(--{color})"></b>{label} <em>{count:,}</em></li>' for label, count, color in shots)
    said = ", ".join(f"{count:,} {label}" for label, count, _ in shots)
    mix = f'<div class="mix" role="img" aria-label="Classes: {text(said)}">{parts}</div><ul class="legend">{legend}</ul>'
    figures = [
        ("median class", f"{classes.median:,.6g} samples"),
        ("largest over smallest", f"{classes.imbalance:,.4g}"),
        ("Gini coefficient", f"{classes.gini:.3f}"),
        ("effective classes", f"{classes.effective:,.4g}"),
        ("hold half of the labels", f"{classes.half:,}"),
        *(
            (
                f"top {top.share_of_classes:.0%} ({top.classes:,})",
                f"{top.share_of_labels:.1%} of labels, on {top.share_of_samples:.1%} of samples",
            )
            for top in classes.top
        ),
    ]
    lists = [("Most samples", classes.most)]
    if classes.used > len(classes.most):
        lists += [("Around the median", classes.middle), ("Fewest samples", classes.fewest)]
    if classes.empty:
        lists.append(("Without a sample", classes.empty))
    most = max(classes.counts, default=0)
    tables = "".join(_class_table(title, shown, most) for title, shown in lists if shown)
    return f'{mix}{charts}{_facts(figures)}<div class="lists">{tables}</div>'


def _class_table(title: str, shown: tuple[ClassCount, ...], most: int) -> str:
    rows = "".join(
        f'<tr><td class="name" title="label {one.label}">{name(one.name)}<td class="n">{one.samples:,}'
        f'<td class="bar"><i style="width:{100 * one.samples / max(1, most):.2f}%"></i>'
        for one in shown
    )
    return f'<div><h3>{text(title)}</h3><table class="tight"><tr><th>class<th class=n>samples<th>{rows}</table></div>'


def _labels(found: Stats) -> str:
    counts = found.labels_a_sample
    last = max((number for number, count in enumerate(counts) if count), default=0)
    grouped = _grouped(list(counts[: last + 1]), SHARD_BARS, sum)
    charts = bars(
        "Labels a sample",
        f"{found.labels:,} labels on {found.samples:,} samples; {counts[0]:,} samples have none",
        [Bar(count, f"{_span(first, end)} labels: {int(count):,} samples") for first, end, count in grouped],
        _ticks([str(first) for first, _, _ in grouped], centred=True),
        "labels",
    )
    if found.scores is not None:
        share = found.scores.labels_with / found.labels
        charts += _histogram(
            f"Scores, of the {share:.1%} of labels that have one", found.scores.summary, "score", "labels", lambda n: f"{n:.3g}"
        )
    pairs = "<p>No sample has two labels.</p>"
    if found.pairs.most:
        among = f"the {found.pairs.among:,} most frequent classes" if found.pairs.among < found.classes.total else "all classes"
        rows = "".join(
            f'<tr><td class="name">{name(pair.first.name)}<td class="name">{name(pair.second.name)}<td class="n">{pair.samples:,}'
            f'<td class="n">{pair.share_of_rarer:.1%}<td class="n">{pair.lift:,.3g}'
            for pair in found.pairs.most
        )
        pairs = (
            f'<h3>Classes that stand on the same samples</h3><p>Counted exactly among {among}. "Of the rarer" is the share of the rarer '
            "class's samples that have the other one too; lift is how many times as often the two meet as if they were independent.</p>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="Pairs of classes"><table class="tight"><tr><th>class<th>with'
            f"<th class=n>samples<th class=n>of the rarer<th class=n>lift{rows}</table></div>"
        )
    return f'<div class="two">{charts}</div>{pairs}'


def _images(sizes: Sizes | None, image_bytes: Summary) -> str:
    rows = [("bytes", image_bytes, byte_size)]
    charts = [_histogram("Bytes of an image", image_bytes, "bytes", "images", byte_size)]
    told = ""
    if sizes is not None:

        def pixels(value: float) -> str:
            return f"{value:,.0f}"

        def ratio(value: float) -> str:
            return f"{value:.3g}"

        rows = [
            ("width", sizes.width, pixels),
            ("height", sizes.height, pixels),
            ("shorter side", sizes.short_side, pixels),
            ("width / height", sizes.aspect_ratio, ratio),
            *rows,
        ]
        charts = [
            *([] if sizes.width.minimum == sizes.width.maximum and sizes.height.minimum == sizes.height.maximum else [_size_grid(sizes)]),
            _histogram("Shorter side", sizes.short_side, "pixels", "images", pixels),
            _histogram("Width over height", sizes.aspect_ratio, "width / height", "images", ratio),
            *charts,
        ]
        whole = max(1, sizes.width.count)
        shapes = (("landscape", sizes.landscape), ("portrait", sizes.portrait), ("square", sizes.square))
        told = f"<p>{', '.join(f'{count / whole:.1%} {shape}' for shape, count in shapes)}.</p>"
    names = [f"p{p}" for p in stats.PERCENTILES]
    header = "".join(f"<th class=n>{one}" for one in ("least", *names, "most", "mean"))
    body = "".join(
        f"<tr><td>{label}" + "".join(f'<td class="n">{shown(value)}' for value in _along(summary, names)) for label, summary, shown in rows
    )
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Percentiles"><table class="tight"><tr><th>{header}{body}</table></div>'
    )
    return f'{told}<div class="two">{"".join(charts)}</div>{table}'


def _along(summary: Summary, names: list[str]) -> list[float]:
    return [summary.minimum, *(summary.percentiles.get(one, 0.0) for one in names), summary.maximum, summary.mean]


def _size_grid(sizes: Sizes) -> str:
    """Width against height, cropped to what there is and to whole octaves."""
    cells = [(w, h, count) for w, row in enumerate(sizes.grid) for h, count in enumerate(row) if count]
    most = max(count for _, _, count in cells)
    step = stats.GRID_STEPS

    def reach(values: list[int]) -> range:
        return range(min(values) // step * step, -(-(max(values) + 1) // step) * step)

    def side(cell: int) -> str:
        return f"{math.ceil(2 ** (cell / step))} to {math.ceil(2 ** ((cell + 1) / step)) - 1}"

    drawn = [(w, h, math.log1p(count) / math.log1p(most), f"{side(w)} wide, {side(h)} high: {count:,} images") for w, h, count in cells]
    told = f"{sizes.width.minimum:,} to {sizes.width.maximum:,} wide, {sizes.height.minimum:,} to {sizes.height.maximum:,} high"
    return heat(
        "Width and height",
        told,
        drawn,
        reach([w for w, _, _ in cells]),
        reach([h for _, h, _ in cells]),
        step,
        "width, in pixels; upwards: height",
    )


def _shards(shards: Shards) -> str:
    there = shards.shards
    grouped = [(first, end - 1, there[first:end]) for first, end in _stretches(len(there), SHARD_BARS)]

    def chart(title: str, told: str, value: Callable[[Any], float], shown: Callable[[float], str], chance: float | None = None) -> str:
        values = [(first, end, sum(map(value, group)) / len(group)) for first, end, group in grouped]
        mean = " on average" if len(grouped) < len(there) else ""
        drawn = [Bar(height, f"shard {_span(first, end)}: {shown(height)}{mean}") for first, end, height in values]
        return bars(title, told, drawn, _ticks([str(first) for first, _, _ in values], centred=True), "shard", chance)

    charts = chart(
        "Samples of each shard",
        f"{shards.samples.minimum:,} to {shards.samples.maximum:,}",
        lambda one: one.samples,
        lambda n: f"{n:,.6g} samples",
    )
    charts += chart(
        "Bytes of each shard", f"{byte_size(shards.bytes.minimum)} to {byte_size(shards.bytes.maximum)}", lambda one: one.bytes, byte_size
    )
    told = ""
    if shards.excess is not None:
        charts += chart(
            "How far each shard's classes are from the whole, chance is 1",
            f"{shards.excess:.3g} over all shards",
            lambda one: one.excess or 0.0,
            lambda n: f"{n:.3g} times chance",
            chance=1.0,
        )
        distances = [one.distance for one in there if one.distance is not None]
        told = (
            '<p class="aside">The chart of distances compares how often each class stands in a shard with how often it would if samples '
            "were dealt to shards at random: "
            f"squared deviations, over those that chance alone brings. About 1 everywhere means shuffled; "
            f"this dataset has {shards.excess:,.3g}. "
            "The distribution of labels of a shard differs from the whole one by a total variation of "
            f"{min(distances):.2f} to {max(distances):.2f} (0 the same, 1 nothing in "
            "common; chance alone makes it large where shards are small).</p>"
        )
    return f'<div class="two">{charts}{told}</div>'


def _rejects(found: Stats) -> str:
    most = max(reason.images for reason in found.rejects)
    rows = "".join(
        f'<tr><td class="name">{name(reason.reason)}<td class="n">{reason.images:,}'
        f'<td class="bar"><i style="width:{100 * reason.images / most:.2f}%;background:var(--orange)"></i><td class="name small">'
        + "<br>".join(f"{name(source)}: {name(detail)}" for source, detail in reason.examples)
        for reason in found.rejects
    )
    table = f'<table class="tight rejects"><tr><th>reason<th class=n>images<th><th>for example{rows}</table>'
    return f'{table}<p class="small">rejects.parquet names each.</p>'


def _histogram(title: str, summary: Summary, below: str, what: str, shown: Callable[[float], str]) -> str:
    if summary.minimum == summary.maximum:
        return f'<figure><figcaption>{text(title)}</figcaption><p class="same">{text(shown(summary.minimum))}, all of them</p></figure>'
    edges, counts = summary.histogram.edges, summary.histogram.counts
    single = all(high - low == 1 for low, high in itertools.pairwise(edges)) and all(edge == int(edge) for edge in edges)
    drawn = [
        Bar(count, f"{shown(low) if single else f'{shown(low)} to {shown(high)}'}: {count:,} {what}")
        for (low, high), count in zip(itertools.pairwise(edges), counts, strict=True)
    ]
    steps = {round(high - low, 9) for low, high in itertools.pairwise(edges)}
    if single or len(steps) == 1 or len(edges) < 8:
        ticks = _ticks([shown(edge) for edge in (edges[:-1] if single else edges)], centred=single)
    else:  # tenths of decades
        nice = (1, 2, 5) if edges[-1] < 1500 * edges[0] else (1,)
        ticks = [(number, shown(_rounded(edge))) for number, edge in enumerate(edges) if _mantissa(edge) in nice]
    median = f"; median {shown(summary.percentiles['p50'])}" if summary.count else ""
    return bars(title, f"{shown(summary.minimum)} to {shown(summary.maximum)}{median}", drawn, ticks, below)


def _rounded(edge: float) -> float:
    """An edge as it was meant: bins begin up to 0.2% beside it."""
    return float(f"{edge:.2g}")


def _mantissa(edge: float) -> float:
    return float(f"{edge:.1e}".partition("e")[0])


def _ticks(labels: list[str], *, centred: bool) -> list[tuple[float, str]]:
    """At most some six of the labels, the first among them, below the bars' middles or left edges."""
    every = max(1, math.ceil((len(labels) - 1) / 5)) if len(labels) > 6 else 1
    return [(number + 0.5 * centred, labels[number]) for number in range(0, len(labels), every)]


def _stretches(size: int, most: int) -> list[tuple[int, int]]:
    """0..size in at most `most` even stretches."""
    step = max(1, -(-size // most))
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _grouped(values: list[int], most: int, together: Callable[[list[int]], float]) -> list[tuple[int, int, float]]:
    return [(first, end - 1, together(values[first:end])) for first, end in _stretches(len(values), most)]


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def spaced(size: int) -> list[int]:
    """Some of the ranks 1..size, close together at the start and evenly so on a logarithmic axis, the first and the last among them."""
    return sorted({min(size, round(size ** (step / (CURVE_POINTS - 1)))) for step in range(CURVE_POINTS)})


def _facts(figures: Sequence[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<div><dt>{text(label)}</dt><dd>{text(value)}</dd></div>" for label, value in figures) + "</dl>"


# -- preview ----------------------------------------------------------------------------------------------------------------------------


def preview_page(found: Sheet) -> str:
    """The page of `vitscale data preview`."""
    title = f"{found.name}, {found.split}"
    tiles = [tile for _, tile in preview.tiles(found)]
    damaged = sum(tile.damage is not None for tile in tiles)
    what = {"class": "classes", "shard": "shards"}.get(found.by, "choice at random")
    figures = [
        (f"{len(tiles):,}", f"samples shown, of {found.samples:,}", "var(--blue)"),
        (f"{len(found.groups):,}", what, "var(--teal)"),
        (f"{damaged:,}", "of them damaged", "var(--bad)" if damaged else "var(--good)"),
        (f"{found.seed}", "seed of the choice", "var(--ink)"),
    ]
    sections = [_head("vitscale data preview", title, found.content_hash, figures), *(_group(group, found.by) for group in found.groups)]
    return document(f"vitscale data preview: {title}", LIGHT + DARK + BASE + STYLE, "".join(sections))


def _group(group: Group, by: str) -> str:
    size = f", {byte_size(group.bytes)}" if group.bytes is not None else ""
    told = f"{len(group.tiles):,} of {group.samples:,} samples{size}" if group.samples else "no sample"
    tiles = "".join(map(_tile, group.tiles))
    return f'<section><h2>{name(group.title)} <small>{told}</small></h2><div class="sheet">{tiles}</div></section>\n'


def _tile(tile: Tile) -> str:
    labels = "".join(
        f"<li>{name(label)}{f' <em>{score:.2f}</em>' if tile.scored else ''}</li>" for _, label, score in tile.labels[:LABELS_SHOWN]
    )
    if len(tile.labels) > LABELS_SHOWN:
        labels += f"<li>and {len(tile.labels) - LABELS_SHOWN:,} more</li>"
    if tile.thumbnail is not None:
        kind, data = preview.encoded(tile.thumbnail)
        what = ", ".join(label for _, label, _ in tile.labels[:LABELS_SHOWN]) or "no label"
        small = ' class="pixels"' if kind == "png" else ""
        width, height = tile.thumbnail.size
        picture = f'<img{small} src="{inline(data, kind)}" width="{width}" height="{height}" alt="{text(f"sample {tile.sample}: {what}")}">'
    else:
        said = f'role="img" aria-label="sample {tile.sample} is damaged"'
        picture = f'<div class="broken" {said}><b>damaged</b><span>{text(tile.damage or "")}</span></div>'
    facts = [f"no. {tile.sample:,}", f"{tile.width} x {tile.height}", *([byte_size(tile.bytes)] if tile.bytes else [])]
    said = " · ".join(fact.replace(" ", "&nbsp;") for fact in facts)
    source = f' title="{text(tile.source)}"' if tile.source else ""
    return (
        f'<figure class="tile{" damaged" if tile.damage is not None else ""}"><div class="frame">{picture}</div>'
        f'<figcaption><ul class="chips">{labels or "<li class=none>no label</li>"}</ul><code{source}>{text(tile.key)}</code>'
        f"<span>{said}</span></figcaption></figure>"
    )


STYLE = """
*{box-sizing:border-box}
h1,h2,h3,.name,.findings{overflow-wrap:anywhere}
h2 small{font-weight:400;color:var(--muted);font-size:13px;margin-left:6px}
h3{font-size:14px;margin:22px 0 6px}
.id{font-size:13px;color:var(--muted);overflow-wrap:anywhere}
code{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.two{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:26px 30px;margin:6px 0 20px}
.two>figure{max-width:620px}
svg .fill{fill:var(--blue)}
svg .line{fill:none;stroke:var(--blue);stroke-width:2;stroke-linejoin:round}
svg .area{fill:var(--blue);opacity:.12}
svg .hit{fill:transparent}
svg g:hover .fill{fill:var(--orange)}
svg .chance{stroke:var(--orange);stroke-width:1.5;stroke-dasharray:5 4}
svg .axis{font-size:11px}
.findings{list-style:none;margin:0;padding:0;display:grid;gap:8px;color:var(--body)}
.findings li{padding-left:26px;position:relative}
.findings li::before{position:absolute;left:0;font-weight:700;width:18px;text-align:center}
.findings .good::before{content:"✓";color:var(--good)}
.findings .plain::before{content:"·";color:var(--muted)}
.findings .look::before{content:"!";color:var(--orange)}
.mix{display:flex;height:14px;border-radius:7px;overflow:hidden;gap:2px;margin-bottom:10px}
.mix i{min-width:3px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:0 0 20px;font-size:13px;color:var(--body)}
.legend b{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.legend em,.chips em{font-style:normal;color:var(--muted)}
.legend em{font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,220px),1fr));gap:10px 24px;margin:0 0 8px}
.facts dt{font-size:12px;color:var(--muted)}
.facts dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.lists{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));gap:0 34px}
.tight td,.tight th{padding:5px 12px 5px 0;font-size:13px}
.tight .n{white-space:nowrap}
.tight .bar{width:30%}
.tight td:last-child,.tight th:last-child{padding-right:0}
.bar i{background:var(--blue)}
.scroll{overflow-x:auto}
.scroll:focus-visible{outline:2px solid var(--blue)}
.scroll .name{min-width:7em}
.same{font-size:20px;color:var(--ink);margin:4px 0}
.aside{align-self:center}
.small{font-size:12px;color:var(--muted)}
.rejects .bar{width:16%}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,148px),1fr));gap:20px 16px}
.tile{min-width:0;font-size:12px}
.frame{aspect-ratio:1;display:grid;place-items:center;overflow:hidden}
.frame{background:var(--faint);border:1px solid var(--edge);border-radius:10px}
.frame img{width:100%;height:100%;object-fit:contain;display:block}
.frame .pixels{image-rendering:pixelated}
.tile figcaption{font-weight:400;font-size:12px;margin:7px 0 0;overflow-wrap:anywhere}
.tile figcaption span,.tile code{display:block;color:var(--muted)}
.tile code{color:var(--body)}
.chips{list-style:none;display:flex;flex-wrap:wrap;gap:4px;margin:0 0 4px;padding:0}
.chips li{background:var(--faint);border:1px solid var(--edge);border-radius:6px;padding:0 6px;font-weight:600;max-width:100%}
.chips bdi{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;overflow:hidden}
.chips em{flex:none}
.chips li{display:flex;gap:5px;align-items:baseline}
.chips .none{font-weight:400;color:var(--muted)}
.damaged .frame{border:2px dashed var(--bad-edge);background:var(--bad-back)}
.broken{padding:10px;text-align:center;color:var(--bad);overflow:auto;max-height:100%;max-width:100%}
.broken b{display:block}
.broken span{font-size:11px;overflow-wrap:anywhere}
@media(max-width:800px){.cards{grid-template-columns:1fr 1fr}main{padding:28px 14px}}
@media(max-width:800px){section{padding:18px 16px}h1{font-size:27px}.card b{font-size:24px}}
"""
