"""The page of a quickstart: what was learned, as one HTML file that loads nothing from elsewhere.

`write_report` is called once all runs have ended; it reads metrics.jsonl, the fine-tuned and the pre-trained checkpoint and the held-out
images. Everything drawn is inline: curves as SVG, images as PNG. The functions that make HTML are pure.
"""

import html
import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_tools.dataset import Dataset
from data_tools.durable import replace_file
from data_tools.page import BASE, LIGHT, cards, document, inline, nice_step, section
from vitscale.checkpoint import WEIGHT, describe
from vitscale.config import StreamConfig
from vitscale.finding import find_checkpoint
from vitscale.metrics import SHARES, duration, share_name, what_bounds
from vitscale.mixture import Mixture
from vitscale.model import normalize
from vitscale.run import read_metrics
from vitscale.stream import evaluation_batches
from vitscale.weights import TensorReader, load_model

BLUE, ORANGE, GREY = "#2563eb", "#ea7317", "#94a3b8"
COLORS = {"pretrain": "#0f766e", "finetune": BLUE, "scratch": ORANGE}
SHARE_COLORS = (ORANGE, "#7c3aed", BLUE, GREY, "#15803d")  # of metrics.SHARES
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
RIGHT_SHOWN, WRONG_SHOWN = 12, 6
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Prediction:
    """A held-out image and what the model says of it."""

    png: bytes
    truth: str
    guess: str
    probability: float
    """Of the guess."""


def write_report(
    file: Path, title: str, rows: list[dict[str, Any]], seconds: float, commands: list[str], runs: dict[str, Path], downstream: Path
) -> None:
    """Writes the page.

    Args:
        rows: of the table, in the order pre-trained, fine-tuned, from scratch, guessing: model, top1, images, steps, seconds.
        seconds: that all took.
        commands: command lines that led here.
        runs: run directories named pretrain, finetune, scratch.
        downstream: folder of the dataset's splits train and val; images of val are shown with the fine-tuned model's predictions.
    """
    lines = {name: read_metrics(run) for name, run in runs.items()}
    loss = {name: [(line["step"], line["loss"]) for line in lines[name] if "loss" in line] for name in lines}
    top1 = {name: [(line["step"], 100 * line["eval_top1"]) for line in lines[name] if "eval_top1" in line] for name in lines}
    both = {"finetune": "fine-tuned", "scratch": "from scratch"}
    guessing = [(0, 100 * rows[-1]["top1"]), (rows[1]["steps"], 100 * rows[-1]["top1"])]
    charts = [
        chart("Pre-training loss", {"pre-training": (COLORS["pretrain"], loss["pretrain"])}),
        chart("Downstream loss", {label: (COLORS[name], loss[name]) for name, label in both.items()}),
        chart(
            "Downstream held-out top-1, %",
            {label: (COLORS[name], top1[name]) for name, label in both.items()} | {"guessing": (GREY, guessing)},
            high=100.0,
        ),
    ]
    found = predictions(str(runs["finetune"]), downstream / "val")
    before, after = (position_similarity(str(runs[name])) for name in ("pretrain", "finetune"))
    sections = [
        head(title, rows, seconds, Dataset.open(downstream / "train")),
        section("Held-out accuracy", comparison(rows)),
        section("While training", f'<div class="charts">{"".join(charts)}</div>'),
        section("Where the time went", f'<div class="pair">{time_spent("Pre-training", lines["pretrain"])}'
                                       f'{time_spent("Fine-tuning", lines["finetune"])}</div>'),
        section("What the fine-tuned model says", gallery(found)),
        section(
            "What the position embeddings learned",
            "<p>A map for each patch, at its place: how similar (cosine) its learned position embedding is to that of every patch, from -1 "
            "(dark) to 1 (bright), as in the paper's figure 7. Fine-tuning began from the pre-trained ones, interpolated to its grid.</p>"
            f'<div class="pair">{similarity_maps("Pre-trained", before)}{similarity_maps("Fine-tuned", after)}</div>',
        ),
        section("The commands", f"<p>Each stage is a command; together they are what <code>vitscale quickstart</code> ran.</p>"
                                f"<pre>{html.escape(chr(10).join(commands))}</pre>"),
    ]  # fmt: skip
    replace_file(file, document(f"vitscale quickstart: {title}", LIGHT + BASE + STYLE, "".join(sections)))


