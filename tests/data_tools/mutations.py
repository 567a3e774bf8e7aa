"""Damage of all kinds, by a seed."""

import random

from tests.data_tools.conftest import make_image

KINDS = ("JPEG", "PNG", "WEBP")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to five flips, cuts, repeats, splices or runs of zeros."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not content:
            break
        at, length = rng.randrange(len(content)), rng.randint(1, 64)
        what = rng.choice(["flip", "cut", "truncate", "repeat", "zeros", "noise", "splice"])
        if what == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del content[at : at + length]
        elif what == "truncate":
            del content[at:]
        elif what == "repeat":
            content[at:at] = content[at : at + length]
        elif what == "zeros":
            content[at : at + length] = bytes(length)
        elif what == "noise":
            content[at : at + length] = rng.randbytes(length)
        else:
            other = make_image(rng.randrange(40), rng.choice(KINDS))
            content[at:] = other[rng.randrange(len(other)) :]
    return bytes(content)
