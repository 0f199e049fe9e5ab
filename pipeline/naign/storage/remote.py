"""Files in any store that fsspec can read, such as https:// and hf://; nothing is written there."""

import builtins
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import fsspec

from naign.errors import InputError, Unavailable, one_line, printable, require
from naign.storage.base import Missing, Writer
from naign.storage.resumed import NO_RANGES, NetworkStore, Stat

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""What fsspec needs for a scheme, by name on PyPI."""
_VERSION = ("ETag", "etag", "sha", "mtime", "last_modified", "Last-Modified", "created")


class RemoteStore(NetworkStore):
    """The files directly in one folder of a store that is only read."""

    def __init__(self, path: str) -> None:
        """Raises InputError for a scheme that fsspec does not know, or whose package is missing."""
        super().__init__(path.rstrip("/"))
        self._scheme = path.partition("://")[0]
        what = f"{path}: cannot read {self._scheme}:// paths"
        try:
            fsspec.get_filesystem_class(self._scheme)
        except ImportError as error:
            remedy = f"pip install {PACKAGES.get(self._scheme, 'what it names')}"
            raise InputError(f"{what} ({printable(str(error))}): {remedy}") from None
        except ValueError:
            known = "give a local folder, a bucket (s3://, gs://, az://), or https:// or hf:// to read from"
            raise InputError(f"{what}: {known}") from None

    @property
    def _files(self) -> Any:
        proxied = {"client_kwargs": {"trust_env": True}} if self._scheme in ("http", "https") else {}
        # One a process: fsspec keeps it.
        return fsspec.filesystem(self._scheme, use_listings_cache=False, **proxied)

    def folders(self) -> list[str]:
        return self._listed("directory")

    def list(self) -> list[str]:
        return self._listed("file")

    def _listed(self, kind: str) -> builtins.list[str]:
        try:
            entries = self._retried("list", "", lambda: self._files.ls(self.path, detail=True))
        except Missing:
            return []
        names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind}
        return sorted(names - {""})

    def _stat(self, name: str) -> Stat:
        info = self._retried("ask about", name, lambda: self._files.info(self.url(name)))
        if info.get("type", "file") != "file":
            raise Missing(f"{self.url(name)}: no file: check the path")
        if info.get("size") is None:
            raise InputError(f"{self.url(name)}: the server does not say how long it is: copy the data elsewhere")
        require((info.get("partial") is not False, f"{self.url(name)}: {NO_RANGES}"))
        version = "-".join(str(info[field]) for field in (*_VERSION, "size") if info.get(field))
        return Stat(int(info["size"]), version)

    def _range(self, name: str, version: str, first: int, last: int, piece: int) -> Iterator[bytes]:
        data: bytes = self._files.cat_file(self.url(name), start=first, end=last)
        if len(data) > last - first:
            raise InputError(f"{self.url(name)}: {NO_RANGES}")
        yield data

    def write(self, name: str) -> AbstractContextManager[Writer]:
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: write to a local folder or s3://")

    def delete(self, name: str) -> None:
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: nothing is removed there")

    def url(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _explain(self, error: Exception, name: str) -> None:
        if isinstance(error, InputError | Unavailable):
            return
        if isinstance(error, FileNotFoundError):
            raise Missing(f"{self.url(name)}: no such file: check the path", seen=name in self._stats) from error
        status = getattr(error, "status", None)
        is_denied = isinstance(error, PermissionError) or status in (401, 403)
        remedy = "check what the account of this machine may read" if is_denied else "check the path"
        reason = f"{f'{status}: ' if status else ''}{one_line(error)}"
        raise InputError(f"{self.url(name)}: {reason}: {remedy}") from error

    @staticmethod
    def _is_transient(error: Exception) -> bool:
        """aiohttp's errors have a status where a server answered."""
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            return RemoteStore._is_transient(error.__cause__)  # fsspec's, where a web server does not answer
        if isinstance(status, int) and status:
            return (status >= 500 and status != 501) or status in (408, 429)
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | InputError):
            return False
        return isinstance(error, OSError | TimeoutError) or type(error).__module__.startswith("aiohttp")
