"""Stretches of a dataset's tars, wherever they lie: in a file system, in object storage or on the web, through a cache or not.

Where it stands: `Dataset.read_range` reads through this; `storage.py` makes the requests, `cache.py` keeps what they gave.

Invariants: a tar in object storage is read in the size that the manifest says and in one version, or not at all; no request is made but for
bytes; nothing here knows what lies in a tar.
"""

from __future__ import annotations

import functools
import os

import numpy as np

from data_tools.cache import Cache
from data_tools.storage import Location, RemoteFile, Url

OPEN_FILES = 256  # file descriptors that a process keeps open, of all its datasets; well below the usual limit of 1,024
KNOWN_OBJECTS = 2**16  # of which the version is kept, at some hundred bytes each; more than there are tars


class TarRanges:
    """The tars of one dataset. Safe for threads.

    Args:
        root: the dataset's place.
        names: of the tars, from there.
        sizes: their bytes, as the manifest has them.
        content_hash: of the dataset; what is cached is known by it.
        cache: None reads where the tars are.
    """

    def __init__(self, root: Location, names: tuple[str, ...], sizes: np.ndarray, content_hash: str, cache: Cache | None) -> None:
        self._root, self._names, self._sizes, self._cache = root, names, sizes, cache
        self._content_hash = content_hash
        self._opened = object()  # a dataset that is opened anew, perhaps after a repair, has handles of its own
        self._object = functools.lru_cache(KNOWN_OBJECTS)(self._known_object)

    def read(self, shard: int, start: int, end: int, *, fresh: bool = False) -> bytes:
        """The bytes [start, end) of a tar, or as many of them as there are. Raises OSError, StorageError.

        Args:
            fresh: past what is cached, which is replaced.
        """
        size = int(self._sizes[shard])
        end = min(end, size)  # so that a damaged index asks for no more than there is
        if not 0 <= start < end:
            return b""
        fetch = functools.partial(self._fetch, shard)
        if self._cache is None:
            return fetch(start, end)
        return self._cache.read(f"{self._content_hash[:16]}/{shard:06d}", size, start, end, fetch, fresh=fresh)

    def _fetch(self, shard: int, start: int, end: int) -> bytes:
        if isinstance(self._root, Url):
            return self._object(shard).fetch(start, end)
        try:
            return _open_file(str(self._root / self._names[shard]), self._opened).read(start, end)
        except OSError:
            _open_file.cache_clear()  # a handle may be stale (NFS), or there are too many of them: who tries again opens anew
            raise

    def _known_object(self, shard: int) -> RemoteFile:
        assert isinstance(self._root, Url)
        return RemoteFile(self._root.below(self._names[shard]), int(self._sizes[shard]))


class _OpenFile:
    """A file descriptor that closes when the last one who uses it lets go, so an LRU may drop it during a read."""

    fd = -1

    def __init__(self, path: str, _: object = None) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end), or as many as there are; one system call gives 2 GiB at most."""
        data = os.pread(self.fd, end - start, start)
        while len(data) < end - start and (more := os.pread(self.fd, end - start - len(data), start + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_open_file = functools.lru_cache(OPEN_FILES)(_OpenFile)
