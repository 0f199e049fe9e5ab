"""What data.path names: one data set, or several that share every round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from naign.data.dataset import DataConfig, lists_data_sets, parse_resize
from naign.data.format.manifest import INDEX, Manifest, Split
from naign.data.order import Order, Plan, count_lanes
from naign.data.reader import Reader
from naign.errors import InputError, require
from naign.settings.read import build

_HOW = "write paths in brackets, with weights and indexes, as in [s3://a, {path: s3://b, weight: 3, index: s3://c}]"


@dataclass(kw_only=True, slots=True)
class Member:
    """An entry of the list of data sets in data.path."""

    path: str = ""
    weight: float = 1.0  # its part of a round is in proportion to it
    index: str = ""


def members(config: DataConfig) -> list[Member]:
    """The data sets of data.path. Raises InputError for a malformed list."""
    if not lists_data_sets(config):
        return [Member(path=config.path, index=config.index)]
    require((not config.index, "data.index is of one data set: for a list, write {path: ..., index: ...} in data.path"))
    try:
        listed = yaml.safe_load(config.path)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"data.path {config.path!r} is not a list ({type(error).__name__}): {_HOW}") from None
    require((isinstance(listed, list) and listed, f"data.path is {config.path!r}: {_HOW}"))
    return [_parse_member(entry) for entry in listed]


def _parse_member(entry: Any) -> Member:
    if isinstance(entry, str):
        entry = {"path": entry}
    named = isinstance(entry, dict) and entry.get("path")
    require((named, f"data.path has the entry {entry!r}: {_HOW}"))
    member: Member = build(Member, entry, "data.path", named={})
    positive = 0 < member.weight < math.inf
    require((positive, f"data.path gives {member.path} the weight {member.weight}: it must be a positive number"))
    return member


def shares(weights: Sequence[float], size: int) -> list[int]:
    """`size` cut into whole numbers in proportion to the weights; what is left over goes to the largest remainders."""
    relative = np.array(weights) / max(weights)
    exact = relative / relative.sum() * size
    counts = np.floor(exact).astype(int)
    left = size - int(counts.sum())
    first = np.argsort(counts - exact, kind="stable")
    counts[first[:left]] += 1
    found: list[int] = counts.tolist()
    assert sum(found) == size
    return found


class DataSets:
    """The data sets that data.path names. InputError where one is missing, or they do not go together."""

    def __init__(self, config: DataConfig) -> None:
        resize = parse_resize(config)
        shapes = []
        self._weights: list[float] = []
        self.configs: list[DataConfig] = []
        self.indexes: list[str] = []
        self.manifests: list[Manifest] = []
        for member in members(config):
            place = member.index or member.path
            manifest = Manifest.load(place)
            self._weights.append(member.weight)
            self.configs.append(replace(config, path=member.path, index=member.index))
            self.indexes.append(f"{place}/{INDEX}")
            self.manifests.append(manifest)
            shapes.append(resize.shape(manifest.shape, manifest.name))
        first = self.manifests[0]
        size = shapes[0][1:]
        for manifest, shape in zip(self.manifests, shapes, strict=True):
            if manifest.kind != first.kind or shape[1:] != size:
                both = f"{manifest.name} {shape} and {first.name} {shapes[0]}"
                raise InputError(f"{both} do not go together: bring them to one data.size")
        self.shape = max(shapes)  # of one row: grey images are read as colour among others
        if first.kind == "image":
            for number, manifest in enumerate(self.manifests):
                shape = (self.shape[0], *manifest.shape[1:])
                self.manifests[number] = replace(manifest, shape=shape)

    @cached_property
    def manifest(self) -> Manifest:
        """Of all of them together: a label is the same class in all that have a label of that name."""
        if len(self.manifests) == 1:
            return self.manifests[0]
        labels = dict[str, None]()
        splits = dict[str, Split]()
        for manifest in self.manifests:
            labels |= dict.fromkeys(manifest.labels)
            for name, split in manifest.splits.items():
                shards = list(split.shards)
                if name in splits:
                    shards = [*splits[name].shards, *shards]
                splits[name] = Split.of(shards)
        return replace(
            self.manifests[0],
            name=" + ".join(manifest.name for manifest in self.manifests),
            labels=tuple(labels),
            label="",
            splits=splits,
        )

    def reader(self, number: int, split: str | None = None) -> Reader:
        """A reader of one of them, of data.split or another split."""
        config = self.configs[number]
        manifest = self.manifests[number]
        reader = Reader(config, manifest, split or config.split)
        if len(self.configs) > 1:
            reader.key_prefix = f"{number}:"
            names = self.manifest.numbers
            reader.label_numbers = {label: names[name] for label, name in enumerate(manifest.labels)}
        return reader

    def plan(self, seed: int, round_size: int) -> Plan:
        """What rounds of so many images are made of. Raises InputError where one has no share."""
        orders = []
        for number, share in enumerate(shares(self._weights, round_size)):
            config = self.configs[number]
            manifest = self.manifests[number]
            require((share, f"data.path: {config.path} has no image in a round of {round_size}: raise its weight"))
            order = Order(
                sizes=manifest.split(config.split).sizes,
                seed=seed,
                round_size=share,
                lanes=count_lanes(config.shuffle, dealt=manifest.dealt),
            )
            orders.append(order)
        return Plan(orders=tuple(orders))
