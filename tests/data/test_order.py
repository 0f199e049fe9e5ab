"""The plan, with ranks and workers simulated."""

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from pipeline.data.order import SHUFFLE, Order, _draws, _epoch, check, parts, pieces, rank_rows, shuffled, spans
from pipeline.errors import InputError

SIZES = some.lists(some.integers(1, 9), min_size=1, max_size=7).map(tuple)
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


@given(SIZES, SEEDS, some.integers(1, 12), some.integers(1, 4), some.integers(1, 9), some.integers(1, 5))
def test_every_image_comes_exactly_once_an_epoch(
    sizes: tuple[int, ...], seed: int, size: int, epochs: int, shuffle: int, block: int
) -> None:
    order = Order(sizes=sizes, seed=seed, round_size=size, shuffle=shuffle, block=block)
    rounds = -(-epochs * order.total // size)
    found = Counter(sample for round in range(rounds) for sample in listed(order, round, 0, size))
    assert sum(found.values()) == rounds * size
    assert {sample: n for sample, n in found.items() if sample[0] < epochs} == Counter(
        sample for epoch in range(epochs) for sample in every(sizes, epoch)
    )


@given(SIZES, SEEDS, some.sampled_from(["wrap", "drop", "pad"]), some.booleans(), some.data())
def test_a_round_does_not_depend_on_ranks_and_workers(
    sizes: tuple[int, ...], seed: int, tail: str, resampled: bool, data: some.DataObject
) -> None:
    world, workers, share, round = (data.draw(some.integers(*ends)) for ends in ((1, 6), (0, 3), (1, 4), (0, 20)))
    mixed = {"shuffle": data.draw(some.integers(1, 9)), "block": data.draw(some.integers(1, 5))}
    order = Order(sizes=sizes, seed=seed, round_size=share * world, tail=tail, resampled=resampled, **mixed)
    if tail == "drop" and order.total < order.round_size:
        return
    whole = listed(order, round, 0, order.round_size)
    assert len(whole) == order.round_size
    assert read(order, round, world, workers) == whole


@given(
    some.lists(some.integers(1, 40), min_size=1, max_size=9).map(tuple),
    SEEDS,
    some.integers(2, 12),
    some.integers(1, 9),
)
def test_blocks_are_taken_in_turn_from_lanes_of_equal_length(
    sizes: tuple[int, ...], seed: int, shuffle: int, block: int
) -> None:
    order = Order(sizes=sizes, seed=seed, round_size=sum(sizes), shuffle=shuffle, block=block)
    blocks = [
        [(0, shard, sample) for sample in range(first, min(first + block, sizes[shard]))]
        for shard in shuffled(len(sizes), seed)
        for first in range(0, sizes[shard], block)
    ]
    lanes = [[blocks[i] for i in lane] for lane in np.array_split(np.arange(len(blocks)), min(shuffle, len(blocks)))]
    taken = [lane[turn] for turn in range(len(lanes[0])) for lane in lanes if turn < len(lane)]
    assert listed(order, 0, 0, order.round_size) == [sample for block in taken for sample in block]


@pytest.mark.parametrize("classes_of", [lambda shard: shard % 10, lambda shard: shard // 100])
def test_rounds_of_shards_sorted_by_class_are_mixed(classes_of: Callable[[int], int]) -> None:
    order = Order(sizes=(300,) * 1000, seed=0, round_size=2048, shuffle=SHUFFLE, block=16)
    most = 0.0
    for round in range(150):
        counts = Counter[int]()
        for piece in pieces(order, round, 0, 2048):
            counts[classes_of(piece.shard)] += piece.last - piece.first
        most = max(most, max(counts.values()) / 2048)
    assert most < 0.2


@pytest.mark.parametrize("size", [7, 10, 57, 60, 130])
def test_pad_repeats_the_first_images_of_an_epoch(size: int) -> None:
    order = Order(sizes=UNEVEN, seed=3, round_size=size, tail="pad")
    for epoch in range(2):
        found = [s for r in range(order.rounds) for s in listed(order, epoch * order.rounds + r, 0, size)]
        assert Counter(found[: order.total]) == Counter(every(UNEVEN, epoch))
        assert found[order.total :] == (found[: order.total] * 3)[: len(found) - order.total]
    assert order.epochs(2 * order.rounds) == 2


@pytest.mark.parametrize("size", [7, 10, 50, 57])
def test_drop_leaves_out_the_last_images_of_an_epoch(size: int) -> None:
    order = Order(sizes=UNEVEN, seed=3, round_size=size, tail="drop")
    wrapped = Order(sizes=UNEVEN, seed=3, round_size=57)
    for epoch in range(2):
        found = [s for r in range(order.rounds) for s in listed(order, epoch * order.rounds + r, 0, size)]
        assert found == listed(wrapped, epoch, 0, 57)[: 57 // size * size]


def test_resampling_draws_whole_shards_with_replacement() -> None:
    order = Order(sizes=UNEVEN, seed=0, round_size=57, resampled=True)
    epochs = [listed(order, epoch, 0, 57) for epoch in range(400)]
    counts = Counter(shard for epoch in epochs for _, shard, sample in epoch if sample == 0)
    assert all(abs(counts[shard] - counts.total() / 7) < 6 * (counts.total() / 7) ** 0.5 for shard in range(7))
    assert any(len(set(epoch)) < 57 for epoch in epochs)


def test_resampling_draws_no_more_shards_than_it_needs() -> None:
    """A last shard of one image does not make it draw as many shards as there are images."""
    tracemalloc.start()
    order, ends = _epoch((10_000,) * 1000 + (1,), 0, 0, True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order) < 1200 and ends[-1] == 10_000_001 and most < 2**20
    assert order[:5].tolist() == (_draws(5, 0, 0) % np.uint64(1001)).tolist()


def test_what_becomes_of_the_tail_is_said() -> None:
    def said(**more: object) -> str:
        return Order(sizes=UNEVEN, seed=0, round_size=20, **more).describe()  # type: ignore[arg-type]

    assert said() == "each of 57 images once an epoch; a round goes on into the next epoch"
    assert said(tail="drop") == "40 of 57 images once an epoch: drops its last 17"
    assert said(tail="pad") == "each of 57 images an epoch, its first 3 once more"
    assert "replacement" in said(resampled=True)
    assert Order(sizes=(20, 20), seed=0, round_size=10).describe() == "each of 40 images once an epoch of 4 rounds"


def test_the_order_of_shards_differs_by_epoch_and_seed_and_never_changes() -> None:
    assert shuffled(8, 0, 0) == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(shuffled(8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_data_set_of_many_shards_is_planned_in_no_time() -> None:
    order = Order(sizes=(10_000,) * 100_000, seed=0, round_size=8192)
    assert spans(order, 10**6) == [(8, 192_000_000, 192_008_192)]
    assert sum(piece.last - piece.first for round in range(99) for piece in pieces(order, round, 0, 8192)) == 811_008


def test_parts_differ_by_one_at_most() -> None:
    assert parts(3, 13, 4) == [(3, 5), (5, 8), (8, 10), (10, 13)]


def test_check_prints_the_arithmetic() -> None:
    check(Order(sizes=(4,), seed=0, round_size=12), world=3)  # fewer shards than ranks: they share them
    with pytest.raises(InputError, match=r"round of 100 .* 3 ranks \(100 = 33 x 3 \+ 1\): use 99"):
        check(Order(sizes=(4,), seed=0, round_size=100), world=3)
    with pytest.raises(InputError, match=r"data.tail=drop leaves nothing of 4 images in rounds of 12"):
        check(Order(sizes=(4,), seed=0, round_size=12, tail="drop"), world=3)
    with pytest.raises(InputError, match=r"data.tail is 'cut': choose one of wrap, drop, pad"):
        check(Order(sizes=(4,), seed=0, round_size=12, tail="cut"), world=3)
