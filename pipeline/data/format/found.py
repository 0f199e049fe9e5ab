"""The result of reading one tar by others, kept in a file so that an interrupted call can continue."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.data.format.pages import Pager, Table, dump_table, parse_table
from pipeline.data.format.samples import ending, scan
from pipeline.data.format.shards import Shard, problems
from pipeline.data.format.survey import Survey
from pipeline.errors import InputError
from pipeline.storage.base import Store

FOUND = ".indexing.json"
"""Ends the name of the file that keeps it, until index.json is there."""

Hashes = npt.NDArray[np.uint64]


@dataclass(kw_only=True)
class Found:
    """What reading one shard found."""

    shard: Shard
    table: Table
    survey: Survey
    keys: Hashes = field(repr=False)  # of its samples, sorted
    problems: list[str]

    def dump(self, version: str) -> bytes:
        """The bytes that keep it; `version` is that of the tar."""
        packed = {"table": dump_table(self.table), "keys": self.keys.astype("<u8").tobytes()}
        texts = {name: base64.b64encode(data).decode() for name, data in packed.items()}
        record = {"version": version, **asdict(self.shard), "survey": asdict(self.survey), **texts}
        return json.dumps(record, default=sorted).encode()  # sets, as lists

    @classmethod
    def parse(cls, data: bytes, file: str, version: str, settings: Survey) -> "Found | None":
        """What was kept, if it is of that version of the tar `file`, was found with these settings and is whole."""
        try:
            kept = json.loads(data)
            table, keys = (base64.b64decode(kept.pop(name), validate=True) for name in ("table", "keys"))
            survey, there = Survey.parse(kept.pop("survey")), kept.pop("version")
            shard = Shard(**kept)
            if shard.name != file or any(problems([shard])):
                return None
            found = parse_table(table, samples=shard.samples, size=shard.bytes)
            hashes = np.frombuffer(keys, "<u8")
            whole = len(hashes) == shard.samples and bool((hashes[1:] >= hashes[:-1]).all())
            if there != version or not survey.holds(settings) or not whole:
                return None
            return cls(shard=shard, table=found, survey=survey, keys=hashes, problems=[])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None


def read_shard(
    store: Store, file: str, settings: Survey, advance: Callable[[int], object] = lambda _: None, *, whole: bool = False
) -> Found:
    """Read every byte of a tar; `advance` is told how many. Its own hash is taken if it is to be hashed `whole`."""
    where, pager, problems = store.url(file), Pager(whole=whole), list[str]()
    survey, keys = settings.anew(), list[int]()
    seen = set[str]()
    try:
        for sample in scan(store, file, pager, advance):
            key = sample["__key__"]
            if key in seen:
                problems.append(f"{where}, key {key}: also in {file}: repack the data set")
            seen.add(key)
            keys.append(key_hash(key))
            try:
                survey.see(sample, f"{where}, key {key}")
            except InputError as error:
                problems.append(str(error))
    except InputError as error:  # missing, or no tar from some byte on
        empty = Shard(name=file, samples=0, bytes=0, sha256="", pages="")
        table = np.empty(0, [("sample", "<i8")])
        hashes, problems = np.empty(0, np.uint64), [*problems, str(error)]
        return Found(shard=empty, table=table, survey=survey, keys=hashes, problems=problems)
    problems += ending(where, pager)
    shard, table = pager.shard(file)
    hashes = np.sort(np.array(keys, np.uint64))
    return Found(shard=shard, table=table, survey=survey, keys=hashes, problems=problems)


def key_hash(key: str) -> int:
    """64 bits of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
