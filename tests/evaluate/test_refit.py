"""A Gaussian mixture fitted to the codes of a trained f."""

import pytest
import torch
from naign.model.prior.gmm import Gmm, GmmConfig

from naign.errors import InputError
from naign.evaluate.refit import fit_mixture
from naign.model.naign import NAIGN
from naign.model.networks import SpatialConfig, build_network


def codes(count: int, shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes."""
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return drawn + 8 * (torch.arange(count) % 4 > 0).view(-1, *(1,) * len(shape))


def fitted(codes: torch.Tensor, components: int) -> Gmm:
    prior = Gmm(GmmConfig(components=components), tuple(codes.shape[1:]))
    prior.load_state_dict(fit_mixture(codes, components))
    return prior


def test_draws_have_the_clusters_and_their_shares():
    prior = fitted(codes(2000), 2)
    drawn = prior.draw(1, 0, torch.arange(4000), "cpu")
    upper = drawn.mean(1) > 4
    assert 0.72 < float(upper.float().mean()) < 0.78
    assert torch.allclose(drawn[upper].mean(0), torch.tensor(8.0), atol=0.2)
    assert torch.allclose(drawn[~upper].T.cov(), torch.eye(3), atol=0.2)
    torch.testing.assert_close(drawn[[7, 3]], prior.draw(1, 0, torch.tensor([7, 3]), "cpu"))


def test_spread_too_small_to_matter_is_left_out():
    flat = codes(500)
    flat[:, 1] = 2 * flat[:, 0]
    prior = fitted(flat, 2)
    assert prior.factors.shape == (2, 3, 2)
    drawn = prior.draw(0, 0, torch.arange(50), "cpu")
    torch.testing.assert_close(drawn[:, 1], 2 * drawn[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "components", "said"),
    [(codes(30), 2, "needs 40 images, not 30"), (torch.ones(50, 3), 1, "the same"), (codes(50), 0, "at least 1")],
)
def test_what_cannot_be_fitted_is_refused(given, components, said):
    with pytest.raises(InputError, match=said):
        fit_mixture(given, components)


@pytest.mark.parametrize("broken", ["", "factors", "means", "components"])
def test_it_travels_with_the_model(tmp_path, broken):
    network = build_network(SpatialConfig(width=8, code=2), (1, 8, 8))
    prior = {"name": "gmm", "components": 2}
    metadata = {"shape": [1, 8, 8], "prior": prior, "model": {"name": "spatial", "width": 8, "code": 2}}
    model = NAIGN(network, metadata, fit_mixture(codes(100, network.code), 2))
    made = model.sample(5, seed=1)
    if broken == "components":
        prior["components"] = 3
    elif broken:
        model.prior.register_buffer(broken, model.prior.get_buffer(broken)[1:])
    model.save_pretrained(tmp_path)
    if broken:
        with pytest.raises(InputError, match="does not hold the model that its header describes"):
            NAIGN.from_pretrained(tmp_path)
    else:
        assert torch.equal(made, NAIGN.from_pretrained(tmp_path).sample(5, seed=1))
