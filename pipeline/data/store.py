"""Where files lie: a local folder or `s3://bucket/prefix` (s3.py), behind one small protocol over str paths."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.data.fetch import Tally
from pipeline.errors import InputError

_PARTIAL = ".partial-"
"""Prefix of a file that is still being written: `list` never shows one."""


class Writer(Protocol):
    """A file being written."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...


class Store(Protocol):
    """A flat folder of files. Every method raises InputError for what is missing or forbidden.

    One in a network tries again what fails in passing, and raises Unavailable where that does not help.
    """

    path: str
    tally: Tally

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted."""
        ...

    def list(self) -> list[str]:
        """Names of the complete files, sorted; [] for a folder that is empty or does not exist."""
        ...

    def size(self, name: str) -> int:
        """Length in bytes."""
        ...

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        """Bytes [first, last), all of them; to the end if last is None. A file that ends sooner is an InputError.

        `fresh` reads past any cache, and renews what it holds.
        """
        ...

    def open(self, name: str) -> BinaryIO:
        """A stream from the first byte on, read ahead in bounded memory. It is never silently cut."""
        ...

    def write(self, name: str) -> AbstractContextManager[Writer]:
        """Write or replace a file as its bytes are made: it appears whole at the end, after an error not at all."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace a file: readers see the old one or the new one, never a part."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        ...

    def url(self, name: str) -> str:
        """What to call the file in a message or give to another program."""
        ...


def open_store(path: str) -> Store:
    """The store at a local folder (`~` is expanded) or `s3://bucket/prefix`. Touches neither disk nor network."""
    if not path.strip() or "\0" in path:
        raise InputError(f"{path!r} is no path: give a local folder or s3://bucket/prefix")
    scheme, separator, _ = path.partition("://")
    if path.startswith("s3:") and not separator:
        raise InputError(f"{path}: write s3://bucket/prefix")
    if not separator:
        return LocalStore(path)
    if scheme == "s3":
        from pipeline.data.s3 import S3Store

        return S3Store(path)
    raise InputError(f"{path}: cannot read {scheme}:// paths: give a local folder or s3://bucket/prefix")


def use_endpoint(address: str) -> None:
    """Ask the S3 server at this address from now on, in this process and those it starts; '' changes nothing."""
    if address:
        os.environ["AWS_ENDPOINT_URL_S3"] = address


def gopen(url: str, mode: str = "rb", bufsize: int = 8192) -> BinaryIO:
    """A stream of one file, as WebDataset asks for it: `webdataset.gopen_schemes["s3"] = gopen`."""
    if "r" not in mode:
        raise InputError(
            f"{url}: opened with mode {mode!r}: WebDataset can only read through this; write with `naign pack`"
        )
    folder, _, name = url.rpartition("/")
    return open_store(folder).open(name)


_REMEDIES = {
    errno.ENOENT: "check the path, or pack the data set again",
    errno.EACCES: "check the owner and mode of the folder",
    errno.EPERM: "check the owner and mode of the folder",
    errno.EISDIR: "a directory is where a shard should be: remove it, and copy the shard or pack the data set again",
    errno.ENOTDIR: "give a folder",
    errno.EEXIST: "give a folder",
    errno.EROFS: "choose another folder",
    errno.ELOOP: "choose another folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""What to do about a user's mistake, by error number. A disk that is full or fails is a crash, to be retried."""


class LocalStore:
    """Files directly in one local folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tally = Tally()
        self._folder = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user

    def folders(self) -> list[str]:
        with self._explained(""):
            entries = os.scandir(self._folder) if self._folder.exists() else ()
            return sorted(entry.name for entry in entries if entry.is_dir())

    def list(self) -> list[str]:
        with self._explained(""):
            if not self._folder.exists():
                return []
            files = (entry.name for entry in os.scandir(self._folder) if entry.is_file())
            return sorted(name for name in files if not name.startswith(_PARTIAL))

    def size(self, name: str) -> int:
        with self._explained(name):
            if (self._folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return (self._folder / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        with self._explained(name):
            return (self._folder / name).open("rb")

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        with self._explained(name), (self._folder / name).open("rb", buffering=0) as stream:
            stream.seek(first)
            data = stream.readall() if last is None else stream.read(last - first)
        if last is not None and len(data) < last - first:
            raise InputError(
                f"{self.url(name)}: {first + len(data)} bytes where {last} were expected: truncated: copy it again"
            )
        self.tally.add(bytes=len(data))
        return data

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Writer]:
        with self._explained(name, writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as target:
                yield target
                with self._explained(name, writing=True):
                    target.flush()
                    os.fsync(target.fileno())  # the name must not outlive the bytes if the machine goes down
                    os.fchmod(target.fileno(), 0o644)  # mkstemp's 0600 would shut out other users of a shared volume
            with self._explained(name, writing=True):
                os.replace(partial, self._folder / name)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def put(self, name: str, data: bytes) -> None:
        with self.write(name) as target:
            target.write(data)

    def delete(self, name: str) -> None:
        with self._explained(name, writing=True):
            (self._folder / name).unlink(missing_ok=True)

    def url(self, name: str) -> str:
        return str(self._folder / name)

    @contextlib.contextmanager
    def _explained(self, name: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _REMEDIES:
                raise
            what, remedy = str(error.strerror).lower(), _REMEDIES[error.errno]
            if writing:
                what = f"cannot be written ({what})"
                remedy = "choose another folder" if error.errno == errno.ENOENT else remedy
            raise InputError(f"{self.url(name)}: {what}: {remedy}") from None
