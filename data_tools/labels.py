"""Labels: class names, the numbers they become, and every check that needs no image.

Where it stands: `sources.py` brings the labels and scores of all candidates as flat arrays; what leaves here is int32 in
0..num_classes-1 and finite float32, no label twice on a sample. Errors name the first sample that is at fault.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.config import PackConfig, PackError
from data_tools.errors import message_of
from data_tools.storage import Location


@dataclass(frozen=True)
class Lists:
    """A list of numbers a row: row i has values[starts[i] : starts[i + 1]]."""

    starts: np.ndarray
    values: np.ndarray

    def __getitem__(self, row: int) -> list[Any]:
        items: list[Any] = self.values[self.starts[row] : self.starts[row + 1]].tolist()
        return items


def read_class_names(path: str) -> tuple[str, ...]:
    """Class names from a text file, a line each."""
    try:
        names = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"class_names={path} cannot be read: {message_of(error)}; give a UTF-8 text file with a name a line") from None
    return tuple(names)


@dataclass(frozen=True)
class Found:
    """What the listing saw of labels: their names, or the largest of those that are numbers; None where there are none."""

    names: frozenset[str] | None
    largest: int | None


@dataclass(frozen=True)
class ClassMap:
    """What labels become before anything else is asked of them: a class for each raw label, None to drop it."""

    classes: dict[str, str | int | None]
    found: Found
    """The classes of the map, all of them, so that they do not hang on which samples there are."""
    where: str

    def apply(
        self, lengths: np.ndarray, labels: pa.Array, score_lengths: np.ndarray, scores: pa.Array, source_of: Callable[[int], str]
    ) -> tuple[np.ndarray, pa.Array, np.ndarray, pa.Array]:
        """Mapped lists of labels and scores, each as lengths and flat values. Raises PackError that names the first sample at fault."""
        starts, score_starts = starts_of([lengths]), starts_of([score_lengths])
        check_scores(starts, score_starts, scores.to_numpy(zero_copy_only=False), source_of)  # while each score has its label
        encoded = labels.dictionary_encode()
        number, texts = encoded.indices.to_numpy(zero_copy_only=False), [str(raw) for raw in encoded.dictionary.to_pylist()]
        unknown = np.array([text not in self.classes for text in texts], bool)
        if EVERY_OTHER not in self.classes and unknown.any():
            first = int(np.argmax(unknown[number]))
            row = int(np.searchsorted(starts, first, side="right")) - 1
            raise PackError(
                f"label {labels[first].as_py()!r} of {source_of(row)} is not in class_map={self.where}; add it, with nothing as its class "
                f"to drop it, or {EVERY_OTHER!r} for every other label"
            )
        kind = pa.large_string() if self.found.names is not None else pa.int64()
        classes = pa.array([self.classes.get(text, self.classes.get(EVERY_OTHER)) for text in texts], kind)
        mapped = classes.take(encoded.indices)
        keeps = mapped.is_valid().to_numpy(zero_copy_only=False)
        owner, scored = np.repeat(np.arange(len(lengths)), lengths), score_lengths > 0
        kept = np.bincount(owner[keeps], minlength=len(lengths))
        return kept, mapped.drop_null(), np.where(scored, kept, 0), scores.filter(pa.array(keeps[scored[owner]], pa.bool_()))


EVERY_OTHER = "*"  # the key of a class map that stands for the labels it does not name


def read_class_map(path: str) -> ClassMap:
    """A class map from a JSON object, or from a CSV or TSV file of two columns and no header."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".json":
            pairs = json.loads(text, object_pairs_hook=list)
            if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
                raise ValueError("it is no JSON object")
        else:
            pairs = _pairs_of_text(text, "\t" if Path(path).suffix.lower() == ".tsv" else ",")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise PackError(
            f"class_map={path} cannot be read: {message_of(error)}; give {{raw label: class}} as JSON, or two columns as CSV or TSV"
        ) from None
    classes: dict[str, str | int | None] = {}
    for raw, given in pairs:
        if not (given is None or isinstance(given, str) or (type(given) is int and 0 <= given < 2**31 - 1)):
            raise PackError(f"class {given!r} of {raw!r} in class_map={path} must be a name, a number from 0, or null to drop the label")
        class_ = None if given == "" else given
        if classes.setdefault(raw, class_) != class_:
            raise PackError(f"label {raw!r} has two classes in class_map={path}, {classes[raw]!r} and {class_!r}; give it one")
    names = frozenset(class_ for class_ in classes.values() if isinstance(class_, str))
    numbers = {class_ for class_ in classes.values() if isinstance(class_, int)}
    if names and numbers:
        raise PackError(f"class_map={path} names some classes and numbers others; give all names or all numbers")
    if not names and not numbers:
        raise PackError(f"class_map={path} keeps no label; give at least one class")
    return ClassMap(classes, Found(names or None, max(numbers, default=None)), path)


