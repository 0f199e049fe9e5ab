"""What stores in a network share: reads of parallel ranges, retried, and resumed at the byte where they broke."""

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from naign.errors import InputError, require
from naign.storage.base import Missing, Store
from naign.storage.prefetch import PARALLEL, in_order
from naign.storage.retry import Patience, Tally

T = TypeVar("T")

RANGE = 16 << 20  # bytes of a file asked for at once: half as many would cost a third of the speed of a fast server
PIECE = 1 << 20  # bytes of a body read at once
SMALL_PIECE = 1 << 15  # the same after a failure: less is lost when the connection breaks
PART = 16 << 20  # bytes of a part of an upload

NO_RANGES = "the server does not serve byte ranges: use another one, or copy the data to a local folder"
MEANINGS = {
    401: "access denied ({}): check the credentials and what they may do there",
    403: "access denied ({}): check the credentials and what they may do there",
    412: "replaced while it was being read: verify the data set, and start again",
    416: "shorter than expected: copy it again, or repack the data set",
}
"""What a refusal means, by HTTP status."""

answered = set[str]()  # servers that have answered this process, if only by an error
granted = set[tuple[str, str]]()  # (path, operation): what a server has granted this process


class Stat(NamedTuple):
    """What a server reports about a file."""

    size: int  # bytes
    version: str  # changes whenever the file does, such as its ETag


class Failure(NamedTuple):
    """Why a request failed."""

    reason: str  # on one line
    status: int = 0  # of HTTP; 0: no server has answered
    transient: bool = False  # the same request may succeed a moment later


class NetworkStore(Store):
    """The objects directly under one prefix of a bucket, or of a web server. Requests can fail and are retried."""

    remedy = "check the path and the account"  # for refusals without a meaning of their own

    def __init__(self, path: str) -> None:
        self.path = path
        self.tally = Tally()
        self._stats: dict[str, Stat] = {}  # as reported last
        scheme, _, rest = path.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        require((self._bucket, f"{path}: no bucket: write {scheme}://bucket/prefix"))
        prefix = prefix.strip("/")
        if prefix and set(prefix.split("/")) & {"", ".", ".."}:
            raise InputError(f"{path}: an empty, '.' or '..' part, which servers read differently: write it plainly")
        self._root = f"{scheme}://{self._bucket}"
        self._prefix = prefix and f"{prefix}/"

    @abstractmethod
    def _ask_stat(self, name: str) -> Stat:
        """Ask the server about a file."""

    @abstractmethod
    def _range(
        self,
        name: str,
        version: str,
        first: int,
        last: int,
        piece: int,
    ) -> Iterator[bytes]:
        """Request bytes [first, last) of that version once; yields at most `piece` bytes at a time, as they arrive."""

    @abstractmethod
    def _upload(self, name: str, file: BinaryIO) -> None:
        """Write a file whole or not at all."""

    @staticmethod
    @abstractmethod
    def _failure(error: Exception) -> Failure | None:
        """What an error of a request means; None for an error of another kind."""

    @staticmethod
    @abstractmethod
    def forget_client() -> None:
        """The next request reads credentials and addresses again."""

    def url(self, name: str) -> str:
        return f"{self._root}/{self._prefix}{name}"

    def size(self, name: str) -> int:
        self._stats[name] = self._ask_stat(name)
        return self._stats[name].size

    def pieces(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
    ) -> Generator[bytes]:
        """As in the protocol, of one version of the file; ranges of RANGE bytes are fetched in parallel."""
        if name not in self._stats:
            self.size(name)
        size, version = self._stats[name]
        if last is None:
            last = size
        if last > size:
            raise InputError(f"{self.url(name)}: {size} bytes where {last} were expected: truncated: copy it again")
        starts = range(first, last, RANGE)
        gets = (
            partial(
                self._get,
                name,
                version,
                start,
                min(start + RANGE, last),
            )
            for start in starts
        )
        if len(starts) == 1:
            yield from next(gets)()
            return
        with closing(in_order(gets, PARALLEL)) as ranges:
            for pieces in ranges:
                yield from pieces

    def _get(
        self,
        name: str,
        version: str,
        first: int,
        last: int,
    ) -> Sequence[bytes]:
        """Bytes [first, last). A body that breaks is resumed at the failed byte of the same version."""
        chunks: list[bytes] = []
        at = first
        piece = PIECE
        patience = Patience(f"read {self.url(name)}", self.tally)
        while at < last:
            before = at
            try:
                for chunk in self._range(
                    name,
                    version,
                    at,
                    last,
                    piece,
                ):
                    chunks.append(chunk)
                    at += len(chunk)
                if at < last:
                    raise ConnectionError(f"the body ended {last - at} bytes early")
            except Exception as error:
                self._wait(
                    patience,
                    error,
                    "read",
                    name,
                    at=f", byte {at}",
                    progress=at > before,
                )
                piece = SMALL_PIECE
        granted.add((self.path, "read"))
        self.tally.add(bytes=last - first)
        return chunks

    def put(self, name: str, data: bytes) -> None:
        self._upload(name, io.BytesIO(data))
        self._stats.pop(name, None)

    def put_file(self, name: str, file: Path) -> None:
        with file.open("rb") as opened:
            self._upload(name, opened)
        self._stats.pop(name, None)

    def _retried(
        self,
        what: str,
        name: str,
        call: Callable[[], T],
    ) -> T:
        """The answer to one request; failures that may pass are retried."""
        patience = Patience(f"{what} {self.url(name)}", self.tally)
        while True:
            try:
                answer = call()
            except Exception as error:
                self._wait(patience, error, what, name)
            else:
                answered.add(self._root)
                granted.add((self.path, what))
                return answer

    def _wait(
        self,
        patience: Patience,
        error: Exception,
        what: str,  # the operation
        name: str,
        at: str = "",
        progress: bool = False,
    ) -> None:
        """Pause after a failure that may pass. Raises InputError for what the user has to mend, and unchanged what no
        request of this kind raises.
        """
        failure = self._failure(error)
        if failure is None:
            raise error
        if failure.status:
            answered.add(self._root)
        if not failure.transient:
            restarted = "NAIGN_GENERATION" in os.environ or "SLURM_RESTART_COUNT" in os.environ
            known = restarted or (self.path, what) in granted or "Expired" in failure.reason
            if failure.status not in (401, 403) or not known:
                raise self._refusal(failure, name) from error
            self.forget_client()  # another token may be there: what was granted before may be granted again
        patience.wait(failure.reason, known=self._root in answered, at=at, progress=progress)

    def _refusal(self, failure: Failure, name: str) -> InputError:
        if failure.status == 404 and name and "NoSuchBucket" not in failure.reason:
            problem = f"{self.url(name)}: no such object: check the path, or pack the data set again"
            return Missing(problem, seen=name in self._stats)
        if failure.status == 404:
            return InputError(f"{self.url(name)}: there is no bucket {self._bucket}: make it first, or {self.remedy}")
        meaning = MEANINGS.get(failure.status, f"{{}}: {self.remedy}").format(failure.reason)
        return InputError(f"{self.url(name)}: {meaning}")
