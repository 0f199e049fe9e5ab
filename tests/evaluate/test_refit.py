"""A Gaussian mixture fitted to the codes of a trained f."""

import pytest
import torch
from naign.model.prior.gmm import Gmm, GmmConfig

from naign.errors import InputError
from naign.evaluate.refit import fit_mixture
from naign.model.naign import NAIGN
from naign.model.networks import SpatialConfig, build_network


def two_clusters(count, shape=(3,)):
    """One and three quarters of the codes."""
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    upper = torch.arange(count) % 4 > 0
    return drawn + 8 * upper.view(-1, *(1 for _ in shape))


def fitted(codes, components):
    prior = Gmm(GmmConfig(components=components), tuple(codes.shape[1:]))
    prior.load_state_dict(fit_mixture(codes, components))
    return prior


def test_draws_have_the_clusters_and_their_shares():
    prior = fitted(two_clusters(2000), 2)
    drawn = prior.draw(1, 0, torch.arange(4000), "cpu")
    upper = drawn.mean(1) > 4
    assert 0.72 < float(upper.float().mean()) < 0.78
    assert torch.allclose(drawn[upper].mean(0), torch.tensor(8.0), atol=0.2)
    assert torch.allclose(drawn[~upper].T.cov(), torch.eye(3), atol=0.2)


def test_spread_too_small_to_matter_is_left_out():
    flat = two_clusters(500)
    flat[:, 1] = 2 * flat[:, 0]
    prior = fitted(flat, 2)
    assert prior.factors.shape == (2, 3, 2)
    drawn = prior.draw(0, 0, torch.arange(50), "cpu")
    torch.testing.assert_close(drawn[:, 1], 2 * drawn[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("codes", "components", "said"),
    [
        (two_clusters(30), 2, "needs 40 images, not 30"),
        (torch.ones(50, 3), 1, "the same"),
        (two_clusters(50), 0, "at least 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(codes, components, said):
    with pytest.raises(InputError, match=said):
        fit_mixture(codes, components)


@pytest.fixture
def model():
    settings = {"name": "spatial", "width": 8, "code": 2}
    network = build_network(SpatialConfig(**settings), (1, 8, 8))
    metadata = {"shape": [1, 8, 8], "prior": {"name": "gmm", "components": 2}, "model": settings}
    return NAIGN(network, metadata, fit_mixture(two_clusters(100, network.code), 2))


def test_it_travels_with_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(model.sample(5, seed=1), NAIGN.from_pretrained(tmp_path).sample(5, seed=1))


@pytest.mark.parametrize("broken", ["factors", "means", "components"])
def test_a_state_that_does_not_fit_is_refused(model, tmp_path, broken):
    if broken == "components":
        model.metadata["prior"]["components"] = 3
    else:
        model.prior.register_buffer(broken, model.prior.get_buffer(broken)[1:])
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not hold the model that its header describes"):
        NAIGN.from_pretrained(tmp_path)
