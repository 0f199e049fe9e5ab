"""The protocol of a store: a flat folder of files, behind `str` paths."""

import builtins
from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from naign.errors import InputError
from naign.storage.retry import Tally

PARTIAL = ".partial-"  # prefix of a file that is still being written: `list` never shows one


class Missing(InputError):
    """There is no such file, or less of it than is asked for."""

    def __init__(self, message: str, *, seen: bool = False) -> None:
        """`seen`: whether this process has asked about the file before, and it existed, that long."""
        super().__init__(message)
        self.seen = seen


class Names(NamedTuple):
    """What lies directly in a folder, sorted."""

    folders: list[str]
    files: list[str]  # complete ones


class Store(ABC):
    """A flat folder of files. Methods raise InputError for missing or forbidden ones, Unavailable if retries fail."""

    path: str
    tally: Tally

    @abstractmethod
    def names(self) -> Names:
        """Names of the folders and files in it; none for a folder that is empty or does not exist."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Ask for the size of a file in bytes."""

    @abstractmethod
    def pieces(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
    ) -> Generator[bytes]:
        """Bytes [first, last), to the end by default, in pieces of at most a megabyte, read ahead in bounded memory;
        never silently cut.
        """

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Write or replace a file: readers see the old one or the new one, never a part."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    @abstractmethod
    def url(self, name: str) -> str:
        """The address of the file, for messages and for other programs."""

    def folders(self) -> builtins.list[str]:
        return self.names().folders

    def list(self) -> builtins.list[str]:
        return self.names().files

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name; asks for it alone, however many files the folder holds."""
        try:
            self.size(name)
        except Missing:
            return False
        return True

    def read(
        self,
        name: str,
        first: int = 0,
        last: int | None = None,
    ) -> bytes:
        """Bytes [first, last). InputError if the file is shorter."""
        return b"".join(self.pieces(name, first, last))

    def put_file(self, name: str, file: Path) -> None:
        """Copy a local file to the store."""
        self.put(name, file.read_bytes())
