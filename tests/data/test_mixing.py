"""Rounds of shards that are sorted by class, as others wrote them, from a real S3 server."""

import tarfile
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from pipeline.data import reader
from pipeline.data.dataset import DataConfig
from pipeline.data.decode import encode
from pipeline.data.format.indexing import index
from pipeline.data.format.manifest import Manifest
from pipeline.data.loader import Stream, read_split
from pipeline.data.order import BLOCK, pieces
from pipeline.data.reader import BLOCKS_AHEAD
from pipeline.storage.s3 import S3Store
from pipeline.storage.store import open_store
from tests.data.numbered import add
from tests.proxy import FaultProxy

CLASSES, EACH, SHARDS = 10, 600, 40


@pytest.fixture
def sorted_by_class(bucket: str) -> str:
    """6,000 images in 40 shards, every class in shards of its own."""
    path, rng = f"{bucket}/sorted", np.random.default_rng(0)
    store, number = open_store(path), 0
    for shard in range(SHARDS):
        with store.write(f"{shard:05d}.tar") as target, tarfile.open(fileobj=target, mode="w|") as tar:  # type: ignore[call-overload]
            for _ in range(CLASSES * EACH // SHARDS):
                image = rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)
                add(tar, f"{number:06d}.png", encode(image, "png"))
                add(tar, f"{number:06d}.cls", b"%d" % (number // EACH))
                number += 1
    assert not index(path, progress=False).dealt
    return path


def rounds(path: str, count: int, size: int, world: int = 1, **settings: Any) -> tuple[list[list[int]], list[str], int]:
    """Labels by round, keys, and bytes read."""
    labels, keys, read = list[list[int]](), list[str](), 0
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                Stream(DataConfig(path=path, **settings), seed=1, round_size=size, rank=rank, world=world)
            )
            for rank in range(world)
        ]
        for round in range(count):
            taken = [stream.take(round) for stream in streams]
            labels.append([label for part in taken for label in part.labels.tolist()])
            keys += [key for part in taken for key in part.keys]
            read += sum(part.tally.bytes for part in taken)
    return labels, keys, read


def test_no_class_is_a_fifth_of_a_round_by_default(sorted_by_class: str) -> None:
    labels, keys, _ = rounds(sorted_by_class, 3, 2000)
    assert Counter(keys).most_common(1)[0][1] == 1 and len(keys) == 6000
    assert max(Counter(found).most_common(1)[0][1] for found in labels) < 0.2 * 2000
    stored, _, _ = rounds(sorted_by_class, 3, 2000, shuffle=1)
    assert max(Counter(found).most_common(1)[0][1] for found in stored) > 0.2 * 2000


def test_mixing_reads_hardly_more_bytes(sorted_by_class: str) -> None:
    assert rounds(sorted_by_class, 6, 2000)[2] < 1.3 * rounds(sorted_by_class, 6, 2000, shuffle=1)[2]


def test_what_lies_together_is_one_request(sorted_by_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[str](), S3Store.read

    def counted(self: S3Store, name: str, *rest: Any, **more: Any) -> bytes:
        asked.append(name)
        return read(self, name, *rest, **more)

    monkeypatch.setattr(S3Store, "read", counted)
    found = {}
    for held in (reader.HELD, 0):
        monkeypatch.setattr(reader, "HELD", held)
        asked.clear()
        keys = rounds(sorted_by_class, 3, 2000)[1]
        found[held] = keys, sum(name.endswith(".tar") for name in asked)
    (keys, few), (same, many) = found.values()
    assert keys == same and many > 375 and few < 0.6 * many  # and some of the next epoch


def test_requests_of_a_rank_are_those_of_its_blocks_and_tables(sorted_by_class: str, proxy: FaultProxy) -> None:
    size, rounds_read, world = 1600, 12, 4
    config = DataConfig(path=sorted_by_class)
    with Stream(config, seed=1, round_size=size, rank=1, world=world, prefetch=False) as stream:
        (order,) = stream.order.orders
        found = [
            piece for round in range(rounds_read) for piece in pieces(order, round, size // world, 2 * size // world)
        ]
        blocks, shards = len(found), len({piece.shard for piece in found})
        assert blocks <= rounds_read * (size / world / BLOCK + 2 * SHARDS)
        proxy.requests.clear()
        for round in range(rounds_read):
            stream.take(round)
    asked = Counter((method, path.endswith(".tar")) for method, path in proxy.requests)
    assert asked["GET", True] <= blocks + BLOCKS_AHEAD
    assert shards <= asked["GET", False] <= SHARDS  # each page table once, read ahead too
    assert asked["HEAD", True] + asked["HEAD", False] <= 2 * SHARDS
    assert proxy.counts["bytes"] > 0


def test_ranks_and_workers_share_mixed_rounds(sorted_by_class: str) -> None:
    plain = rounds(sorted_by_class, 2, 1000)[1]
    assert rounds(sorted_by_class, 2, 1000, world=4, workers=3)[1] == plain


def test_a_part_of_a_split_is_of_all_classes(sorted_by_class: str) -> None:
    _, labels = read_split(sorted_by_class, "train", limit=1000)
    counts = np.bincount(labels)
    assert len(counts) == CLASSES and counts.max() < 200 and counts.min() > 30
    assert Manifest.load(sorted_by_class).dealt is False
