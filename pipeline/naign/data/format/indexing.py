"""Indexing tars that others wrote: each is read once, by threads or processes, also after an interruption."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from joblib import Parallel, cpu_count, delayed
from tqdm import tqdm

from naign.data.format import IndexOptions
from naign.data.format.audit import PROBLEMS, Problems
from naign.data.format.labels import check_label_rule
from naign.data.format.manifest import INDEX, Manifest
from naign.data.format.pages import Pager, table_name
from naign.data.format.samples import scan
from naign.data.format.survey import KEPT, Summary, Survey, key_hash, summarize
from naign.errors import InputError, Unavailable, require
from naign.storage.base import Store
from naign.storage.store import open_store
from naign.terminal import busy

THREADS = 8  # tars read at once: the stream of one hardly fills a fast network
TEST = ("*test*.tar", "*val*.tar")  # names of tars that are for testing, unless patterns are given
PROCESSES = 32  # at most, one a core; each takes a second to start
MUCH = 256 << 20  # bytes of tars from which on processes read them: threads share the interpreter's lock
IDLE = 5  # seconds after which a process without work ends; one whose parent was killed does so half a minute later


def index(
    path: str,  # folder or s3://bucket/prefix of tars, or a pattern of them such as .../{00000..01023}.tar
    *,
    labels: tuple[str, ...] = (),  # names of the labels; (): the numbers or texts in the samples
    progress: bool = True,  # bar on stderr
    **options: Any,  # of IndexOptions
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs.

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are ignored. After an
    interruption or an error the next call reads only shards that were not read, had problems or were replaced since.
    An index that is there stays until all is read. Raises Problems, each with its shard and key.
    """
    chosen, twice = IndexOptions(**options), [name for name, count in Counter(labels).items() if count > 1]
    check_label_rule(chosen.label)
    unfit = f"--sample-check {chosen.sample_check}: give how many pictures of each tar are decoded, 0 or more"
    require((chosen.sample_check is None or chosen.sample_check >= 0, unfit))
    require((not twice, f"--labels names {''.join(twice[:1])!r} twice: write each name once"))
    folder, files = _tars(path)
    store, target = open_store(folder), open_store(chosen.to or folder)
    if target.exists(INDEX) and not chosen.force:
        raise InputError(f"{target.url(INDEX)} is there already: check it by `naign verify`, or replace it by --force")
    old = None
    with suppress(InputError):  # none is there, or none that can be read
        old = Manifest.load(target.path)
    groups = _grouped_names(files, path, chosen.train, chosen.test)
    try:
        target.put(f"index{KEPT}", b"")  # rather than be refused once much was read
        target.delete(f"index{KEPT}")
    except InputError as error:
        elsewhere = "" if chosen.to else "; where you may only read, have the index written elsewhere: --to=FOLDER"
        raise InputError(f"{error}{elsewhere}") from None
    names = [name for files in groups.values() for name in files]
    summaries = _summaries(store, target, names, chosen, progress)
    with busy("comparing tars", shown=progress):
        survey = _merged(path, store, chosen.label, groups, summaries)
    title = chosen.name or folder.rstrip("/").rpartition("/")[2] or "indexed"
    shards = {split: [summaries[file].shard for file in files] for split, files in groups.items()}
    broken = {file: one.broken for file, one in summaries.items() if one.broken}
    manifest = replace(survey.manifest(title, labels, shards, old), broken=broken)
    Manifest.parse(manifest.dump(), where=target.url(INDEX))  # else it is not written
    with busy("writing the index", shown=progress):
        _write(target, manifest, old, summaries)
    return manifest


def _write(target: Store, manifest: Manifest, old: Manifest | None, summaries: dict[str, Summary]) -> None:
    """Write page tables and index.json in place of the `old` ones; then delete summaries and tables without a tar."""
    target.delete(INDEX)
    threads = Parallel(THREADS, backend="threading")
    threads(delayed(target.put)(table_name(name), one.table) for name, one in summaries.items())
    target.put(INDEX, manifest.dump())
    outdated = [table_name(shard.name) for shard in (old.shards if old else ()) if shard.name not in summaries]
    outdated += [name for name in target.list() if name.endswith(KEPT)]
    threads(delayed(target.delete)(name) for name in outdated)


def _merged(path: str, store: Store, label: str, groups: dict[str, list[str]], summaries: dict[str, Summary]) -> Survey:
    """The survey of all tars together. Raises Problems: those of single tars, and where tars do not go together."""
    survey, problems = Survey(label=label), [problem for one in summaries.values() for problem in one.problems]
    for name, one in summaries.items():
        try:
            if one.survey.kind:
                survey.add(one.survey.kind, one.survey.shape, one.survey.labels, store.url(name))
        except InputError as error:
            problems.append(str(error))
    for names in groups.values():
        problems += _duplicates(store, [summaries[name] for name in names])
    if not problems and not survey.kind:
        problems.append(f"{path}: none of its samples can be decoded: repack the data set")
    if problems:
        kept = sum(not one.problems for one in summaries.values())
        note = f"what was read of {kept} sound tars is kept (*{KEPT}): the next call reads only the others"
        raise Problems(path, problems, note if kept else "")
    return survey


