"""The stored images of a data set by number, and where each of them lies."""

import csv
import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Shard
from naign.data.order import Piece
from naign.data.reader import DataSet, Raw
from naign.errors import require


class Place(NamedTuple):
    """Where an image is stored."""

    split: str
    shard: str
    key: str
    broken: bool  # index.json records that it cannot be decoded


class Stored(NamedTuple):
    """A shard of one split."""

    split: str
    number: int  # among the shards of the split
    shard: Shard


class Images:
    """The images of some splits of a data set, numbered in the order of splits and shards."""

    def __init__(self, config: DataConfig, *splits: str) -> None:
        """Raises InputError where a data set or a split is missing, and for points."""
        dataset = DataSet(config)
        self.manifest = dataset.manifest
        self.shape = dataset.shape
        require((self.manifest.kind == "image", f"{config.path} holds points: only images can be compared"))
        self._shards = list[Stored]()
        self._readers = {split: dataset.reader(split) for split in splits}
        for split in splits:
            for number, shard in enumerate(self.manifest.split(split).shards):
                self._shards.append(Stored(split, number, shard))
        counts = [stored.shard.samples for stored in self._shards]
        self._edges = list(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._edges[-1]

    def read(self, first: int, last: int) -> Tensor:
        """Images [first, last) as they are stored: (n, C, H, W) uint8. Raises InputError for damaged ones, but with
        data.broken=skip another image of the shard stands in for one that cannot be decoded.
        """
        images = torch.empty(last - first, *self.shape, dtype=torch.uint8)
        for number, stored, raw in self._stored(first, last):
            images[number - first].numpy()[...] = self._readers[stored.split].row(raw).array
        return images

    def places(self, numbers: Sequence[int]) -> dict[int, Place]:
        """Where each of some images lies; `numbers` ascend. Nothing is decoded."""
        places = dict[int, Place]()
        for _, group in groupby(numbers, key=self._find):
            wanted = set(group)
            for number, stored, raw in self._stored(min(wanted), max(wanted) + 1):
                if number in wanted:
                    name = stored.shard.name
                    key = raw.sample["__key__"]
                    broken = self.manifest.broken.get(name, ())
                    places[number] = Place(stored.split, name, key, key in broken)
        return places

    def _find(self, number: int) -> int:
        """The shard of an image."""
        return bisect_right(self._edges, number) - 1

    def _stored(self, first: int, last: int) -> Iterator[tuple[int, Stored, Raw]]:
        """Number, shard and stored sample of the images [first, last)."""
        at = self._find(first)
        while first < last:
            start = self._edges[at]
            end = min(last, self._edges[at + 1])
            stored = self._shards[at]
            piece = Piece(
                epoch=0,
                shard=stored.number,
                first=first - start,
                last=end - start,
            )
            for raw in self._readers[stored.split].raw([piece]):
                yield start + raw.number, stored, raw
            first = end
            at += 1


def as_csv(lines: Sequence[Sequence[object]]) -> bytes:
    """The file of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def as_json(document: Any) -> bytes:
    text = json.dumps(document, indent=1)
    return f"{text}\n".encode()
