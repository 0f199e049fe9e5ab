"""The rounds of order.py as tensors on one rank, read and decoded one round ahead by threads.

Threads, not processes: decoders, hashes and sockets release the interpreter's lock, the pixels are written where they
are wanted, and nothing is forked in a process that already runs gloo, CUDA or boto3.
"""

import atexit
import logging
import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from naign.data.dataset import DataConfig, check_config
from naign.data.decode import Array
from naign.data.format.manifest import check_size
from naign.data.order import LANES, Order, Span, leading, pieces, rank_rows
from naign.data.reader import DataSet, Raw, Reader
from naign.data.sample import Numbers, row_numbers
from naign.errors import InputError, Stopped
from naign.storage.prefetch import in_background, in_order
from naign.storage.retry import Tally
from naign.storage.store import was_there

log = logging.getLogger("naign.data")

PATIENCE = 5.0  # seconds to wait for the reading of rows that are no longer wanted
TASK = 32  # rows that a thread decodes at once, at most
BROKEN = 0.01  # largest share of samples that data.broken=skip passes over

Stored = Generator[Raw]
Spans = Callable[[], Iterator[Span]]


@dataclass(kw_only=True, slots=True, frozen=True)
class Rows:
    """One rank's part of a round; row i is position i of that part, whatever the number of workers."""

    images: Tensor  # (n, C, H, W) uint8 of images, in memory as (n, H, W, C); (n, D) float32 of points
    labels: Tensor  # (n,) int64, -1 where there is none
    keys: list[str]  # n of them
    epochs: Tensor  # (n,) int64: in which epoch each row was taken
    tally: Tally = field(default_factory=Tally)  # what reading them has cost
    broken: list[str] = field(default_factory=list)  # the problem of each sample that another one replaces

    def fill(
        self,
        begin: int,
        reader: Reader,
        stored: Iterable[Raw],
        numbers: Numbers | None = None,  # random ones for each row (sample.row_numbers); None: central windows
        *,
        flip: bool = False,  # mirror half of the images
    ) -> None:
        """Decode samples into rows from `begin` on."""
        images = self.images.numpy()
        labels = self.labels.numpy()
        epochs = self.epochs.numpy()
        for row, raw in enumerate(stored, begin):
            drawn = None if numbers is None else numbers[row]
            sample = reader.row(raw, drawn)
            array = sample.array
            if flip and drawn is not None and array.ndim == 3 and drawn[2] < 0.5:
                array = array[..., ::-1]
            images[row] = array
            labels[row] = sample.label
            epochs[row] = sample.epoch
            self.keys[row] = sample.key
            if sample.broken:
                self.broken.append(sample.broken)


def new_images(dataset: DataSet, rows: int) -> Array:
    """Memory for images (rows, C, H, W), in which the channels of a pixel lie together, or points (rows, D). NumPy's,
    not torch's: it asks for huge pages, without which touching new memory takes a tenth of the decoding.
    """
    dtype = dataset.manifest.dtype
    if len(dataset.shape) != 3:
        return np.empty((rows, *dataset.shape), dtype)
    channels, height, width = dataset.shape
    return np.empty((rows, height, width, channels), dtype).transpose(0, 3, 1, 2)


def new_rows(images: Array) -> Rows:
    """Rows to be filled."""
    count = len(images)
    return Rows(
        images=torch.from_numpy(images),
        labels=torch.empty(count, dtype=torch.int64),
        keys=[""] * count,
        epochs=torch.empty(count, dtype=torch.int64),
    )


def check_broken(
    problems: list[str],
    broken: int,
    rows: int,
    epoch: int,
) -> None:
    """Log the problems of samples. InputError if `broken`, all so far, are more than BROKEN of `rows` so far or of
    an epoch, whichever is more. One an epoch is always allowed.
    """
    for problem in problems:
        log.warning("skipped: %s", problem)
    epochs = math.ceil(rows / max(epoch, 1))
    most = max(epochs, int(BROKEN * max(rows, epoch)))
    if problems and broken > most:
        allowed = f"data.broken=skip allows, {BROKEN:.0%} ({most}): repack the data set"
        raise InputError(f"{broken} broken samples of {rows} are more than {allowed}; the last: {problems[-1]}")