def _tars(path: str) -> tuple[str, list[str]]:
    """Folder and names of the tars. A pattern of braces alone needs no listing, which a web server cannot give."""
    folder, pattern = path, "*.tar"
    parent, _, last = path.rstrip("/").rpartition("/")
    is_folder = "://" not in path and Path(path).expanduser().is_dir()  # whose name is no pattern then
    if not is_folder and (last.endswith(".tar") or set("{*?[") & set(last)):
        folder, pattern = parent or ".", last
        if not set("*?[") & set(pattern):
            try:
                return folder, list(dict.fromkeys(braceexpand(pattern)))
            except ValueError as error:  # brackets that do not match
                raise InputError(f"{path}: {error}: write it as {{00000..01023}}.tar") from None
    names = [file for file in open_store(folder).list() if file.endswith(".tar") and fnmatch(file, pattern)]
    require((names, f"{path}: no .tar there: check the path, and unpack tars that are compressed"))
    return folder, names


def _grouped_names(files: list[str], path: str, train: str | None, test: str | None) -> dict[str, list[str]]:
    """The names of each split. Raises InputError where none is for training, or for a pattern that was given."""
    testing = (test,) if test else () if train else TEST
    tests = [file for file in files if any(fnmatch(file, pattern) for pattern in testing)]
    others = set(files).difference(tests)
    groups = {"train": [file for file in files if file in others and fnmatch(file, train or "*.tar")], "test": tests}
    for split, pattern in (("train", train or "*.tar"), ("test", test)):
        if pattern and not groups[split]:
            none = f"none of its {len(files)} tars ({files[0]}, ...)"
            raise InputError(f"{path}: {none} is left for --{split} {pattern!r}: give another pattern")
    return {split: names for split, names in groups.items() if names}


def _summaries(store: Store, target: Store, names: list[str], options: IndexOptions, shown: bool) -> dict[str, Summary]:
    """The summary of every tar by name, in the order of the names."""
    with busy(f"asking for the sizes of {len(names)} tars", shown=shown):
        kept = set(target.list())
        sizes = Parallel(THREADS, backend="threading")(delayed(store.size)(name) for name in names)
    many = min(cpu_count(), len(names), PROCESSES)
    backend, count = ("loky", many) if many > 1 and sum(sizes) >= MUCH else ("threading", THREADS)
    parallel = Parallel(count, backend=backend, return_as="generator", idle_worker_timeout=IDLE)
    results = parallel(delayed(_summary)(store, target, options, name, _kept_name(name) in kept) for name in names)
    summaries = dict[str, Summary]()
    bar = tqdm(desc=f"index {store.path}", total=sum(sizes), unit="B", unit_scale=True, disable=not shown or None)
    with bar, closing(results):
        try:
            for name, size, summary in zip(names, sizes, results, strict=True):
                summaries[name] = summary
                bar.update(size)
        except BrokenProcessPool:
            killed = "a process that reads tars was killed, for its memory perhaps, or could not start"
            raise Unavailable(f"{killed}: index again, which continues with the tars not read yet") from None
    return summaries


def _kept_name(name: str) -> str:
    return f"{name.removesuffix('.tar')}{KEPT}"


def _summary(store: Store, target: Store, settings: IndexOptions, name: str, kept: bool) -> Summary:
    """The summary of a tar, read, or else what an interrupted call `kept`. It is kept for the next call."""
    whole = store.path == target.path  # an index beside the tars has the hash of each
    file = _kept_name(name)
    version = f"{name}, {store.version(name)}, {settings.label}, {settings.sample_check}, {whole}"
    before = Summary.parse(target.read(file), version) if kept else None
    if before and (settings.keep_broken or not before.broken):
        return before
    summary = summarize(store, name, settings, whole=whole)
    if not summary.problems:
        target.put(file, summary.dump(version))
    return summary


def _duplicates(store: Store, summaries: Sequence[Summary]) -> Iterator[str]:
    """The first keys that stand in two tars. Tars that share a hash of a key are read once more for the keys."""
    hashes = np.concatenate([one.keys for one in summaries])
    owners = np.repeat(np.arange(len(summaries)), [len(one.keys) for one in summaries])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1]))
    for place in again[:PROBLEMS].tolist():
        first, second = (summaries[int(owners[at])].shard.name for at in (place, place + 1))
        ours, theirs = ({one["__key__"] for one in scan(store, tar, Pager(whole=False))} for tar in (first, second))
        for key in sorted(key for key in ours & theirs if key_hash(key) == int(hashes[place])):
            yield f"{store.url(second)}, key {key}: also in {first}: repack the data set"
