"""Packing a source into WebDataset shards, which stream into their store as they are made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from hashlib import sha256
from typing import Any, BinaryIO, cast

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from naign.data.decode import encode
from naign.data.format.manifest import FORMS, INDEX, Manifest, Shard
from naign.data.format.pages import Pager, table_name
from naign.data.order import check_seed, parts, shuffled
from naign.data.sources.source import Source
from naign.errors import Conflict, InputError, require
from naign.storage.base import Store, Writer
from naign.storage.local import LocalStore
from naign.storage.store import open_store

SHARDS = 16  # shards a split at least, unless given: enough readers for a machine or two
SHARD_BYTES = 64 << 20  # decoded bytes a shard at most, unless given: long enough reads, short enough retries
ENCODINGS = ("png", "jpg", "webp", "npy")  # of images: jpg trades exactness for space, npy space for speed


def pack(
    source: Source,
    to: str,  # local folder or s3://bucket/prefix
    *,
    shards: int | None = None,  # a split; None: 16, or as many as keep a shard under 64 MiB decoded
    encoding: str = "png",  # of images: one of ENCODINGS
    seed: int = 0,  # of the order in which samples are dealt to shards
    force: bool = False,  # replace what is there, once the whole source was decoded
    progress: bool = True,  # bar on stderr
) -> tuple[Manifest, bool]:
    """Write the source's splits as shards `<split>-00000.tar` and, last, their index.json.

    The same source and settings give the same bytes. After an interruption the next call continues; an InputError
    deletes what was written. Returns the manifest, and False if the target held this data set already. Raises
    InputError if it holds another, unless `force`, or the source cannot be packed so.
    """
    check_seed(seed)
    require((encoding in ENCODINGS, f"cannot store images as {encoding!r}: use one of {', '.join(ENCODINGS)}"))
    counts = {split: _count(source, split, shards) for split in source.splits}
    target, suffix = open_store(to), encoding if source.kind == "image" else "npy"
    total = sum(len(examples) for examples in source.splits.values())
    bar = tqdm(total=total, unit="sample", desc=f"pack {source.name}", disable=not progress or None)
    plan = list[tuple[str, str, Callable[[Writer | None], tuple[Shard, bytes]]]]()
    for split, count in counts.items():
        order = shuffled(len(source.splits[split]), seed)  # cut evenly, so that every shard is a random subset
        for number, (first, last) in enumerate(parts(0, len(order), count)):
            name = f"{split}-{number:05d}.tar"
            plan.append((split, name, partial(_write, source, split, order[first:last], name, suffix, bar)))
    with _undone_on_error(target) as new, bar:
        if force and target.list():
            for _, _, write in plan:
                write(None)
            bar.reset()
            _clear(target, source)
        old = Manifest.parse(target.read(INDEX), where=target.url(INDEX)) if target.exists(INDEX) else None
        other = f"another data set ({old.name}, or {old.name} packed otherwise)" if old else "shards of another set"
        refusal = f"{to} already holds {other}: choose another folder, or replace it with --force"
        present, known, made = target.list(), set(old.shards if old else ()), {split: list[Shard]() for split in counts}
        for split, name, write in plan:
            exists = name in present
            if exists or old:
                shard, table = write(None)  # only measured
                same = shard in known if old else sha256(target.read(name)).hexdigest() == shard.sha256
                require((same, refusal))
            if not exists or target.size(name) != shard.bytes:  # of one that `old` lists: it was damaged
                with target.write(name) as stream:
                    new.append(name)
                    shard, table = write(stream)
            if table_name(name) not in present or target.read(table_name(name)) != table:
                new.append(table_name(name))
                target.put(table_name(name), table)
            made[split].append(shard)
    manifest = Manifest.of(source.name, source.kind, source.shape, source.labels, made)
    if old:
        require((manifest == old, refusal))
        return manifest, False
    if target.exists(INDEX):
        raise Conflict(f"{to}: another program packed a data set there: take another folder, or replace it by --force")
    target.put(INDEX, manifest.dump())
    return manifest, True


def _clear(target: Store, source: Source) -> None:
    """Delete the index, and with it the data set; then the files of the source's splits."""
    target.delete(INDEX)
    for name in target.list():
        stem, _, suffix = name.partition(".")
        if suffix in ("tar", "pages.npy") and stem.rpartition("-")[0] in source.splits:
            target.delete(name)


@contextmanager
def _undone_on_error(target: Store) -> Iterator[list[str]]:
    """A list of files written, which are deleted on an InputError: once the input is mended, shards differ."""
    names: list[str] = []
    try:
        with target.alone() if isinstance(target, LocalStore) else nullcontext():
            yield names
    except InputError as error:
        for name in names if not isinstance(error, Conflict) else ():
            with suppress(InputError):  # the first error is the one to report
                target.delete(name)
        raise


def _count(source: Source, split: str, shards: int | None) -> int:
    samples = len(source.splits[split])
    require((samples, f"{source.name}: the {split} split is empty: give more images"))
    if shards is None:
        size = samples * int(np.prod(source.shape)) * np.dtype(FORMS[source.kind][0]).itemsize
        return min(samples, max(SHARDS, -(-size // SHARD_BYTES)))
    if not 1 <= shards <= samples:
        raise InputError(f"cannot deal {samples} {split} samples to {shards} shards: use --shards 1 to {samples}")
    return shards


def _write(
    source: Source, split: str, order: list[int], name: str, suffix: str, bar: "tqdm[Any]", target: Writer | None
) -> tuple[Shard, bytes]:
    """Write one shard, or measure it without a target. Its bytes depend on the samples alone."""
    pager = Pager(target)
    with TarWriter(cast(BinaryIO, pager), user="", group="", mtime=0, encoder=False) as writer:
        for index in order:
            key, array, label = source.splits[split][index]
            assert array.shape == source.shape, f"{key}: {array.shape}"
            sample: dict[str, Any] = {"__key__": key, suffix: encode(array, suffix)}
            pager.start(writer.tarstream.offset)
            writer.write(sample if label < 0 else {**sample, "cls": str(label).encode()})
            bar.update()
        pager.end = writer.tarstream.offset
    return pager.shard(name)