# -- What is shown ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(checkpoint: str, held_out: Path) -> list[Prediction]:
    """Some right ones, spread over the classes, then the wrong ones that the model is surest of."""
    description, dataset = describe(find_checkpoint(checkpoint)), Dataset.open(held_out)
    model, names = load_model(description, "average"), dataset.class_names or tuple(map(str, range(dataset.num_classes)))
    batches = evaluation_batches(
        Mixture([dataset]), description.model.image_size, description.preprocess, StreamConfig(), batch_size=256, rank=0, world_size=1
    )
    samples, probabilities = [], []
    for batch in batches:
        samples.append(batch.samples_B[batch.valid_B])
        probabilities.append(model(normalize(torch.from_numpy(batch.images_BHWC[batch.valid_B]), description.preprocess)).softmax(1))
    sample_N = np.concatenate(samples)
    sure_N, guess_N = (t.numpy() for t in torch.cat(probabilities).max(dim=1))
    truth_N = dataset.labels(sample_N)[0][:, 0]
    by_class = [np.flatnonzero((guess_N == label) & (truth_N == label)) for label in range(dataset.num_classes)]
    per_class = RIGHT_SHOWN // dataset.num_classes
    right = [int(sample) for samples in by_class for sample in samples[:per_class]]
    wrong = np.flatnonzero(guess_N != truth_N)
    surest = wrong[np.argsort(-sure_N[wrong])][:WRONG_SHOWN].tolist()
    return [Prediction(dataset.read(int(sample_N[n])), names[truth_N[n]], names[guess_N[n]], float(sure_N[n])) for n in [*right, *surest]]


def position_similarity(checkpoint: str) -> npt.NDArray[np.float32]:
    """Cosine similarity of each patch's position embedding to all others, (h, w, h, w): the paper's figure 7, centre."""
    description = describe(find_checkpoint(checkpoint))
    embeddings_ND: Tensor = TensorReader(description).whole("pos_embed", WEIGHT)[0, 1:]  # the first is the class token's
    unit_ND = F.normalize(embeddings_ND, dim=1)
    return (unit_ND @ unit_ND.T).view(*description.model.grid, *description.model.grid).numpy()


# -- HTML -------------------------------------------------------------------------------------------------------------------------------


def head(title: str, rows: list[dict[str, Any]], seconds: float, labelled: Dataset) -> str:
    """The title and the numbers that matter."""
    _, finetuned, scratch, guessing = rows
    figures = [
        (f"{finetuned['top1']:.1%}", "fine-tuned", BLUE),
        (f"{scratch['top1']:.1%}", "from scratch, same budget", ORANGE),
        (f"{guessing['top1']:.1%}", "guessing", GREY),
        (duration(seconds), "in all, on this machine", "#0f172a"),
    ]
    return (
        f'<header><p class="eyebrow">vitscale quickstart</p><h1>A Vision Transformer on {html.escape(title)}</h1>'
        "<p>Pre-trained below the images' own resolution, then fine-tuned at full resolution on "
        f"{labelled.num_samples} labelled images of {labelled.num_classes} classes that pre-training never saw; "
        f"beside it the same model from random weights.</p>{cards(figures)}</header>"
    )


def comparison(rows: list[dict[str, Any]]) -> str:
    """The table, a bar a row."""
    colors = (*COLORS.values(), GREY)
    body = ""
    for row, color in zip(rows, colors, strict=True):
        steps, seconds = (f"{row['steps']:,}", duration(row["seconds"])) if row["steps"] else ("", "")
        body += (
            f'<tr><td>{html.escape(row["model"])}<td class="n">{row["top1"]:.2%}'
            f'<td class="bar"><i style="width:{100 * row["top1"]:.2f}%;background:{color}"></i>'
            f'<td class="n">{row["images"]:,}<td class="n">{steps}<td class="n">{seconds}'
        )
    return f"<table><tr><th>model<th class=n>top-1<th><th class=n>held-out images<th class=n>steps<th class=n>time{body}</table>"


def chart(title: str, series: dict[str, tuple[str, Points]], high: float | None = None) -> str:
    """Lines from (0, 0) up to `high`, or a little above the highest point, each named at its end."""
    width, height, left, right, top, bottom = 360, 230, 34, 90, 12, 28
    points = [point for _, line in series.values() for point in line]
    last = max(x for x, _ in points)
    tick = nice_step((high or max(y for _, y in points)) / 4)
    ceiling = high or tick * math.ceil(max(y for _, y in points) / tick)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last * (width - left - right), height - bottom - y / ceiling * (height - top - bottom)

    drawn = []
    for i in range(round(ceiling / tick) + 1):
        y = place(0, i * tick)[1]
        drawn.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{i * tick:g}</text>')
    for x, anchor in ((0, "start"), (last / 2, "middle"), (last, "end")):
        drawn.append(
            f'<text x="{place(x, 0)[0]:.1f}" y="{height - 8}" text-anchor="{anchor}">{x:.0f}{" steps" if x == last else ""}</text>'
        )
    ends = spread([place(*line[-1])[1] for _, line in series.values()], 14)
    for (name, (color, line)), end in zip(series.items(), ends, strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round"/>')
        if len(line) <= 12:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in (place(*point) for point in line)]
        drawn.append(f'<text x="{width - right + 7}" y="{end + 4:.1f}" style="fill:{color};font-weight:600">{html.escape(name)}</text>')
    return f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {width} {height}">{"".join(drawn)}</svg></figure>'


