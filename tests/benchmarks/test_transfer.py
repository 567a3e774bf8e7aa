"""docs/results.md says what `benchmarks/transfer.py` measured."""

import json
from pathlib import Path

from benchmarks.transfer import RESULTS, TABLES, tables, tuned_table

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
    kinds = list(dict.fromkeys(kind for pair in pairs for kind in pair))
    tuned = [
        {"seed": seed, "labelled": labelled, "kind": kind, "top1": 0.5 + 0.1 * seed - 0.05 * number}
        for seed in (0, 1, 2)
        for labelled in counts
        for number, kind in enumerate(kinds)
    ]
    row = tuned_table({"seeds": [0, 1, 2], "tuned": tuned}, "resolution").splitlines()[2]
    assert row.startswith(f"| {counts[0]:,} | 60.0 ± 24.8 |"), "t of two degrees of freedom: 4.30 x 10 / sqrt(3)"
    assert row.endswith("| 5.0 ± 0.0 | 10.0 ± 0.0 |")
