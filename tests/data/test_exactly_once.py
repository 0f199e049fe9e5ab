"""Every image once an epoch, for any number of real processes and workers, from shards of any sizes in S3."""

import io
import multiprocessing
import tarfile
from collections import Counter

import numpy as np
import pytest

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.indexing import index
from naign.data.loader import Stream
from naign.storage.store import open_store
from tests.data.numbered import add

SIZES = [1, 7, 23, 50, 64, 5]
KEYS = {f"{number}/{place:03d}" for number, size in enumerate(SIZES) for place in range(size)}
ROUND = 60
ROUNDS = 5
"""Two epochs: the third round belongs to both."""


@pytest.fixture
def uneven(bucket):
    """150 images in shards of 1 to 64, as another program might have written them, then indexed."""
    path = f"{bucket}/uneven"
    store = open_store(path)
    for number, size in enumerate(SIZES):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as tar:
            for place in range(size):
                image = np.full((1, 4, 4), place, np.uint8)
                image[0, 0, 1] = number
                add(tar, f"{number}/{place:03d}.png", encode(image, "png"))
                add(tar, f"{number}/{place:03d}.cls", b"%d" % (place % 3))
        store.put(f"part-{number}.tar", target.getvalue())
    manifest = index(path)
    assert list(manifest.split("train").sizes) == SIZES
    return path


def rank_of(
    path,
    trace,
    workers,
    rank,
    world,
    rounds,
    answer,
):
    """In a process of its own: take the rounds and hand over what they were."""
    lines = []
    try:
        config = DataConfig(path=path, workers=workers, trace=trace)
        with Stream(
            config,
            seed=11,
            round_size=ROUND,
            rank=rank,
            world=world,
        ) as stream:
            for number in rounds:
                taken = stream.take(number)
                assert [f"{image[0, 0, 1]}/{image[0, 0, 0]:03d}" for image in taken.images.numpy()] == taken.keys
                assert taken.labels.tolist() == [int(key[-3:]) % 3 for key in taken.keys]
                for epoch, key in zip(taken.epochs.tolist(), taken.keys, strict=True):
                    lines.append((epoch, number, key))
    finally:
        answer.send(lines)  # too few after an error, whose text is on stderr
        answer.close()


def run(
    path,
    trace,
    world,
    workers,
    rounds,
):
    """What all ranks took, in the order of rounds and then of ranks; checks that the trace files say the same."""
    context = multiprocessing.get_context("fork")
    running = []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=rank_of,
            args=(
                path,
                str(trace),
                workers,
                rank,
                world,
                rounds,
                there,
            ),
        )
        process.start()
        there.close()
        running.append((process, here))
    found = []
    for rank, (process, here) in enumerate(running):
        lines = here.recv()
        process.join(60)
        assert process.exitcode == 0
        assert len(lines) == len(rounds) * ROUND // world
        traced = (trace / f"rank-{rank:05d}.txt").read_text()
        assert traced.endswith("".join(f"{epoch} {number} {key}\n" for epoch, number, key in lines))
        found += lines
    return sorted(found, key=lambda line: line[1])  # stable


def check_epochs(lines):
    """Two epochs, and in each every image once."""
    for epoch in (0, 1):
        found = [key for number, _, key in lines if number == epoch]
        assert Counter(found) == Counter(KEYS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_image_once_an_epoch_for_any_ranks_and_workers(uneven, tmp_path):
    expected = run(
        uneven,
        tmp_path / "one",
        1,
        0,
        list(range(ROUNDS)),
    )
    check_epochs(expected)
    sizes = Counter(number for _, number, _ in expected)
    assert sizes == dict.fromkeys(range(ROUNDS), ROUND)
    for world, workers in (
        (1, 3),
        (3, 1),
        (4, 0),
    ):
        lines = run(
            uneven,
            tmp_path / f"{world}",
            world,
            workers,
            list(range(ROUNDS)),
        )
        assert lines == expected  # even in the same order


@pytest.mark.slow
def test_going_on_with_another_number_of_ranks(uneven, tmp_path):
    lines = []
    lines += run(
        uneven,
        tmp_path / "trace",
        world=3,
        workers=1,
        rounds=[0],
    )
    lines += run(
        uneven,
        tmp_path / "trace",
        world=5,
        workers=0,
        rounds=[1, 2],
    )
    lines += run(
        uneven,
        tmp_path / "trace",
        world=1,
        workers=2,
        rounds=[3, 4],
    )
    check_epochs(lines)
    traced = Counter()
    for file in (tmp_path / "trace").iterdir():
        traced.update(file.read_text().splitlines())
    assert traced == Counter(f"{epoch} {number} {key}" for epoch, number, key in lines)
