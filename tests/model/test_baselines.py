"""The networks of the baselines package: what they compute, and what they refuse."""

import math

import pytest
import torch
from naign_baselines.dcgan import DcganConfig
from naign_baselines.ebm import EbmConfig, EbmNetworkConfig
from naign_baselines.rectified_flow import FlowConfig, FlowNetworkConfig
from naign_baselines.vae import VaeConfig, VaeNetworkConfig
from torch.distributions import Laplace, Normal, kl_divergence
from torch.testing import assert_close

from naign import config
from naign.model import networks
from naign.model.losses import DISTANCES, Batch, compute_losses
from naign.philox import normal
from tests.match.problems import draw
from tests.model.made import wrapped
from tests.refused import refused

SHAPE = (1, 8, 8)


def build(settings, shape=SHAPE, **options):
    torch.manual_seed(0)
    return networks.build_network(settings, shape, **options)


def normals(step, count=5):
    return draw(step, count, *SHAPE)


def total_loss(settings, network, images, latents=None):
    """The loss on a batch of these, which has a gradient for every parameter."""
    batch = Batch(
        images=images,
        latents=latents,
        distance=DISTANCES[settings.distance],
        frozen=network,
        normals=normals,
    )
    loss = compute_losses(settings, network, batch)["total"]
    loss.backward()
    for value in network.parameters():
        assert value.grad is not None
    return loss


@pytest.mark.parametrize(
    "body, code, likelihood, law, power",
    [
        ("conv", (6,), "gaussian", Normal, 2),
        ("conv", (100,), "laplace", Laplace, 1),
        ("spatial", (6, 4, 4), "gaussian", Normal, 2),
    ],
)
def test_the_loss_is_the_bound_on_the_likelihood(
    body,
    code,
    likelihood,
    law,
    power,
):
    f = build(VaeNetworkConfig(width=8, code=code[0], body=body))
    assert networks.code_shape(f, "prior") == code
    x = normals(9).tanh()
    mean, log_variance = f.body.encode(x).chunk(2, dim=1)
    posterior = Normal(mean, (log_variance / 2).exp())
    noise = torch.cat([normals(0).flatten(1), normals(1).flatten(1)], dim=1)
    used = noise[:, : math.prod(code)].view_as(mean)
    drawn = f.decode(mean + posterior.scale * used)
    error = (drawn - x).abs().pow(power).mean() ** (1 / power)
    fit = law(drawn, error.expand_as(drawn)).log_prob(x).mean()
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    loss = total_loss(VaeConfig(likelihood=likelihood), f, x)
    assert_close(loss + law(0.0, 1.0).entropy(), divergence.mean() / 64 - fit)
    assert_close(f(x), f.decode(mean))


def test_latents_of_a_vae_are_decoded_normals():
    f = build(VaeNetworkConfig(width=8, code=6)).requires_grad_(False)
    model = wrapped(f, SHAPE, prior={"name": "code-normal"})
    ids = torch.tensor([5, 2])
    codes = normal(3, 2**32 - 1, ids, (6,))
    assert_close(model.latent(ids, seed=3), f.decode(codes))


class Straight(torch.nn.Module):
    """A velocity whose path is known: x = x_0 exp(-t)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, time):
        self.seen.append(float(time[0]))
        return -x


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_solvers_have_their_order_and_take_as_many_evaluations_as_asked(solver, order):
    f = build(FlowNetworkConfig(width=8, depth=1, solver=solver))
    f.velocity = Straight()
    errors = []
    for f.evaluations in (20 * order, 40 * order):
        f.velocity.seen.clear()
        made = f(torch.ones(1, *SHAPE, dtype=torch.float64))
        assert len(f.velocity.seen) == f.evaluations
        errors.append(abs(float(made.mean()) - math.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_the_flow_learns_the_way_from_its_latents_to_the_data():
    f = build(FlowNetworkConfig(width=8, depth=1))
    torch.nn.init.normal_(f.velocity.outer.weight)  # else it is still everywhere
    x = normals(1).tanh()
    z = normals(2)
    time = normals(0)[:, 0, 0, 0].sigmoid()
    along = torch.lerp(z, x, time.view(-1, 1, 1, 1))
    expected = (f._velocity(along, time) - (x - z)).square().mean()
    assert_close(total_loss(FlowConfig(), f, x, z), expected)


def test_an_energy_model_tells_data_from_the_ends_of_its_chains_and_f_goes_down():
    f = build(EbmNetworkConfig(width=8, chains=3, steps=4, rate=1.0))
    x = (normals(9) / 4 + 0.5).clamp(-1, 1)
    before = f.chains.clone()
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        total_loss(EbmConfig(), f, x)
        optimizer.step()
    assert (f.chains != before).any() and f.chains.abs().max() <= 1
    assert f.energy(x).mean() < f.energy(before).mean() - 1
    assert (f.energy(f(before)) < f.energy(before)).all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_ign_s_own_network_has_a_code_and_sees_all_pixels(shape):
    f = build(DcganConfig(width=8, code=6), shape)
    assert networks.code_shape(f, "prior") == (6,)
    x = draw(0, 2, *shape).requires_grad_()
    made = f(x)
    assert made.shape == x.shape and made.abs().max() <= 1
    (slope,) = torch.autograd.grad(made[0, 0, 0, 0], x)
    assert (slope[0] != 0).all() and (slope[1] == 0).all()  # no image depends on others of its batch


@pytest.mark.parametrize(
    "settings, options, said",
    [
        (EbmNetworkConfig(), {"shape": (2,)}, "takes square images"),
        (EbmNetworkConfig(), {"recompute": True}, "leave out train.recompute"),
        (DcganConfig(), {"shape": (1, 64, 64)}, "takes images of 28x28 or 32x32"),
        (DcganConfig(), {"shape": (1, 28, 28), "recompute": True}, "leave out train.recompute"),
        (FlowNetworkConfig(), {"shape": (2,)}, "takes images"),
        (FlowNetworkConfig(), {"shape": (1, 27, 28)}, "model.patch=2 does not divide"),
        (VaeNetworkConfig(), {"shape": (2,)}, "takes images"),
        (VaeNetworkConfig(), {"recompute": True}, "leave out train.recompute"),
    ],
)
def test_what_a_network_cannot_do_is_refused(settings, options, said):
    with refused(said):
        build(settings, **options)


@pytest.mark.parametrize("option", ["--model.name=vae", "--objective.name=rectified_flow"])
def test_a_network_and_an_objective_that_do_not_go_together_are_refused(option):
    with refused("do not go together: choose the same name"):
        config.parse([option])
