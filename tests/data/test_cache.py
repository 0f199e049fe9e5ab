"""The local cache of blocks: what it saves, its limit, many processes, damage, and data that changes."""

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

BLOCK = 50_000
IMAGES = 120

pytestmark = pytest.mark.slow  # together


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("naign.data.cache.CHUNK", BLOCK)
    monkeypatch.setattr("naign.data.reader.REQUEST", 200_000)


@pytest.fixture
def remote(bucket: str) -> str:
    """120 images of 12 KiB in three shards in S3; 1.7 MB."""
    path = f"{bucket}/cached"
    pack(numbered(train=IMAGES, shape=(3, 64, 64)), path, shards=3, encoding="npy", progress=False)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def epoch(path: str, folder: Path | str, *, workers: int = 0, epoch: int = 0, gb: float = 1) -> tuple[list[str], Tally]:
    """Keys of an epoch of two rounds, and what it cost; checks the pixels."""
    config = DataConfig(path=path, workers=workers, cache=str(folder), cache_gb=gb)
    keys, tally, before = list[str](), Tally(), set(threading.enumerate())
    with Stream(config, seed=1, round_size=IMAGES // 2, prefetch=False) as stream:
        for number in (2 * epoch, 2 * epoch + 1):
            taken = stream.take(number)
            tally.merge(taken.tally)
            keys += taken.keys
            for key, image in zip(taken.keys, taken.images, strict=True):
                _, expected, _ = numbered(train=IMAGES, shape=(3, 64, 64)).splits["train"][int(key[-3:])]
                assert torch.equal(image, torch.from_numpy(expected))
    assert sorted(keys) == [f"train-{index:03d}" for index in range(IMAGES)]
    for thread in threading.enumerate():
        if thread.name == "fetch" and thread not in before:  # reads ahead: its bytes would count for the next epoch
            thread.join(30)
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
    assert proxy.counts["bytes"] > 1_500_000 and tally.bytes > 1_500_000
    proxy.counts.clear()
    again, tally = epoch(remote, folder, workers=workers)
    assert again == keys and tally.cached == tally.bytes > 1_500_000
    assert proxy.counts["bytes"] < 5000  # a listing and index.json
    other, tally = epoch(remote, folder, epoch=1)
    assert other != keys and tally.cached == tally.bytes and proxy.counts["bytes"] < 10_000


def test_without_a_cache_all_is_read_again(remote: str, proxy: FaultProxy) -> None:
    epoch(remote, "")
    before = proxy.counts["bytes"]
    _, tally = epoch(remote, "")
    # Not of what the first epoch took, which may have read ahead: all that the second one read came again.
    assert tally.cached == 0 and proxy.counts["bytes"] - before >= tally.bytes > 1_900_000


def test_ranges_are_those_of_the_source(remote: str, folder: Path) -> None:
    store, source = cached_store(remote, folder), open_store(remote)
    for name in ("train-00000.tar", "train-00000.pages.npy"):
        whole = source.read(name)
        chance = random.Random(0)
        edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, len(whole) - 1, len(whole)]
        for _ in range(80):
            first, last = sorted(min(chance.choice([chance.randrange(len(whole)), *edges]), len(whole)) for _ in "ab")
            assert store.read(name, first, last) == whole[first:last]
            assert store.read(name, first) == whole[first:]
        assert store.read(name) == whole == store.read(name, fresh=True)
    assert (store.list(), store.size("index.json")) == (source.list(), source.size("index.json"))
    assert store.url("x") == source.url("x") and b"".join(store.pieces("index.json")) == source.read("index.json")


