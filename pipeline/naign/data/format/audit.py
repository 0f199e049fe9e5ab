"""Verification of a data set against its manifest."""

import hashlib
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from naign.data.format.manifest import INDEX, Manifest, Shard
from naign.data.format.pages import table_name
from naign.data.format.survey import Seen, check_problems, combine, read_tars
from naign.data.sample import decode
from naign.errors import InputError
from naign.storage.base import Store
from naign.storage.store import open_store


class Report(NamedTuple):
    """The sound data that `verify` read; samples that index.json records as broken are listed."""

    samples: int
    shards: int
    bytes: int
    broken: list[tuple[str, str]]  # shard and key


def verify(path: str, *, index: str = "", progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, page tables, tar structure, pixels, shapes, labels, counts. Samples that
    index.json says are broken may be. InputError lists the problems, each with its shard, and its key if it has one.
    """
    manifest = Manifest.load(index or path)
    store = open_store(path)
    tables = open_store(index or path)
    shards = manifest.shards
    size = sum(shard.bytes for shard in shards)
    summaries = read_tars(
        path,
        [shard.name for shard in shards],
        partial(_inspect, replace(manifest, splits={})),  # without shards, as each task gets it
        size=size,
        title=f"verify {manifest.name}" if progress else "",
    )
    problems = combine(store, summaries).problems
    broken = []
    for shard, summary in zip(shards, summaries, strict=True):
        for key, reason in summary.broken.items():
            if key in manifest.broken.get(shard.name, ()):
                broken.append((shard.name, key))
            else:
                problems.append(reason)
        if summary.table:  # it is there, and a tar
            problems += _differences(shard, summary.shard, store, tables)
    check_problems(path, problems)
    samples = sum(shard.samples for shard in shards)
    return Report(samples, len(shards), size, broken)


def _inspect(
    manifest: Manifest,
    sample: dict[str, Any],
    where: str,
    _: int,
) -> Seen:
    """Decode a sample as training does."""
    label = decode(sample, manifest, where)[1]
    if manifest.labels and label < 0:
        raise InputError(f"{where}, key {sample['__key__']}: no .cls, but {INDEX} has labels: repack it")
    return manifest.kind, manifest.shape, set()


def _differences(
    shard: Shard,
    actual: Shard,
    store: Store,
    tables: Store,
) -> list[str]:
    """How a shard and its page table differ from the manifest."""
    problems = []
    if actual != shard:
        remedy = "copy it again, or run `naign index --force`"
        problems.append(f"{store.url(shard.name)}: its sizes or SHA-256 are not those in {INDEX}: {remedy}")
    pages = table_name(shard.name)
    try:
        table = tables.read(pages)
    except InputError as error:
        return [*problems, str(error)]
    if hashlib.sha256(table).hexdigest() != shard.pages:
        problems.append(f"{tables.url(pages)}: its SHA-256 is not the one in {INDEX}: repack the data set")
    return problems
