"""Packing a source into WebDataset shards, and verifying shards against their manifest."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from pipeline.data.examples import Source
from pipeline.data.manifest import INDEX, Manifest, Shard, Split, size_problem
from pipeline.data.plan import check_seed, parts
from pipeline.data.samples import decode, encode, read_samples
from pipeline.data.store import Store, open_store
from pipeline.errors import InputError

SHARDS = 16
"""The usual least number of shards a split: enough readers for a machine or two."""

SHARD_BYTES = 64 << 20
"""The usual most bytes of decoded samples a shard: long enough reads, short enough retries."""


def pack(
    source: Source,
    to: str,  # local folder or s3://bucket/prefix
    *,
    shards: int | None = None,  # a split; None: 16, or as many as keep a shard under 64 MiB decoded
    encoding: str = "png",  # of images: png, or jpg to trade exactness for space
    seed: int = 0,  # of the order in which samples are dealt to shards
    force: bool = False,  # replace what is there
    progress: bool = True,  # bar on stderr
) -> tuple[Manifest, bool]:
    """Write the source's splits as shards `<split>-00000.tar` and, last, their index.json.

    The same source and settings give the same bytes. A pack that was interrupted leaves no index.json, and goes on
    where it was when run again; one that fails on the user's input takes back what it wrote. Returns the manifest, and
    False if that very data set was there already.
    Raises InputError where the target holds anything else, unless `force`, or the source cannot be packed so.
    """
    check_seed(seed)
    if encoding not in ("png", "jpg"):
        raise InputError(f"cannot store images as {encoding!r}: use png or jpg")
    counts = {split: _count(source, split, shards) for split in source.splits}
    target = open_store(to)
    present = target.list()
    old = Manifest.parse(target.read(INDEX), where=target.url(INDEX)) if INDEX in present and not force else None
    if old and _outline(old) != (source.name, source.kind, source.shape, source.labels, _layout(source, counts)):
        raise InputError(_refusal(to, old))
    if force:
        target.delete(INDEX)  # from here on the old data set does not exist
        for name in present:
            if name.endswith(".tar") and name.rpartition("-")[0] in source.splits:
                target.delete(name)
        present = []

    splits = {}
    total = sum(len(examples) for examples in source.splits.values())
    with (
        _taken_back(target) as new,
        tqdm(total=total, unit="sample", desc=f"pack {source.name}", disable=not progress) as bar,
    ):
        for split, count in counts.items():
            known = {shard.name: shard for shard in old.splits[split].shards} if old else {}
            written = []
            for number, order in enumerate(_deal(len(source.splits[split]), count, seed)):
                name = f"{split}-{number:05d}.tar"
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / name
                    shard = _write(source, split, order, file, encoding, bar)
                    if known and known.get(name) != shard:
                        raise InputError(_refusal(to, old))
                    if not _is_there(target, shard, present, known=bool(known)):
                        target.put(name, file)
                        if old is None:
                            new.append(name)
                written.append(shard)
            splits[split] = Split(samples=len(source.splits[split]), shards=tuple(written))
    manifest = Manifest(
        name=source.name,
        kind=source.kind,
        shape=source.shape,
        dtype="uint8" if source.kind == "image" else "float32",
        labels=source.labels,
        splits=splits,
    )
    if old is None:
        target.put(INDEX, manifest.dump())
    return manifest, old is None


@contextmanager
def _taken_back(target: Store) -> Iterator[list[str]]:
    """A list for names of what was written; it is deleted on an InputError, as mended input makes other shards."""
    names: list[str] = []
    try:
        yield names
    except InputError:
        for name in names:
            with suppress(InputError):  # the first error is the one to report
                target.delete(name)
        raise


def _count(source: Source, split: str, shards: int | None) -> int:
    """Shards of a split."""
    samples = len(source.splits[split])
    if not samples:
        raise InputError(f"{source.name}: the {split} split is empty: give more images")
    if shards is None:
        size = samples * int(np.prod(source.shape)) * (1 if source.kind == "image" else 4)
        return min(samples, max(SHARDS, -(-size // SHARD_BYTES)))
    if not 1 <= shards <= samples:
        raise InputError(f"cannot deal {samples} {split} samples to {shards} shards: use --shards 1 to {samples}")
    return shards


def _outline(manifest: Manifest) -> tuple[Any, ...]:
    layout = {name: (split.samples, len(split.shards)) for name, split in manifest.splits.items()}
    return manifest.name, manifest.kind, manifest.shape, manifest.labels, layout


def _layout(source: Source, counts: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (len(examples), counts[name]) for name, examples in source.splits.items()}


def _refusal(to: str, old: Manifest | None) -> str:
    what = f"another data set ({old.name}, or {old.name} packed otherwise)" if old else "shards of another data set"
    return f"{to} already holds {what}: choose another folder, or replace it with --force"


def _deal(samples: int, count: int, seed: int) -> Iterator[list[int]]:
    """Indices of each shard's samples: a random order cut evenly, so that every shard is a random subset."""
    draws = np.random.Philox(key=seed % 2**64).random_raw(samples)  # raw: the same in every NumPy
    order = np.argsort(draws, kind="stable")
    for start, stop in parts(0, samples, count):
        yield [int(index) for index in order[start:stop]]


