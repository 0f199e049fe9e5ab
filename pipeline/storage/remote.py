"""Files in any store that fsspec can read, such as https://, gs://, az:// and hf://; nothing is written there.

Requests are made as those to S3: for byte ranges, with transient failures retried.
"""

import builtins
import contextlib
import io
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from typing import Any, BinaryIO, TypeVar

import fsspec

from pipeline.errors import InputError, Unavailable, printable
from pipeline.storage.base import Store, Writer
from pipeline.storage.prefetch import PARALLEL, PART, Parts, in_order
from pipeline.storage.retry import Patience, Tally

T = TypeVar("T")

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
"""What fsspec needs for a scheme, by name on PyPI."""
_VERSION = ("ETag", "etag", "md5Hash", "Content-MD5", "sha", "mtime", "last_modified", "Last-Modified", "created")


@cache
def _filesystem(scheme: str) -> Any:
    return fsspec.filesystem(scheme, use_listings_cache=False)


def check_scheme(path: str) -> str:
    """The scheme of a path. Raises InputError where fsspec does not know it, or its package is missing."""
    scheme, _, rest = path.partition("://")
    if "@" in rest.partition("/")[0]:
        raise InputError(f"{scheme}://: the address holds a user or a password, which messages would show")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = f"pip install {PACKAGES.get(scheme, 'what it names')}"
        raise InputError(f"{path}: cannot read {scheme}:// paths ({printable(str(error))}): {remedy}") from None
    except ValueError:
        known = "give a local folder, s3://bucket/prefix, or https://, gs://, az://, hf:// to read from"
        raise InputError(f"{path}: cannot read {scheme}:// paths: {known}") from None
    return scheme


class RemoteStore(Store):
    """The files directly in one folder of a store that is only read."""

    def __init__(self, path: str) -> None:
        self.path, self.tally = path.rstrip("/"), Tally()
        self._scheme = check_scheme(path)
        self._known: dict[str, dict[str, Any]] = {}  # what the store said of a file

    @property
    def _files(self) -> Any:
        return _filesystem(self._scheme)

    def folders(self) -> list[str]:
        return self._listed("directory")

    def list(self) -> list[str]:
        return self._listed("file")

    def _listed(self, kind: str) -> builtins.list[str]:
        with contextlib.suppress(FileNotFoundError), self._explained("", absent=True):
            found = self._ask("", "list", lambda: self._files.ls(self.path, detail=True))
            names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == kind}
            return sorted(names - {""})
        return []

    def exists(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError), self._explained(name, absent=True):
            found = self._ask(name, "look for", lambda: self._files.info(self.url(name)))
            return bool(found.get("type", "file") == "file")
        return False

    def size(self, name: str) -> int:
        size = self._info(name).get("size")
        if size is None:
            raise InputError(f"{self.url(name)}: the server does not say how long it is: copy the data elsewhere")
        return int(size)

    def version(self, name: str) -> str:
        found = self._info(name)
        return "-".join(str(found[field]) for field in (*_VERSION, "size") if found.get(field))

    def _info(self, name: str) -> dict[str, Any]:
        if name not in self._known:
            with self._explained(name):
                self._known[name] = self._ask(name, "ask about", lambda: self._files.info(self.url(name)))
        return self._known[name]

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        if fresh:
            self._known.pop(name, None)
        return b"".join(self._parts(name, first, last))

    def open(self, name: str) -> BinaryIO:
        self.size(name)
        return io.BufferedReader(Parts(self._parts(name, 0, None)), 1 << 20)

    def pieces(self, name: str) -> Generator[bytes]:
        return self._parts(name, 0, None)

    def write(self, name: str) -> "contextlib.AbstractContextManager[Writer]":
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: write to a local folder or s3://")

    def delete(self, name: str) -> None:
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: nothing is removed there")

    def url(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _parts(self, name: str, first: int, last: int | None) -> Generator[bytes]:
        size = self.size(name)
        last = size if last is None else last
        if last > size:
            raise InputError(f"{self.url(name)}: {size} bytes where {last} were expected: truncated: copy it again")
        ends = [(start, min(start + PART, last)) for start in range(first, last, PART)]
        with contextlib.closing(in_order([partial(self._get, name, *pair) for pair in ends], PARALLEL)) as parts:
            yield from parts

    def _get(self, name: str, first: int, last: int) -> bytes:
        ranges = "the server does not serve byte ranges: use another one, or copy the data to a local folder"
        with self._explained(name):
            if self._info(name).get("partial") is False:
                raise InputError(f"{self.url(name)}: {ranges}")

            def get() -> bytes:
                data: bytes = self._files.cat_file(self.url(name), start=first, end=last)
                if len(data) > last - first:
                    raise InputError(f"{self.url(name)}: {ranges}")
                if len(data) < last - first:
                    raise ConnectionError(f"the body ended {last - first - len(data)} bytes early")
                return data

            data = self._ask(name, "read", get)
        self.tally.add(bytes=last - first)
        return data

    def _ask(self, name: str, what: str, call: Callable[[], T]) -> T:
        """The answer to one request; transient failures are retried."""
        patience = Patience(f"{what} {self.url(name)}", self.tally)
        while True:
            try:
                return call()
            except Exception as error:
                if not _is_passing(error):
                    raise
                patience.wait(error)

    @contextlib.contextmanager
    def _explained(self, name: str, *, absent: bool = False) -> Iterator[None]:
        """Turn errors that the user can fix into InputError, but for FileNotFoundError where it may be `absent`."""
        try:
            yield
        except (InputError, Unavailable):
            raise
        except FileNotFoundError:
            if absent:
                raise
            raise InputError(f"{self.url(name)}: no such file: check the path") from None
        except Exception as error:
            if _is_passing(error):
                raise
            status, said = getattr(error, "status", None), printable(str(error))[:200]
            remedy = "check what the account of this machine may read" if _is_denied(error) else "check the path"
            raise InputError(f"{self.url(name)}: {f'{status}: ' if status else ''}{said}: {remedy}") from None


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later. aiohttp's errors have a status where a server answered."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _is_passing(error.__cause__)  # so fsspec has it where a web server does not answer
    if isinstance(status, int) and status:
        return (status >= 500 and status != 501) or status in (408, 429)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | InputError):
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.startswith("aiohttp")
