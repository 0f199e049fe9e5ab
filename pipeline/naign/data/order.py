"""Which images a rank reads: pure functions from (sizes of shards, seed, round, rank) to pieces of shards.

Epoch e visits every shard once, in an order that depends on (seed, e) alone, and the images of a shard in their order.
Where shards are not random subsets, that sequence is cut into lanes, and a block of each lane is taken in turn. Round r
takes the next N images, also beyond the end of an epoch, and rank k of W the k-th equal part of the round. So the
images of a round, and the row of each, are the same for every world size and number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from naign.errors import InputError, require

Span = tuple[int, int, int]  # rows [first, last) of a round, as (round, first, last)
Longs = npt.NDArray[np.int64]
LANES = 128  # where shards are not random subsets
GOLDEN = (5**0.5 - 1) / 2
BLOCK = 16  # consecutive images of a shard that lanes take together; pages end at multiples of it (format/pages.py)


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Consecutive samples of one shard: [first, last) of shard number `shard`, in epoch `epoch`."""

    epoch: int = 0
    shard: int
    first: int
    last: int


@dataclass(kw_only=True, frozen=True, eq=False)  # compared by identity: epochs are cached by it
class Order:
    """All that determines in which order the images of a split come, and in which rounds."""

    sizes: tuple[int, ...]  # samples of each shard
    seed: int
    round_size: int  # images a round, over all ranks
    lanes: int = 1  # that blocks are taken from in turn; 1: shards one after the other

    @cached_property
    def total(self) -> int:
        """Images of an epoch."""
        return sum(self.sizes)

    def epochs(self, rounds: int) -> float:
        """The number of epochs in that many rounds."""
        return rounds * self.round_size / self.total

    def describe(self) -> str:
        """Which images a round takes, for a log."""
        text = f"{self.round_size} a round, each of {self.total} images once an epoch"
        if self.lanes > 1:
            text += f", {BLOCK} in turn from each of {self.lanes} places"
        return text


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that does not fit Philox's 64 bits: another one would stand for the same numbers."""
    require((0 <= seed < 2**64, f"--seed {seed}: use a whole number from 0 to 2**64 - 1"))


def count_lanes(shuffle: int, *, dealt: bool) -> int:
    """From how many places images are taken in turn: `shuffle`, or for 0 what suits shards that are `dealt` or not."""
    if dealt:
        return shuffle or 1
    return shuffle or LANES


def shares(weights: Sequence[float], size: int) -> list[int]:
    """`size` cut into whole numbers in proportion to the weights; what is left over goes to the largest remainders."""
    relative = np.array(weights) / max(weights)
    exact = relative / relative.sum() * size
    counts = np.floor(exact).astype(int)
    left = size - int(counts.sum())
    first = np.argsort(counts - exact, kind="stable")
    counts[first[:left]] += 1
    found: list[int] = counts.tolist()
    return found


def philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    """NumPy's Philox of this key, whose numbers begin at the counter; each stands for four of them."""
    key = np.array([seed % 2**64, stream], np.uint64)  # a list would pass through float64
    return np.random.Philox(key=key, counter=counter)


def shuffled(count: int, seed: int, stream: int = 0) -> list[int]:
    """0 to count - 1 in an order that depends on the arguments alone: `stream` is the epoch, for its shards.

    It sorts Philox's raw numbers, which NumPy promises never to change, unlike those of its `permutation` (NEP 19).
    """
    numbers: Any = philox(seed, stream).random_raw(count)
    order: list[int] = np.argsort(numbers, kind="stable").tolist()
    return order


def spread(count: int) -> Longs:
    """0 to count - 1 (count,) in an order in which consecutive numbers lie evenly over the range: multiples of the
    golden ratio modulo 1 do.
    """
    places: Longs = np.argsort(np.arange(count) * GOLDEN % 1, kind="stable")
    return np.argsort(places)


