"""From shards to tensors: the order, ranks and workers, resuming, and bad data."""

import io
import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from naign.data.dataset import DataConfig
from naign.data.decode import decode_array, encode
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import Rows, Stream, read_split
from naign.data.order import Order, pieces
from naign.data.reader import Reader, Row
from naign.errors import InputError
from naign.storage.s3_client import client
from naign.storage.store import open_store
from pipeline.train import pack_missing
from tests.data.numbered import Members, numbered, rewrite

ROUND = 12


def take(path: str, rounds: list[int], world: int = 1, workers: int = 0) -> list[tuple[list[str], list[int]]]:
    """Keys and epochs of whole rounds, put together from the ranks; checks that all columns belong together."""
    found: list[tuple[list[str], list[int]]] = [([], []) for _ in rounds]
    for rank in range(world):
        with Stream(DataConfig(path=path, workers=workers), seed=5, round_size=ROUND, rank=rank, world=world) as stream:
            for (keys, epochs), round in zip(found, rounds, strict=True):
                taken = stream.take(round)
                indices = taken.images[:, 0, 0, 0]
                assert taken.images.shape == (ROUND // world, 1, 4, 4) and taken.images.dtype == torch.uint8
                assert taken.keys == [f"train-{index:03d}" for index in indices.tolist()]
                assert torch.equal(taken.labels, indices.long() % 2)
                keys += taken.keys
                epochs += taken.epochs.tolist()
    return found


def test_rounds_follow_the_plan(packed: str) -> None:
    images, _ = read_split(packed, "train")
    sizes = [shard.samples for shard in Manifest.load(packed).split("train").shards]
    start = np.cumsum([0, *sizes])
    order = Order(sizes=tuple(sizes), seed=5, round_size=ROUND)
    rounds = take(packed, [0, 1, 2])
    for number, (keys, epochs) in enumerate(rounds):
        plan = [
            (piece.epoch, int(images[start[piece.shard] + i, 0, 0, 0]))
            for piece in pieces(order, number, 0, ROUND)
            for i in range(piece.first, piece.last)
        ]
        assert plan == [(epoch, int(key[-3:])) for epoch, key in zip(epochs, keys, strict=True)]
    first = [key for keys, epochs in rounds for key, epoch in zip(keys, epochs, strict=True) if epoch == 0]
    assert sorted(first) == [f"train-{index:03d}" for index in range(23)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_change_nothing(packed: str, world: int, workers: int) -> None:
    assert take(packed, [3, 4, 5], world, workers) == take(packed, [3, 4, 5])


@pytest.mark.parametrize("workers", [0, 2])
def test_rounds_in_any_order(packed: str, workers: int) -> None:
    in_order = take(packed, [0, 1, 2, 3])
    assert take(packed, [2, 3, 0, 0], workers=workers) == [in_order[2], in_order[3], in_order[0], in_order[0]]


def test_reading_ahead_changes_nothing_and_leaves_the_random_state_alone(packed: str) -> None:
    state = torch.get_rng_state()
    threads = threading.active_count()
    kinds: list[list[Rows]] = []
    for prefetch in (False, True):
        with Stream(DataConfig(path=packed, workers=2), seed=5, round_size=ROUND, prefetch=prefetch) as stream:
            kinds.append([stream.take(round) for round in range(3)])
    for plain, ahead in zip(*kinds, strict=True):
        assert torch.equal(plain.images, ahead.images) and plain.keys == ahead.keys
    assert torch.equal(state, torch.get_rng_state())
    end = time.monotonic() + 10  # the queues' threads end by themselves, a moment later
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_workers_are_no_processes(packed: str) -> None:
    """A process with gloo, CUDA or boto3 threads must not be forked: locks that these hold stay held in the child."""
    before = psutil.Process().children()
    with Stream(DataConfig(path=packed, workers=2), seed=5, round_size=ROUND) as stream:
        stream.take(0)
        assert psutil.Process().children() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_counted_while_their_round_is_read(packed: str, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    told, rows, decode = threading.Event(), itertools.count(), Reader.row

    def slow(*arguments: Any) -> Row:
        if next(rows) >= ROUND // 2:
            assert told.wait(20)
        return decode(*arguments)

    monkeypatch.setattr(Reader, "row", slow)
    with Stream(DataConfig(path=packed, workers=workers), seed=5, round_size=ROUND, prefetch=False) as stream:

        def look() -> bool:
            if stream.rows_read:
                told.set()
            return False

        assert len(stream.take(0, look).keys) == stream.rows_read == ROUND


def test_a_manifest_is_found_without_a_listing(packed: str, bucket: str) -> None:
    for file in Path(packed).iterdir():
        open_store(bucket).put(file.name, file.read_bytes())
    made: list[str] = []
    client().meta.events.register("before-call.s3", lambda model, **_: made.append(model.name))
    with Stream(DataConfig(path=bucket), seed=5, round_size=ROUND) as stream:
        assert len(stream.take(0).keys) == ROUND
    pack_missing(DataConfig(path=bucket, source="digits"), [])
    assert "GetObject" in made and "ListObjectsV2" not in made


def test_nothing_is_packed_beside_indexed_tars(tmp_path: Path) -> None:
    pack_missing(DataConfig(path=str(tmp_path), index="s3://bucket/index", source="digits"), [])
    assert not list(tmp_path.iterdir())


def test_trace(packed: str, tmp_path: Path) -> None:
    for rounds in ([0], [1]):  # a second run appends
        for rank in range(2):
            config = DataConfig(path=packed, trace=str(tmp_path / "trace"))
            with Stream(config, seed=5, round_size=12, rank=rank, world=2) as stream:
                for round in rounds:
                    stream.take(round)
    expected = take(packed, [0, 1])
    for rank in range(2):
        lines = (tmp_path / f"trace/rank-{rank:05d}.txt").read_text().splitlines()
        part = slice(6 * rank, 6 * rank + 6)
        assert lines == [
            f"{epoch} {round} {key}"
            for round, (keys, epochs) in enumerate(expected)
            for epoch, key in zip(epochs[part], keys[part], strict=True)
        ]


def test_part_of_a_split(packed: str) -> None:
    images, labels = read_split(packed, "train")
    some, _ = read_split(packed, "train", limit=13)
    assert torch.equal(some, images[:13]) and len(labels) == 23
    assert len(read_split(packed, "test", limit=99)[0]) == 5


def test_without_labels(tmp_path: Path, packed: str) -> None:
    rewrite(packed, "test-00000.tar", lambda members: [m for m in members if not m[0].endswith(".cls")])
    assert read_split(packed, "test")[1][0] == -1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "valid"}, "no split 'valid'"),
        ({"broken": "maybe"}, "data.broken is 'maybe': choose one of error, skip"),
        ({"crop": -1}, "data.crop is -1"),
        ({"crop": 5}, "data.crop=5 is more than there is of numbered"),
        ({"cache_gb": 0}, "must be positive"),
    ],
)
def test_settings_that_no_stream_can_have(packed: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stream(DataConfig(path=packed, **changed), seed=0, round_size=12)


def replaced(suffix: str, data: bytes) -> object:
    """Put other bytes into the third sample's member of that suffix."""

    def change(members: Members) -> Members:
        target = [name for name, _ in members if name.endswith(suffix)][2]
        return [(name, data if name == target else old) for name, old in members]

    return change


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(".png", b"\x89PNG\r\n\x1a\n"), r"train-00002.tar, key train-\d+: the .png cannot be decoded"),
        (replaced(".png", encode(np.zeros((1, 4, 4), np.uint8), "png")[:-30]), r"train-00002.tar, key .* decoded"),
        (replaced(".png", encode(np.zeros((3, 4, 4), np.uint8), "png")), r"00002.tar, key .* \(3, 4, 4\), but .*\(1,"),
        (replaced(".cls", b"2"), r"00002.tar, key .*label '2' is none of the 2"),
        (lambda members: members[:-2], r"00002.pages.npy: it is of another shard"),
        (
            lambda members: [*members, ("new.png", members[1][1])],
            r"00002.pages.npy: it is of another shard",
        ),
        (lambda members: members[:-1], r"00002.tar, key train-\d+: no member ends in png"),
    ],
)
def test_bad_shards_are_named(packed: str, change: object, message: str, workers: int) -> None:
    rewrite(packed, "train-00002.tar", change)  # type: ignore[arg-type]
    with Stream(DataConfig(path=packed, workers=workers), seed=5, round_size=24) as stream:
        for _ in range(2):  # and again: an error does not jam the stream
            with pytest.raises(InputError, match=message) as caught:
                stream.take(0)
            assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 600, 2048, 3000, 5120])
