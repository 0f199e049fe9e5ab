"""Indexing tars that others wrote."""

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from typing import Any

from braceexpand import braceexpand

from naign.data.format import IndexOptions
from naign.data.format.labels import check_label_rule, parse_number
from naign.data.format.manifest import FORMS, INDEX, Manifest, Split
from naign.data.format.pages import table_name
from naign.data.format.survey import MOST_LABELS, THREADS, check_problems, common_form, read_tars
from naign.errors import InputError, require
from naign.storage.prefetch import in_order
from naign.storage.store import check_writable, open_store
from naign.terminal import busy

log = logging.getLogger("naign.data")

TEST = ("*test*.tar", "*val*.tar")  # names of tars that are for testing, unless a pattern is given


def index(
    path: str,  # folder or s3://bucket/prefix of tars, or a pattern of them such as .../{00000..01023}.tar
    **options: Any,  # of IndexOptions
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs.

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are ignored. An index that is
    there stays until all is read. InputError lists the problems, each with its shard and key.
    """
    chosen = IndexOptions(**options)
    check_label_rule(chosen.label)
    folder, files = _find_tars(path)
    splits = _split_names(files, path, chosen.test)
    store = open_store(folder)
    target = open_store(chosen.to or folder)
    there = f"{target.url(INDEX)} is there already"
    require(
        (chosen.force or not target.exists(INDEX), f"{there}: check it by `naign verify`, or replace it by --force")
    )
    check_writable(target, "an index beside the tars (--to=FOLDER writes it elsewhere)")
    names = [name for split in splits.values() for name in split]
    summaries = read_tars(
        folder,
        names,
        chosen,
        size=store.size(names[0]) * len(names),
    )
    problems = []
    forms = set()
    labels = set()
    shards = {}
    broken = {}
    for summary in summaries:
        name = summary.shard.name
        shards[name] = summary.shard
        problems += summary.problems
        forms |= summary.forms
        labels |= summary.labels
        if summary.broken and chosen.keep_broken:
            broken[name] = list(summary.broken)
            log.warning("kept: %s", "; ".join(summary.broken.values()))
        else:
            problems += summary.broken.values()
    check_problems(path, problems)
    kind, shape = common_form(forms)
    require(
        (labels or not chosen.label, f"{path}: no sample has a label where --label says: {chosen.label}"),
        (len(labels) <= MOST_LABELS, f"{path}: {len(labels)} labels are not classes: choose others with --label"),
    )
    manifest = Manifest(
        name=chosen.name or store.path.rstrip("/").rpartition("/")[2] or "indexed",
        kind=kind,
        shape=shape,
        dtype=FORMS[kind][0],
        labels=_label_names(labels, chosen.label),
        splits={split: Split.of(shards[name] for name in listed) for split, listed in splits.items()},
        dealt=False,
        label=chosen.label,
        broken=broken,
    )
    text = manifest.dump()
    Manifest.parse(text, where=path)  # raises InputError before anything is replaced
    with busy("writing the index"):
        target.delete(INDEX)
        puts = (partial(target.put, table_name(summary.shard.name), summary.table) for summary in summaries)
        for _ in in_order(puts, THREADS):
            pass
        target.put(INDEX, text)
    return manifest


def _find_tars(path: str) -> tuple[str, list[str]]:
    """Folder and names of the tars. A pattern of braces alone needs no listing, which a web server cannot give."""
    folder, _, last = path.rstrip("/").rpartition("/")
    if not last.endswith(".tar"):
        folder = path
        last = "*.tar"
    try:
        patterns = list(dict.fromkeys(braceexpand(last)))
    except ValueError as error:  # brackets that do not match
        raise InputError(f"{path}: {error}: write it as {{00000..01023}}.tar") from None
    folder = folder or "."
    if not set("*?[") & set(last):
        return folder, patterns
    names = [name for name in open_store(folder).list() if _matches(name, patterns)]
    require((names, f"{path}: no .tar there: check the path, and unpack tars that are compressed"))
    return folder, names


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _split_names(files: list[str], path: str, test: str) -> dict[str, list[str]]:
    """The names of each split. Raises InputError where none is for training, or `test` matches none."""
    patterns = (test,) if test else TEST
    tests = [file for file in files if _matches(file, patterns)]
    train = [file for file in files if not _matches(file, patterns)]
    none = f"{path}: none of its {len(files)} tars ({files[0]}, ...) is for"
    require((train, f"{none} train: see --test"), (tests or not test, f"{none} test: see --test"))
    if tests:
        return {"train": train, "test": tests}
    return {"train": train}


def _label_names(texts: set[str], rule: str) -> tuple[str, ...]:
    """The names of labels, in order: all numbers up to the largest in .cls, or the texts that a rule has found."""
    if not rule:
        largest = max(map(int, texts), default=-1)
        return tuple(map(str, range(largest + 1)))
    return tuple(sorted(texts, key=lambda text: (parse_number(text), text)))
