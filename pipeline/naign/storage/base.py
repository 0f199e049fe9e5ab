"""The protocol of a store: a flat folder of files, behind `str` paths."""

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Protocol

from naign.errors import InputError
from naign.storage.retry import Tally

PARTIAL = ".partial-"  # prefix of a file that is still being written: `list` never shows one


class Missing(InputError):
    """There is no such file, or less of it than is asked for."""

    def __init__(self, message: str, *, seen: bool = False) -> None:
        """`seen`: whether this process has asked about the file before, and it existed, that long."""
        super().__init__(message)
        self.seen = seen


class Writer(Protocol):
    """A file being written."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...


class Store(Protocol):
    """A flat folder of files. Methods raise InputError for missing or forbidden ones, Unavailable if retries fail."""

    path: str
    tally: Tally

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted."""

    def list(self) -> list[str]:
        """Names of the complete files, sorted; [] for a folder that is empty or does not exist."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name; asks for it alone, however many files the folder holds."""

    def size(self, name: str) -> int:
        """Length in bytes."""

    def version(self, name: str) -> str:
        """A text that changes whenever the file does, such as its ETag, or its time and size."""

    def read(self, name: str, first: int = 0, last: int | None = None, *, fresh: bool = False) -> bytes:
        """Bytes [first, last); None: to the end. InputError if it is shorter. `fresh` bypasses and renews any cache."""

    def pieces(self, name: str) -> Generator[bytes]:
        """The bytes of a file in pieces of at most a megabyte, read ahead in bounded memory; never silently cut."""

    def write(self, name: str) -> AbstractContextManager[Writer]:
        """Write or replace a file while its bytes are produced: it appears whole at the end, or not at all."""

    def put(self, name: str, data: bytes) -> None:
        """Write or replace a file: readers see the old one or the new one, never a part."""
        with self.write(name) as target:
            target.write(data)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    def url(self, name: str) -> str:
        """The address of the file, for messages and for other programs."""
