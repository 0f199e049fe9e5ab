"""Pages: consecutive whole samples of a shard that are read and hashed together.

A tar has no index, and its one hash can be checked only by reading all of it. So beside a shard lies its page table:
where each page starts, by sample and by byte, and its SHA-256. With it any range of samples is one range of bytes,
whatever the size of the shard, and what arrives is checked before it is used.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data import order
from pipeline.data.decode import encode, npy_header
from pipeline.data.format.shards import Shard
from pipeline.data.format.tar import BLOCK, Unusual, next_member
from pipeline.errors import InputError
from pipeline.storage.base import Writer

PAGE = 256 << 10  # a page ends at the first sample behind so many bytes, or at a multiple of order.BLOCK samples: then
# its blocks are whole pages. Of samples of 2 KB tables are .15 % of the data, of large ones less than .02 %.

_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset's, whose import would wait for torch

ROW = np.dtype([("sample", "<i8"), ("byte", "<i8"), ("sha256", "V32")])
"""A page's first sample, first byte, and hash. One more row says where the last page ends; its hash is zero."""

Table = npt.NDArray[Any]  # (pages + 1,) of ROW


def table_name(shard: str, tables: str = "") -> str:
    """Of the file that holds a shard's page table; `tables` is the manifest's."""
    return f"{shard.removesuffix('.tar')}.pages{tables}.npy"


class Pager:
    """Measures a tar from its bytes and the places where its samples start, whichever of the two is told first."""

    def __init__(
        self,
        target: Writer | None = None,  # what the bytes are passed on to
        *,
        whole: bool = True,  # hash the tar as a whole, too
    ) -> None:
        self._target, self._hash, self._size = target, hashlib.sha256() if whole else None, 0
        self._bytes = bytearray()  # of the tar, from _start on: what is not hashed yet
        self._start = 0
        self.samples = 0  # told so far
        self.end = self.after = 0  # byte behind the last sample, behind the last member of the tar
        self._pages: list[tuple[int, int]] = []  # first sample and byte of each that is not hashed yet
        self._rows: list[tuple[int, int, bytes]] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """The tar's next bytes."""
        if self._target:
            self._target.write(data)
        if self._hash:
            self._hash.update(data)
        self._size += len(data)
        self._bytes += data
        self._settle()
        return len(data)

    def start(self, offset: int) -> None:
        """A sample starts at this byte of the tar."""
        if not self._pages or offset - self._pages[-1][1] >= PAGE or self.samples % order.BLOCK == 0:
            self._pages.append((self.samples, offset))
            self._settle()
        self.samples += 1

    def get(self, first: int, last: int) -> bytes:
        """Bytes [first, last), fewer where they are not told yet. `first` must not lie before the sample told last."""
        with memoryview(self._bytes) as known:  # one copy, not two
            return known[first - self._start : last - self._start].tobytes()

    @property
    def told(self) -> int:
        """How many bytes are."""
        return self._size

    def rest(self, end: int) -> bytes:
        """The bytes from `end` on, which is the last sample's."""
        return bytes(self._bytes[max(0, end - self._start) :])

    def finish(self, end: int) -> Table:
        """The table of a tar, all of whose bytes are told, whose last sample ends at byte `end`."""
        self._pages.append((self.samples, end))
        self._settle()
        assert len(self._pages) == 1
        table: Table = np.array([*self._rows, (self.samples, end, bytes(32))], ROW)
        return table

    def shard(self, name: str) -> tuple[Shard, Table]:
        """What the manifest should say of the tar, and its page table, once all is told and `end` is set."""
        table = self.finish(self.end)
        pages = hashlib.sha256(dump_table(table)).hexdigest()
        digest = self._hash.hexdigest() if self._hash else ""
        return Shard(name=name, samples=self.samples, bytes=self._size, sha256=digest, pages=pages), table

    def _settle(self) -> None:
        while len(self._pages) > 1 and self._pages[1][1] <= self._start + len(self._bytes):
            (sample, first), (_, last) = self._pages[:2]
            with memoryview(self._bytes) as known:
                digest = hashlib.sha256(known[first - self._start : last - self._start]).digest()
            self._rows.append((sample, first, digest))
            del self._pages[0], self._bytes[: last - self._start]
            self._start = last


def dump_table(table: Table) -> bytes:
    """The bytes of its file."""
    return encode(table, "npy")


def parse_table(data: bytes | memoryview, *, samples: int, size: int) -> Table:
    """The table in the bytes of a file. Raises ValueError where it is none, or not of such a shard."""
    rows = (len(data) - len(npy_header((0,), ROW))) // ROW.itemsize  # a header's length is a multiple of 64
    header = npy_header((max(rows, 0),), ROW)
    if rows < 2 or data[: len(header)] != header or len(data) != len(header) + rows * ROW.itemsize:
        raise ValueError("no page table")
    table: Table = np.frombuffer(data, ROW, offset=len(header))
    columns = ((table["sample"], samples), (table["byte"], size))
    outside = any((column < 0).any() or (column > most).any() for column, most in columns)
    if outside or table["sample"][0] != 0 or table["sample"][-1] != samples:
        raise ValueError(f"it is of another shard than one of {samples} samples in {size} bytes")
    if (np.diff(table["sample"]) < 1).any() or (np.diff(table["byte"]) < BLOCK).any():
        raise ValueError("its pages are not in order")
    return table


def samples(page: bytes) -> Iterator[dict[str, Any]]:
    """The samples in the bytes of whole pages. Raises tarfile.TarError or ValueError where they are none."""
    return grouped((*named, data) for name, data in _members(page) if (named := key_and_suffix(name)))


def grouped(
    members: Iterable[tuple[str, str, bytes]],  # key, suffix and bytes of each, in order
    where: str = "",  # for messages
) -> Iterator[dict[str, Any]]:
    """The samples as WebDataset gives them: `__key__`, and the members' bytes by suffix."""
    sample: dict[str, Any] = {}
    for key, suffix, data in members:
        if key != sample.get("__key__"):
            if sample:
                yield sample
            sample = {"__key__": key}
        if suffix in sample:
            raise InputError(f"{where}key {key}: two members end in .{suffix}: repack the data set")
        sample[suffix] = data
    if sample:
        yield sample


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Of a member's name, as WebDataset splits it; None where WebDataset passes over it."""
    first = name.partition("/")[0]
    if len(first) >= 4 and first.startswith("__") and first.endswith("__"):
        return None
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot > slash:
        return name[:dot], name[dot + 1 :].lower()
    found = _SPLIT.match(name)
    return found and (found[1], found[2].lower())


def _members(page: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each regular file. Plain headers (POSIX ustar, no prefix) are read here."""
    at, end = 0, len(page)
    while at < end:
        if page[at + 257 : at + 262] != b"ustar" or page[at + 345] or page[at + 156] != 0x30:
            try:
                member = next_member(lambda first, last: page[first:last], at)
            except Unusual:
                yield from _unusual(page[at:])
                return
            if member is None:
                return
            if member.is_file:
                yield member.name, page[member.start : member.start + member.size]
            at = member.end
            continue
        name = page[at : at + 100].split(b"\0", 1)[0].decode(errors="surrogateescape")
        if (size := int(page[at + 124 : at + 136].rstrip(b" \0"), 8)) < 0:
            raise tarfile.ReadError(f"the header of {name} claims {size} bytes")
        at += BLOCK
        yield name, page[at : at + size]
        at += -(-size // BLOCK) * BLOCK
    if at != end:
        raise tarfile.ReadError("a member is longer than its page")


def _unusual(page: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(page), mode="r:") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isreg() else None
            if stream:
                yield member.name, stream.read()
