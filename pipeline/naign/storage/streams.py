"""Files of any store as streams, for readers of other libraries."""

import io
from collections.abc import Generator
from os import fspath
from pathlib import Path

from naign.errors import check_address, require
from naign.storage.store import locate

AHEAD = 1 << 20  # bytes


def gopen(url: str | Path, mode: str = "rb", bufsize: int = 8192) -> io.BufferedReader:
    """A file to read, in a folder, a bucket or on a web server, with this package's retries and without cuts.

        webdataset.gopen_schemes["s3"] = naign.gopen  # likewise "gs", "az", "https"

    Raises InputError where there is no such file, or `mode` writes; Unavailable where the store stays out of reach.
    """
    address = fspath(url)
    check_address(address)
    require((mode in ("r", "rb"), f"{url}: mode {mode!r}: streams are only read; write data sets with `naign pack`"))
    store, name = locate(address)
    store.size(name)  # a missing file must raise here, not at the first read
    return io.BufferedReader(_Stream(store.pieces(name)), max(bufsize, AHEAD))


class _Stream(io.RawIOBase):
    """A raw stream over pieces that follow one another."""

    def __init__(self, pieces: Generator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the present piece reaches; 0 at the end."""
        if self._error:
            raise self._error  # else a reader that goes on would see an end
        if not self._left:
            try:
                self._left = memoryview(next(self._pieces, b""))
            except Exception as error:
                self._error = error
                raise
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()
