"""Pages: consecutive whole samples of a shard that are read and hashed together.

A tar has no index, and its one hash can be checked only by reading all of it. So beside a shard lies its page table:
where each page starts, by sample and by byte, and its SHA-256. With it any range of samples is one range of bytes,
whatever the size of the shard, and what arrives is checked before it is used.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from naign.data import order
from naign.data.decode import encode
from naign.data.format.manifest import Shard
from naign.data.format.tar import TAR_BLOCK
from naign.storage.base import Writer

PAGE = 256 << 10
"""Bytes after which a page ends, at the end of a sample. It also ends at each multiple of order.BLOCK samples, so that
blocks are whole pages. Of samples of 2 KB tables are .15 % of the data, of large ones less than .02 %."""

ROW = np.dtype({"names": ["sample", "byte", "sha256"], "formats": ["<i8", "<i8", "V32"]})
"""A page's first sample, first byte, and hash. One more row says where the last page ends; its hash is zero."""

Table = npt.NDArray[Any]  # (pages + 1,) of ROW


def table_name(shard: str) -> str:
    """The name of the file that holds a shard's page table."""
    return f"{shard.removesuffix('.tar')}.pages.npy"


class Pager:
    """Measures a tar from its bytes and the offsets at which its samples start; either may come first."""

    def __init__(self, target: Writer | None = None) -> None:
        """Bytes are passed on to the target."""
        self.size = 0  # bytes of the tar written so far
        self.samples = 0  # started so far
        self.end = 0  # byte behind the last sample
        self.after = 0  # byte behind the last member of the tar
        self._target = target
        self._bytes = bytearray()  # of the tar, from _start on: not hashed yet
        self._start = 0
        self._pages: list[tuple[int, int]] = []  # first sample and byte of each that is not hashed yet
        self._rows: list[tuple[int, int, bytes]] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Add the tar's next bytes."""
        if self._target:
            self._target.write(data)
        self.size += len(data)
        self._bytes += data
        self._hash_pages()
        return len(data)

    def start(self, offset: int) -> None:
        """Start a sample at this byte of the tar."""
        begins_block = self.samples % order.BLOCK == 0
        if begins_block or offset - self._pages[-1][1] >= PAGE:
            self._pages.append((self.samples, offset))
            self._hash_pages()
        self.samples += 1

    def skip(self, end: int) -> None:
        """Free the bytes before `end`, where no sample has started yet: no page will have them."""
        del self._bytes[: end - self._start]
        self._start = end

    def get(self, first: int, last: int) -> bytes:
        """Bytes [first, last), fewer where they are not written yet. `first` must not lie before the last sample."""
        with memoryview(self._bytes) as known:  # one copy, not two
            return known[first - self._start : last - self._start].tobytes()

    def shard(self, name: str) -> tuple[Shard, bytes]:
        """The entry of the tar, written whole, in the manifest, and the file of its page table; `end` must be set."""
        self._pages.append((self.samples, self.end))
        self._hash_pages()
        assert len(self._pages) == 1
        self._rows.append((self.samples, self.end, bytes(32)))
        table = encode(np.array(self._rows, ROW), "npy")
        shard = Shard(
            name=name,
            samples=self.samples,
            bytes=self.size,
            pages=hashlib.sha256(table).hexdigest(),
        )
        return shard, table

    def _hash_pages(self) -> None:
        """Hash the pages whose bytes are all known, and free these."""
        while len(self._pages) > 1:
            sample, first = self._pages[0]
            _, last = self._pages[1]
            if last > self.size:
                return
            del self._pages[0]
            digest = hashlib.sha256(self.get(first, last)).digest()
            self._rows.append((sample, first, digest))
            self.skip(last)


def parse_table(data: bytes, *, samples: int, size: int) -> Table:
    """The table in the bytes of a file. Raises ValueError where it is none, or not of such a shard."""
    header = 10 + int.from_bytes(data[8:10], "little")
    table: Table = np.frombuffer(data[header:], ROW)
    if len(table) < 2 or encode(table, "npy") != data:
        raise ValueError("not a page table")
    number = table["sample"]
    byte = table["byte"]
    block = byte // TAR_BLOCK
    if number[0] != 0 or number[-1] != samples or byte[0] < 0 or byte[-1] > size:
        raise ValueError(f"it is of another shard than one of {samples} samples in {size} bytes")
    for column in (number, block):
        if (column[1:] <= column[:-1]).any():
            raise ValueError("its pages are not in order")
    return table
