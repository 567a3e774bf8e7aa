"""docs/results.md says what `benchmarks/transfer.py` measured."""

import json
from pathlib import Path

from benchmarks.transfer import RESULTS, TABLES, rates_table, tables, tuned_table

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_tables_of_the_newest_measurement() -> None:
    newest = max(RESULTS.glob("*-transfer.json"))
    words = (ROOT / "docs" / "results.md").read_text()
    missing = [name for name, table in tables(json.loads(newest.read_text())).items() if table not in words]
    assert missing == []
    assert newest.name.removesuffix("-transfer.json") in words, "its date"


def test_differences_are_paired_by_seed() -> None:
    """Seeds that differ by much, between which a method is ahead by the same, leave no doubt that it is."""
    counts, pairs = TABLES["resolution"]
    ways = list(dict.fromkeys(way for pair in pairs for way in pair))
    tuned = [
        {"seed": seed, "labelled": labelled, "way": way, "top1": 0.5 + 0.1 * seed - 0.05 * number}
        for seed in (0, 1, 2)
        for labelled in counts
        for number, way in enumerate(ways)
    ]
    row = tuned_table({"seeds": [0, 1, 2], "tuned": tuned}, "resolution").splitlines()[2]
    assert row.startswith(f"| {counts[0]:,} | 60.0 ± 24.8 |"), "t of two degrees of freedom: 4.30 x 10 / sqrt(3)"
    assert row.endswith("| 5.0 ± 0.0 | 10.0 ± 0.0 |")


def test_each_rate_stands_beside_the_grid_that_it_was_chosen_of() -> None:
    rates = [
        {"way": [28, 28], "labelled": 5, "best": 0.3, "top1": {"0.1": 0.5, "0.3": 0.6}},
        {"way": [28, 28], "labelled": 5_000, "best": 0.1, "top1": {"0.1": 0.9}},
    ]
    assert rates_table({"rates": rates}).splitlines()[2:] == [
        "| 28 → 28 | 0.1, 0.3 | 0.3 |  |  |  |  |",
        "| 28 → 28 | 0.1 |  |  |  |  | 0.1 |",
    ]
