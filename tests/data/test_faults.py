"""Streaming from S3 through a network that resets, stalls, refuses and damages: the images are those of the folder."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

import naign
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import Stream
from naign.data.sources.source import Made
from naign.errors import Gone, InputError, Unavailable
from naign.storage.retry import Tally, give_up_after
from naign.storage.store import open_store
from tests.data.numbered import noise, numbered
from tests.proxy import Faults
from tests.refused import refused

IMAGES = 1600
ROUND = 200
SHAPE = (3, 64, 64)

Lines = list[tuple[int, str, str]]
"""Epoch, key and hash of the pixels, in order."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits that are too short for a network, and short enough for tests; small requests, so that many meet a fault."""
    monkeypatch.setattr("naign.storage.s3_client.SILENCE", 0.5)
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 20.0)
    monkeypatch.setattr("naign.storage.retry.FIRST_PATIENCE", 2.0)
    monkeypatch.setattr("naign.data.reader.REQUEST", 300_000)


def example(index):
    """An image that cannot be compressed; its first pixel is its index, modulo 256."""
    image = noise(index, SHAPE)
    image.flat[0] = index % 256
    return f"train-{index:04d}", image, index % 2


def opened(path, round_size=ROUND, **settings):
    config = DataConfig(path=str(path), **settings)
    return Stream(config, seed=3, round_size=round_size)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """1,600 images of noise, 12 KiB each, in 7 shards; 23 MB."""
    path = str(tmp_path_factory.mktemp("noise"))
    splits = {"train": Made(length=IMAGES, make=example)}
    source = replace(numbered(shape=SHAPE), splits=splits)
    pack(source, path, shards=7, encoding="npy")
    return path


@pytest.fixture(scope="module")
def expected(local):
    """An epoch and a quarter of it, from the folder."""
    with opened(local) as stream:
        return take(stream, Tally())


@pytest.fixture
def remote(s3, bucket, local):
    """The same in S3."""
    client = s3.client()
    for file in Path(local).iterdir():
        client.upload_file(str(file), bucket.removeprefix("s3://"), f"noise/{file.name}")
    return f"{bucket}/noise"


def take(stream, tally):
    """Ten rounds, two of them of the second epoch; adds to the tally what they cost."""
    found = []
    for number in range(10):
        taken = stream.take(number)
        tally.merge(taken.tally)
        for epoch, key, image in zip(taken.epochs.tolist(), taken.keys, taken.images, strict=True):
            assert int(image[0, 0, 0]) == int(key.split("-")[1]) % 256
            pixels = hashlib.sha256(image.numpy().tobytes())
            found.append((epoch, key, pixels.hexdigest()))
    return found


