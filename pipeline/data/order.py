"""Who reads what: pure functions from (manifest, seed, round, rank) to pieces of shards.

Epoch e visits every shard once, in an order that depends on (seed, e) alone, and the images of a shard in their order.
Where shards are no random subsets that sequence is cut into lanes of equal length, as many as `shuffle` says, and a
block of each lane is taken in turn, so that a round draws from many shards at once. Round r takes the next N images,
and rank k of W the k-th equal part of the round. So the images of a round, and the row of each, are the same for every
world size and number of workers; each image comes exactly once an epoch; and resuming at a round is arithmetic. Pieces
need not be whole shards: shards are read by ranges of bytes.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

Longs = npt.NDArray[np.int64]
TAILS = ("wrap", "drop", "pad")
SHUFFLE = 128  # lanes where shards are no random subsets: with 64 one round in ten has a fifth of one class of ten
BLOCK = 16  # images that are taken together then; pages end at multiples of it (format/pages.py)


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Consecutive samples of one shard: [first, last) of shard number `shard`, in epoch `epoch`."""

    epoch: int
    shard: int
    first: int
    last: int


class _Sizes(tuple[int, ...]):
    """Numbers whose hash is computed once: plans are looked up by them, and there may be a hundred thousand."""

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash


@dataclass(kw_only=True, slots=True, frozen=True)
class Order:
    """All that says in which order the images of a split come, and in which rounds."""

    sizes: tuple[int, ...]  # samples of each shard
    seed: int
    round_size: int  # images a round, over all ranks
    tail: str = "wrap"
    """Of an epoch that is no whole number of rounds. wrap: its last round goes on into the next epoch, so that epochs
    laid end to end are cut into rounds; drop: its last images are left out; pad: its first ones fill up the round."""
    resampled: bool = False
    """Draw the shards of an epoch with replacement, as WebDataset's resampled=True: images come once on average."""
    shuffle: int = 1
    """Lanes that blocks are taken from in turn; 1: shards one after the other."""
    block: int = BLOCK
    """Consecutive images of a shard that are taken together; its last block may be shorter."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _Sizes(self.sizes))

    @property
    def total(self) -> int:
        """Images of an epoch."""
        return _total(self.sizes)

    @property
    def rounds(self) -> int:
        """Of an epoch, where it begins with a round: with drop and pad."""
        return self.total // self.round_size if self.tail == "drop" else -(-self.total // self.round_size)

    def epochs(self, rounds: int) -> float:
        """The number of epochs in that many rounds."""
        return rounds * self.round_size / self.total if self.tail == "wrap" else rounds / self.rounds

    def describe(self) -> str:
        """Which images a round takes and what happens at the end of an epoch, for a log."""
        left = self.total % self.round_size
        if self.shuffle > 1:
            return f"{replace(self, shuffle=1).describe()}; {self.block} in turn from each of {self.shuffle} places"
        if self.resampled:
            return f"{len(self.sizes)} shards drawn with replacement: an epoch of {self.total} images misses some"
        if not left:
            return f"each of {self.total} images once an epoch of {self.total // self.round_size} rounds"
        return {
            "wrap": f"each of {self.total} images once an epoch; a round goes on into the next epoch",
            "drop": f"{self.total - left} of {self.total} images once an epoch: drops its last {left}",
            "pad": f"each of {self.total} images an epoch, its first {self.round_size - left} once more",
        }[self.tail]


@lru_cache(maxsize=4)
def _total(sizes: tuple[int, ...]) -> int:
    return sum(sizes)


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that does not fit Philox's 64 bits: another one would stand for the same numbers."""
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed}: use a whole number from 0 to 2**64 - 1")


def shuffled(count: int, seed: int, stream: int = 0) -> list[int]:
    """0 to count - 1 in an order that depends on the arguments alone: of the shards of an epoch, say, the `stream`.

    It sorts Philox's raw numbers, which NumPy promises never to change, unlike those of its `permutation` (NEP 19).
    """
    order: list[int] = np.argsort(_draws(count, seed, stream), kind="stable").tolist()
    return order


def _draws(count: int, seed: int, stream: int) -> Any:
    return _philox(seed, stream).random_raw(count)


def _philox(seed: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64))  # a list would pass through float64


@lru_cache(maxsize=4)
def _epoch(sizes: tuple[int, ...], seed: int, epoch: int, resampled: bool) -> tuple[Longs, Longs]:
    """The shards of an epoch in order (n,), and the positions (n + 1,) at which they start and end.

    With `resampled` shards are drawn until the epoch has as many images as all of them have; the last one is cut off.
    """
    lengths = np.array(sizes, np.int64)
    total = int(lengths.sum())
    if resampled:
        drawn, reached, source = list[Longs](), 0, _philox(seed, epoch)
        while reached < total:
            drawn.append((source.random_raw(2 * len(sizes)) % np.uint64(len(sizes))).astype(np.int64))
            reached += int(lengths[drawn[-1]].sum())
        order = np.concatenate(drawn)
    else:
        order = np.array(shuffled(len(sizes), seed, epoch), np.int64)
    ends = np.minimum(np.cumsum(lengths[order]), total)
    count = int(np.searchsorted(ends, total)) + 1
    return order[:count], np.concatenate([[0], ends[:count]])


