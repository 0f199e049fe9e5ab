"""A Gaussian mixture on codes as the law of latents."""

import pytest
import torch

from pipeline.errors import InputError
from pipeline.model import mixture
from pipeline.model.naign import NAIGN
from pipeline.model.networks import SpatialConfig, build_network


def codes(count: int, shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes."""
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return drawn + 8 * (torch.arange(count) % 4 > 0).view(-1, *(1,) * len(shape))


def test_draws_have_the_clusters_and_their_shares():
    state = mixture.fit_mixture(codes(2000), 2)
    drawn = mixture.draw_mixture(state, 1, 0, torch.arange(4000))
    upper = drawn.mean(1) > 4
    assert 0.72 < float(upper.float().mean()) < 0.78
    assert torch.allclose(drawn[upper].mean(0), torch.tensor(8.0), atol=0.2)
    assert torch.allclose(drawn[~upper].T.cov(), torch.eye(3), atol=0.2)
    assert torch.equal(drawn[[7, 3]], mixture.draw_mixture(state, 1, 0, torch.tensor([7, 3])))


def test_spread_too_small_to_matter_is_left_out():
    flat = codes(500)
    flat[:, 1] = 2 * flat[:, 0]
    drawn = mixture.draw_mixture(mixture.fit_mixture(flat, 2), 0, 0, torch.arange(50))
    torch.testing.assert_close(drawn[:, 1], 2 * drawn[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "components", "said"),
    [(codes(30), 2, "needs 40 images, not 30"), (torch.ones(50, 3), 1, "the same"), (codes(50), 0, "at least 1")],
)
def test_what_cannot_be_fitted_is_refused(given, components, said):
    with pytest.raises(InputError, match=said):
        mixture.fit_mixture(given, components)


@pytest.mark.parametrize("broken", ["", "factors", "mean"])
def test_it_travels_with_the_model(tmp_path, broken):
    network = build_network(SpatialConfig(width=8, code=2), (1, 8, 8))
    state = mixture.fit_mixture(codes(100, network.code), 2)
    if broken:
        state[broken] = state[broken][1:]
    model = NAIGN(
        network, {"shape": [1, 8, 8], "latents": "codes", "model": {"name": "spatial", "width": 8, "code": 2}}, state
    )
    model.save_pretrained(tmp_path)
    if broken:
        with pytest.raises(InputError, match=f"the mixture's {broken}"):
            NAIGN.from_pretrained(tmp_path)
        return
    again = NAIGN.from_pretrained(tmp_path)
    assert torch.equal(model.sample(5, seed=1), again.sample(5, seed=1))
