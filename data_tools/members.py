"""What lies where in a tar that anybody made: its members, front to back, and the samples that they form.

Where it stands: `index.py` makes datasets of such tars with it, `peer_indices.py` the indices of other readers, `repair.py` what was lost
of ours. It takes a file object, so it does not matter where the tar lies.

Invariants: what is read is the tar that other readers see, or TarError is raised: a damaged header, a member that is cut off, a sparse or a
compressed file are never taken for the tar's end or for an image; no more memory is asked for than the tar has bytes.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import xxhash

from data_tools.errors import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
META = re.compile(r"__[^/]*__($|/)")  # names that webdataset and Energon take for no sample
_BLOCK = 1 << 20


class TarError(UserError):
    """A tar that cannot be read to its end, or that holds what has no place in one."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar."""

    name: str
    header: int
    """Where its headers begin."""
    offset: int
    """Where its bytes begin."""
    size: int


class OpenTar:
    """A tar that is read once, from front to back.

    Args:
        file: the tar; with `hashed` only `read` is asked of it, else `seek` too.
        name: for errors.
        size: bytes of the whole tar.
        hashed: read everything, so that `finish` can tell the checksum; else what nobody asks for is passed over.
    """

    def __init__(self, file: BinaryIO, name: str, size: int, *, hashed: bool) -> None:
        self.name = name
        self.size = size
        self.end = 0
        """Where the last member ends, padding included; known after the last of `members`."""
        self._file = _Forward(file, size, hashed)

    def members(self) -> Iterator[Member]:
        """The plain files, in their order. Raises TarError."""
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:  # type: ignore[call-overload]
                while (found := tar.next()) is not None:
                    if found.issparse():
                        raise TarError(f"{self.name} holds a sparse file, {found.name!r}; write the tar again without them")
                    if found.isreg():
                        if not 0 <= found.size <= self.size - found.offset_data:
                            raise tarfile.ReadError(f"{found.name!r} is cut off")
                        yield Member(found.name, found.offset, found.offset_data, found.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the tar
                self.end = tar.offset
            at, block = self._file.last
            # tarfile, as others, takes a header that is none for the tar's end, and what follows would be lost in silence
            if at == self.end and any(block):
                raise tarfile.ReadError(f"the header at byte {at} is damaged")
        except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
            kind = next((kind for magic, kind in COMPRESSED.items() if self._file.first.startswith(magic)), None)
            if kind is not None:
                raise TarError(f"{self.name} is compressed ({kind}), and nothing can be read from its middle; unpack it first") from None
            raise TarError(f"{self.name} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None

    def read(self, member: Member) -> bytes:
        """The bytes of the member that `members` gave last."""
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) < member.size:
            raise TarError(f"{self.name} has become shorter while it was read; start again when nobody writes it")
        return data

    def finish(self) -> str:
        """The tar's xxh3_128, hexadecimal; what is left of it is read for that."""
        self._file.seek(self.size)
        assert self._file.digest is not None
        if self._file.tell() != self.size or self._file.more():
            raise TarError(f"{self.name} has changed its length while it was read; start again when nobody writes it")
        return self._file.digest.hexdigest()


class _Forward:
    """What tarfile sees of a tar: it goes forward only, and never gives more than there is, however much a header claims."""

    def __init__(self, file: BinaryIO, size: int, hashed: bool) -> None:
        self._file, self._size, self._at = file, size, 0
        self.digest = xxhash.xxh3_128() if hashed else None
        self.first = b""
        self.last: tuple[int, bytes] = (-1, b"")
        """The last block that was read, and where it began: where a tar ends, its end mark."""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        if offset < self._at:
            raise tarfile.ReadError(f"a header before byte {self._at} points back")
        offset = min(offset, self._size)
        if self.digest is None:
            self._file.seek(offset)
            self._at = offset
        while self._at < offset and self._take(min(_BLOCK, offset - self._at)):
            pass
        return self._at

    def read(self, size: int = -1) -> bytes:
        at, wanted = self._at, self._size - self._at
        if size >= 0:
            wanted = min(size, wanted)
        pieces = []
        while wanted and (piece := self._take(min(wanted, 64 * _BLOCK))):  # a stream may give less than was asked for
            pieces.append(piece)
            wanted -= len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) <= tarfile.BLOCKSIZE:
            self.last = (at, data)
        if not at:
            self.first = data[:16]
        return data

    def more(self) -> bool:
        """Whether there is anything behind the end."""
        return bool(self._file.read(1))

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        self._at += len(data)
        if self.digest is not None:
            self.digest.update(data)
        return data


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """The samples that the members form by webdataset's rule, neighbours with one name before the first dot: key, and members by suffix."""
    from webdataset.tariterators import base_plus_ext

    key: str | None = None
    sample: list[tuple[str, Member]] = []
    for member in members:
        if META.match(member.name):
            continue
        base, suffix = base_plus_ext(member.name)
        if base is None:
            continue
        if base != key:
            if key is not None:
                yield key, sample
            key, sample = base, []
        sample.append((suffix, member))
    if key is not None:
        yield key, sample


def read_samples(tar: OpenTar, wanted: Iterable[str], limit: int) -> Iterator[tuple[str, dict[str, tuple[Member, bytes | None]]]]:
    """The samples of a tar: key, and for each wanted suffix the member and its bytes, or None where they are more than `limit`.

    Grouped by webdataset itself, so that its readers and ours see the same samples.
    """
    from webdataset.tariterators import group_by_keys

    suffixes = frozenset(wanted)

    def files() -> Iterator[dict[str, Any]]:
        for member in tar.members():
            if not META.match(member.name):
                take = member.name.lower().endswith(tuple(f".{suffix}" for suffix in suffixes)) and member.size <= limit
                yield {"fname": member.name, "__url__": tar.name, "data": (member, tar.read(member) if take else None)}

    try:
        for sample in group_by_keys(files()):
            yield sample["__key__"], {suffix: value for suffix, value in sample.items() if suffix in suffixes}
    except ValueError as error:  # two members of one name
        raise TarError(f"{tar.name} cannot be read: {str(error.args[0]).splitlines()[0]}; write it again or leave it out") from None
