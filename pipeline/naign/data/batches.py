"""Batches of a packed data set for a training loop of one's own: `naign.open_dataset`."""

import hashlib
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from naign.data.dataset import DataConfig, check_config
from naign.data.format.manifest import is_count
from naign.data.loader import ReadAhead
from naign.data.order import Span, check_seed, parts, spread
from naign.data.reader import DataSet
from naign.data.scale import scaled
from naign.errors import require
from naign.settings.read import build


class ImageBatch(NamedTuple):
    """One rank's part of a batch."""

    images: Tensor  # (n, C, H, W) float32 in [-1, 1]; (n, D) float32 of points
    labels: Tensor  # (n,) int64, -1 where there is none
    keys: list[str]  # n of them


class Batches(IterableDataset[ImageBatch]):
    """A split of a data set as this rank's batches; see `open_dataset`."""

    def __init__(
        self,
        config: DataConfig,
        batch: int,
        seed: int,
        rank: int | None,
        world: int | None,
    ) -> None:
        check_config(config)
        given = [batch, seed, *(number for number in (rank, world) if number is not None)]
        whole = all(isinstance(number, Integral) for number in given)
        named = f"batch is {batch!r}, seed {seed!r}, rank {rank!r} and world {world!r}"
        require((whole, f"{named}: they must be whole numbers"))
        check_seed(seed)
        require(
            (batch > 0, f"batch is {batch}: it must be positive"),
            ((rank is None) == (world is None), "give both rank and world, or neither"),
            (rank is None or world is None or 0 <= rank < world, f"rank is {rank}: it must lie in [0, world={world})"),
        )
        self._config = config
        self._batch = int(batch)
        self._seed = int(seed)
        self._rank = rank
        self._world = world
        self._dataset = DataSet(config)
        self.manifest = self._dataset.manifest  # has the names of labels
        self.shape = self._dataset.shape  # of one image
        split = self.manifest.split(config.split)
        # A round as long as the epoch: the order depends neither on the batch nor on the number of ranks.
        self._order = self._dataset.order(self._seed, split.samples)
        shards = [(shard.pages, shard.samples) for shard in split.shards]
        content = repr((spread(self._order.lanes).tolist(), shards))
        self._digest = hashlib.sha256(content.encode()).hexdigest()
        self.epoch = 0
        self._position = 0  # images of this epoch that all ranks together have yielded

    def state_dict(self) -> dict[str, int | str]:
        """Epoch, and position in it after the batches yielded so far: equal on all ranks after equally many of them."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self._seed,
            "order": self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of any number of ranks and any `batch`; the next iteration yields the rest of its
        epoch. Raises InputError for a state of another data set, split, `shuffle` or seed.
        """
        if not isinstance(state, Mapping):
            state = {}
        epoch = state.get("epoch", -1)
        position = state.get("position", -1)
        where = f"split {self._config.split} of {self._config.path} with seed {self._seed}"
        known = state.get("order") == self._digest and state.get("seed") == self._seed
        placed = is_count(epoch) and is_count(position) and position <= self._order.total
        require((known and placed, f"the state is of another data set, split, shuffle or seed than {where}"))
        self.epoch = epoch
        self._position = position

    def __iter__(self) -> Iterator[ImageBatch]:
        rank, world = self._find_rank()
        self._check(world)
        epoch = self.epoch
        start = self._position

        def spans() -> Iterator[Span]:
            """This rank's part of each batch."""
            for first, end in self._batches(start, world):
                yield epoch, *parts(first, end, world)[rank]

        ahead = ReadAhead(self._dataset, self._order, world)
        try:
            ahead.start(spans)
            for _, end in self._batches(start, world):
                rows = ahead.take()
                self._position = end
                yield ImageBatch(scaled(rows.images), rows.labels, rows.keys)
            self.epoch += 1
            self._position = 0
        finally:
            ahead.close()

    def _find_rank(self) -> tuple[int, int]:
        if self._rank is not None and self._world is not None:
            return self._rank, self._world
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def _check(self, world: int) -> None:
        """Raise InputError where images would be lost or repeated, or ranks have unequally many batches."""
        left = self._order.total - self._position
        after = {"epoch": self.epoch + 1, "position": 0}
        begin = f"use fewer ranks, or begin the next epoch, by load_state_dict(state | {after})"
        divided = world > 1 and _divided_by_accelerate(self)
        remedy = "iterate over the data set itself, and move batches to accelerator.device"
        require(
            (not get_worker_info(), "open_dataset reads ahead by its own threads: give the DataLoader num_workers=0"),
            (not 0 < left < world, f"{left} images left of the epoch are too few for {world} ranks: {begin}"),
            (self._batch >= world, f"a batch of {self._batch} images has none for some of {world} ranks: raise batch"),
            (not divided, f"accelerator.prepare divides this rank's batches among the ranks once more: {remedy}"),
        )

    def _batches(self, position: int, world: int) -> Iterator[tuple[int, int]]:
        """Batches [first, end) up to the epoch's end; the last is of another size, so that ranks have equally many."""
        while position < self._order.total:
            end = position + self._batch
            if self._order.total - end < world:
                end = self._order.total
            yield position, end
            position = end


def _divided_by_accelerate(dataset: Batches) -> bool:
    """Whether a loader of Accelerate iterates over the data set on one rank for all, or passes over batches."""
    from accelerate.data_loader import DataLoaderDispatcher, GradientState

    loader = GradientState().active_dataloader
    read = getattr(loader, "dataset", None)
    if read is dataset:
        return isinstance(loader, DataLoaderDispatcher)
    return getattr(read, "dataset", None) is dataset


def open_dataset(
    path: str | Path,  # folder or s3://bucket/prefix of shards and their index.json, as `naign pack` makes it
    split: str = "train",
    *,
    batch: int = 256,  # images a batch over all ranks, shared by them as equally as can be
    seed: int = 0,  # of the order of shards, and of windows and mirroring
    rank: int | None = None,  # None: that of torch.distributed when an iteration begins, or 0 of 1
    world: int | None = None,
    **settings: Any,  # size, crop, flip, cache, workers, broken, ...: of the section `data` in docs/settings.md
) -> Batches:
    """A split as a torch IterableDataset of batches (images, labels, keys): images (n, C, H, W) float32 in [-1, 1].

    Each iteration yields this rank's batches of an epoch, or of the rest of the present one: every image once over all
    ranks, in an order that depends on the seed alone.

        dataset = open_dataset("s3://bucket/pictures", batch=256, size="64")
        dataset.load_state_dict(state)  # dataset.state_dict() of an earlier program, on any number of ranks
        for epoch in range(dataset.epoch, 10):
            for images, labels, keys in dataset: ...

    Threads read ahead: use the data set itself, or a DataLoader with batch_size=None and num_workers=0. Raises
    InputError, a ValueError, for wrong arguments, some when an iteration begins, and for data that is missing or
    damaged; Unavailable for a store that stays out of reach.
    """
    content = {"path": str(path), "split": split, **settings}
    config: DataConfig = build(DataConfig, content, "open_dataset", named={})
    return Batches(
        config,
        batch,
        seed,
        rank,
        world,
    )
