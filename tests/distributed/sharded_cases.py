"""What the ranks of test_sharded.py run."""

import os

import torch

from naign.errors import InputError
from naign.match.sharded import ShardedIndex
from tests.distributed.search_cases import SHARES, even
from tests.match.problems import draw, family

QUERIES, ROWS = family("near-duplicates", 3, 40, 1500, 300)
NEIGHBOURS = 4


def own(index, rank, world, share):
    """Add this rank's rows of the problem in two parts."""
    first, last = share(len(ROWS), rank, world)
    middle = (first + last) // 2
    for low, high in ((first, middle), (middle, last)):
        index.add(ROWS[low:high], low)


def answers(rank, world):
    """Distances and ids of this rank's queries, whoever has which rows."""
    low, high = even(len(QUERIES), rank, world)
    found = {}
    for share in SHARES:
        index = ShardedIndex(ROWS.shape[1], memory=16 * 4000)
        own(index, rank, world, share)
        found[share.__name__] = index.search(QUERIES[low:high], NEIGHBOURS)
    return found


def saved(rank, world):
    """As `answers`, of what is in the folder INDEX, which the first to come fill."""
    place = os.environ["INDEX"]
    try:
        index = ShardedIndex.load(place)
    except InputError:
        index = ShardedIndex(ROWS.shape[1])
        own(index, rank, world, even)
        index.save(place)
    low, high = even(len(QUERIES), rank, world)
    return index.search(QUERIES[low:high], NEIGHBOURS)


def refused(rank, world):
    """What each rank is told when the last one is wrong, and what an index then still finds."""
    last = rank == world - 1
    index = ShardedIndex(3)
    index.add(draw(rank, 8, 3), 100 * rank)
    told = {}

    def attempt(name, call):
        try:
            call()
        except (ValueError, InputError) as error:
            told[name] = str(error)

    more = draw(rank, 2, 3)
    attempt("width", lambda: index.add(more[:, :2] if last else more, 100 * rank + 8))
    attempt("taken", lambda: index.add(more, 107 if last else 100 * rank + 8))
    attempt("nan", lambda: index.search(more * (torch.nan if last else 1)))
    attempt("k", lambda: index.search(more, 2 if last else 1))
    attempt("factory", lambda: ShardedIndex(3, factory="XYZ" if last else "Flat"))
    attempt("dims", lambda: ShardedIndex(4 if last else 3))
    attempt("place", lambda: index.save("/proc/nowhere" if last else os.environ["INDEX"]))
    attempt("apart", lambda: index.save(os.environ["INDEX"] + str(rank)))
    fast = ShardedIndex(3, factory="IVF4,Flat")
    attempt("training", lambda: fast.add(draw(rank, 2 if last else 80, 3), 100 * rank))
    fast.add(draw(rank, 40, 3), 100 * rank)
    fast.save(os.environ["INDEX"])
    fast = ShardedIndex.load(os.environ["INDEX"])
    told["left"] = str(len(index))
    told["trained"] = str((len(fast), fast.recall(draw(rank, 10, 3)) > 0.1))
    return told
