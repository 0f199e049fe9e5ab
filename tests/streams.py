"""Streams over any store, for WebDataset's own reader."""

import io

from naign.errors import require
from naign.storage.store import locate


def gopen(url, mode="rb", bufsize=8192):
    """A file as a stream, as for `webdataset.gopen_schemes["s3"] = gopen`; read ahead, never cut. Raises InputError."""
    require(("r" in mode, f"{url}: mode {mode!r}: streams are only read; write data sets with `naign pack`"))
    store, name = locate(url)
    store.size(name)  # a missing file must raise here, not at the first read
    return io.BufferedReader(_Stream(store.pieces(name)), max(bufsize, 1 << 20))


class _Stream(io.RawIOBase):
    """A raw stream over pieces that follow one another."""

    def __init__(self, pieces):
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        """Fill the buffer as far as the present piece reaches; 0 at the end."""
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self):
        self._pieces.close()
        super().close()
