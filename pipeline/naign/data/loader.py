"""The rounds of order.py as tensors on one rank, read and decoded one round ahead by threads.

Threads, not processes: decoders, hashes and sockets release the interpreter's lock, the pixels are written where they
are wanted, and nothing is forked in a process that already runs gloo, CUDA or boto3.
"""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from naign.data.dataset import DataConfig, check_config
from naign.data.decode import Array
from naign.data.format.manifest import size_problem
from naign.data.mixing import DataSets, Stored, shares
from naign.data.order import LANES, Order, Piece, check, parts, pieces, rank_rows
from naign.data.reader import Raw, Reader
from naign.data.sample import Draws, draws
from naign.errors import InputError, Stopped
from naign.storage.prefetch import in_background, in_order
from naign.storage.retry import Tally
from naign.storage.store import was_there

log = logging.getLogger("naign.data")

PATIENCE = 5.0  # seconds to wait for the reading of a round that is no longer wanted
BROKEN = 0.01  # largest share of samples that data.broken=skip passes over


@dataclass(kw_only=True, slots=True, frozen=True)
class Rows:
    """One rank's part of a round; row i is position i of that part, whatever the number of workers."""

    images: Tensor  # (n, C, H, W) uint8 of images, in memory as (n, H, W, C); (n, D) float32 of points
    labels: Tensor  # (n,) int64, -1 where there is none
    keys: list[str]  # n of them
    epochs: Tensor  # (n,) int64: in which epoch each row was taken
    tally: Tally = field(default_factory=Tally)  # what reading them has cost
    broken: list[str] = field(default_factory=list)  # the problem of each sample that another one stands in for


class _Part(NamedTuple):
    """Rows [first, last) of every round, read in one pass by one thread."""

    first: int
    last: int
    readers: list[Reader]
    stored: Stored  # of all rounds to come: what lies behind a round is fetched before it is asked for


class _Reading(NamedTuple):
    """A round being read in the background."""

    round: int
    stop: threading.Event
    rows: Future[Rows]

    def abandon(self) -> None:
        """Stop soon, and wait for that: in vain while a store does not answer."""
        self.stop.set()
        wait([self.rows], PATIENCE)


