"""The pool is the same for every world size, and each image learns the id of the sample it shall pull."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from naign.config import Config, check, differences
from naign.match import nearest, pool
from naign.match.exchange import Ranks
from naign.match.matcher import MatchConfig, check_groups, match_round
from naign.match.pool import Pool, block_range
from tests.match.problems import draw
from tests.refused import refused

TABLE = draw(
    0,
    700,
    1,
    4,
    4,
)
IMAGES = draw(
    1,
    90,
    1,
    4,
    4,
)


def match_table(images=IMAGES, table=TABLE, **setting):
    """The match of images in a pool that is a table."""
    return match_round(images, table.__getitem__, configured(len(images), len(table), **setting))


def configured(images, pool, *, block=256, **setting):
    return MatchConfig(
        ratio=pool / images,
        round=images,
        block=block,
        **setting,
    )


def exact(images, table):
    queries = images.flatten(1).double()
    pool = table.flatten(1).double()
    return (queries[:, None] - pool).square().sum(2).numpy()


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize(
    "size, block",
    [
        (1001, 100),
        (99, 100),
        (5, 1),
    ],
)
def test_ranks_share_the_pool_in_whole_blocks(world, size, block):
    ranges = [block_range(size, block, rank, world) for rank in range(world)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    for before, after in pairwise(ranges):
        assert before[1] == after[0]
    for first, last in ranges:
        if first < last:
            assert first % block == 0
    assert max(last - first for first, last in ranges) <= -(-size // block // world) * block + block


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [200, 111, 71, 40])
def test_every_rank_samples_equally_often_in_each_part_of_the_pool(world, size, monkeypatch):
    """Sampling may be collective: else a rank would wait for the others for ever."""
    monkeypatch.setattr(pool, "HELD_ROWS", 20)
    longest = 0
    for rank in range(world):
        first, last = block_range(size, 10, rank, world)
        longest = max(longest, last - first)
    counts = []
    for rank in range(world):
        samples = []

        def sample(ids, samples=samples):
            samples.append(len(ids))
            return torch.zeros(len(ids), 1)

        ranks = Ranks(rank=rank, world=world)
        part = Pool(
            0,
            size,
            10,
            sample,
            lambda: None,
            dims=1,
            ranks=ranks,
        )
        blocks = part.blocks()
        sampled = []
        for low in range(0, longest, blocks.size):
            blocks.make(min(low, blocks.rows), min(low + blocks.size, blocks.rows))
            sampled.append(len(samples))
        counts.append(sampled)
    for sampled in counts:
        assert sampled == counts[0]
    assert counts[0][-1] == -(-longest // 10)


def test_the_pool_is_held_in_parts_of_whole_blocks(monkeypatch):
    distances, ids = nearest(IMAGES.flatten(1), TABLE.flatten(1), 0)
    made = []

    def sample(ids):
        made.append(ids)
        return TABLE[ids]

    monkeypatch.setattr(pool, "HELD_ROWS", 120)
    match = match_round(IMAGES, sample, configured(90, 700, block=50))
    assert torch.equal(match.ids, ids)
    assert torch.equal(match.distances, distances)
    for block in made:
        assert int(block[0]) % 50 == 0
        assert len(block) == 50


def test_what_is_reported_of_a_match():
    match = match_table()
    distances = exact(IMAGES, TABLE).min(1)
    assert match.values["match/distance"] == pytest.approx(distances.mean())
    assert match.values["match/distance_p10"] == pytest.approx(np.quantile(distances, 0.1))
    assert match.values["match/used"] == len(match.ids.unique()) / 90
    assert match.values["match/measured"] >= 1


def test_an_empty_pool_is_refused():
    with refused("match.ratio"):
        check(Config(match=MatchConfig(ratio=0)))


def test_the_ratio_may_not_change_within_a_run():
    other = Config()
    other.match.ratio = 2.0
    assert differences(Config(), other) == ["match.ratio: 10.0 there, 2.0 now"]


@pytest.mark.parametrize(
    "group, world, message",
    [
        (40, 1, r"match.group=40 does not divide match.round=96: choose a divisor"),
        (16, 4, r"match.group=16 neither divides the 24 images a round of one of 4 ranks, nor is a multiple"),
        (48, 3, "match.group=48 neither divides the 32 images"),
    ],
)
def test_groups_that_do_not_fit_are_refused(group, world, message):
    with refused(message):
        check_groups(MatchConfig(round=96, group=group), world)


@pytest.mark.parametrize("group, world", [(0, 3), (96, 4), (48, 4), (24, 4), (6, 4), (96, 1), (4, 1)])
def test_groups_that_fit_are_allowed(group, world):
    check_groups(MatchConfig(round=96, group=group), world)
