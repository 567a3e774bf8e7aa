"""Every figure of `data stats` against a plain recount, and its page in a real browser."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_tools import data_pages, page, stats
from data_tools.dataset import Dataset, DatasetError
from data_tools.page import PageError, check_target
from data_tools.stats import Stats, Tally, count, findings
from launch.data_tables import print_stats

from .browser import Browser, browser, need_chromium
from .conftest import pack_one
from .synthetic import write_dataset

VITSCALE = str(Path(sys.executable).with_name("vitscale"))
HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=http://127.0.0.1:9/x onerror=alert(1)>',
    "a\x1b[31mb\u202ec",
    "&amp;",
    "w" * 300,
]


def random_parts(seed: int, samples: int, classes: int, shards: int, scored: bool) -> dict[str, Any]:
    """A dataset's columns: skewed classes, 0 to 5 labels, some shards empty."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(classes, 0.3)) + 1e-9
    labels = [
        rng.choice(classes, min(classes, int(rng.integers(0, 6))), replace=False, p=share / share.sum()).tolist() for _ in range(samples)
    ]
    cuts = np.sort(rng.integers(0, samples + 1, shards - 1))
    return {
        "labels": labels,
        "shard_sizes": np.diff([0, *cuts, samples]).tolist(),
        "num_classes": classes,
        "scores": [rng.random(len(row)).tolist() if rng.random() < 0.7 else [] for row in labels] if scored else None,
        "sizes": np.exp(rng.uniform(0, 17, samples)).astype(np.int64),
        "shapes": (rng.integers(1, 2048, samples), np.exp(rng.uniform(0, 7.6, samples)).astype(np.int64)),
        "rows": int(rng.integers(1, 12)),
    }


# -- The figures ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_every_figure_is_that_of_a_plain_recount(seed: int, samples: int, classes: int, shards: int, scored: bool) -> None:
    parts = random_parts(seed, samples, classes, shards, scored)
    with tempfile.TemporaryDirectory() as folder:
        found = count(write_dataset(Path(folder) / "train", **parts))
    labels, sizes = parts["labels"], parts["sizes"]
    counts = Counter(itertools.chain.from_iterable(labels))
    assert found.samples == samples
    assert found.image_bytes == sizes.sum()
    assert found.labels == sum(map(len, labels))
    assert {n: c for n, c in enumerate(found.labels_a_sample) if c} == Counter(map(len, labels))
    assert found.classes.counts == tuple(counts[label] for label in range(classes))
    assert found.tar_bytes == sum(1024 * (2 * size + 1) for size in parts["shard_sizes"])

    falling = sorted(counts, key=lambda label: (-counts[label], label))
    assert found.classes.used == len(falling)
    assert [one.label for one in found.classes.most] == falling[:10]
    assert [one.label for one in found.classes.fewest] == falling[::-1][:10]
    assert {one.label for one in found.classes.empty} == set(sorted(set(range(classes)) - set(falling))[:10])
    assert found.classes.few_shot == sum(c < 20 for c in counts.values())
    assert found.classes.medium_shot == sum(20 <= c <= 100 for c in counts.values())
    assert found.classes.many_shot == sum(c > 100 for c in counts.values())
    total = sum(counts.values())
    if total:
        every = [counts[label] for label in range(classes)]
        assert found.classes.gini == pytest.approx(sum(abs(a - b) for a in every for b in every) / (2 * classes * total))
        assert found.classes.effective == pytest.approx(math.exp(-sum(c / total * math.log(c / total) for c in counts.values())))
        half = next(n for n in range(1, classes + 1) if 2 * sum(counts[label] for label in falling[:n]) >= total)
        assert found.classes.half == half
    for top in found.classes.top:
        best = set(falling[: math.ceil(top.share_of_classes * len(falling) - 1e-9)])
        assert top.classes == len(best)
        assert top.share_of_samples == pytest.approx(sum(bool(best & set(row)) for row in labels) / samples)
        assert top.share_of_labels == pytest.approx(sum(counts[label] for label in best) / max(1, total))

    pairs = Counter(frozenset(pair) for row in labels for pair in itertools.combinations(row, 2))
    assert found.pairs.counted == sum(pairs.values())
    assert [pair.samples for pair in found.pairs.most] == sorted(pairs.values(), reverse=True)[:20]
    for pair in found.pairs.most:
        a, b = pair.first.label, pair.second.label
        assert pair.samples == pairs[frozenset((a, b))]
        assert pair.share_of_rarer == pytest.approx(pair.samples / min(counts[a], counts[b]))
        assert pair.lift == pytest.approx(pair.samples / samples / (counts[a] / samples * counts[b] / samples))

    assert_summary(found.bytes_an_image, sizes)
    widths, heights = parts["shapes"]
    assert found.sizes is not None
    assert_summary(found.sizes.width, widths)
    assert_summary(found.sizes.height, heights)
    assert_summary(found.sizes.short_side, np.minimum(widths, heights))
    assert_summary(found.sizes.aspect_ratio, widths / heights)
    assert found.sizes.landscape == sum(w > h for w, h in zip(widths, heights, strict=True))
    assert found.sizes.square == sum(w == h for w, h in zip(widths, heights, strict=True))
    assert found.sizes.landscape + found.sizes.portrait + found.sizes.square == samples
    cells = Counter((math.floor(4 * math.log2(w)), math.floor(4 * math.log2(h))) for w, h in zip(widths, heights, strict=True))
    assert {(w, h): c for w, row in enumerate(found.sizes.grid) for h, c in enumerate(row) if c} == cells

    own = np.float32([score for row in parts["scores"] or [] for score in row])
    assert (found.scores is None) == (len(own) == 0)
    if found.scores is not None:
        assert found.scores.labels_with == len(own)
        assert_summary(found.scores.summary, own, slack=max(0.002 * float(np.ptp(own)), 1e-6))
    assert_shards(found, parts)