def _pairs_of_text(text: str, delimiter: str) -> list[tuple[str, str | int]]:
    """The rows of a table of two columns; classes are numbers if all of them look like it."""
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    if wrong := next((number for number, row in enumerate(rows, 1) if len(row) != 2), None):
        raise ValueError(f"row {wrong} has {len(rows[wrong - 1])} columns, not 2")
    numbers = [of.isascii() and of.isdecimal() for _, of in rows if of]
    if len(numbers) > 1 and all(numbers[1:]) and not numbers[0]:
        raise ValueError(f"its classes are numbers but for the first, {rows[0][1]!r}, which looks like a header; leave that out")
    return [(raw, int(of) if of and all(numbers) else of) for raw, of in rows]


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset, and where they come from, for errors."""

    names: tuple[str, ...] | None
    number: int
    where: str


@dataclass(frozen=True)
class Sibling:
    """Another split of the same output, whose classes the new one must share."""

    path: Location
    class_names: tuple[str, ...] | None
    num_classes: int


def settle_classes(found: Found, config: PackConfig, sibling: Sibling | None) -> Classes:
    """The classes that the config, another split of the same output or the labels themselves give. Raises PackError."""
    names, where = None, "the labels found" if config.class_map is None else config.class_map
    if config.class_names is not None:
        names, where = read_class_names(config.class_names), config.class_names
    elif sibling is not None and sibling.class_names is not None:
        names, where = sibling.class_names, str(sibling.path / "classes.txt")
    elif found.names is not None:
        names = tuple(sorted(found.names))
    if names is not None:
        _check_class_names(names, where)

    if names is not None:
        number = len(names)
    elif config.num_classes is not None:
        number, where = config.num_classes, "num_classes"
    elif sibling is not None:
        number, where = sibling.num_classes, str(sibling.path)
    else:
        number = min(max((found.largest if found.largest is not None else -1) + 1, 0), 2**31 - 1)  # labels outside are named later
    if config.num_classes not in (None, number):
        raise PackError(f"num_classes={config.num_classes}, but {where} has {number} classes; leave num_classes out")
    if sibling is not None and (sibling.num_classes != number or sibling.class_names != names):
        named_there = f"use class_names={sibling.path / 'classes.txt'}" if sibling.class_names else "which are numbers: give numbers"
        raise PackError(
            f"the classes of {where} are not those of {sibling.path}, and splits of one dataset share them; {named_there} or another OUT"
        )
    if not number and found.largest is None:
        raise PackError("no sample has a label, so the number of classes is unknown; give num_classes")
    return Classes(names, number, where)


def number_labels(labels: pa.Array, starts: np.ndarray, classes: Classes, source_of: Callable[[int], str]) -> np.ndarray:
    """The flat labels (int64 or large_string) as int32. Raises PackError that names the first sample with one that is none."""
    if pa.types.is_large_string(labels.type):
        numbers = pc.index_in(labels, value_set=pa.array(classes.names or (), pa.large_string()))
        wrong = numbers.is_null().to_numpy(zero_copy_only=False)
        rule = f"is not one of the {classes.number} class names of {classes.where}; correct it or add it there"
    else:
        numbers = labels
        wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, classes.number)).to_numpy(zero_copy_only=False)
        rule = f"is not in 0..{classes.number - 1} ({classes.number} classes, from {classes.where}); correct it or give more classes"
    if wrong.any():
        first = int(np.argmax(wrong))
        row = int(np.searchsorted(starts, first, side="right")) - 1
        raise PackError(f"label {labels[first].as_py()!r} of {source_of(row)} {rule}")
    ids: np.ndarray = numbers.to_numpy(zero_copy_only=False).astype(np.int32)
    return ids


def _check_class_names(names: tuple[str, ...], where: str) -> None:
    bad = [name for name in names if len(name.splitlines()) != 1]
    if bad:
        raise PackError(f"class name {bad[0]!r} from {where} must be one line of text that is not empty")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PackError(f"class name {twice!r} stands twice in {where}; each name must be there once")


def check_scores(label_starts: np.ndarray, score_starts: np.ndarray, scores: np.ndarray, source_of: Callable[[int], str]) -> None:
    """Raises PackError unless each sample has no scores or a finite one for each label."""
    lengths, wanted = np.diff(score_starts), np.diff(label_starts)
    unequal = np.flatnonzero((lengths != wanted) & (lengths > 0))
    if len(unequal):
        row = int(unequal[0])
        raise PackError(f"{source_of(row)} has {lengths[row]} scores for {wanted[row]} labels; give one each, or none")
    wrong = ~np.isfinite(scores)
    if wrong.any():
        first = int(np.argmax(wrong))
        row = int(np.searchsorted(score_starts, first, side="right")) - 1
        raise PackError(f"score {scores[first]} of {source_of(row)} is not a finite float32; correct it or leave scores out")


def merge_duplicates(labels: Lists, scores: Lists) -> tuple[Lists, Lists]:
    """A label that stands twice on a sample is kept once, where it first stood, with the largest of its scores."""
    lengths = np.diff(labels.starts)
    many = lengths > 1
    if not many.any():
        return labels, scores
    owner = np.repeat(np.arange(len(lengths)), lengths)
    scored = np.diff(scores.starts) > 0
    full_scores = np.ones(len(labels.values), dtype=np.float32)
    full_scores[scored[owner]] = scores.values
    # Sorted by owner, label, then place, a label's copies are neighbours and the first of them is the one to keep.
    order = np.lexsort((labels.values, owner))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (owner[order][1:] != owner[order][:-1]) | (labels.values[order][1:] != labels.values[order][:-1])
    if first.all():
        return labels, scores
    best = np.maximum.reduceat(full_scores[order], np.flatnonzero(first))
    kept = order[first]
    best = best[np.argsort(kept)]
    kept = np.sort(kept)
    counts = np.bincount(owner[kept], minlength=len(lengths))
    score_counts = np.where(scored, counts, 0)
    return (
        Lists(starts_of([counts]), labels.values[kept]),
        Lists(starts_of([score_counts]), best[scored[owner[kept]]]),
    )


def starts_of(lengths: list[np.ndarray]) -> np.ndarray:
    """Where each row's list starts, and where the last one ends, from the lengths of all lists."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
