"""What the HTML pages of vitscale share: the frame of a page that loads nothing from elsewhere, its looks, and charts as inline SVG.

Where it stands: `data_pages.py` and vitscale's `report.py` are made of it. All functions but `check_target` are pure.

Invariants: whatever text comes from a dataset passes `text`, so it is shown and never taken for markup; a page has no script, asks for
nothing, and says so to the browser (Content-Security-Policy), which then refuses both.

Left to others: what a page says.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from data_tools.errors import UserError
from data_tools.storage import Location

MARK = "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=generator content=vitscale>"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
JOINERS = "\u200c\u200d"  # which some scripts need inside a word


class PageError(UserError):
    """A place where no page can be written."""


def document(title: str, style: str, body: str) -> str:
    """The whole page."""
    return (
        f'{MARK}<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f'<title>{text(title)}</title><meta name=viewport content="width=device-width"><style>{style}</style>\n<main>{body}</main></html>\n'
    )


def section(title: str, body: str) -> str:
    """A part of the page."""
    return f"<section><h2>{text(title)}</h2>{body}</section>\n"


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Figures that matter: value, what it is, and its colour in CSS."""
    boxes = "".join(
        f'<div class="card"><b style="color:{color}">{text(value)}</b><span>{text(label)}</span></div>' for value, label, color in values
    )
    return f'<div class="cards">{boxes}</div>'


def inline(data: bytes, kind: str = "png") -> str:
    """An image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def printable(value: str) -> str:
    """The text with what does not print (control characters, escapes of terminals, switches of direction) as a replacement character."""
    return "".join(
        char if char.isprintable() or char in JOINERS or category(char) == "Zs" else "\N{REPLACEMENT CHARACTER}" for char in value
    )


def text(value: str) -> str:
    """Any text as HTML, fit for attributes too."""
    return html.escape(printable(value))


def name(value: str) -> str:
    """A name from a dataset as HTML that keeps its own direction of writing to itself."""
    return f"<bdi>{text(value)}</bdi>"


# -- Numbers for people -----------------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A number in at most some five characters: 950, 1.2k, 34M."""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * 0.9995:
            return f"{value / power:.3g}{unit}"
    return f"{value:.3g}"


def byte_size(value: float) -> str:
    """A number of bytes: 950 B, 1.2 kB, 34 MB."""
    size = short(value)
    return f"{size[:-1]} {size[-1]}B" if size[-1].isalpha() else f"{size} B"


def nice_step(least: float) -> float:
    """The smallest 1, 2, 2.5 or 5 times a power of ten that is not below `least`."""
    power = 10 ** math.floor(math.log10(max(least, 1e-12)))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * (1 - 1e-9)))


# -- Where pages go ---------------------------------------------------------------------------------------------------------------------


def check_target(file: Path, dataset: Location) -> None:
    """Raises PageError where a page cannot go: no folder, inside the dataset, or in place of something that is no page of ours."""
    if not file.parent.is_dir():
        raise PageError(f"{file.parent} is not a folder, so {file.name} cannot be written there; make it first")
    if isinstance(dataset, Path) and file.resolve().is_relative_to(dataset.resolve()):
        raise PageError(f"{file} lies inside the dataset, where `vitscale data verify` would take it for damage; name a file elsewhere")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise PageError(f"{file} is not a plain file; name another one")
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(MARK)) != MARK.encode():
                raise PageError(f"{file} is there and no page of vitscale, so it is left alone; name another file or remove it")


# -- Charts -----------------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 230, 46, 14, 14, 40  # of a chart, and of what frames its plot


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its height, and what is said of it where one points at it."""

    value: float
    told: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in even steps or by powers of ten, and what it is called."""

    name: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values along it, of which the first is `low`."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
        step = nice_step((self.high - self.low) / 4)
        return [self.low + step * number for number in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]


