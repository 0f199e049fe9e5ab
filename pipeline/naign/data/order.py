"""Who reads what: pure functions from (manifest, seed, round, rank) to pieces of shards.

Epoch e visits every shard once, in an order that depends on (seed, e) alone, and the images of a shard in their order.
Where shards are no random subsets, that sequence is cut into lanes, and a block of each lane is taken in turn. Round r
takes the next N images, also beyond the end of an epoch, and rank k of W the k-th equal part of the round. So the
images of a round, and the row of each, are the same for every world size and number of workers.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from naign.errors import InputError, require

Longs = npt.NDArray[np.int64]
LANES = 128  # where shards are no random subsets
BLOCK = 16  # consecutive images of a shard that are taken together then; pages end at multiples of it (format/pages.py)


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Consecutive samples of one shard: [first, last) of shard number `shard`, in epoch `epoch`."""

    epoch: int
    shard: int
    first: int
    last: int


@dataclass(kw_only=True, frozen=True, eq=False)  # compared by identity: plans are cached by it
class Order:
    """All that says in which order the images of a split come, and in which rounds."""

    sizes: tuple[int, ...]  # samples of each shard
    seed: int
    round_size: int  # images a round, over all ranks
    lanes: int = 1  # that blocks are taken from in turn; 1: shards one after the other

    @cached_property
    def total(self) -> int:
        """Images of an epoch."""
        return sum(self.sizes)

    def describe(self) -> str:
        """Which images a round takes and what happens at the end of an epoch, for a log."""
        rounds, left = divmod(self.total, self.round_size)
        end = "; a round goes on into the next epoch" if left else f" of {rounds} rounds"
        lanes = f"; {BLOCK} in turn from each of {self.lanes} places" if self.lanes > 1 else ""
        return f"each of {self.total} images once an epoch{end}{lanes}"


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that does not fit Philox's 64 bits: another one would stand for the same numbers."""
    require((0 <= seed < 2**64, f"--seed {seed}: use a whole number from 0 to 2**64 - 1"))


def shuffled(count: int, seed: int, stream: int = 0) -> list[int]:
    """0 to count - 1 in an order that depends on the arguments alone: of the shards of an epoch, say, the `stream`. It
    sorts Philox's raw numbers, which NumPy promises never to change, unlike those of its `permutation` (NEP 19).
    """
    key = np.array([seed % 2**64, stream], np.uint64)  # a list would pass through float64
    draws: Any = np.random.Philox(key=key).random_raw(count)
    order: list[int] = np.argsort(draws, kind="stable").tolist()
    return order


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int, groups: int) -> tuple[Longs, Longs]:
    """The shards of an epoch in random order (n,), and the positions (n + 1,) at which they start and end. With fewer
    `groups` than shards, so many runs of consecutive ones, often of one class, each stay together, in random order.
    """
    count = len(order.sizes)
    shards = np.array(shuffled(count, order.seed, epoch), np.int64)
    if groups < count:
        group = shards * groups // count
        _, begins, group = np.unique(group, return_index=True, return_inverse=True)
        shards = shards[np.argsort(begins[group], kind="stable")]  # groups by where their first shard stands
    return shards, np.concatenate([[0], np.cumsum(np.array(order.sizes, np.int64)[shards])])