class Stream(AbstractContextManager["Stream"]):
    """One rank's part of every round of a split. Use as a context manager, or close it."""

    def __init__(
        self, config: DataConfig, *, seed: int, round_size: int, rank: int = 0, world: int = 1, prefetch: bool = True
    ) -> None:
        """`seed` is of the order of shards, and of windows and mirroring; a round has `round_size` images over all
        ranks; with `prefetch` the next one is read while one is used. InputError where the data set is missing, or a
        round cannot be shared equally by the ranks.
        """
        check_config(config)
        self.sets = DataSets(config)
        self.manifest, self.shape = self.sets.manifest, self.sets.shape  # shape: of one row
        self.order = self.sets.plan(seed, round_size)
        check(round_size, world)
        self._config, self._seed, self._prefetch = config, seed, prefetch
        self._first, last = rank_rows(round_size, rank, world)
        self._count, self._world = last - self._first, world  # rows of this rank, a round
        self._trace = Path(config.trace) / f"rank-{rank:05d}.txt" if config.trace else None
        try:
            if self._trace:
                self._trace.parent.mkdir(parents=True, exist_ok=True)
                self._trace.open("a").close()
        except (OSError, ValueError) as error:
            raise InputError(f"data.trace {config.trace!r} cannot be written: {error}") from None
        self._broken = self._rows = 0  # so far
        self.rows_read = 0  # so far, over all rounds; it grows while `take` waits for a round that is arriving
        self._unused: list[Array] = []  # memory of rounds
        self._ahead: _Reading | None = None
        self._parts: list[_Part] = []  # one a worker; they stand before round _next
        self._next = 0
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would abort it

    def take(self, round: int, cancelled: Callable[[], bool] = lambda: False) -> Rows:
        """This rank's part of a round: a function of the arguments of the Stream and `round` alone. Rounds may be asked
        for in any order, but are read ahead one after the other.

        Raises InputError, naming shard and key, for data that is damaged or not as its manifest says; Unavailable for a
        store that stays out of reach; Gone where data that existed before are missing; Stopped if `cancelled`, asked a
        few times a second, turns true.
        """
        ahead, self._ahead = self._ahead, None
        if ahead and ahead.round != round:
            ahead.abandon()
            ahead = None
        ahead = ahead or self._begin(round)
        while not wait([ahead.rows], 0.2).done:
            if cancelled():
                ahead.abandon()
                raise Stopped
        with was_there(*self.sets.indexes):
            rows = ahead.rows.result()
        if self._prefetch:
            self._ahead = self._begin(round + 1)
        self._broken += len(rows.broken)
        self._rows += len(rows.keys)
        allow(rows.broken, self._broken, self._rows, self.order.total // self._world)
        if self._trace:
            with self._trace.open("a", errors="surrogateescape") as lines:
                listed = zip(rows.epochs.tolist(), rows.keys, strict=True)
                lines.writelines(f"{epoch} {round} {key}\n" for epoch, key in listed)
        return rows

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead:
            self._ahead.abandon()
        self._ahead = None
        self._close_parts()
        atexit.unregister(self.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_parts(self) -> None:
        while self._parts:
            self._parts.pop().stored.close()

    def _begin(self, round: int) -> _Reading:
        stop = threading.Event()
        return _Reading(round, stop, in_background(partial(self._read, round, stop), f"read round {round}"))

    def _read(self, round: int, stop: threading.Event) -> Rows:
        if self._next != round:
            self._close_parts()
        if not self._parts:
            self._parts = [
                _Part(first, last, *self.order.open(self.sets, round, first, last))
                for first, last in parts(self._first, self._first + self._count, max(1, self._config.workers))
            ]
        reads, self._parts = self._parts, []  # given back below, unless this round breaks off
        rows = new_rows(self._memory())
        calls = [partial(self._read_part, part, round, rows, stop) for part in reads]
        try:
            rows.broken.extend(chain.from_iterable(in_order(calls, len(calls))))
        except BaseException:
            stop.set()  # the other parts
            raise
        self._parts, self._next = reads, round + 1
        return rows

    def _read_part(self, part: _Part, round: int, rows: Rows, stop: threading.Event) -> list[str]:
        """Fill a part's rows of the next round; the problems of broken samples. A part that fails is of no more use."""
        drawn = draws(self._seed, round, part.first, part.last, windows=self._config.fit == "random")
        try:
            stored = self._counted(islice(part.stored, part.last - part.first), stop)
            broken = fill(rows, part.first - self._first, stored, drawn, flip=self._config.flip)
        except BaseException:
            part.stored.close()
            raise
        for reader in part.readers:
            rows.tally.merge(reader.store.tally.take())
        return broken

    def _counted(self, stored: Iterable[tuple[Reader, Raw]], stop: threading.Event) -> Iterator[tuple[Reader, Raw]]:
        for one in stored:
            if stop.is_set():
                raise Stopped
            yield one
            self.rows_read += 1

    def _memory(self) -> Array:
        """Memory for a round's images: that of an earlier round if nothing refers to it any more, else new, whose first
        touch costs page faults and zeroing, for images of 256 x 256 a fifth of the decoding.
        """
        memory = self._unused.pop() if self._unused else new_images(self.shape, self.manifest.dtype, self._count)
        lent = memory.view()  # which the round's tensor holds, and all that are made of it
        weakref.finalize(lent, self._unused.append, memory).atexit = False
        return lent


def new_images(shape: tuple[int, ...], dtype: str, rows: int) -> Array:
    """Memory for images (rows, C, H, W), in which the channels of a pixel lie together, or points (rows, D). NumPy's,
    not torch's: it asks for huge pages, without which touching new memory takes a tenth of the decoding.
    """
    if len(shape) != 3:
        return np.empty((rows, *shape), dtype)
    channels, height, width = shape
    return np.empty((rows, height, width, channels), dtype).transpose(0, 3, 1, 2)


def new_rows(images: Array) -> Rows:
    """Rows to be filled."""
    labels, epochs = (torch.empty(len(images), dtype=torch.int64) for _ in range(2))
    return Rows(images=torch.from_numpy(images), labels=labels, epochs=epochs, keys=[""] * len(images))


def fill(
    rows: Rows, begin: int, stored: Iterable[tuple[Reader, Raw]], draws: Draws | None = None, *, flip: bool = False
) -> list[str]:
    """Decode samples into rows from `begin` on; the problems of broken ones. Row by row, `draws` say which windows are
    taken, and with `flip` which images are mirrored; None: the central windows.
    """
    images, labels, epochs = rows.images.numpy(), rows.labels.numpy(), rows.epochs.numpy()
    broken = []
    for row, (reader, raw) in enumerate(stored, begin):
        place, drawn = images[row], None if draws is None else draws[row - begin]
        sample = reader.row(raw, place, drawn)
        if sample.array is not place:
            place[...] = sample.array
        if flip and drawn is not None and place.ndim == 3 and drawn[2] < 0.5:
            place[...] = place[..., ::-1]
        labels[row], epochs[row], rows.keys[row] = sample.label, sample.epoch, sample.key
        if sample.broken:
            broken.append(sample.broken)
    return broken


def allow(problems: list[str], broken: int, rows: int, epoch: int) -> None:
    """Log the problems of samples. InputError if `broken`, all so far, are more than BROKEN of `rows` so far or of
    an epoch, whichever is more. One an epoch is always allowed.
    """
    for problem in problems:
        log.warning("skipped: %s", problem)
    most = max(int(BROKEN * max(rows, epoch)), -(-rows // max(epoch, 1)))
    if problems and broken > most:
        allowed = f"data.broken=skip allows, {BROKEN:.0%} ({most}): repack the data set"
        raise InputError(f"{broken} broken samples of {rows} are more than {allowed}; the last: {problems[-1]}")


def read_split(data: DataConfig | str, split: str, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """A split, or a random subset of `limit` samples, in the order of its shards: images (n, C, H, W) uint8, resized
    without chance, or points (n, D) float32; labels (n,) int64. `data` may be a path. Raises InputError as Stream does.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    sets = DataSets(config)
    total = sets.manifest.split(split).samples
    count = total if limit is None else min(limit, total)
    chosen = [(sets.reader(place, split), cut) for place, cut in enumerate(_some(sets, split, count)) if cut]
    for reader, cut in chosen:
        for number in sorted({piece.shard for piece in cut}):
            if problem := size_problem(reader.store, reader.shards[number]):
                raise InputError(problem)  # before memory is allocated for samples that are not there
    with closing((reader, raw) for reader, cut in chosen for raw in reader.raw(cut)) as samples:
        rows = new_rows(new_images(sets.shape, sets.manifest.dtype, count))
        broken = fill(rows, 0, samples)
    allow(broken, len(broken), count, total)
    return rows.images.contiguous(), rows.labels


def _some(sets: DataSets, split: str, count: int) -> list[list[Piece]]:
    """Samples of each data set in proportion to its size: the first ones where `naign pack` dealt them, else blocks."""
    there = [manifest.splits[split].samples if split in manifest.splits else 0 for manifest in sets.manifests]
    chosen = list[list[Piece]]()
    for manifest, wanted in zip(sets.manifests, shares(there, count), strict=True):
        sizes = manifest.splits[split].sizes if wanted else ()
        if manifest.dealt or wanted == sum(sizes):
            starts = accumulate(sizes, initial=0)
            lasts = [min(size, wanted - start) for size, start in zip(sizes, starts, strict=False)]
            cut = [Piece(epoch=0, shard=number, first=0, last=last) for number, last in enumerate(lasts) if last > 0]
        else:
            cut = pieces(Order(sizes=sizes, seed=0, round_size=wanted, lanes=LANES), 0, 0, wanted)
        chosen.append(cut)
    return chosen
