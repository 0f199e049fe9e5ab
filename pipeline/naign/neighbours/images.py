"""The stored images of a data set by number, and where each of them lies."""

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Shard
from naign.data.mixing import DataSets
from naign.data.order import Piece
from naign.data.reader import Raw, Reader

NEAR = 64  # images between two wanted ones that are read as well, rather than by another request


class Place(NamedTuple):
    """Where an image is stored."""

    split: str
    shard: str
    key: str
    broken: bool  # index.json records that it cannot be decoded


class Stored(NamedTuple):
    """A shard of one split of one data set."""

    split: str
    place: int  # of the data set among those that data.path names
    number: int  # among the shards of both
    shard: Shard


class Images:
    """The images of some splits of what data.path names, numbered in the order of splits, data sets and shards."""

    def __init__(self, config: DataConfig, *splits: str) -> None:
        """Raises InputError where a data set or a split is missing."""
        self.sets = DataSets(config)
        self._shards = list[Stored]()
        for split in splits:
            self.sets.manifest.split(split)
            for place, manifest in enumerate(self.sets.manifests):
                if split in manifest.splits:
                    shards = enumerate(manifest.splits[split].shards)
                    self._shards += [Stored(split, place, number, shard) for number, shard in shards]
        self._edges = list(accumulate((stored.shard.samples for stored in self._shards), initial=0))
        self._reader = lru_cache(None)(self.sets.reader)

    def __len__(self) -> int:
        return self._edges[-1]

    def read(self, first: int, last: int) -> Tensor:
        """Images [first, last) as they are stored: (n, C, H, W) uint8, or points (n, D) float32. Raises InputError for
        damaged ones, but with data.broken=skip another image of the shard stands in for one that cannot be decoded.
        """
        dtype = torch.float32
        if self.sets.manifest.kind == "image":
            dtype = torch.uint8
        images = torch.empty(last - first, *self.sets.shape, dtype=dtype)
        for number, reader, raw in self._stored([(first, last)]):
            images[number - first].numpy()[...] = reader.row(raw).array
        return images

    def places(self, numbers: Sequence[int]) -> dict[int, Place]:
        """Where each of some images lies; `numbers` ascend. Nothing is decoded."""
        spans = list[tuple[int, int]]()
        for number in numbers:
            first = number
            if spans and number - spans[-1][1] < NEAR:
                first, _ = spans.pop()
            spans.append((first, number + 1))
        wanted = set(numbers)
        places = dict[int, Place]()
        for number, _, raw in self._stored(spans):
            if number in wanted:
                stored = self._shards[self._find(number)]
                key = raw.sample["__key__"]
                broken = self.sets.manifests[stored.place].broken.get(stored.shard.name, ())
                places[number] = Place(stored.split, stored.shard.name, key, key in broken)
        return places

    def _find(self, number: int) -> int:
        """The shard of an image."""
        return bisect_right(self._edges, number) - 1

    def _stored(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Reader, Raw]]:
        """Number, reader and stored sample of the images in spans [first, last), which ascend."""
        cuts = groupby(self._pieces(spans), key=lambda cut: self._shards[cut[0]][:2])
        for (split, place), group in cuts:
            reader = self._reader(place, split)
            edges = dict[int, int]()
            pieces = list[Piece]()
            for at, piece in group:
                edges[piece.shard] = self._edges[at]
                pieces.append(piece)
            for raw in reader.raw(pieces):
                yield edges[raw.piece.shard] + raw.number, reader, raw

    def _pieces(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Piece]]:
        """Which shard, and the piece of it, in turn."""
        for first, last in spans:
            at = self._find(first)
            while first < last:
                start = self._edges[at]
                end = self._edges[at + 1]
                piece = Piece(
                    epoch=0,
                    shard=self._shards[at].number,
                    first=first - start,
                    last=min(last, end) - start,
                )
                yield at, piece
                first = end
                at += 1


def as_csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> bytes:
    """The file of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue().encode()