def time_spent(title: str, lines: list[dict[str, Any]]) -> str:
    """The shares of a run's time over its steps, and in words what bounds it; the first line, in which all is slow, is left out."""
    told = [line for line in lines if all(share in line for share in SHARES)]
    if len(told) < 2:
        return ""
    steps = [line["step"] - before["step"] for before, line in itertools.pairwise(told)]
    mean = {share: sum(n * line[share] for n, line in zip(steps, told[1:], strict=True)) / sum(steps) for share in SHARES}
    drawn = {
        share_name(share): (color, [(line["step"], 100 * line[share]) for line in told[1:]])
        for share, color in zip(SHARES, SHARE_COLORS, strict=True)
    }
    words = what_bounds(mean)
    return f"<div>{chart(f'{title}: shares of the time, %', drawn, high=100.0)}<p>{html.escape(words[:1].upper() + words[1:])}.</p></div>"


def spread(places: list[float], gap: float) -> list[float]:
    """The places, moved apart so that no two labels are nearer than `gap`."""
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved


def gallery(found: list[Prediction]) -> str:
    """Images with the guess and its probability, wrong ones marked."""
    tiles = []
    for p in found:
        wrong = p.guess != p.truth
        said = f"{html.escape(p.guess)} <small>{p.probability:.0%}</small>"
        note = f"is {html.escape(p.truth)}" if wrong else "right"
        tiles.append(
            f'<div class="tile{" wrong" if wrong else ""}"><img src="{inline(p.png)}" alt="{html.escape(p.truth)}">'
            f'<b>{said}</b><span>{note}</span><i><u style="width:{100 * p.probability:.0f}%"></u></i></div>'
        )
    told = "Held-out images, with the class it names and how sure it is; last, the mistakes it was surest of."
    return f'<p>{told}</p><div class="gallery">{"".join(tiles)}</div>'


def similarity_maps(title: str, similarity: npt.NDArray[np.float32]) -> str:
    """A map for each patch: how similar its position embedding is to each other's, from -1 (dark) to 1 (bright)."""
    rows, columns = similarity.shape[:2]
    maps = "".join(
        f'<img src="{inline(as_png(similarity[row, column]))}" alt="row {row + 1}, column {column + 1}">'
        for row in range(rows)
        for column in range(columns)
    )
    return (
        f"<figure><figcaption>{title}: {rows} x {columns} patches</figcaption>"
        f'<div class="maps" style="grid-template-columns:repeat({columns},1fr)">{maps}</div></figure>'
    )


def as_png(values_HW: npt.NDArray[np.float32]) -> bytes:
    """Values in [-1, 1] as the colours of viridis."""
    at = np.linspace(-1, 1, len(VIRIDIS))
    rgb = np.stack([np.interp(values_HW, at, VIRIDIS[:, channel]) for channel in range(3)], axis=-1).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


STYLE = """
.bar{width:34%}
.charts{display:grid;grid-template-columns:repeat(3,1fr);gap:18px}
.gallery{display:grid;grid-template-columns:repeat(6,1fr);gap:16px}
.tile{font-size:13px}
.tile img{width:100%;aspect-ratio:1;border-radius:8px;border:2px solid #e2e8f0;box-sizing:border-box}
img{image-rendering:pixelated;display:block}
.tile b{display:block;margin-top:6px}
.tile small{font-weight:400;color:#64748b}
.tile span{color:#15803d}
.tile i{display:block;height:4px;background:#e2e8f0;border-radius:2px;margin-top:4px}
.tile u{display:block;height:4px;border-radius:2px;background:#2563eb}
.wrong span{color:#b91c1c}
.wrong img{border-color:#f87171}
.wrong u{background:#b91c1c}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:44px}
.maps{display:grid;gap:5px}
.maps img{width:100%}
pre{background:#0f172a;color:#e2e8f0;border-radius:8px;padding:14px 16px;font-size:12px;line-height:1.7;margin:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:800px){.cards,.charts,.pair{grid-template-columns:1fr}.gallery{grid-template-columns:repeat(3,1fr)}}
"""
