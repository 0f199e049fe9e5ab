"""The shards of a split: a list, or for large data sets a table that creates a shard when it is accessed."""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pipeline.data.decode import decoding

SAMPLE_BYTES = 1024  # the least that a sample takes in a tar: a block of header and one of data
MOST_SAMPLES = 2**40  # of a split
MANY = 10_000  # shards of a split that index.json lists; more are in a table of their own


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    pages: str  # SHA-256 of its page table (pages.py)
    sha256: str = ""  # of all of it; not there where the index lies elsewhere: page tables have what is read

    def fields(self) -> dict[str, Any]:
        """As index.json has it."""
        found = {"name": self.name, "samples": self.samples, "bytes": self.bytes}
        return {**found, **({"sha256": self.sha256} if self.sha256 else {}), "pages": self.pages}

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Shard":
        """From index.json. Raises TypeError, or ValueError for an empty hash: one that is not known is not there."""
        if fields.get("sha256", "unknown") == "":
            raise ValueError("'' is no SHA-256")
        return cls(**fields)


class ShardTable(Sequence[Shard]):
    """Shards as a NumPy table with the columns name, samples, bytes, pages and sha256 (zeros where it is not known).

    A hundred thousand take 15 MB and are read in a fifth of a second, a twelfth of what they take one by one.
    """

    def __init__(self, rows: npt.NDArray[Any]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "ShardTable":
        """The same shards as a table."""
        if isinstance(shards, ShardTable):
            return shards
        names = np.array([shard.name.encode() for shard in shards])
        kinds = [("name", names.dtype), ("samples", "<i8"), ("bytes", "<i8"), ("pages", "V32"), ("sha256", "V32")]
        rows = np.zeros(len(shards), kinds)
        rows["name"] = names
        for column in ("samples", "bytes"):
            rows[column] = [getattr(shard, column) for shard in shards]
        for column in ("pages", "sha256"):
            digests = b"".join(bytes.fromhex(getattr(shard, column)) or bytes(32) for shard in shards)
            rows[column] = np.frombuffer(digests, "V32")
        return cls(rows)

    @classmethod
    def parse(cls, data: bytes, sha256: str) -> "ShardTable":
        """From the bytes of its file. Raises ValueError where they are none, or have another hash."""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("the SHA-256 of the table of shards is not the one in index.json")
        with decoding():
            rows = np.load(io.BytesIO(data), allow_pickle=False)
        kinds = {name: kind[0].str for name, kind in (rows.dtype.fields or {}).items()}
        wanted = {"name": kinds.get("name"), "samples": "<i8", "bytes": "<i8", "pages": "|V32", "sha256": "|V32"}
        if kinds != wanted or rows.ndim != 1 or not re.fullmatch(r"\|S\d+", str(kinds["name"])):
            raise ValueError(f"a table of shards has the columns {', '.join(wanted)}, not those of {rows.dtype}")
        return cls(rows)

    def dump(self) -> bytes:
        """The bytes of its file."""
        stream = io.BytesIO()
        np.save(stream, self.rows)
        return stream.getvalue()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardTable": ...
    def __getitem__(self, place: int | slice) -> "Shard | ShardTable":
        if isinstance(place, slice):
            return ShardTable(self.rows[place])
        name, samples, size, pages, sha256 = self.rows[place].tolist()
        known = sha256.hex() if sha256.strip(b"\0") else ""
        return Shard(name=name.decode(), samples=samples, bytes=size, pages=pages.hex(), sha256=known)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Shard.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


def sizes(shards: Sequence[Shard]) -> tuple[int, ...]:
    """Samples of each shard."""
    if isinstance(shards, ShardTable):
        return tuple(shards.rows["samples"].tolist())
    return tuple(shard.samples for shard in shards)


def problems(shards: Sequence[Shard]) -> Iterator[str]:
    """What is of the wrong type or out of range, or stands twice in a table. What follows a problem may raise."""
    if isinstance(shards, ShardTable):
        yield from _table_problems(shards)
        return
    for shard in shards:
        yield from (f"shard {shard.name!r}: {problem}" for problem in _shard_problems(shard))


def _table_problems(table: ShardTable) -> Iterator[str]:
    rows = table.rows
    short = (rows["samples"] < 1) | (rows["bytes"] // SAMPLE_BYTES < rows["samples"])
    raw = np.frombuffer(rows["name"].tobytes(), np.uint8).reshape(len(rows), -1)
    odd = (raw[:, 0] == 0) | (raw[:, 0] == ord(".")) | np.isin(raw, list(b"/\\")).any(1)
    odd |= ((raw < 32) & (raw != 0)).any(1) | (raw > 126).any(1)
    odd |= ((raw[:, :-1] == 0) & (raw[:, 1:] != 0)).any(1)
    for place in np.flatnonzero(short | odd).tolist():  # names beyond ASCII are looked at one by one
        yield from (f"shard {table[place].name!r}: {problem}" for problem in _shard_problems(table[place]))
    if len(np.unique(rows["name"])) < len(rows):
        yield "a shard is listed twice"


def is_count(value: object, least: int = 0) -> bool:
    """Whether it is an integer from `least` up; JSON's true, 1.0 and "1" are none."""
    return type(value) is int and value >= least


def _shard_problems(shard: Shard) -> Iterator[str]:
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
