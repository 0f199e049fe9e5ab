"""The search on real gloo ranks: the oracle's answer whoever holds what, one error for all, and never a hang."""

import pytest
import torch

from naign.distributed.signals import POLL_SECONDS
from tests.distributed.ranks import on_ranks
from tests.distributed.search_cases import ASKED, GROUPS, IMAGES, ROUND, SAMPLES
from tests.match.problems import CASES, oracle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected():
    return {case: oracle(*problem, 3)[1].tolist() for case, problem in CASES.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (found,) = on_ranks("search_cases.answers", 1, tmp_path_factory.mktemp("alone"))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_answer_is_the_oracles_on_every_world_size(world, expected, alone, tmp_path):
    parts = [alone]
    if world > 1:
        parts = on_ranks("search_cases.answers", world, tmp_path)
    for name, (_, distances, ids) in alone.items():
        rows, found, found_ids = map(torch.cat, zip(*(part[name] for part in parts), strict=True))
        right = expected[name.split(", ")[0]]
        assert rows.tolist() == list(range(len(rows)))
        assert found_ids[:, : len(right[0])].tolist() == right, f"{name} on {world} ranks"
        assert torch.equal(found, distances) and torch.equal(found_ids, ids), f"{name} on {world} ranks"


def test_what_is_wrong_on_one_rank_is_the_same_error_on_all(tmp_path):
    parts = on_ranks("search_cases.refused", 3, tmp_path)
    expected = {
        "nan": "NotFinite: nearest: NaN or infinity in the queries of rank 2, row 2",
        "infinity": "NotFinite: nearest: NaN or infinity in the candidates of rank 2, row 7",
        "dims": "ValueError: nearest: the rows of rank 2 have 2 values in blocks of 65536, those of rank 0 3 in 65536",
        "dtype": "ValueError: nearest: queries and candidates of rank 2 must be float32 torch tensors (n, d) of the "
        "same d >= 1, not torch.float64 (5, 3)",
        "ids": f"ValueError: nearest: the ids of rank 2 leave [0, 2**62): it starts at {2**62 - 4}",
        "size": "ValueError: nearest: the rows of rank 2 have 3 values in blocks of 8, those of rank 0 3 in 65536",
        "none": "ValueError: nearest: no rank has a candidate",
        "shared ids": "ValueError: nearest: ranks 0 and 1 both have a candidate with the id 4",
        "failing in blocks of 4": "PeerFailed: nearest: rank 2 failed to make its candidates from row 4 on",
        "failing in blocks of 1": "PeerFailed: nearest: rank 2 failed to make its candidates from row 1 on",
        "afterwards": "5",
        "made in lock-step": "2",  # of 8: no rank makes another block
    }
    assert parts[0] == parts[1] == expected
    gone = "OSError: the disk is gone"
    assert parts[2] == expected | {"failing in blocks of 4": gone, "failing in blocks of 1": gone}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_stop_asked_of_one_rank_ends_the_match_on_all_within_a_few_blocks(world, tmp_path):
    parts = on_ranks("search_cases.stopped", world, tmp_path)
    most = ASKED + int(POLL_SECONDS / 0.02)  # a block takes 0.02 seconds at least, and ranks agree every POLL_SECONDS
    name, made = parts[0]["stopped"]
    assert name == "Stopped" and ASKED <= made <= most
    for rank, part in enumerate(parts):
        assert part["stopped"] == (name, made)  # in lock-step
        # A rank that cannot sample takes the others along at the end of the part that it was making.
        error, until = part["failed"]
        assert error == ("OSError" if rank == world - 1 else "PeerFailed")
        assert ASKED <= until <= ASKED + 4


@pytest.mark.parametrize("how", ["lost", "silent"])
def test_a_rank_that_dies_or_falls_silent_fails_the_others_in_time(how, tmp_path):
    first, second = on_ranks(
        f"search_cases.{how}",
        3,
        tmp_path,
        missing={2},
        timeout=5,
    )[:2]
    for rank, part in enumerate((first, second)):
        assert f"rank {rank} of 3 failed while" in part["told"]
        assert "another rank died or did not answer within the process group's timeout" in part["told"]
        assert part["seconds"] < 20


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_group_has_its_own_part_of_the_pool_on_every_number_of_ranks(world, tmp_path):
    parts = on_ranks("search_cases.grouped", world, tmp_path)
    for size in GROUPS:
        count = size or ROUND
        ids = torch.cat([part[size][0] for part in parts])
        for group, rows in enumerate(IMAGES.flatten(1).split(count)):
            first = group * 10 * count
            samples = SAMPLES.flatten(1)[first : first + 10 * count]
            _, places = oracle(rows, samples)
            found = ids.split(count)[group]
            assert (found - first).tolist() == places[:, 0].tolist()
        for part in parts:
            assert part[size][2] == pytest.approx(parts[0][size][2], rel=1e-12)


def test_a_failure_in_one_group_ends_the_match_of_all_in_lock_step(tmp_path):
    parts = on_ranks("search_cases.failing_group", 4, tmp_path)
    own = "OSError: the disk is gone"
    other = f"PeerFailed: rank 1: {own}"
    for size, samples in (("within a rank", [30, 18, 30, 30]), ("of two ranks", [30, 3, 30, 30])):
        found = [part[size] for part in parts]
        assert [told for told, _, _ in found] == [other, own, other, other]
        assert [polls for _, polls, _ in found] == [30] * 4
        assert [made for _, _, made in found] == samples
