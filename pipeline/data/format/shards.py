"""A shard of a split, as index.json lists it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SAMPLE_BYTES = 1024  # the least that a sample takes in a tar: a block of header and one of data
MOST_SAMPLES = 2**40  # of a split


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    pages: str  # SHA-256 of its page table (pages.py)
    sha256: str = ""  # of the whole tar; "" where the index lies elsewhere: page tables have the hashes of what is read

    def fields(self) -> dict[str, Any]:
        """Its entry in index.json."""
        sha256 = {"sha256": self.sha256} if self.sha256 else {}
        return {"name": self.name, "samples": self.samples, "bytes": self.bytes, **sha256, "pages": self.pages}

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Shard":
        """The shard of an entry. Raises TypeError, or ValueError for an empty hash: an unknown one has no field."""
        if fields.get("sha256", "unknown") == "":
            raise ValueError("'' is no SHA-256")
        return cls(**fields)


def is_count(value: object, least: int = 0) -> bool:
    """Whether it is an integer from `least` up; JSON's true, 1.0 and "1" are none."""
    return type(value) is int and value >= least


def problems(shard: Shard) -> Iterator[str]:
    """Wrong types and values out of range. Checks after a first problem may raise."""
    name = shard.name
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) < 256:
        yield "its name is not that of a file"
    if name.startswith(".") or set(name) & {"/", "\\"}:
        yield "its name is hidden, or leads out of the folder"
    if not is_count(shard.samples, 1) or not is_count(shard.bytes):
        yield f"{shard.samples!r} samples in {shard.bytes!r} bytes: a shard has at least one, and whole numbers of both"
    if shard.bytes < SAMPLE_BYTES * shard.samples:
        yield f"{shard.bytes} bytes cannot hold {shard.samples} samples"
    for digest in (shard.pages, shard.sha256)[: 1 if shard.sha256 == "" else 2]:
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            yield f"{digest!r} is no SHA-256 of 64 hexadecimal digits"
