"""What indexing keeps of one tar: its entry in the manifest, page table, keys, and a survey of its samples.

It is also written to a file, so that an interrupted call can continue.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.format.pages import ROW, Pager, Table, dump_table, parse_table
from pipeline.data.format.samples import ending, examine
from pipeline.data.format.shards import Shard
from pipeline.data.format.survey import Survey
from pipeline.storage.base import Store

KEPT = ".indexing.json"
"""Ends the names of summaries' files, which exist until index.json does."""

Hashes = npt.NDArray[np.uint64]


@dataclass(kw_only=True)
class Summary:
    """What was read of one tar."""

    shard: Shard
    table: Table
    survey: Survey
    keys: Hashes = field(repr=False)  # of its samples, sorted
    problems: list[str]

    def dump(self, version: str) -> bytes:
        """The bytes of its file; `version` is that of the tar."""
        packed = {"table": dump_table(self.table), "keys": self.keys.astype("<u8").tobytes()}
        texts = {name: base64.b64encode(data).decode() for name, data in packed.items()}
        record = {"version": version, "shard": asdict(self.shard), "survey": asdict(self.survey), **texts}
        body = json.dumps(record, default=sorted)  # sets, as lists
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "record": body}).encode()

    @classmethod
    def parse(cls, data: bytes, name: str, version: str, settings: Survey) -> "Summary | None":
        """The summary in a file, None unless it is whole, of that version of the tar `name`, made with the settings."""
        try:
            kept = json.loads(data)
            if kept["sha256"] != hashlib.sha256(kept["record"].encode()).hexdigest():
                return None
            record = json.loads(kept["record"])
            shard, survey = Shard(**record["shard"]), Survey.parse(record["survey"])
            if (shard.name, record["version"]) != (name, version) or not survey.agrees_with(settings):
                return None
            table = parse_table(base64.b64decode(record["table"]), samples=shard.samples, size=shard.bytes)
            keys = np.frombuffer(base64.b64decode(record["keys"]), "<u8")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut, or of another version of naign
            return None
        return cls(shard=shard, table=table, survey=survey, keys=keys, problems=[])


def summarize(store: Store, name: str, settings: Survey, *, whole: bool = False) -> Summary:
    """Read every byte of a tar, and with `whole` hash it also as a whole."""
    where, pager, survey, seen = store.url(name), Pager(whole=whole), settings.anew(), dict[str, str]()

    def see(sample: dict[str, Any]) -> None:
        survey.see(sample, f"{where}, key {sample['__key__']}")

    problems, readable = examine(store, name, pager, see, seen)
    if not readable:
        shard, table = Shard(name=name, samples=0, bytes=0, pages=""), np.empty(0, ROW)
        return Summary(shard=shard, table=table, survey=survey, keys=np.empty(0, np.uint64), problems=problems)
    problems += ending(where, pager)
    shard, table = pager.shard(name)
    keys = np.sort(np.array([key_hash(key) for key in seen], np.uint64))
    return Summary(shard=shard, table=table, survey=survey, keys=keys, problems=problems)


def key_hash(key: str) -> int:
    """64 bits of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