def assert_summary(summary: stats.Summary, values: np.ndarray, slack: float = 0.0) -> None:
    """Percentiles exact or within 0.2%, or the slack; histogram that of numpy with the same edges."""
    assert (summary.count, summary.minimum, summary.maximum) == (len(values), values.min(), values.max())
    assert summary.mean == pytest.approx(values.mean(dtype=np.float64))
    for name, value in summary.percentiles.items():
        exact = float(np.percentile(values, float(name[1:]), method="inverted_cdf"))
        tolerance = slack or (0 if values.dtype.kind == "i" and exact < 2048 else 0.002 * exact)
        assert abs(value - exact) <= tolerance, (name, value, exact)
    assert sum(summary.histogram.counts) == len(values)
    if not slack:
        assert np.histogram(values, np.array(summary.histogram.edges))[0].tolist() == list(summary.histogram.counts)


def assert_shards(found: Stats, parts: dict[str, Any]) -> None:
    samples, classes = found.samples, parts["num_classes"]
    has = np.zeros((samples, classes))
    for number, row in enumerate(parts["labels"]):
        has[number, row] = 1
    whole = has.mean(axis=0)
    first, deviations, variances = 0, 0.0, 0.0
    for shard, size in zip(found.shards.shards, parts["shard_sizes"], strict=True):
        mine = has[first : first + size]
        first += size
        assert (shard.samples, shard.labels) == (size, mine.sum())
        deviation = np.square(mine.sum(axis=0) - size * whole).sum()
        variance = (size * whole * (1 - whole)).sum() * (samples - size) / max(1, samples - 1)
        deviations, variances = deviations + deviation, variances + variance
        assert (shard.excess is None) == (variance == 0)
        if shard.excess is not None:
            assert shard.excess == pytest.approx(deviation / variance)
        assert (shard.distance is None) == (mine.sum() == 0)
        if shard.distance is not None:
            assert shard.distance == pytest.approx(0.5 * np.abs(mine.sum(axis=0) / mine.sum() - has.sum(axis=0) / has.sum()).sum())
    assert (found.shards.excess is None) == (variances == 0)
    if found.shards.excess is not None:
        assert found.shards.excess == pytest.approx(deviations / variances)
    assert found.shards.empty == parts["shard_sizes"].count(0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=200))
def test_whole_numbers_of_any_size_are_summed_up(values: list[int]) -> None:
    tally = Tally(stats.WHOLE_BINS, stats.whole_bins, stats.whole_edge)
    for part in np.array_split(np.array(values, np.int64), 3):
        tally.add(part)
    assert_summary(tally.summary(), np.array(values, np.int64))
    assert tally.sum_of_whole == sum(values)


