"""A Gaussian mixture that follows the codes of f from round to round."""

import math

import pytest
import torch

from pipeline.errors import InputError
from pipeline.model.codes import CodeLaw, CodesConfig
from pipeline.model.mixture import check_mixture, draw_mixture, is_mixture
from pipeline.model.running import MixtureLaw, build

CPU = torch.device("cpu")
SETTINGS = CodesConfig(components=3, begin=0.5, alone=0.0)
CENTRES = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def codes(round: int, count: int = 600, moved: float = 0.0) -> torch.Tensor:
    """Three clusters, the first of them narrow in its first value."""
    generator = torch.Generator().manual_seed(round)
    which = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    spread = torch.where(which[:, None] == 0, torch.tensor([0.1, 1.0]), torch.ones(2))
    return CENTRES[which] + moved + spread * torch.randn(count, 2, generator=generator)


def learned(rounds: int, *, share: float = 0.5, moved: float = 0.0) -> MixtureLaw:
    """A law that has followed so many rounds, while the clusters moved by `moved` a round."""
    law = MixtureLaw((2,), SETTINGS, 3, CPU)
    for round in range(rounds):
        assert list(law.learn(codes(round, moved=moved * round), share)) == []
    return law


def test_it_learns_clusters_their_shares_and_their_spread():
    law = learned(12)
    order = torch.cdist(CENTRES, law.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(law.weights[order], SHARES, atol=0.03, rtol=0)
    torch.testing.assert_close(law.means[order], CENTRES, atol=0.15, rtol=0)
    spread = [float(law.factors[order[0], value, value]) for value in (0, 1)]
    assert spread == pytest.approx([0.1, 1.0], rel=0.15)
    assert math.isnan(law.loss) and not law.begun(1.0) and law.rounds == 12


def test_before_it_begins_it_is_one_gaussian():
    law = learned(8, share=0.49)
    assert law.weights.tolist() == [1, 0, 0]
    whole = torch.cat([codes(round) for round in range(3, 8)])
    drawn = draw_mixture(law.state(), 0, 0, torch.arange(20_000))
    torch.testing.assert_close(drawn.mean(0), whole.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), whole.T.cov(), atol=0.3, rtol=0)
    list(law.learn(codes(4), 0.5))
    assert law.parted and law.followed == 1 and float(law.weights.min()) > 0.1


def test_it_follows_clusters_that_move():
    law = learned(20, moved=0.2)
    order = torch.cdist(CENTRES + 3.8, law.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert float((law.means[order] - CENTRES - 3.8).abs().max()) < 1.2


def test_its_state_is_a_mixtures():
    state = learned(3).state()
    assert is_mixture(state) and check_mixture(state) == (2,)
    drawn = draw_mixture(state, 1, 0, torch.arange(2000))
    assert float(torch.cdist(drawn, CENTRES).amin(1).median()) < 1.5
    assert torch.equal(drawn[[7, 3]], draw_mixture(state, 1, 0, torch.tensor([7, 3])))


@pytest.mark.parametrize("rounds", [2, 5])
def test_learning_goes_on_bit_for_bit(rounds):
    law, other = learned(rounds, share=0.2), MixtureLaw((2,), SETTINGS, 3, CPU)
    list(law.learn(codes(7), 0.5))
    other.load(law.dump())
    for one in (law, other):
        list(one.learn(codes(8), 0.6))
    for name, value in law.dump().items():
        assert torch.equal(value, other.dump()[name]), name


def test_another_laws_statistics_are_refused():
    saved = learned(1).dump()
    with pytest.raises(InputError, match="counts of the mixture have another shape"):
        MixtureLaw((2,), CodesConfig(components=4), 3, CPU).load(saved)
    with pytest.raises(KeyError):
        MixtureLaw((2,), SETTINGS, 3, CPU).load({"progress": saved["progress"]})


@pytest.mark.parametrize("count", [2, 40])
def test_few_codes_or_all_the_same_are_no_error(count):
    law = MixtureLaw((2,), SETTINGS, 3, CPU)
    for _ in range(3):
        list(law.learn(torch.ones(count, 2), 0.5))
    torch.testing.assert_close(draw_mixture(law.state(), 0, 0, torch.arange(9)), torch.ones(9, 2), atol=1e-3, rtol=0)


def test_the_setting_chooses_the_law_and_too_large_ones_are_refused():
    assert isinstance(build((4, 6, 6), SETTINGS, 100, 0, CPU), MixtureLaw)
    assert isinstance(build((4, 6, 6), CodesConfig(), 100, 0, CPU), CodeLaw)
    with pytest.raises(InputError, match=r"components=100 with codes of 1024 values.*fewer components"):
        build((1024,), CodesConfig(components=100), 1000, 0, CPU)
    with pytest.raises(InputError, match=r"components=100 with match.round=799: fewer than 8"):
        build((4,), CodesConfig(components=100), 799, 0, CPU)
