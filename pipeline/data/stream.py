"""From shards to tensors on one rank: the rounds of plan.py, read and decoded one round ahead."""

import atexit
import logging
import math
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from pipeline.data import augment
from pipeline.data.dataset import DataConfig, check_config, image_shape, open_reader
from pipeline.data.fetch import Tally
from pipeline.data.manifest import Manifest, size_problem
from pipeline.data.plan import Order, Piece, check, parts, pieces, rank_rows
from pipeline.data.reader import Reader, Row
from pipeline.data.samples import Array
from pipeline.data.store import gopen, open_store
from pipeline.errors import InputError, Unavailable

webdataset.gopen_schemes["s3"] = gopen  # so that any WebDataset program reads s3:// as training does, without pipes

log = logging.getLogger("naign.data")

BLOCK = 256
"""The most rows that are handed over at once."""

BLOCK_BYTES = 4 << 20
"""The most bytes of them, unless one row is more: few enough for a container's small /dev/shm."""

SLOTS = 3
"""Blocks of shared memory a worker: the two that a loader lets it be ahead, and the one that is being copied."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Taken:
    """One rank's part of a round; row i is position i of that part, whatever the number of workers."""

    images: Tensor
    """(n, C, H, W) uint8 of images, in memory as (n, H, W, C); (n, D) float32 of points."""
    labels: Tensor
    """(n,) int64, -1 where there is none."""
    keys: list[str]
    """n of them."""
    epochs: Tensor
    """(n,) int64: in which epoch each row was taken."""
    tally: Tally
    """What reading them has cost."""
    broken: list[str]
    """What was wrong with each sample in whose place another one is."""


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

    def reader(self) -> Reader:
        """To be made once in each process."""
        return open_reader(self.config, self.manifest)

    def read(
        self, reader: Reader, round: int, first: int, last: int, count: int, memory: Callable[[int, int], Array]
    ) -> Iterator[Block]:
        """Rows [first, last) of the rank's part of a round as `count` blocks, in one pass over the shards.

        The images of rows [begin, end) are written to `memory(begin, end)`.
        """
        start, _ = rank_rows(self.order.round_size, self.rank, self.world)
        rows = reader.rows(pieces(self.order, round, start + first, start + last))
        for begin, end in parts(first, last, count):
            draws = augment.draws(self.order.seed, round, start + begin, start + end)
            block = _block(begin, islice(rows, end - begin), memory(begin, end), self.config, draws)
            block.tally.merge(reader.store.tally.take())
            yield block
        assert next(rows, None) is None


def new_images(config: DataConfig, manifest: Manifest, count: int) -> Array:
    """Memory for images (count, C, H, W), in which the channels of a pixel lie together; for points (count, D).

    NumPy's, not torch's: it asks for huge pages, without which touching new memory takes a tenth of the decoding.
    """
    shape = image_shape(config, manifest)
    if len(shape) != 3:
        return np.empty((count, *shape), manifest.dtype)
    channels, height, width = shape
    return np.empty((count, height, width, channels), manifest.dtype).transpose(0, 3, 1, 2)


def _block(
    first: int,
    rows: Iterator[Row],
    images: Array,  # (n, *shape): to be filled
    config: DataConfig,
    draws: augment.Draws,
) -> Block:
    count = len(images)
    labels, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
    keys, broken = [], []
    for number, row in enumerate(rows):
        array = augment.crop(row.array, config.crop, draws[number]) if config.crop else row.array
        images[number], labels[number], epochs[number] = array, row.label, row.epoch
        keys.append(row.key)
        if row.broken:
            broken.append(row.broken)
    assert len(keys) == count
    if config.flip and images.ndim == 4:
        augment.flip(images, draws)
    return Block(
        first=first,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        keys=keys,
        epochs=torch.from_numpy(epochs),
        broken=broken,
    )


class _Rounds(IterableDataset[Block | InputError | Unavailable]):
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

    def images(self, worker: int, slot: int, count: int) -> Array:
        """Shared memory for `count` images, as new_images has it."""
        rows: Array = self.rings[worker][slot].numpy()[:count]
        return rows.transpose(0, 3, 1, 2) if rows.ndim == 4 else rows

    def __iter__(self) -> Iterator[Block | InputError | Unavailable]:
        info = get_worker_info()
        assert info is not None
        worker, slot = info.id, 0
        first, last = parts(0, self.share.rows, self.workers)[worker]

        def memory(begin: int, end: int) -> Array:
            return self.images(worker, slot, end - begin)

        try:
            reader = self.share.reader()
            for round in count(self.start):
                for block in self.share.read(reader, round, first, last, self.blocks, memory):
                    yield replace(block, images=torch.empty(0), slot=slot)
                    slot = (slot + 1) % SLOTS
        except (InputError, Unavailable) as error:
            yield error


