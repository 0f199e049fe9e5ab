"""The local cache of chunks: what it saves, its limit, many processes, damage, and data that changes."""

import errno
import multiprocessing
import os
import random
import shutil
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from naign.data.cache import CachedStore
from naign.data.dataset import DataConfig
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.format.pages import table_name
from naign.data.format.writer import pack
from naign.data.loader import Stream
from naign.errors import InputError
from naign.storage.retry import Tally
from naign.storage.store import open_store
from tests.data.numbered import numbered
from tests.proxy import FaultProxy

CHUNK = 50_000
IMAGES = 120
SHARD = "train-00001.tar"
SOURCE = numbered(train=IMAGES, shape=(3, 64, 64))

pytestmark = pytest.mark.slow  # together


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("naign.data.cache.CHUNK", CHUNK)
    monkeypatch.setattr("naign.data.reader.REQUEST", 200_000)


@pytest.fixture
def remote(bucket: str) -> str:
    """120 images of 12 KiB in three shards in S3; 1.7 MB."""
    path = f"{bucket}/cached"
    pack(SOURCE, path, shards=3, encoding="npy", progress=False)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def epoch(path: str, folder: Path | str, *, workers: int = 0, epoch: int = 0, gb: float = 1) -> tuple[list[str], Tally]:
    """Keys of an epoch of two rounds, and what it cost; checks the pixels."""
    config = DataConfig(path=path, workers=workers, cache=str(folder), cache_gb=gb)
    keys = list[str]()
    tally = Tally()
    before = set(threading.enumerate())
    with Stream(config, seed=1, round_size=IMAGES // 2, prefetch=False) as stream:
        for number in (2 * epoch, 2 * epoch + 1):
            taken = stream.take(number)
            tally.merge(taken.tally)
            keys += taken.keys
            for key, image in zip(taken.keys, taken.images, strict=True):
                _, expected, _ = SOURCE.splits["train"][int(key[-3:])]
                assert torch.equal(image, torch.from_numpy(expected))
    assert len(set(keys)) == len(keys) == IMAGES
    for thread in set(threading.enumerate()) - before:
        thread.join(30)  # reads ahead: its bytes would count for the next epoch
        assert not thread.is_alive()
    return keys, tally


def cached_store(path: str, folder: Path, limit: int = 10**9) -> CachedStore:
    return CachedStore(open_store(path), Manifest.load(path), str(folder), limit)


def used(folder: Path) -> int:
    """Bytes in the folder, while other processes may be at work in it."""
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_is_not_asked_for_again(remote: str, folder: Path, proxy: FaultProxy, workers: int) -> None:
    keys, tally = epoch(remote, folder, workers=workers)
    assert proxy.counts["bytes"] > 1_500_000
    proxy.counts.clear()
    again, tally = epoch(remote, folder, workers=workers)
    assert again == keys
    assert tally.cached == tally.bytes > 1_500_000
    other, tally = epoch(remote, folder, epoch=1)
    assert other != keys
    assert tally.cached == tally.bytes
    assert proxy.counts["bytes"] < 10_000  # index.json


@pytest.mark.parametrize("code", [errno.EPERM, errno.EROFS])
def test_what_another_user_or_a_volume_that_is_only_read_holds_is_used(
    remote: str, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    keys, _ = epoch(remote, folder)

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.utime", refused)
    again, tally = epoch(remote, folder)
    assert again == keys
    assert tally.cached == tally.bytes > 1_500_000


def test_ranges_are_those_of_the_source(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    source = open_store(remote)
    for name in (SHARD, table_name(SHARD)):
        whole = source.read(name)
        chance = random.Random(0)
        edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, len(whole) - 1, len(whole)]
        places = [place for place in edges if place <= len(whole)]
        places += [chance.randrange(len(whole)) for _ in edges]
        for _ in range(80):
            first, last = sorted(chance.choices(places, k=2))
            assert store.read(name, first, last) == whole[first:last]
        assert store.read(name) == store.read(name, fresh=True) == whole
    assert store.list() == source.list()
    assert store.url("x") == source.url("x")
    size = source.size(SHARD)
    with pytest.raises(InputError, match="truncated"):
        store.read(SHARD, size - 10, size + 10)


def test_only_what_the_manifest_names_is_kept(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    store.put("notes.txt", b"not of the data set")
    assert store.read("notes.txt") == b"not of the data set"
    assert store.read("index.json")
    assert list(folder.iterdir()) == []


def test_a_local_data_set_needs_no_cache(tmp_path: Path, folder: Path) -> None:
    pack(SOURCE, str(tmp_path / "local"), shards=3, encoding="npy", progress=False)
    _, tally = epoch(str(tmp_path / "local"), folder)
    assert tally.cached == 0
    assert not folder.exists()


@pytest.mark.parametrize("limit", [10, CHUNK, 400_000, 100 * CHUNK])
def test_the_limit(remote: str, folder: Path, limit: int) -> None:
    store = cached_store(remote, folder, limit)
    most = 0
    for shard in 2 * Manifest.load(remote).split("train").shards:
        for first in range(0, shard.bytes, CHUNK):
            store.read(shard.name, first, min(first + CHUNK, shard.bytes))
            most = max(most, used(folder))
    assert most <= limit + CHUNK
    assert most >= min(limit - CHUNK - limit // 64, 1_600_000)


def test_what_was_used_least_recently_goes_first(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder, 8 * CHUNK)
    for number in range(10):
        store.read(SHARD, number * CHUNK, (number + 1) * CHUNK)
        store.read(SHARD, 0, CHUNK)  # is in use all the time
        time.sleep(0.01)  # file times are those of the kernel's clock, some milliseconds coarse
    kept = sorted(int(file.name[-6:]) for file in folder.iterdir())
    assert 6 <= len(kept) <= 8
    assert kept == [0, *range(11 - len(kept), 10)]


def reading(path: str, folder: Path, seed: int, answer: Connection) -> None:
    """In a process of its own: read chunks in an order of its own; report the largest size of the folder."""
    most = -1
    try:
        store = cached_store(path, folder, 12 * CHUNK)
        whole = open_store(path).read(SHARD)
        chance = random.Random(seed)
        for _ in range(150):
            first = chance.randrange(len(whole) - 1)
            last = min(len(whole), first + chance.randrange(1, 3 * CHUNK))
            assert store.read(SHARD, first, last) == whole[first:last]
            most = max(most, used(folder))
    finally:
        answer.send(most)


def test_processes_that_share_a_folder(remote: str, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = []
    for seed in range(3):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=reading, args=(remote, folder, seed, there))
        process.start()
        running.append((process, here))
    for process, here in running:
        assert 0 < here.recv() <= (12 + 3) * CHUNK
        process.join(60)
        assert process.exitcode == 0
    assert not list(folder.glob(".*"))


def chunk(folder: Path, path: str, name: str) -> Path:
    """The file of a chunk that holds some of SHARD or its page table."""
    (shard,) = (shard for shard in Manifest.load(path).shards if shard.name == SHARD)
    if name == SHARD:
        return folder / f"{shard.pages}-tar-000003"
    return folder / f"{shard.pages}-000000"


@pytest.mark.parametrize("name", [SHARD, table_name(SHARD)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_chunk_is_found_and_renewed(remote: str, folder: Path, name: str, workers: int) -> None:
    keys, _ = epoch(remote, folder)
    file = chunk(folder, remote, name)
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    again, tally = epoch(remote, folder, workers=workers)
    assert again == keys
    assert tally.reread > 0
    assert 0 < tally.bytes - tally.cached < 1_000_000
    assert file.read_bytes() == sound


@pytest.mark.parametrize("size", [0, CHUNK - 1, CHUNK + 1])
def test_a_chunk_of_another_size_is_fetched_anew(remote: str, folder: Path, size: int) -> None:
    keys, _ = epoch(remote, folder)
    file = chunk(folder, remote, SHARD)
    sound = file.read_bytes()
    file.write_bytes((sound + b"x")[:size])
    again, tally = epoch(remote, folder)
    assert again == keys
    assert tally.reread == 0
    assert tally.bytes - tally.cached == CHUNK
    assert file.read_bytes() == sound


def test_a_shard_that_changes_is_another(remote: str, folder: Path) -> None:
    keys, _ = epoch(remote, folder)
    pack(SOURCE, remote, shards=3, encoding="npy", seed=9, force=True, progress=False)
    other, tally = epoch(remote, folder)  # checks the pixels
    assert other != keys
    assert tally.reread == 0


def test_a_file_in_place_of_the_folder(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match=rf"data.cache '{path}' cannot be made: "):
            epoch(remote, path)


@pytest.mark.parametrize("where", ["os.replace", "pathlib.Path.write_bytes"])
def test_a_folder_that_takes_nothing_stops_nothing(
    remote: str, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, fails)
    _, tally = epoch(remote, folder)
    assert tally.cached == 0
    assert list(folder.iterdir()) == []
    assert f"not kept: {os.strerror(errno.ENOSPC)}" in caplog.text


def test_a_folder_that_is_removed_meanwhile(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    whole = open_store(remote).read(SHARD)
    assert store.read(SHARD, 0, CHUNK) == whole[:CHUNK]
    shutil.rmtree(folder)
    assert store.read(SHARD) == whole


def test_only_what_the_cache_wrote_goes(remote: str, folder: Path) -> None:
    """Also temporary files of killed processes, but not of those that may still write."""
    folder.mkdir()
    for name, age in ((".partial-old", 7200), (".partial-new", 60), ("thesis.tex", 10**7)):
        file = folder / name
        file.write_bytes(b"1" * 10**6)
        os.utime(file, (time.time() - age,) * 2)
    epoch(remote, folder, gb=1e-4)
    assert not (folder / ".partial-old").exists()
    assert (folder / ".partial-new").exists()
    assert (folder / "thesis.tex").exists()


def test_tars_that_are_indexed_elsewhere_are_kept_too(remote: str, folder: Path, tmp_path: Path) -> None:
    index(remote, to=str(tmp_path / "mine"), progress=False)
    config = DataConfig(path=remote, index=str(tmp_path / "mine"), cache=str(folder))
    for cached in (False, True):
        with Stream(config, seed=1, round_size=IMAGES, prefetch=False) as stream:
            tally = stream.take(0).tally
        assert (tally.cached == tally.bytes) == cached
        assert tally.bytes > 10**6
