"""Indexing tars that others wrote."""

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from joblib import Parallel, delayed

from naign.data.decode import decode_image, header_shape, read_npy
from naign.data.format import IndexOptions
from naign.data.format.labels import check_label_rule, label_text, parse_number
from naign.data.format.manifest import CHANNELS, FORMS, INDEX, Manifest, Split
from naign.data.format.pages import table_name
from naign.data.format.survey import MOST_LABELS, THREADS, Seen, check_problems, combine, read_tars
from naign.data.sample import SUFFIXES, find_suffix
from naign.errors import InputError
from naign.storage.store import check_writable, open_store
from naign.terminal import busy

log = logging.getLogger("naign.data")

KINDS = dict(zip(FORMS.values(), FORMS, strict=True))
PATTERN = set("{*?[")  # letters of a pattern
TEST = ("*test*.tar", "*val*.tar")  # names of tars that are for testing, unless a pattern is given


def index(
    path: str,  # folder or s3://bucket/prefix of tars, or a pattern of them such as .../{00000..01023}.tar
    *,
    progress: bool = True,  # bar on stderr
    **options: Any,  # of IndexOptions
) -> Manifest:
    """Read every byte of WebDataset tars and write the index.json and page tables that training needs.

    Samples are pictures of any size, or points (D,) float32 as .npy; their other members are ignored. An index that is
    there stays until all is read. InputError lists the problems, each with its shard and key.
    """
    chosen = IndexOptions(**options)
    check_label_rule(chosen.label)
    if chosen.sample_check is not None and chosen.sample_check < 0:
        raise InputError(f"--sample-check {chosen.sample_check}: give how many pictures of each tar, 0 or more")
    folder, files = _find_tars(path)
    splits = _split_names(files, path, chosen.test)
    store = open_store(folder)
    target = open_store(chosen.to or folder)
    if target.exists(INDEX) and not chosen.force:
        raise InputError(f"{target.url(INDEX)} is there already: check it by `naign verify`, or replace it by --force")
    check_writable(target, "an index beside the tars (--to=FOLDER writes it elsewhere)")
    names = [name for split in splits.values() for name in split]
    summaries = read_tars(
        folder,
        names,
        partial(_inspect, chosen.label, chosen.sample_check),
        size=store.size(names[0]) * len(names),
        title=f"index {folder}" if progress else "",
    )
    together = combine(store, summaries)
    problems = together.problems
    shards = {}
    broken = {}
    for summary in summaries:
        name = summary.shard.name
        shards[name] = summary.shard
        if summary.broken and chosen.keep_broken:
            broken[name] = list(summary.broken)
            log.warning("kept: %s", "; ".join(summary.broken.values()))
        else:
            problems += summary.broken.values()
    if not problems and not together.kind:
        problems.append(f"{path}: none of its samples can be decoded: repack the data set")
    if chosen.label and not together.labels:
        problems.append(f"{path}: no sample has a label where --label says: {chosen.label}")
    check_problems(path, problems)
    manifest = Manifest(
        name=chosen.name or store.path.rstrip("/").rpartition("/")[2] or "indexed",
        kind=together.kind,
        shape=together.shape,
        dtype=FORMS[together.kind][0],
        labels=_label_names(together.labels, chosen.label),
        splits={split: Split.of(shards[name] for name in listed) for split, listed in splits.items()},
        dealt=False,
        label=chosen.label,
        broken=broken,
    )
    text = manifest.dump()
    Manifest.parse(text, where=path)  # raises InputError before anything is replaced
    with busy("writing the index", shown=progress):
        target.delete(INDEX)
        threads = Parallel(THREADS, backend="threading")
        threads(delayed(target.put)(table_name(summary.shard.name), summary.table) for summary in summaries)
        target.put(INDEX, text)
    return manifest


def _find_tars(path: str) -> tuple[str, list[str]]:
    """Folder and names of the tars. A pattern of braces alone needs no listing, which a web server cannot give."""
    folder, _, last = path.rstrip("/").rpartition("/")
    is_folder = "://" not in path and Path(path).expanduser().is_dir()  # its name is not a pattern then
    if is_folder or not (last.endswith(".tar") or PATTERN & set(last)):
        folder = path
        last = "*.tar"
    try:
        patterns = list(dict.fromkeys(braceexpand(last)))
    except ValueError as error:  # brackets that do not match
        raise InputError(f"{path}: {error}: write it as {{00000..01023}}.tar") from None
    folder = folder or "."
    if not set("*?[") & set(last):
        return folder, patterns
    names = []
    for name in open_store(folder).list():
        if name.endswith(".tar") and _matches(name, patterns):
            names.append(name)
    if not names:
        raise InputError(f"{path}: no .tar there: check the path, and unpack tars that are compressed")
    return folder, names


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _split_names(files: list[str], path: str, test: str) -> dict[str, list[str]]:
    """The names of each split. Raises InputError where none is for training, or `test` matches none."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for file in files:
        split = "test" if _matches(file, (test,) if test else TEST) else "train"
        splits[split].append(file)
    for split, names in splits.items():
        if not names and (split == "train" or test):
            raise InputError(f"{path}: none of its {len(files)} tars ({files[0]}, ...) is for {split}: see --test")
    if not splits["test"]:
        del splits["test"]
    return splits


def _inspect(
    rule: str,
    decoded: int | None,
    sample: dict[str, Any],
    where: str,
    number: int,
) -> Seen:
    """Kind, shape and label of a sample of any data set; pictures from the number `decoded` on only by their header."""
    where = f"{where}, key {sample['__key__']}"
    suffix = find_suffix(sample, "image")
    if not suffix:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES['image'])}: is this an image data set?")
    data = sample[suffix]
    kind = "image"
    try:
        if suffix == "npy":
            array = read_npy(data)
            shape = array.shape
            kind = KINDS.get((str(array.dtype), array.ndim), "")
        elif decoded is None or number < decoded:
            shape = decode_image(data).shape
        else:
            shape = header_shape(data)
    except InputError as error:
        remedy = "repack the data set, or index it with --keep-broken and train with --data.broken=skip"
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): {remedy}") from None
    if not kind or (kind == "image" and shape[0] not in CHANNELS):
        wanted = "images are uint8 (1 or 3, H, W), points float32 (D,)"
        raise InputError(f"{where}: the .npy is {array.dtype} of {shape}, but {wanted}: repack the data set")
    text = label_text(sample, rule, where)
    if text is None:
        return kind, shape, set()
    if not rule and not 0 <= parse_number(text) < MOST_LABELS:
        what = f"label {text[:20]!r} is not a number below {MOST_LABELS}, as in .cls"
        raise InputError(f"{where}: {what}: say where labels are with --label, or repack the data set")
    return kind, shape, {text}


def _label_names(texts: set[str], rule: str) -> tuple[str, ...]:
    """The names of labels, in order: all numbers up to the largest in .cls, or the texts that a rule has found."""
    if not rule:
        largest = max(map(int, texts), default=-1)
        return tuple(map(str, range(largest + 1)))
    return tuple(sorted(texts, key=lambda text: (parse_number(text), text)))
