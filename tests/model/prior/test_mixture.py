"""A Gaussian mixture that is fitted to codes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from naign.errors import InputError
from naign.model.prior import Codes, Mixture, MixtureConfig
from naign.model.prior.mixture import ITERATIONS, k_means

SETTINGS = MixtureConfig(components=3)
CENTRES = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def make_codes(seed: int = 0, count: int = 3000) -> torch.Tensor:
    """Three clusters, the first of them narrow in its first value."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    narrow = torch.tensor([0.1, 1.0])
    spread = torch.where(which[:, None] == 0, narrow, torch.ones(2))
    return CENTRES[which] + spread * torch.randn(count, 2, generator=generator)


def fitted(codes: Codes, config: MixtureConfig = SETTINGS) -> Mixture:
    prior = Mixture(config, (2,), seed=3)
    shares = list(prior.fit(codes))
    assert shares == sorted(shares) and len(shares) == ITERATIONS and shares[-1] == 1
    return prior


def test_it_finds_clusters_their_shares_and_their_spread():
    prior = fitted(Codes.of(make_codes()))
    order = torch.cdist(CENTRES, prior.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(prior.weights[order], SHARES, atol=0.03, rtol=0)
    torch.testing.assert_close(prior.means[order], CENTRES, atol=0.15, rtol=0)
    factor = prior.factors[order[0]]
    spread = (factor @ factor.T).diagonal().sqrt()
    torch.testing.assert_close(spread, torch.tensor([0.1, 1.0]), atol=0.15, rtol=0)
    drawn = prior.draw(1, 0, torch.arange(4000), "cpu")
    nearest = torch.cdist(drawn, CENTRES).argmin(1)
    torch.testing.assert_close(torch.bincount(nearest, minlength=3) / 4000, SHARES, atol=0.05, rtol=0)


def test_the_likelihood_grows_from_iteration_to_iteration():
    prior = Mixture(SETTINGS, (2,), seed=3)
    grown = [prior.read_metrics()["prior/likelihood"] for _ in prior.fit(Codes.of(make_codes()))]
    assert grown[-1] >= grown[0]
    assert all(later > earlier - 1e-3 for earlier, later in pairwise(grown))


def test_other_starts_find_as_good_a_mixture():
    codes = Codes.of(make_codes())
    found = []
    for seed in (1, 2, 3):
        prior = Mixture(SETTINGS, (2,), seed=seed)
        list(prior.fit(codes))
        found.append(prior.read_metrics()["prior/likelihood"])
    assert max(found) - min(found) < 0.01


def test_a_fit_goes_on_bit_for_bit():
    codes = Codes.of(make_codes())
    prior = fitted(codes)
    stopped = Mixture(SETTINGS, (2,), seed=3)
    for _ in zip(range(4), stopped.fit(codes), strict=False):
        pass
    resumed = Mixture(SETTINGS, (2,), seed=3)
    resumed.load_training_state({name: value.clone() for name, value in stopped.training_state().items()})
    list(resumed.fit(codes))
    for name, value in prior.training_state().items():
        assert torch.equal(value, resumed.training_state()[name]), name


def test_ranks_fit_what_one_would():
    """Ranks as threads, each with its part of the codes; sums go over both."""
    world = 2
    codes = make_codes()
    barrier = threading.Barrier(world)
    parts: dict[int, torch.Tensor] = {}

    def fit(rank: int) -> Mixture:
        def add(value: torch.Tensor) -> torch.Tensor:
            parts[rank] = value
            barrier.wait(30)
            whole = parts[0] + parts[1]
            barrier.wait(30)
            return whole

        return fitted(Codes(sizes=(len(codes),), read=lambda _: (codes, None), rank=rank, world=world, add=add))

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(fit, range(world)))
    alone = fitted(Codes.of(codes))
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
        torch.testing.assert_close(ranks[0].state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_codes_of_more_values_than_directions_vary_along_the_leading_ones():
    wide = torch.randn(2000, 100) * torch.linspace(0.01, 2, 100)
    prior = Mixture(replace(SETTINGS, components=2), (4, 5, 5))
    list(prior.fit(Codes.of(wide.view(-1, 4, 5, 5))))
    drawn = prior.draw(0, 0, torch.arange(5000), "cpu").flatten(1)
    assert drawn.shape == (5000, 100)
    torch.testing.assert_close(drawn.std(0)[-20:], wide.std(0)[-20:], rtol=0.15, atol=0)


def test_k_means_finds_as_many_clusters_as_there_are_points():
    assert len(k_means(torch.eye(4), 9, 0).unique()) == 4


def test_codes_that_are_all_the_same_are_refused():
    with pytest.raises(InputError, match="the codes of all images are the same"):
        list(Mixture(SETTINGS, (2,)).fit(Codes.of(torch.ones(100, 2))))


@pytest.mark.parametrize(
    ("count", "shape", "said"),
    [
        (1999, (64,), "components=100 with prior.images=1999: fewer than 20 codes a component"),
        (10**6, (4096,), "over 268435456 values in all: fit the mixture to fewer images"),
        (2000, (20_000,), "over 67108864 values in covariances: ask for fewer components"),
    ],
)
def test_too_large_mixtures_and_too_few_codes_are_refused(count, shape, said):
    config = MixtureConfig(components=100)
    config.check_codes(2000, (8, 16, 16))
    with pytest.raises(InputError, match=said):
        config.check_codes(count, shape)
