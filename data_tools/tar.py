"""A USTAR writer whose bytes depend on nothing but names and contents.

Where it stands: `pack.py` writes shards with it. `tarfile` is not used because its headers have changed between
versions of Python, and webdataset's TarWriter adds PAX headers. GNU tar, `tarfile` and webdataset's reader judge it (tests).

Invariants: member names are ASCII and at most 100 bytes; mode 0644, owner 0, time 0; `add` returns where the data lies.
"""

from __future__ import annotations

from typing import BinaryIO

import xxhash

BLOCK = 512


def header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a plain file."""
    fields = b"".join(
        (
            name.encode("ascii").ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,  # mode, uid, gid
            b"%011o\0" % size,
            b"%011o\0" % 0,  # time
            b" " * 8,  # checksum, counted as spaces
            b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64),  # plain file, no link, no owner's names
            b"0000000\0" * 2 + bytes(155 + 12),  # device, no prefix, padding
        )
    )
    assert len(fields) == BLOCK, name  # a name over 100 bytes
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


class TarWriter:
    """Writes members to an open file; `bytes` and `checksum` (xxh3_128) are of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its data in the tar."""
        self._write(header(name, len(data)))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def finish(self) -> None:
        """The two empty blocks that end a tar."""
        self._write(bytes(2 * BLOCK))

    @property
    def checksum(self) -> str:
        """Hexadecimal xxh3_128 of what was written so far."""
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)
