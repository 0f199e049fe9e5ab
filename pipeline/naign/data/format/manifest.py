"""index.json, which describes a packed data set. It is written last, so a data set without it does not exist."""

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from naign.data.format.labels import check_label_rule
from naign.errors import InputError, require
from naign.storage.base import Store
from naign.storage.store import open_store

INDEX = "index.json"
FORMAT = 2

VALUES = 2**28  # the most values a sample may have: a colour image of 8192 pixels a side is below it
SAMPLE_BYTES = 1024  # the least that a sample takes in a tar: a block of header and one of data
MOST_SAMPLES = 2**40  # of a split

CHANNELS = (1, 3)  # of an image: grey or colour
FORMS = {"image": ("uint8", 3), "point": ("float32", 1)}  # type and axes of a sample, by kind


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    sha256: str = ""  # of the whole tar; "" where the index lies elsewhere: page tables have the hashes of what is read
    pages: str  # SHA-256 of its page table (pages.py)

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Shard":
        """The shard of an entry. Raises TypeError, or ValueError for an empty hash: an unknown one has no field."""
        if fields.get("sha256", "unknown") == "":
            raise ValueError("'' is no SHA-256")
        return cls(**fields)


@dataclass(kw_only=True, slots=True, frozen=True)
class Split:
    """`train` or `test`: its shards in order."""

    samples: int
    shards: tuple[Shard, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(kw_only=True, frozen=True)
class Manifest:
    """A packed data set."""

    name: str
    kind: str  # `image` or `point`
    shape: tuple[int, ...]  # of one sample: (C, H, W) of an image, (C, 0, 0) where sizes vary, (D,) of a point
    dtype: str  # `uint8` of an image, `float32` of a point
    labels: tuple[str, ...]  # name of each label; empty where there are none
    splits: dict[str, Split]
    dealt: bool = True  # each shard is a random subset of its split, as `naign pack` makes them and others do not
    label: str = ""  # where samples have their labels: "" as a number in .cls, or see labels.label_text
    broken: dict[str, list[str]] = field(default_factory=dict)  # by shard, keys that `naign index --keep-broken` found
    without: dict[str, list[int]] = field(default_factory=dict)
    """By shard, places of samples in its tar that are left out, ascending: `samples` of the shard counts the others."""

    @classmethod
    def of(
        cls, name: str, kind: str, shape: tuple[int, ...], labels: tuple[str, ...], shards: dict[str, list[Shard]]
    ) -> "Manifest":
        """The manifest of shards by split."""
        splits = {key: Split(samples=sum(s.samples for s in made), shards=tuple(made)) for key, made in shards.items()}
        return cls(name=name, kind=kind, shape=shape, dtype=FORMS[kind][0], labels=labels, splits=splits)

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """That of a folder or `s3://bucket/prefix`. InputError where it is missing, malformed or of another format."""
        store = open_store(path)
        if store.exists(INDEX):
            return cls.parse(store.read(INDEX), where=store.url(INDEX))
        if names := store.list():
            remedy = "run `naign pack` again if it was interrupted, `naign index` for tars that others wrote"
            raise InputError(f"{path}: no {INDEX} among its {len(names)} files: {remedy}, or check the path")
        from naign.data.sources.catalog import SOURCES, TREES  # not needed otherwise

        name = path.rstrip("/").rpartition("/")[2]
        named = name in SOURCES and name not in TREES
        pack = f"naign pack {name if named else 'folder --root PICTURES --size 64'} --to {path}"
        raise InputError(f"{path}: no data set here, it is missing or empty: check the path, or make one: `{pack}`")

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> "Manifest":
        """Read it from the bytes of the index.json at `where`. Raises InputError."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                remedy = "write it anew with `naign index --force`, or pack the data set again with --force"
                raise InputError(f"{where}: format {version!r}, but this program reads format {FORMAT}: {remedy}")
            splits = {
                name: Split(samples=split["samples"], shards=tuple(map(Shard.parse, split["shards"])))
                for name, split in fields.pop("splits").items()
            }
            shape, labels = fields.pop("shape"), fields.pop("labels")
            if other := [value for value in (shape, labels) if not isinstance(value, list)]:
                raise TypeError(f"{other[0]!r} is no list, as shape and labels are")
            manifest = cls(shape=tuple(shape), labels=tuple(labels), splits=splits, **fields)
            problem = next(_problems(manifest), "")
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
        require((not problem, f"{where}: malformed ({problem}): pack or index the data set again with --force"))
        return manifest

    @property
    def shards(self) -> list[Shard]:
        """Those of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each label by its name."""
        return {name: number for number, name in enumerate(self.labels)}

    def split(self, name: str) -> Split:
        """The split of that name. Raises InputError, naming those there are, where there is none."""
        if name not in self.splits:
            remedy = "choose one of these, or index tars for it, with test or val in their names or chosen by --test"
            raise InputError(f"data set {self.name} has no split {name!r}, only {', '.join(self.splits)}: {remedy}")
        return self.splits[name]

    def place(self, shard: str, number: int) -> int:
        """The place in its tar of a sample of a shard by its number, which does not count those that are left out."""
        left_out = self.without.get(shard, ())
        return number + bisect_right(range(len(left_out)), number, key=lambda at: left_out[at] - at)

    def dump(self) -> bytes:
        """The bytes of index.json."""
        fields = {"format": FORMAT, **asdict(self)}
        for name, usual in (("dealt", True), ("label", ""), ("broken", {}), ("without", {})):
            if fields[name] == usual:
                del fields[name]
        for shard in (shard for split in fields["splits"].values() for shard in split["shards"]):
            if not shard["sha256"]:  # not known
                del shard["sha256"]
        return (json.dumps(fields, indent=1) + "\n").encode()


def size_problem(store: Store, shard: Shard) -> str:
    """How a shard's size in the store differs from that in index.json, or ''. Raises InputError where it is missing."""
    if (size := store.size(shard.name)) == shard.bytes:
        return ""
    remedy = "truncated or replaced: copy it again, or repack the data set"
    return f"{store.url(shard.name)}: {size} bytes, but {INDEX} says {shard.bytes}: {remedy}"


def _problems(manifest: Manifest) -> Iterator[str]:
    """Wrong types, values out of range, contradictions. Checks after a first problem may raise."""
    shape, labels = manifest.shape, manifest.labels
    if FORMS.get(manifest.kind) != (manifest.dtype, len(shape)):
        yield f"kind {manifest.kind}, shape {shape} and dtype {manifest.dtype} do not go together"
    varies = manifest.kind == "image" and shape[1:] == (0, 0)
    lengths = shape[:1] if varies else shape
    if not all(is_count(length, 1) for length in lengths) or math.prod(lengths) > VALUES:
        yield f"shape {shape} is not of positive integers with at most {VALUES} values together"
    if manifest.kind == "image" and shape[0] not in CHANNELS:
        yield f"an image has 1 or 3 channels, not the {shape[0]} of shape {shape}"
    if not all(isinstance(text, str) for text in (manifest.name, *labels)) or len(set(labels)) < len(labels):
        yield "the name and the labels are not strings, or one label stands twice"
    if type(manifest.dealt) is not bool or type(manifest.label) is not str:
        yield f"dealt is {manifest.dealt!r} and label {manifest.label!r}, not true or false, and text"
    try:
        check_label_rule(manifest.label)
    except InputError as error:
        yield str(error).replace("--label", "label")
    if not all(type(keys) is list and {*map(type, keys)} <= {str} for keys in manifest.broken.values()):
        yield "broken does not list keys by shard"
    if not manifest.splits:
        yield "no splits"
    for name, split in manifest.splits.items():
        if not split.shards:
            yield f"split {name} has no shards"
        for shard in split.shards:
            yield from (f"split {name}, shard {shard.name!r}: {problem}" for problem in shard_problems(shard))
        total = sum(split.sizes)
        if not is_count(split.samples) or total != split.samples or total >= MOST_SAMPLES:
            yield f"the samples of the shards of split {name} do not add up to {split.samples!r}"
    if twice := [name for name, count in Counter(shard.name for shard in manifest.shards).items() if count > 1]:
        yield f"shard {twice[0]} is listed twice"
    sizes = {shard.name: shard.samples for shard in manifest.shards}
    for name, places in manifest.without.items():
        ascend = type(places) is list and all(map(is_count, places)) and sorted({*places}) == places
        if not (ascend and places and places[-1] < sizes.get(name, -len(places)) + len(places)):
            yield f"without does not list places of shard {name!r}, ascending"


def is_count(value: object, least: int = 0) -> bool:
    """Whether it is an integer from `least` up; JSON's true, 1.0 and "1" are none."""
    return type(value) is int and value >= least


def shard_problems(shard: Shard) -> Iterator[str]:
    """The same of a shard."""
    name = shard.name
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) < 256:
        yield "its name is not that of a file"
    if name.startswith(".") or set(name) & {"/", "\\"}:
        yield "its name is hidden, or leads out of the folder"
    if not is_count(shard.samples, 1) or not is_count(shard.bytes):
        yield f"{shard.samples!r} samples in {shard.bytes!r} bytes: a shard has at least one, and whole numbers of both"
    if shard.bytes < SAMPLE_BYTES * shard.samples:
        yield f"{shard.bytes} bytes cannot hold {shard.samples} samples"
    for digest in (shard.pages, shard.sha256)[: 1 if shard.sha256 == "" else 2]:
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            yield f"{digest!r} is no SHA-256 of 64 hexadecimal digits"
