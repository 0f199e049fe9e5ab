"""Packing a source into WebDataset shards."""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from webdataset import TarWriter

from naign.data.decode import encode
from naign.data.format.manifest import FORMS, INDEX, Manifest, Split
from naign.data.format.pages import Pager, table_name
from naign.data.order import check_seed, parts, shuffled
from naign.data.sources.source import BrokenPicture, Made, Source
from naign.errors import InputError, require
from naign.storage.base import Store
from naign.storage.store import open_store
from naign.terminal import counted

log = logging.getLogger("naign.data")

SHARDS = 16  # shards a split at least, unless given: enough readers for a machine or two
SHARD_BYTES = 64 << 20  # decoded bytes a shard at most, unless given: long enough reads, short enough retries
ENCODINGS = ("png", "jpg", "npy")  # of images: jpg trades exactness for space, npy space for speed


def pack(
    source: Source,
    to: str,  # local folder or s3://bucket/prefix
    *,
    shards: int | None = None,  # a split; None: 16, or as many as keep a shard under 64 MiB decoded
    encoding: str = "png",  # of images: one of ENCODINGS
    seed: int = 0,  # of the order in which samples are dealt to shards
    force: bool = False,  # replace what is there, which is deleted once the whole source was decoded
) -> tuple[Manifest, bool]:
    """Write the source's splits as shards `<split>-00000.tar` and, last, their index.json.

    The same source and settings give the same bytes, so after an interruption the next call continues. Each shard is
    made in memory. Returns the manifest, and False if the target held this data set already. Raises InputError if it
    holds another, or shards of another, unless `force`, or the source cannot be packed so.
    """
    check_seed(seed)
    if encoding not in ENCODINGS:
        raise InputError(f"cannot store images as {encoding!r}: use one of {', '.join(ENCODINGS)}")
    suffix = encoding if source.kind == "image" else "npy"
    dealt = {split: _deal(source, split, shards, seed) for split in source.splits}
    target = open_store(to)
    if force and target.list():
        for split, hands in dealt.items():
            for _ in _build(source.splits[split], hands, suffix):
                pass  # an InputError comes before anything is deleted
        _clear(target, source)
    refusal = f"{to} already holds another data set: choose another folder, or replace it with --force"
    written: list[str] = []
    try:
        splits = _write_shards(
            target,
            source,
            dealt,
            suffix,
            refusal=refusal,
            written=written,
        )
        manifest = Manifest(
            name=source.name,
            kind=source.kind,
            shape=source.shape,
            dtype=FORMS[source.kind][0],
            labels=source.labels,
            splits=splits,
        )
        is_there = target.exists(INDEX)
        if is_there and Manifest.load(to) != manifest:
            raise InputError(refusal)
    except InputError:
        for name in written:
            target.delete(name)
        raise
    if not is_there:
        target.put(INDEX, manifest.dump())
    return manifest, not is_there


def _write_shards(
    target: Store,
    source: Source,
    dealt: Mapping[str, list[list[int]]],
    suffix: str,
    *,
    refusal: str,
    written: list[str],
) -> dict[str, Split]:
    """Write the shards that are not there. `written` gets the names of new files; InputError where others differ."""
    present = target.list()
    splits = {}
    for split, hands in dealt.items():
        made = []
        bar = counted(f"pack {source.name} {split}", hands, unit="shard")
        for number, data, pager in _build(source.splits[split], bar, suffix):
            name = f"{split}-{number:05d}.tar"
            shard, table = pager.shard(name)
            for file, content in ((name, data), (table_name(name), table)):
                if file not in present:
                    target.put(file, content)
                    written.append(file)
                elif target.size(file) != len(content) or target.read(file) != content:
                    raise InputError(refusal)
            made.append(shard)
        splits[split] = Split.of(made)
    return splits


def _deal(
    source: Source,
    split: str,
    shards: int | None,
    seed: int,
) -> list[list[int]]:
    """The rows of each shard of a split."""
    samples = len(source.splits[split])
    require((samples, f"{source.name}: the {split} split is empty: give more images"))
    if shards is None:
        size = samples * math.prod(source.shape) * np.dtype(FORMS[source.kind][0]).itemsize
        shards = min(samples, max(SHARDS, -(-size // SHARD_BYTES)))
    fits = 1 <= shards <= samples
    require((fits, f"cannot deal {samples} {split} samples to {shards} shards: use --shards 1 to {samples}"))
    order = shuffled(samples, seed)  # cut evenly, so that every shard is a random subset
    return [order[first:last] for first, last in parts(0, samples, shards)]


def _build(
    examples: Made,
    hands: Iterable[list[int]],
    suffix: str,
) -> Iterator[tuple[int, bytes, Pager]]:
    """Number, bytes and measure of each shard that holds a picture; the bytes depend on the samples alone. Broken
    pictures are left out. InputError where no picture can be read.
    """
    found = False
    for number, rows in enumerate(hands):
        stream = io.BytesIO()
        starts = []
        with TarWriter(
            stream,
            user="",
            group="",
            mtime=0,
            encoder=False,
        ) as writer:
            for row in rows:
                try:
                    key, array, label = examples[row]
                except BrokenPicture as error:
                    log.warning("%s: left out", error)
                    continue
                sample = {"__key__": key, suffix: encode(array, suffix)}
                if label >= 0:
                    sample["cls"] = str(label).encode()
                starts.append(writer.tarstream.offset)
                writer.write(sample)
            end = writer.tarstream.offset
        if not starts:
            continue
        found = True
        data = stream.getvalue()
        pager = Pager()
        pager.write(data)
        for start in starts:
            pager.start(start)
        pager.end = end
        yield number, data, pager
    require((found, "no picture of a split can be read: see the warnings, and check the path"))


def _clear(target: Store, source: Source) -> None:
    """Delete the index, and with it the data set; then the files of the source's splits."""
    target.delete(INDEX)
    for name in target.list():
        stem, _, suffix = name.partition(".")
        split, _, _ = stem.rpartition("-")
        if split in source.splits and suffix in ("tar", "pages.npy"):
            target.delete(name)
