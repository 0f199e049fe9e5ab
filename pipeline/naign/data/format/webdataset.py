"""Members of a tar grouped into samples as WebDataset groups them: in pages that were read, and in a whole shard."""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

from naign.data.format.pages import TAR_BLOCK, Pager
from naign.errors import InputError
from naign.storage.base import Store

# WebDataset's own; importing it loads torch. Names whose first part is __metadata__ do not match.
_KEY_AND_SUFFIX = re.compile(r"(?!__[^/]*__(?:/|\Z))((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)

NO_TAR = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises for bytes that are not a tar."""

File = tuple[str, str, bytes]  # key, suffix and data of a member


def samples(page: bytes) -> Iterator[dict[str, Any]]:
    """The samples in the bytes of whole pages. Raises one of NO_TAR where they are none."""
    return grouped(_files(page))


def _files(page: bytes) -> Iterator[File]:
    for name, data in _members(page):
        split = key_and_suffix(name)
        if split:
            yield *split, data


def _members(page: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and data of the files in a page. tarfile reads what begins with a header of more than a name and a size: it
    takes twenty times as long. Checksums of plain headers are not compared: the page's SHA-256 was.
    """
    begin = 0
    while begin < len(page):
        start = begin + TAR_BLOCK
        header = page[begin:start]
        digits = header[124:136].strip(b" \0")
        is_plain = header[156:157] == b"0" and header[257:262] == b"ustar" and header[345:346] == b"\0"
        if not is_plain or not digits.isdigit():
            break
        name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
        size = int(digits, 8)
        data = page[start : start + size]
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        yield name, data
        begin = start + -(-size // TAR_BLOCK) * TAR_BLOCK
    if begin < len(page):
        with _open_stream(io.BytesIO(page[begin:])) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, _content(tar, member)


def _open_stream(file: Any) -> tarfile.TarFile:
    """A tar that is read once from start to end, from an object with `read`."""
    return tarfile.open(fileobj=file, mode="r|", encoding="utf-8")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream, "a file"
    return stream.read()


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
        except NO_TAR as error:
            raise InputError(f"{where}: truncated or no tar ({error}): copy it again, or repack the data set") from None


def _measured(pager: Pager, pieces: Iterator[bytes], where: str) -> Iterator[File]:
    """The files of a shard's samples. The pieces go to `pager`, which is told where samples start and end."""
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        while pager.size < position + size:
            data = next(pieces, b"")
            if not data:
                break
            pager.write(data)
        found = pager.get(position, position + size)
        position += len(found)
        return found

    previous = None
    with _open_stream(SimpleNamespace(read=read)) as tar:
        for member in tar:
            if member.islnk() or member.issym() or member.issparse():
                raise InputError(f"{where}: {member.name} is a link or sparse: repack it with the files")
            pager.after = tar.offset
            split = key_and_suffix(member.name)
            if split is None or not member.isfile():
                continue
            key, suffix = split
            if not key.isprintable():
                raise InputError(f"{where}, key {key!r}: not printable UTF-8: repack the data set")
            if key != previous:
                previous = key
                pager.start(member.offset)
            yield key, suffix, _content(tar, member)
            pager.end = tar.offset
