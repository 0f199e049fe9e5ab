"""Every image once an epoch, for any number of real processes and workers, from shards of any sizes in S3."""

import multiprocessing
import tarfile
from collections import Counter
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import webdataset

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.format.webdataset import samples
from naign.data.loader import Stream
from naign.errors import InputError
from naign.storage.store import open_store
from tests.data.numbered import add
from tests.streams import gopen

SIZES = [1, 7, 23, 50, 64, 5]
ROUND = 60
ROUNDS = 5
"""Two epochs: the third round belongs to both."""

Line = tuple[int, int, str]
"""Epoch, round and key."""


@pytest.fixture
def uneven(bucket: str) -> str:
    """150 images in shards of 1 to 64, as another program might have written them, then indexed."""
    path = f"{bucket}/uneven"
    store = open_store(path)
    for number, size in enumerate(SIZES):
        with store.write(f"part-{number}.tar") as target, tarfile.open(fileobj=target, mode="w|") as tar:  # type: ignore[call-overload]
            for place in range(size):
                image = np.full((1, 4, 4), place, np.uint8)
                image[0, 0, 1] = number
                for suffix, data in (("png", encode(image, "png")), ("cls", b"%d" % (place % 3))):
                    add(tar, f"{number}/{place:03d}.{suffix}", data)
    manifest = index(path, progress=False)
    assert [shard.samples for shard in manifest.split("train").shards] == SIZES and manifest.labels == ("0", "1", "2")
    return path


def all_keys() -> set[str]:
    return {f"{number}/{place:03d}" for number, size in enumerate(SIZES) for place in range(size)}


def rank_of(path: str, trace: str, workers: int, rank: int, world: int, rounds: list[int], answer: Connection) -> None:
    """In a process of its own: take the rounds and hand over what they were."""
    lines: list[Line] = []
    try:
        config = DataConfig(path=path, workers=workers, trace=trace)
        with Stream(config, seed=11, round_size=ROUND, rank=rank, world=world) as stream:
            for number in rounds:
                taken = stream.take(number)
                assert [f"{image[0, 0, 1]}/{image[0, 0, 0]:03d}" for image in taken.images.numpy()] == taken.keys
                assert taken.labels.tolist() == [int(key[-3:]) % 3 for key in taken.keys]
                lines += [(epoch, number, key) for epoch, key in zip(taken.epochs.tolist(), taken.keys, strict=True)]
    finally:
        answer.send(lines)  # too few after an error, whose text is on stderr
        answer.close()


def run(path: str, trace: Path, world: int, workers: int, rounds: list[int]) -> list[Line]:
    """What all ranks took, in the order of rounds and then of ranks; checks that the trace files say the same."""
    context = multiprocessing.get_context("fork")
    running = []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=rank_of, args=(path, str(trace), workers, rank, world, rounds, there))
        process.start()
        there.close()
        running.append((process, here))
    found: list[Line] = []
    for rank, (process, here) in enumerate(running):
        lines: list[Line] = here.recv()
        process.join(60)
        assert process.exitcode == 0
        assert len(lines) == len(rounds) * ROUND // world
        traced = (trace / f"rank-{rank:05d}.txt").read_text()
        assert traced.endswith("".join(f"{epoch} {number} {key}\n" for epoch, number, key in lines))
        found += lines
    return sorted(found, key=lambda line: line[1])  # stable


def check_epochs(lines: list[Line]) -> None:
    """Two epochs, and in each every image once."""
    counts = Counter((epoch, key) for epoch, _, key in lines)
    assert counts == Counter((epoch, key) for epoch in (0, 1) for key in all_keys())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_image_once_an_epoch_for_any_ranks_and_workers(uneven: str, tmp_path: Path) -> None:
    kinds = {}
    for world, counts in {1: (0, 1, 3), 2: (0, 2), 3: (1, 3), 4: (0,), 5: (3,)}.items():  # more would only take time
        for workers in counts:
            lines = run(uneven, tmp_path / f"{world}-{workers}", world, workers, list(range(ROUNDS)))
            check_epochs(lines)
            kinds[world, workers] = lines
    assert [len(list(group)) for _, group in groupby(kinds[1, 0], key=lambda line: line[1])] == [ROUND] * ROUNDS
    assert all(lines == kinds[1, 0] for lines in kinds.values())  # and even in the same order


@pytest.mark.slow
def test_going_on_with_another_number_of_ranks(uneven: str, tmp_path: Path) -> None:
    lines: list[Line] = []
    for world, workers, rounds in [(3, 1, [0]), (5, 0, [1, 2]), (1, 2, [3]), (2, 3, [4])]:
        lines += run(uneven, tmp_path / "trace", world, workers, rounds)
    check_epochs(lines)
    traces = (tmp_path / "trace").iterdir()
    traced = Counter(line for file in traces for line in file.read_text().splitlines())
    assert traced == Counter(f"{epoch} {number} {key}" for epoch, number, key in lines)


def test_ranks_that_cannot_share_a_round(uneven: str) -> None:
    with pytest.raises(InputError, match=r"60 images cannot be shared equally by 7 ranks .*: use 63, for example"):
        Stream(DataConfig(path=uneven), seed=11, round_size=ROUND, world=7)


def test_webdataset_reads_the_same_samples(uneven: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(webdataset.gopen_schemes, "s3", gopen)
    urls = [open_store(uneven).url(shard.name) for shard in Manifest.load(uneven).split("train").shards]
    found = [
        {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    store = open_store(uneven)
    ours = [sample for number in range(len(SIZES)) for sample in samples(store.read(f"part-{number}.tar"))]
    assert found == ours and {sample["__key__"] for sample in found} == all_keys()
    with pytest.raises(InputError, match="no such object"):
        list(webdataset.WebDataset(f"{uneven}/missing.tar", shardshuffle=False))
