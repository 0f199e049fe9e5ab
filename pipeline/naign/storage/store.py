"""Where files lie, behind one protocol over str paths: a local folder, a bucket, or a web server."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from naign.errors import Gone, InputError, Unavailable, check_address, require
from naign.storage.base import Missing, Store
from naign.storage.local import LocalStore
from naign.storage.retry import give_up_after

BUCKETS = ("s3", "gs", "az", "abfs", "abfss")  # schemes of what can be written
READ_ONLY = ("http", "https")
PROBE = ".naign-preflight"  # the file that is written to test whether a store is writable


def open_store(path: str) -> Store:
    """The store at a local folder (`~` is expanded), in a bucket or at a read-only address. Opens nothing yet."""
    require((path.strip() and "\0" not in path, f"{path!r} is no path: give a local folder or s3://bucket/prefix"))
    check_address(path)
    scheme, separator, _ = path.partition("://")
    if not separator:
        require((not is_in_bucket(path), f"{path}: write {path.partition(':')[0]}://bucket/prefix"))
        return LocalStore(path)
    if scheme == "s3":
        from naign.storage.s3 import S3Store

        return S3Store(path)
    if scheme not in (*BUCKETS, *READ_ONLY):
        known = "give a local folder, a bucket (s3://, gs://, az://), or https:// to read from"
        raise InputError(f"{path}: cannot read {scheme}:// paths: {known}")
    try:
        from naign.storage.others import OtherStore
    except ImportError as error:
        raise InputError(f"{path}: cannot open {scheme}:// paths ({error}): pip install obstore") from None
    return OtherStore(path)


def is_in_bucket(place: object) -> bool:
    """Whether this is a path in a bucket, which can be written; a Path has lost one of its two slashes."""
    scheme, colon, _ = str(place).partition(":")
    return bool(colon) and scheme in BUCKETS


def check_writable(store: Store, what: str) -> None:
    """Write and remove a small file. Raises InputError, which names `what` the store is for, where that is refused."""
    try:
        store.put(PROBE, b"naign")
    except InputError as error:
        raise InputError(f"{what} cannot be written: {error}") from error
    finally:  # it may be written, and only not be readable
        with suppress(InputError, Unavailable), give_up_after(0):  # permission to delete is not required
            store.delete(PROBE)


def locate(url: str) -> tuple[Store, str]:
    """The store of a file, and its name there."""
    folder, slash, name = url.rpartition("/")
    return open_store(folder or slash or "."), name


@contextmanager
def was_there(url: str) -> Iterator[None]:
    """Context: an InputError becomes Gone if a file that was read before is missing, or that at `url`, which was."""
    try:
        yield
    except InputError as error:
        store, name = locate(url)
        if (isinstance(error, Missing) and error.seen) or not store.exists(name):
            lost = "stored data that this run has read before is gone, as when a store loses its disk"
            raise Gone(f"{error}; {lost}: all ranks start again from what is left") from None
        raise