@given(st.integers(0, 2**50))
def test_a_bin_of_whole_numbers_holds_what_lies_between_its_edges(value: int) -> None:
    number = int(stats.whole_bins(np.array([value]))[0])
    low, high = stats.whole_edge(number), stats.whole_edge(number + 1)
    assert low <= value < high
    assert high - low == 1 or (high - low) / low <= 1 / 1024


def test_pairs_are_those_of_the_most_frequent_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(3, 300, 12, 4, False)
    path = write_dataset(tmp_path / "train", **parts)
    counts = Counter(itertools.chain.from_iterable(parts["labels"]))
    for kept in (1, 2, 5):
        monkeypatch.setattr(stats, "PAIR_CLASSES", kept)
        found = count(path).pairs
        frequent = set(sorted(counts, key=lambda label: (-counts[label], label))[:kept])
        pairs = Counter(frozenset(pair) for row in parts["labels"] for pair in itertools.combinations(sorted(frequent & set(row)), 2))
        assert found.among == kept
        assert {frozenset((p.first.label, p.second.label)): p.samples for p in found.most} == pairs


def test_a_shuffled_dataset_has_an_excess_of_one_on_average_and_a_sorted_one_much_more(tmp_path: Path) -> None:
    parts = random_parts(1, 600, 8, 1, False) | {"shard_sizes": [100, 300, 0, 50, 150], "scores": None}
    rng, values = np.random.default_rng(0), []
    for number in range(60):
        rng.shuffle(parts["labels"])
        found = count(write_dataset(tmp_path / str(number), **parts)).shards
        assert found.shuffled
        values.append([shard.excess for shard in found.shards if shard.excess is not None])
    mean, error = np.mean(values), np.std(np.mean(values, axis=1)) / math.sqrt(len(values))
    assert abs(mean - 1) < 4 * error
    assert error < 0.1
    found = count(write_dataset(tmp_path / "sorted", **parts | {"labels": sorted(parts["labels"])}))
    assert found.shards.shuffled is False
    assert any(finding.tone == "look" and "Not shuffled" in finding.text for finding in findings(found))


def test_pack_shuffles_and_keeps_order_as_it_says(photos: Path, tmp_path: Path) -> None:
    for seed, shuffled in ((0, True), (None, False)):
        dataset = pack_one(photos, out=tmp_path / str(seed), samples_per_shard=4, shuffle_seed=seed)
        found = count(dataset.path)
        assert found.shards.shuffled is shuffled
        assert sum(shard.samples for shard in found.shards.shards) == found.samples == 23
        assert found.image_bytes == sum(len(dataset.read(number)) for number in range(23))
        assert found.sizes is not None
        assert (found.sizes.width.minimum, found.sizes.height.maximum) == (12, 9)


def test_whether_it_was_shuffled_is_not_told_where_nothing_can_tell_it(tmp_path: Path) -> None:
    one = count(write_dataset(tmp_path / "one", labels=[[0], [1]], shard_sizes=[2], num_classes=2))
    same = count(write_dataset(tmp_path / "same", labels=[[0]] * 4, shard_sizes=[2, 2], num_classes=2))
    none = count(write_dataset(tmp_path / "none", labels=[[]] * 4, shard_sizes=[2, 2], num_classes=2))
    assert [found.shards.shuffled for found in (one, same, none)] == [None, None, None]
    assert (none.classes.used, none.classes.gini, none.classes.half, none.labels) == (0, 0.0, 0, 0)
    for found in (one, same, none):
        assert_it_can_be_shown(found)


def assert_it_can_be_shown(found: Stats) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_stats(found, console)
    drawn = data_pages.stats_page(found)
    assert json.loads(json.dumps(asdict(found)))["samples"] == found.samples
    assert not re.search(r"https?:|<script|<link|@import|url\(", drawn)
    return drawn


def test_sides_of_zero_and_missing_tables_are_no_obstacle(tmp_path: Path) -> None:
    shapes = np.array([0, 5, 0]), np.array([3, 0, 0])
    found = count(write_dataset(tmp_path / "zero", labels=[[0]] * 3, shard_sizes=[3], num_classes=1, shapes=shapes))
    assert found.sizes is not None
    assert (found.sizes.without_size, found.sizes.aspect_ratio.count) == (3, 0)
    assert_it_can_be_shown(found)
    found = count(write_dataset(tmp_path / "without", labels=[[0]] * 3, shard_sizes=[3], num_classes=1))
    assert found.sizes is None
    assert_it_can_be_shown(found)


