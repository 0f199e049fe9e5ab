"""Verification of a data set against its manifest."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from naign.data.format.manifest import INDEX, Manifest, Shard, size_problem
from naign.data.format.pages import table_name
from naign.data.format.samples import examine
from naign.data.sample import decode
from naign.errors import InputError
from naign.storage.base import Store
from naign.storage.store import open_store

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
        lines = [f"{path}: {len(problems)} problems", *(f"  {problem}" for problem in problems[:PROBLEMS])]
        if len(problems) > PROBLEMS:
            lines.append(f"  and {len(problems) - PROBLEMS} more")
        super().__init__("\n".join(filter(None, [*lines, note])))
        self.problems = problems


def verify(path: str, *, index: str = "", progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, page tables, tar structure, pixels, shapes, labels, keys, counts.
    Samples that index.json says are broken may be. Raises Problems, each with its shard and key.
    """
    manifest, store, tables = Manifest.load(index or path), open_store(path), open_store(index or path)
    problems, broken = list[str](), list[tuple[str, str]]()
    total = sum(shard.bytes for shard in manifest.shards)
    bar = tqdm(desc=f"verify {manifest.name}", total=total, unit="B", unit_scale=True, disable=not progress or None)

    def check(name: str, sample: dict[str, Any]) -> None:
        where, key = store.url(name), sample["__key__"]
        try:
            _, label = decode(sample, manifest, where)
        except InputError:
            if key not in manifest.broken.get(name, ()):
                raise
            broken.append((name, key))
            return
        if manifest.labels and label < 0:
            raise InputError(f"{where}, key {key}: no .cls, but {INDEX} has labels: repack it")

    with bar:
        for split in manifest.splits.values():
            seen = dict[str, str]()
            for shard in split.shards:
                with suppress(InputError):  # one that is missing is named below
                    problems += filter(None, [size_problem(store, shard)])
                some, actual, _ = examine(store, shard.name, partial(check, shard.name), seen, advance=bar.update)
                problems += some
                left_out = len(manifest.without.get(shard.name, ()))
                stored = replace(shard, samples=shard.samples + left_out)
                problems += _differences(store, tables, stored, actual) if actual else ()
    if problems:
        away = not index and not any(store.exists(shard.name) for shard in manifest.shards)
        note = f"no shard of {INDEX} is there: for an index apart from its shards, naign verify SHARDS --index {path}"
        raise Problems(path, problems, note if away else "")
    return Report(sum(shard.samples for shard in manifest.shards), len(manifest.shards), total, tuple(broken))


def _differences(store: Store, tables: Store, shard: Shard, actual: Shard) -> Iterator[str]:
    """Differences of a shard and its page table from the manifest, but for the size."""
    where, pages = store.url(shard.name), table_name(shard.name)
    wrong = f"its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
    if actual.samples != shard.samples:
        yield f"{where}: {actual.samples} samples, but {INDEX} says {shard.samples}: repack the data set"
    changed = actual.bytes == shard.bytes and actual.sha256 != shard.sha256 and shard.sha256 != ""
    if changed:
        yield f"{where}: {wrong}"
    try:
        if hashlib.sha256(tables.read(pages)).hexdigest() != shard.pages:
            yield f"{tables.url(pages)}: {wrong}"
        elif actual.bytes == shard.bytes and actual.pages != shard.pages and not changed:
            yield f"{where}: not what {tables.url(pages)} lists: copy it again, or run `naign index --force`"
    except InputError as error:
        yield str(error)
