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

TAR_BLOCK = 512  # bytes; a tar's headers and data are padded to multiples of it
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
    """Measures a tar from its bytes and the offsets at which its samples start."""

    def __init__(self) -> None:
        self.size = 0  # bytes of the tar written so far
        self.samples = 0  # started so far
        self.end = 0  # byte behind the last sample
        self.after = 0  # byte behind the last member of the tar
        self._bytes = bytearray()  # of the tar, from _start on
        self._start = 0  # byte at which the last page starts
        self._first = 0  # its first sample
        self._rows: list[tuple[int, int, bytes]] = []

    def write(self, data: bytes) -> None:
        """Add the tar's next bytes."""
        self.size += len(data)
        self._bytes += data

    def start(self, offset: int) -> None:
        """Start a sample at this byte of the tar; those before it have been written."""
        if self.samples % order.BLOCK == 0 or offset - self._start >= PAGE:
            self._turn_page(offset)
        self.samples += 1

    def get(self, first: int, last: int) -> bytes:
        """Bytes [first, last), fewer where they are not written yet. `first` must not lie before the last sample."""
        with memoryview(self._bytes) as known:  # one copy, not two
            return known[first - self._start : last - self._start].tobytes()

    def shard(self, name: str) -> tuple[Shard, bytes]:
        """The entry of the tar, written whole, in the manifest, and the file of its page table; `end` must be set."""
        self._turn_page(self.end)
        self._rows.append((self.samples, self.end, bytes(32)))
        table = encode(np.array(self._rows, ROW), "npy")
        shard = Shard(
            name=name,
            samples=self.samples,
            bytes=self.size,
            pages=hashlib.sha256(table).hexdigest(),
        )
        return shard, table

    def _turn_page(self, offset: int) -> None:
        """Hash the page that ends before this byte, where the next one starts, and free its bytes."""
        if self.samples:
            digest = hashlib.sha256(self.get(self._start, offset)).digest()
            self._rows.append((self._first, self._start, digest))
        del self._bytes[: offset - self._start]
        self._start = offset
        self._first = self.samples


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
