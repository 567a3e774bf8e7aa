"""Keys: the rule that makes a safe, unique one from any text, and their hashes.

Where it stands: `sources.py` makes a listing's keys here; `plan.py` shuffles and splits by their hashes.

Invariants: a key is 1 to 80 of A-Z a-z 0-9 _ -, begins with neither "__" (webdataset takes that for metadata) nor "-"
(shells take that for an option); a key depends on its own text only, unless texts collide.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

MAX_KEY = 80
SAFE_KEY = "^[A-Za-z0-9_][A-Za-z0-9_-]{0,79}$"
CHUNK = 65_536


def clean_key(raw: str) -> str:
    """A safe key from any text: A-Z a-z 0-9 _ - only, at most 80 characters.

    Slashes become "_". If anything else has to change, a hash of the raw text is appended, so that different texts keep
    different keys. Two texts can still meet ("a/b" and "a_b"): see `sources.make_listing`.
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


def clean_keys(raw_keys: pa.Array) -> pa.Array:
    """`clean_key` of each text (large_string); those that are safe as they are cost no Python."""
    flat = pc.replace_substring(raw_keys, "/", "_")
    safe = pc.and_not(pc.match_substring_regex(flat, SAFE_KEY), pc.starts_with(flat, "__"))
    if pc.all(safe).as_py():
        return flat
    others = [clean_key(raw) for raw in raw_keys.filter(pc.invert(safe)).to_pylist()]
    return pc.replace_with_mask(flat, pc.invert(safe), pa.array(others, pa.large_string()))


def repeated(hashes: np.ndarray, at_once: int = 2**18) -> np.ndarray:
    """Places (ascending) of the values that stand more than once among uint64 `hashes`.

    Memory holds some `at_once` values, or a 64th of them if that is more: the hashes are gone through once for each such part.
    """
    parts = min(64, -(-len(hashes) // at_once))
    bounds = [number * 2**64 // parts for number in range(parts)] + [2**64]
    found = []
    for low, high in itertools.pairwise(bounds):
        places = np.concatenate([
            start + np.flatnonzero((chunk >= low) & (chunk <= high - 1))
            for start in range(0, len(hashes), CHUNK * 16)
            if len(chunk := hashes[start : start + CHUNK * 16])
        ])  # fmt: skip
        values = hashes[places]
        order = np.argsort(values, kind="stable")
        equal = values[order][1:] == values[order][:-1]
        twice = np.zeros(len(places), dtype=bool)
        twice[order[1:][equal]] = twice[order[:-1][equal]] = True
        found.append(places[twice])
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def key_hashes(keys: pa.Array, seed: int) -> np.ndarray:
    """xxh3_64 of each key (uint64): what shuffles and splits, so that neither depends on the listing's order."""
    texts = keys.cast(pa.large_binary()).to_pylist()
    return np.fromiter((xxhash.xxh3_64_intdigest(text, seed) for text in texts), dtype=np.uint64, count=len(keys))
