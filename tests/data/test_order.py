"""The plan, with ranks and workers simulated."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from naign.data.order import BLOCK, LANES, Order, _epoch, _spread, check, parts, pieces, rank_rows, shuffled
from naign.errors import InputError

LARGER = some.lists(some.integers(1, 70), min_size=1, max_size=9).map(tuple)
SEEDS = some.integers(-(2**63), 2**64 - 1)
UNEVEN = (5, 1, 9, 2, 30, 7, 3)
Sample = tuple[int, int, int]
"""Epoch, shard, number in the shard."""


def listed(order: Order, round: int, start: int, stop: int) -> list[Sample]:
    return [
        (piece.epoch, piece.shard, sample)
        for piece in pieces(order, round, start, stop)
        for sample in range(piece.first, piece.last)
    ]


def read(order: Order, round: int, world: int, workers: int) -> list[Sample]:
    """A round as the readers of all ranks have it; 0 workers read in the rank itself."""
    return [
        sample
        for rank in range(world)
        for start, stop in parts(*rank_rows(order.round_size, rank, world), max(1, workers))
        for sample in listed(order, round, start, stop)
    ]


def every(sizes: tuple[int, ...], epoch: int) -> list[Sample]:
    return [(epoch, shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_two_epochs_hold_each_image_exactly_twice(world: int, workers: int) -> None:
    order = Order(sizes=UNEVEN, seed=3, round_size=60)  # 57 images an epoch: no round ends where an epoch does
    rounds = 2 * order.total  # the first whole number of epochs that is one of rounds, and more than two epochs
    found = [sample for round in range(rounds) for sample in read(order, round, world, workers)]
    assert found[: 2 * order.total] == [s for r in range(2) for s in read(order, r, 1, 0)][: 2 * order.total]
    first_two = Counter(sample for sample in found if sample[0] < 2)
    assert first_two == Counter(every(UNEVEN, 0) + every(UNEVEN, 1))
    assert Counter(found) == Counter(sample for epoch in range(120) for sample in every(UNEVEN, epoch))


@given(LARGER, SEEDS, some.integers(1, 200), some.integers(1, 3), some.integers(1, 40))
def test_every_image_comes_exactly_once_an_epoch(
    sizes: tuple[int, ...], seed: int, size: int, epochs: int, lanes: int
) -> None:
    order = Order(sizes=sizes, seed=seed, round_size=size, lanes=lanes)
    rounds = -(-epochs * order.total // size)
    images = Counter(sample for round in range(rounds) for sample in listed(order, round, 0, size))
    assert sum(images.values()) == rounds * size
    assert {sample: n for sample, n in images.items() if sample[0] < epochs} == Counter(
        sample for epoch in range(epochs) for sample in every(sizes, epoch)
    )


@given(LARGER, SEEDS, some.data())
def test_a_round_does_not_depend_on_ranks_and_workers(sizes: tuple[int, ...], seed: int, data: some.DataObject) -> None:
    ends = ((1, 6), (0, 3), (1, 40), (0, 20), (1, 40))
    world, workers, share, round, lanes = (data.draw(some.integers(*one)) for one in ends)
    order = Order(sizes=sizes, seed=seed, round_size=share * world, lanes=lanes)
    whole = listed(order, round, 0, order.round_size)
    assert len(whole) == order.round_size
    assert read(order, round, world, workers) == whole


@given(LARGER, SEEDS, some.integers(2, 40), some.integers(1, 300))
def test_a_turn_takes_the_next_block_of_every_lane(sizes: tuple[int, ...], seed: int, lanes: int, size: int) -> None:
    order = Order(sizes=sizes, seed=seed, round_size=size, lanes=lanes)
    rounds = -(-order.total // size)
    images = [sample for round in range(rounds) for sample in listed(order, round, 0, size)][: order.total]
    shards = _epoch(order, 0).shards.tolist()
    blocks = [(shard, first) for shard in shards for first in range(0, sizes[shard] - BLOCK + 1, BLOCK)]
    count = min(lanes, len(blocks))
    edges = [number * len(blocks) // max(count, 1) for number in range(count + 1)]
    taken = [images[at : at + BLOCK] for at in range(0, len(blocks) * BLOCK, BLOCK)]
    for turn in range(0, len(blocks), max(count, 1)):
        heads = {blocks[low + turn // count] for low, high in pairwise(edges) if low + turn // count < high}
        assert {block[0][1:] for block in taken[turn : turn + count]} == heads
    assert all(block == [(0, block[0][1], block[0][2] + step) for step in range(BLOCK)] for block in taken)
    assert all(number >= sizes[shard] // BLOCK * BLOCK for _, shard, number in images[len(blocks) * BLOCK :])


@pytest.mark.parametrize("width", [1, 2, 7, 16, 24, 64, 200])
@pytest.mark.parametrize("count", [0, 1, 5, 80, 90, 128])
@pytest.mark.parametrize("backwards", [False, True])
def test_any_so_many_numbers_lie_evenly_over_the_range(count: int, width: int, backwards: bool) -> None:
    order = _spread(count, width, backwards=backwards)
    assert sorted(order) == list(range(count))
    for begin in range(count - width + 1):
        tenths = np.bincount(order[begin : begin + width] * 10 // count, minlength=10)
        assert tenths.max() <= -(-width // 10) + 2 and (width < 40 or tenths.min() >= 1)


SORTED = {
    "ten tars": ((130,) * 10, lambda shard: shard),
    "uneven": ((100, 150, 130, 128, 140, 120, 131, 129, 135, 137), lambda shard: shard),
    "10,000": ((1000,) * 10, lambda shard: shard),
    "10,000 in 20": ((500,) * 20, lambda shard: shard // 2),
    "60,000": ((6000,) * 10, lambda shard: shard),
    "many tars": ((300,) * 1000, lambda shard: shard // 100),
    "in turn": ((300,) * 1000, lambda shard: shard % 10),
}


@pytest.mark.parametrize(
    ("tars", "size", "mean", "most"),
    [
        ("ten tars", 256, 0.14, 0.25),
        ("uneven", 256, 0.15, 0.25),
        ("10,000", 256, 0.13, 0.2),
        ("10,000", 512, 0.13, 0.15),
        ("10,000", 1024, 0.12, 0.15),
        ("10,000 in 20", 1024, 0.12, 0.15),
        ("60,000", 1024, 0.12, 0.15),
        ("60,000", 2048, 0.11, 0.13),
        ("many tars", 2048, 0.12, 0.16),
        ("in turn", 2048, 0.16, 0.2),
    ],
)
def test_rounds_of_shards_sorted_by_class_are_mixed(tars: str, size: int, mean: float, most: float) -> None:
    sizes, class_of = SORTED[tars]
    order = Order(sizes=sizes, seed=0, round_size=size, lanes=LANES)
    shares = []
    for round in range(min(150, 5 * order.total // size)):
        counts = Counter[int]()
        for piece in pieces(order, round, 0, size):
            counts[class_of(piece.shard)] += piece.last - piece.first
        shares.append(max(counts.values()) / size)
    assert np.mean(shares) < mean and max(shares) < most


def test_the_log_says_what_an_epoch_is() -> None:
    order = Order(sizes=UNEVEN, seed=0, round_size=20)
    assert order.describe() == "each of 57 images once an epoch; a round goes on into the next epoch"
    assert replace(order, lanes=8).describe() == order.describe() + "; 16 in turn from each of 8 places"
    assert Order(sizes=(20, 20), seed=0, round_size=10).describe() == "each of 40 images once an epoch of 4 rounds"


def test_the_order_of_shards_differs_by_epoch_and_seed_and_never_changes() -> None:
    assert shuffled(8, 0, 0) == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(shuffled(8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_data_set_of_many_shards_is_planned_in_no_time() -> None:
    order = Order(sizes=(10_000,) * 100_000, seed=0, round_size=8192)
    assert sum(piece.last - piece.first for round in range(99) for piece in pieces(order, round, 0, 8192)) == 811_008


def test_parts_differ_by_one_at_most() -> None:
    assert parts(3, 13, 4) == [(3, 5), (5, 8), (8, 10), (10, 13)]


def test_check_prints_the_arithmetic() -> None:
    check(12, world=3)
    with pytest.raises(InputError, match=r"round of 100 .* 3 ranks \(100 = 33 x 3 \+ 1\): use 99"):
        check(100, world=3)
