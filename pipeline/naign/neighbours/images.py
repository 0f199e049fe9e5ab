"""The stored images of a data set by number, and where each of them lies."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.mixing import DataSets
from naign.data.order import Piece
from naign.data.reader import Raw, Reader

NEAR = 64  # images between two wanted ones that are read as well, rather than by another request


class Place(NamedTuple):
    """Where an image is stored."""

    split: str
    shard: str
    key: str
    number: int  # among the samples of the shard
    broken: bool  # index.json records that it cannot be decoded


class Images:
    """The images of some splits of what data.path names, numbered in the order of splits, data sets and shards."""

    def __init__(self, config: DataConfig, *splits: str) -> None:
        """Raises InputError where a data set or a split is missing."""
        self.sets = DataSets(config)
        self._shards = [  # split, data set, number among the shards of both, shard
            (split, place, number, shard)
            for split in splits
            if self.sets.manifest.split(split)
            for place, manifest in enumerate(self.sets.manifests)
            for number, shard in enumerate(manifest.splits[split].shards if split in manifest.splits else ())
        ]
        self._edges = list(accumulate((shard.samples for *_, shard in self._shards), initial=0))
        self._reader = lru_cache(None)(self.sets.reader)

    def __len__(self) -> int:
        return self._edges[-1]

    def read(self, first: int, last: int) -> Tensor:
        """Images [first, last) as they are stored: (n, C, H, W) uint8, or points (n, D) float32. Raises InputError for
        damaged ones, but with data.broken=skip another image of the shard stands in for one that cannot be decoded.
        """
        kind = torch.uint8 if self.sets.manifest.kind == "image" else torch.float32
        images = torch.empty(last - first, *self.sets.shape, dtype=kind)
        for number, reader, raw in self._stored([(first, last)]):
            images[number - first].numpy()[...] = reader.row(raw).array
        return images

    def places(self, numbers: Sequence[int]) -> dict[int, Place]:
        """Where each of some images lies; `numbers` ascend. Nothing is decoded."""
        spans = list[tuple[int, int]]()
        for number in numbers:
            near = spans and number - spans[-1][1] < NEAR
            spans.append((spans.pop()[0] if near else number, number + 1))
        wanted, places = set(numbers), dict[int, Place]()
        for number, _, raw in self._stored(spans):
            if number in wanted:
                split, place, _, shard = self._shards[bisect_right(self._edges, number) - 1]
                key, broken = raw.sample["__key__"], self.sets.manifests[place].broken
                places[number] = Place(split, shard.name, key, raw.number, key in broken.get(shard.name, ()))
        return places

    def _stored(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Reader, Raw]]:
        """Number, reader and stored sample of the images in spans [first, last), which ascend."""
        for (split, place), cut in groupby(self._pieces(spans), lambda one: one[:2]):
            *_, starts, pieces = zip(*cut, strict=True)
            first = dict(zip((piece.shard for piece in pieces), starts, strict=True))
            reader = self._reader(place, split)
            for raw in reader.raw(pieces):
                yield first[raw.piece.shard] + raw.number, reader, raw

    def _pieces(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int, Piece]]:
        """Split, data set, number of the shard's first image, and piece of the shard."""
        for first, last in spans:
            at = bisect_right(self._edges, first) - 1
            while first < last:
                (split, place, number, _), start, end = self._shards[at], self._edges[at], self._edges[at + 1]
                piece = Piece(epoch=0, shard=number, first=first - start, last=min(last, end) - start)
                yield split, place, start, piece
                first, at = end, at + 1
