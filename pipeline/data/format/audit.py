"""Reading whole shards: to verify a data set against its manifest, or to write the manifest of tars by others."""

import gzip
import hashlib
import io
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any, BinaryIO, cast

import numpy as np
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from pipeline.data.decode import SUFFIXES, decode, decode_image, decoding
from pipeline.data.format.manifest import INDEX, Manifest, Shard, Split, size_problem
from pipeline.data.format.pages import Pager, Table, dump_table, is_meta, table_name
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.store import open_store

log = logging.getLogger("naign.data")

BROKEN_TAR = (
    *(tarfile.TarError, EOFError, RecursionError, MemoryError, ValueError),  # headers that nest or lie
    *(zlib.error, lzma.LZMAError, gzip.BadGzipFile),  # a tar may be compressed
)
"""What reading a damaged tar raises. A disk or network that fails raises others, worth a retry."""

MOST_LABELS = 1_000_000
"""A larger number in .cls is no label."""

PROBLEMS = 20
"""How many problems a message lists."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """What `verify` read and found sound."""

    samples: int
    shards: int
    bytes: int


class Scan:
    """One shard read from its first byte to its last: iterate over its samples, then ask for what was measured."""

    def __init__(self, store: Store, name: str, advance: Callable[[int], object] = lambda _: None) -> None:
        self._store, self._name, self._where = store, name, store.url(name)
        self._advance = advance  # told of bytes read
        self._hash, self._pager = hashlib.sha256(), Pager()
        self._size = self._count = 0
        self._end = self._last = 0  # byte behind the last sample, behind the last member
        self._stream: BinaryIO | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples in order, as WebDataset gives them: `__key__` and the bytes by suffix.

        Raises InputError where the bytes are no uncompressed tar or end early, or a sample has two members of a suffix.
        """
        with closing(self._store.open(self._name)) as self._stream:
            try:
                yield from self._grouped()
                while self.read(1 << 20):
                    pass
            except BROKEN_TAR as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{self._where}: truncated or no tar ({error}): copy it again, or repack the data set"
                ) from None

    def ending(self) -> str:
        """What is wrong behind the last sample, or '': a tar that was cut between two samples reads as if whole."""
        rest = self._pager.rest(self._last)
        if len(rest) < 2 * tarfile.BLOCKSIZE:
            return f"{self._where}: ends in the middle: no end-of-archive mark: copy it again"
        if rest.strip(b"\0"):
            return f"{self._where}: more data behind the end of the archive, as of tars laid end to end: repack them"
        return ""

    def shard(self) -> tuple[Shard, Table]:
        """What the manifest should say of it, and its page table, once all samples were read."""
        table, digest = self._pager.finish(self._end), self._hash.hexdigest()
        pages = hashlib.sha256(dump_table(table)).hexdigest()
        return Shard(name=self._name, samples=self._count, bytes=self._size, sha256=digest, pages=pages), table

    def read(self, size: int = -1) -> bytes:
        """The tar's next bytes, measured: for tarfile, which reads from here."""
        assert self._stream is not None
        data = self._stream.read(size)
        self._hash.update(data)
        self._pager.update(data)
        self._size += len(data)
        self._advance(len(data))
        return data

    def _grouped(self) -> Iterator[dict[str, Any]]:
        sample: dict[str, Any] = {}
        with tarfile.open(fileobj=cast(BinaryIO, self), mode="r|", bufsize=1 << 18) as tar:
            for member in tar:
                self._last = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # else all headers of a large shard stay in memory
                key, suffix = base_plus_ext(member.name) if member.isreg() else (None, None)
                if member.issym() or member.islnk() or member.issparse():
                    raise InputError(f"{self._where}: {member.name} is a link or sparse: repack it with the files")
                if key is None or suffix is None or is_meta(member.name):
                    continue
                if not key.isprintable():
                    raise InputError(f"{self._where}, key {key!r}: not printable UTF-8: repack the data set")
                if key != sample.get("__key__"):
                    if sample:
                        yield sample
                    sample = {"__key__": key}
                    self._pager.start(member.offset)
                    self._count += 1
                suffix = suffix.lower()
                if suffix in sample:
                    raise InputError(f"{self._where}, key {key}: two members end in .{suffix}: repack the data set")
                stream = tar.extractfile(member)
                assert stream is not None
                sample[suffix] = stream.read()
                self._end = tar.offset
        if sample:
            yield sample


