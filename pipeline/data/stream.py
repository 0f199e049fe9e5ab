"""From shards to tensors on one rank: the rounds of plan.py, read through WebDataset, one round ahead."""

import atexit
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from pipeline.data.manifest import Manifest, Shard, size_problem
from pipeline.data.plan import Piece, check, parts, pieces, rank_range
from pipeline.data.samples import Array, decode, read_samples
from pipeline.data.store import open_store
from pipeline.errors import InputError

BLOCK = 256
"""Rows that a worker hands over at once: few enough for a container's small /dev/shm, many enough to cost little."""

Row = tuple[Array, int, str, int]
"""Array, label, key, epoch."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Taken:
    """One rank's part of a round; row i is position i of that part, whatever the number of workers."""

    images: Tensor
    """(n, C, H, W) uint8 of images, (n, D) float32 of points."""
    labels: Tensor
    """(n,) int64, -1 where there is none."""
    keys: list[str]
    """n of them."""
    epochs: Tensor
    """(n,) int64: in which epoch each row was taken."""


def read_pieces(path: str, manifest: Manifest, shards: Sequence[Shard], wanted: Sequence[Piece]) -> Iterator[Row]:
    """The rows of the pieces in order. Samples before a piece are skipped undecoded, those after it not read.

    Raises InputError, naming shard and key, for a shard or sample that is damaged or not as the manifest says.
    """
    store = open_store(path)
    for piece in wanted:
        shard = shards[piece.shard]
        where = store.url(shard.name)
        if problem := size_problem(store, shard):
            raise InputError(problem)
        with closing(store.open(shard.name)) as stream:
            samples = read_samples(stream, where)
            found = piece.first
            for sample in islice(samples, piece.first, piece.last):
                array, label = decode(sample, manifest.kind, manifest.shape, len(manifest.labels), where)
                yield array, label, sample["__key__"], piece.epoch
                found += 1
            more = piece.last == shard.samples and next(samples, None) is not None
            if more or found < piece.last:
                raise InputError(
                    f"{where}: {'more than' if more else f'ends before sample {piece.last} of'} the {shard.samples} "
                    f"samples that index.json says: copy it again, or repack the data set"
                )


@dataclass(kw_only=True, slots=True, frozen=True)
class Block:
    """Consecutive rows of a rank's part of a round, from row `first` on; fields as in Taken."""

    first: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    epochs: Tensor


@dataclass(kw_only=True, slots=True, frozen=True)
class Share:
    """All that says which rows a rank reads; the same in the rank and in its workers."""

    path: str
    manifest: Manifest
    split: str
    seed: int
    round_size: int
    rank: int
    world: int

    @property
    def rows(self) -> int:
        """Of this rank, a round."""
        return self.round_size // self.world

    def read(self, round: int, first: int, last: int, count: int) -> Iterator[Block]:
        """Rows [first, last) of the rank's part of a round as `count` blocks, in one pass over the shards."""
        start, _ = rank_range(round, self.round_size, self.rank, self.world)
        shards = self.manifest.split(self.split).shards
        wanted = pieces([shard.samples for shard in shards], self.seed, start + first, start + last)
        rows = read_pieces(self.path, self.manifest, shards, wanted)
        for begin, end in parts(first, last, count):
            yield _block(begin, islice(rows, end - begin), end - begin, self.manifest)
        assert next(rows, None) is None  # asking for one more runs the checks at the end of the last shard


def _block(first: int, rows: Iterator[Row], count: int, manifest: Manifest) -> Block:
    images = np.empty((count, *manifest.shape), manifest.dtype)
    labels, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
    keys = []
    for row, (array, label, key, epoch) in enumerate(rows):
        images[row], labels[row], epochs[row] = array, label, epoch
        keys.append(key)
    assert len(keys) == count
    return Block(
        first=first,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        keys=keys,
        epochs=torch.from_numpy(epochs),
    )


