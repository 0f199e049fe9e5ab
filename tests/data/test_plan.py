"""The plan, with ranks and workers simulated."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from pipeline.data.plan import check, parts, pieces, rank_range, shard_order
from pipeline.errors import InputError

SIZES = some.lists(some.integers(1, 9), min_size=1, max_size=7)
SEEDS = some.integers(-(2**63), 2**64 - 1)


def listed(sizes: list[int], seed: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(epoch, shard, sample) of each position."""
    return [
        (piece.epoch, piece.shard, sample)
        for piece in pieces(sizes, seed, start, stop)
        for sample in range(piece.first, piece.last)
    ]


@given(SIZES, SEEDS, some.integers(1, 4))
def test_every_image_comes_exactly_once_an_epoch(sizes: list[int], seed: int, epochs: int) -> None:
    found = Counter(listed(sizes, seed, 0, epochs * sum(sizes)))
    every = {(e, shard, sample) for e in range(epochs) for shard, size in enumerate(sizes) for sample in range(size)}
    assert found == Counter(every)


@given(SIZES, SEEDS, some.lists(some.integers(0, 60), min_size=2, max_size=5))
def test_any_cuts_give_the_same_sequence(sizes: list[int], seed: int, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    joined = [item for a, b in zip(cuts, cuts[1:], strict=False) for item in listed(sizes, seed, a, b)]
    assert joined == listed(sizes, seed, cuts[0], cuts[-1])


@given(SIZES, SEEDS, some.integers(0, 20), some.integers(1, 4), some.integers(1, 6), some.integers(1, 3))
def test_a_round_does_not_depend_on_ranks_and_workers(
    sizes: list[int], seed: int, round: int, share: int, world: int, workers: int
) -> None:
    size = share * world
    ranges = [
        part for rank in range(world) for part in parts(*rank_range(round, size, rank, world), workers)
    ]  # as the readers of all ranks have them
    found = [item for start, stop in ranges for item in listed(sizes, seed, start, stop)]
    assert found == listed(sizes, seed, round * size, (round + 1) * size)


def test_the_order_of_shards_differs_by_epoch_and_seed_and_never_changes() -> None:
    assert shard_order(8, 0, 0) == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(shard_order(8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_parts_differ_by_one_at_most() -> None:
    assert parts(3, 13, 4) == [(3, 5), (5, 8), (8, 10), (10, 13)]


def test_check_prints_the_arithmetic() -> None:
    check(shards=6, world=3, workers=2, round_size=12, batch=6)
    with pytest.raises(InputError, match=r"4 shards cannot feed 3 ranks x 2 workers = 6 readers.*--shards 6"):
        check(shards=4, world=3, workers=2, round_size=12, batch=6)
    with pytest.raises(InputError, match=r"2 shards cannot feed 3 ranks: .*--shards 3"):
        check(shards=2, world=3, workers=0, round_size=12, batch=6)
    with pytest.raises(InputError, match=r"round of 100 .* 3 ranks \(100 = 33 x 3 \+ 1\): use 99"):
        check(shards=4, world=3, workers=0, round_size=100, batch=6)
    with pytest.raises(InputError, match="batch of 5 "):
        check(shards=4, world=3, workers=0, round_size=12, batch=5)
    with pytest.raises(InputError, match="more than a round"):
        check(shards=4, world=3, workers=0, round_size=12, batch=24)
