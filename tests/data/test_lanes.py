"""Rounds of shards that are sorted by class, as others wrote them."""

import tarfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from naign.data import reader
from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.loader import Stream, read_split
from naign.data.order import BLOCK, pieces
from naign.data.reader import BLOCKS_AHEAD
from naign.errors import InputError
from naign.storage.local import LocalStore
from naign.storage.store import open_store
from tests.data.numbered import add
from tests.proxy import FaultProxy

CLASSES, EACH, SHARDS = 10, 600, 40


@pytest.fixture(scope="module")
def sorted_by_class(tmp_path_factory: pytest.TempPathFactory) -> str:
    """6,000 images in 40 shards, every class in shards of its own."""
    path, rng, number = tmp_path_factory.mktemp("sorted"), np.random.default_rng(0), 0
    for shard in range(SHARDS):
        with tarfile.open(path / f"{shard:05d}.tar", "w") as tar:
            for _ in range(CLASSES * EACH // SHARDS):
                image = rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)
                add(tar, f"{number:06d}.png", encode(image, "png"))
                add(tar, f"{number:06d}.cls", b"%d" % (number // EACH))
                number += 1
    assert not index(str(path), progress=False).dealt
    return str(path)


@pytest.fixture
def remote(sorted_by_class: str, bucket: str) -> str:
    """The same in S3."""
    store = open_store(f"{bucket}/sorted")
    for file in Path(sorted_by_class).iterdir():
        store.put(file.name, file.read_bytes())
    return store.path


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


@pytest.mark.slow
def test_no_class_is_a_fifth_of_a_round_by_default(sorted_by_class: str) -> None:
    labels, keys, _ = rounds(sorted_by_class, 3, 2000)
    assert Counter(keys).most_common(1)[0][1] == 1 and len(keys) == 6000
    assert max(Counter(found).most_common(1)[0][1] for found in labels) < 0.2 * 2000
    stored, _, _ = rounds(sorted_by_class, 3, 2000, shuffle=1)
    assert max(Counter(found).most_common(1)[0][1] for found in stored) > 0.2 * 2000


def test_mixing_reads_hardly_more_bytes(sorted_by_class: str) -> None:
    assert rounds(sorted_by_class, 6, 2000)[2] < 1.3 * rounds(sorted_by_class, 6, 2000, shuffle=1)[2]


def test_what_lies_together_is_one_request(sorted_by_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[str](), LocalStore.read

    def counted(self: LocalStore, name: str, *rest: Any, **more: Any) -> bytes:
        asked.append(name)
        return read(self, name, *rest, **more)

    monkeypatch.setattr(LocalStore, "read", counted)
    found = {}
    for held in (reader.HELD, 0):
        monkeypatch.setattr(reader, "HELD", held)
        asked.clear()
        keys = rounds(sorted_by_class, 3, 2000)[1]
        found[held] = keys, sum(name.endswith(".tar") for name in asked)
    (keys, few), (same, many) = found.values()
    assert keys == same and many > 375 and few < 0.6 * many  # and some of the next epoch


def test_requests_of_a_rank_are_those_of_its_blocks_and_tables(remote: str, proxy: FaultProxy) -> None:
    size, rounds_read, world = 1600, 12, 4
    config = DataConfig(path=remote)
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


def small_shards(path: Path, shards: int, each: int, side: int = 4) -> None:
    rng, number = np.random.default_rng(0), 0
    path.mkdir()
    for shard in range(shards):
        with tarfile.open(path / f"{shard:05d}.tar", "w") as tar:
            for _ in range(each):
                add(tar, f"{number:06d}.png", encode(rng.integers(0, 256, (1, side, side), dtype=np.uint8), "png"))
                number += 1
    index(str(path), progress=False)


def test_looking_ahead_is_bounded_where_shards_are_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(tmp_path / "tiny", 40, 1)
    asked, read = list[str](), LocalStore.read

    def counted(self: LocalStore, name: str, *rest: Any, **more: Any) -> bytes:
        asked.append(name)
        return read(self, name, *rest, **more)

    monkeypatch.setattr(LocalStore, "read", counted)
    for shuffle in (3, 128):
        asked.clear()
        config = DataConfig(path=str(tmp_path / "tiny"), shuffle=shuffle)
        with Stream(config, seed=1, round_size=32, prefetch=False) as stream:
            assert len(set(stream.take(0).keys)) == 32
        assert len(asked) < 400


def taken_until_refused(path: Path, message: str) -> int:
    """Rounds of 64 that were sound before the error."""
    with Stream(DataConfig(path=str(path), shuffle=4), seed=1, round_size=64, prefetch=False) as stream:
        for round in range(12):
            try:
                stream.take(round)
            except InputError as error:
                assert message in str(error)
                return round
    return 12


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_an_error_comes_in_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    small_shards(tmp_path / "set", 12, 64, 32)
    file = tmp_path / "set/00005.tar"
    if harm == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) * 2 // 3] ^= 1
        file.write_bytes(data)
    message = "no such file" if harm == "missing" else "the SHA-256 of bytes"
    found = {}
    for held in (0, reader.HELD):
        monkeypatch.setattr(reader, "HELD", held)
        found[held] = taken_until_refused(tmp_path / "set", message)
    assert len(set(found.values())) == 1 and 0 < found[0] < 12
