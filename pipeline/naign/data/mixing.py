"""Data sets that share every round: each has a fixed part of it and epochs of its own."""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, count, cycle
from typing import Any, cast

import numpy as np
import yaml

from naign.data.cache import CachedStore
from naign.data.dataset import DataConfig, lists_data_sets, parse_resize
from naign.data.format.manifest import Manifest, Split
from naign.data.order import LANES, Order, Piece, pieces
from naign.data.reader import Raw, Reader
from naign.errors import InputError, require
from naign.storage.base import Store
from naign.storage.store import open_store

Stored = Generator[tuple[Reader, Raw]]


def members(config: DataConfig) -> list[tuple[DataConfig, float]]:
    """The settings and the weight of each data set of data.path. Raises InputError for a list that is none."""
    if not lists_data_sets(config):
        return [(config, 1.0)]
    require((not config.index, "data.index is of one data set: for a list, write {path: ..., index: ...} in data.path"))
    try:
        listed = yaml.safe_load(config.path)
    except yaml.YAMLError as error:
        raise InputError(f"data.path is {config.path!r}: no list ({type(error).__name__}): {_HOW}") from None
    require((isinstance(listed, list) and listed, f"data.path is {config.path!r}: {_HOW}"))
    return [_member(config, {"path": entry} if isinstance(entry, str) else entry) for entry in listed]


_HOW = "write paths in brackets, with weights and indexes, as in [s3://a, {path: s3://b, weight: 3, index: s3://c}]"


def _member(config: DataConfig, entry: Any) -> tuple[DataConfig, float]:
    if not isinstance(entry, dict) or entry.keys() - {"path", "weight", "index"} or not entry.get("path"):
        raise InputError(f"data.path has the entry {entry!r}: {_HOW}")
    weight, index = entry.get("weight", 1), entry.get("index", "")
    with suppress(ValueError):
        weight = float(weight) if isinstance(weight, str) else weight  # YAML reads 1e-9 as text
    if type(weight) not in (int, float) or not 0 < weight <= sys.float_info.max:
        raise InputError(f"data.path gives {entry['path']} the weight {weight!r}: a weight is a positive number")
    return replace(config, path=str(entry["path"]), index=str(index or "")), float(weight)


def shares(weights: Sequence[float], size: int) -> list[int]:
    """`size` cut into whole numbers in proportion to the weights; what is left over goes to the largest remainders."""
    relative = np.array(weights) / max(weights)
    exact = relative / relative.sum() * size
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())].tolist():
        counts[place] += 1
    assert counts.sum() == size
    return [int(share) for share in counts]


