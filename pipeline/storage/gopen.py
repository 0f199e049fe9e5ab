"""A file in a store as a stream, for other programs: `webdataset.gopen_schemes["s3"] = gopen`."""

import io
from collections.abc import Generator
from typing import Any, BinaryIO

from pipeline.errors import InputError
from pipeline.storage.store import locate


def gopen(url: str, mode: str = "rb", bufsize: int = 8192) -> BinaryIO:
    """The file at an address, read ahead in bounded memory and never silently cut. Raises InputError."""
    if "r" not in mode:
        raise InputError(f"{url}: mode {mode!r}: streams are only read; write data sets with `naign pack`")
    store, name = locate(url)
    store.size(name)  # a missing file must raise here, not at the first read
    return io.BufferedReader(_Stream(store.pieces(name)), max(bufsize, 1 << 20))


class _Stream(io.RawIOBase):
    """A raw stream over pieces that follow one another."""

    def __init__(self, pieces: Generator[bytes]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the present piece reaches; 0 at the end."""
        while not self._left:
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()
