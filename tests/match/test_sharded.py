"""ShardedIndex in one process: the oracle's answer, what is refused, and files that come back."""

import json

import pytest
import torch

from naign.errors import InputError
from naign.match import sharded
from naign.match.sharded import MANIFEST, ShardedIndex
from tests.match.problems import CASES, draw, oracle
from tests.refused import refused


def indexed(rows, *, parts=1, first_id=0, **options):
    """An index of rows that are added in so many parts."""
    index = ShardedIndex(rows.shape[1], **options)
    for part in rows.tensor_split(parts):
        index.add(part, first_id)
        first_id += len(part)
    return index


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_are_the_oracles_in_however_small_parts_they_are_searched(case):
    queries, rows = CASES[case]
    expected, places = oracle(queries, rows, 3)
    index = indexed(
        rows,
        parts=3,
        first_id=1000,
        memory=7 * (8 * rows.shape[1] + 1100),  # seven queries at once
    )
    distances, ids = index.search(queries, k=3)
    found = places.shape[1]
    assert (ids[:, :found] - 1000).tolist() == places.tolist()
    torch.testing.assert_close(
        distances[:, :found],
        torch.from_numpy(expected),
        rtol=1e-12,
        atol=0,
    )
    assert (ids[:, found:] == -1).all()
    assert distances[:, found:].isinf().all()


@pytest.mark.parametrize("factory, more", [("IVF8,Flat", "nprobe=4"), ("HNSW16", ""), ("PQ4", "")])
def test_what_another_factory_proposes_is_measured_exactly(factory, more, tmp_path):
    queries, rows = CASES["low rank"]
    index = ShardedIndex(rows.shape[1], factory=factory)
    index.add(rows[:0], 0)
    for first in (0, 700):
        index.add(rows[first : first + 700], first)
    distances, ids = index.search(queries, k=2)
    differences = queries[:, None].double() - rows[ids].double()
    far = differences.square().sum(2)
    torch.testing.assert_close(
        distances,
        far,
        rtol=1e-12,
        atol=0,
    )
    recall = index.recall(queries, k=2)
    assert 0.1 < recall <= 1
    if more:
        index.tune(more)
        assert index.recall(queries, k=2) > recall
        ids = index.search(queries, k=2)[1]
    index.save(str(tmp_path))
    again = ShardedIndex.load(str(tmp_path))
    assert again.factory == factory
    assert torch.equal(again.search(queries, k=2)[1], ids)


def test_a_saved_index_is_replaced_by_another_and_grows_after_loading(tmp_path):
    rows = draw(0, 50, 4)
    place = str(tmp_path / "index")
    indexed(draw(1, 9, 4)).save(place)
    indexed(rows[:30], parts=3).save(place)
    assert len(list((tmp_path / "index").iterdir())) == 2
    index = ShardedIndex.load(place)
    assert len(index) == 30
    index.add(rows[30:], 30)
    found = index.search(rows, k=2)
    for one, other in zip(found, indexed(rows).search(rows, k=2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rows=draw(0, 3, 5)), r"the rows of rank 0 must be a float32 torch tensor \(n, 4\), not .*\(3, 5\)"),
        (dict(rows=draw(0, 3, 4).double()), "must be a float32"),
        (dict(rows=draw(0, 3, 4) / 0), "NaN or infinity in the rows of rank 0, row 0"),
        (dict(first_id=8), "both have a candidate with the id 8"),
        (dict(first_id=2**62 - 1), r"leave \[0, 2\*\*62\): they start at"),
    ],
)
def test_rows_that_cannot_be_added_leave_the_index_as_it_was(change, message):
    index = indexed(draw(0, 10, 4))
    right = dict(
        rows=draw(1, 3, 4),
        first_id=10,
    )
    with pytest.raises(ValueError, match=message):
        index.add(**right | change)
    assert len(index) == 10
    assert index.search(draw(0, 10, 4))[1].flatten().tolist() == list(range(10))


