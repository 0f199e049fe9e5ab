"""Verification of a data set against its manifest."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from pipeline.data.format.manifest import INDEX, Manifest, size_problem
from pipeline.data.format.pages import Pager, table_name
from pipeline.data.format.samples import examine
from pipeline.data.format.shards import Shard
from pipeline.data.sample import decode
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.store import open_store

PROBLEMS = 20  # how many problems a message lists


class Report(NamedTuple):
    """The sound data that `verify` read; samples that index.json records as broken are listed."""

    samples: int
    shards: int
    bytes: int
    broken: tuple[tuple[str, str], ...]  # shard and key


class Problems(InputError):
    """The problems of a data set; the message lists the first of them."""

    def __init__(self, path: str, problems: list[str], note: str = "") -> None:
        shown = [f"  {problem}" for problem in problems[:PROBLEMS]]
        more = [f"  and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
        super().__init__("\n".join([f"{path}: {len(problems)} problems", *shown, *more, *([note] if note else [])]))
        self.problems = problems


def bar_of_bytes(what: str, total: int, *, shown: bool) -> "tqdm[Any]":
    """A progress bar of so many bytes."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not shown)


def verify(path: str, *, index: str = "", progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, page tables, tar structure, pixels, shapes, labels, keys, counts.

    Samples that index.json says are broken may be. Raises Problems, each with its shard and key.
    """
    manifest, store, problems = Manifest.load(index or path), open_store(path), list[str]()
    tables = open_store(index) if index else store
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total = sum(shard.bytes for shard in shards)
    known = {name: set(keys) for name, keys in manifest.broken.items()}
    broken = list[tuple[str, str]]()

    def check(name: str, sample: dict[str, Any]) -> None:
        where, key = store.url(name), sample["__key__"]
        try:
            _, label = decode(sample, manifest, where)
        except InputError:
            if key not in known.get(name, ()):
                raise
            broken.append((name, key))
            return
        if manifest.labels and label < 0:
            raise InputError(f"{where}, key {key}: no .cls, but {INDEX} has labels: repack it")

    with bar_of_bytes(f"verify {manifest.name}", total, shown=progress) as bar:
        for split in manifest.splits.values():
            seen = dict[str, str]()
            for shard in split.shards:
                with suppress(InputError):  # one that is missing is named below
                    problems += filter(None, [size_problem(store, shard)])
                pager = Pager()
                some, whole = examine(store, shard.name, pager, partial(check, shard.name), seen, bar.update)
                problems += some
                problems += _differences(store, tables, shard, pager.shard(shard.name)[0]) if whole else ()
    if problems:
        raise Problems(path, problems)
    samples = sum(shard.samples for shard in shards)
    return Report(samples=samples, shards=len(shards), bytes=total, broken=tuple(broken))


def _differences(store: Store, tables: Store, shard: Shard, actual: Shard) -> Iterator[str]:
    """Differences of a shard and its page table from the manifest, but for the size."""
    where, pages = store.url(shard.name), table_name(shard.name)
    wrong = f"its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
    if actual.samples != shard.samples:
        yield f"{where}: {actual.samples} samples, but {INDEX} says {shard.samples}: repack the data set"
    if shard.sha256 and actual.bytes == shard.bytes and actual.sha256 != shard.sha256:
        yield f"{where}: {wrong}"
    try:
        if hashlib.sha256(tables.read(pages)).hexdigest() != shard.pages:
            yield f"{tables.url(pages)}: {wrong}"
        elif actual.bytes == shard.bytes and actual.pages != shard.pages and not shard.sha256:
            yield f"{where}: other bytes than when it was indexed: copy it again, or run `naign index --force`"
        elif actual.sha256 == shard.sha256 and actual.pages != shard.pages:
            yield f"{tables.url(pages)}: not the page table of that shard: run `naign index --force`"
    except InputError as error:
        yield str(error)
