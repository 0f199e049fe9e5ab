"""The stored images of a data set by number, and where each of them lies."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Shard
from naign.data.order import Piece
from naign.data.reader import DataSet, Raw
from naign.errors import require


class Place(NamedTuple):
    """Where an image is stored."""

    shard: str
    key: str


class Images:
    """The images of a split, numbered in the order of its shards."""

    def __init__(self, config: DataConfig, split: str) -> None:
        """Raises InputError where the data set or the split is missing, and for points."""
        dataset = DataSet(config)
        manifest = dataset.manifest
        self.shape = dataset.shape
        require((manifest.kind == "image", f"{config.path} holds points: only images can be compared"))
        self._reader = dataset.reader(split)
        self._shards = manifest.split(split).shards
        counts = [shard.samples for shard in self._shards]
        self._edges = list(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._edges[-1]

    def read(self, first: int, last: int) -> Tensor:
        """Images [first, last) as they are stored: (n, C, H, W) uint8. Raises InputError for damaged ones, but with
        data.broken=skip another image of the shard stands in for one that cannot be decoded.
        """
        images = torch.empty(last - first, *self.shape, dtype=torch.uint8)
        for number, _, raw in self._stored(first, last):
            images[number - first].numpy()[...] = self._reader.row(raw).array
        return images

    def places(self, numbers: Sequence[int]) -> dict[int, Place]:
        """Where each of some images lies; `numbers` ascend. Nothing is decoded."""
        places = dict[int, Place]()
        for _, group in groupby(numbers, key=self._find):
            wanted = set(group)
            for number, shard, raw in self._stored(min(wanted), max(wanted) + 1):
                if number in wanted:
                    places[number] = Place(shard.name, raw.sample["__key__"])
        return places

    def _find(self, number: int) -> int:
        """The shard of an image."""
        return bisect_right(self._edges, number) - 1

    def _stored(self, first: int, last: int) -> Iterator[tuple[int, Shard, Raw]]:
        """Number, shard and stored sample of the images [first, last)."""
        at = self._find(first)
        while first < last:
            start = self._edges[at]
            end = min(last, self._edges[at + 1])
            piece = Piece(shard=at, first=first - start, last=end - start)
            for raw in self._reader.raw([piece]):
                yield start + raw.number, self._shards[at], raw
            first = end
            at += 1