def _quiet_worker(_: int) -> None:
    """Ctrl-C reaches the workers too: they leave it to their parent, which ends them. (torch sees to SIGTERM.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Reading(threading.Thread):
    """A round being read in the background. Daemon, so that an interpreter that leaves gets as far as `close`."""

    def __init__(self, round: int, read: Callable[[int, threading.Event], Taken | None]) -> None:
        super().__init__(name=f"read round {round}", daemon=True)
        self.round = round
        self.stop = threading.Event()
        self._read = read
        self._taken: Taken | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._taken = self._read(self.round, self.stop)
        except BaseException as error:  # re-raised by `result` in the thread that asks
            self._error = error

    def result(self) -> Taken:
        """The round, once it is read. Raises what reading it raised."""
        self.join()
        if self._error:
            raise self._error
        assert self._taken is not None
        return self._taken

    def abandon(self) -> None:
        """Stop soon, and wait for that."""
        self.stop.set()
        self.join()


def _open_trace(folder: str, rank: int) -> Path:
    """The file of this rank. Raises InputError where it cannot be written."""
    try:
        file = Path(folder) / f"rank-{rank:05d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except (OSError, ValueError) as error:
        raise InputError(f"data.trace {folder!r} cannot be written: {error}") from None
    return file


class Stream:
    """One rank's part of every round of a split. Use as a context manager, or close it."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,  # of the order of the shards, and of windows and mirroring
        round_size: int,  # images a round, over all ranks
        rank: int = 0,
        world: int = 1,
        prefetch: bool = True,  # read the next round while this one is used
    ) -> None:
        """Raises InputError where the data set is missing, or a round cannot be shared equally by the ranks."""
        check_config(config)
        self.manifest = Manifest.load(config.path)
        self.shape = image_shape(config, self.manifest)
        """Of one row."""
        sizes = tuple(shard.samples for shard in self.manifest.split(config.split).shards)
        self.order = Order(sizes=sizes, seed=seed, round_size=round_size, tail=config.tail, resampled=config.resampled)
        check(self.order, world)
        self._share = Share(config=config, manifest=self.manifest, order=self.order, rank=rank, world=world)
        self._workers, self._prefetch = config.workers, prefetch
        self._reader: Reader | None = None
        self._trace = _open_trace(config.trace, rank) if config.trace else None
        self._broken = self._rows = 0  # taken so far
        self._unused: list[Array] = []  # memory of rounds
        self._ahead: _Reading | None = None
        self._loaded: Iterator[Block | InputError | Unavailable] | None = (
            None  # from the workers; stands before round _next
        )
        self._dataset: _Rounds  # of these workers
        self._next = 0
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would abort it

    def take(self, round: int) -> Taken:
        """This rank's part of a round: a function of the arguments of the Stream and `round` alone.

        Rounds may be taken in any order; only going up one by one is read ahead.
        Raises InputError, naming shard and key, for data that is damaged or not as its manifest says; Unavailable for a
        store that stays out of reach.
        """
        ahead, self._ahead = self._ahead, None
        if ahead and ahead.round != round:
            ahead.abandon()
            ahead = None
        taken = ahead.result() if ahead else self._read(round, threading.Event())
        assert taken is not None
        if self._prefetch:
            self._ahead = _Reading(round + 1, self._read)
            self._ahead.start()
        self._allow(taken)
        if self._trace:
            with self._trace.open("a", errors="surrogateescape") as lines:
                lines.writelines(
                    f"{epoch} {round} {key}\n" for epoch, key in zip(taken.epochs.tolist(), taken.keys, strict=True)
                )
        return taken

    def _allow(self, taken: Taken) -> None:
        """Log what is broken; InputError if it is more than the share of this rank's images, at least an epoch's."""
        for problem in taken.broken:
            log.warning("skipped: %s", problem)
        self._broken += len(taken.broken)
        self._rows += len(taken.keys)
        most = int(self._share.config.broken_share * max(self._rows, self.order.total // self._share.world))
        if self._broken > most:
            raise InputError(
                f"{self._broken} broken samples of {self._rows} are more than data.broken_share="
                f"{self._share.config.broken_share} allows ({most}); the last: {taken.broken[-1]}"
            )

    def close(self) -> None:
        """Stop reading ahead and end the workers."""
        if self._ahead:
            self._ahead.abandon()
        self._ahead = self._loaded = None
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, round: int, stop: threading.Event) -> Taken | None:
        """The round, or None if stopped on the way."""
        rows = self._share.rows
        images = self._memory()
        labels, epochs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
        keys, tally, broken = [""] * rows, Tally(), list[str]()
        with closing(self._blocks(round, images)) as blocks:
            for block in blocks:
                if stop.is_set():
                    return None
                here = slice(block.first, block.first + len(block.keys))
                if self._workers:
                    images[here] = block.images.numpy()
                labels[here], epochs[here] = block.labels, block.epochs
                keys[here] = block.keys
                tally.merge(block.tally)
                broken += block.broken
        whole = torch.from_numpy(images)
        return Taken(images=whole, labels=labels, keys=keys, epochs=epochs, tally=tally, broken=broken)

    def _memory(self) -> Array:
        """For a round's images: that of an earlier round which nobody uses any more, or new.

        Memory that a process has not touched yet costs it page faults and zeroing, for pictures of 256 x 256 a fifth of
        the time of decoding them.
        """
        memory = self._unused.pop() if self._unused else new_images(self._share.config, self.manifest, self._share.rows)
        lent = memory.view()  # which the round's tensor holds, and all that are made of it
        weakref.finalize(lent, self._unused.append, memory).atexit = False
        return lent

    def _blocks(self, round: int, images: Array) -> Generator[Block]:
        """All blocks of a round: read here, into `images`, or by the workers."""
        if not self._workers:
            self._reader = self._reader or self._share.reader()
            rows, share = self._share.rows, self._share
            yield from share.read(self._reader, round, 0, rows, share.blocks(1), lambda begin, end: images[begin:end])
            return
        if self._next != round:
            self._loaded = None  # the old workers end before the new ones are forked, which would inherit their queues
        if self._loaded is None:
            dataset = self._dataset = _Rounds(share=self._share, start=round, workers=self._workers)
            loader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=self._workers,
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),  # else the loader draws its seed from torch's global state
            )
            self._loaded = iter(loader)
        loaded, self._loaded = self._loaded, None  # given back below, unless this round breaks off
        for number in range(self._workers * self._dataset.blocks):
            try:
                block = next(loaded)
            except RuntimeError as error:  # so the loader says that a worker is gone
                del loaded
                raise Unavailable(f"a reading process was killed, perhaps for want of memory ({error})") from None
            if not isinstance(block, Block):
                del loaded  # ends the workers now; the traceback would keep them
                raise block
            # To be copied before the next one is asked for, which lets the worker go on to the slot before this one.
            shared = self._dataset.images(number % self._workers, block.slot, len(block.keys))
            yield replace(block, images=torch.from_numpy(shared))
        self._loaded, self._next = loaded, round + 1


