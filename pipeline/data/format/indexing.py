"""Indexing tars that others wrote: each is read once, by threads or processes, also after an interruption."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from braceexpand import braceexpand
from joblib import cpu_count
from tqdm import tqdm

from pipeline.data.format.audit import PROBLEMS, Problems, bar_of_bytes
from pipeline.data.format.found import FOUND, Found, key_hash, read_shard
from pipeline.data.format.labels import check_label_rule
from pipeline.data.format.manifest import INDEX, Manifest
from pipeline.data.format.pages import Pager, dump_table, table_name
from pipeline.data.format.samples import scan
from pipeline.data.format.survey import Survey
from pipeline.errors import InputError, Unavailable
from pipeline.storage.base import Store
from pipeline.storage.prefetch import in_order
from pipeline.storage.store import open_store
from pipeline.terminal import busy

log = logging.getLogger("naign.data")

THREADS = 8  # shards that are read at once: a stream of one hardly fills a fast network
SPLITS = {"test": ("*test*.tar", "*val*.tar"), "train": ("*.tar",)}
"""Patterns of the names of each split's shards; a shard is of the first split that fits."""

PROCESSES, MUCH = 32, 256 << 20
"""From so many bytes on each core reads shards by a process of its own, which takes a second to start."""

T = TypeVar("T")
_Task = tuple[str, int, bool]  # file, its bytes, whether something of it was kept


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
    interruption or an error the next call reads only shards that were not read, had problems or were replaced since.
    An index that is there is replaced at once, in the moment its index.json is. Raises Problems, each with its shard
    and key.
    """
    check_label_rule(label)
    if sample_check is not None and sample_check < 0:
        raise InputError(f"--sample-check {sample_check}: give how many pictures of each tar are decoded, 0 or more")
    folder, chosen = split_pattern(path)
    store, target = open_store(folder), open_store(to or folder)
    settings = Survey(label=label, check=sample_check, keep_broken=keep_broken)
    old = _there(target, force)
    groups = _grouped_names(_names(store, chosen, path), path, train, test)
    try:
        target.put(f"index{FOUND}", b"")  # rather than be refused once much was read
    except InputError as error:
        elsewhere = "" if to else "; where you may only read, have the index written elsewhere: --to=FOLDER"
        raise InputError(f"{error}{elsewhere}") from None
    found = _read_all(store, target, [file for files in groups.values() for file in files], settings, progress)
    try:
        with busy("comparing tars", shown=progress):
            survey = _merged(path, store, settings, groups, found)
        title = name or folder.rstrip("/").rpartition("/")[2] or "indexed"
        shards = {split: [found[file].shard for file in files] for split, files in groups.items()}
        manifest = survey.manifest(title, labels, shards, old)
        broken = {file: one.survey.broken for file, one in found.items() if one.survey.broken}
        manifest = _beside(replace(manifest, broken=broken), old)
        written = manifest.files()
        Manifest.parse(written[INDEX], where=target.url(INDEX), read=written.__getitem__)  # else it is not written
    except InputError:
        target.delete(f"index{FOUND}")
        raise
    tables = {table_name(file, manifest.tables): dump_table(one.table) for file, one in found.items()}
    with busy("writing the index", shown=progress):
        _replace(target, tables, written, outdated=(old.hashes().keys() if old else set()) - manifest.hashes().keys())
    return manifest


def _merged(path: str, store: Store, settings: Survey, groups: dict[str, list[str]], found: dict[str, Found]) -> Survey:
    """What all shards are together. Raises Problems: those of single shards, and where shards do not go together."""
    survey, problems = settings.anew(), [problem for one in found.values() for problem in one.problems]
    for file, one in found.items():
        problems += survey.merge(one.survey, store.url(file))
    for files in groups.values():
        problems += _duplicates(store, [found[file] for file in files], PROBLEMS)
    if not problems and not survey.kind:
        problems.append(f"{path}: none of its samples can be decoded: repack the data set")
    if problems:
        kept = sum(not one.problems for one in found.values())
        note = f"what was read of {kept} sound tars is kept (*{FOUND}): the next call reads only the others"
        raise Problems(path, problems, note if kept else "")
    return survey


def _replace(target: Store, tables: dict[str, bytes], written: dict[str, bytes], *, outdated: set[str]) -> None:
    """Write what an index consists of, `written` ending with its index.json; then delete what only the old one had."""
    _all([partial(target.put, name, data) for name, data in tables.items()])
    for name, data in written.items():
        target.put(name, data)
    kept = [name for name in target.list() if name.endswith(FOUND)]
    _all([partial(target.delete, name) for name in [*outdated, *kept]])


def _beside(manifest: Manifest, old: Manifest | None) -> Manifest:
    """The manifest with names of tables under which the old one has no others: a kill must not leave a mix of both."""
    if old is None:
        return manifest
    manifest, before = replace(manifest, tables=old.tables), old.hashes()
    after = manifest.hashes()
    if any(before.get(name, digest) != digest for name, digest in after.items()):
        manifest = replace(manifest, tables=f"-{sha256(''.join(after.values()).encode()).hexdigest()[:8]}")
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
    with busy(f"asking for the sizes of {len(files)} tars", shown=progress):
        kept = set(target.list())
        sizes = dict(zip(files, _all([partial(store.size, file) for file in files]), strict=True))
    reader = _Reader(store, target, settings)
    tasks = [(file, sizes[file], f"{file.removesuffix('.tar')}{FOUND}" in kept) for file in files]
    many = min(cpu_count(), len(files), PROCESSES)
    with bar_of_bytes(desc=f"index {store.path}", total=sum(sizes.values()), disable=not progress) as bar:
        if many > 1 and sum(sizes.values()) >= MUCH:
            return dict(zip(files, _by_processes(reader, tasks, many, bar), strict=True))
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        return dict(zip(files, _all([partial(reader.found, *task, advance) for task in tasks]), strict=True))


class _Reader:
    """Reads shards, or what was kept of them; keeps what it finds. Picklable."""

    def __init__(self, store: Store, target: Store, settings: Survey) -> None:
        self.store, self.target, self.settings = store, target, settings
        self.whole = store.path == target.path  # an index beside the tars has the hash of each

    def found(self, file: str, size: int, kept: bool, advance: Callable[[int], object]) -> Found:
        """What is in a shard of that size; `kept` says whether what an interrupted call found may be there."""
        version, name = self.store.version(file), f"{file.removesuffix('.tar')}{FOUND}"
        before = Found.parse(self.target.read(name), file, version, self.settings) if kept else None
        if before and before.shard.bytes == size and bool(before.shard.sha256) == self.whole:
            advance(size)
            return before
        found = read_shard(self.store, file, self.settings, advance, whole=self.whole)
        if not found.problems:
            self.target.put(name, found.dump(version))
        return found


def _by_processes(reader: _Reader, tasks: Iterable[_Task], many: int, bar: "tqdm[Any]") -> list[Found]:
    """What the reader finds in each shard, with a process for each of `many` cores: one's lock lets one core parse."""
    context = multiprocessing.get_context("spawn")
    done, closed = context.Value("q", 0), threading.Event()

    def follow() -> None:
        while not closed.wait(0.2):
            bar.update(done.value - bar.n)

    others = multiprocessing.active_children()
    shown = threading.Thread(target=follow, name="progress", daemon=True)
    with ProcessPoolExecutor(many, context, initializer=_begin, initargs=(reader, done)) as pool:
        shown.start()
        try:
            return list(pool.map(_found, tasks))
        except BrokenProcessPool:
            again = "run it again: it continues with the tars that were not read yet"
            guard = "a script that calls `index` needs `if __name__ == '__main__':`, as any that starts processes"
            killed = "index: a process that reads tars was killed, for its memory perhaps, or could not start"
            raise Unavailable(f"{killed}: {again}; {guard}") from None
        except BaseException:
            for process in multiprocessing.active_children():  # what they kept of whole tars stays
                if process not in others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            closed.set()
            shown.join()
            bar.update(done.value - bar.n)


_in_process: tuple[_Reader, Any]
"""In a process of _by_processes: the reader, and the count of bytes of all processes."""


def _begin(reader: _Reader, done: Any) -> None:
    global _in_process
    _in_process = reader, done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    threading.Thread(target=_leave_with_first, name="leave", daemon=True).start()


def _leave_with_first() -> None:
    """End this process once the first one is gone: a worker of a pool whose first process was killed waits for ever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _found(task: _Task) -> Found:
    reader, done = _in_process

    def advance(count: int) -> None:
        with done.get_lock():
            done.value += count

    return reader.found(*task, advance)


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
    return {key for sample in scan(store, file, Pager(whole=False)) if key_hash(key := sample["__key__"]) == wanted}


def _all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, in their order, made by THREADS threads."""
    with closing(in_order(calls, THREADS)) as results:
        return list(results)
