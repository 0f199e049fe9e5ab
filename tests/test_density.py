"""The scores of benchmarks/density.py on cases with known answers."""

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from naign.model.prior.flow import Flow, FlowConfig


@pytest.fixture(scope="module")
def density(benchmarks: None) -> ModuleType:
    import density

    return density


class Stretching(nn.Module):
    """The velocity that carries N(0, I) to N(0, exp(2 rate)) in one unit of time."""

    def forward(self, codes: Tensor, time: Tensor) -> Tensor:
        return codes * torch.tensor([-1.0, 0.5, 1.0])


def test_the_density_of_a_code_under_a_flow_is_that_of_the_distribution_it_draws_from(density):
    flow = Flow(FlowConfig(width=8, depth=1, steps=64), (3,))
    flow.velocity = Stretching()
    codes = torch.randn(600, 3)
    scales = torch.tensor([-1.0, 0.5, 1.0]).exp()
    exact = -torch.distributions.Normal(0, scales).log_prob(codes).sum(1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(density.code_density(flow, codes), exact, atol=0.02, rtol=1e-3)


def test_the_bound_of_a_vae_is_error_and_divergence(density):
    def blind(rows: Tensor) -> Tensor:
        """Black images from codes N(1, 1): a divergence of 1/2 a value."""
        return torch.cat([torch.zeros(len(rows), 4), torch.ones(len(rows), 2), torch.zeros(len(rows), 2)], dim=1)

    blind.code = (2,)
    train, images = 2 * torch.ones(10, 1, 2, 2), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    score = density.bound(SimpleNamespace(network=blind), train)
    torch.testing.assert_close(score(images), torch.tensor([1.0, 4 / (2 * 4) + 1]))


def test_a_patch_of_another_image_changes_one_square(density):
    images, donors = torch.zeros(50, 1, 28, 28), torch.ones(50, 1, 28, 28)
    changed = density.pasted(images, donors, torch.Generator().manual_seed(0))
    assert (changed.sum((1, 2, 3)) == density.PATCH**2).all() and not images.any()
    rows, columns = changed.any(3).sum(2), changed.any(2).sum(2)
    assert (rows == density.PATCH).all() and (columns == density.PATCH).all()
