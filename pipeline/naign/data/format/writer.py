"""Packing a source into WebDataset shards, which stream into their store as they are made."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from naign.data.decode import encode
from naign.data.format.manifest import FORMS, INDEX, Manifest, Shard, Split
from naign.data.format.pages import Pager, table_name
from naign.data.order import check_seed, parts, shuffled
from naign.data.sources.source import Made, Source
from naign.errors import Conflict, InputError
from naign.storage.base import Store, Writer
from naign.storage.local import LocalStore
from naign.storage.store import open_store

SHARDS = 16  # shards a split at least, unless given: enough readers for a machine or two
SHARD_BYTES = 64 << 20  # decoded bytes a shard at most, unless given: long enough reads, short enough retries
ENCODINGS = ("png", "jpg", "npy")  # of images: jpg trades exactness for space, npy space for speed


class _Planned(NamedTuple):
    """A shard to be written."""

    split: str
    name: str
    examples: Made
    rows: list[int]  # of the examples


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
    if encoding not in ENCODINGS:
        raise InputError(f"cannot store images as {encoding!r}: use one of {', '.join(ENCODINGS)}")
    suffix = encoding if source.kind == "image" else "npy"
    plan = list(_plan(source, shards, seed))
    target = open_store(to)
    made: dict[str, list[Shard]] = {split: [] for split in source.splits}
    with _undone_on_error(target) as written:
        hidden = None if progress else True  # None: where stderr is not a terminal
        if force and target.list():
            for planned in tqdm(plan, desc=f"check {source.name}", unit="shard", disable=hidden):
                _write(planned, suffix, io.BytesIO())
            _clear(target, source)
        present = target.list()
        old = None
        if INDEX in present:
            old = Manifest.parse(target.read(INDEX), where=target.url(INDEX))
        refusal = f"{to} already holds another data set: choose another folder, or replace it with --force"
        for planned in tqdm(plan, desc=f"pack {source.name}", unit="shard", disable=hidden):
            name = planned.name
            if name in present:
                copy = io.BytesIO()
                shard, table = _write(planned, suffix, copy)
                if _differs(target, name, copy.getvalue()):
                    raise InputError(refusal)
            else:
                with target.write(name) as stream:
                    written.append(name)
                    shard, table = _write(planned, suffix, stream)
            if table_name(name) not in present:
                written.append(table_name(name))
                target.put(table_name(name), table)
            elif _differs(target, table_name(name), table):
                raise InputError(refusal)
            made[planned.split].append(shard)
        manifest = Manifest(
            name=source.name,
            kind=source.kind,
            shape=source.shape,
            dtype=FORMS[source.kind][0],
            labels=source.labels,
            splits={split: Split.of(listed) for split, listed in made.items()},
        )
        if old and manifest != old:
            raise InputError(refusal)
        if old:
            return manifest, False
    if target.exists(INDEX):
        raise Conflict(f"{to}: another program packed a data set there: take another folder, or replace it by --force")
    target.put(INDEX, manifest.dump())
    return manifest, True


def _plan(source: Source, shards: int | None, seed: int) -> Iterator[_Planned]:
    """The shards of all splits."""
    for split, examples in source.splits.items():
        samples = len(examples)
        if not samples:
            raise InputError(f"{source.name}: the {split} split is empty: give more images")
        count = shards
        if count is None:
            dtype, _ = FORMS[source.kind]
            size = samples * math.prod(source.shape) * np.dtype(dtype).itemsize
            count = min(samples, max(SHARDS, -(-size // SHARD_BYTES)))
        if not 1 <= count <= samples:
            raise InputError(f"cannot deal {samples} {split} samples to {count} shards: use --shards 1 to {samples}")
        order = shuffled(samples, seed)  # cut evenly, so that every shard is a random subset
        for number, (first, last) in enumerate(parts(0, samples, count)):
            yield _Planned(split, f"{split}-{number:05d}.tar", examples, order[first:last])


def _write(planned: _Planned, suffix: str, target: Writer) -> tuple[Shard, bytes]:
    """Write one shard: its entry in the manifest and its page table. Its bytes depend on the samples alone."""
    pager = Pager(target)
    with TarWriter(cast(BinaryIO, pager), user="", group="", mtime=0, encoder=False) as writer:
        for key, array, label in planned.examples.sound(planned.rows):
            sample = {"__key__": key, suffix: encode(array, suffix)}
            if label >= 0:
                sample["cls"] = str(label).encode()
            pager.start(writer.tarstream.offset)
            writer.write(sample)
        pager.end = writer.tarstream.offset
    if not pager.samples:
        raise InputError(f"{planned.name}: no picture for it can be read: remove broken ones, or use fewer --shards")
    return pager.shard(planned.name)


def _differs(target: Store, name: str, data: bytes) -> bool:
    return target.size(name) != len(data) or target.read(name) != data


def _clear(target: Store, source: Source) -> None:
    """Delete the index, and with it the data set; then the files of the source's splits."""
    target.delete(INDEX)
    for name in target.list():
        stem, _, suffix = name.partition(".")
        split, _, _ = stem.rpartition("-")
        if split in source.splits and suffix in ("tar", "pages.npy"):
            target.delete(name)


@contextmanager
def _undone_on_error(target: Store) -> Iterator[list[str]]:
    """A list of files written, which are deleted on an InputError: once the input is mended, shards differ."""
    names: list[str] = []
    lock = target.alone() if isinstance(target, LocalStore) else nullcontext()
    with lock:
        try:
            yield names
        except Conflict:
            raise
        except InputError:
            for name in names:
                with suppress(InputError):  # the first error is the one to report
                    target.delete(name)
            raise