def _write(source: Source, split: str, order: list[int], file: Path, encoding: str, bar: "tqdm[Any]") -> Shard:
    """Write one shard; owner, mode and time are fixed so that its bytes depend on the samples alone."""
    suffix = encoding if source.kind == "image" else "npy"
    with (
        file.open("wb") as stream,
        TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for index in order:
            key, array, label = source.splits[split][index]
            assert array.shape == source.shape, f"{key}: {array.shape}"
            sample: dict[str, Any] = {"__key__": key, suffix: encode(array, suffix)}
            writer.write(sample if label < 0 else {**sample, "cls": str(label).encode()})
            bar.update()
    with file.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    return Shard(name=file.name, samples=len(order), bytes=file.stat().st_size, sha256=digest)


def _is_there(target: Store, shard: Shard, present: list[str], *, known: bool) -> bool:
    """Whether the target holds this shard already. Raises InputError where it holds another of that name.

    `known` says that the target's own index.json names this shard, so one of another size is damaged, not foreign.
    """
    if shard.name not in present:
        return False
    if known or target.size(shard.name) != shard.bytes:
        if not known:
            raise InputError(_refusal(target.path, None))
        return target.size(shard.name) == shard.bytes
    if hashlib.sha256(target.read(shard.name)).hexdigest() != shard.sha256:
        raise InputError(_refusal(target.path, None))
    return True


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """What `verify` read and found sound."""

    samples: int
    shards: int
    bytes: int


PROBLEMS = 20
"""How many problems a message lists."""


def verify(path: str, *, progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, tar structure, pixels, shapes, labels, keys, counts.

    Raises InputError that lists the problems, each with its shard and key.
    """
    manifest = Manifest.load(path)
    store = open_store(path)
    problems: list[str] = []
    samples = size = 0
    shards = [(split, shard) for split in manifest.splits for shard in manifest.splits[split].shards]
    keys: dict[str, dict[str, str]] = {split: {} for split in manifest.splits}  # shard by key
    with tqdm(shards, unit="shard", desc=f"verify {manifest.name}", disable=not progress) as bar:
        for split, shard in bar:
            problems += _verify(store, shard, manifest, keys[split])
            samples, size = samples + shard.samples, size + shard.bytes
    if problems:
        shown = [f"  {problem}" for problem in problems[:PROBLEMS]]
        more = [f"  and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
        raise InputError("\n".join([f"{path}: {len(problems)} problems", *shown, *more]))
    return Report(samples=samples, shards=len(shards), bytes=size)


def _verify(store: Store, shard: Shard, manifest: Manifest, keys: dict[str, str]) -> Iterator[str]:
    """The problems of one shard; adds its keys to those of its split."""
    where = store.url(shard.name)
    try:
        resized = size_problem(store, shard)
        if resized:
            yield resized
        with closing(_Hashed(store.open(shard.name))) as stream:
            count = 0
            for sample in read_samples(cast(BinaryIO, stream), where):
                count += 1
                key = sample["__key__"]
                if key in keys:
                    yield f"{where}, key {key}: also in {keys[key]}: repack the data set"
                keys[key] = shard.name
                try:
                    _, label = decode(sample, manifest.kind, manifest.shape, len(manifest.labels), where)
                    if manifest.labels and label < 0:
                        yield f"{where}, key {key}: no .cls, but {INDEX} has labels: repack the data set"
                except InputError as error:
                    yield str(error)
            if count != shard.samples:
                yield f"{where}: {count} samples, but {INDEX} says {shard.samples}: repack the data set"
            if not resized and stream.hexdigest() != shard.sha256:
                yield f"{where}: its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
    except InputError as error:  # missing, or no tar from some byte on
        yield str(error)


class _Hashed:
    """A stream that hashes what is read, so that a shard is fetched once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        """Of the whole file: reads what is left."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()

    def close(self) -> None:
        self._stream.close()
