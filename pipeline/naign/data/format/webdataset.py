"""Members of a tar grouped into samples as WebDataset groups them: in pages that were read, and in a whole shard."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from typing import Any

from naign.data.format.pages import Pager
from naign.data.format.tar import members
from naign.errors import InputError
from naign.storage.base import Store

_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's own; importing it loads torch

_METADATA = re.compile(r"__([^/]*)__(/|\Z)")  # the first part of a name

File = tuple[str, str, bytes]  # key, suffix and data of a member


def samples(page: bytes) -> Iterator[dict[str, Any]]:
    """The samples in the bytes of whole pages. Raises tarfile.TarError or ValueError where they are none."""
    return grouped(_files(page))


def _files(page: bytes) -> Iterator[File]:
    for member in members(lambda first, last: page[first:last], hashed=True):
        split = key_and_suffix(member.name)
        if split and member.data is not None:
            yield *split, member.data


def grouped(files: Iterable[File], where: str = "") -> Iterator[dict[str, Any]]:
    """The samples of consecutive files as WebDataset gives them: `__key__`, and the data by suffix."""
    for key, group in groupby(files, key=itemgetter(0)):
        sample: dict[str, Any] = {"__key__": key}
        for _, suffix, data in group:
            if suffix in sample:
                raise InputError(f"{where}key {key}: two members end in .{suffix}: repack the data set")
            sample[suffix] = data
        yield sample


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member's name, as WebDataset splits it; None where WebDataset ignores the member."""
    if _METADATA.match(name):
        return None
    match = _KEY_AND_SUFFIX.fullmatch(name)
    return match and (match[1], match[2].lower())


def scan(store: Store, name: str, pager: Pager) -> Iterator[dict[str, Any]]:
    """The samples of a shard. `pager` measures all its bytes. Raises InputError where they are not an uncompressed tar
    or end early, or a sample has two members of a suffix.
    """
    where = store.url(name)
    with closing(store.pieces(name)) as pieces:
        try:
            yield from grouped(_measured(pager, pieces, where), f"{where}, ")
            for data in pieces:
                pager.write(data)
        except InputError:
            raise
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{where}: truncated or no tar ({error}): copy it again, or repack the data set") from None


def _measured(pager: Pager, pieces: Iterator[bytes], where: str) -> Iterator[File]:
    """The files of a shard's samples. The pieces go to `pager`, which is told where samples start and end."""

    def read(first: int, last: int) -> bytes:
        while pager.size < last:
            data = next(pieces, b"")
            if not data:
                break
            pager.write(data)
        return pager.get(first, last)

    previous = None
    for member in members(read, where):
        pager.after = member.end
        split = key_and_suffix(member.name)
        if split is None or member.data is None:
            if not pager.samples:
                pager.skip(member.end)
            continue
        key, suffix = split
        if not key.isprintable():
            raise InputError(f"{where}, key {key!r}: not printable UTF-8: repack the data set")
        if key != previous:
            previous = key
            pager.start(member.begin)
        yield key, suffix, member.data
        pager.end = member.end
    if not pager.after:
        raise tarfile.ReadError("empty file, or it begins with zeros")
