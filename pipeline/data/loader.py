"""From shards to tensors on one rank: the rounds of plan.py, read and decoded one round ahead."""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pipeline.data import decode
from pipeline.data.dataset import DataConfig, check_config, image_shape
from pipeline.data.decode import Array
from pipeline.data.format.manifest import Manifest, size_problem
from pipeline.data.order import Order, Piece, check
from pipeline.data.reader import Reader
from pipeline.data.share import Block, Rounds, Share, fill, new_images, quiet_worker
from pipeline.errors import InputError, Stopped, Unavailable
from pipeline.storage.fetch import Tally
from pipeline.storage.store import gopen, open_store

webdataset.gopen_schemes["s3"] = gopen  # so that any WebDataset program reads s3:// as training does, without pipes

log = logging.getLogger("naign.data")


PATIENCE = 5.0
"""Seconds that a round which nobody wants any more is waited for."""


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

    def result(self, cancelled: Callable[[], bool]) -> Taken:
        """The round, once it is read. Raises what reading it raised; Stopped where `cancelled` turns true before."""
        while self.is_alive():
            self.join(0.2)
            if self.is_alive() and cancelled():
                self.abandon()
                raise Stopped
        if self._error:
            raise self._error
        assert self._taken is not None
        return self._taken

    def abandon(self) -> None:
        """Stop soon, and wait for that: in vain where a store does not answer."""
        self.stop.set()
        self.join(PATIENCE)


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
        self._trace = _open_trace(config.trace, rank) if config.trace else None
        self._broken = self._rows = 0  # taken so far
        self.rows_read = 0
        """Rows read so far, over all rounds. It grows while `take` waits for a round that is arriving."""
        self._unused: list[Array] = []  # memory of rounds
        self._ahead: _Reading | None = None
        self._loaded: Iterator[Block | InputError | Unavailable] | None = None  # stands before round _next
        self._dataset: Rounds  # of the workers
        self._images: Array  # of the round that is being read
        self._next = 0
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would abort it

    def take(self, round: int, cancelled: Callable[[], bool] = lambda: False) -> Taken:
        """This rank's part of a round: a function of the arguments of the Stream and `round` alone.

        Rounds may be taken in any order; only going up one by one is read ahead.
        Raises InputError, naming shard and key, for data that is damaged or not as its manifest says; Unavailable for a
        store that stays out of reach; Stopped where `cancelled`, looked at a few times a second, turns true.
        """
        ahead, self._ahead = self._ahead, None
        if ahead and ahead.round != round:
            ahead.abandon()
            ahead = None
        if ahead is None:
            ahead = _Reading(round, self._read)
            ahead.start()
        taken = ahead.result(cancelled)
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
        self._ahead = None
        self._forget()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, round: int, stop: threading.Event) -> Taken | None:
        """The round, or None if stopped on the way."""
        rows = self._share.rows
        images = self._images = self._memory()
        labels, epochs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
        keys, tally, broken = [""] * rows, Tally(), list[str]()
        with closing(self._blocks(round)) as blocks:
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
                self.rows_read += len(block.keys)
        del self._images
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

    def _blocks(self, round: int) -> Generator[Block]:
        """All blocks of a round: read here, into `_images`, or by the workers."""
        if self._next != round:
            self._forget()  # the old workers end before the new ones are forked, which would inherit their queues
        if self._loaded is None:
            self._loaded = self._load(round) if self._workers else self._read_here(round)
        loaded, self._loaded = self._loaded, None  # given back below, unless this round breaks off
        for number in range(self._share.blocks(max(1, self._workers)) * max(1, self._workers)):
            try:
                block = next(loaded)
            except RuntimeError as error:  # so the loader says that a worker is gone
                del loaded
                raise Unavailable(f"a reading process was killed, perhaps for want of memory ({error})") from None
            if not isinstance(block, Block):
                del loaded  # ends the workers now; the traceback would keep them
                raise block
            if self._workers:
                # To be copied before the next one is asked for: that lets the worker go on to the slot before this one.
                shared = self._dataset.images(number % self._workers, block.slot, len(block.keys))
                block = replace(block, images=torch.from_numpy(shared))
            yield block
        self._loaded, self._next = loaded, round + 1

    def _forget(self) -> None:
        """End what reads the rounds one after the other: its workers, or its threads."""
        loaded, self._loaded = self._loaded, None
        if isinstance(loaded, Generator):
            loaded.close()

    def _read_here(self, round: int) -> Iterator[Block]:
        share = self._share
        return share.read(round, 0, share.rows, share.blocks(1), lambda begin, end: self._images[begin:end])

    def _load(self, round: int) -> Iterator[Block | InputError | Unavailable]:
        self._dataset = Rounds(share=self._share, start=round, workers=self._workers)
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # else the loader draws its seed from torch's global state
        )
        return iter(loader)


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
    reader = Reader(store, manifest, shards)
    with closing(reader.raw(wanted)) as stored:
        bar = tqdm(stored, total=count, desc=f"read {split}", unit="sample", disable=not progress)
        block = fill(0, reader, iter(bar), new_images(config, manifest, count), config, decode.central(count))
    return block.images.contiguous(), block.labels