class _Rounds(IterableDataset[Block | InputError]):
    """What a worker reads: its part of this rank's part of every round from `start` on, without end.

    Every worker gives the same number of blocks a round, so that the loader, which asks them in turn, gives all of a
    round's blocks before any of the next. An InputError is handed over as a value: raised, it would arrive wrapped in
    the text of a traceback.
    """

    def __init__(self, *, share: Share, start: int, workers: int) -> None:
        self.share, self.start, self.workers = share, start, workers
        self.blocks = max(1, -(-share.rows // (workers * BLOCK)))
        """A worker and round."""

    def __iter__(self) -> Iterator[Block | InputError]:
        info = get_worker_info()
        assert info is not None
        first, last = parts(0, self.share.rows, self.workers)[info.id]
        try:
            for round in count(self.start):
                yield from self.share.read(round, first, last, self.blocks)
        except InputError as error:
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


class Stream:
    """One rank's part of every round of a split. Use as a context manager, or close it."""

    def __init__(
        self,
        *,
        path: str,  # folder or s3://bucket/prefix with index.json
        split: str = "train",
        seed: int,  # of the order of the shards
        round_size: int,  # images a round, over all ranks
        rank: int = 0,
        world: int = 1,
        workers: int = 0,  # reading processes of this rank; 0 reads here
        prefetch: bool = True,  # read the next round while this one is used
        trace: Path | None = None,  # folder for `epoch round key` lines of every image taken, one file a rank
    ) -> None:
        """Raises InputError where the data set is missing or too coarsely sharded for so many readers."""
        self.manifest = Manifest.load(path)
        check(len(self.manifest.split(split).shards), world, workers, round_size, round_size)
        self._share = Share(
            path=path,
            manifest=self.manifest,
            split=split,
            seed=seed,
            round_size=round_size,
            rank=rank,
            world=world,
        )
        self._workers, self._prefetch = workers, prefetch
        self._trace = trace / f"rank-{rank:05d}.txt" if trace else None
        self._ahead: _Reading | None = None
        self._loaded: Iterator[Block | InputError] | None = None  # from the workers; stands before round _next
        self._next = 0
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would abort it

    def take(self, round: int) -> Taken:
        """This rank's part of a round: a function of the arguments of the Stream and `round` alone.

        Rounds may be taken in any order; only going up one by one is read ahead.
        Raises InputError, naming shard and key, for data that is damaged or not as its manifest says.
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
        if self._trace:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            with self._trace.open("a") as lines:
                lines.writelines(
                    f"{epoch} {round} {key}\n" for epoch, key in zip(taken.epochs.tolist(), taken.keys, strict=True)
                )
        return taken

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
        rows, manifest = self._share.rows, self.manifest
        images = torch.empty((rows, *manifest.shape), dtype=getattr(torch, manifest.dtype))
        labels, epochs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
        keys = [""] * rows
        with closing(self._blocks(round)) as blocks:
            for block in blocks:
                if stop.is_set():
                    return None
                here = slice(block.first, block.first + len(block.keys))
                images[here], labels[here], epochs[here], keys[here] = (
                    block.images,
                    block.labels,
                    block.epochs,
                    block.keys,
                )
        return Taken(images=images, labels=labels, keys=keys, epochs=epochs)

    def _blocks(self, round: int) -> Generator[Block]:
        """All blocks of a round, read here or by the workers."""
        if not self._workers:
            yield from self._share.read(round, 0, self._share.rows, -(-self._share.rows // BLOCK))
            return
        dataset = _Rounds(share=self._share, start=round, workers=self._workers)
        if self._next != round:
            self._loaded = None  # the old workers end before the new ones are forked, which would inherit their queues
        if self._loaded is None:
            loader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=self._workers,
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),  # else the loader draws its seed from torch's global state
            )
            self._loaded = iter(loader)
        loaded, self._loaded = self._loaded, None  # given back below, unless this round breaks off
        for _ in range(self._workers * dataset.blocks):
            block = next(loaded)
            if isinstance(block, InputError):
                del loaded  # ends the workers now; the traceback would keep them
                raise block
            yield block
        self._loaded, self._next = loaded, round + 1


def read_split(
    path: str,  # folder or s3://bucket/prefix with index.json
    split: str,
    *,
    limit: int | None = None,  # samples; None: all. As packing shuffles, the first ones are a random subset
    progress: bool = False,  # bar on stderr
) -> tuple[Tensor, Tensor]:
    """A whole split in the order of its shards: images (n, C, H, W) uint8 or points (n, D) float32, labels (n,) int64.

    Raises InputError as Stream does.
    """
    manifest = Manifest.load(path)
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
    rows = read_pieces(path, manifest, shards, wanted)
    bar = tqdm(rows, total=count, desc=f"read {split}", unit="sample", disable=not progress)
    block = _block(0, iter(bar), count, manifest)
    return block.images, block.labels
