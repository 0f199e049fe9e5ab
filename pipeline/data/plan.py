"""Who reads what: pure functions from (seed, position) to pieces of shards.

The images of a split form one endless sequence, the epochs laid end to end. Epoch e visits every shard once, in an
order that depends on (seed, e) alone. Round r of N images is positions [r*N, (r+1)*N), and rank k of W takes its k-th
equal part. So the images of a round, and the row of each, are the same for every world size and number of workers;
each image comes exactly once an epoch; no tail is dropped; and resuming at a round is arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Consecutive samples of one shard: [first, last) of shard number `shard`, in epoch `epoch`."""

    epoch: int
    shard: int
    first: int
    last: int


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that does not fit Philox's 64 bits: another one would stand for the same numbers."""
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed}: use a whole number from 0 to 2**64 - 1")


def shard_order(shards: int, seed: int, epoch: int) -> list[int]:
    """The order (shards,) in which an epoch visits the shards: a permutation that depends on the arguments alone.

    It sorts Philox's raw numbers, which NumPy promises never to change, unlike those of its `permutation` (NEP 19).
    """
    key = np.array([seed % 2**64, epoch], np.uint64)  # a list would pass through float64
    draws = np.random.Philox(key=key).random_raw(shards)
    return [int(shard) for shard in np.argsort(draws, kind="stable")]


def pieces(shard_sizes: Sequence[int], seed: int, start: int, stop: int) -> list[Piece]:
    """What positions [start, stop) of the endless sequence are, in order; empty pieces are left out."""
    total = sum(shard_sizes)
    assert total > 0 and 0 <= start <= stop
    found = []
    for epoch in range(start // total, -(-stop // total)):
        position = epoch * total  # of the first sample of the next shard
        for shard in shard_order(len(shard_sizes), seed, epoch):
            first = max(start - position, 0)
            last = min(stop - position, shard_sizes[shard])
            if first < last:
                found.append(Piece(epoch=epoch, shard=shard, first=first, last=last))
            position += shard_sizes[shard]
    return found


def rank_range(round: int, size: int, rank: int, world: int) -> tuple[int, int]:
    """Positions [start, stop) that `rank` of `world` reads in a round of `size` images."""
    assert size % world == 0 and 0 <= rank < world and round >= 0
    share = size // world
    start = round * size + rank * share
    return start, start + share


def parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `count` consecutive ranges whose lengths differ by one at most."""
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def check(
    shards: int,  # of the split
    world: int,  # ranks
    workers: int,  # reading processes a rank; 0 reads in the rank itself
    round_size: int,  # images a round, over all ranks
    batch: int,  # images a step, over all ranks
) -> None:
    """Raise InputError, with the arithmetic, where these numbers cannot share out the work equally."""
    readers = world * max(1, workers)
    if shards < readers:
        how = f"{world} ranks x {workers} workers = {readers} readers" if workers else f"{world} ranks"
        fewer = "fewer ranks or workers" if workers else "fewer ranks"
        raise InputError(f"{shards} shards cannot feed {how}: repack with --shards {readers} or more, or use {fewer}")
    for what, number in (("round", round_size), ("batch", batch)):
        if number < world or number % world:
            near = max(1, round(number / world)) * world
            raise InputError(
                f"a {what} of {number} images cannot be shared equally by {world} ranks "
                f"({number} = {number // world} x {world} + {number % world}): use {near}, for example"
            )
    if batch > round_size:
        raise InputError(f"a batch of {batch} images is more than a round of {round_size}: use a larger round")
