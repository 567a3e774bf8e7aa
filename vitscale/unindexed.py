"""Which tars without an index a run is given: a folder or a prefix with tars and no dataset.json, a tar, or a pattern with braces.

Where it stands: `resolve.py` and `run.py` ask what `--data` names; `foreign.py` reads the tars. What a run on them can and cannot promise
is `Tars.guarantees`.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from data_tools.dataset import Dataset
from data_tools.errors import UserError
from data_tools.index import COMPRESSED_SUFFIXES
from data_tools.storage import Location, Missing, RemoteFile, Url, entries, exists, location

WINDOW = 2048  # samples shuffled together, unless stream.window says how many
_ASKED_AT_ONCE = 16  # objects whose sizes are asked for


class UnindexedError(UserError):
    """Tars that cannot be trained on as asked; the message is one line for the user."""


@dataclass(frozen=True)
class Tars:
    """Tars without an index; what it knows of a dataset it says by the names of `mixture.Mixture`."""

    said: tuple[str, ...]
    """The words that named them."""
    shards: tuple[Location, ...]
    num_samples: ClassVar[int] = 0
    """Nobody knows: a run on them has its length in steps."""
    num_removed: ClassVar[int] = 0
    components: ClassVar[tuple[Dataset, ...]] = ()
    class_names: ClassVar[tuple[str, ...] | None] = None

    @property
    def names_hash(self) -> str:
        """Of their names in order, which is what ranks must agree on; nothing is asked for it."""
        return hashlib.sha256(json.dumps([shard.name for shard in self.shards]).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a run remembers of them. Raises UnindexedError where one is not there."""
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            sizes = list(pool.map(_size, self.shards))
        listed = json.dumps([(shard.name, size) for shard, size in zip(self.shards, sizes, strict=True)])
        path, content = " ".join(self.said), hashlib.sha256(listed.encode()).hexdigest()
        return {
            "kind": "tars", "path": path, "name": path, "hash": content, "names_hash": self.names_hash, "shards": len(sizes),
            "bytes": sum(sizes),
        }  # fmt: skip

    def guarantees(self, world_size: int, window: int) -> str:
        """What a run on them can and cannot promise, and how it could promise more, in some lines."""
        remote = any(isinstance(shard, Url) for shard in self.shards)
        path = " ".join(self.said)
        index = (
            f"download them, and `vitscale data index TARS` or `vitscale pack {path} OUT`" if remote else f"`vitscale data index {path}`"
        )
        lines = [
            f"{path}: {len(self.shards):,} tars without an index, read as streams: ordered by seed and shard, shuffled among {window:,} "
            "samples; a resume begins at a shard's beginning, so samples come again; every rank has equally many batches",
            f"{index} makes a dataset of them: each sample exactly once an epoch, and an exact resume at any number of ranks",
        ]
        if len(self.shards) < world_size:
            lines.append(f"warning: {len(self.shards):,} tars are fewer than {world_size} ranks, some of which read the same tars at once")
        return "\n".join(lines)


def named_tars(words: tuple[str, ...]) -> Tars | None:
    """The tars that `--data` names; None where it names datasets, or nothing that can be told.

    Raises UnindexedError where it names tars that cannot be read as streams, StorageError where a bucket cannot be asked.
    """
    found = {word: _shards(word) for word in words}
    tars = [shard for shards in found.values() for shard in shards or ()]
    if not tars:
        return None
    if datasets := [word for word, shards in found.items() if shards is None]:
        raise UnindexedError(
            f"--data {' '.join(words)} mixes tars without an index and {datasets[0]}; `vitscale data index` makes datasets of tars, "
            "which can be mixed"
        )
    names = Counter(str(shard) for shard in tars)
    if twice := [name for name, times in names.items() if times > 1]:
        raise UnindexedError(f"--data names {twice[0]} twice; name each tar once")
    return Tars(words, tuple(tars))


def _shards(word: str) -> list[Location] | None:
    """The tars that one word names; None where it is no name of tars."""
    if word.startswith("pipe:"):
        raise UnindexedError(f"--data {word} would run a command, which vitscale never does; name the tars, on a disk, s3:// or https://")
    if "{" not in word or os.path.exists(word):
        place = location(word)
        if place.name.lower().endswith(".tar") and (isinstance(place, Url) or not place.is_dir()):
            return [place]
        return _tars_in(place)
    from webdataset.shardlists import expand_urls

    try:
        expanded = [location(name) for name in expand_urls(word)]
    except (ValueError, AssertionError) as error:  # braces that do not close, a variable that is not set
        raise UnindexedError(f"--data {word} cannot be expanded ({error}); tars/{{000..099}}.tar would work") from None
    for place in expanded:
        if place.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise UnindexedError(f"{place} of --data {word} is compressed; unpack it first")
        if not place.name.lower().endswith(".tar") or str(place).startswith("pipe:"):
            raise UnindexedError(f"{place} of --data {word} is no tar by its name; tars/{{000..099}}.tar would work")
    return expanded


def _tars_in(folder: Location) -> list[Location] | None:
    """The tars right in a folder that is no dataset; None where there are none."""
    if isinstance(folder, Url):
        if folder.on_web or exists(folder / "dataset.json"):
            return None
        try:
            names = entries(folder)[1]
        except Missing:
            return None
        return [folder / name for name in names if name.lower().endswith(".tar")] or None
    if not folder.is_dir() or (folder / "dataset.json").is_file():
        return None
    return sorted((path for path in folder.iterdir() if path.name.lower().endswith(".tar")), key=os.fsencode) or None  # type: ignore[return-value]


def _size(shard: Location) -> int:
    if isinstance(shard, Url):
        try:
            return RemoteFile(shard).size
        except Missing as error:
            raise UnindexedError(f"{shard} cannot be read ({error.why}); put it there, or name the tars that are there") from None
    try:
        status = shard.stat()
    except OSError as error:
        raise UnindexedError(f"{shard} cannot be read ({error.strerror}); put it there, or name the tars that are there") from None
    if not stat.S_ISREG(status.st_mode):  # a named pipe, say, which would be waited for
        raise UnindexedError(f"{shard} is not a plain file; name tars")
    return status.st_size
