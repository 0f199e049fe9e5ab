"""What stores in a network share: reads of parallel ranges, retried, and resumed at the byte where they broke."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, TypeVar

from naign.errors import InputError, require
from naign.storage.base import Missing, Store
from naign.storage.prefetch import PARALLEL, PART, in_order
from naign.storage.retry import Patience, Tally

T = TypeVar("T")

NO_RANGES = "the server does not serve byte ranges: use another one, or copy the data to a local folder"
PIECE, SMALL_PIECE = 1 << 20, 1 << 15  # bytes of a body read at once; small ones lose less when the connection breaks


class Stat(NamedTuple):
    """What a server reports about a file."""

    size: int  # bytes
    version: str  # changes whenever the file does


class NetworkStore(Store):
    """A store whose requests can fail and are retried."""

    def __init__(self, path: str) -> None:
        self.path, self.tally = path, Tally()
        self._stats: dict[str, Stat] = {}  # as reported last

    @abstractmethod
    def _stat(self, name: str) -> Stat:
        """Ask the server about a file."""

    @abstractmethod
    def _range(self, name: str, version: str, first: int, last: int, piece: int) -> Iterator[bytes]:
        """Request bytes [first, last) of that version once; yields at most `piece` bytes at a time, as they arrive."""

    @staticmethod
    @abstractmethod
    def _is_transient(error: Exception) -> bool:
        """Whether the same request may succeed a moment later."""

    @abstractmethod
    def _explain(self, error: Exception, name: str) -> None:
        """Raise InputError for what the user can fix, Missing where there is no such file."""

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except Missing:
            return False
        return True

    def size(self, name: str) -> int:
        self._stats[name] = self._stat(name)
        return self._stats[name].size

    def version(self, name: str) -> str:
        return self._known(name).version

    def _known(self, name: str) -> Stat:
        if name not in self._stats:
            self.size(name)
        return self._stats[name]

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        return b"".join(self.pieces(name, first, last))

    def pieces(self, name: str, first: int = 0, last: int | None = None) -> Generator[bytes]:
        """Bytes [first, last) of one version of a file, in pieces; parts of PART bytes are fetched in parallel."""
        size, version = self._known(name)
        last = size if last is None else last
        if last > size:
            raise InputError(f"{self.url(name)}: {size} bytes where {last} were expected: truncated: copy it again")
        starts = range(first, last, PART)
        gets = (partial(self._get, name, version, start, min(start + PART, last)) for start in starts)
        with closing(in_order(gets, PARALLEL) if len(starts) > 1 else (get() for get in gets)) as parts:
            for part in parts:
                yield from part

    def _get(self, name: str, version: str, first: int, last: int) -> Sequence[bytes]:
        """Bytes [first, last). A body that breaks is resumed at the failed byte of the same version."""
        chunks: list[bytes] = []
        at, piece = first, PIECE
        patience = Patience(f"read {self.url(name)}", self.tally)
        while at < last:
            before = at
            try:
                for chunk in self._range(name, version, at, last, piece):
                    chunks.append(chunk)
                    at += len(chunk)
                if at < last:
                    raise ConnectionError(f"the body ended {last - at} bytes early")
            except Exception as error:
                if not self._is_transient(error):
                    self._explain(error, name)
                    raise
                patience.wait(error, at=f", byte {at}", progress=at > before)
                piece = SMALL_PIECE
        self.tally.add(bytes=last - first)
        return chunks

    def _retried(self, what: str, name: str, call: Callable[[], T]) -> T:
        """The answer to one request; transient failures are retried."""
        patience = Patience(f"{what} {self.url(name)}", self.tally)
        while True:
            try:
                return call()
            except Exception as error:
                if not self._is_transient(error):
                    self._explain(error, name)
                    raise
                patience.wait(error)


class BucketStore(NetworkStore):
    """The objects directly under one prefix of a bucket."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        scheme, _, rest = path.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        require((self._bucket, f"{path}: no bucket: write {scheme}://bucket/prefix"))
        prefix = prefix.strip("/")
        if prefix and set(prefix.split("/")) & {"", ".", ".."}:
            raise InputError(f"{path}: an empty, '.' or '..' part, which servers read differently: write it plainly")
        self._root, self._prefix = f"{scheme}://{self._bucket}", prefix and f"{prefix}/"

    def url(self, name: str) -> str:
        return f"{self._root}/{self._prefix}{name}"
