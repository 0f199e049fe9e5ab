"""A rank's share of every round, read and decoded as blocks of rows: in this process or by a loader's workers."""

import math
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data import decode
from pipeline.data.dataset import DataConfig, image_shape, open_reader
from pipeline.data.decode import Array
from pipeline.data.format.manifest import Manifest
from pipeline.data.order import Order, Piece, parts, pieces, rank_rows
from pipeline.data.reader import Raw, Reader
from pipeline.errors import InputError, Unavailable
from pipeline.storage.fetch import Tally

BLOCK = 256
"""The most rows that are handed over at once."""

BLOCK_BYTES = 4 << 20
"""The most bytes of them, unless one row is more: few enough for a container's small /dev/shm."""

SLOTS = 3
"""Blocks of shared memory a worker: the two that a loader lets it be ahead, and the one that is being copied."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Block:
    """Consecutive rows of a rank's part of a round, from row `first` on; fields as in Taken."""

    first: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    epochs: Tensor
    tally: Tally = field(default_factory=Tally)
    broken: list[str] = field(default_factory=list)
    slot: int = 0
    """Of a worker: where in its shared memory the images are."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Share:
    """All that says which rows a rank reads; the same in the rank and in its workers."""

    config: DataConfig
    manifest: Manifest
    order: Order
    rank: int
    world: int

    @property
    def rows(self) -> int:
        """Of this rank, a round."""
        return self.order.round_size // self.world

    def blocks(self, readers: int) -> int:
        """How many blocks each of `readers` makes of its part of a round."""
        row = math.prod(image_shape(self.config, self.manifest)) * np.dtype(self.manifest.dtype).itemsize
        most = max(1, min(BLOCK, BLOCK_BYTES // row))
        return max(1, -(-self.rows // (readers * most)))

    def read(
        self,
        start: int,  # round
        first: int,  # row of the rank's part of a round
        last: int,  # one past the last row
        blocks: int,  # a round
        memory: Callable[[int, int], Array],  # for the images of rows [begin, end)
    ) -> Generator[Block]:
        """Rows [first, last) of the rank's part of round `start` and every round after it, in one pass, without end.

        What comes after a round is being fetched before it is asked for.
        """
        reader = open_reader(self.config, self.manifest)
        with closing(reader.raw(self._pieces(start, first, last))) as stored:
            for round in count(start):
                for begin, end in parts(first, last, blocks):
                    offset, _ = rank_rows(self.order.round_size, self.rank, self.world)
                    draws = decode.draws(self.order.seed, round, offset + begin, offset + end)
                    block = fill(begin, reader, islice(stored, end - begin), memory(begin, end), self.config, draws)
                    block.tally.merge(reader.store.tally.take())
                    yield block

    def _pieces(self, start: int, first: int, last: int) -> Iterator[Piece]:
        offset, _ = rank_rows(self.order.round_size, self.rank, self.world)
        for round in count(start):
            yield from pieces(self.order, round, offset + first, offset + last)


def new_images(config: DataConfig, manifest: Manifest, number: int) -> Array:
    """Memory for images (number, C, H, W), in which the channels of a pixel lie together; for points (number, D).

    NumPy's, not torch's: it asks for huge pages, without which touching new memory takes a tenth of the decoding.
    """
    shape = image_shape(config, manifest)
    if len(shape) != 3:
        return np.empty((number, *shape), manifest.dtype)
    channels, height, width = shape
    return np.empty((number, height, width, channels), manifest.dtype).transpose(0, 3, 1, 2)


def fill(
    first: int,
    reader: Reader,
    stored: Iterator[Raw],  # n
    images: Array,  # (n, *shape): to be filled
    config: DataConfig,
    draws: decode.Draws,
) -> Block:
    """The samples, decoded, as a block from row `first` on."""
    total = len(images)
    labels, epochs = np.empty(total, np.int64), np.empty(total, np.int64)
    keys, broken = [], []
    for number, raw in enumerate(stored):
        place = images[number]
        row = reader.row(raw, None if config.crop else place)
        if row.array is not place:
            place[...] = decode.crop(row.array, config.crop, draws[number]) if config.crop else row.array
        labels[number], epochs[number] = row.label, row.epoch
        keys.append(row.key)
        if row.broken:
            broken.append(row.broken)
    assert len(keys) == total
    if config.flip and images.ndim == 4:
        decode.flip(images, draws)
    return Block(
        first=first,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        keys=keys,
        epochs=torch.from_numpy(epochs),
        broken=broken,
    )


class Rounds(IterableDataset[Block | InputError | Unavailable]):
    """What a worker reads: its part of this rank's part of every round from `start` on, without end.

    Every worker gives the same number of blocks a round, so that the loader, which asks them in turn, gives all of a
    round's blocks before any of the next. An error is handed over as a value: raised, it would arrive wrapped in the
    text of a traceback.
    """

    def __init__(self, *, share: Share, start: int, workers: int) -> None:
        self.share, self.start, self.workers = share, start, workers
        self.blocks = share.blocks(workers)
        """A worker and round."""
        # Memory that workers write to and this process reads, over and over: new shared memory for each block would
        # cost both of them its page faults, for pictures of 256 x 256 as much as decoding them.
        rows = -(-share.rows // (workers * self.blocks))
        one = torch.from_numpy(new_images(share.config, share.manifest, rows))
        layout = one.permute(0, 2, 3, 1) if one.ndim == 4 else one
        self.rings = [layout.new_empty((SLOTS, *layout.shape)).share_memory_() for _ in range(workers)]

    def images(self, worker: int, slot: int, number: int) -> Array:
        """Shared memory for `number` images, as new_images has it."""
        rows: Array = self.rings[worker][slot].numpy()[:number]
        return rows.transpose(0, 3, 1, 2) if rows.ndim == 4 else rows

    def __iter__(self) -> Iterator[Block | InputError | Unavailable]:
        info = get_worker_info()
        assert info is not None
        worker, slot = info.id, 0
        first, last = parts(0, self.share.rows, self.workers)[worker]

        def memory(begin: int, end: int) -> Array:
            return self.images(worker, slot, end - begin)

        try:
            for block in self.share.read(self.start, first, last, self.blocks, memory):
                yield replace(block, images=torch.empty(0), slot=slot)
                slot = (slot + 1) % SLOTS
        except (InputError, Unavailable) as error:
            yield error


def quiet_worker(_: int) -> None:
    """Ctrl-C reaches the workers too: they leave it to their parent, which ends them. (torch sees to SIGTERM.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
