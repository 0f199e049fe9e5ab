"""A Gaussian mixture that follows the codes of f from round to round."""

import pytest
import torch

from naign.errors import InputError
from naign.model.prior import Examples
from naign.model.prior.gmm import Gmm, GmmConfig

SETTINGS = GmmConfig(components=3, begin=0.5, alone=0.0)
CENTRES = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def codes(round: int, count: int = 600, moved: float = 0.0) -> torch.Tensor:
    """Three clusters, the first of them narrow in its first value."""
    generator = torch.Generator().manual_seed(round)
    which = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    spread = torch.where(which[:, None] == 0, torch.tensor([0.1, 1.0]), torch.ones(2))
    return CENTRES[which] + moved + spread * torch.randn(count, 2, generator=generator)


def learn(prior: Gmm, codes: torch.Tensor, progress: float = 0.5) -> None:
    assert list(prior.learn(Examples(images=codes, progress=progress))) == []


def learned(rounds: int, *, progress: float = 0.5, moved: float = 0.0) -> Gmm:
    """A mixture that has followed so many rounds, while the clusters moved by `moved` a round."""
    prior = Gmm(SETTINGS, (2,), seed=3)
    for round in range(rounds):
        learn(prior, codes(round, moved=moved * round), progress)
    return prior


def test_it_learns_clusters_their_shares_and_their_spread():
    prior = learned(12)
    order = torch.cdist(CENTRES, prior.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(prior.weights[order], SHARES, atol=0.03, rtol=0)
    torch.testing.assert_close(prior.means[order], CENTRES, atol=0.15, rtol=0)
    spread = [float(prior.factors[order[0], value, value]) for value in (0, 1)]
    assert spread == pytest.approx([0.1, 1.0], rel=0.15)
    drawn = prior.draw(1, 0, torch.arange(4000), "cpu")
    nearest = torch.cdist(drawn, CENTRES).argmin(1)
    torch.testing.assert_close(torch.bincount(nearest, minlength=3) / 4000, SHARES, atol=0.05, rtol=0)
    assert float(torch.cdist(drawn, CENTRES).amin(1).square().mean()) == pytest.approx(1.5, abs=0.15)  # 2 but for one


def test_before_it_begins_it_is_one_gaussian():
    prior = learned(8, progress=0.49)
    assert prior.weights.tolist() == [1, 0, 0]
    whole = torch.cat([codes(round) for round in range(3, 8)])
    drawn = prior.draw(0, 0, torch.arange(20_000), "cpu")
    torch.testing.assert_close(drawn.mean(0), whole.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), whole.T.cov(), atol=0.3, rtol=0)
    again = Gmm(SETTINGS, (2,))
    again.load_state_dict(prior.state_dict())
    assert not again.begun
    learn(prior, codes(4))
    again.load_state_dict(prior.state_dict())
    assert again.begun
    assert prior.parted and prior.followed == 1 and float(prior.weights.min()) > 0.1


def test_before_it_begins_a_part_of_the_images_is_enough():
    prior, encoded = Gmm(SETTINGS, (2,)), list[int]()

    def encode(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return images

    for progress in (0.4, 0.5):
        list(prior.learn(Examples(images=codes(0), encode=encode, progress=progress, stride=4)))
    assert encoded == [150, 512, 88]


def test_it_follows_clusters_that_move():
    prior = learned(20, moved=0.2)
    order = torch.cdist(CENTRES + 3.8, prior.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert float((prior.means[order] - CENTRES - 3.8).abs().max()) < 1.2


@pytest.mark.parametrize("rounds", [2, 5])
def test_learning_goes_on_bit_for_bit_from_one_gaussian(rounds):
    prior, other = learned(rounds, progress=0.2), Gmm(SETTINGS, (2,), seed=3)
    learn(prior, codes(7))
    other.load_training_state({name: value.clone() for name, value in prior.training_state().items()})
    for one in (prior, other):
        learn(one, codes(8), 0.6)
    for name, value in prior.training_state().items():
        assert torch.equal(value, other.training_state()[name]), name


@pytest.mark.parametrize("count", [2, 40])
def test_few_codes_or_all_the_same_are_no_error(count):
    prior = Gmm(SETTINGS, (2,), seed=3)
    for _ in range(3):
        learn(prior, torch.ones(count, 2))
    torch.testing.assert_close(prior.draw(0, 0, torch.arange(9), "cpu"), torch.ones(9, 2), atol=1e-3, rtol=0)


def test_too_large_mixtures_and_too_small_rounds_are_refused():
    with pytest.raises(InputError, match=r"components=100 with codes of 1024 values.*fewer components"):
        Gmm(GmmConfig(components=100), (1024,))
    with pytest.raises(InputError, match=r"components=100 with match.round=1999: fewer than 20.*match.round to 2000"):
        GmmConfig(components=100).check_rounds(9, 1999)
    GmmConfig(components=100).check_rounds(9, 2000)
