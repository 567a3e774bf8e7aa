"""A USTAR writer whose bytes depend on nothing but names and contents.

Where it stands: `shards.py` writes with it. `tarfile` is not used because its headers have changed between
versions of Python, and webdataset's TarWriter adds PAX headers. GNU tar, `tarfile` and webdataset's reader judge it (tests).

Invariants: member names are ASCII and at most 100 bytes; mode 0644, owner 0, time 0; `add` returns where the data lies.
"""

from __future__ import annotations

import os

import xxhash

BLOCK = 512
_GATHERED = 1 << 20  # bytes handed to the system at a time
_MANY = 512  # buffers handed over at a time; the system takes 1,024

# A header is name, _MODE, size, _TIME, checksum, _REST; the checksum adds up all bytes, its own place counted as spaces.
_MODE = b"0000644\0" + b"0000000\0" * 2  # mode, uid, gid
_TIME = b"%011o\0" % 0
_REST = (
    b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" * 2 + bytes(155 + 12)
)  # plain file, no link, owner, device, prefix
_CONSTANT = sum(_MODE + _TIME + _REST) + 8 * ord(" ")
_PADDING = tuple(bytes(-size % BLOCK) for size in range(BLOCK))


def header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a plain file."""
    name_and_size = name.encode("ascii"), b"%011o\0" % size
    checksum = _CONSTANT + sum(name_and_size[0]) + sum(name_and_size[1])
    fields = b"%b%b%b%b%06o\0 %b" % (name_and_size[0].ljust(100, b"\0"), _MODE, name_and_size[1], _TIME, checksum, _REST)
    assert len(fields) == BLOCK, name  # a name over 100 bytes
    return fields


class TarWriter:
    """Writes members to a file descriptor; `bytes` and `checksum` (xxh3_128) are of all that was added. `finish` writes the last of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = xxhash.xxh3_128()
        self._gathered: list[bytes] = []
        self._held = 0
        self.bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its data in the tar."""
        offset = self.bytes + BLOCK
        for part in (header(name, len(data)), data, _PADDING[len(data) % BLOCK]):
            self._gathered.append(part)
            self._hash.update(part)
        added = BLOCK + len(data) + len(self._gathered[-1])
        self.bytes += added
        self._held += added
        if self._held > _GATHERED or len(self._gathered) > _MANY:
            self._hand_over()
        return offset

    def finish(self) -> None:
        """The two empty blocks that end a tar."""
        end = bytes(2 * BLOCK)
        self._gathered.append(end)
        self._hash.update(end)
        self.bytes += len(end)
        self._hand_over()

    @property
    def checksum(self) -> str:
        """Hexadecimal xxh3_128 of what was added so far."""
        return self._hash.hexdigest()

    def _hand_over(self) -> None:
        written = os.writev(self._descriptor, self._gathered)
        rest = b"".join(self._gathered)[written:] if written < sum(map(len, self._gathered)) else b""
        while rest:  # the system took less than it was given, as near the end of a disk
            rest = rest[os.write(self._descriptor, rest) :]
        self._gathered, self._held = [], 0
