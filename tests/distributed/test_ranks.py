"""Real gloo ranks: the same match, the same errors on all, and no hang."""

import pytest
import torch

from naign import errors
from tests.distributed.ranks import on_ranks
from tests.e2e.runs import reports
from tests.programs import succeeded


@pytest.mark.slow
def test_the_match_is_the_same_on_every_world_size_by_either_method(tmp_path):
    (alone,) = on_ranks("cases.match", 1, tmp_path / "1")
    assert torch.equal(alone["flat"]["ids"], alone["bounded"]["ids"])
    for world in (2, 3):
        parts = on_ranks("cases.match", world, tmp_path / str(world))
        for method, answer in alone.items():
            for key in ("distances", "ids"):
                together = torch.cat([part[method][key] for part in parts])
                assert torch.equal(together, answer[key]), f"{method}: {key} on {world} ranks"
            for part in parts:
                assert part[method]["values"] == answer["values"]


@pytest.mark.slow
def test_two_ranks_match_as_one_does_in_the_first_round_and_learn_as_well(train, small, tmp_path):
    options = [*small, "--train.images=2560", "--checkpoint.rounds=100"]
    images = []
    for ranks in (1, 2):
        trace = tmp_path / f"trace{ranks}"
        done = succeeded(train(f"--run.path=run{ranks}", f"--data.trace={trace}", *options, ranks=ranks))
        assert f"on {ranks} x cpu" in done.stdout + done.stderr
        read = []
        for file in trace.iterdir():
            read += file.read_text().splitlines()
        images.append(sorted(read))
    alone = reports(tmp_path / "run1")
    shared = reports(tmp_path / "run2")
    # Equal ids give equal distances; the sum over ranks differs in rounding alone.
    assert alone[0]["match/distance"] == pytest.approx(shared[0]["match/distance"], rel=1e-6)
    assert alone[-1]["loss/total"] == pytest.approx(shared[-1]["loss/total"], rel=0.02)
    assert images[0] == images[1] and len(images[0]) == 10 * 256


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_on_all_with_its_class_and_message(tmp_path):
    first, second = on_ranks("cases.raised", 2, tmp_path)
    assert first == second
    assert first == {
        "one": ("Damaged", "damaged"),
        "diverged": ("Diverged", "diverged"),
        "stopped": ("Stopped", ""),
        "a subclass of another module": ("Damaged", "narrower"),
        "2 before 75": ("Damaged", "damaged"),
        "75 before 76": ("Stopped", ""),
        "76 before 1": ("PeerLost", "lost"),
        "the first rank's of two alike": ("InputError", "wrong"),
        "none": ("", ""),
    }


@pytest.mark.slow
def test_no_rank_leaves_before_all_are_done_but_none_waits_for_ever(tmp_path):
    came, left = zip(*on_ranks("cases.parted", 3, tmp_path / "all"), strict=True)
    assert max(came) <= min(left)
    *others, _ = on_ranks("cases.parted_without_one", 3, tmp_path / "less", missing={2})
    assert min(others) > 0.4


def test_every_error_of_a_program_can_be_raised_on_all_ranks():
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == errors.__name__:
            assert kind in errors.SHARED
            assert kind.code in errors.BY_WEIGHT
