"""Randomness without state: numbers that are a pure function of a key, the same on every machine and under every split of the work.

The order of samples, crops, flips, RandAugment and mixing draw from here, and what the model leaves out from the same keys
(`omissions.keyed_uniform`), so a resume needs no saved generator. Only initial weights and element dropout come from torch's generators,
seeded by names and by keys. Keys are 64-bit; all functions work on whole arrays.

The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from collections.abc import Callable
from enum import IntEnum, unique

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8  # half-rounds of the Feistel network; tests/vitscale/test_keyed.py holds the distribution to account


@unique
class Purpose(IntEnum):
    """The first part of every key, so that no two uses of randomness share one."""

    SHARD_ORDER = 1
    WINDOW = 2
    SUBSTITUTE = 3
    SAMPLE = 4  # crop, flip, stochastic depth
    DROPOUT = 5
    COMPONENT = 6  # the seed of a dataset among several
    RANDAUGMENT = 7
    MIXING = 8  # mixup and CutMix
    FOREIGN_SHARDS = 9  # the order of tars without an index
    FOREIGN_SHUFFLE = 10  # and of the samples that were read of them
    SHOTS = 11  # of a few-shot probe
    HELD_OUT = 12  # of a training split, to choose a linear probe on
    PROBE_ORDER = 13  # of a linear probe's SGD
    BOOTSTRAP = 14  # resamples of an evaluation


def mix(values: npt.ArrayLike) -> UInt64:
    """A well-mixed 64-bit number for each of `values` (a bijection on 64-bit numbers)."""
    x = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        x = x + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def key(*parts: npt.ArrayLike) -> UInt64:
    """One key from several non-negative integers, arrays broadcast; the order of the parts matters."""
    result = np.zeros((), dtype=np.uint64)
    for part in parts:
        result = mix(result ^ mix(part))
    return result


def uniform(keys: npt.ArrayLike, draw: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The draw-th number in [0, 1) of each key's own sequence; arrays are broadcast."""
    bits: npt.NDArray[np.float64] = (key(keys, draw) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


def permute(index: npt.ArrayLike, length: npt.ArrayLike, keys: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where each index in [0, length) goes under its key's permutation of [0, length).

    A Feistel network over a x b cells with a = ceil(sqrt(length)), b = ceil(length / a), whose halves are mixed by addition modulo a and b;
    the fewer than a cells past the end are walked out of (Black and Rogaway, CT-RSA 2002). Constant memory, no table.
    """
    return _walk(_feistel, index, length, keys)


def unpermute(index: npt.ArrayLike, length: npt.ArrayLike, keys: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """What `permute` sends to each index: its inverse, the same walk taken backwards."""
    return _walk(_unfeistel, index, length, keys)


def _walk(
    step: Callable[[UInt64, UInt64, UInt64, UInt64], UInt64], index: npt.ArrayLike, length: npt.ArrayLike, keys: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    x, length, keys = np.broadcast_arrays(
        np.asarray(index, dtype=np.uint64), np.asarray(length, dtype=np.uint64), np.asarray(keys, dtype=np.uint64)
    )
    shape = x.shape
    x, length, keys = x.ravel().copy(), length.ravel(), keys.ravel()
    a = np.ceil(np.sqrt(length.astype(np.float64))).astype(np.uint64)
    b = (length + a - np.uint64(1)) // a
    todo = np.arange(x.size)
    while todo.size:
        x[todo] = step(x[todo], a[todo], b[todo], keys[todo])
        todo = todo[x[todo] >= length[todo]]
    return x.astype(np.int64).reshape(shape)


def _feistel(x: UInt64, a: UInt64, b: UInt64, keys: UInt64) -> UInt64:
    left, right = x // b, x % b
    for half_round in range(_ROUNDS):
        if half_round % 2 == 0:
            left = (left + _turn(keys, right, half_round) % a) % a
        else:
            right = (right + _turn(keys, left, half_round) % b) % b
    return left * b + right


def _unfeistel(x: UInt64, a: UInt64, b: UInt64, keys: UInt64) -> UInt64:
    left, right = x // b, x % b
    for half_round in reversed(range(_ROUNDS)):
        if half_round % 2 == 0:
            left = (left + a - _turn(keys, right, half_round) % a) % a
        else:
            right = (right + b - _turn(keys, left, half_round) % b) % b
    return left * b + right


def _turn(keys: UInt64, half: UInt64, half_round: int) -> UInt64:
    return mix(keys ^ mix(half + np.uint64(half_round << 40)))
