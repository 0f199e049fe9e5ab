"""Indexing tars that others wrote: threads read each of them once, and what was found outlasts a kill."""

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from pipeline.data.format.audit import PROBLEMS, bar_of_bytes, ending, refuse, scan
from pipeline.data.format.labels import check_label_rule
from pipeline.data.format.manifest import INDEX, Manifest
from pipeline.data.format.pages import Pager, Table, dump_table, parse_table, table_name
from pipeline.data.format.shards import Shard
from pipeline.data.format.survey import Survey
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.prefetch import in_order
from pipeline.storage.store import open_store

log = logging.getLogger("naign.data")

THREADS = 8  # shards that are read at once: a stream of one hardly fills a fast network
FOUND = ".indexing.json"  # ends the name of what was found in a shard, until index.json is there
SPLITS = {"test": ("*test*.tar", "*val*.tar"), "train": ("*.tar",)}
"""Patterns of the names of each split's shards; a shard is of the first split that fits."""

T = TypeVar("T")
Hashes = npt.NDArray[np.uint64]


@dataclass(kw_only=True)
class Found:
    """What reading one shard found."""

    shard: Shard
    table: Table
    survey: Survey
    keys: Hashes = field(repr=False)  # of its samples, sorted
    problems: list[str]

    def dump(self, version: str) -> bytes:
        """The bytes that keep it; `version` is that of the tar."""
        packed = {"table": dump_table(self.table), "keys": self.keys.astype("<u8").tobytes()}
        texts = {name: base64.b64encode(data).decode() for name, data in packed.items()}
        record = {"version": version, **asdict(self.shard), "survey": asdict(self.survey), **texts}
        return json.dumps(record, default=sorted).encode()  # sets, as lists

    @classmethod
    def parse(cls, data: bytes, version: str, settings: Survey) -> "Found | None":
        """What was kept, if it is of that version of the tar, was found with these settings and is whole."""
        try:
            kept = json.loads(data)
            table, keys = (base64.b64decode(kept.pop(name), validate=True) for name in ("table", "keys"))
            survey, there = Survey.parse(kept.pop("survey")), kept.pop("version")
            shard = Shard(**kept)
            found = parse_table(table, samples=shard.samples, size=shard.bytes)
            hashes = np.frombuffer(keys, "<u8")
            if there != version or not survey.like(settings) or len(hashes) != shard.samples:
                return None
            return cls(shard=shard, table=found, survey=survey, keys=hashes, problems=[])
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def index(
    path: str,  # folder or s3://bucket/prefix of tars, or a pattern of them such as .../{00000..01023}.tar
    *,
    to: str = "",  # folder or prefix for index.json and page tables; "": beside the tars
    train: str | None = None,  # pattern of the names of the training shards; None: those that are not for testing
    test: str | None = None,  # pattern of the names of the test shards; None: names with test or val in them
    label: str = "",  # "" .cls, json:FIELD of the .json, name:REGEX of the key
    labels: tuple[str, ...] = (),  # names of the labels; (): the numbers or texts that are found
    name: str | None = None,  # of the data set; None: the last part of the path
    sample_check: int | None = None,  # pictures a shard that are decoded; of others the header is read. None: all
    keep_broken: bool = False,  # of samples that cannot be decoded only warn: training can skip them
    force: bool = False,  # replace an index.json that is there
    progress: bool = True,  # bar on stderr
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs.

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are passed over. After an
    interruption the next call goes on with the shards that were not read yet.
    Raises InputError that lists the problems, each with its shard and key; nothing is written then.
    """
    check_label_rule(label)
    if sample_check is not None and sample_check < 0:
        raise InputError(f"--sample-check {sample_check}: give how many pictures of each tar are decoded, 0 or more")
    folder, chosen = split_pattern(path)
    store, target = open_store(folder), open_store(to or folder)
    settings = Survey(label=label, check=sample_check, keep_broken=keep_broken)
    old = _there(target, force)
    groups = _grouped_names(_names(store, chosen, path), path, train, test)
    found = _read_all(store, target, [file for files in groups.values() for file in files], settings, progress)
    problems = [problem for file in found.values() for problem in file.problems]
    survey = settings.anew()
    for file, one in found.items():
        problems += survey.merge(one.survey, store.url(file))
    for files in groups.values():
        problems += _duplicates(store, [found[file] for file in files], PROBLEMS)
    try:
        if not survey.kind:
            problems = problems or [f"{path}: none of its samples can be decoded: repack the data set"]
        refuse(path, problems)
        title = name or folder.rstrip("/").rpartition("/")[2] or "indexed"
        shards = {split: [found[file].shard for file in files] for split, files in groups.items()}
        manifest = survey.manifest(title, labels, shards, old)
        written = manifest.files()
        Manifest.parse(written[INDEX], where=target.url(INDEX), read=written.__getitem__)  # else it is not written
    except InputError:
        _forget(target)
        raise
    _all([partial(target.put, table_name(file), dump_table(one.table)) for file, one in found.items()])
    for file, data in written.items():
        target.put(file, data)
    _forget(target)
    return manifest


def split_pattern(path: str) -> tuple[str, str]:
    """Folder and pattern of file names, which is "" where the path is a folder."""
    if "://" not in path and Path(path).expanduser().is_dir():
        return path, ""
    folder, _, last = path.rstrip("/").rpartition("/")
    return (folder or ".", last) if last.endswith(".tar") or set("{*?[") & set(last) else (path, "")


def _there(target: Store, force: bool) -> Manifest | None:
    """The manifest that will be replaced. Raises InputError where one is not to be."""
    if not target.exists(INDEX):
        return None
    if not force:
        raise InputError(
            f"{target.url(INDEX)} is there already: check it with `naign verify`, or replace it by --force"
        )
    try:
        return Manifest.load(target.path)
    except InputError:
        return None


def _names(store: Store, pattern: str, path: str) -> list[str]:
    """The tars that are meant. A pattern of braces alone needs no list, which a web server cannot give."""
    if pattern and not set("*?[") & set(pattern):
        try:
            return list(dict.fromkeys(braceexpand(pattern)))
        except ValueError as error:  # brackets that do not match
            raise InputError(f"{path}: {error}: write it as {{00000..01023}}.tar") from None
    found = [file for file in store.list() if file.endswith(".tar") and fnmatch(file, pattern or "*")]
    if not found:
        raise InputError(f"{path}: no .tar there: check the path, and unpack tars that are compressed")
    return found


def _grouped_names(files: list[str], path: str, train: str | None, test: str | None) -> dict[str, list[str]]:
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


def _read_all(store: Store, target: Store, files: list[str], settings: Survey, progress: bool) -> dict[str, Found]:
    """What is found in every shard, in the order of their names."""
    kept, lock = set(target.list()), threading.Lock()
    sizes = dict(zip(files, _all([partial(store.size, file) for file in files]), strict=True))
    with bar_of_bytes(desc=f"index {store.path}", total=sum(sizes.values()), disable=not progress) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def read(file: str) -> Found:
            version, name = store.version(file), f"{file.removesuffix('.tar')}{FOUND}"
            before = Found.parse(target.read(name), version, settings) if name in kept else None
            if before and before.shard.bytes == sizes[file]:
                advance(sizes[file])
                return before
            found = _read(store, file, settings, advance, whole=store.path == target.path)
            if not found.problems:
                target.put(name, found.dump(version))
            return found

        return {one.shard.name: one for one in _all([partial(read, file) for file in files])}


def _read(store: Store, file: str, settings: Survey, advance: Any, *, whole: bool = False) -> Found:
    where, pager, problems = store.url(file), Pager(whole=whole), list[str]()
    survey, keys = settings.anew(), list[int]()
    seen = set[str]()
    try:
        for sample in scan(store, file, pager, advance):
            key = sample["__key__"]
            if key in seen:
                problems.append(f"{where}, key {key}: also in {file}: repack the data set")
            seen.add(key)
            keys.append(_hash(key))
            try:
                survey.see(sample, f"{where}, key {key}")
            except InputError as error:
                problems.append(str(error))
    except InputError as error:  # missing, or no tar from some byte on
        empty = Shard(name=file, samples=0, bytes=0, sha256="", pages="")
        table = np.empty(0, [("sample", "<i8")])
        hashes, problems = np.empty(0, np.uint64), [*problems, str(error)]
        return Found(shard=empty, table=table, survey=survey, keys=hashes, problems=problems)
    problems += ending(where, pager)
    shard, table = pager.shard(file)
    hashes = np.sort(np.array(keys, np.uint64))
    return Found(shard=shard, table=table, survey=survey, keys=hashes, problems=problems)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _duplicates(store: Store, found: Sequence[Found], most: int) -> Iterator[str]:
    """Keys that stand in two shards. Hashes tell where to look; such shards are read once more for the keys."""
    hashes = np.concatenate([one.keys for one in found])
    owners = np.repeat(np.arange(len(found)), [len(one.keys) for one in found])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1]))
    for place in again[:most].tolist():
        first, second = (found[int(owners[at])].shard.name for at in (place, place + 1))
        for key in sorted(_keys(store, first, int(hashes[place])) & _keys(store, second, int(hashes[place]))):
            yield f"{store.url(second)}, key {key}: also in {first}: repack the data set"


def _keys(store: Store, file: str, wanted: int) -> set[str]:
    """The keys in a shard that have that hash."""
    return {key for sample in scan(store, file, Pager(whole=False)) if _hash(key := sample["__key__"]) == wanted}


def _forget(target: Store) -> None:
    """Remove what was kept of shards."""
    _all([partial(target.delete, name) for name in target.list() if name.endswith(FOUND)])


def _all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, in their order, made by THREADS threads."""
    with closing(in_order(calls, THREADS)) as results:
        return list(results)