def verify(path: str, *, progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, page tables, tar structure, pixels, shapes, labels, keys, counts.

    Raises InputError that lists the problems, each with its shard and key.
    """
    manifest = Manifest.load(path)
    store = open_store(path)
    problems: list[str] = []
    shards = [(split, shard) for split in manifest.splits for shard in manifest.splits[split].shards]
    keys: dict[str, dict[str, str]] = {split: {} for split in manifest.splits}  # shard by key
    size = sum(shard.bytes for _, shard in shards)
    with _bar(desc=f"verify {manifest.name}", total=size, disable=not progress) as bar:
        for split, shard in shards:
            problems += _verify(store, shard, manifest, keys[split], bar.update)
    if problems:
        raise InputError(_listed(path, problems))
    return Report(samples=sum(shard.samples for _, shard in shards), shards=len(shards), bytes=size)


def _twice(keys: dict[str, str], key: str, shard: str, where: str) -> Iterator[str]:
    """The problem of a key that an earlier sample has; adds it to `keys`, the shards of a split's keys."""
    if key in keys:
        yield f"{where}, key {key}: also in {keys[key]}: repack the data set"
    keys[key] = shard


_bar = partial(tqdm, unit="B", unit_scale=True)


def _listed(path: str, problems: list[str]) -> str:
    shown = [f"  {problem}" for problem in problems[:PROBLEMS]]
    more = [f"  and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
    return "\n".join([f"{path}: {len(problems)} problems", *shown, *more])


def _verify(
    store: Store, shard: Shard, manifest: Manifest, keys: dict[str, str], advance: Callable[[int], object]
) -> Iterator[str]:
    """The problems of one shard; adds its keys to those of its split."""
    where = store.url(shard.name)
    try:
        resized = size_problem(store, shard)
        if resized:
            yield resized
        scan = Scan(store, shard.name, advance)
        for sample in scan:
            key = sample["__key__"]
            yield from _twice(keys, key, shard.name, where)
            try:
                _, label = decode(sample, manifest.kind, manifest.shape, len(manifest.labels), where)
                if manifest.labels and label < 0:
                    yield f"{where}, key {key}: no .cls, but {INDEX} has labels: repack the data set"
            except InputError as error:
                yield str(error)
        found, table = scan.shard()
        if found.samples != shard.samples:
            yield f"{where}: {found.samples} samples, but {INDEX} says {shard.samples}: repack the data set"
        wrong = f"its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
        if not resized and found.sha256 != shard.sha256:
            yield f"{where}: {wrong}"
        name = table_name(shard.name)
        if hashlib.sha256(store.read(name)).hexdigest() != shard.pages:
            yield f"{store.url(name)}: {wrong}"
        elif found.sha256 == shard.sha256 and found.pages != shard.pages:
            yield f"{store.url(name)}: not the page table of that shard: run `naign index --force`"
    except InputError as error:  # missing, or no tar from some byte on
        yield str(error)


SPLITS = {"test": ("*test*.tar", "*val*.tar"), "train": ("*.tar",)}
"""Patterns of the names of each split's shards; a shard is of the first split that fits."""


def index(
    path: str,  # folder or s3://bucket/prefix of tars
    *,
    train: str | None = None,  # pattern of the names of the training shards; None: those that are not for testing
    test: str | None = None,  # pattern of the names of the test shards; None: names with test or val in them
    labels: tuple[str, ...] = (),  # names of the numbers in .cls; (): the numbers themselves
    name: str | None = None,  # of the data set; None: the last part of the path
    keep_broken: bool = False,  # of samples that cannot be decoded only warn: training can skip them
    force: bool = False,  # replace an index.json that is there
    progress: bool = True,  # bar on stderr
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs beside them.

    All samples must have one kind and shape: pictures of one size (C, H, W), or points (D,) float32 as .npy.
    Raises InputError that lists the problems, each with its shard and key; nothing is written then.
    """
    store = open_store(path)
    present = store.list()
    if INDEX in present and not force:
        raise InputError(
            f"{store.url(INDEX)} is there already: check it with `naign verify`, or replace it with --force"
        )
    groups = _grouped_names([file for file in present if file.endswith(".tar")], path, train, test)
    problems: list[str] = []
    form: dict[str, Any] = {}
    shards: dict[str, list[tuple[Shard, Table]]] = {}
    size = sum(store.size(file) for files in groups.values() for file in files)
    with _bar(desc=f"index {path}", total=size, disable=not progress) as bar:
        for split, files in groups.items():
            keys: dict[str, str] = {}
            shards[split] = []
            for file in files:
                scan = Scan(store, file, bar.update)
                try:
                    problems += _survey(store.url(file), file, scan, form, keys, keep_broken)
                    problems += filter(None, [scan.ending()])
                    shards[split].append(scan.shard())
                except InputError as error:
                    problems.append(str(error))
    if problems:
        raise InputError(_listed(path, problems))
    manifest = Manifest(
        name=name or path.rstrip("/").rpartition("/")[2] or "indexed",
        kind=form["kind"],
        shape=form["shape"],
        dtype="uint8" if form["kind"] == "image" else "float32",
        labels=_labels(labels, form.get("classes", 0), path),
        splits={
            split: Split(samples=sum(shard.samples for shard, _ in made), shards=tuple(shard for shard, _ in made))
            for split, made in shards.items()
        },
    )
    written = manifest.dump()
    Manifest.parse(written, where=store.url(INDEX))  # what it would refuse to read is not written
    for made in shards.values():
        for shard, table in made:
            store.put(table_name(shard.name), dump_table(table))
    store.put(INDEX, written)
    return manifest


def _labels(names: Sequence[str], classes: int, path: str) -> tuple[str, ...]:
    """The names of a data set's labels: those given, or the numbers themselves."""
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a label name stands twice: give each label its own")
    if names and len(names) < classes:
        raise InputError(f"{path}: {len(names)} label names, but labels up to {classes - 1}: name them all")
    return tuple(names) or tuple(str(number) for number in range(classes))


def _grouped_names(files: list[str], path: str, train: str | None, test: str | None) -> dict[str, list[str]]:
    """The shards of each split."""
    if not files:
        raise InputError(
            f"{path}: no .tar there: check the path (compressed tars cannot be read by ranges: unpack them)"
        )
    patterns = {
        "test": (test,) if test else () if train else SPLITS["test"],
        "train": (train,) if train else SPLITS["train"],
    }
    groups: dict[str, list[str]] = {"train": [], "test": []}
    for file in files:
        fitting = (split for split in patterns if any(fnmatch(file, pattern) for pattern in patterns[split]))
        if split := next(fitting, None):
            groups[split].append(file)
    none = f"{path}: none of its {len(files)} tars ({files[0]}, ...) is"
    for split, pattern in (("train", train), ("test", test)):
        if pattern and not groups[split]:
            raise InputError(f"{none} left for --{split} {pattern!r}: check the pattern")
    if not groups["train"]:
        raise InputError(f"{none} for training: say which with --train 'PATTERN'")
    return {split: names for split, names in groups.items() if names}


def _survey(
    where: str, file: str, scan: Scan, form: dict[str, Any], keys: dict[str, str], keep_broken: bool
) -> Iterator[str]:
    """The problems of one shard. Adds kind, shape and classes of the samples, which must all agree, to `form`."""
    key = ""
    for sample in scan:
        key = sample["__key__"]
        yield from _twice(keys, key, file, where)
        try:
            if not form:
                form |= _form(sample, f"{where}, key {key}")
            try:
                _, label = decode(sample, form["kind"], form["shape"], 0, where)
            except InputError as error:
                if not keep_broken:
                    raise
                log.warning("kept: %s", error)
                continue
            if label >= MOST_LABELS:
                raise InputError(f"{where}, key {key}: label {label} is beyond {MOST_LABELS}: repack the data set")
            if form.setdefault("labelled", label >= 0) != (label >= 0):
                raise InputError(
                    f"{where}, key {key}: {'a' if label >= 0 else 'no'} .cls, unlike others: repack the data set"
                )
            form["classes"] = max(form.get("classes", 0), label + 1)
        except InputError as error:
            yield str(error).replace("index.json says", "others are").replace("repack the data set", _ALIKE)
    if not key:
        yield f"{where}: holds no samples: remove it"


_ALIKE = "all samples must be alike; `naign pack folder` makes them so"


def _form(sample: dict[str, Any], where: str) -> dict[str, Any]:
    """Kind and shape of the first sample."""
    suffix = next((suffix for suffix in SUFFIXES["image"] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES['image'])}: is this an image data set?")
    if suffix != "npy":
        return {"kind": "image", "shape": decode_image(sample[suffix]).shape}
    with decoding():
        array = np.load(io.BytesIO(sample[suffix]), allow_pickle=False)
    kind = {("uint8", 3): "image", ("float32", 1): "point"}.get((str(array.dtype), array.ndim))
    if kind is None:
        raise InputError(
            f"{where}: the .npy is {array.dtype} of {array.shape}: images are uint8 (C, H, W), points float32 (D,)"
        )
    return {"kind": kind, "shape": array.shape}