class _Lanes:
    """An epoch's blocks, taken in turn from as many lanes as there are; its images are numbered in that order.

    Lane j holds the blocks from `_first(j)` on of those of all shards laid end to end, and lanes differ by one block at
    most. The u-th block that is taken is number u // lanes of lane u % lanes. All blocks are of one length but the last
    one of each shard, so that where a block begins is arithmetic on the places of those.
    """

    def __init__(self, lengths: Longs, lanes: int, block: int) -> None:
        self.lengths, self.block = lengths, block
        self._ends = np.cumsum(-(-lengths // block))  # blocks up to the end of each shard
        self._starts = self._ends - -(-lengths // block)
        count = int(self._ends[-1])
        self._lanes = min(lanes, count)
        self._each, self._longer = divmod(count, self._lanes)  # blocks of a lane; how many lanes have one more
        short = lengths % block != 0
        places = self._place(self._ends[short] - 1)
        order = np.argsort(places)
        self._short = places[order]  # of the shorter blocks, in the order in which they are taken
        missing = np.cumsum((block - lengths[short] % block)[order])
        self._after = block * (self._short + 1) - missing  # images up to the end of each of them

    def _first(self, lane: Longs) -> Longs:
        first: Longs = lane * self._each + np.minimum(lane, self._longer)
        return first

    def _place(self, number: Longs) -> Longs:
        """When a block is taken, by its number among all of them laid end to end."""
        longer = self._longer * (self._each + 1)
        late = np.maximum(number - longer, 0)
        lane = np.where(number < longer, number // (self._each + 1), self._longer + late // max(self._each, 1))
        place: Longs = (number - self._first(lane)) * self._lanes + lane
        return place

    def _at(self, image: int) -> tuple[int, int]:
        """When the block of an image is taken, and the number of its first image."""
        known = int(np.searchsorted(self._after, image, "right"))  # shorter blocks that lie before
        place, start = (int(self._short[known - 1]) + 1, int(self._after[known - 1])) if known else (0, 0)
        full = (image - start) // self.block
        return place + full, start + full * self.block

    def runs(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Images [begin, end) of the epoch as runs: (place of the shard in the epoch's order, first, last) in it."""
        (place, at), (last_place, _) = self._at(begin), self._at(end - 1)
        places = np.arange(place, last_place + 1)
        numbers = self._first(places % self._lanes) + places // self._lanes
        shards = np.searchsorted(self._ends, numbers, "right")
        firsts = (numbers - self._starts[shards]) * self.block
        lasts = np.minimum(firsts + self.block, self.lengths[shards])
        found: list[tuple[int, int, int]] = []
        for shard, first, last in zip(shards.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            low, high = max(begin - at, 0), min(last - first, end - at)
            if found and found[-1][0] == shard and found[-1][2] == first + low:
                found[-1] = (shard, found[-1][1], first + high)
            else:
                found.append((shard, first + low, first + high))
            at += last - first
        return found


@lru_cache(maxsize=4)
def _lanes(order: Order, epoch: int) -> tuple[Longs, _Lanes]:
    shards, edges = _epoch(order.sizes, order.seed, epoch, order.resampled)
    return shards, _Lanes(np.diff(edges), order.shuffle, order.block)


def spans(order: Order, round: int) -> list[tuple[int, int, int]]:
    """The (epoch, first, last) positions within epochs that make up a round, in order."""
    total, size = order.total, order.round_size
    assert total > 0 and size > 0 and round >= 0
    if order.tail == "wrap":
        epoch, first = divmod(round * size, total)
    else:
        epoch, number = divmod(round, order.rounds)
        first = number * size
    found = []
    while size:
        last = min(first + size, total)
        found.append((epoch, first, last))
        size -= last - first
        epoch, first = epoch + (order.tail == "wrap"), 0
    return found


def pieces(order: Order, round: int, start: int, stop: int) -> list[Piece]:
    """What rows [start, stop) of a round are, in order."""
    assert 0 <= start <= stop <= order.round_size
    found = []
    row = 0  # of the first position of the span
    for epoch, first, last in spans(order, round):
        begin, end = max(first, first + start - row), min(last, first + stop - row)
        row += last - first
        if begin >= end:
            continue
        if order.shuffle > 1:
            shards, lanes = _lanes(order, epoch)
            for place, a, b in lanes.runs(begin, end):
                found.append(Piece(epoch=epoch, shard=int(shards[place]), first=a, last=b))
            continue
        shards, edges = _epoch(order.sizes, order.seed, epoch, order.resampled)
        low, high = int(np.searchsorted(edges, begin, "right")) - 1, int(np.searchsorted(edges, end))
        for shard, (a, b) in zip(shards[low:high].tolist(), pairwise(edges[low : high + 1].tolist()), strict=True):
            found.append(Piece(epoch=epoch, shard=shard, first=max(begin - a, 0), last=min(end, b) - a))
    return found


def rank_rows(round_size: int, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) of each round that `rank` of `world` reads."""
    assert round_size % world == 0 and 0 <= rank < world
    share = round_size // world
    return rank * share, (rank + 1) * share


def parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `count` consecutive ranges whose lengths differ by one at most."""
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def check(order: Order, world: int) -> None:
    """Raise InputError, with the arithmetic, where these numbers cannot share out the work equally."""
    number = order.round_size
    if order.tail not in TAILS:
        raise InputError(f"data.tail is '{order.tail}': choose one of {', '.join(TAILS)}")
    if order.tail == "drop" and order.total < number:
        left = f"data.tail=drop leaves nothing of {order.total} images in rounds of {number}"
        raise InputError(f"{left}: use smaller rounds, or wrap")
    if number < world or number % world:
        near, arithmetic = max(1, round(number / world)) * world, f"{number // world} x {world} + {number % world}"
        shared = f"a round of {number} images cannot be shared equally by {world} ranks ({number} = {arithmetic})"
        raise InputError(f"{shared}: use {near}, for example")
