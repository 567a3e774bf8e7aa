"""A bounded cache, on a disk of this machine, of tars that lie far away; shared by all processes and runs that name its folder.

Where it stands: `ranges.py` reads through it. A tar is cut into blocks of BLOCK bytes; a read that touches one which is not there fetches
the whole block, keeps it and hands out what was asked for.

    DIR/vitscale-blocks/HASH/SHARD/000017           a block: its bytes, then an xxh3_64 of every CHUNK of them
    DIR/vitscale-blocks/HASH/SHARD/000017.partial   one that is being fetched, locked by who does it
    DIR/vitscale-blocks/bytes, lock                 how much lies here, and the lock of those who add to it or make room

Invariants, whatever is killed at whatever instant:
- no byte is handed out that does not have the checksum it was kept with, which is of its place too; a block that does not is fetched again;
- a block bears its name only when it is whole;
- the blocks of all that share DIR take no more than the limit, and those that are being written; what was used longest ago goes first;
- nothing in DIR is removed but what bears the name of a block;
- a cache that cannot be written or read costs a warning, once, and never a run.

Left to others: whether what was fetched is right. Who finds that it is not reads again with `fresh`.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.errors import UserError

BLOCK = 4 << 20  # bytes; a request for less is mostly waiting for its first byte, and one for more brings more that nobody wants
CHUNK = 1 << 16  # bytes that have a checksum of their own, so that an image costs no hash of a whole block
ROOM = 0.05  # share of the limit that is freed at once, so that one look at all blocks makes room for many
REQUESTS = 4  # at once, where one read wants several blocks that are not here
PATIENCE = 60.0  # seconds that a block is waited for which another process fetches; then it is fetched here too, and not kept
TOUCH = 1.0  # seconds; a block's time of use is no more exact than that
FOLDER = "vitscale-blocks"
NAME = re.compile(r"\d{6,}(\.partial)?")
LEAST = 16 * BLOCK  # the smallest limit

Fetch = Callable[[int, int], bytes]  # the bytes [start, end) of a tar, or fewer at its end


class CacheError(UserError):
    """A cache that cannot be as asked."""


class Cache:
    """The cache in a folder. Safe for threads, processes, `fork` and `pickle`.

    Args:
        folder: on this machine's own disk; it may hold what earlier runs left.
        limit: bytes that all blocks in it may take. Of processes with several limits each keeps to its own when it adds a block.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < LEAST:
            raise CacheError(f"cache_bytes={limit} must be at least {LEAST}, 16 blocks of {BLOCK >> 20} MiB; 200GB is usual")
        self.folder, self.limit = folder, limit
        self._blocks = folder / FOLDER
        self.hits = self.misses = 0  # blocks, of this process; counted without a lock
        self._usable = True
        self._warning = threading.Lock()

    def read(self, tar: str, size: int, start: int, end: int, fetch: Fetch, *, fresh: bool = False) -> bytes:
        """The bytes [start, end) of a tar, from blocks that are here or are fetched now. Raises what `fetch` raises.

        Args:
            tar: its name here, two folders deep; whoever uses the same name must mean the same bytes.
            size: of the tar.
            fetch: reads the tar.
            fresh: fetch all blocks, also those that are here.
        """
        if not self._usable:
            return fetch(start, end)
        parts: dict[int, bytes] = {}
        places = {}
        for first in range(start - start % BLOCK, end, BLOCK):
            place = _Place(self._blocks / tar, tar, first, min(first + BLOCK, size))
            part = None if fresh else self._kept(place, max(start, first) - first, min(end, place.last) - first)
            if part is not None:
                parts[first] = part
            else:
                places[first] = place
        self.hits += len(parts)
        self.misses += len(places)

        def fetched(first: int) -> bytes:
            place = places[first]
            return self._fetched(place, lambda: fetch(first, place.last), fresh)[max(start, first) - first : min(end, place.last) - first]

        if len(places) == 1:
            parts |= {first: fetched(first) for first in places}
        elif places:
            with ThreadPoolExecutor(min(len(places), REQUESTS)) as pool:
                parts |= zip(places, pool.map(fetched, places), strict=True)
        return b"".join(parts[first] for first in sorted(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder, self.limit)

    # -- One block ------------------------------------------------------------------------------------------------------------------------

    def _kept(self, place: _Place, low: int, high: int) -> bytes | None:
        """The bytes [low, high) of a block, if it is here and they are as they were; a damaged block is removed."""
        try:
            descriptor = os.open(place.file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        try:
            status = os.fstat(descriptor)
            data = _checked(descriptor, place, low, high) if status.st_size == place.stored else None
            if data is not None:
                if time.time() - status.st_mtime > TOUCH:
                    with suppress(OSError):  # a disk that is read-only by now
                        os.utime(descriptor)
                return data
        except OSError:
            pass  # a disk that fails here and there: as if the block were damaged
        finally:
            os.close(descriptor)
        with suppress(OSError):
            place.file.unlink()
            with self._accounts() as total:
                total.add(-status.st_size)
        return None

    def _fetched(self, place: _Place, fetch: Callable[[], bytes], fresh: bool) -> bytes:
        """A block's bytes, fetched and kept, or kept by another process while this one waited."""
        partial = self._hold(place)
        if partial is None:
            return fetch()
        try:
            if not fresh and (data := self._kept(place, 0, place.size)) is not None:
                return data
            data = fetch()
            if len(data) == place.size:
                self._keep(place, partial, data)
            return data
        finally:
            # Only now, as whoever waits for the lock takes a file without this name for one that is done.
            with suppress(OSError):
                if _is_at(partial, place.partial):
                    place.partial.unlink()
            os.close(partial)

    def _hold(self, place: _Place) -> int | None:
        """The file to write a block to, locked; None where it cannot be had."""
        try:
            while self._usable:
                place.file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(place.partial, os.O_RDWR | os.O_CREAT, 0o666)
                locked = False
                try:
                    locked = _locked(descriptor)
                    if locked and _is_at(descriptor, place.partial):
                        return descriptor
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
                if not locked:
                    return None
                # Else it was done, or given up, before we had it.
        except OSError as error:
            self._give_up(error)
        return None

    def _keep(self, place: _Place, partial: int, data: bytes) -> None:
        try:
            with self._accounts() as total:
                if total.bytes + place.stored > self.limit:
                    total.set(self._make_room(place.stored))
                if total.bytes + place.stored > self.limit:
                    return  # of which others hold all, or it is smaller than a block
                total.add(place.stored)
            os.ftruncate(partial, 0)  # of one that was killed
            for written in (data, place.checksums(data).tobytes()):
                view = memoryview(written)
                while view:
                    view = view[os.write(partial, view) :]
            os.rename(place.partial, place.file)
        except OSError as error:
            self._give_up(error)

    # -- All blocks -----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _accounts(self) -> Iterator[_Total]:
        """How much lies here, while nobody else adds to it. It may be too much, where something was killed, but not too little."""
        with open(self._blocks / "lock", "a") as lock:
            if not _locked(lock.fileno()):
                raise OSError(f"another process holds {lock.name}")
            total = _Total(self._blocks / "bytes")
            if total.bytes < 0:
                total.set(self._make_room(0))
            yield total

    def _make_room(self, wanted: int) -> int:
        """Looks at all that lies here, and removes what was used longest ago until so much fits, and some more. What is left, in bytes."""
        ages, sizes = [], []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".partial"):
                    sizes.append(BLOCK if not _removed_if_nobodys(entry.path) else 0)
                    ages.append(sys.maxsize)
                else:
                    sizes.append(status.st_size)
                    ages.append(status.st_mtime_ns)
        total = sum(sizes)
        if total + wanted <= self.limit or not sizes:
            return total
        excess = total + wanted - self.limit + int(ROOM * self.limit)
        oldest = np.argsort(np.array(ages, np.int64), kind="stable")
        freed = np.cumsum(np.array(sizes, np.int64)[oldest])
        youngest = ages[oldest[min(int(np.searchsorted(freed, excess)), len(ages) - 1)]]
        for entry in self._entries():
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                status = entry.stat()
                if not entry.name.endswith(".partial") and status.st_mtime_ns <= youngest:
                    os.unlink(entry.path)
                    excess -= status.st_size
                    total -= status.st_size
        return total

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """All blocks, and those that are being written."""
        for dataset in os.scandir(self._blocks):
            if dataset.is_dir(follow_symlinks=False):
                for tar in os.scandir(dataset):
                    if tar.is_dir(follow_symlinks=False):
                        yield from (entry for entry in os.scandir(tar) if NAME.fullmatch(entry.name))

    def _give_up(self, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # somebody empties the cache just now
            return
        with self._warning:
            usable, self._usable = self._usable, False
        if usable:
            print(
                f"warning: the cache {self.folder} cannot be used ({error.strerror or error}); this process goes on without it",
                file=sys.stderr, flush=True,
            )  # fmt: skip


class _Place:
    """Where the block with the bytes [first, last) of a tar lies, and what it must be."""

    def __init__(self, folder: Path, tar: str, first: int, last: int) -> None:
        number = first // BLOCK
        self.file, self.partial = folder / f"{number:06d}", folder / f"{number:06d}.partial"
        self.last, self.size = last, last - first
        self.stored = self.size + 8 * -(-self.size // CHUNK)
        self._seed = xxhash.xxh3_64_intdigest(f"{tar}/{number}".encode())

    def checksums(self, data: bytes, first: int = 0) -> np.ndarray:
        """An xxh3_64 for each chunk of some of its bytes that begin with a chunk, seeded with its place."""
        view = memoryview(data)
        count = -(-len(data) // CHUNK)
        return np.array(
            [
                xxhash.xxh3_64_intdigest(view[i * CHUNK : (i + 1) * CHUNK], seed=(self._seed + first + i) % 2**64)
                for i in range(count)
            ],
            dtype="<u8",
        )  # fmt: skip


def _checked(descriptor: int, place: _Place, low: int, high: int) -> bytes | None:
    """The bytes [low, high) of a block in a file; None where one of the chunks that they lie in does not have its checksum."""
    first, last = low // CHUNK, -(-high // CHUNK)
    data = os.pread(descriptor, min(last * CHUNK, place.size) - first * CHUNK, first * CHUNK)
    told = os.pread(descriptor, 8 * (last - first), place.size + 8 * first)
    if place.checksums(data, first).tobytes() != told:
        return None
    return data[low - first * CHUNK : high - first * CHUNK]


def _locked(descriptor: int) -> bool:
    """Whether a file could be locked in time: the one who has it may be a process that somebody has stopped."""
    give_up_at, wait = time.monotonic() + PATIENCE, 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                return False
        time.sleep(wait)
        wait = min(2 * wait, 0.05)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file bears that name now."""
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == os.stat(file).st_ino
    return False


def _removed_if_nobodys(partial: str) -> bool:
    """Removes what a killed process was writing."""
    descriptor = os.open(partial, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(partial)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


class _Total:
    """A number of bytes in a file; below 0 if the file says none, or was written before the machine last started."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.bytes = -1
        with suppress(OSError, ValueError):
            boot, said = file.read_text().split()
            if boot == _boot():
                self.bytes = int(said)

    def set(self, total: int) -> None:
        """Writes another one; within a system call, so that a kill leaves the old one or the new one."""
        self.bytes = total
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, f"{_boot()} {max(0, total):020d}".encode())
        finally:
            os.close(descriptor)

    def add(self, size: int) -> None:
        """Adds to it."""
        self.set(self.bytes + size)


@lru_cache
def _boot() -> str:
    """Names this start of the machine: what one that lost its power wrote last may be lost."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "unknown"


def cache_advice(limit: int, tar_bytes: int, image_bytes: float, full_shuffle: bool) -> list[str]:
    """What a cache of so many bytes does for a run, for people; the last line is a warning where it cannot do it well.

    Args:
        limit: of the cache.
        tar_bytes: of all tars.
        image_bytes: of one image, about.
        full_shuffle: whether neighbours in the run's order lie anywhere in the tars, and not in one window.
    """
    share = min(1.0, limit / max(1, tar_bytes))
    room = limit // (BLOCK + 8 * BLOCK // CHUNK)
    lines = [f"cache: room for {room:,} blocks of {BLOCK >> 20} MiB, {share:.0%} of the {tar_bytes / 1e9:,.1f} GB of tars"]
    if full_shuffle and share < 1:
        lines.append(
            f"warning: with a full shuffle {1 - share:.0%} of the reads will fetch {BLOCK / 1e3:,.0f} kB for an image of "
            f"{image_bytes / 1e3:,.0f} kB; give --stream.lanes 1024 (or another power of two), "
            f"--cache-bytes {tar_bytes * 1.01 / 1e9:.0f}GB, or no cache"
        )
    return lines