class _Lanes:
    """Blocks taken in turn from lanes. All blocks, laid end to end, are cut into lanes whose lengths differ by one at
    most. A turn takes the next block of each lane.
    """

    def __init__(self, blocks: Longs, lanes: int) -> None:
        """`blocks` (n,) has the number of whole blocks of each shard."""
        self.count = int(blocks.sum())
        self._starts = np.cumsum(blocks) - blocks  # blocks before each shard
        lanes = max(1, min(lanes, self.count))
        edges = np.arange(lanes + 1) * self.count // lanes
        self._turns = self.count // lanes  # of all lanes; one more takes the last block of the longer ones
        order = spread(lanes)
        self._firsts = edges[order]
        self._longer = self._firsts[np.diff(edges)[order] > self._turns]

    def block(self, place: int) -> tuple[int, int]:
        """The block that is taken at this place: its shard's place, and its number among the blocks of the shard."""
        turn, index = divmod(place, len(self._firsts))
        firsts = self._longer if turn == self._turns else self._firsts
        block = int(firsts[index]) + turn
        shard = int(np.searchsorted(self._starts, block, "right")) - 1
        return shard, block - int(self._starts[shard])


class _Epoch:
    """The order of an epoch's images: blocks from lanes in turn, then runs of images, one after the other.

    With one lane there are no blocks, and a run is a whole shard. With more, it is the rest of a shard, less than a
    block.
    """

    def __init__(self, order: Order, epoch: int) -> None:
        self._epoch = epoch
        self._sizes = np.array(order.sizes, np.int64)
        self.shards = np.array(shuffled(len(order.sizes), order.seed, epoch), np.int64)
        self._runs = self.shards
        self._begin = 0  # images before the first run
        lengths = self._sizes[self._runs]
        if order.lanes > 1:
            self._lanes = _Lanes(lengths // BLOCK, order.lanes)
            self._begin = self._lanes.count * BLOCK
            self._runs = self.shards[lengths % BLOCK > 0]
            lengths = self._sizes[self._runs] % BLOCK
        self._run_ends = self._begin + np.cumsum(lengths)

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Images [begin, end) of the epoch, in order."""
        for start in range(begin // BLOCK * BLOCK, min(end, self._begin), BLOCK):
            place, block = self._lanes.block(start // BLOCK)
            low = max(begin, start)
            high = min(end, start + BLOCK)
            yield self._piece(self.shards[place], low, high, block * BLOCK - start)
        begin = max(begin, self._begin)
        run = int(np.searchsorted(self._run_ends, begin, "right"))
        while begin < end:
            shard = self._runs[run]
            run_end = int(self._run_ends[run])
            stop = min(end, run_end)
            offset = int(self._sizes[shard]) - run_end  # a run ends where its shard does
            yield self._piece(shard, begin, stop, offset)
            begin = stop
            run += 1

    def _piece(
        self,
        shard: np.int64,
        begin: int,
        end: int,
        offset: int,
    ) -> Piece:
        """The piece of a shard that images [begin, end) of the epoch are; its samples are numbered `offset` higher."""
        return Piece(
            epoch=self._epoch,
            shard=int(shard),
            first=begin + offset,
            last=end + offset,
        )


_epoch = lru_cache(maxsize=16)(_Epoch)


def pieces(
    order: Order,
    round: int,
    start: int,
    stop: int,
) -> list[Piece]:
    """What rows [start, stop) of a round are, in order."""
    assert 0 <= start <= stop <= order.round_size
    found = list[Piece]()
    begin = round * order.round_size + start  # counted over all epochs
    end = round * order.round_size + stop
    while begin < end:
        epoch, first = divmod(begin, order.total)
        last = min(first + end - begin, order.total)
        found += _epoch(order, epoch).pieces(first, last)
        begin += last - first
    return found


def leading(sizes: Sequence[int], count: int) -> list[Piece]:
    """The first `count` samples of shards of these sizes, one shard after the other."""
    found = []
    for shard, size in enumerate(sizes):
        last = min(size, count)
        if last:
            found.append(Piece(shard=shard, first=0, last=last))
        count -= last
    return found


def rank_rows(round_size: int, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) of each round that `rank` of `world` reads. Raises InputError, with the arithmetic, where so
    many ranks cannot share a round equally.
    """
    share, left = divmod(round_size, world)
    if left or not share:
        near = max(1, round(round_size / world)) * world
        unequal = f"a round of {round_size} images cannot be shared equally by {world} ranks"
        raise InputError(f"{unequal} ({round_size} = {share} x {world} + {left}): use {near}")
    return rank * share, (rank + 1) * share


def parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `count` consecutive ranges whose lengths differ by one at most."""
    edges = [start + (stop - start) * number // count for number in range(count + 1)]
    return list(pairwise(edges))
