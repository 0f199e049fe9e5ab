"""Data sets of a hundred thousand shards: what index.json takes, and the plan of a thousand ranks."""

import hashlib
import time

import numpy as np
import pytest

from naign.data.dataset import DataConfig
from naign.data.format.manifest import INDEX, Manifest, Shard, Split
from naign.data.loader import Stream
from naign.data.order import Order, pieces, rank_rows

SHARDS = 100_000
EACH = 10_000
LAST = 7629
"""The round that goes on into the next epoch."""


@pytest.mark.slow
def test_a_billion_images_are_read_from_one_index(tmp_path):
    shards = []
    for number in range(SHARDS):
        name = f"{number:08d}.tar"
        digest = hashlib.sha256(name.encode()).hexdigest()
        shards.append(
            Shard(
                name=name,
                samples=EACH,
                bytes=EACH * 100_000,
                pages=digest,
            )
        )
    splits = {"train": Split.of(shards)}
    large = Manifest(
        name="large",
        kind="image",
        shape=(3, 0, 0),
        dtype="uint8",
        labels=(),
        splits=splits,
        dealt=False,
    )
    (tmp_path / INDEX).write_bytes(large.dump())
    assert (tmp_path / INDEX).stat().st_size < 20e6
    begin = time.process_time()
    assert Manifest.load(str(tmp_path)) == large
    assert time.process_time() - begin < 5  # 0.8 seconds on an idle core
    config = DataConfig(path=str(tmp_path), size="64")
    with Stream(
        config,
        seed=0,
        round_size=1 << 16,
        rank=5,
        world=1024,
    ) as stream:
        assert stream.order.total == 10**9
        assert stream.order.lanes == 128


@pytest.mark.parametrize("lanes, rounds", [(1, [LAST]), (128, [5000, LAST])])
def test_the_plan_of_a_thousand_ranks_holds_each_image_once(lanes, rounds):
    order = Order(
        sizes=(EACH,) * SHARDS,
        seed=3,
        round_size=1 << 17,
        lanes=lanes,
    )
    for round in rounds:
        seen = []
        for rank in range(1024):
            found = pieces(order, round, *rank_rows(order.round_size, rank, 1024))
            assert sum(piece.last - piece.first for piece in found) == 128
            for piece in found:
                start = (piece.shard + SHARDS * piece.epoch) * EACH
                seen.append(np.arange(start + piece.first, start + piece.last))
        assert len(np.unique(np.concatenate(seen))) == order.round_size
