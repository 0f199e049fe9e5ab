"""A Gaussian mixture that is fitted to codes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from naign.model.prior import Mixture, MixtureConfig
from naign.model.prior.mixture import ITERATIONS
from tests.model.made import assert_near
from tests.model.prior.ranks import fit_on_ranks, in_memory
from tests.refused import refused

SETTINGS = MixtureConfig(components=3)
CENTRES = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def make_codes(seed=0, count=3000):
    """Three clusters, the first of them narrow in its first value."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(
        SHARES,
        count,
        replacement=True,
        generator=generator,
    )
    narrow = torch.tensor([0.1, 1.0])
    spread = torch.where(which[:, None] == 0, narrow, torch.ones(2))
    return CENTRES[which] + spread * torch.randn(count, 2, generator=generator)


@pytest.fixture(scope="module")
def codes():
    return make_codes()


@pytest.fixture(scope="module")
def prior(codes):
    """Fitted to the codes."""
    prior = Mixture(SETTINGS, (2,), seed=3)
    shares = list(prior.fit(in_memory(codes)))
    assert shares == sorted(shares)
    assert len(shares) == ITERATIONS
    assert shares[-1] == 1
    return prior


def test_it_finds_clusters_their_shares_and_their_spread(prior):
    means = prior.means @ prior.back + prior.mean
    order = torch.cdist(CENTRES, means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert_near(prior.weights[order], SHARES, 0.03)
    assert_near(means[order], CENTRES, 0.15)
    factor = prior.back.T @ prior.factors[order[0]]
    spread = (factor @ factor.T).diagonal().sqrt()
    assert_near(spread, torch.tensor([0.1, 1.0]), 0.15)
    drawn = prior.draw(1, 0, torch.arange(4000), "cpu")
    shares = torch.cdist(drawn, CENTRES).argmin(1).bincount() / 4000
    assert_near(shares, SHARES, 0.05)


def test_any_samples_in_a_row_hold_each_component_in_proportion(prior):
    firsts = set()
    for seed in range(8):
        ids = torch.arange(77 * seed, 77 * seed + 300)
        chosen = prior._spread(seed, 0, ids, "cpu")
        counts = torch.histogram(chosen.flatten(), 10, range=(0.0, 1.0)).hist
        assert (counts - 30).abs().max() <= 3  # chosen apart, they would be 5 off
        firsts.add(float(chosen[0]))
    assert len(firsts) == 8


def test_a_fit_that_was_stopped_ends_with_the_same_bits(prior, codes):
    stopped = Mixture(SETTINGS, (2,), seed=3)
    fit = stopped.fit(in_memory(codes))
    for _ in range(4):
        next(fit)
    resumed = Mixture(SETTINGS, (2,), seed=3)
    resumed.load_training_state(stopped.training_state())
    list(resumed.fit(in_memory(codes)))
    for name, value in prior.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_ranks_fit_what_one_would(prior, codes):
    ranks = [Mixture(SETTINGS, (2,), seed=3) for _ in range(2)]
    fit_on_ranks(ranks, codes)
    first = ranks[0].state_dict()
    second = ranks[1].state_dict()
    for name, value in prior.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name], value, atol=1e-4, rtol=1e-3)


def test_ranks_agree_where_their_machines_turn_directions_round(prior, codes, monkeypatch):
    signs = iter((1, -1))  # of the first rank that asks, and of the other: eigenvectors have either sign
    eigh = torch.linalg.eigh

    def turned(matrix):
        spread, directions = eigh(matrix)
        return spread, directions * next(signs)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    ranks = [Mixture(SETTINGS, (2,), seed=3) for _ in range(2)]
    fit_on_ranks(ranks, codes)
    assert torch.equal(ranks[0].means, ranks[1].means)
    assert_close(ranks[0].likelihood, prior.likelihood, atol=1e-3, rtol=0)


def test_codes_of_more_values_than_directions_vary_along_the_leading_ones():
    wide = torch.randn(2000, 100) * torch.linspace(0.01, 2, 100)
    prior = Mixture(replace(SETTINGS, components=2), (4, 5, 5))
    list(prior.fit(in_memory(wide.view(-1, 4, 5, 5))))
    drawn = prior.draw(0, 0, torch.arange(5000), "cpu").flatten(1)
    expected = wide.std(0)[-20:]
    assert_close(drawn.std(0)[-20:], expected, rtol=0.15, atol=0)


def test_codes_that_are_all_the_same_are_refused():
    with refused("the codes of all images are the same"):
        list(Mixture(SETTINGS, (2,)).fit(in_memory(torch.ones(100, 2))))


@pytest.mark.parametrize(
    "count, shape, said",
    [
        (10**6, (4096,), "over 268435456 values in all: fit the mixture to fewer images"),
        (2000, (20_000,), "over 134217728 values in their covariance: ask for a smaller code"),
    ],
)
def test_too_many_and_too_large_codes_are_refused(count, shape, said):
    config = MixtureConfig(components=100)
    config.check_codes(2000, (8, 16, 16))
    with refused(said):
        config.check_codes(count, shape)
