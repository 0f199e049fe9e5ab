"""A local folder that keeps what was read from a store in a network, for all ranks and pods of a machine or volume.

Shards are kept in chunks of CHUNK bytes, each a file named by its number and the hash of its shard, so nothing stale is
read. There are no locks: processes that need the same chunk at once both fetch it, a chunk that another one removed is
fetched again, and a damaged one is recognised by its hash and bypassed.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.pages import table_name
from naign.errors import InputError
from naign.storage.base import PARTIAL, Store
from naign.storage.local import write_atomically
from naign.storage.store import open_store

log = logging.getLogger("naign.cache")

CHUNK = 8 << 20  # bytes: what is fetched for the cache at once
_OURS = re.compile(r"[0-9a-f]{64}(-tar)?-\d{6,}")  # names of chunks; other files in the folder are left alone
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that was killed


def open_cached(path: str, config: DataConfig, manifest: Manifest) -> Store:
    """The store at `path`, of a data set or its index, read through data.cache unless it is local."""
    store = open_store(path)
    if not config.cache or "://" not in path:
        return store
    return cast(Store, CachedStore(store, manifest, config.cache, int(config.cache_gb * 1e9)))


class CachedStore:
    """A store to read a packed data set through. Files that its manifest does not name are not kept."""

    def __init__(self, source: Store, manifest: Manifest, folder: str, limit: int) -> None:
        """`limit` is in bytes. Raises InputError where the folder cannot be made."""
        self._source = source
        self._folder = Path(os.path.expanduser(folder))
        self._limit = limit
        self._unmeasured = limit  # bytes that may have been added since the folder was last measured
        self._locks = defaultdict[str, threading.Lock](threading.Lock)  # by file: threads do not fetch a chunk twice
        self._files = dict[str, tuple[str, int | None]]()  # prefix of names of chunks, and bytes, None if not known
        for shard in manifest.shards:
            self._files[shard.name] = (f"{shard.pages}-tar", shard.bytes)
            self._files[table_name(shard.name)] = (shard.pages, None)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(f"data.cache {folder!r} cannot be made: {error}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)  # all but `read` is the source's

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        if name not in self._files:
            return self._source.read(name, first, last, fresh=fresh)
        prefix, size = self._files[name]
        if size is None:
            size = self._source.size(name)
        if last is None:
            last = size
        if last > size:
            raise InputError(f"{self.url(name)}: {size} bytes where {last} were expected: truncated: copy it again")
        chunks = []
        for start in range(first // CHUNK * CHUNK, last, CHUNK):
            end = min(start + CHUNK, size)
            file = self._folder / f"{prefix}-{start // CHUNK:06d}"
            with self._locks[file.name]:
                data = None if fresh else self._kept(file, end - start)
                if data is None:
                    data = self._source.read(name, start, end, fresh=fresh)
                    self._keep(file, data)
            chunks.append(data[max(0, first - start) : last - start])
        return b"".join(chunks)

    def _kept(self, file: Path, size: int) -> bytes | None:
        """The bytes of a chunk, None where it is not kept."""
        try:
            data = file.read_bytes()
        except OSError:
            return None
        if len(data) != size:
            return None
        with contextlib.suppress(OSError):  # of another user, or on a volume that is only read
            os.utime(file)  # the time of its last use: access times are not kept everywhere
        self.tally.add(bytes=size, cached=size)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        try:
            self._unmeasured += len(data)
            if self._unmeasured > self._limit // 64:
                self._make_room(len(data))
            write_atomically(file, data, sync=False)
            file.chmod(0o644)  # also where the umask shuts out other users of a shared volume
        except OSError as error:  # a full disk, a folder that is gone: training goes on without
            log.warning("%s: not kept: %s", file, error.strerror)

    def _make_room(self, wanted: int) -> None:
        """Remove the chunks used least recently until the folder has room for a 64th of its limit."""
        chunks = []
        total = 0
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                status = entry.stat()
                if _OURS.fullmatch(entry.name):
                    chunks.append((status.st_mtime, status.st_size, entry.path))
                    total += status.st_size
                elif entry.name.startswith(PARTIAL) and time.time() - status.st_mtime > _ABANDONED:
                    os.unlink(entry)
        room = max(wanted, self._limit // 64)
        for _, size, path in sorted(chunks):
            if total + room <= self._limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
        self._unmeasured = 0