@pytest.mark.slow
def test_all_faults_at_once(
    remote,
    proxy,
    expected,
    monkeypatch,
):
    monkeypatch.setattr("naign.data.reader.REREADS", 10)  # more bytes are damaged here than by any network
    tally = Tally()
    with opened(remote, workers=2) as stream:
        proxy.faults = Faults(
            reset_every=(100_000, 500_000),
            stall=0.05,
            refuse=0.1,
            errors=0.1,
            flip=0.15,
        )
        assert take(stream, tally) == expected
    for kind in ("reset", "stall", "refuse", "error", "flip"):
        assert proxy.counts[kind], proxy.counts
    assert tally.retries > 10
    assert tally.reread > 10_000
    assert tally.bytes > 20e6


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while(
    remote,
    proxy,
    expected,
    monkeypatch,
):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.5)
    with opened(remote, workers=2) as stream:
        found = stream.take(0).keys
        proxy.faults = Faults(refusing=True)
        with pytest.raises(Unavailable, match=r"noise/train-\d+.*given up after"):
            while True:  # some rounds ahead may have been fetched
                found += stream.take(len(found) // ROUND).keys
        with give_up_after(0), pytest.raises(Unavailable, match="given up after"):
            open_store(remote).list()
        proxy.faults = Faults()
        while len(found) < IMAGES:
            found += stream.take(len(found) // ROUND).keys
    assert found == [key for _, key, _ in expected[:IMAGES]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged, workers, said",
    [
        ("train-00003.tar", 2, ".*SHA-256 .*is not the one in .*, also after 3 more reads: copy it again, or repack"),
        # Asked for as a whole, it is read until two reads agree: by chance two are damaged alike.
        ("train-00003.pages.npy", 0, "given up after .* not those of its ETag|the SHA-256 .*is not the one in"),
    ],
)
def test_bytes_that_stay_wrong(
    remote,
    proxy,
    expected,
    damaged,
    workers,
    said,
):
    with opened(remote, workers=workers) as stream:
        proxy.faults = Faults(flip_always=damaged)
        for _ in range(2):  # and again: an error does not jam the stream
            found = []
            with pytest.raises((InputError, Unavailable), match=rf"{remote}/{damaged}: ({said})") as caught:
                for number in range(8):
                    found += stream.take(number).keys
            assert "\n" not in str(caught.value)
            assert len(found) < IMAGES
            assert found == [key for _, key, _ in expected[: len(found)]]
        assert proxy.counts["flip"] >= 2 * 4  # the first read and three more, twice
        proxy.faults = Faults()
        assert take(stream, Tally()) == expected


@pytest.mark.parametrize("lost", ["everything", "shards", "bucket"])
def test_data_that_are_lost_while_a_run_reads_them_are_worth_another_start(
    lost,
    remote,
    s3,
    bucket,
):
    epoch = IMAGES // ROUND
    with opened(remote) as stream:
        for number in range(epoch):  # all files have been seen
            stream.take(number)
        store = open_store(remote)
        for name in store.list():
            if lost != "shards" or name != "index.json":
                store.delete(name)
        if lost == "bucket":
            s3.client().delete_bucket(Bucket=bucket.removeprefix("s3://"))
        with pytest.raises(Gone, match=f"{bucket}.*; stored data that this run has read before is gone"):
            for number in range(epoch, 2 * epoch):
                stream.take(number)


@pytest.mark.parametrize("lost", ["a shard", "everything", "a half"])
def test_local_data_that_are_lost_while_a_run_reads_them_are_worth_another_start(lost, tmp_path):
    pack(numbered(train=40), str(tmp_path), shards=2)
    files = list(tmp_path.iterdir()) if lost == "everything" else [tmp_path / "train-00001.tar"]
    with opened(tmp_path, 40) as stream:
        stream.take(0)
        for file in files:
            if lost == "a half":
                os.truncate(file, file.stat().st_size // 2)
            else:
                file.unlink()
        with pytest.raises(Gone, match="(no such file|truncated).*; stored data that this run has read before is gone"):
            for number in range(1, 12):  # the first of these are fetched already
                stream.take(number)
    with refused("no such file|no data set|truncated"):
        opened(tmp_path, 40).take(0)


def test_a_shard_that_was_missing_from_the_start_is_bad_input(remote):
    store = open_store(remote)
    for shard in Manifest.load(remote).shards[1:]:
        store.delete(shard.name)
    stream = opened(remote)
    with stream, refused("no such object: check the path"):
        for number in range(8):
            stream.take(number)


@pytest.mark.slow
def test_webdatasets_own_reader_streams_through_faults(local, remote, proxy, monkeypatch):
    monkeypatch.setitem(webdataset.gopen_schemes, "s3", naign.gopen)
    names = [Path(file).name for file in sorted(Path(local).glob("train-*.tar"))]

    def read(place):
        shards = [f"{place}/{name}" for name in names]
        dataset = webdataset.WebDataset(shards, shardshuffle=False)
        return [(sample["__key__"], sample["npy"]) for sample in dataset]

    proxy.faults = Faults(
        reset_every=(100_000, 500_000),
        stall=0.05,
        errors=0.1,
    )
    assert read(remote) == read(local)
    assert proxy.counts["reset"]
    with refused("streams are only read"):
        naign.gopen(f"{remote}/new", "wb")
