"""What is learned of one tar by reading every byte of it: its page table, and what its samples are."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from naign.data.format.manifest import Shard
from naign.data.format.pages import Pager
from naign.data.format.tar import TAR_BLOCK
from naign.data.format.webdataset import scan
from naign.errors import InputError
from naign.storage.base import Store

MOST_LABELS = 1_000_000  # a larger number in .cls is not a label, and more texts are not classes
ALIKE = "all samples must be alike; `naign pack folder` makes them so"

Seen = tuple[str, tuple[int, ...], set[str]]  # kind, shape and, if there is one, label of a sample
Inspect = Callable[[dict[str, Any], str, int], Seen]
"""Inspects a sample, given with its shard's URL and its number there. Raises InputError if it cannot be used."""


@dataclass(kw_only=True)
class Summary:
    """What was read of one tar, or of several; also written to a file, so that an interrupted call can continue."""

    shard: Shard = Shard(name="", samples=0, bytes=0, pages="")
    table: bytes = b""  # the file of its page table
    kind: str = ""  # of all samples
    shape: tuple[int, ...] = ()  # of all samples; (C, 0, 0) of pictures that differ in size
    labels: set[str] = field(default_factory=set)  # as they are written; empty where no sample has one
    broken: dict[str, str] = field(default_factory=dict)  # keys of samples that cannot be used, and why
    problems: list[str] = field(default_factory=list)

    def add(self, seen: Seen, where: str) -> None:
        """Add a sample, or samples that are alike; it is a problem if they are unlike the others."""
        kind, shape, labels = seen
        if not self.kind:
            self.kind = kind
            self.shape = shape
            self.labels = set(labels)
        if kind != self.kind or (kind == "point" and shape != self.shape):
            self.problems.append(f"{where}: {kind} {shape}, others are {self.kind} {self.shape}: {ALIKE}")
        elif bool(labels) != bool(self.labels):
            what = "a label" if labels else "no label"
            self.problems.append(f"{where}: {what}, unlike others: {ALIKE}")
        else:
            channels, *size = self.shape
            if size != [*shape[1:]]:
                size = [0, 0]
            self.shape = (max(shape[0], channels), *size)  # grey ones are read as colour among others
            self.labels |= labels
        if len(self.labels) > MOST_LABELS:
            raise InputError(f"{where}: more than {MOST_LABELS} labels are not classes: choose others with --label")

    def dump(self, version: str) -> bytes:
        """The bytes of its file; `version` says what was read, and how."""
        fields = {"version": version, **asdict(self), "table": self.table.hex()}
        return json.dumps(fields, default=sorted).encode()  # sets, as lists

    @classmethod
    def parse(cls, data: bytes, version: str) -> "Summary | None":
        """The summary in a file, None unless it is of that version."""
        try:
            fields = json.loads(data)
            if fields.pop("version") != version:
                return None
            fields["shard"] = Shard(**fields["shard"])
            fields["table"] = bytes.fromhex(fields["table"])
            fields["shape"] = tuple(fields["shape"])
            fields["labels"] = set(fields["labels"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError):  # cut, or of another version of naign
            return None


def summarize(store: Store, name: str, inspect: Inspect) -> Summary:
    """Read every byte of a tar. What is wrong with it, or with single samples, is in `problems` and `broken`."""
    where = store.url(name)
    pager = Pager()
    keys: set[str] = set()
    summary = Summary(shard=Shard(name=name, samples=0, bytes=0, pages=""))
    try:
        for number, sample in enumerate(scan(store, name, pager)):
            key = sample["__key__"]
            if key in keys:
                summary.problems.append(f"{where}, key {key}: twice, or its members are apart: repack the data set")
            keys.add(key)
            try:
                seen = inspect(sample, where, number)
            except InputError as error:
                summary.broken[key] = str(error)
            else:
                summary.add(seen, f"{where}, key {key}")
        _check_end(pager, where)
    except InputError as error:  # missing, or not a tar from some byte on
        summary.problems.append(str(error))
        return summary
    summary.shard, summary.table = pager.shard(name)
    return summary


def _check_end(pager: Pager, where: str) -> None:
    """Raise InputError for what is wrong with the end of a tar."""
    if not pager.samples:
        raise InputError(f"{where}: holds no samples: remove it")
    rest = pager.get(pager.after, pager.size)
    if len(rest) < 2 * TAR_BLOCK:  # cut between two samples it reads as if whole
        raise InputError(f"{where}: ends in the middle: no end-of-archive mark: copy it again")
    if rest.strip(b"\0"):
        raise InputError(f"{where}: more data behind the end of the archive, as of tars laid end to end: repack them")