def bars(title: str, told: str, values: Sequence[Bar], ticks: Sequence[tuple[float, str]], below: str, chance: float | None = None) -> str:
    """Bars side by side. `ticks` are texts at numbers of bars (0: the left edge of the first, 1: that of the second, ...); `below`
    names the axis; `chance` draws a line at a height."""
    most = max([bar.value for bar in values] + ([chance] if chance else []))
    step = nice_step((most or 1) / 4)
    high = Axis("", 0, step * max(1, math.ceil(most / step - 1e-9)))
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    gap = min(2.0, slot * 0.15)
    wide = min(slot - gap, 72)
    drawn = _rows(high)
    for number, bar in enumerate(values):
        tall = high.place(bar.value) * (HEIGHT - TOP - BOTTOM)
        tall = max(tall, 1.0) if bar.value else 0.0  # what is there is seen
        x, y = LEFT + (number + 0.5) * slot - wide / 2, HEIGHT - BOTTOM - tall
        hit = f'<rect class="hit" x="{LEFT + number * slot:.2f}" y="{TOP}" width="{slot:.2f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        drawn.append(
            f'<g><title>{text(bar.told)}</title>{hit}<rect class="fill" x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{tall:.2f}"'
            f' rx="{min(2.0, wide / 4):.2f}"/></g>'
        )
    drawn += [_tick(LEFT + at * slot, label) for at, label in ticks]
    if chance is not None:
        y = HEIGHT - BOTTOM - high.place(chance) * (HEIGHT - TOP - BOTTOM)
        drawn.append(f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return _figure(title, told, HEIGHT, drawn, below)


def curve(title: str, told: str, points: Sequence[tuple[float, float]], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> str:
    """A line with the area under it; `marks` are heights with a word each."""

    def place(a: float, b: float) -> tuple[float, float]:
        return LEFT + x.place(a) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y.place(b) * (HEIGHT - TOP - BOTTOM)

    drawn = _rows(y)
    drawn += [_tick(place(tick, y.low)[0], short(tick)) for tick in x.ticks()]
    for height, word in marks:
        if y.low < height < y.high:
            at = place(x.high, height)[1]
            drawn.append(f'<line class="chance" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            drawn.append(f'<text x="{WIDTH - RIGHT - 4}" y="{at - 5:.1f}" text-anchor="end">{text(word)}</text>')
    placed = [place(*point) for point in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
    floor = HEIGHT - BOTTOM
    drawn.append(f'<polygon class="area" points="{placed[0][0]:.1f},{floor} {path} {placed[-1][0]:.1f},{floor}"/>')
    drawn.append(f'<polyline class="line" points="{path}"/>')
    if len(points) <= 12:
        drawn += [f'<circle class="fill" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in placed]
    return _figure(title, told, HEIGHT, drawn, x.name)


def heat(title: str, told: str, cells: Sequence[tuple[int, int, float, str]], columns: range, rows: range, octave: int, below: str) -> str:
    """Cells (column, row, strength from 0 to 1, what is said of it) on a grid of powers of two, `octave` cells apart; rows rise upwards."""
    height = HEIGHT + 60
    across, up = (WIDTH - LEFT - RIGHT) / len(columns), (height - TOP - BOTTOM) / len(rows)
    drawn = []
    every = octave * (2 if len(columns) > 8 * octave else 1)  # so that their figures do not touch
    for number in (n for n in range(columns.start, columns.stop + 1) if n % every == 0):
        at = LEFT + (number - columns.start) * across
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        drawn.append(_tick(at, str(2 ** (number // octave)), height))
    for number in (n for n in range(rows.start, rows.stop + 1) if n % octave == 0):
        at = height - BOTTOM - (number - rows.start) * up
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{2 ** (number // octave)}</text>')
    for column, row, strength, said in cells:
        x, y = LEFT + (column - columns.start) * across, height - BOTTOM - (row - rows.start + 1) * up
        drawn.append(
            f'<rect class="fill" x="{x:.2f}" y="{y:.2f}" width="{across:.2f}" height="{up:.2f}"'
            f' fill-opacity="{0.25 + 0.75 * strength:.2f}">'
            f"<title>{text(said)}</title></rect>"
        )
    return _figure(title, told, height, drawn, below)


def _rows(axis: Axis) -> list[str]:
    drawn = []
    for tick in axis.ticks():
        y = HEIGHT - BOTTOM - axis.place(tick) * (HEIGHT - TOP - BOTTOM)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    return drawn


def _tick(x: float, label: str, height: int = HEIGHT) -> str:
    half = 3.2 * len(label)  # so that the outermost stay inside
    return f'<text x="{min(max(x, half), WIDTH - half):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{text(label)}</text>'


def _figure(title: str, told: str, height: int, drawn: list[str], below: str) -> str:
    drawn.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 5}" text-anchor="middle">{text(below)}</text>')
    return (
        f"<figure><figcaption>{text(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(title)}: {text(told)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


# -- Looks ------------------------------------------------------------------------------------------------------------------------------

LIGHT = """
:root{color-scheme:light;--back:#f8fafc;--panel:#fff;--ink:#0f172a;--body:#475569;--muted:#64748b;--edge:#e2e8f0;--faint:#f1f5f9;
--blue:#2563eb;--orange:#ea7317;--teal:#0f766e;--grey:#94a3b8;--good:#15803d;--bad:#b91c1c;--bad-edge:#f87171;--bad-back:#fef2f2}
"""
DARK = """
@media(prefers-color-scheme:dark){:root{color-scheme:dark;--back:#0b1120;--panel:#131c31;--ink:#e8eef7;--body:#b4c0d3;--muted:#94a3b8;
--edge:#2a3750;--faint:#1c2740;--blue:#6ea8fe;--orange:#fb9a4b;--teal:#2dd4bf;--grey:#8292aa;--good:#4ade80;--bad:#fca5a5;
--bad-edge:#b45757;--bad-back:#2b1a22}}
"""
BASE = """
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px}
h1{font-size:34px;line-height:1.15;margin:4px 0 8px;letter-spacing:-.02em}
h2{font-size:19px;margin:0 0 14px}
p{color:var(--body);margin:0 0 14px;max-width:84ch}
.eyebrow{color:var(--blue);font-weight:600;margin:0}
.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin:22px 0}
.card,section{background:var(--panel);border:1px solid var(--edge);border-radius:12px}
.card{padding:16px 18px}
section{padding:22px 24px;margin:0 0 18px}
.card b{display:block;font-size:30px;line-height:1.2;letter-spacing:-.02em}
.card span{color:var(--muted);font-size:13px}
table{width:100%;border-collapse:collapse}
th{font-size:12px;font-weight:600;color:var(--muted);text-align:left}
td,th{padding:8px 10px 8px 0;border-bottom:1px solid var(--faint)}
.n{text-align:right;font-variant-numeric:tabular-nums}
.bar i{display:block;height:10px;border-radius:5px}
figure{margin:0}
figcaption{font-weight:600;font-size:13px;margin-bottom:6px}
svg{width:100%;display:block}
svg text{font-size:11px;fill:var(--muted)}
.grid{stroke:var(--edge)}
"""
