"""Where files lie, behind one protocol over str paths: a local folder, `s3://bucket/prefix`, or what fsspec reads."""

import os

from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.local import LocalStore


def open_store(path: str) -> Store:
    """The store at a local folder (`~` is expanded), `s3://bucket/prefix`, or an address that is only read.

    Touches neither disk nor network.
    """
    if not path.strip() or "\0" in path:
        raise InputError(f"{path!r} is no path: give a local folder or s3://bucket/prefix")
    scheme, separator, _ = path.partition("://")
    if path.startswith("s3:") and not separator:
        raise InputError(f"{path}: write s3://bucket/prefix")
    if not separator:
        return LocalStore(path)
    if scheme == "s3":
        from pipeline.storage.s3 import S3Store

        return S3Store(path)
    from pipeline.storage.remote import RemoteStore

    return RemoteStore(path)


def use_endpoint(address: str) -> None:
    """Ask the S3 server at this address from now on, in this process and those it starts; '' changes nothing."""
    if address:
        os.environ["AWS_ENDPOINT_URL_S3"] = address


def locate(url: str) -> tuple[Store, str]:
    """The store of a file, and its name there."""
    folder, _, name = url.rpartition("/")
    return open_store(folder), name
