"""The pool is the same for every world size, and each image learns the id of the sample it shall pull."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.config import Config, check, differences
from naign.match import assign, matcher, nearest, pool
from naign.match.exchange import Ranks
from naign.match.matcher import MatchConfig, match_round
from naign.match.pool import Pool, block_range
from tests.match.problems import draw
from tests.refused import refused

TABLE = draw(0, 700, 1, 4, 4)
IMAGES = draw(1, 90, 1, 4, 4)


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


def greedy(distances):
    """For each row the column that it gets where the least pair is taken, again and again."""
    found = {}
    for pair in np.argsort(distances, axis=None, kind="stable"):
        row, column = divmod(int(pair), distances.shape[1])
        if row not in found and column not in found.values():
            found[row] = column
    return [found[row] for row in range(len(distances))]


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
            size,
            10,
            sample,
            lambda: None,
            dims=1,
            ranks=ranks,
            keep=False,
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


@pytest.mark.parametrize("block", [50, 256, 900])
def test_a_share_is_measured_on_the_first_samples_of_the_pool(block, monkeypatch):
    monkeypatch.setattr(matcher, "PROBE", 320)
    match = match_table(reject_share=0.4, block=block)
    distances = exact(IMAGES, TABLE)
    near = distances.min(0)
    probe = np.sort(near[: min(700, -(-320 // block) * block)])
    threshold = probe[int(0.4 * len(probe))]
    assert match.values["match/reject"] == pytest.approx(np.sqrt(threshold))
    assert match.values["match/rejected"] == pytest.approx((near < threshold).mean())
    left = np.where(near >= threshold, distances, np.inf)
    assert match.ids.tolist() == left.argmin(1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    images=st.integers(1, 25),
    more=st.integers(0, 30),
    levels=st.integers(1, 6),
    neighbours=st.integers(1, 5),
)
def test_one_to_one_takes_the_least_pair_again_and_again(
    seed,
    images,
    more,
    levels,
    neighbours,
):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(levels, (images, 1, 1, 3), generator=generator).float()
    table = torch.randint(levels, (images + more, 1, 1, 3), generator=generator).float()
    distances = exact(queries, table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "NEIGHBOURS", neighbours)  # so few that images ask again
        match = match_table(
            queries,
            table,
            assignment="one_to_one",
            block=8,
        )
    assert match.ids.tolist() == greedy(distances)
    assert match.distances.tolist() == pytest.approx(distances[range(images), match.ids].tolist())
    assert match.values["match/used"] == 1


def test_images_that_all_want_the_same_samples_ask_few_times(monkeypatch):
    """As with a network that is not trained, whose samples lie close together: all images put them in one order."""
    searches = []
    search = matcher.search

    def counted(*given, **more):
        searches.append(given)
        return search(*given, **more)

    monkeypatch.setattr(matcher, "search", counted)
    images = draw(2, 300, 1, 1, 6).abs()
    table = 0.01 * draw(3, 320, 1, 1, 1).expand(-1, 1, 1, 6)
    match = match_table(images, table, assignment="one_to_one")
    assert match.ids.tolist() == greedy(exact(images, table))
    assert len(searches) <= 6


def test_what_is_reported_of_a_match():
    match = match_table()
    distances = exact(IMAGES, TABLE).min(1)
    assert match.values["match/distance"] == pytest.approx(distances.mean())
    assert match.values["match/distance_p10"] == pytest.approx(np.quantile(distances, 0.1))
    assert match.values["match/used"] == len(match.ids.unique()) / 90
    assert match.values["match/rejected"] == 0
    assert match.values["match/measured"] >= 1
    seconds = {key for key in match.values if key.startswith("seconds/")}
    assert seconds == {f"seconds/{part}" for part in ("generate", "search", "exchange")}
    assert match.described.startswith("match: ")


@pytest.mark.parametrize(
    "setting, key",
    [
        ({"ratio": 0}, "match.ratio"),
        ({"assignment": "fair"}, "match.assignment is 'fair': choose one of free, one_to_one"),
        (
            {"assignment": "one_to_one", "ratio": 0.5},
            "match.assignment=one_to_one gives no two images one sample, .* match.ratio=0.5",
        ),
        ({"reject_share": 1.0}, "match.reject_share"),
        ({"assignment": "one_to_one", "reject_share": 0.1}, "match.reject_share needs match.assignment=free"),
    ],
)
def test_nonsense_is_refused(setting, key):
    config = Config(match=MatchConfig(**setting))
    with refused(key):
        check(config)


def test_the_method_may_change_within_a_run_and_the_assignment_may_not():
    other = Config()
    other.match.method = "flat"
    assert differences(Config(), other) == []
    other.match.assignment = "one_to_one"
    assert differences(Config(), other) == ["match.assignment: free there, one_to_one now"]
