"""Files in any store that fsspec can read, such as https://, gs://, az:// and hf://; nothing is written there."""

import builtins
import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import fsspec

from pipeline.errors import InputError, Unavailable, printable
from pipeline.storage.base import Writer
from pipeline.storage.resumed import NO_RANGES, NetworkStore, Stat

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


class RemoteStore(NetworkStore):
    """The files directly in one folder of a store that is only read."""

    def __init__(self, path: str) -> None:
        super().__init__(path.rstrip("/"))
        self._scheme = check_scheme(path)

    @property
    def _files(self) -> Any:
        return _filesystem(self._scheme)

    def folders(self) -> list[str]:
        return self._listed("directory")

    def list(self) -> list[str]:
        return self._listed("file")

    def _listed(self, kind: str) -> builtins.list[str]:
        with contextlib.suppress(FileNotFoundError), self._explained(""):
            entries = self._retried(f"list {self.path}", lambda: self._files.ls(self.path, detail=True))
            names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind}
            return sorted(names - {""})
        return []

    def exists(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError), self._explained(name):
            return bool(self._info(name).get("type", "file") == "file")
        return False

    def _info(self, name: str) -> dict[str, Any]:
        info: dict[str, Any] = self._retried(f"ask about {self.url(name)}", lambda: self._files.info(self.url(name)))
        return info

    def _stat(self, name: str) -> Stat:
        info = self._info(name)
        if info.get("size") is None:
            raise InputError(f"{self.url(name)}: the server does not say how long it is: copy the data elsewhere")
        if info.get("partial") is False:
            raise InputError(f"{self.url(name)}: {NO_RANGES}")
        version = "-".join(str(info[field]) for field in (*_VERSION, "size") if info.get(field))
        return Stat(int(info["size"]), version)

    def _range(self, name: str, version: str, first: int, last: int, piece: int) -> Iterator[bytes]:
        data: bytes = self._files.cat_file(self.url(name), start=first, end=last)
        if len(data) > last - first:
            raise InputError(f"{self.url(name)}: {NO_RANGES}")
        yield data

    def write(self, name: str) -> contextlib.AbstractContextManager[Writer]:
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: write to a local folder or s3://")

    def delete(self, name: str) -> None:
        raise InputError(f"{self.url(name)}: {self._scheme}:// is only read: nothing is removed there")

    def url(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (InputError, Unavailable):
            raise
        except Exception as error:
            if self._is_transient(error):
                raise
            if isinstance(error, FileNotFoundError):
                raise _Missing(f"{self.url(name)}: no such file: check the path") from None
            status = getattr(error, "status", None)
            is_denied = isinstance(error, PermissionError) or status in (401, 403)
            remedy = "check what the account of this machine may read" if is_denied else "check the path"
            reason = f"{f'{status}: ' if status else ''}{printable(str(error))[:200]}"
            raise InputError(f"{self.url(name)}: {reason}: {remedy}") from None

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


class _Missing(InputError, FileNotFoundError):
    """There is no such file."""
