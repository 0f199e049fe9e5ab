"""The pool is the same for every world size, and each image learns its nearest sample's id."""

import pytest
import torch

from pipeline.errors import InputError
from pipeline.match.matcher import MatchConfig, block_range, match_round
from pipeline.match.nearest import nearest


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("pool", "block"), [(1000, 100), (1001, 100), (99, 100), (5, 1), (4096, 512)])
def test_ranks_share_the_pool_in_whole_blocks(world, pool, block):
    ranges = [block_range(pool, block, rank, world) for rank in range(world)]
    assert ranges[0][0] == 0 and ranges[-1][1] == pool
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    assert all(first % block == 0 for first, last in ranges if first < last)
    assert max(last - first for first, last in ranges) <= -(-pool // block // world) * block + block


def test_each_image_gets_its_nearest_sample():
    table = torch.randn(700, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.randn(90, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    asked = []

    def sample(ids):
        asked.append(len(ids))
        return table[ids]

    match = match_round(images, sample, pool=700, block=256, rank=0, world=1)
    distances, ids = nearest(images.flatten(1), table.flatten(1), 0)
    assert torch.equal(match.ids, ids) and torch.equal(match.distances, distances)
    assert asked == [256, 256, 188]
    assert set(match.seconds) == {"generate", "search"}


@pytest.mark.parametrize("setting", [{"ratio": 0}, {"round": 0}, {"block": 0}, {"latents": "cauchy"}])
def test_nonsense_is_refused(setting):
    with pytest.raises(InputError, match="match."):
        MatchConfig(**setting)
