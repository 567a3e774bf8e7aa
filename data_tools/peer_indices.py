"""Indices that other readers want beside a tar: DALI's `X.idx` and Energon's `X.tar.idx`.

Where it stands: `vitscale data index` writes them and `repair.py` writes them again; `verify.py` holds them against the tars. They are
derived files: a function of the tar's headers alone, no part of a dataset's identity.

Invariants: a sample in them is webdataset's, so all readers count alike; a dataset has such an index beside each tar with a sample, or
beside none. A tar without samples has none, as DALI refuses an empty one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_tools.dataset import DatasetError
from data_tools.durable import replace_file
from data_tools.members import OpenTar, TarError, grouped
from data_tools.progress import Update, no_update

DALI, ENERGON = ".idx", ".tar.idx"
KINDS = {DALI: "DALI", ENERGON: "Energon"}


def index_file(tar: Path, kind: str) -> Path:
    """Where the index of that kind lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + kind)


def kinds_beside(tars: Iterable[Path]) -> tuple[str, ...]:
    """The kinds of which any tar has an index."""
    found: set[str] = set()
    for tar in tars:
        found |= {kind for kind in KINDS if kind not in found and index_file(tar, kind).is_file()}
        if len(found) == len(KINDS):
            break
    return tuple(sorted(found))


def make_indices(tar: Path, kinds: Iterable[str] = tuple(KINDS)) -> dict[str, bytes]:
    """The indices of a tar, from its headers; none where it has no sample. Raises TarError.

    DALI's is text, a line a sample: suffix, offset of the bytes, size and name of each member. Energon's is native uint64: where each
    sample's headers begin, and where the last one ends.
    """
    lines, starts = [], []
    with tar.open("rb") as file:
        opened = OpenTar(file, str(tar), os.fstat(file.fileno()).st_size, hashed=False)
        for _, members in grouped(opened.members()):
            starts.append(members[0][1].header)
            lines.append(" ".join(f"{suffix} {member.offset} {member.size} {member.name}" for suffix, member in members))
            if DALI in kinds and (bad := next((m.name for s, m in members if len(m.name.split()) != 1 or not s), None)):
                raise TarError(f"{tar} holds {bad!r}, which DALI's index cannot hold: it takes names with a suffix and without spaces")
    if not starts:
        return {}
    texts = {
        DALI: "".join([f"v1.2 {len(lines)}\n", *(line + "\n" for line in lines)]).encode("utf-8", "surrogateescape"),
        ENERGON: struct.pack(f"{len(starts) + 1}Q", *starts, opened.end),
    }
    return {kind: texts[kind] for kind in kinds}


@dataclass(frozen=True)
class Written:
    """How many indices were written, and how many were there already."""

    written: int
    there: int


def write_indices(tars: list[Path], kinds: Iterable[str], jobs: int = 0, progress: Update = no_update, replace: bool = False) -> Written:
    """Writes the indices that are missing; one that is there and is another is replaced if that is asked for, or an error."""
    kinds = tuple(kinds)

    def write(tar: Path) -> tuple[int, int]:
        counts = [0, 0]
        for kind, content in make_indices(tar, kinds).items():
            file = index_file(tar, kind)
            there = file.read_bytes() if file.is_file() else None
            if there is not None and there != content and not replace:
                raise DatasetError(
                    f"{file} is there and is not {KINDS[kind]}'s index of {tar.name}; `vitscale data repair` replaces it, or move it away"
                )
            if there != content:
                replace_file(file, content)
            counts[there == content] += 1
        return counts[0], counts[1]

    written = there = 0
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for number, (fresh, kept) in enumerate(pool.map(write, tars), 1):
            written, there = written + fresh, there + kept
            progress(number, len(tars))
    return Written(written, there)


def wrong_indices(tar: Path, kinds: Iterable[str]) -> dict[str, str]:
    """What is wrong with the indices of these kinds beside a sound tar: the kind, and what. Raises TarError."""
    kinds = tuple(kinds)
    wrong = {}
    made = make_indices(tar, kinds) if kinds else {}
    for kind in kinds:
        file = index_file(tar, kind)
        if kind not in made and file.is_file():
            wrong[kind] = "is the index of a tar without samples, which has none"
        elif kind in made and not file.is_file():
            wrong[kind] = f"is missing, and other tars have {KINDS[kind]}'s index"
        elif kind in made and file.read_bytes() != made[kind]:
            wrong[kind] = f"is not {KINDS[kind]}'s index of this tar"
    return wrong
