"""index.json, which describes a packed data set. It is written last, so a data set without it does not exist."""

import json
import math
import re
from collections.abc import Iterable
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

CHANNELS = (1, 3)  # of an image: grey or colour
FORMS = {"image": ("uint8", 3), "point": ("float32", 1)}  # type and axes of a sample, by kind


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    pages: str  # SHA-256 of its page table (pages.py), which holds the hashes of all samples


@dataclass(kw_only=True, slots=True, frozen=True)
class Split:
    """`train` or `test`: its shards in order."""

    samples: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Split":
        """The split of these shards."""
        listed = tuple(shards)
        return cls(samples=sum(shard.samples for shard in listed), shards=listed)

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

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """That of a folder or `s3://bucket/prefix`. InputError where it is missing, malformed or of another format."""
        store = open_store(path)
        if store.exists(INDEX):
            return cls.parse(store.read(INDEX), where=store.url(INDEX))
        found = f"{path}: no data set here: {len(store.list())} files, no {INDEX}"
        pack = f"`naign pack mnist --to {path}` or `naign pack folder --root DIR --size 64 --to {path}`"
        raise InputError(f"{found}: check the path, or make one: {pack}; `naign index` for tars that others wrote")

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> "Manifest":
        """Read it from the bytes of the index.json at `where`. Raises InputError."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format")
            _demand(version == FORMAT, f"format {version!r}, but this program reads format {FORMAT}")
            splits = {}
            for name, split in fields["splits"].items():
                for shard in split["shards"]:
                    shard.pop("sha256", None)  # of the whole tar, which older programs wrote
                splits[name] = Split.of(Shard(**shard) for shard in split["shards"])
                _demand(splits[name].samples == split["samples"] > 0, "samples do not add up, or there are none")
            fields["splits"] = splits
            for name in ("shape", "labels"):
                _demand(isinstance(fields[name], list), f"{name} is {fields[name]!r}, not a list")
                fields[name] = tuple(fields[name])
            manifest = cls(**fields)
            _check(manifest)
            return manifest
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: malformed ({problem}): pack or index the data set again with --force") from None

    @property
    def shards(self) -> list[Shard]:
        """Those of all splits."""
        found = list[Shard]()
        for split in self.splits.values():
            found += split.shards
        return found

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

    def dump(self) -> bytes:
        """The bytes of index.json."""
        fields = {"format": FORMAT, **asdict(self)}
        return (json.dumps(fields, indent=1) + "\n").encode()


def check_size(store: Store, shard: Shard) -> None:
    """Raise InputError where a shard is missing, or its size in the store is not that in index.json."""
    size = store.size(shard.name)
    remedy = "truncated or replaced: copy it again, or repack the data set"
    problem = f"{store.url(shard.name)}: {size} bytes, but {INDEX} says {shard.bytes}: {remedy}"
    require((size == shard.bytes, problem))


def is_count(value: object, least: int = 0) -> bool:
    """Whether it is an integer from `least` up; JSON's true, 1.0 and "1" are not."""
    return type(value) is int and value >= least


def _check(manifest: Manifest) -> None:
    """Raise ValueError or TypeError for wrong types, values out of range, and contradictions."""
    shape = manifest.shape
    lengths = shape
    _demand(FORMS.get(manifest.kind) == (manifest.dtype, len(shape)), "kind, shape and dtype do not go together")
    if manifest.kind == "image":
        _demand(shape[0] in CHANNELS, "an image has 1 or 3 channels")
        if shape[1:] == (0, 0):
            lengths = shape[:1]
    _demand(all(is_count(length, 1) for length in lengths), "shape is not of positive integers")
    _demand(math.prod(lengths) <= VALUES, f"a sample has more than {VALUES} values")
    texts = [manifest.name, manifest.label, *manifest.labels]
    for keys in manifest.broken.values():
        texts += keys
    _demand(all(isinstance(text, str) for text in texts), "name, label, labels and broken are not text")
    check_label_rule(manifest.label)
    _demand(type(manifest.dealt) is bool, "dealt is not true or false")
    names = set()
    for shard in manifest.shards:
        name = shard.name
        is_plain = re.fullmatch(r"[^./\\][^/\\]{0,200}", name) and name.isprintable()
        _demand(is_plain, f"{name!r} is not the name of a shard")
        counted = is_count(shard.samples, 1) and is_count(shard.bytes)
        _demand(counted, f"{name}: samples and bytes are not whole numbers")
        _demand(shard.bytes >= SAMPLE_BYTES * shard.samples, f"{name}: its bytes cannot hold its samples")
        hashed = re.fullmatch("[0-9a-f]{64}", shard.pages)
        _demand(hashed, f"{name}: pages is not a SHA-256 of 64 hexadecimal digits")
        names.add(name)
    _demand(names and len(names) == len(manifest.shards), "no shards, or one is listed twice")


def _demand(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
