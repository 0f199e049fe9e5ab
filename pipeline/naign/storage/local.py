"""Files in a local folder, and writing one file whole or not at all."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

from naign.errors import FULL, InputError, Unavailable
from naign.storage.base import PARTIAL, Missing, Names, Store
from naign.storage.retry import Tally

REMEDY = "check the path, its owner and mode, or pack the data set again"
MISTAKES = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EROFS,
    errno.ELOOP,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
"""Errors that the user has to mend; after any other the run is worth another start."""


PIECE = 1 << 20  # bytes read at once


def walk(root: Path, links: bool = False) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, following links to folders or not. InputError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}): check the owner and mode of the folder")

    return os.walk(root, onerror=refuse, followlinks=links)


class LocalStore(Store):
    """Files directly in one local folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tally = Tally()
        self._seen = dict[str, int]()  # sizes of files when `size` asked
        self._folder = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user

    def names(self) -> Names:
        """As in the protocol. Links that lead nowhere are listed: reading them raises an error that names them."""
        folders = []
        files = []
        with self._explained(""):
            if self._folder.exists():
                for entry in os.scandir(self._folder):
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif (entry.is_file() or entry.is_symlink()) and not entry.name.startswith(PARTIAL):
                        files.append(entry.name)
        return Names(sorted(folders), sorted(files))

    def size(self, name: str) -> int:
        with self._explained(name):
            status = (self._folder / name).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
            raise Missing(f"{self.url(name)}: not a regular file: remove it, and copy it again")
        self._seen[name] = status.st_size
        return status.st_size

    def read(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
    ) -> bytes:
        with self._explained(name), (self._folder / name).open("rb", buffering=0) as stream:
            stream.seek(first)
            data = stream.readall() if last is None else stream.read(last - first)
        if last is not None and len(data) < last - first:
            short = f"{self.url(name)}: {first + len(data)} bytes where {last} were expected: truncated: copy it again"
            raise Missing(short, seen=self._seen.get(name, 0) >= last)
        self.tally.add(bytes=len(data))
        return data

    def pieces(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
    ) -> Generator[bytes]:
        end = self.size(name) if last is None else last
        for start in range(first, end, PIECE):
            yield self.read(name, start, min(start + PIECE, end))

    def put(self, name: str, data: bytes) -> None:
        with self._explained(name, writing=True):
            write_atomically(self._folder / name, data)

    def delete(self, name: str) -> None:
        with self._explained(name, writing=True):
            (self._folder / name).unlink(missing_ok=True)

    def url(self, name: str) -> str:
        return str(self._folder / name)

    @contextlib.contextmanager
    def _explained(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """Context: turns an OSError that the user can mend into InputError."""
        try:
            yield
        except OSError as error:
            url = self.url(name)
            if error.errno in FULL:
                raise Unavailable(f"{url}: {error.strerror}: free some, or choose another folder") from None
            if error.errno not in MISTAKES:
                raise
            what = str(error.strerror).lower()
            if writing:
                raise InputError(f"{url}: cannot be written ({what}): choose another folder") from None
            problem = f"{url}: {what}: {REMEDY}"
            if error.errno == errno.ENOENT:
                raise Missing(problem, seen=name in self._seen) from None
            raise InputError(problem) from None


UMASK = os.umask(0)
os.umask(UMASK)  # it can be read only by setting it


def write_atomically(file: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replace a file by `content` atomically: readers see the old or the new file, also after a kill. With `sync` this
    holds for a loss of power, too, and takes some milliseconds. A folder that is missing is made. OSError names the
    file; no temporary file stays.
    """
    partial = file.with_name(f"{PARTIAL}{file.name[:50]}.{uuid.uuid4().hex}")
    if isinstance(content, str):
        content = content.encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        if sync:
            sync_file(partial)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