def test_rows_keep_their_ids_in_whatever_order_they_come(tmp_path):
    rows = draw(0, 30, 4)
    index = ShardedIndex(4)
    for first, last in ((0, 3), (20, 23), (3, 20)):
        index.add(rows[first:last], first)
    index.save(tmp_path)
    for one in (index, ShardedIndex.load(tmp_path)):
        assert one.search(rows[:23])[1].flatten().tolist() == list(range(23))


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_rows_of_which_only_some_could_be_stored_are_taken_out_again(factory, monkeypatch):
    rows = draw(0, 20, 4)
    index = indexed(rows[:10], factory=factory)

    def add_some(part, more):
        part.flat.add(more.numpy()[:3])
        raise MemoryError("std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(sharded.Part, "add", add_some)
        with pytest.raises(ValueError, match=f"{factory} on rank 0: std::bad_alloc"):
            index.add(rows[10:], 10)
    index.add(rows[10:], 10)
    assert index.search(rows)[1].flatten().tolist() == list(range(20))


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="factory 'XYZ': .*could not parse"):
        ShardedIndex(4, factory="XYZ")
    for factory in ("HNSW0", "IVF4_HNSW1,Flat", "HNSW1_PQ4"):
        with pytest.raises(ValueError, match="HNSW needs at least 2 links"):
            ShardedIndex(4, factory=factory)
    ShardedIndex(4, factory="HNSW10")
    for dims in (0, 2**31):
        with pytest.raises(ValueError, match=f"dims is {dims}: it must be at least 1, and below"):
            ShardedIndex(dims)
    with pytest.raises(ValueError, match="memory is 0: it must be at least 1"):
        ShardedIndex(4, memory=0)
    with pytest.raises(ValueError, match="IVF64,Flat on rank 0: .*training points"):
        indexed(draw(0, 10, 4), factory="IVF64,Flat")
    index = indexed(draw(0, 10, 4))
    for factory in ("Flat", "HNSW8"):
        with pytest.raises(ValueError, match=f"{factory} on rank 0: .*set_index_parameter"):
            ShardedIndex(4, factory=factory).tune("nprobe=2")
    with pytest.raises(ValueError, match="k is 0"):
        index.search(draw(0, 1, 4), k=0)
    with pytest.raises(ValueError, match="NaN or infinity in the queries of rank 0, row 2"):
        index.search(torch.cat([draw(0, 2, 4), torch.full((1, 4), torch.nan)]))


def test_an_index_that_is_not_whole_is_refused(tmp_path):
    place = str(tmp_path)
    with refused("no such file: ShardedIndex.save writes one"):
        ShardedIndex.load(place)
    indexed(draw(0, 10, 4)).save(place)
    (file,) = tmp_path.glob("*.faiss")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with refused("cut, damaged or of another index"):
        ShardedIndex.load(place)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for key, value, message in (
        ("dims", 5, "not the rows that sharded-index.json says"),
        ("factory", "XYZ", "malformed .*could not parse"),
        ("format", 2, "format 2, not 1"),
        ("parts", [{}], "malformed .*rows"),
        ("parts", {"rows": 1}, "malformed"),
        ("dims", 0, "malformed .*dims is 0"),
        ("parts", [manifest["parts"][0] | {"rows": "../other"}], "malformed .*hexadecimal"),
        ("parts", 2 * manifest["parts"], "both have a candidate with the id 0"),
        ("parts", [manifest["parts"][0] | {"spans": [[-1, 9]]}], "no such file"),
        ("factory", "HNSW8", "files and factory do not go together"),
    ):
        file.write_bytes(whole)
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {key: value}))
        with refused(message):
            ShardedIndex.load(place)
    file.write_bytes(whole)
    indexed(draw(0, 10, 4)).save(place)  # over one whose manifest is damaged
    assert len(ShardedIndex.load(place)) == 10
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        ShardedIndex.load(place)
