"""The plan, with ranks and workers simulated."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from naign.data.order import (
    LANES,
    Order,
    parts,
    pieces,
    rank_rows,
    shuffled,
    spread,
)

LARGER = some.lists(some.integers(1, 70), min_size=1, max_size=9).map(tuple)
SEEDS = some.integers(-(2**63), 2**64 - 1)


def listed(
    order,
    round,
    start,
    stop,
):
    found = []
    for piece in pieces(order, round, start, stop):
        for sample in range(piece.first, piece.last):
            found.append((piece.epoch, piece.shard, sample))
    return found


def every(sizes, epoch):
    found = []
    for shard, size in enumerate(sizes):
        found += [(epoch, shard, sample) for sample in range(size)]
    return found


@given(
    LARGER,
    SEEDS,
    some.integers(1, 200),
    some.integers(1, 3),
    some.integers(1, 40),
)
def test_every_image_comes_exactly_once_an_epoch(
    sizes,
    seed,
    size,
    epochs,
    lanes,
):
    order = Order(
        sizes=sizes,
        seed=seed,
        round_size=size,
        lanes=lanes,
    )
    rounds = -(-epochs * order.total // size)
    images = Counter()
    for round in range(rounds):
        images.update(
            listed(
                order,
                round,
                0,
                size,
            )
        )
    assert sum(images.values()) == rounds * size
    for epoch in range(epochs):
        for sample in every(sizes, epoch):
            assert images[sample] == 1


@given(LARGER, SEEDS, some.data())
def test_a_round_does_not_depend_on_ranks_and_parts(sizes, seed, data):
    world = data.draw(some.integers(1, 6))
    count = data.draw(some.integers(1, 4))
    size = data.draw(some.integers(1, 40)) * world
    round = data.draw(some.integers(0, 20))
    order = Order(
        sizes=sizes,
        seed=seed,
        round_size=size,
        lanes=data.draw(some.integers(1, 40)),
    )
    whole = listed(order, round, 0, size)
    assert len(whole) == size
    found = []
    for rank in range(world):
        for start, stop in parts(*rank_rows(size, rank, world), count):
            found += listed(order, round, start, stop)
    assert found == whole


@pytest.mark.parametrize("width", [1, 7, 24, 64])
@pytest.mark.parametrize("count", [1, 80, 90, 128])
def test_any_so_many_numbers_lie_evenly_over_the_range(count, width):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for begin in range(count - width + 1):
        part = order[begin : begin + width]
        tenths = np.bincount(part * 10 // count, minlength=10)
        assert tenths.max() <= -(-width // 10) + 2
        assert width < 40 or tenths.min() >= 1


@pytest.mark.parametrize(
    "sizes, shards_a_class, size, mean, most",
    [
        (
            (130,) * 10,
            1,
            256,
            0.17,
            0.25,
        ),
        (
            (1000,) * 10,
            1,
            512,
            0.13,
            0.17,
        ),
        (
            (300,) * 1000,
            100,
            2048,
            0.16,
            0.22,
        ),
    ],
)
def test_rounds_of_shards_sorted_by_class_are_mixed(
    sizes,
    shards_a_class,
    size,
    mean,
    most,
):
    order = Order(
        sizes=sizes,
        seed=0,
        round_size=size,
        lanes=LANES,
    )
    shares = []
    for round in range(min(150, 5 * order.total // size)):
        counts = Counter()
        for piece in pieces(order, round, 0, size):
            counts[piece.shard // shards_a_class] += piece.last - piece.first
        shares.append(max(counts.values()) / size)
    assert np.mean(shares) < mean
    assert max(shares) < most


def test_the_order_of_shards_differs_by_epoch_and_seed_and_never_changes():
    assert shuffled(8, 0, 0) == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            orders.add(tuple(shuffled(8, seed, epoch)))
    assert len(orders) == 9
