"""Rounds of shards that are sorted by class, as others wrote them."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from naign.data import reader
from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.indexing import index
from naign.data.loader import Stream, read_split
from naign.data.order import BLOCK, pieces
from naign.storage.store import open_store
from tests.data.numbered import add, noise, streams_of
from tests.refused import refused

CLASSES = 10
EACH = 600
SHARDS = 40


def write_shards(
    path,
    shards,
    each,
    side,
):
    """Images of noise, every class in shards of its own."""
    path.mkdir()
    for shard in range(shards):
        with tarfile.open(path / f"{shard:05d}.tar", "w") as tar:
            for number in range(each):
                image = noise((shard, number), (1, side, side))
                add(tar, f"{shard:03d}{number:03d}.png", encode(image, "png"))
                add(tar, f"{shard:03d}{number:03d}.cls", b"%d" % (shard * CLASSES // shards))
    assert not index(str(path)).dealt


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """6,000 images in 40 shards."""
    path = tmp_path_factory.mktemp("sorted") / "set"
    write_shards(path, SHARDS, CLASSES * EACH // SHARDS, 8)
    return str(path)


@pytest.fixture
def remote(by_class, bucket):
    """The same in S3."""
    store = open_store(f"{bucket}/sorted")
    for file in Path(by_class).iterdir():
        store.put(file.name, file.read_bytes())
    return store.path


def rounds(
    path,
    count,
    size,
    world=1,
    **settings,
):
    """Labels by round, keys, and bytes read."""
    labels = []
    keys = []
    read = 0
    config = DataConfig(path=path, **settings)
    with streams_of(config, seed=1, each=size, world=world) as streams:
        for round in range(count):
            labels.append([])
            for stream in streams:
                taken = stream.take(round)
                labels[-1] += taken.labels.tolist()
                keys += taken.keys
                read += taken.tally.bytes
    return labels, keys, read


def most(labels):
    """How often the most frequent class occurs."""
    return max(Counter(labels).values())


@pytest.mark.slow
def test_no_class_is_a_fifth_of_a_round_by_default(by_class):
    mixed, keys, read = rounds(by_class, 3, 2000)
    assert len(set(keys)) == len(keys) == 6000
    assert max(map(most, mixed)) < 0.2 * 2000
    stored, _, least = rounds(
        by_class,
        3,
        2000,
        shuffle=1,
    )
    assert max(map(most, stored)) > 0.2 * 2000
    assert read < 1.3 * least


def test_requests_of_a_rank_are_those_of_its_blocks_and_tables(remote, proxy):
    size = 1600
    count = 12
    with Stream(
        DataConfig(path=remote),
        seed=1,
        round_size=size,
        rank=1,
        world=4,
    ) as stream:
        found = []
        for round in range(count):
            found += pieces(stream.order, round, size // 4, size // 2)
        shards = len({piece.shard for piece in found})
        assert len(found) <= count * (size / 4 / BLOCK + 2 * SHARDS)
        proxy.requests.clear()
        for round in range(count):
            stream.take(round)
    made = Counter((method, path.endswith(".tar")) for method, path in proxy.requests)
    assert made["GET", True] <= len(found) + 2 * reader.BLOCKS_AHEAD
    assert shards <= made["GET", False] <= SHARDS  # each page table once, read ahead too
    assert made["HEAD", True] + made["HEAD", False] <= 2 * SHARDS


def test_a_part_of_a_split_is_of_all_classes(by_class):
    _, labels = read_split(by_class, "train", limit=1000)
    counts = np.bincount(labels)
    assert len(counts) == CLASSES
    assert 30 < counts.min() <= counts.max() < 200


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_an_error_comes_in_its_turn(tmp_path, harm):
    write_shards(tmp_path / "set", 12, 64, 32)
    file = tmp_path / "set/00005.tar"
    message = "no such file"
    if harm == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) * 2 // 3] ^= 1
        file.write_bytes(data)
        message = "the SHA-256 of what follows byte"
    config = DataConfig(path=f"{tmp_path}/set", shuffle=4)
    with Stream(config, seed=1, round_size=64) as stream:
        round = 0
        with refused(message):
            while round < 12:
                stream.take(round)
                round += 1
    assert 0 < round < 12
