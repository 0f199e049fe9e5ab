"""A local folder that keeps what was read from a store in a network, for all ranks and pods of a machine or volume.

What is kept are blocks of BLOCK bytes, each a file named by its number and the hash of its shard, so nothing stale is
read. There are no locks: processes that need the same block at once both fetch it, a block that another one removed is
fetched again, and a damaged one is recognised by its hash and bypassed.
"""

import contextlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from naign.data.format.manifest import Manifest
from naign.data.format.pages import table_name
from naign.errors import InputError
from naign.storage.base import PARTIAL, Store
from naign.storage.local import write_atomically

log = logging.getLogger("naign.cache")

BLOCK = 8 << 20  # bytes: what is fetched for the cache at once
_OWN = re.compile(r"[0-9a-f]{64}(-tar)?-\d{6,}")  # names of blocks; any other file in the folder is not ours
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that was killed


class CachedStore:
    """A store to read a packed data set through. Files that its manifest does not name are not kept."""

    def __init__(self, source: Store, manifest: Manifest, folder: str, limit: int) -> None:
        """`limit` is in bytes. Raises InputError where the folder cannot be made."""
        self.path, self.tally = source.path, source.tally
        self._source, self._limit = source, limit
        self._folder = Path(os.path.expanduser(folder))
        self._hashes: dict[str, tuple[str, int | None]] = {}
        for shard in manifest.shards:
            self._hashes[shard.name] = f"{shard.pages}-tar", shard.bytes
            self._hashes[table_name(shard.name)] = shard.pages, None
        self._unseen = limit  # bytes that may have been added since the folder was last measured: measure first
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(f"data.cache {folder!r} cannot be made: {error}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)  # all but `read` is the source's

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        if name not in self._hashes:
            return self._source.read(name, first, last, fresh=fresh)
        digest, size = self._hashes[name]
        size = self._source.size(name) if size is None else size
        last = size if last is None else last
        if last > size:
            raise InputError(f"{self.url(name)}: {size} bytes where {last} were expected: truncated: copy it again")
        parts = []
        for number in range(first // BLOCK, -(-last // BLOCK)):
            start = number * BLOCK
            block = self._block(name, digest, number, min(start + BLOCK, size), fresh)
            parts.append(block[max(0, first - start) : last - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, name: str, digest: str, number: int, end: int, fresh: bool) -> bytes:
        file = self._folder / f"{digest}-{number:06d}"
        expected = end - number * BLOCK
        if not fresh:
            with contextlib.suppress(OSError):
                data = file.read_bytes()
                if len(data) == expected:
                    os.utime(file)  # the time of its last use: access times are not kept everywhere
                    self.tally.add(bytes=expected, cached=expected)
                    return data
        data = self._source.read(name, number * BLOCK, end, fresh=fresh)
        try:
            self._unseen += len(data)
            if self._unseen > self._limit // 64:
                self._make_room(len(data))
            write_atomically(file, data, sync=False)
            file.chmod(0o644)  # also where the umask shuts out other users of a shared volume
        except OSError as error:  # a full disk, a folder that is gone: training goes on without
            log.warning("%s: not kept: %s", file, error.strerror)
        return data

    def _make_room(self, wanted: int) -> None:
        """Remove the blocks used least recently until the folder has room for a 64th of its limit."""
        entries = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                status = entry.stat()
                if entry.name.startswith(PARTIAL):
                    if time.time() - status.st_mtime > _ABANDONED:
                        os.unlink(entry)
                elif _OWN.fullmatch(entry.name):
                    entries.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + max(wanted, self._limit // 64) <= self._limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
        self._unseen = 0