def _spread(count: int, width: int, *, backwards: bool = False) -> Longs:
    """0 to count - 1 (count,) in an order in which any `width` consecutive numbers lie evenly over the range. A sweep
    takes numbers equally far apart, in van der Corput's order; the next one those above or, if `backwards`, below.
    """
    sweeps = max(1, count // width)
    bits = (-(-count // sweeps)).bit_length()
    corput = np.array([int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits)])
    step, sweep = np.divmod(np.arange(count), sweeps)
    order: Longs = np.lexsort((corput[step], -sweep if backwards else sweep))
    return order


class _Lanes:
    """An epoch of blocks that are taken in turn from lanes; its images are numbered in that order. The whole blocks of
    all shards, laid end to end, are cut into lanes whose lengths differ by one at most. A turn takes the next block of
    each lane. The rest of each shard, less than a block, follows at the end of the epoch.
    """

    def __init__(self, lengths: Longs, lanes: int, width: int) -> None:
        """`lengths` (n,) are those of the shards in their order; a round takes `width` blocks."""
        self._ends = np.cumsum(lengths // BLOCK)  # blocks up to the end of each shard
        self._blocks = int(self._ends[-1])
        self._lanes = max(1, min(lanes, self._blocks))
        self._turns = self._blocks // self._lanes  # that take a block of each lane; one more takes those of longer ones
        edges = np.arange(self._lanes + 1) * self._blocks // self._lanes
        self._firsts, longer = edges[:-1], np.flatnonzero(np.diff(edges) > self._turns)
        # Every second turn goes backwards: its first blocks lie apart from the last ones of the turn before.
        self._orders = np.stack([_spread(self._lanes, width), _spread(self._lanes, width, backwards=True)])
        self._last = longer[_spread(len(longer), width)]
        shards = np.flatnonzero(lengths % BLOCK)
        self._rests = shards[_spread(len(shards), width)]
        self._lengths = lengths
        sizes = np.cumsum(lengths[self._rests] % BLOCK)
        self._edges = self._blocks * BLOCK + np.concatenate([[0], sizes])  # images before each rest, and at the end

    def runs(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Images [begin, end) of the epoch as runs: (place of the shard in the epoch's order, first, last) in it."""
        parts = zip(self._of_blocks(begin, end), self._of_rests(begin, end), strict=True)
        shards, firsts, starts, sizes = map(np.concatenate, parts)
        lows, highs = firsts + np.maximum(begin - starts, 0), firsts + np.minimum(end - starts, sizes)
        runs: list[tuple[int, int, int]] = []
        for shard, first, last in zip(shards.tolist(), lows.tolist(), highs.tolist(), strict=True):
            if runs and runs[-1][0] == shard and runs[-1][2] == first:
                runs[-1] = (shard, runs[-1][1], last)
            else:
                runs.append((shard, first, last))
        return runs

    def _of_blocks(self, begin: int, end: int) -> tuple[Longs, Longs, Longs, Longs]:
        """The blocks with images in [begin, end): shards, first samples, first images, and sizes."""
        places = np.arange(begin // BLOCK, min(-(-end // BLOCK), self._blocks))
        turns, indexes = np.divmod(places, self._lanes)
        lanes = self._orders[turns % 2, indexes]
        final = turns == self._turns
        lanes[final] = self._last[indexes[final]]
        numbers = self._firsts[lanes] + turns
        shards = np.searchsorted(self._ends, numbers, "right")
        firsts = (numbers - self._ends[shards] + self._lengths[shards] // BLOCK) * BLOCK
        return shards, firsts, places * BLOCK, np.full(len(places), BLOCK)

    def _of_rests(self, begin: int, end: int) -> tuple[Longs, Longs, Longs, Longs]:
        """The same of the rests of shards."""
        low = max(0, int(np.searchsorted(self._edges, begin, "right")) - 1)
        high = min(int(np.searchsorted(self._edges, end)), len(self._rests))
        shards = self._rests[low:high]
        sizes = self._lengths[shards] % BLOCK
        return shards, self._lengths[shards] - sizes, self._edges[low:high], sizes


@lru_cache(maxsize=4)
def _lanes(order: Order, epoch: int) -> tuple[Longs, _Lanes]:
    width = max(1, round(order.round_size / BLOCK))
    shards, edges = _epoch(order, epoch, width)
    return shards, _Lanes(np.diff(edges), order.lanes, width)


def spans(order: Order, round: int) -> list[tuple[int, int, int]]:
    """The (epoch, first, last) positions within epochs that make up a round, in order."""
    assert order.total > 0 and order.round_size > 0 and round >= 0
    cut, at, end = [], round * order.round_size, (round + 1) * order.round_size
    while at < end:
        epoch, first = divmod(at, order.total)
        last = min(first + end - at, order.total)
        cut.append((epoch, first, last))
        at += last - first
    return cut


def pieces(order: Order, round: int, start: int, stop: int) -> list[Piece]:
    """What rows [start, stop) of a round are, in order."""
    assert 0 <= start <= stop <= order.round_size
    cut = []
    row = 0  # of the first position of the span
    for epoch, first, last in spans(order, round):
        begin, end = max(first, first + start - row), min(last, first + stop - row)
        row += last - first
        if begin < end and order.lanes > 1:
            shards, lanes = _lanes(order, epoch)
            for place, a, b in lanes.runs(begin, end):
                cut.append(Piece(epoch=epoch, shard=int(shards[place]), first=a, last=b))
        elif begin < end:
            shards, edges = _epoch(order, epoch, len(order.sizes))
            low, high = int(np.searchsorted(edges, begin, "right")) - 1, int(np.searchsorted(edges, end))
            for shard, (a, b) in zip(shards[low:high].tolist(), pairwise(edges[low : high + 1].tolist()), strict=True):
                cut.append(Piece(epoch=epoch, shard=shard, first=max(begin - a, 0), last=min(end, b) - a))
    return cut


def rank_rows(round_size: int, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) of each round that `rank` of `world` reads."""
    assert round_size % world == 0 and 0 <= rank < world
    share = round_size // world
    return rank * share, (rank + 1) * share


def parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `count` consecutive ranges whose lengths differ by one at most."""
    return list(pairwise(start + (stop - start) * i // count for i in range(count + 1)))


def check(round_size: int, world: int) -> None:
    """Raise InputError, with the arithmetic, where so many ranks cannot share a round equally."""
    if round_size < world or round_size % world:
        near = max(1, round(round_size / world)) * world
        arithmetic = f"{round_size} = {round_size // world} x {world} + {round_size % world}"
        shared = f"a round of {round_size} images cannot be shared equally by {world} ranks ({arithmetic})"
        raise InputError(f"{shared}: use {near}, for example")
