"""Indexing tars that others wrote: each is read once, by threads or processes, also after an interruption."""

import logging
import multiprocessing
import operator
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from braceexpand import braceexpand
from joblib import cpu_count

from pipeline.data.format.audit import PROBLEMS, Problems, bar_of_bytes
from pipeline.data.format.labels import check_label_rule
from pipeline.data.format.manifest import INDEX, Manifest
from pipeline.data.format.pages import Pager, dump_table, table_name
from pipeline.data.format.samples import scan
from pipeline.data.format.summary import KEPT, Summary, key_hash, summarize
from pipeline.data.format.survey import Survey
from pipeline.errors import InputError, Unavailable
from pipeline.storage.base import Store
from pipeline.storage.prefetch import in_order
from pipeline.storage.store import open_store
from pipeline.terminal import busy

log = logging.getLogger("naign.data")

THREADS = 8  # tars read at once: the stream of one hardly fills a fast network
SPLITS = {"test": ("*test*.tar", "*val*.tar"), "train": ("*.tar",)}
"""Patterns of the names of each split's shards; a shard is of the first split that fits."""

PROCESSES = 32  # at most, one a core; each takes a second to start
MUCH = 256 << 20  # bytes of tars from which on processes read them, not threads

T = TypeVar("T")


def index(
    path: str,  # folder or s3://bucket/prefix of tars, or a pattern of them such as .../{00000..01023}.tar
    *,
    to: str = "",  # folder or prefix for index.json and page tables; "": beside the tars
    train: str | None = None,  # pattern of the names of the training shards; None: those that are not for testing
    test: str | None = None,  # pattern of the names of the test shards; None: names with test or val in them
    label: str = "",  # "" .cls, json:FIELD of the .json, name:REGEX of the key
    labels: tuple[str, ...] = (),  # names of the labels; (): the numbers or texts in the samples
    name: str | None = None,  # of the data set; None: the last part of the path
    sample_check: int | None = None,  # pictures to decode of each tar; of the others only the header is read. None: all
    keep_broken: bool = False,  # record samples that cannot be decoded, with a warning: training can skip them
    force: bool = False,  # replace an index.json that is there
    progress: bool = True,  # bar on stderr
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs.

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are ignored. After an
    interruption or an error the next call reads only shards that were not read, had problems or were replaced since.
    An index that is there stays until all is read. Raises Problems, each with its shard and key.
    """
    check_label_rule(label)
    if sample_check is not None and sample_check < 0:
        raise InputError(f"--sample-check {sample_check}: give how many pictures of each tar are decoded, 0 or more")
    folder, chosen = split_pattern(path)
    store, target = open_store(folder), open_store(to or folder)
    settings = Survey(label=label, check=sample_check, keep_broken=keep_broken)
    old = _replaced(target, force)
    groups = _grouped_names(_names(store, chosen, path), path, train, test)
    try:
        target.put(f"index{KEPT}", b"")  # rather than be refused once much was read
    except InputError as error:
        elsewhere = "" if to else "; where you may only read, have the index written elsewhere: --to=FOLDER"
        raise InputError(f"{error}{elsewhere}") from None
    names = [name for files in groups.values() for name in files]
    summaries = _summaries(store, target, names, settings, progress)
    try:
        with busy("comparing tars", shown=progress):
            survey = _merged(path, store, settings, groups, summaries)
        title = name or folder.rstrip("/").rpartition("/")[2] or "indexed"
        shards = {split: [summaries[file].shard for file in files] for split, files in groups.items()}
        manifest = survey.manifest(title, labels, shards, old)
        broken = {file: one.survey.broken for file, one in summaries.items() if one.survey.broken}
        manifest = replace(manifest, broken=broken)
        Manifest.parse(manifest.dump(), where=target.url(INDEX))  # else it is not written
    except InputError:
        target.delete(f"index{KEPT}")
        raise
    with busy("writing the index", shown=progress):
        _write(target, manifest, old, summaries)
    return manifest


def _write(target: Store, manifest: Manifest, old: Manifest | None, summaries: dict[str, Summary]) -> None:
    """Write page tables and index.json in place of the `old` ones; then delete summaries and tables without a tar.

    Between the two index.json files there is none, for the seconds that this takes.
    """
    target.delete(INDEX)
    _all([partial(target.put, table_name(name), dump_table(one.table)) for name, one in summaries.items()])
    target.put(INDEX, manifest.dump())
    before = [shard.name for split in old.splits.values() for shard in split.shards] if old else []
    outdated = [table_name(name) for name in before if name not in summaries]
    _all([partial(target.delete, name) for name in [*outdated, *(f for f in target.list() if f.endswith(KEPT))]])


def _merged(
    path: str, store: Store, settings: Survey, groups: dict[str, list[str]], summaries: dict[str, Summary]
) -> Survey:
    """The survey of all tars together. Raises Problems: those of single tars, and where tars do not go together."""
    survey, problems = settings.anew(), [problem for one in summaries.values() for problem in one.problems]
    for name, one in summaries.items():
        problems += survey.merge(one.survey, store.url(name))
    for names in groups.values():
        problems += _duplicates(store, [summaries[name] for name in names], PROBLEMS)
    if not problems and not survey.kind:
        problems.append(f"{path}: none of its samples can be decoded: repack the data set")
    if problems:
        kept = sum(not one.problems for one in summaries.values())
        note = f"what was read of {kept} sound tars is kept (*{KEPT}): the next call reads only the others"
        raise Problems(path, problems, note if kept else "")
    return survey


def split_pattern(path: str) -> tuple[str, str]:
    """Folder and pattern of file names, which is "" where the path is a folder."""
    if "://" not in path and Path(path).expanduser().is_dir():
        return path, ""
    folder, _, last = path.rstrip("/").rpartition("/")
    return (folder or ".", last) if last.endswith(".tar") or set("{*?[") & set(last) else (path, "")


def _replaced(target: Store, force: bool) -> Manifest | None:
    """The manifest to replace, if any is readable. Raises InputError where an index.json exists, unless `force`."""
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
    """The tars that match. A pattern of braces alone needs no listing, which a web server cannot give."""
    if pattern and not set("*?[") & set(pattern):
        try:
            return list(dict.fromkeys(braceexpand(pattern)))
        except ValueError as error:  # brackets that do not match
            raise InputError(f"{path}: {error}: write it as {{00000..01023}}.tar") from None
    names = [file for file in store.list() if file.endswith(".tar") and fnmatch(file, pattern or "*")]
    if not names:
        raise InputError(f"{path}: no .tar there: check the path, and unpack tars that are compressed")
    return names


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


def _summaries(store: Store, target: Store, names: list[str], settings: Survey, progress: bool) -> dict[str, Summary]:
    """The summary of every tar by name, in the order of the names."""
    with busy(f"asking for the sizes of {len(names)} tars", shown=progress):
        kept = set(target.list())
        sizes = _all([partial(store.size, name) for name in names])
    tasks = [partial(_summary, store, target, settings, name, _kept_name(name) in kept) for name in names]
    many = min(cpu_count(), len(names), PROCESSES)
    apart = many > 1 and sum(sizes) >= MUCH
    results = _by_processes(tasks, many) if apart else in_order(tasks, THREADS)
    with bar_of_bytes(f"index {store.path}", sum(sizes), shown=progress) as bar, closing(results):
        summaries = dict[str, Summary]()
        for name, size, summary in zip(names, sizes, results, strict=True):
            summaries[name] = summary
            bar.update(size)
    return summaries


def _kept_name(name: str) -> str:
    return f"{name.removesuffix('.tar')}{KEPT}"


def _summary(store: Store, target: Store, settings: Survey, name: str, kept: bool) -> Summary:
    """The summary of a tar, read, or else what an interrupted call `kept`. It is kept for the next call."""
    version, file = store.version(name), _kept_name(name)
    whole = store.path == target.path  # an index beside the tars has the hash of each
    before = Summary.parse(target.read(file), name, version, settings) if kept else None
    if before and bool(before.shard.sha256) == whole:
        return before
    summary = summarize(store, name, settings, whole=whole)
    if not summary.problems:
        target.put(file, summary.dump(version))
    return summary


def _by_processes(tasks: Sequence[Callable[[], Summary]], many: int) -> Generator[Summary]:
    """The results of the tasks, by a process for each of `many` cores: threads of one share the interpreter's lock."""
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(many, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        try:
            yield from pool.map(operator.call, tasks)
        except BrokenProcessPool:
            again = "run it again: it continues with the tars that were not read yet"
            guard = "a script that calls `index` needs `if __name__ == '__main__':`, as any that starts processes"
            killed = "index: a process that reads tars was killed, for its memory perhaps, or could not start"
            raise Unavailable(f"{killed}: {again}; {guard}") from None
        except BaseException:
            for process in multiprocessing.active_children():  # the summaries that they kept stay
                if process not in others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    """Leave Ctrl-C to the first process, and end once that has gone: else a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_first, name="leave", daemon=True).start()


def _leave_with_first() -> None:
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _duplicates(store: Store, summaries: Sequence[Summary], most: int) -> Iterator[str]:
    """Keys that stand in two tars. Tars that share a hash of a key are read once more for the keys themselves."""
    hashes = np.concatenate([one.keys for one in summaries])
    owners = np.repeat(np.arange(len(summaries)), [len(one.keys) for one in summaries])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1]))
    for place in again[:most].tolist():
        first, second = (summaries[int(owners[at])].shard.name for at in (place, place + 1))
        for key in sorted(_keys(store, first, int(hashes[place])) & _keys(store, second, int(hashes[place]))):
            yield f"{store.url(second)}, key {key}: also in {first}: repack the data set"


def _keys(store: Store, name: str, wanted: int) -> set[str]:
    """The keys in a tar that have that hash."""
    keys = (sample["__key__"] for sample in scan(store, name, Pager(whole=False)))
    return {key for key in keys if key_hash(key) == wanted}


def _all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the calls in their order, made by THREADS threads."""
    with closing(in_order(calls, THREADS)) as results:
        return list(results)
