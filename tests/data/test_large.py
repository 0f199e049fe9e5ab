"""Data sets of a hundred thousand shards: what index.json takes, and the plan of a thousand ranks."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.dataset import DataConfig
from pipeline.data.format import manifest as module
from pipeline.data.format.indexing import index
from pipeline.data.format.manifest import INDEX, Manifest, Split
from pipeline.data.format.shards import ShardTable, problems
from pipeline.data.loader import Stream, read_split
from pipeline.data.order import Order, parts, pieces, rank_rows
from pipeline.errors import InputError
from pipeline.storage.store import open_store
from tests.data.test_indexing import TARS, write

SHARDS, EACH = 100_000, 10_000


def large() -> Manifest:
    rows = np.zeros(
        SHARDS, [("name", "S16"), ("samples", "<i8"), ("bytes", "<i8"), ("pages", "V32"), ("sha256", "V32")]
    )
    rows["name"] = [b"%08d.tar" % number for number in range(SHARDS)]
    rows["samples"], rows["bytes"] = EACH, EACH * 100_000
    rows["pages"] = np.frombuffer(b"".join(hashlib.sha256(name).digest() for name in rows["name"].tolist()), "V32")
    split = Split(samples=SHARDS * EACH, shards=ShardTable(rows))
    return Manifest(
        name="large", kind="image", shape=(3, 0, 0), dtype="uint8", labels=(), splits={"train": split}, dealt=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large")
    for name, data in large().files().items():
        (path / name).write_bytes(data)
    return path


def test_a_billion_images_are_read_from_a_table(folder: Path) -> None:
    assert (folder / INDEX).stat().st_size < 1000 and (folder / "index-train.npy").stat().st_size < 16e6
    begin = time.process_time()
    found = Manifest.load(str(folder))
    assert time.process_time() - begin < 2  # a fifth of a second on an idle core
    assert found.splits["train"].shards[77].name == "00000077.tar" and found == large()
    with Stream(DataConfig(path=str(folder), size="64"), seed=0, round_size=1 << 16, rank=5, world=1024) as stream:
        assert stream.order.total == 10**9 and stream.order.orders[0].shuffle == 128


def test_a_table_that_does_not_belong_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in (INDEX, "index-train.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data = bytearray((tmp_path / "index-train.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "index-train.npy").write_bytes(data)
    with pytest.raises(InputError, match="the SHA-256 of the table of shards is not the one in index.json"):
        Manifest.load(str(tmp_path))
    fields = json.loads((folder / INDEX).read_text())
    for table in ("../index-train.npy", "/etc/passwd", "none.npy", 5, None):
        fields["splits"]["train"]["table"] = table
        (tmp_path / INDEX).write_text(json.dumps(fields))
        with pytest.raises(InputError):
            Manifest.load(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("name", b"../x.tar", "hidden, or leads out"),
        ("name", b"", "not that of a file"),
        ("name", b"a\x01b", "not that of a file"),
        ("name", b"a\x00b", "not that of a file"),
        ("name", b"00000001.tar", "listed twice"),
        ("samples", 0, "0 samples in"),
        ("samples", -1, "-1 samples in"),
        ("bytes", 5, "5 bytes cannot hold"),
    ],
)
def test_a_row_of_nonsense_is_named(column: str, value: object, message: str) -> None:
    rows = large().splits["train"].shards.rows.copy()  # type: ignore[attr-defined]
    rows[column][5] = value
    assert message in next(problems(ShardTable(rows)))


def test_a_table_holds_what_shards_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), [*TARS, "näh.tar", "val.tar"])
    listed = index(str(tmp_path), progress=False)
    monkeypatch.setattr(module, "MANY", 3)
    table = index(str(tmp_path), force=True, progress=False)
    assert {"index-train.npy"} == {name for name in open_store(str(tmp_path)).list() if name.startswith("index-")}
    assert table == listed == Manifest.load(str(tmp_path)) and isinstance(
        Manifest.load(str(tmp_path)).split("train").shards, ShardTable
    )
    assert sorted(read_split(str(tmp_path), "train")[0][:, 0, 0, 0].tolist()) == list(range(24))
    without = [replace(shard, sha256="") for shard in listed.split("train").shards]
    assert ShardTable.of(without) == without and ShardTable.parse(
        ShardTable.of(without).dump(), hashlib.sha256(ShardTable.of(without).dump()).hexdigest()
    ) == tuple(without)


LAST = 7629
"""The round that goes on into the next epoch."""


@pytest.mark.parametrize(("shuffle", "rounds"), [(1, [LAST]), (128, [5000, LAST])])
def test_the_plan_of_a_thousand_ranks_holds_each_image_once(shuffle: int, rounds: list[int]) -> None:
    order = Order(sizes=(EACH,) * SHARDS, seed=3, round_size=1 << 17, shuffle=shuffle)
    for round in rounds:
        seen = list[np.ndarray[tuple[int], np.dtype[np.int64]]]()
        for rank in range(1024):
            for start, stop in parts(*rank_rows(order.round_size, rank, 1024), 8):
                found = pieces(order, round, start, stop)
                assert sum(piece.last - piece.first for piece in found) == stop - start == 16
                numbers = [np.arange(p.first, p.last) + (p.shard + SHARDS * p.epoch) * EACH for p in found]
                seen += numbers
        assert len(np.unique(np.concatenate(seen))) == order.round_size
