"""WebDataset tars as sources, read by the webdataset library's own rules; nothing in them is ever unpickled.

Where it stands: `sources.py` asks for a tar's candidates (`list_tar`) and for its images (`tar_images`), `sizes.py` for their sizes
(`tar_sizes`), each in one pass.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa

from data_tools.config import PackConfig, PackError
from data_tools.images import Reject
from data_tools.members import META, OpenTar, read_samples
from data_tools.origins import ROWS, Origin, Part
from data_tools.storage import Location, sequential
from data_tools.tables import LABEL_COLUMNS

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")  # of a sample in a tar


def is_tar(table: Location | None) -> bool:
    """Whether a source is a tar."""
    return table is not None and table.suffix.lower() == ".tar"


def list_tar(tar: Location, prefix: str, config: PackConfig) -> tuple[Origin, Iterator[Part]]:
    """Samples of a WebDataset tar: labels in a member `json` (`labels` and `scores`, or `label`) or `cls`."""

    def parts() -> Iterator[Part]:
        columns = config.label_column, config.score_column
        labelled = ((sample["__key__"], *labels_of(sample, tar, *columns)) for sample in tar_samples(tar))
        first = 0
        while chunk := list(itertools.islice(labelled, ROWS)):
            keys, labels, scores = zip(*chunk, strict=True)
            flat = [label for of in labels for label in of]
            kinds = {type(label) for label in flat}
            if not kinds <= {int} and not kinds <= {str}:
                raise PackError(f"{tar} has labels of {', '.join(sorted(kind.__name__ for kind in kinds))}; give all ints or all names")
            try:
                values = pa.array(flat, pa.large_string() if str in kinds else pa.int64())
                weights = pa.array([score for of in scores for score in of], pa.float32())
            except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError) as error:
                raise PackError(f"{tar} has labels or scores that are no such numbers: {error}") from None
            yield Part(
                row=np.arange(first, first + len(chunk), dtype=np.int64),
                path=pa.nulls(len(chunk), pa.large_binary()),
                raw_key=pa.array(keys, pa.large_string()),
                label_lengths=np.array([len(of) for of in labels], dtype=np.int64),
                labels=values,
                score_lengths=np.array([len(of) for of in scores], dtype=np.int64),
                scores=weights,
            )
            first += len(chunk)

    return Origin(prefix, tar.parent, tar), parts()


def tar_images(tar: Location) -> Iterator[bytes | Reject]:
    """The image of each sample of a tar."""
    for sample in tar_samples(tar):
        image = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
        yield image if image is not None else Reject("missing", f"no member of the sample is {', '.join(IMAGE_MEMBERS)}")


def tar_sizes(tar: Location) -> Iterator[int]:
    """The bytes of each image that `tar_images` gives, from the tar's headers; 0 where a sample has none."""
    with sequential(tar) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for _, members in read_samples(OpenTar(file, str(tar), size, hashed=False), IMAGE_MEMBERS, limit=-1):  # nothing is read
            yield next((members[suffix][0].size for suffix in IMAGE_MEMBERS if suffix in members), 0)


def tar_samples(tar: Location) -> Iterator[dict[str, Any]]:
    """The samples of a WebDataset tar in one pass, grouped by the webdataset library; its decoders, which unpickle, are not used."""
    from webdataset.tariterators import group_by_keys

    try:
        with sequential(tar) as file:
            yield from group_by_keys(_members(file, str(tar)))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise PackError(f"{tar} cannot be read: {str(error).splitlines()[0]}; write it again or leave it out") from None


def _members(file: IO[bytes], url: str) -> Iterator[dict[str, Any]]:
    """The members that the webdataset library would see."""
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_SoundHeader) as opened:
        for member in opened:
            if member.isreg() and not META.match(member.name):
                content = opened.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": url}
            opened.members = []  # type: ignore[attr-defined] # which grows otherwise


class _SoundHeader(tarfile.TarInfo):
    """A header that stops the reading where it is damaged: readers take such a one for the tar's end, and what follows is lost."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _SoundHeader:
        """As of any TarInfo."""
        if not any(buf):
            raise tarfile.EOFHeaderError("zeros end a tar") if buf else tarfile.EmptyHeaderError("empty")  # type: ignore[attr-defined]
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged ({error})") from None


def labels_of(
    sample: dict[str, Any], tar: Location, label_column: str | None = None, score_column: str | None = None
) -> tuple[list[Any], list[Any]]:
    """Labels and scores of a sample, as its `json` (by these names in it, or the usual ones) or `cls` tells them. Raises PackError where
    neither does."""
    where = f"sample {sample['__key__']} of {tar}"
    try:
        told = json.loads(sample["json"]) if "json" in sample else {}
        if not isinstance(told, dict):
            raise PackError(f"{where} has a json that is no object; an object with `labels` works")
        names = LABEL_COLUMNS if label_column is None else (label_column,)
        name = next((name for name in names if name in told), None)
        if name is None and "cls" in sample:
            return [int(sample["cls"])], []
    except ValueError as error:
        raise PackError(f"{where} has a damaged label: {error}") from None
    if name is None:
        raise PackError(f"{where} has no label: neither a `cls` nor a `json` with {' or '.join(names)}; give label_column")
    labels = told[name] if isinstance(told[name], list) else [told[name]]
    scores = told.get(score_column or "scores") or []
    if not isinstance(scores, list):
        scores = [scores]
    return labels, scores
