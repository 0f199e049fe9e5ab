"""Files in a local folder, and writing one file whole or not at all."""

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

from naign.errors import InputError, Unavailable
from naign.storage.base import PARTIAL, Missing, Names, Stat, Store, Writer
from naign.storage.retry import Tally

REMEDIES = {
    errno.EACCES: "check the owner and mode of the folder",
    errno.EPERM: "check the owner and mode of the folder",
    errno.ENOTDIR: "give a folder",
    errno.EEXIST: "give a folder",
    errno.EROFS: "choose another folder",
    errno.ELOOP: "choose another folder",
    errno.ENOENT: "check the path, or pack the data set again",
    errno.EISDIR: "remove it, and copy the shard or pack the data set again",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""What to do about a user's mistake, by error number. A disk that is full or fails is a crash, to be retried."""
FULL = {errno.ENOSPC, errno.EDQUOT}
# Temporary failures of a disk or system, which are worth a retry.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


PIECE = 1 << 20  # bytes read at once


class LocalStore(Store):
    """Files directly in one local folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tally = Tally()
        self._seen = dict[str, int]()  # sizes of files when `stat` asked
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

    def stat(self, name: str) -> Stat:
        with self._explained(name):
            status = (self._folder / name).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
            raise Missing(f"{self.url(name)}: not a regular file: {REMEDIES[errno.EISDIR]}")
        self._seen[name] = status.st_size
        return Stat(status.st_size, f"{status.st_mtime_ns}-{status.st_size}")

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

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Writer]:
        partial = self._folder / f"{PARTIAL}{uuid.uuid4().hex}"
        with self._explained(name, writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            target = partial.open("xb")
            with contextlib.suppress(OSError):  # where a file system has no locks
                fcntl.flock(target, fcntl.LOCK_EX)
        try:
            with target:
                yield target
                with self._explained(name, writing=True):
                    target.flush()
                    os.fsync(target.fileno())  # the name must not outlive the bytes if the machine goes down
                    os.replace(partial, self._folder / name)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
                raise self._full(name, error) from None
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context: locks the folder; other callers get InputError. Deletes temporary files of killed writers."""
        with self._explained("", writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self._folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another program packs there: wait for it") from None
            except OSError:  # a file system without locks
                pass
            for file in self._folder.glob(f"{PARTIAL}*"):
                with contextlib.suppress(OSError), file.open("r+b") as left:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a writer at work
                    file.unlink()
            yield
        finally:
            os.close(folder)

    def delete(self, name: str) -> None:
        with self._explained(name, writing=True):
            (self._folder / name).unlink(missing_ok=True)

    def url(self, name: str) -> str:
        return str(self._folder / name)

    def _full(self, name: str, error: OSError) -> Unavailable:
        return Unavailable(f"{self.url(name)}: {error.strerror}: free some, or choose another folder")

    @contextlib.contextmanager
    def _explained(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """Context: turns an OSError that the user can mend into InputError."""
        try:
            yield
        except OSError as error:
            number = error.errno
            if number in FULL:
                raise self._full(name, error) from None
            if number not in REMEDIES:
                raise
            what = str(error.strerror).lower()
            remedy = REMEDIES[number]
            if writing:
                if number == errno.ENOENT:
                    remedy = "choose another folder"
                raise InputError(f"{self.url(name)}: cannot be written ({what}): {remedy}") from None
            problem = f"{self.url(name)}: {what}: {remedy}"
            if number == errno.ENOENT:
                raise Missing(problem, seen=name in self._seen) from None
            raise InputError(problem) from None


UMASK = os.umask(0)
os.umask(UMASK)  # it can be read only by setting it


def write_atomically(file: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replace a file by `content` atomically: readers see the old or the new file, also after a kill. With `sync` this
    holds for a loss of power, too, and takes some milliseconds. OSError names the file; no temporary file stays.
    """
    partial = file.with_name(f"{PARTIAL}{file.name[:50]}.{uuid.uuid4().hex}")
    if isinstance(content, str):
        content = content.encode()
    try:
        partial.write_bytes(content)
        if sync:
            sync_file(partial)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
