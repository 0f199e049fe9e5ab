"""Files in a local folder, and writing one file whole or not at all."""

import builtins
import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from naign.errors import InputError, Unavailable, require
from naign.storage.base import PARTIAL, Missing, Store, Writer
from naign.storage.retry import Tally

_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the owner and mode of the folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "give a folder"),
    **dict.fromkeys((errno.EROFS, errno.ELOOP), "choose another folder"),
    errno.ENOENT: "check the path, or pack the data set again",
    errno.EISDIR: "remove it, and copy the shard or pack the data set again",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""What to do about a user's mistake, by error number. A disk that is full or fails is a crash, to be retried."""
FULL = {errno.ENOSPC, errno.EDQUOT}
# Temporary failures of a disk or system, which are worth a retry.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class LocalStore(Store):
    """Files directly in one local folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tally = Tally()
        self._seen = dict[str, int]()  # sizes of files when `size` asked
        self._folder = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user

    def folders(self) -> list[str]:
        return self._names(os.DirEntry.is_dir)

    def list(self) -> list[str]:
        """Names of the files, and of links that lead nowhere, which raise an error when they are read."""
        names = self._names(lambda entry: entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)))
        return [name for name in names if not name.startswith(PARTIAL)]

    def _names(self, kind: Callable[["os.DirEntry[str]"], bool]) -> builtins.list[str]:
        with self._explained(""):
            entries = os.scandir(self._folder) if self._folder.exists() else ()
            return sorted(entry.name for entry in entries if kind(entry))

    def exists(self, name: str) -> bool:
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG((self._folder / name).stat().st_mode)
        return False

    def size(self, name: str) -> int:
        with self._explained(name):
            status = (self._folder / name).stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
                raise IsADirectoryError(errno.EISDIR, "no regular file")
            self._seen[name] = status.st_size
            return status.st_size

    def version(self, name: str) -> str:
        with self._explained(name):
            status = (self._folder / name).stat()
            return f"{status.st_mtime_ns}-{status.st_size}"

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        with self._explained(name), (self._folder / name).open("rb", buffering=0) as stream:
            stream.seek(first)
            data = stream.readall() if last is None else stream.read(last - first)
        if last is not None and len(data) < last - first:
            short = f"{self.url(name)}: {first + len(data)} bytes where {last} were expected: truncated: copy it again"
            raise Missing(short, seen=self._seen.get(name, 0) >= last)
        self.tally.add(bytes=len(data))
        return data

    def pieces(self, name: str) -> Generator[bytes]:
        self.size(name)
        with self._explained(name), (self._folder / name).open("rb") as stream:
            yield from iter(lambda: stream.read(1 << 20), b"")

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Writer]:
        with self._explained(name, writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{PARTIAL}{uuid.uuid4().hex}"
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
                with self._explained(name):
                    raise
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context: others that ask for it get InputError. What killed writers left goes; one at work holds a lock."""
        with self._explained("", writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self._folder, os.O_RDONLY)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # another one where a file system has no locks
                require((error.errno != errno.EWOULDBLOCK, f"{self.path}: another program packs there: wait for it"))
            for file in self._folder.glob(f"{PARTIAL}*"):
                with contextlib.suppress(OSError), file.open("r+b") as left:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.unlink()
            yield

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
            if error.errno in FULL:
                raise Unavailable(f"{self.url(name)}: {error.strerror}: free some, or choose another folder") from None
            if error.errno not in _REMEDIES:
                raise
            what, remedy = str(error.strerror).lower(), _REMEDIES[error.errno]
            if writing:
                what = f"cannot be written ({what})"
                remedy = "choose another folder" if error.errno == errno.ENOENT else remedy
            elif error.errno == errno.ENOENT:
                raise Missing(f"{self.url(name)}: {what}: {remedy}", seen=name in self._seen) from None
            raise InputError(f"{self.url(name)}: {what}: {remedy}") from None


UMASK = os.umask(0)
os.umask(UMASK)  # it can be read only by setting it


def write_atomically(file: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replace a file by `content` atomically: readers see the old or the new file, also after a kill. With `sync` this
    holds for a loss of power, too, and takes some milliseconds. OSError names the file; no temporary file stays.
    """
    partial = file.with_name(f"{PARTIAL}{file.name[:50]}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
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