def read_split(
    path: str,  # folder or s3://bucket/prefix with index.json
    split: str,
    *,
    limit: int | None = None,  # samples; None: all. As packing shuffles, the first ones are a random subset
    crop: int = 0,  # the central window of so many pixels a side; 0: whole images
    progress: bool = False,  # bar on stderr
) -> tuple[Tensor, Tensor]:
    """A whole split in the order of its shards: images (n, C, H, W) uint8 or points (n, D) float32, labels (n,) int64.

    Raises InputError as Stream does.
    """
    manifest = Manifest.load(path)
    config = DataConfig(path=path, split=split, crop=crop)
    total = manifest.split(split).samples
    count = total if limit is None else min(limit, total)
    shards = manifest.split(split).shards
    wanted, left = [], count
    for number, shard in enumerate(shards):
        if left > 0:
            wanted.append(Piece(epoch=0, shard=number, first=0, last=min(left, shard.samples)))
        left -= shard.samples
    store = open_store(path)
    if problem := next(filter(None, (size_problem(store, shards[piece.shard]) for piece in wanted)), ""):
        raise InputError(problem)  # before memory is taken for samples that are not there
    rows = Reader(store, manifest, shards).rows(wanted)
    bar = tqdm(rows, total=count, desc=f"read {split}", unit="sample", disable=not progress)
    block = _block(0, iter(bar), new_images(config, manifest, count), config, augment.central(count))
    return block.images.contiguous(), block.labels
