"""ShardedIndex on real gloo ranks: exact, and the same on every number of ranks."""

import re

import pytest
import torch

from naign.match.sharded import ShardedIndex
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_cases import NEIGHBOURS, QUERIES, ROWS
from tests.match.problems import oracle

pytestmark = pytest.mark.slow


def joined(parts):
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def alone():
    """The answer of one process that has all rows."""
    index = ShardedIndex(ROWS.shape[1])
    index.add(ROWS, 0)
    return index.search(QUERIES, NEIGHBOURS)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_answer_is_the_oracles_bit_for_bit_on_every_number_of_ranks(world, alone, tmp_path):
    _, places = oracle(QUERIES, ROWS, NEIGHBOURS)
    parts = on_ranks("sharded_cases.answers", world, tmp_path)
    for share in parts[0]:
        distances, ids = joined([part[share] for part in parts])
        assert ids.tolist() == places.tolist(), share
        assert torch.equal(distances, alone[0]), share


def test_what_three_ranks_saved_two_and_four_load(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("INDEX", str(tmp_path / "index"))
    for world in (3, 2, 4):
        distances, ids = joined(on_ranks("sharded_cases.saved", world, tmp_path / str(world)))
        assert torch.equal(distances, alone[0]) and torch.equal(ids, alone[1])
    assert len(list((tmp_path / "index").glob("*.faiss"))) == 3


def test_what_is_wrong_on_one_rank_is_the_same_error_on_all(tmp_path, monkeypatch):
    monkeypatch.setenv("INDEX", str(tmp_path / "index"))
    parts = on_ranks("sharded_cases.refused", 3, tmp_path)
    assert parts[0] == parts[1] == parts[2]
    expected = {
        "width": r"the rows of rank 2 must be a float32 torch tensor \(n, 3\), not torch.float32 \(2, 2\)",
        "taken": "ranks 1 and 2 both have a candidate with the id 107",
        "nan": "NaN or infinity in the queries of rank 2, row 0",
        "k": r"k must be the same on all ranks, not \[1, 1, 2\]",
        "factory": "factory 'XYZ': .*could not parse",
        "dims": r"must be the same on all ranks: rank 2 has \(4, 'Flat', .*\), rank 0 \(3, ",
        "place": "/proc/nowhere, from rank 2, cannot be written",
        "apart": "rank 0 does not find .*index0/.*: save to one place that all ranks share",
        "training": "IVF4,Flat on rank 2: .*training points",
        "left": "24",
        "trained": r"\(120, True\)",
    }
    assert parts[0].keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.search(pattern, parts[0][name]), parts[0][name]