class ReadAhead:
    """Rows of one span after another: while one is used, threads read and decode the next.

    Samples are fetched in one pass over all spans, so what lies behind a span is asked for before its turn.
    """

    def __init__(
        self,
        dataset: DataSet,
        order: Order,
        world: int,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._epoch = order.total // world  # rows of this rank in an epoch
        self._reader = dataset.reader(dataset.config.split)
        self._stored: Stored | None = None  # the samples of all spans to come
        self._next: Future[Rows] | None = None
        self._unused: list[Array] = []  # memory of rows
        self._taken = 0  # rows so far
        self._broken = 0
        self.rows_read = 0  # so far; it grows while `take` waits for rows that are arriving

    def start(self, spans: Spans) -> None:
        """Read these spans from now on."""
        self.close()
        self._stop = threading.Event()
        self._spans = spans()
        wanted = chain.from_iterable(pieces(self._order, *span) for span in spans())
        self._stored = self._reader.raw(wanted)
        atexit.register(self.close)  # a thread inside torch while the interpreter goes down would abort it

    def take(self, cancelled: Callable[[], bool] = lambda: False) -> Rows:
        """The rows of the next span. Raises Stopped if `cancelled`, asked a few times a second, turns true. After an
        error, start again.
        """
        self._begin()
        reading = self._next
        assert reading, "all spans have been taken"
        try:
            while not wait([reading], 0.2).done:
                if cancelled():
                    raise Stopped
            rows = reading.result()
        except BaseException:
            self.close()
            raise
        self._next = None
        self._begin()
        self._taken += len(rows.keys)
        self._broken += len(rows.broken)
        check_broken(rows.broken, self._broken, self._taken, self._epoch)
        return rows

    def close(self) -> None:
        """Stop reading, and wait for that: in vain while a store does not answer."""
        if self._next:
            self._stop.set()
            wait([self._next], PATIENCE)
            self._next = None
        if self._stored:
            with suppress(ValueError):  # its thread still waits for a store, and ends it afterwards
                self._stored.close()
            self._stored = None
        atexit.unregister(self.close)

    def _begin(self) -> None:
        """Read the next span, unless it is being read."""
        if self._next or not self._stored:
            return
        span = next(self._spans, None)
        if span:
            read = partial(self._read, span, self._stored, self._stop)
            self._next = in_background(read, f"read round {span[0]}")

    def _read(
        self,
        span: Span,
        stored: Stored,
        stop: threading.Event,
    ) -> Rows:
        round, first, last = span
        count = last - first
        workers = max(1, self._dataset.config.workers)
        step = max(1, min(TASK, count // workers))
        rows = new_rows(self._memory(count))
        numbers = row_numbers(self._order.seed, round, first, last)

        def fills() -> Iterator[Callable[[], None]]:
            for begin in range(0, count, step):
                if stop.is_set():
                    raise Stopped
                size = min(step, count - begin)
                self.rows_read += size
                samples = list(islice(stored, size))
                yield partial(
                    rows.fill,
                    begin,
                    self._reader,
                    samples,
                    numbers,
                    flip=self._dataset.config.flip,
                )

        for _ in in_order(fills(), workers):
            pass
        rows.tally.merge(self._reader.store.tally.take())
        return rows

    def _memory(self, count: int) -> Array:
        """Memory for images: that of earlier rows if nothing refers to it any more, else new, whose first touch costs
        page faults and zeroing, for images of 256 x 256 a fifth of the decoding.
        """
        memory = self._unused.pop() if self._unused else None
        if memory is None or len(memory) < count:
            memory = new_images(self._dataset, count)
        lent = memory[:count]  # which the rows' tensor holds, and all that are made of it
        weakref.finalize(lent, self._unused.append, memory).atexit = False
        return lent


class Stream(AbstractContextManager["Stream"]):
    """One rank's part of every round of a split. Use as a context manager, or close it."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,  # of the order of shards, and of windows and mirroring
        round_size: int,  # images a round, over all ranks
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises InputError where the data set is missing, or the ranks cannot share a round equally."""
        check_config(config)
        dataset = DataSet(config)
        self.manifest = dataset.manifest
        self.shape = dataset.shape  # of one row
        self.order = dataset.order(seed, round_size)
        self._index = dataset.index
        self._share = rank_rows(round_size, rank, world)
        self._ahead = ReadAhead(dataset, self.order, world)
        self._next = -1  # the round that is taken next without a new start
        self._trace: Path | None = None
        if config.trace:
            self._trace = Path(config.trace) / f"rank-{rank:05d}.txt"
            try:
                self._trace.parent.mkdir(parents=True, exist_ok=True)
                self._trace.touch()
            except (OSError, ValueError) as error:
                raise InputError(f"data.trace {config.trace!r} cannot be written: {error}") from None

    @property
    def rows_read(self) -> int:
        """Rows so far; it grows while `take` waits for a round that is arriving."""
        return self._ahead.rows_read

    def take(self, round: int, cancelled: Callable[[], bool] = lambda: False) -> Rows:
        """This rank's part of a round: a function of the arguments of the Stream and `round` alone. Rounds may be asked
        for in any order, but are read ahead one after the other.

        Raises InputError, naming shard and key, for data that is damaged or not as its manifest says; Unavailable for a
        store that stays out of reach; Gone where data that existed before are missing; Stopped if `cancelled`, asked a
        few times a second, turns true.
        """
        with was_there(self._index):
            if round != self._next:
                self._ahead.start(partial(self._spans, round))
            self._next = -1
            rows = self._ahead.take(cancelled)
        self._next = round + 1
        if self._trace:
            with self._trace.open("a", errors="surrogateescape") as lines:
                for epoch, key in zip(rows.epochs.tolist(), rows.keys, strict=True):
                    lines.write(f"{epoch} {round} {key}\n")
        return rows

    def _spans(self, round: int) -> Iterator[Span]:
        for number in count(round):
            yield number, *self._share

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read_split(data: DataConfig | str, split: str, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """A split, or a random subset of `limit` samples, in the order of its shards: images (n, C, H, W) uint8, resized
    without chance, or points (n, D) float32; labels (n,) int64. `data` may be a path. Raises InputError as Stream does.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    dataset = DataSet(config)
    reader = dataset.reader(split)
    whole = dataset.manifest.split(split)
    total = whole.samples
    count = total if limit is None else min(limit, total)
    if dataset.manifest.dealt or count == total:
        chosen = leading(whole.sizes, count)  # they are a random subset, or all
    else:
        order = Order(sizes=whole.sizes, seed=0, round_size=count, lanes=LANES)
        chosen = pieces(order, 0, 0, count)  # blocks from all over
    for shard in {piece.shard for piece in chosen}:
        check_size(reader.store, reader.shards[shard])  # before memory is allocated for samples that are not there
    rows = new_rows(new_images(dataset, count))
    with closing(reader.raw(chosen)) as stored:
        rows.fill(0, reader, stored)
    check_broken(rows.broken, len(rows.broken), count, total)
    return rows.images.contiguous(), rows.labels
