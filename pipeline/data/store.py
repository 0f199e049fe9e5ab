"""Where files lie: a local folder or `s3://bucket/prefix`, behind one small protocol over str paths.

boto3 is imported here only. It finds credentials and endpoint its own way (environment, profile, instance role;
AWS_ENDPOINT_URL for other servers than Amazon's).
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from pipeline.errors import InputError

_PARTIAL = ".partial-"
"""Prefix of a file that is still being written: `list` never shows one."""


class Store(Protocol):
    """A flat folder of files. Every method raises InputError for what is missing or forbidden."""

    path: str

    def list(self) -> list[str]:
        """Names of the complete files, sorted; [] for a folder that is empty or does not exist."""
        ...

    def size(self, name: str) -> int:
        """Length in bytes."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A stream from the first byte on. A body that breaks or ends short raises; it is never silently cut."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def put(self, name: str, source: Path | bytes) -> None:
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
    if not separator:
        return LocalStore(path)
    if scheme == "s3":
        return S3Store(path)
    raise InputError(f"{path}: cannot read {scheme}:// paths: give a local folder or s3://bucket/prefix")


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
        self._folder = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user

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

    def read(self, name: str) -> bytes:
        with self.open(name) as stream:
            return stream.read()

    def put(self, name: str, source: Path | bytes) -> None:
        with self._explained(name, writing=True):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as target:
                    if isinstance(source, bytes):
                        target.write(source)
                    else:
                        with source.open("rb") as stream:
                            while block := stream.read(1 << 20):
                                target.write(block)
                    target.flush()
                    os.fsync(target.fileno())  # the name must not outlive the bytes if the machine goes down
                    os.fchmod(target.fileno(), 0o644)  # mkstemp's 0600 would shut out other users of a shared volume
                os.replace(partial, self._folder / name)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

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


class S3Store:
    """Objects under one prefix of a bucket. Picklable: the client is made in each process at its first use."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._bucket, _, prefix = path.removeprefix("s3://").partition("/")
        if not self._bucket:
            raise InputError(f"{path}: no bucket: write s3://bucket/prefix")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def list(self) -> list[str]:
        with self._explained(""):
            pages = (
                _client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/")
            )
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(key.removeprefix(self._prefix) for key in keys if key != self._prefix)

    def size(self, name: str) -> int:
        with self._explained(name):
            return int(_client().head_object(Bucket=self._bucket, Key=self._prefix + name)["ContentLength"])

    def open(self, name: str) -> BinaryIO:
        with self._explained(name):
            # botocore counts the body against Content-Length and raises IncompleteReadError at an early end.
            return cast(BinaryIO, _client().get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"])

    def read(self, name: str) -> bytes:
        with contextlib.closing(self.open(name)) as stream:
            return stream.read()

    def put(self, name: str, source: Path | bytes) -> None:
        with self._explained(name):
            if isinstance(source, bytes):
                _client().put_object(Bucket=self._bucket, Key=self._prefix + name, Body=source)
            else:
                _client().upload_file(str(source), self._bucket, self._prefix + name)

    def delete(self, name: str) -> None:
        with self._explained(name):
            _client().delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def url(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{name}"

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what a user can put right into an InputError; a network that fails stays a crash, to be retried."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise InputError(
                f"{self.url(name)}: {error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
            ) from None
        except (ClientError, S3UploadFailedError) as error:
            # upload_file wraps the server's answer and keeps it as the context only.
            answer = error if isinstance(error, ClientError) else error.__context__
            code = str(answer.response["Error"].get("Code")) if isinstance(answer, ClientError) else ""
            match code:
                case "NoSuchBucket":
                    remedy = f"there is no bucket {self._bucket}: check the name and AWS_ENDPOINT_URL"
                case "NoSuchKey" | "404" | "NotFound":
                    remedy = "no such object: check the path, or pack the data set again"
                case "AccessDenied" | "403" | "Forbidden" | "InvalidAccessKeyId" | "SignatureDoesNotMatch":
                    remedy = f"access denied ({code}): check the credentials and what they may do in this bucket"
                case _:
                    raise
            raise InputError(f"{self.url(name)}: {remedy}") from None


_clients: dict[int, Any] = {}


def _client() -> Any:
    """This process's client: one made before a fork would share its sockets with the child."""
    if os.getpid() not in _clients:
        import boto3

        _clients[os.getpid()] = boto3.session.Session().client("s3")
    return _clients[os.getpid()]
