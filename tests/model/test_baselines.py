"""The VAE and the rectified flow of the baselines package: what they compute, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from naign_baselines.rectified_flow import FlowConfig, FlowNetworkConfig, RectifiedFlow
from naign_baselines.vae import CodeNormalConfig, VaeConfig, VaeNetworkConfig
from torch import Tensor

from naign import config
from naign.errors import InputError
from naign.model import networks
from naign.model.losses import Batch, choose_distance, compute_losses
from naign.model.naign import NAIGN
from naign.model.prior import build_prior
from naign.philox import normal

SHAPE = (1, 8, 8)


def build(settings: networks.NetworkConfig, shape: tuple[int, ...] = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    return networks.build_network(settings, shape, **options)


def normals(step: int, count: int = 5) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(step))


def losses(config: Any, network: Any, images: Tensor, latents: Tensor | None = None) -> dict[str, Tensor]:
    """The terms on a batch of these."""
    distance = choose_distance(config, None)
    batch = Batch(images=images, latents=latents, distance=distance, frozen=network, normals=normals)
    return compute_losses(config, network, batch)


@pytest.mark.parametrize(("body", "code"), [("conv", (6,)), ("conv", (100,)), ("spatial", (6, 4, 4))])
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_the_loss_is_the_bound_on_the_likelihood(body, code, likelihood):
    f = build(VaeNetworkConfig(width=8, code=code[0], body=body))
    assert networks.code_shape(f, "prior") == code
    x = normals(9).tanh()
    terms = losses(VaeConfig(likelihood=likelihood), f, x)
    mean, log_variance = f.body.encode(x).chunk(2, dim=1)
    noise = torch.cat([normals(step).flatten(1) for step in (0, 1)], dim=1)[:, : math.prod(code)].view_as(mean)
    drawn = f.decode(mean + (log_variance / 2).exp() * noise)
    law = {"gaussian": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[likelihood]
    error = (drawn - x).square().mean().sqrt() if likelihood == "gaussian" else (drawn - x).abs().mean()
    fit = law(drawn, error.expand_as(drawn)).log_prob(x).mean()
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    constant = (1 + math.log(2 * math.pi)) / 2 if likelihood == "gaussian" else 1 + math.log(2)
    torch.testing.assert_close(terms["total"] + constant, divergence.mean() / 64 - fit)
    terms["total"].backward()
    assert all(value.grad is not None for value in f.parameters())
    torch.testing.assert_close(f(x), f.decode(mean))


def test_latents_of_a_vae_are_decoded_normals():
    f = build(VaeNetworkConfig(width=8, code=6)).requires_grad_(False)
    model = NAIGN(f, {"shape": list(SHAPE), "prior": {"name": "code-normal"}})
    drawn = model.latent(torch.tensor([5, 2]), seed=3)
    torch.testing.assert_close(drawn, f.decode(normal(3, 2**32 - 1, torch.tensor([5, 2]), (6,))))
    torch.testing.assert_close(model.latent(torch.arange(6), seed=3)[[5, 2]], drawn)
    with pytest.raises(InputError, match="prior.name=code-normal: this network has no code"):
        build_prior(CodeNormalConfig(), SHAPE, build(networks.PointConfig()))


class Straight(torch.nn.Module):
    """A velocity whose path is known: x = x_0 exp(rate t)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.seen = rate, list[float]()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen.append(float(time[0]))
        return self.rate * x


@pytest.mark.parametrize(
    ("evaluations", "solver", "times"),
    [(1, "heun", [0]), (4, "heun", [0, 0.5, 0.5, 1]), (3, "heun", [0, 0.5, 0.5]), (4, "euler", [0, 0.25, 0.5, 0.75])],
)
def test_a_sample_takes_so_many_evaluations(evaluations, solver, times):
    f: RectifiedFlow = build(FlowNetworkConfig(width=8, depth=1, evaluations=evaluations, solver=solver))
    f.velocity = Straight(-1.0)
    f(torch.ones(2, *SHAPE))
    assert f.velocity.seen == times


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_solvers_have_their_order(solver, order):
    f: RectifiedFlow = build(FlowNetworkConfig(width=8, depth=1, solver=solver))
    f.velocity = Straight(-1.0)
    errors = []
    for f.evaluations in (20 * order, 40 * order):
        errors.append(abs(float(f(torch.ones(1, *SHAPE, dtype=torch.float64)).mean()) - math.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_the_flow_learns_the_way_from_its_latents_to_the_data():
    f = build(FlowNetworkConfig(width=8, depth=1))
    torch.nn.init.normal_(f.velocity.outer.weight)  # else it is still everywhere
    x, z = normals(1).tanh(), normals(2)
    terms = losses(FlowConfig(), f, x, z)
    time = normals(0)[:, 0, 0, 0].sigmoid()
    along = torch.stack([t * end + (1 - t) * begin for t, end, begin in zip(time, x, z, strict=True)])
    torch.testing.assert_close(terms["total"], (f._velocity(along, time) - (x - z)).square().mean())
    terms["total"].backward()
    assert all(value.grad is not None for value in f.parameters())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 20, 28)])
def test_a_flow_has_images_of_any_shape(shape):
    f = build(FlowNetworkConfig(width=8, depth=1, evaluations=2), shape)
    out = f(3 * torch.randn(2, *shape))
    assert out.shape == (2, *shape) and float(out.detach().abs().max()) <= 1


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        (FlowNetworkConfig(), {"shape": (2,)}, "takes images"),
        (FlowNetworkConfig(), {"shape": (1, 27, 28)}, "model.patch=2 does not divide"),
        (VaeNetworkConfig(), {"shape": (2,)}, "takes images"),
        (FlowNetworkConfig(), {"recompute": True}, "leave out train.recompute"),
        (VaeNetworkConfig(), {"recompute": True}, "leave out train.recompute"),
    ],
)
def test_what_a_network_cannot_do_is_refused(settings, options, said):
    with pytest.raises(InputError, match=said):
        build(settings, **options)


@pytest.mark.parametrize("options", [["--model.name=vae"], ["--objective.name=rectified_flow"]])
def test_a_network_and_an_objective_that_do_not_go_together_are_refused(options):
    with pytest.raises(InputError, match="do not go together: choose the same name"):
        config.parse(options)
