"""The samples of a shard as WebDataset groups them: of whole pages in memory, and of a whole tar in a store."""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from typing import Any

from naign.data.format.manifest import Shard
from naign.data.format.pages import Pager
from naign.data.format.tar import members
from naign.errors import InputError
from naign.storage.base import Store

_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as WebDataset's, whose import would wait for torch


def samples(page: bytes) -> Iterator[dict[str, Any]]:
    """The samples in the bytes of whole pages. Raises tarfile.TarError or ValueError where they are none."""
    files = members(lambda first, last: page[first:last], hashed=True)
    return grouped((*split, data) for name, _, _, data in files if data is not None and (split := key_and_suffix(name)))


def scan(
    store: Store, name: str, pager: Pager, advance: Callable[[int], object] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The samples of a shard; `pager` measures all its bytes, and `advance` gets the number of each piece of them.
    Raises InputError where they are no uncompressed tar or end early, or a sample has two members of a suffix.
    """
    where = store.url(name)
    with closing(store.pieces(name)) as pieces:

        def more() -> bool:
            data = next(pieces, b"")
            advance(pager.write(data))
            return bool(data)

        try:
            yield from grouped(_measured(pager, more, where), f"{where}, ")
            while more():
                pass
        except InputError:
            raise
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{where}: truncated or no tar ({error}): copy it again, or repack the data set") from None


def examine(
    store: Store,
    name: str,
    check: Callable[[dict[str, Any]], None],  # of a sample: raises InputError
    seen: dict[str, str],  # shards by key, of those among which a key may occur once; added to
    *,
    whole: bool = True,  # also hash the shard as a whole
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[list[str], Shard | None, bytes]:
    """The problems of a shard, its entry in the manifest, and its page table; None and b"" if it cannot be read."""
    where, problems, pager = store.url(name), list[str](), Pager(whole=whole)
    try:
        for sample in scan(store, name, pager, advance):
            key = sample["__key__"]
            if key in seen:
                problems.append(f"{where}, key {key}: also in {seen[key]}: repack the data set")
            seen[key] = name
            try:
                check(sample)
            except InputError as error:
                problems.append(str(error))
    except InputError as error:  # missing, or no tar from some byte on
        return [*problems, str(error)], None, b""
    if not pager.samples:
        problems.append(f"{where}: holds no samples: remove it")
    rest = pager.get(pager.after, pager.size)
    if len(rest) < 2 * tarfile.BLOCKSIZE:  # cut between two samples it reads as if whole
        problems.append(f"{where}: ends in the middle: no end-of-archive mark: copy it again")
    elif rest.strip(b"\0"):
        problems.append(f"{where}: more data behind the end of the archive, as of tars laid end to end: repack them")
    return problems, *pager.shard(name)


def _measured(pager: Pager, more: Callable[[], bool], where: str) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and bytes of each member of a sample. `more` writes bytes to `pager`, which measures the samples."""

    def read(first: int, last: int) -> bytes:
        while pager.size < last and more():
            pass
        return pager.get(first, last)

    previous = None
    for member in members(read, where):
        pager.after = member.end
        if member.data is None or not (split := key_and_suffix(member.name)):
            if not pager.samples:
                pager.skip(member.end)
            continue
        if not split[0].isprintable():
            raise InputError(f"{where}, key {split[0]!r}: not printable UTF-8: repack the data set")
        if split[0] != previous:
            previous = split[0]
            pager.start(member.begin)
        yield *split, member.data
        pager.end = member.end
    if not pager.after:
        raise tarfile.ReadError("it begins with zeros" if pager.size else "empty file")


def grouped(members: Iterable[tuple[str, str, bytes]], where: str = "") -> Iterator[dict[str, Any]]:
    """The samples of members (key, suffix, bytes) as WebDataset gives them: `__key__`, and the bytes by suffix."""
    for key, files in groupby(members, key=itemgetter(0)):
        sample: dict[str, Any] = {"__key__": key}
        for _, suffix, data in files:
            if suffix in sample:
                raise InputError(f"{where}key {key}: two members end in .{suffix}: repack the data set")
            sample[suffix] = data
        yield sample


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member's name, as WebDataset splits it; None where WebDataset ignores the member."""
    first = name.partition("/")[0]
    if len(first) >= 4 and first.startswith("__") and first.endswith("__"):
        return None
    match = _SPLIT.fullmatch(name)
    return match and (match[1], match[2].lower())
