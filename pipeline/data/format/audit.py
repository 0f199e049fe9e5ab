"""Reading whole shards: to verify a data set against its manifest, or to write the manifest of tars by others."""

import gzip
import hashlib
import io
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from pipeline.data.decode import decode_image, decoding
from pipeline.data.format.manifest import FORMS, INDEX, Manifest, Shard, size_problem
from pipeline.data.format.pages import Pager, Table, dump_table, grouped, key_and_suffix, table_name
from pipeline.data.sample import SUFFIXES, decode, label
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.store import open_store

log = logging.getLogger("naign.data")

BROKEN_TAR = (
    *(tarfile.TarError, EOFError, RecursionError, MemoryError, ValueError),  # headers that nest or lie
    *(zlib.error, lzma.LZMAError, gzip.BadGzipFile),  # a tar may be compressed
)
"""What reading a damaged tar raises. A disk or network that fails raises others, worth a retry."""

MOST_LABELS = 1_000_000  # a larger number in .cls is no label
PROBLEMS = 20  # how many problems a message lists


class Report(NamedTuple):
    """What `verify` read and found sound."""

    samples: int
    shards: int
    bytes: int


def scan(
    store: Store, name: str, pager: Pager, advance: Callable[[int], object] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The samples of a shard as WebDataset gives them; all its bytes are told to `pager`, their number to `advance`.

    Raises InputError where they are no uncompressed tar or end early, or a sample has two members of a suffix.
    """
    where = store.url(name)
    with closing(store.open(name)) as stream:

        def read(size: int) -> bytes:
            data = stream.read(size)
            advance(pager.write(data))
            return data

        try:
            with tarfile.open(fileobj=cast(BinaryIO, SimpleNamespace(read=read)), mode="r|", bufsize=1 << 18) as tar:
                yield from grouped(_members(tar, where, pager), f"{where}, ")
            while read(1 << 20):
                pass
        except InputError:
            raise
        except BROKEN_TAR as error:
            raise InputError(f"{where}: truncated or no tar ({error}): copy it again, or repack the data set") from None


def _members(tar: tarfile.TarFile, where: str, pager: Pager) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and bytes of each member of a sample; `pager` is told where samples and members start and end."""
    last = None
    for member in tar:
        pager.after = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # else all headers of a large shard stay in memory
        if member.issym() or member.islnk() or member.issparse():
            raise InputError(f"{where}: {member.name} is a link or sparse: repack it with the files")
        if not member.isreg() or not (named := key_and_suffix(member.name)):
            continue
        if not named[0].isprintable():
            raise InputError(f"{where}, key {named[0]!r}: not printable UTF-8: repack the data set")
        if named[0] != last:
            last = named[0]
            pager.start(member.offset)
        stream = tar.extractfile(member)
        assert stream is not None
        yield *named, stream.read()
        pager.end = tar.offset


def _ending(where: str, pager: Pager) -> Iterator[str]:
    """What is wrong behind the last sample: a tar that was cut between two samples reads as if whole."""
    rest = pager.rest(pager.after)
    if not pager.samples:
        yield f"{where}: holds no samples: remove it"
    if len(rest) < 2 * tarfile.BLOCKSIZE:
        yield f"{where}: ends in the middle: no end-of-archive mark: copy it again"
    elif rest.strip(b"\0"):
        yield f"{where}: more data behind the end of the archive, as of tars laid end to end: repack them"


def _scans(
    store: Store,
    names: Mapping[str, Sequence[str]],  # of the shards of each split
    check: Callable[[dict[str, Any], str], None],  # of a sample and, for messages, its shard: raises InputError
    problems: list[str],  # added to
    bar: "tqdm[Any]",
) -> Iterator[tuple[str, Pager]]:
    """Reads shards: name and measures of each that could be read to its end. No key may stand twice in a split."""
    for shards in names.values():
        keys: dict[str, str] = {}  # shard by key
        for name in shards:
            where, pager = store.url(name), Pager()
            try:
                for sample in scan(store, name, pager, bar.update):
                    key = sample["__key__"]
                    if key in keys:
                        problems.append(f"{where}, key {key}: also in {keys[key]}: repack the data set")
                    keys[key] = name
                    try:
                        check(sample, where)
                    except InputError as error:
                        problems.append(str(error))
            except InputError as error:  # missing, or no tar from some byte on
                problems.append(str(error))
            else:
                yield name, pager


def _refuse(path: str, problems: list[str]) -> None:
    if problems:
        shown = [f"  {problem}" for problem in problems[:PROBLEMS]]
        more = [f"  and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
        raise InputError("\n".join([f"{path}: {len(problems)} problems", *shown, *more]))


_bar = partial(tqdm, unit="B", unit_scale=True)


def verify(path: str, *, progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, page tables, tar structure, pixels, shapes, labels, keys, counts.

    Raises InputError that lists the problems, each with its shard and key.
    """
    manifest, store, problems = Manifest.load(path), open_store(path), list[str]()
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    names = {name: [shard.name for shard in split.shards] for name, split in manifest.splits.items()}
    report = Report(
        samples=sum(shard.samples for shard in shards.values()),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards.values()),
    )

    def check(sample: dict[str, Any], where: str) -> None:
        _, label = decode(sample, manifest, where)
        if manifest.labels and label < 0:
            raise InputError(f"{where}, key {sample['__key__']}: no .cls, but {INDEX} has labels: repack it")

    for shard in shards.values():
        with suppress(InputError):  # one that is missing is named below
            problems += filter(None, [size_problem(store, shard)])
    with _bar(desc=f"verify {manifest.name}", total=report.bytes, disable=not progress) as bar:
        for name, pager in _scans(store, names, check, problems, bar):
            problems += _differences(store, shards[name], *pager.shard(name))
    _refuse(path, problems)
    return report


def _differences(store: Store, shard: Shard, found: Shard, table: Table) -> Iterator[str]:
    """Between a shard and its page table as they were read and as the manifest says, but for the size."""
    where, pages = store.url(shard.name), table_name(shard.name)
    wrong = f"its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
    if found.samples != shard.samples:
        yield f"{where}: {found.samples} samples, but {INDEX} says {shard.samples}: repack the data set"
    if found.bytes == shard.bytes and found.sha256 != shard.sha256:
        yield f"{where}: {wrong}"
    try:
        if hashlib.sha256(store.read(pages)).hexdigest() != shard.pages:
            yield f"{store.url(pages)}: {wrong}"
        elif found.sha256 == shard.sha256 and found.pages != shard.pages:
            yield f"{store.url(pages)}: not the page table of that shard: run `naign index --force`"
    except InputError as error:
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

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are passed over.
    Raises InputError that lists the problems, each with its shard and key; nothing is written then.
    """
    store, problems, survey = open_store(path), list[str](), _Survey(keep_broken)
    present = store.list()
    if INDEX in present and not force:
        raise InputError(f"{store.url(INDEX)} is there already: check it with `naign verify`, or replace it by --force")
    groups = _grouped_names([file for file in present if file.endswith(".tar")], path, train, test)
    made: dict[str, tuple[Shard, Table]] = {}
    size = sum(store.size(file) for files in groups.values() for file in files)
    with _bar(desc=f"index {path}", total=size, disable=not progress) as bar:
        for file, pager in _scans(store, groups, survey.see, problems, bar):
            problems += _ending(store.url(file), pager)
            made[file] = pager.shard(file)
    _refuse(
        path, problems or ([] if survey.kind else [f"{path}: none of its samples can be decoded: repack the data set"])
    )
    manifest = Manifest.of(
        name or path.rstrip("/").rpartition("/")[2] or "indexed",
        survey.kind,
        survey.shape,
        _labels(labels, survey.classes, path),
        {split: [made[file][0] for file in files] for split, files in groups.items()},
        dealt=False,
    )
    written = manifest.dump()
    Manifest.parse(written, where=store.url(INDEX))  # what it would refuse to read is not written
    for file, (_, table) in made.items():
        store.put(table_name(file), dump_table(table))
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
    if not files:
        raise InputError(f"{path}: no .tar there: check the path, and unpack tars that are compressed")
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


@dataclass
class _Survey:
    """What the samples of a data set are, of which all must be of one kind, and labelled or not."""

    keep_broken: bool
    kind: str = ""
    shape: tuple[int, ...] = ()  # of pictures that differ in size (C, 0, 0)
    classes: int = 0
    labelled: bool | None = None

    def see(self, sample: dict[str, Any], where: str) -> None:
        """Take account of one more. Raises InputError where it is unlike the others or cannot be decoded."""
        where = f"{where}, key {sample['__key__']}"
        try:
            kind, shape = _form(sample, where)
        except InputError as error:
            if not self.keep_broken:
                raise
            log.warning("kept: %s", error)
            return
        self.kind, self.shape = self.kind or kind, self.shape or shape
        if kind != self.kind or (kind == "point" and shape != self.shape):
            raise InputError(f"{where}: {kind} {shape}, others are {self.kind} {self.shape}: {_ALIKE}")
        if kind == "image":  # grey ones are read as colour among others
            sides = shape[1:] if shape[1:] == self.shape[1:] else (0, 0)
            self.shape = (max(shape[0], self.shape[0]), *sides)
        number = label(sample, 0, where)
        if number >= MOST_LABELS:
            raise InputError(f"{where}: label {number} is beyond {MOST_LABELS}: repack the data set")
        self.labelled = number >= 0 if self.labelled is None else self.labelled
        if self.labelled != (number >= 0):
            raise InputError(f"{where}: {'a' if number >= 0 else 'no'} .cls, unlike others: {_ALIKE}")
        self.classes = max(self.classes, number + 1)


_ALIKE = "all samples must be alike; `naign pack folder` makes them so"


def _form(sample: dict[str, Any], where: str) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of a sample."""
    suffix = next((suffix for suffix in SUFFIXES["image"] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES['image'])}: is this an image data set?")
    try:
        if suffix != "npy":
            return "image", decode_image(sample[suffix]).shape
        with decoding():
            array = np.load(io.BytesIO(sample[suffix]), allow_pickle=False)
            if not np.isfinite(array).all():
                raise InputError("a value is not finite")
    except InputError as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): repack the data set") from None
    kind = next((kind for kind, form in FORMS.items() if form == (str(array.dtype), array.ndim)), None)
    if kind is None:
        found = f"{array.dtype} of {array.shape}"
        raise InputError(f"{where}: the .npy is {found}: images are uint8 (C, H, W), points float32 (D,)")
    return kind, array.shape