def test_rejects_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [{"source": f"{n}.jpg", "key": f"{n}", "reason": ("damaged", "empty", "damaged")[n % 3], "detail": f"<{n}>"} for n in range(30)]
    found = count(write_dataset(tmp_path / "train", labels=[[0]] * 3, shard_sizes=[3], num_classes=1, rejects=rows))
    assert [(reason.reason, reason.images) for reason in found.rejects] == [("damaged", 20), ("empty", 10)]
    assert found.rejects[0].examples == (("0.jpg", "<0>"), ("2.jpg", "<2>"), ("3.jpg", "<3>"))
    assert "&lt;2&gt;" in assert_it_can_be_shown(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [[0], [9], [1]]}, "labels 0 to 9, of 2 classes"),
        ({"sizes": np.array([1, -1, 1])}, "size is negative"),
        ({"labels": [[0], [0, 1], [1]], "max_labels": 1}, "0 to 1 labels"),
        ({"scores": [[1.0], [1.0, 0.5], [1.0]]}, "a score for each or none"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    parts = {"labels": [[0], [0], [1]], "shard_sizes": [3], "num_classes": 2} | change
    with pytest.raises(DatasetError, match=said):
        count(write_dataset(tmp_path / "train", **parts))


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_the_index_in_any_pieces_is_what_labels_says(tmp_path: Path, rows: int) -> None:
    parts = random_parts(5, 40, 6, 3, True) | {"rows": 13}
    dataset = Dataset.open(write_dataset(tmp_path / "train", **parts), check_shards=False)
    labels, scores = dataset.labels(np.arange(40))
    at = 0
    for batch in dataset.index_batches(rows):
        assert batch.samples.tolist() == list(range(at, at + len(batch.samples)))
        assert len(batch.sizes) <= rows
        for number in range(len(batch.sizes)):
            mine = slice(batch.starts[number], batch.starts[number + 1])
            assert batch.labels[mine].tolist() == labels[at][labels[at] >= 0].tolist()
            assert batch.scores[mine].tolist() == scores[at][labels[at] >= 0].tolist()
            assert batch.scored[mine].all() == bool(parts["scores"][at]) or not parts["labels"][at]
            at += 1
    assert at == 40


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    peaks = []
    for shards in (40, 160):
        samples, rng = shards * 5_000, np.random.default_rng(shards)
        values, starts = rng.integers(0, 500, 2 * samples), np.arange(samples + 1) * 2
        values[1::2] = 500 + values[1::2]
        shapes = rng.integers(1, 3000, samples), rng.integers(1, 3000, samples)
        parts: dict[str, Any] = {"labels": (values, starts), "shard_sizes": [5_000] * shards, "num_classes": 1000, "shapes": shapes}
        path = write_dataset(tmp_path / str(shards), **parts, rows=2**17)
        count(path)  # what is loaded once is not counted
        tracemalloc.start()
        count(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], peaks


# -- The command ------------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_was_counted(packed: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "stats.html"
    told = subprocess.run([VITSCALE, "data", "stats", packed.path, "--json", "--html", file], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == json.loads(json.dumps(asdict(count(packed.path))))
    assert file.read_text().startswith(page.MARK)
    table = subprocess.run([VITSCALE, "data", "stats", packed.path, "--html", file], capture_output=True, text=True, check=True)
    assert "\x1b" not in table.stdout
    for said in ("23 samples", "cat", "dog", "eel", f"wrote {file}"):
        assert said in table.stdout
    assert sorted(tmp_path.iterdir()) == sorted({file, tmp_path / "packed", tmp_path / "photos"})


def test_pages_go_only_where_they_harm_nothing(packed: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("<!doctype html>\n<p>years of work")
    (tmp_path / "link.html").symlink_to(tmp_path / "new.html")
    for target, said in (
        (tmp_path / "thesis.html", "no page of vitscale"),
        (tmp_path / "link.html", "not a plain file"),
        (tmp_path, "not a plain file"),
        (tmp_path / "nowhere" / "a.html", "not a folder"),
        (packed.path / "stats.html", "inside the dataset"),
        (Path("/dev/stdout"), "not a plain file"),
    ):
        with pytest.raises(PageError, match=said):
            check_target(target, packed.path)
        done = subprocess.run([VITSCALE, "data", "preview", packed.path, "--html", target], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "thesis.html").read_text() == "<!doctype html>\n<p>years of work"


# -- The page ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_chromium()
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def hostile_dataset(path: Path) -> Path:
    rejects = [{"source": HOSTILE[1], "key": "k", "reason": HOSTILE[0], "detail": HOSTILE[2] + "x" * 400}]
    parts = random_parts(8, 400, len(HOSTILE) + 2, 30, True)
    return write_dataset(path, **parts, class_names=[*HOSTILE, "cat", "dog"], rejects=rejects, name=HOSTILE[0] + "n" * 200)


def test_the_page_holds_the_figures_and_nothing_else_happens(tab: Browser, tmp_path: Path) -> None:
    found = count(hostile_dataset(tmp_path / "train"))
    file = tmp_path / "stats.html"
    file.write_text(data_pages.stats_page(found))
    tab.open(file, 1280)
    shown = tab.value("document.body.innerText")
    for figure in (f"{found.samples:,}", f"{found.classes.gini:.3f}", f"{found.pairs.most[0].samples:,}", found.content_hash):
        assert figure in shown
    for one in found.classes.most:
        assert page.printable(one.name) in shown
    assert tab.value("document.title").startswith("vitscale data stats: <script>")
    assert tab.value("document.querySelectorAll('script,img,iframe,link,object').length") == 0
    heights = tab.value("[...document.querySelectorAll('svg')].map(one => one.querySelectorAll('g, polyline, rect').length)")
    assert len(heights) == 11
    assert all(heights)
    labels = tab.value("[...document.querySelectorAll('svg')].map(one => one.getAttribute('aria-label'))")
    assert all(labels)
    assert_quiet(tab, file)


def assert_quiet(tab: Browser, file: Path) -> None:
    """Nothing was asked for but the file, no dialog opened, no error was logged."""
    assert {url for url in tab.requests() if not url.startswith("data:")} == {file.resolve().as_uri()}
    methods = {event.get("method") for event in tab.events}
    assert not methods & {"Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}


def test_nothing_overflows_and_dark_is_dark(tab: Browser, tmp_path: Path) -> None:
    file = tmp_path / "stats.html"
    file.write_text(data_pages.stats_page(count(hostile_dataset(tmp_path / "train"))))
    assert_fits(tab, file)
    backgrounds = []
    for scheme in ("light", "dark"):
        tab.open(file, 700, scheme)
        backgrounds.append(tab.value("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", color))) for color in backgrounds)
    assert light > 600
    assert dark < 150


def assert_fits(tab: Browser, file: Path) -> None:
    """At any width no sideways scrolling, no chart's text outside its picture, nothing sticking out of its box but what may scroll."""
    for width in (320, 400, 800, 1280, 1900):
        tab.open(file, width)
        assert tab.value("document.documentElement.scrollWidth") <= width
        out = tab.value(
            """[...document.querySelectorAll('section *, header *')].filter(one => !one.closest('.scroll')).filter(one => {
                const box = (one.closest('svg') || one.closest('section') || one.closest('header')).getBoundingClientRect()
                const own = one.getBoundingClientRect()
                return own.width && (own.left < box.left - 1 || own.right > box.right + 1)
            }).map(one => one.outerHTML.slice(0, 200))"""
        )
        assert out == [], width


def test_a_browser_would_run_what_is_not_escaped(tab: Browser, tmp_path: Path) -> None:
    """That the checks above can fail."""
    file = tmp_path / "bad.html"
    file.write_text(f"<!doctype html><title>fine</title><p style='width:3000px'>{HOSTILE[0]}<img src=http://127.0.0.1:9/x>")
    tab.open(file, 400)
    assert tab.value("document.title") == "owned"
    assert tab.value("document.documentElement.scrollWidth") > 400
    with pytest.raises(AssertionError):
        assert_quiet(tab, file)
    # And the policy holds where escaping would not.
    held = data_pages.stats_page(count(hostile_dataset(tmp_path / "train"))).replace(
        "<h2>", f"{HOSTILE[0]}<img src=http://127.0.0.1:9/x><h2>"
    )
    file.write_text(held)
    tab.open(file, 400)
    assert tab.value("document.title").startswith("vitscale data stats")