def test_a_read_past_the_end(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    size = store.size("train-00000.tar")
    with pytest.raises(InputError, match="truncated"):
        store.read("train-00000.tar", size - 10, size + 10)


def test_only_what_the_manifest_names_is_kept(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    store.put("notes.txt", b"not of the data set")
    assert store.read("notes.txt") == b"not of the data set" and store.read("index.json")
    assert list(folder.iterdir()) == []
    store.delete("notes.txt")
    assert "notes.txt" not in store.list()


def test_a_local_data_set_needs_no_cache(tmp_path: Path, folder: Path) -> None:
    pack(numbered(train=IMAGES, shape=(3, 64, 64)), str(tmp_path / "local"), shards=3, encoding="npy", progress=False)
    assert epoch(str(tmp_path / "local"), folder)[1].cached == 0 and not folder.exists()


@pytest.mark.parametrize("limit", [10, BLOCK, 400_000, 100 * BLOCK])
def test_the_limit(remote: str, folder: Path, limit: int) -> None:
    store = cached_store(remote, folder, limit)
    shards = Manifest.load(remote).split("train").shards
    most = 0
    for _ in range(2):
        for shard in shards:
            for first in range(0, shard.bytes, BLOCK):
                store.read(shard.name, first, min(first + BLOCK, shard.bytes))
                most = max(most, used(folder))
    assert most <= limit + BLOCK and most >= min(limit - BLOCK - limit // 64, 1_600_000)


def test_what_was_used_least_recently_goes_first(remote: str, folder: Path) -> None:
    limit = 8 * BLOCK
    store = cached_store(remote, folder, limit)
    shard = Manifest.load(remote).split("train").shards[0]
    for number in range(10):
        store.read(shard.name, number * BLOCK, (number + 1) * BLOCK)
        store.read(shard.name, 0, BLOCK)  # is in use all the time
        time.sleep(0.01)  # file times are those of the kernel's clock, some milliseconds coarse
    kept = sorted(int(file.name[-6:]) for file in folder.iterdir())
    assert kept == [0, *range(10 - len(kept) + 1, 10)] and 6 <= len(kept) <= 8


def reading(path: str, folder: str, seed: int, answer: Connection) -> None:
    """In a process of its own: read blocks in an order of its own; report the largest size of the folder."""
    most = -1
    try:
        store, source = cached_store(path, Path(folder), 12 * BLOCK), open_store(path)
        wholes = {shard.name: source.read(shard.name) for shard in Manifest.load(path).split("train").shards}
        chance = random.Random(seed)
        for _ in range(150):
            name = chance.choice(list(wholes))
            first = chance.randrange(len(wholes[name]) - 1)
            last = min(len(wholes[name]), first + chance.randrange(1, 3 * BLOCK))
            assert store.read(name, first, last) == wholes[name][first:last]
            most = max(most, used(Path(folder)))
    finally:
        answer.send(most)


@pytest.mark.slow
def test_processes_that_share_a_folder(remote: str, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = []
    for seed in range(3):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=reading, args=(remote, str(folder), seed, there))
        process.start()
        running.append((process, here))
    most = [here.recv() for _, here in running]
    for process, _ in running:
        process.join(60)
        assert process.exitcode == 0
    assert 0 < max(most) <= (12 + 3) * BLOCK
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def block(folder: Path, path: str, name: str) -> Path:
    """The file of a first block that holds some of a shard or table."""
    for shard in Manifest.load(path).split("train").shards:
        if name == shard.name:
            return folder / f"{shard.pages}-tar-000003"
        if name == table_name(shard.name):
            return folder / f"{shard.pages}-000000"
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.pages.npy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_block_is_found_and_renewed(remote: str, folder: Path, name: str, workers: int) -> None:
    keys, _ = epoch(remote, folder)
    file = block(folder, remote, name)
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    again, tally = epoch(remote, folder, workers=workers)
    assert again == keys and tally.reread > 0 and 0 < tally.bytes - tally.cached < 1_000_000
    assert file.read_bytes() == sound
    _, tally = epoch(remote, folder)
    assert tally.reread == 0 and tally.cached == tally.bytes


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1])
def test_a_block_of_another_size_is_fetched_anew(remote: str, folder: Path, size: int) -> None:
    keys, _ = epoch(remote, folder)
    file = block(folder, remote, "train-00001.tar")
    sound = file.read_bytes()
    file.write_bytes((sound + b"x")[:size])
    again, tally = epoch(remote, folder)
    assert again == keys and tally.reread == 0 and tally.bytes - tally.cached == BLOCK
    assert file.read_bytes() == sound


def test_a_shard_that_changes_is_another(remote: str, folder: Path) -> None:
    keys, _ = epoch(remote, folder)
    pack(
        *(numbered(train=IMAGES, shape=(3, 64, 64)), remote),
        **{"shards": 3, "encoding": "npy", "seed": 9, "force": True, "progress": False},  # type: ignore[arg-type]
    )
    other, tally = epoch(remote, folder)  # checks the pixels
    assert other != keys and tally.reread == 0


def test_a_file_in_place_of_the_folder(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match=rf"data.cache '{path}' cannot be made: "):
            epoch(remote, path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("where", ["os.replace", "pathlib.Path.write_bytes"])
def test_a_folder_that_takes_nothing_stops_nothing(
    remote: str, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(where, fails)
    _, tally = epoch(remote, folder)
    # Threads that were reading ahead go on for a moment, and remove what they begin.
    last, end = time.monotonic(), time.monotonic() + 20
    while (now := time.monotonic()) < min(last + 1, end):
        if list(folder.iterdir()):
            last = now
        time.sleep(0.01)
    assert tally.cached == 0 and list(folder.iterdir()) == []
    assert f"not kept: {os.strerror(code)}" in caplog.text


def test_a_folder_that_is_removed_meanwhile(remote: str, folder: Path) -> None:
    store = cached_store(remote, folder)
    whole = open_store(remote).read("train-00000.tar")
    assert store.read("train-00000.tar", 0, BLOCK) == whole[:BLOCK]
    shutil.rmtree(folder)
    assert store.read("train-00000.tar") == whole


def test_what_killed_processes_left_goes(remote: str, folder: Path) -> None:
    folder.mkdir()
    for name, age in ((".partial-old", 7200), (".partial-new", 60)):
        (folder / name).write_bytes(b"1" * 1000)
        os.utime(folder / name, (time.time() - age,) * 2)
    epoch(remote, folder)
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == [".partial-new"]


def test_what_is_being_written_stays(remote: str, folder: Path) -> None:
    folder.mkdir()
    (folder / ".partial-new").write_bytes(b"1" * 1000)
    store = cached_store(remote, folder, 2 * BLOCK)
    for _ in range(2):
        store.read("train-00000.tar")
    assert (folder / ".partial-new").exists()


def test_files_of_others_in_the_folder_stay(remote: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(b"1" * 10**6)
    os.utime(folder / "thesis.tex", (0, 0))
    epoch(remote, folder, gb=1e-4)
    assert (folder / "thesis.tex").stat().st_size == 10**6


def test_tars_that_are_indexed_elsewhere_are_kept_too(remote: str, folder: Path, tmp_path: Path) -> None:
    index(remote, to=str(tmp_path / "mine"), progress=False)
    config = DataConfig(path=remote, index=str(tmp_path / "mine"), cache=str(folder))
    for cached in (False, True):
        with Stream(config, seed=1, round_size=IMAGES, prefetch=False) as stream:
            tally = stream.take(0).tally
        assert (tally.cached == tally.bytes) == cached and tally.bytes > 10**6
