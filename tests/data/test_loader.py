"""From shards to tensors: the order, ranks and workers, resuming, and bad data."""

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.manifest import Manifest
from naign.data.loader import Stream, read_split
from naign.data.order import Order, pieces
from naign.data.reader import Reader
from naign.storage.s3_client import client
from naign.storage.store import open_store
from pipeline.train import pack_missing
from tests.data.numbered import replaced, rewrite, without_labels
from tests.refused import refused

ROUND = 12


def opened(path, round_size=ROUND, **settings):
    config = DataConfig(path=path, **settings)
    return Stream(config, seed=5, round_size=round_size)


def take(path, rounds, workers=0):
    """Keys and epochs of rounds; checks that all columns belong together."""
    found = []
    with opened(path, workers=workers) as stream:
        for round in rounds:
            taken = stream.take(round)
            indices = taken.images[:, 0, 0, 0]
            assert taken.images.shape == (ROUND, 1, 4, 4)
            assert taken.images.dtype == torch.uint8
            assert taken.keys == [f"train-{index:03d}" for index in indices.tolist()]
            assert torch.equal(taken.labels, indices.long() % 2)
            found.append((taken.keys, taken.epochs.tolist()))
    return found


def test_rounds_follow_the_plan(packed):
    images, _ = read_split(packed, "train")
    sizes = Manifest.load(packed).split("train").sizes
    starts = np.cumsum([0, *sizes])
    order = Order(
        sizes=sizes,
        seed=5,
        round_size=ROUND,
    )
    for number, (keys, epochs) in enumerate(take(packed, [0, 1, 2])):
        planned = []
        for piece in pieces(order, number, 0, ROUND):
            for sample in range(piece.first, piece.last):
                image = images[starts[piece.shard] + sample]
                planned.append((piece.epoch, int(image[0, 0, 0])))
        numbers = [int(key[-3:]) for key in keys]
        assert planned == list(zip(epochs, numbers, strict=True))


def test_rounds_in_any_order(packed):
    rounds = take(packed, [0, 1, 2, 3])
    taken = take(
        packed,
        [2, 3, 0, 0],
        workers=2,
    )
    assert taken == [rounds[2], rounds[3], rounds[0], rounds[0]]


def test_reading_ahead_leaves_random_state_and_threads_alone(packed):
    state = torch.get_rng_state()
    threads = threading.active_count()
    with opened(packed, workers=2) as stream:
        stream.take(0)
    assert torch.equal(state, torch.get_rng_state())
    end = time.monotonic() + 10  # threads end by themselves, a moment later
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_rows_are_counted_while_their_round_is_read(packed, monkeypatch):
    seen = threading.Event()
    rows = itertools.count()
    decode = Reader.row

    def slow(*arguments):
        if next(rows) >= ROUND // 2:
            assert seen.wait(20)
        return decode(*arguments)

    monkeypatch.setattr(Reader, "row", slow)
    with opened(packed) as stream:

        def look():
            if stream.rows_read:
                seen.set()
            return False

        assert len(stream.take(0, look).keys) == ROUND <= stream.rows_read


def test_a_manifest_is_found_without_a_listing(packed, bucket):
    for file in Path(packed).iterdir():
        open_store(bucket).put(file.name, file.read_bytes())
    made = []
    client().meta.events.register("before-call.s3", lambda model, **_: made.append(model.name))
    with opened(bucket) as stream:
        assert len(stream.take(0).keys) == ROUND
    pack_missing(DataConfig(path=bucket, source="digits"), [])
    assert "GetObject" in made
    assert "ListObjectsV2" not in made


def test_nothing_is_packed_beside_indexed_tars(tmp_path):
    pack_missing(
        DataConfig(
            path=str(tmp_path),
            index="s3://bucket/index",
            source="digits",
        ),
        [],
    )
    assert not list(tmp_path.iterdir())


def test_without_labels(packed):
    rewrite(packed, "test-00000.tar", without_labels)
    assert read_split(packed, "test")[1][0] == -1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"trace": "/dev/null/trace"}, "data.trace .* cannot be written"),
        ({"broken": "maybe"}, "data.broken is 'maybe': choose one of error, skip"),
        ({"crop": 5}, "data.crop=5 is more than there is of numbered"),
    ],
)
def test_settings_that_no_stream_can_have(packed, changed, message):
    with refused(message):
        opened(packed, **changed)


GREY = encode(np.zeros((1, 4, 4), np.uint8), "png")
COLOUR = encode(np.zeros((3, 4, 4), np.uint8), "png")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "change, message",
    [
        (replaced(".png", GREY[:-30], 2), r"train-00002.tar, key train-\d+: the .png cannot be decoded"),
        (replaced(".png", COLOUR, 2), r"00002.tar, key .* \(3, 4, 4\), but .*\(1,"),
        (replaced(".cls", b"2", 2), r"00002.tar, key .*label '2' is none of the 2"),
        (lambda members: members[:-2], r"00002.pages.npy: "),
        (lambda members: members[:-1], r"00002.tar, key train-\d+: no member ends in png"),
    ],
)
def test_bad_shards_are_named(
    packed,
    change,
    message,
    workers,
):
    rewrite(packed, "train-00002.tar", change)
    with opened(packed, round_size=24, workers=workers) as stream:
        for _ in range(2):  # and again: an error does not jam the stream
            with refused(message):
                stream.take(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_forgets_to_close_ends_at_once(packed, workers):
    program = f"""
from naign.data.dataset import DataConfig
from naign.data.loader import Stream
stream = Stream(DataConfig(path={packed!r}, workers={workers}), seed=0, round_size=12)
print(len(stream.take(0).keys))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout == "12\n"
    assert done.stderr == ""
