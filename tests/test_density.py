"""The scores of benchmarks/density.py on cases with known answers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from naign.model.prior.flow import Flow, FlowConfig

RATES = torch.tensor([-1.0, 0.5, 1.0])


@pytest.fixture(scope="module")
def density(benchmarks):
    import density

    return density


class Stretching(nn.Module):
    """The velocity that carries N(0, I) to N(0, exp(2 RATES)) in one unit of time."""

    def forward(self, codes, time):
        return codes * RATES


def test_the_density_of_a_code_under_a_flow_is_that_of_what_it_draws(density):
    flow = Flow(FlowConfig(width=8, depth=1, steps=64), (3,))
    flow.velocity = Stretching()
    codes = torch.randn(600, 3)
    law = torch.distributions.Normal(0, RATES.exp())
    exact = -law.log_prob(codes).sum(1) - 1.5 * math.log(2 * math.pi)
    found = density.code_density(flow, codes)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=1e-3)


def test_the_bound_of_a_vae_is_error_and_divergence(density):
    def blind(rows):
        """Black images from codes N(1, 1): a divergence of 1/2 a value."""
        row = torch.tensor([0.0] * 4 + [1.0] * 2 + [0.0] * 2)
        return row.expand(len(rows), -1)

    blind.code = (2,)
    train = 2 * torch.ones(10, 1, 2, 2)
    score = density.bound(SimpleNamespace(network=blind), train)
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    torch.testing.assert_close(score(images), torch.tensor([1.0, 4 / (2 * 4) + 1]))


def test_a_patch_of_another_image_changes_one_square(density):
    images = torch.zeros(50, 1, 28, 28)
    changed = density.pasted(images, images + 1, torch.Generator().manual_seed(0))[:, 0]
    assert not images.any()
    rows = changed.any(2).sum(1)
    columns = changed.any(1).sum(1)
    assert (rows == density.PATCH).all()
    assert (columns == density.PATCH).all()
    assert (changed.sum((1, 2)) == density.PATCH**2).all()