def test_cut_and_foreign_shards_are_named(packed: str, keep: int) -> None:
    file = Path(packed) / "train-00002.tar"
    for data in (file.read_bytes()[:keep], b"not a tar " * keep):
        file.write_bytes(data)
        stream = Stream(DataConfig(path=packed), seed=5, round_size=24)
        with stream, pytest.raises(InputError, match=r"train-00002\.tar"):
            stream.take(0)
    file.unlink()
    with pytest.raises(InputError, match=r"train-00002\.tar: no such file"):
        read_split(packed, "train")


def test_an_error_while_reading_ahead_comes_with_its_round(packed: str) -> None:
    with Stream(DataConfig(path=packed), seed=5, round_size=12) as stream:
        order = Order(sizes=(5, 6, 6, 6), seed=5, round_size=12)
        plan = pieces(order, 1, 0, 12)
        first = {piece.shard for piece in pieces(order, 0, 0, 12)}
        only_second = next(piece.shard for piece in plan if piece.shard not in first and not piece.epoch)
        (Path(packed) / f"train-{only_second:05d}.tar").unlink()
        stream.take(0)
        with pytest.raises(InputError, match="no such file"):
            stream.take(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_forgets_to_close_ends_at_once(packed: str, workers: int) -> None:
    program = f"""
from naign.data.dataset import DataConfig
from naign.data.loader import Stream
stream = Stream(DataConfig(path={packed!r}, workers={workers}), seed=0, round_size=12)
print(len(stream.take(0).keys))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")


def test_a_large_sample_crosses_the_boundary_between_processes(tmp_path: Path) -> None:
    pack(numbered(train=8, shape=(3, 64, 64)), str(tmp_path), shards=2, progress=False)
    with Stream(DataConfig(path=str(tmp_path), workers=2), seed=0, round_size=8) as stream:
        assert sorted(stream.take(0).images[:, 0, 0, 0].tolist()) == list(range(8))


def test_arrays_are_decoded_by_threads_at_once_whoever_wrote_them() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    plain, foreign = io.BytesIO(), io.BytesIO()
    np.save(plain, array)
    np.lib.format.write_array_header_1_0(foreign, {"descr": "<f4", "fortran_order": True, "shape": (2, 3)})
    foreign.write(array.tobytes("F"))
    with ThreadPoolExecutor(8) as threads:
        for data in (plain.getvalue(), foreign.getvalue()):
            for found in threads.map(lambda data: decode_array(data, (2, 3), "float32"), [data] * 4000):
                assert np.array_equal(found, array) and found.flags.writeable
