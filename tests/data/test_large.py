"""Data sets of a hundred thousand shards: what index.json takes, and the plan of a thousand ranks."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from naign.data.dataset import DataConfig
from naign.data.format.manifest import INDEX, Manifest, Shard, shard_problems
from naign.data.loader import Stream
from naign.data.order import Order, pieces, rank_rows

SHARDS, EACH = 100_000, 10_000


@pytest.mark.slow
def test_a_billion_images_are_read_from_one_index(tmp_path: Path) -> None:
    names = [f"{number:08d}.tar" for number in range(SHARDS)]
    digests = (hashlib.sha256(name.encode()).hexdigest() for name in names)
    shards = [
        Shard(name=name, samples=EACH, bytes=EACH * 100_000, pages=digest)
        for name, digest in zip(names, digests, strict=True)
    ]
    large = replace(Manifest.of("large", "image", (3, 0, 0), (), {"train": shards}), dealt=False)
    (tmp_path / INDEX).write_bytes(large.dump())
    assert (tmp_path / INDEX).stat().st_size < 20e6
    begin = time.process_time()
    found = Manifest.load(str(tmp_path))
    assert time.process_time() - begin < 5  # 0.8 seconds on an idle core
    assert found == large
    with Stream(DataConfig(path=str(tmp_path), size="64"), seed=0, round_size=1 << 16, rank=5, world=1024) as stream:
        assert stream.order.total == 10**9 and stream.order.orders[0].lanes == 128


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../x.tar", "hidden, or leads out"),
        ("name", "", "not that of a file"),
        ("name", "a\x01b", "not that of a file"),
        ("name", "a\x00b", "not that of a file"),
        ("samples", 0, "0 samples in"),
        ("samples", -1, "-1 samples in"),
        ("bytes", 5, "5 bytes cannot hold"),
    ],
)
def test_a_shard_of_nonsense_is_named(field: str, value: object, message: str) -> None:
    shard = Shard(name="a.tar", samples=2, bytes=4096, pages="0" * 64)
    assert not list(shard_problems(shard))
    assert message in next(shard_problems(replace(shard, **{field: value})))


LAST = 7629
"""The round that goes on into the next epoch."""


@pytest.mark.parametrize(("lanes", "rounds"), [(1, [LAST]), (128, [5000, LAST])])
def test_the_plan_of_a_thousand_ranks_holds_each_image_once(lanes: int, rounds: list[int]) -> None:
    order = Order(sizes=(EACH,) * SHARDS, seed=3, round_size=1 << 17, lanes=lanes)
    for round in rounds:
        seen = list[np.ndarray[tuple[int], np.dtype[np.int64]]]()
        for rank in range(1024):
            found = pieces(order, round, *rank_rows(order.round_size, rank, 1024))
            assert sum(piece.last - piece.first for piece in found) == 128
            seen += [np.arange(p.first, p.last) + (p.shard + SHARDS * p.epoch) * EACH for p in found]
        assert len(np.unique(np.concatenate(seen))) == order.round_size