class DataSets:
    """What data.path names. InputError where one is missing, or they do not go together."""

    def __init__(self, config: DataConfig) -> None:
        named = members(config)
        self.configs, self.weights = [config for config, _ in named], [weight for _, weight in named]
        self.resize = parse_resize(config)
        self.indexes = [f"{config.index or config.path}/index.json" for config in self.configs]
        self.manifests = [Manifest.load(config.index or config.path) for config in self.configs]
        shapes = [self.resize.shape(manifest.shape, manifest.name) for manifest in self.manifests]
        channels = max(shape[0] for shape in shapes)
        for manifest, shape in zip(self.manifests, shapes, strict=True):
            if manifest.kind != self.manifests[0].kind or shape[1:] != shapes[0][1:]:
                first = f"{self.manifests[0].name} {shapes[0]}"
                raise InputError(f"{manifest.name} {shape} and {first} do not go together: bring them to one data.size")
        if self.manifests[0].kind == "image":  # grey ones are read as colour among others
            self.manifests = [replace(m, shape=(channels, *m.shape[1:])) for m in self.manifests]
        self.shape = (channels, *shapes[0][1:])  # of one row

    @cached_property
    def manifest(self) -> Manifest:
        """Of all of them together: a label is the same class in all that have a label of that name."""
        first, *others = self.manifests
        if not others:
            return first
        names = {name for manifest in self.manifests for name in manifest.splits}
        splits = {}
        for name in sorted(names, key=["train", "test", *sorted(names)].index):
            parts = [manifest.splits[name] for manifest in self.manifests if name in manifest.splits]
            shards = tuple(chain.from_iterable(part.shards for part in parts))
            splits[name] = Split(samples=sum(part.samples for part in parts), shards=shards)
        together = " + ".join(manifest.name for manifest in self.manifests)
        labels = dict.fromkeys(label for manifest in self.manifests for label in manifest.labels)
        return replace(first, name=together, labels=tuple(labels), label="", splits=splits)

    def reader(self, place: int, split: str | None = None) -> Reader:
        """A reader of one of them, of data.split or another one; through data.cache if the data lie elsewhere."""
        config, manifest = self.configs[place], self.manifests[place]

        def opened(path: str) -> Store:
            store = open_store(path)
            if not config.cache or "://" not in path:
                return store
            return cast(Store, CachedStore(store, manifest, config.cache, int(config.cache_gb * 1e9)))

        store, shards = opened(config.path), manifest.split(split or config.split).shards
        make = partial(Reader, store, opened(config.index) if config.index else store, manifest, shards, config)
        if len(self.configs) == 1:
            return make(lanes=self._lanes(place))
        numbers = [self.manifest.numbers[label] for label in manifest.labels]
        return make(lanes=self._lanes(place), prefix=f"{place}:", numbers=numbers)

    def _lanes(self, place: int) -> int:
        return self.configs[place].shuffle or (1 if self.manifests[place].dealt else LANES)

    def plan(self, seed: int, round_size: int) -> "Plan":
        """What rounds of so many images are made of. Raises InputError where one has no share."""
        orders = []
        for place, share in enumerate(shares(self.weights, round_size)):
            config, manifest = self.configs[place], self.manifests[place]
            require((share, f"data.path: {config.path} has no image in a round of {round_size}: raise its weight"))
            sizes = manifest.split(config.split).sizes
            orders.append(Order(sizes=sizes, seed=seed, round_size=share, lanes=self._lanes(place)))
        return Plan(tuple(orders))


@dataclass(frozen=True)
class Plan:
    """The order of each data set, and which rows of a round are whose: evenly mixed, the same in every round."""

    orders: tuple[Order, ...]

    @property
    def total(self) -> int:
        """Images of all data sets."""
        return sum(order.total for order in self.orders)

    def epochs(self, rounds: int) -> float:
        """The number of epochs in that many rounds, of the data set with the fewest."""
        return min(rounds * order.round_size / order.total for order in self.orders)

    def describe(self) -> str:
        """Which images a round takes and what happens at the end of an epoch, for a log."""
        if len(self.orders) == 1:
            return self.orders[0].describe()
        return "; ".join(f"{order.round_size} a round: {order.describe()}" for order in self.orders)

    @cached_property
    def owners(self) -> list[int]:
        """Whose each row of a round is."""
        sizes = [order.round_size for order in self.orders]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        owners = np.repeat(np.arange(len(sizes)), sizes)
        return list(owners[np.argsort(places, kind="stable")].tolist())

    def open(self, sets: DataSets, start: int, begin: int, end: int) -> tuple[list[Reader], Stored]:
        """The readers of rows [begin, end) of a round, and these rows of round `start` and all that follow."""
        mine, streams = self.owners[begin:end], dict[int, tuple[Reader, Generator[Raw]]]()
        for place in sorted(set(mine)):
            before, reader = self.owners[:begin].count(place), sets.reader(place)
            streams[place] = reader, reader.raw(_endless(self.orders[place], start, before, before + mine.count(place)))
        stored = ((streams[place][0], next(streams[place][1])) for place in cycle(mine))
        return [reader for reader, _ in streams.values()], stored


def _endless(order: Order, start: int, begin: int, end: int) -> Iterator[Piece]:
    return (piece for round in count(start) for piece in pieces(order, round, begin, end))
