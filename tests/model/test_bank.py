"""The bank of codes: ranks among training images, and what a model with a bank says of images."""

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from naign.errors import InputError
from naign.model.bank import Bank, disturbed, rounded, unit
from naign.model.naign import NAIGN
from naign.model.prior.mixture import Mixture, MixtureConfig
from tests.model.made import make_model, prior_state

MIXTURE = {"name": "gmm", "components": 1}


def filled(codes=20, references=100, values=8):
    """A bank of random codes; energies and distances of its references are 0.01 to 1."""
    bank = Bank()
    torch.manual_seed(1)
    bank.codes = rounded(torch.randn(codes, values))
    bank.energies = torch.arange(1, references + 1) / references
    bank.distances = bank.energies.flip(0)
    return bank


def made(tmp_path, **changes):
    """A saved model with a bank, whose state is changed."""
    bank = filled()
    prior = Mixture(MixtureConfig(components=1), (8,))
    state = {f"bank.{name}": value for name, value in bank.state_dict().items()}
    model = make_model(state=prior_state(prior) | state, prior=MIXTURE, bank=bank.sizes)
    model.metadata |= changes.pop("metadata", {})
    for name, value in changes.items():
        setattr(model.bank, name, value)
    model.save_pretrained(tmp_path)
    return model


def test_ranks_are_shares_of_the_references():
    scores = filled().score(torch.tensor([0.0, 0.505, 2.0]), torch.tensor([0.0, 0.255, 0.255]))
    assert_close(scores.energy_rank, torch.tensor([0.0, 0.5, 1.0]))
    assert_close(scores.distance_rank, torch.tensor([0.0, 0.25, 0.25]))
    assert scores.rank[0] == 0 and scores.rank[1] < scores.rank[2] == 1


def test_one_reference_in_twenty_is_beyond_the_threshold():
    torch.manual_seed(0)
    bank = filled(references=1000)
    bank.distances = bank.energies[torch.randperm(1000)]
    scores = bank.score(bank.energies, bank.distances)
    assert float((scores.rank > 0.95).float().mean()) == pytest.approx(0.05, abs=0.002)


def test_distances_are_between_directions():
    bank = filled()
    codes = bank.codes.float()
    assert_close(bank.distance(3 * codes), torch.zeros(len(codes)))
    others = torch.randn(5, codes.shape[1])
    expected = torch.cdist(unit(rounded(others)), unit(bank.codes)).amin(1)
    assert_close(bank.distance(others), expected)


def score_alone(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 0:
        bank = filled()
        assert_close(bank.distance(bank.codes.float()), torch.zeros(len(bank.codes)))
    dist.barrier()
    dist.destroy_process_group()


def test_one_rank_of_a_program_may_score_alone(tmp_path):
    torch.multiprocessing.spawn(score_alone, args=(tmp_path / "store",), nprocs=2)


def test_a_bank_travels_with_its_model(tmp_path):
    model = made(tmp_path)
    again = NAIGN.from_pretrained(tmp_path)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    for value, expected in zip(again.score(images), model.score(images), strict=True):
        assert_close(value, expected)
    assert torch.equal(again.bank.codes, model.bank.codes)
    assert_close(again.score(images).energy, again.energy(images))


BAD = {
    "cut": {"codes": torch.zeros(19, 8, dtype=torch.int8)},
    "of another code": {"codes": torch.zeros(20, 9, dtype=torch.int8)},
    "none": {"metadata": {"bank": "all"}},
    "without references": {"energies": torch.zeros(0), "distances": torch.zeros(0), "metadata": {"bank": [20, 0]}},
    "of another type": {"energies": torch.zeros(100, dtype=torch.int64)},
    "of no weight": {"weight": torch.zeros(())},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bank_that_is_not_the_models_is_refused(tmp_path, change):
    made(tmp_path, **change)
    with pytest.raises(InputError, match="does not hold the model that its header describes"):
        NAIGN.from_pretrained(tmp_path)


def test_without_a_bank_or_for_other_sizes_there_are_no_scores(tmp_path):
    with pytest.raises(InputError, match="no bank"):
        make_model().score(torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="resize them"):
        made(tmp_path).score(torch.zeros(1, 1, 9, 9))


def test_the_weight_is_that_by_which_what_is_unlike_ranks_highest():
    torch.manual_seed(0)
    bank = filled(references=1000)
    bank.distances = bank.energies[torch.randperm(1000)]
    typical = bank.energies[torch.randperm(1000)]
    high = torch.full((1000,), 0.97)
    bank.weigh(typical, high)
    assert bank.weight > 1, "distances tell"
    bank.weigh(high, typical)
    assert bank.weight < 1, "energies tell"


def test_disturbed_images_are_upside_down_or_have_a_patch():
    images = torch.arange(4.0).view(4, 1, 1, 1) + torch.linspace(0, 0.5, 9).view(9, 1)
    images = images.expand(4, 1, 9, 9)
    made = disturbed(images)
    assert torch.equal(made[1::2], images[1::2].flip(2, 3))
    changed = (made != images)[0::2, 0]
    assert (changed.sum((1, 2)) == 9).all()
    assert torch.equal(made[2][made[2] != images[2]].floor().unique(), torch.tensor([1.0]))
