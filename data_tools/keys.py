"""Keys: the rule that makes a safe, unique one from any text, and their hashes.

Where it stands: `sources.py` makes a listing's keys here; `pack.py` shuffles and splits by their hashes.

Invariants: a key is 1 to 80 of A-Z a-z 0-9 _ -, begins with neither "__" (webdataset takes that for metadata) nor "-"
(shells take that for an option); a key depends on its own text only, unless texts collide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

MAX_KEY = 80
CHUNK = 65_536  # texts held as Python objects at a time


def clean_key(raw: str) -> str:
    """A safe key from any text: A-Z a-z 0-9 _ - only, at most 80 characters.

    Slashes become "_". If anything else has to change, a hash of the raw text is appended, so that different texts keep
    different keys. Two texts can still meet ("a/b" and "a_b"): see `unique_keys`.
    """
    flat = raw.replace("/", "_")
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", flat)
    # webdataset takes names that begin with "__" for metadata, shells take "-" for options.
    if key != flat or not key or len(key) > MAX_KEY or key.startswith(("__", "-")):
        return hashed_key(raw, raw)
    return key


def hashed_key(raw: str, salt: str) -> str:
    """As much of the raw text as is safe, and 16 hexadecimal digits of the salt's hash."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", raw.replace("/", "_")).strip("_-")[: MAX_KEY - 17] or "image"
    return f"{stem}-{xxhash.xxh3_64_hexdigest(salt.encode('utf-8', 'surrogatepass'))}"


def unique_keys(raw_keys: pa.Array, salt: Callable[[int], str]) -> pa.Array:
    """`clean_key` of each text; those that meet get a hash of their salt, which names the row, instead."""
    texts = (clean_key(raw) for raw in _texts(raw_keys))
    keys = pa.concat_arrays([pa.array(chunk, pa.large_string()) for chunk in _chunks(texts)])
    attempt = 0
    while True:
        hashes = key_hashes(keys, seed=0)
        order = np.argsort(hashes)
        equal = hashes[order][1:] == hashes[order][:-1]
        if not equal.any():
            return keys
        repeated = np.zeros(len(keys), dtype=bool)
        repeated[order[1:][equal]] = repeated[order[:-1][equal]] = True
        fresh = [hashed_key(raw_keys[number].as_py(), f"{salt(number)}\0{attempt}") for number in np.flatnonzero(repeated).tolist()]
        keys = pc.replace_with_mask(keys, pa.array(repeated), pa.array(fresh, pa.large_string()))
        attempt += 1


def key_hashes(keys: pa.Array, seed: int) -> np.ndarray:
    """xxh3_64 of each key (uint64): what shuffles and splits, so that neither depends on the listing's order."""
    digests = (xxhash.xxh3_64_intdigest(key.encode(), seed) for key in _texts(keys))
    return np.fromiter(digests, dtype=np.uint64, count=len(keys))


def _texts(array: pa.Array) -> Iterator[str]:
    for start in range(0, len(array), CHUNK):
        yield from array.slice(start, CHUNK).to_pylist()


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk
