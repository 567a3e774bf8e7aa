"""Object storage and the web behind a few functions: list, read, open, put. Nothing else knows how a request is made.

Where it stands: `location` makes of a word on the command line a `Path` or a `Url`; `origins.py`, `sources.py`, `tables.py` and `tars.py`
read through this module, `pack.py` puts a dataset where OUT is a URL.

The requests are obstore's (`s3://`, `gs://`, `az://`), which knows endpoints, credentials and signatures, and urllib3's (`http://`,
`https://`), which leaves a URL as it came. obstore asks again after a 5xx, a lost connection and a body that ends early, but not where the
answer to a listing or to the start of an upload is cut, nor where a write with a condition is lost; `_again` does.

Invariants:
- an object that is not there raises `Missing`, and whatever else goes wrong after all attempts one `StorageError`, in one line;
- a `RemoteFile` is read by ranges of one version of its object, and gives no byte of another place or version;
- a process that was forked after a request was made fails in one line, as obstore would wait for ever there; a spawned one works;
- `put` returns when the object is known to hold the bytes of the file;
- no URL is ever read as a file of this machine.

Left to others: what a missing object means.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import posixpath
import random
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from data_tools.errors import UserError

STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
WEB = ("http", "https")
RETRIES = 12  # of a request, by obstore
ATTEMPTS = 4  # at what obstore does not ask for again
WEB_ATTEMPTS = 8
CLIENT_SETTINGS = ("ALLOW_HTTP", "ALLOW_INVALID_CERTIFICATES", "CONNECT_TIMEOUT", "READ_TIMEOUT", "TIMEOUT", "PROXY_URL", "PROXY_EXCLUDES")
FIRST_WAIT, LONGEST_WAIT = 0.1, 15.0  # seconds; doubled with each attempt, and drawn between half of it and all of it
BLOCK = 8 << 20  # bytes of one request where much is read in a row
PART = 16 << 20  # bytes of one part of an upload, or more where there would be too many parts
MAX_PARTS = 9_000
ROOM = 256 << 20  # bytes of objects that are read ahead, in each process

T = TypeVar("T")
R = TypeVar("R")


class StorageError(UserError):
    """A request that failed for good. The work so far is kept."""


class Missing(StorageError):  # noqa: N818 - as often an answer as an error
    """An object that is not there. `why` does not say where."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")
        self.url, self.why = url, why

    def __reduce__(self) -> tuple[Any, ...]:
        return Missing, (self.url, self.why)  # from one process to another


class Url(str):
    """A place in object storage or on the web, as much like a Path as is needed. Without a slash at its end."""

    def __new__(cls, text: str) -> Url:
        """Raises StorageError where the text is no URL that can be read."""
        parts = urlsplit(text)
        if parts.scheme not in (*STORES, *WEB) or not parts.netloc:
            raise StorageError(f"{text} is no URL of a bucket or a server; s3://bucket/folder would work")
        return super().__new__(cls, text.rstrip("/"))

    @property
    def scheme(self) -> str:
        """`s3`, `https`, ..."""
        return urlsplit(self).scheme

    @property
    def on_web(self) -> bool:
        """Whether it is read as a web page is."""
        return self.scheme in WEB

    @property
    def root(self) -> str:
        """Of the bucket or the server."""
        return self[: self.index("://") + 3] + self[self.index("://") + 3 :].partition("/")[0]

    @property
    def key(self) -> str:
        """The path in the bucket or on the server. Keys of objects may hold `?` and `#`."""
        return urlsplit(self).path.lstrip("/") if self.on_web else self[len(self.root) :].lstrip("/")

    @property
    def name(self) -> str:
        """The last part of the path, or the bucket's name."""
        return self.key.rpartition("/")[2] or self.root.partition("://")[2]

    @property
    def suffix(self) -> str:
        """`.parquet`, as of a Path."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> Url:
        """The folder that it lies in."""
        if self.on_web:
            return Url(urlunsplit((*urlsplit(self)[:2], urlsplit(self).path.rpartition("/")[0], "", "")))
        return Url(f"{self.root}/{self.key.rpartition('/')[0]}")

    def __truediv__(self, name: str) -> Url:
        """What has that name below it."""
        return Url(f"{self}/{quote(name) if self.on_web else name}")

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)

    def below(self, path: str) -> Url:
        """What a relative path leads to. Raises StorageError where it leaves the bucket, or would be a path of some machine."""
        joined = posixpath.normpath(posixpath.join(unquote(self.key) if self.on_web else self.key, path))
        if path.startswith("/") or joined.split("/")[0] in ("", ".", ".."):
            raise StorageError(f"{path} leads out of {self.root}")
        return Url(self.root) / joined


Location = Path | Url


def is_url(text: str) -> bool:
    """Whether a word names something in object storage or on the web."""
    return text.partition("://")[0].lower() in (*STORES, *WEB) and "://" in text


def location(text: str) -> Location:
    """The path or URL that a word on the command line stands for."""
    return Url(text) if is_url(text) else Path(text)


# ----------------------------------------------------------------------------------------------------------- requests


class _Passing(Exception):  # noqa: N818 - not an error yet
    """What another attempt may mend."""


def _again(url: str, attempts: int, action: Callable[[], R]) -> R:
    """The action's result, asked for again where that may help."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except _Passing as error:
            if attempt == attempts:
                raise StorageError(f"{url} cannot be had: {error}, {attempts} times; the same command goes on when it can") from None
            time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
    raise AssertionError("attempts is at least 1")


@functools.lru_cache
def _home() -> int:
    """The process that obstore's threads run in: the one that made the first request, and not what is forked from it."""
    return os.getpid()


@functools.lru_cache
def _store(root: str) -> Any:
    """The bucket; where, and with whose credentials, the environment says."""
    try:
        import obstore.store
    except ModuleNotFoundError:
        raise StorageError(f"{root} needs obstore, which is not installed; `pip install 'vitscale[cloud]'` brings it") from None
    backoff = {"init_backoff": timedelta(seconds=FIRST_WAIT), "max_backoff": timedelta(seconds=LONGEST_WAIT), "base": 2}
    retry: Any = {"max_retries": RETRIES, "backoff": backoff, "retry_timeout": timedelta(minutes=3)}
    client: Any = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "30min", **_told_of_the_client(os.environ)}
    try:
        return obstore.store.from_url(root, retry_config=retry, client_options=client)
    except Exception as error:  # an environment that does not tell enough, or odd things
        raise StorageError(f"{root} cannot be asked: {_line(error)}") from None


def _told_of_the_client(environment: Mapping[str, str]) -> dict[str, str]:
    """AWS_ALLOW_HTTP and the like, which obstore reads from the environment only where it is given none of them."""
    found = (re.fullmatch(f"(?:AWS|GOOGLE|AZURE)_({'|'.join(CLIENT_SETTINGS)})", name) for name in environment)
    return {match[1].lower(): environment[match[0]] for match in found if match}


def _line(error: BaseException) -> str:
    """What obstore says of an error, in some words: it tells all of a request and its answer."""
    text = str(error)
    code = re.search(r"<Code>(.*?)</Code>", text)
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", text)
    if status:
        return f"the server says {status[1].strip()}{f' ({code[1]})' if code else ''}"
    first = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^Generic \w+ error: ", "", first)[:300]


def _asked(url: Url, action: Callable[[Any], R]) -> R:
    """The action's result on the bucket of a URL."""
    if _home() != os.getpid():
        raise StorageError(f"{url} cannot be read in a process that was forked after a bucket was asked; start such processes by spawn")
    store = _store(url.root)
    from obstore import exceptions

    def once() -> R:
        try:
            return action(store)
        except FileNotFoundError as error:
            bucket = "NoSuchBucket" in str(error)
            raise Missing(url.root if bucket else url, os.strerror(errno.ENOENT)) from None  # as of a file
        except exceptions.PreconditionError:
            raise StorageError(f"{url} has changed while it was read; start again when it changes no more") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StorageError(f"{url} may not be had with the credentials of this environment: {_line(error)}") from None
        except exceptions.AlreadyExistsError:
            raise
        except exceptions.GenericError as error:
            if "status code: 416" in str(error):
                raise StorageError(f"{url} is shorter than it should be; put the whole file there again") from None
            if "status code:" not in str(error) and re.search(
                r"HTTP error|response body|error sending request|Requested \d+\.\.\d+, got", str(error)
            ):
                raise _Passing(_line(error)) from None  # the connection's fault; a 5xx has been asked again often enough
            raise StorageError(f"{url} cannot be had: {_line(error)}; the same command goes on when it can") from None
        except ValueError as error:  # of a key that no object can have
            raise Missing(url, _line(error)) from None
        except (exceptions.BaseError, OSError) as error:
            raise StorageError(f"{url} cannot be had: {_line(error)}") from None

    return _again(url, ATTEMPTS, once)


@functools.lru_cache(maxsize=1)
def _web(process: int) -> Any:
    """Connections of one process: what is forked from it must not speak through them."""
    try:
        import urllib3
    except ModuleNotFoundError:
        raise StorageError("http:// needs urllib3, which is not installed; `pip install 'vitscale[cloud]'` brings it") from None
    retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
    told = os.environ.get("HTTP_READ_TIMEOUT", "60s")
    if not re.fullmatch(r"\d{1,5}s", told):
        raise StorageError(f"HTTP_READ_TIMEOUT={told} must be a number of seconds; 60s is usual")
    return urllib3.PoolManager(num_pools=64, maxsize=64, retries=retries, timeout=urllib3.Timeout(connect=10, read=int(told[:-1])))


def _from_web(url: Url, headers: dict[str, str], take: Callable[[Any], R]) -> R:
    """What `take` makes of the answer to a GET. `Missing` is what the server says no to, or what has no server."""
    pool = _web(os.getpid())
    from urllib3 import exceptions

    def once() -> R:
        try:
            answer = pool.request("GET", str(url), headers={"Accept-Encoding": "identity", **headers}, preload_content=False)
            try:
                if answer.status in (408, 425, 429) or answer.status >= 500:
                    raise _Passing(f"the server says {answer.status}")
                if answer.status >= 300:
                    raise Missing(url, f"the server says {answer.status}")
                return take(answer)
            finally:
                answer.release_conn()
        except exceptions.MaxRetryError as error:
            reason = error.reason
            if isinstance(reason, exceptions.NameResolutionError) and _unknown_host(reason):
                raise Missing(url, "no host of that name") from None
            if isinstance(reason, exceptions.ResponseError):
                raise Missing(url, "redirected over and over") from None
            raise _Passing(str(reason).splitlines()[0]) from None
        except (exceptions.LocationValueError, UnicodeError) as error:  # among them a redirect to file://
            raise Missing(url, f"it, or what it redirects to, is no address on the web ({str(error).splitlines()[0]})") from None
        except (exceptions.HTTPError, OSError) as error:
            raise _Passing(f"{type(error).__name__}: {error}".splitlines()[0]) from None

    return _again(url, WEB_ATTEMPTS, once)


def _unknown_host(error: BaseException) -> bool:
    """Whether a name is known to be nobody's, rather than not to be had just now."""
    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(of, socket.gaierror) and of.errno in (socket.EAI_NONAME, socket.EAI_NODATA) for of in causes)


# -------------------------------------------------------------------------------------------------------- what there is


def entries(url: Url) -> tuple[list[str], list[str]]:
    """The names of the folders and of the objects right below. Raises Missing where there is neither."""
    if url.on_web:
        raise StorageError(f"{url} is a folder on the web, which cannot be listed; name a table or a tar, or give a table of URLs")
    prefix = url.key
    found = _asked(url, lambda store: store.list_with_delimiter(prefix or None))
    start = len(prefix) + 1 if prefix else 0
    folders = {path[start:] for path in found["common_prefixes"]}
    names = {entry["path"][start:] for entry in found["objects"]}
    names -= folders | {""}  # objects of no bytes that stand for folders
    if not folders and not names and not any(entry["path"] == prefix for entry in found["objects"]):
        raise Missing(url, os.strerror(errno.ENOENT))
    return sorted(folders), sorted(names)


def walk(url: Url) -> dict[str, int]:
    """The path from the URL, and the size, of every object below it."""
    prefix = url.key
    start = len(prefix) + 1 if prefix else 0
    found = _asked(
        url, lambda store: {entry["path"]: entry["size"] for chunk in store.list(prefix or None, chunk_size=1000) for entry in chunk}
    )
    return {path[start:]: size for path, size in found.items() if path[start:]}


def exists(url: Url) -> bool:
    """Whether there is such an object."""
    try:
        RemoteFile(url)
    except Missing:
        return False
    return True


def stamp(place: Location) -> str:
    """What changes when a file or an object does."""
    if isinstance(place, Url):
        return RemoteFile(place).stamp
    status = place.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


# -------------------------------------------------------------------------------------------------------------- reading


class RemoteFile(io.RawIOBase):
    """An object as a file that is read by ranges, by any number of threads. Raises Missing.

    Args:
        url: of the object.
        size: of the object, where it is known; then nothing is asked before the first range, and that tells the version.
    """

    def __init__(self, url: Url, size: int | None = None) -> None:
        super().__init__()
        self.url = url
        self._at = 0
        self._settling = threading.Lock()
        self._version: str | None = None
        if size is not None:
            self.size = size
        elif url.on_web:
            self.size, self._version = _from_web(url, {"Range": "bytes=0-0"}, lambda answer: _ranged(url, answer, 0))
        else:
            said = _asked(url, lambda store: store.head(url.key))
            self.size, self._version = said["size"], _version(said)

    @property
    def stamp(self) -> str:
        """What changes when the object does."""
        return f"{self.size} bytes, version {self._version}"

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes [start, end), which must lie in the file, of the version that was opened or first read."""
        asked_for = self._version
        get = self._get_from_web if self.url.on_web else self._get
        data, size, version = get(start, end, asked_for)
        with self._settling:  # of several first answers the first one counts
            if self._version is None and size == self.size:
                self._version = version
        if size != self.size and asked_for is None:
            raise StorageError(f"{self.url} has {size} bytes where {self.size} were expected; put the whole file there again")
        if size != self.size or version != self._version:
            raise StorageError(f"{self.url} has changed while it was read; start again when it changes no more")
        if len(data) != end - start:
            raise StorageError(f"{self.url} gave {len(data)} bytes where {end - start} were asked for")
        return data

    def _get(self, start: int, end: int, version: str | None) -> tuple[bytes, int, str]:
        """The bytes, and the size and version of the object that they are of."""
        known = {"if_match": version} if version and version.startswith('"') else {}

        def get(store: Any) -> tuple[bytes, int, str]:
            answer = store.get(self.url.key, options={"range": (start, end), **known})
            return bytes(answer.bytes()), answer.meta["size"], _version(answer.meta)

        return _asked(self.url, get)

    def _get_from_web(self, start: int, end: int, version: str | None) -> tuple[bytes, int, str]:
        def take(answer: Any) -> tuple[bytes, int, str]:
            size, found = _ranged(self.url, answer, start)
            return answer.read(end - start + 1), size, found  # an answer without end is too long, not all of this machine's memory

        return _from_web(self.url, {"Range": f"bytes={start}-{end - 1}"}, take)  # a version that has changed shows in the answer

    def read(self, size: int | None = -1, /) -> bytes:
        """All that is asked for, up to the end; much is asked for in blocks, some at once."""
        start = self._at
        end = self.size if size is None or size < 0 else min(start + size, self.size)
        if end <= start:
            return b""
        cuts = [*range(start, end, BLOCK), end]
        if len(cuts) == 2:
            data = self.fetch(start, end)
        else:
            with ThreadPoolExecutor(4) as pool:
                data = b"".join(pool.map(self.fetch, cuts[:-1], cuts[1:]))
        self._at = end
        return data

    def readinto(self, buffer: Any, /) -> int:
        """As of any raw file."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any file."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True


def _version(said: Mapping[str, Any]) -> str:
    return said["e_tag"] or str(said["last_modified"])


def _ranged(url: Url, answer: Any, start: int) -> tuple[int, str]:
    """Size and version of a file on the web, from the answer to a request for a range that begins at `start`."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status != 206 or told is None:
        raise StorageError(f"{url} cannot be read in parts, as its server sends all or nothing; download it")
    if int(told[1]) != start:
        raise _Passing(f"bytes from {told[1]} on came where those from {start} on were asked for")
    return int(told[2]), answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "unknown"


def sequential(place: Location) -> io.BufferedReader:
    """A file or an object, to be read from front to back."""
    if isinstance(place, Url):
        return io.BufferedReader(RemoteFile(place), BLOCK)
    return place.open("rb")


def read_object(url: Url, limit: int, room: Callable[[int], None] | None = None) -> bytes | int:
    """All bytes of an object, or its size where that is above the limit; `room` is asked for before they are read. Raises Missing."""
    if url.on_web:

        def take(answer: Any) -> bytes | int:
            size = int(answer.headers.get("Content-Length") or -1)
            if size > limit:
                return size
            (room or _no_room)(size if size >= 0 else BLOCK)  # or about that
            data: bytes = answer.read(limit + 1)  # raises where fewer come than were promised
            return data if len(data) <= limit else len(data)

        return _from_web(url, {}, take)

    def read(store: Any) -> bytes | int:
        answer = store.get(url.key)
        size: int = answer.meta["size"]
        if size > limit:
            return size
        (room or _no_room)(size)
        return bytes(answer.bytes())

    return _asked(url, read)


class _Room:
    """Bytes that may be held at once by those who read ahead. The one whose turn it is always gets what it needs, so that nobody waits
    for ever."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._turn = 0
        self._held: dict[int, int] = {}
        self._changed = threading.Condition()

    def take(self, number: int, size: int) -> None:
        with self._changed:
            self._free += self._held.pop(number, 0)  # of an attempt before
            self._changed.wait_for(lambda: size <= self._free or number <= self._turn)
            self._held[number] = size
            self._free -= size

    def next_turn(self, number: int) -> None:
        """Those before the number have been handed on."""
        with self._changed:
            for done in [held for held in self._held if held < number]:
                self._free += self._held.pop(done)
            self._turn = max(self._turn, number)
            self._changed.notify_all()


def _no_room(size: int) -> None:
    """Asked for by who reads nothing ahead."""


def in_turn(
    items: Iterable[T], remote: Callable[[T], bool], read: Callable[[T, Callable[[int], None]], R], requests: int, room: int = ROOM
) -> Iterator[R]:
    """What `read` makes of each item, in order; up to `requests` of those that are remote are read ahead, in no more room than given, or
    than one of them needs. An error is raised in its turn, and items that are not remote are read in theirs."""
    shared = _Room(room)
    waiting: deque[tuple[int, Future[R] | None, T]] = deque()
    pool: ThreadPoolExecutor | None = None

    def first() -> R:
        number, future, item = waiting.popleft()
        shared.next_turn(number)
        return future.result() if future is not None else read(item, _no_room)

    try:
        for number, item in enumerate(items):
            future = None
            if remote(item):
                pool = pool or ThreadPoolExecutor(requests)
                future = pool.submit(read, item, functools.partial(shared.take, number))
            elif not waiting:  # the short way, as in a pack without anything remote
                yield read(item, _no_room)
                continue
            waiting.append((number, future, item))
            if len(waiting) >= requests:
                yield first()
        while waiting:
            yield first()
    finally:
        shared.next_turn(1 << 62)  # nobody waits any more
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is told at once


# -------------------------------------------------------------------------------------------------------------- writing


def put(url: Url, source: Path | bytes) -> None:
    """Writes an object, and makes sure that it holds the bytes of the source.

    A server's ETag tells that where it is the MD5 of the object, or of the MD5s of its parts, as S3's is unless it is encrypted with a key
    of one's own; elsewhere the object is read again.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    part = max(PART, -(-size // MAX_PARTS))
    options: dict[str, Any] = {"use_multipart": size > part, "chunk_size": part, "max_concurrency": 4}
    told = _asked(url, lambda store: store.put(url.key, source, **options))
    if (told["e_tag"] or "").strip('"') == _md5_tag(source, part if size > part else None):
        return
    there = RemoteFile(url)
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as ours:
        same = there.size == size
        while same and (block := ours.read(BLOCK)):
            same = there.read(len(block)) == block
    if not same:
        raise StorageError(f"{url} does not hold what was put there; is somebody else writing it? The same command puts it again")


def _md5_tag(source: Path | bytes, part: int | None) -> str:
    """The ETag that S3 gives to an object that was put whole, or in parts of that size."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        if part is None:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        digests = [hashlib.md5(block, usedforsecurity=False).digest() for block in iter(lambda: file.read(part), b"")]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def put_new(url: Url, data: bytes) -> bool:
    """Writes an object unless there is one already, in one step; whether there is now one with these bytes."""
    with suppress(_exceptions().AlreadyExistsError):  # perhaps by an attempt of ours whose answer was lost
        _asked(url, lambda store: store.put(url.key, data, mode="create", use_multipart=False))
    return read_object(url, limit=len(data)) == data


def _exceptions() -> Any:
    from obstore import exceptions

    return exceptions


def delete(url: Url) -> None:
    """Removes an object, if it is there."""
    with suppress(Missing):
        _asked(url, lambda store: store.delete(url.key))
