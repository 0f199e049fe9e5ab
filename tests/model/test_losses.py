"""Each term against its formula, and which weights each gradient reaches."""

import dataclasses

import pytest
import torch
from naign_baselines.ign import IgnConfig
from naign_baselines.nae import NaeConfig
from torch import nn
from torch.testing import assert_close

from naign.config import from_dict, parse
from naign.model.losses import (
    DISTANCES,
    OBJECTIVES,
    Batch,
    NaignConfig,
    ObjectiveConfig,
    compute_losses,
)
from tests.match.problems import draw
from tests.refused import refused


def setting():
    x, z, noise = draw(0, 3, 5, 3)
    return nn.Linear(3, 3), x, z, noise


def losses(
    config,
    network,
    images,
    latents,
    *,
    damaged=None,
    frozen=None,
    normals=None,
):
    """The terms on a batch of these."""
    batch = Batch(
        images=images,
        latents=latents,
        damaged=damaged,
        distance=DISTANCES[config.distance],
        frozen=frozen,
        normals=normals,
    )
    return compute_losses(config, network, batch)


def l1(a, b):
    return (a - b).abs().mean()


def root(a, b):
    return (a - b).square().mean(1).sqrt().mean()


@pytest.mark.parametrize(
    "distance, d, third, denoising",
    [
        ("l1", l1, "none", 0.25),
        ("l2", nn.functional.mse_loss, "matched", 0.0),
        ("norm", root, "matched", 0.25),
    ],
)
def test_naign_is_the_weighted_sum_of_its_terms(distance, d, third, denoising):
    f, x, z, noise = setting()
    config = NaignConfig(
        distance=distance,
        third=third,
        reconstruction=2.0,
        imle=3.0,
        denoising=denoising,
    )
    expected = 2 * d(f(x), x) + 3 * d(f(z), x)
    damaged = None
    if denoising:
        damaged = x + 0.4 * noise
        expected = expected + denoising * d(f(damaged), x)
    if third == "matched":
        expected = expected + d(f(f(z)), x)
    terms = losses(
        config,
        f,
        x,
        z,
        damaged=damaged,
    )
    assert_close(terms["total"], expected)


class Registered:
    """An entry point of the group naign.objectives."""

    dist = None
    module = "another"
    value = "another:OTHER"

    def __init__(self, *entry):
        self.load = lambda: entry


@dataclasses.dataclass(kw_only=True, slots=True)
class UndamagedConfig(ObjectiveConfig):
    @property
    def needs_damaged(self):
        return True


@dataclasses.dataclass(kw_only=True, slots=True)
class DamagedConfig(UndamagedConfig):
    damage: str = "mild"
    noise: float = 0.2


def test_an_objective_of_damaged_images_chooses_the_damage(monkeypatch):
    points = {"b": Registered(DamagedConfig, len)}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: points)
    assert parse(["--objective.name=b", "--objective.noise=0.3"]).objective.noise == 0.3


def test_a_loss_without_a_total_is_refused(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "naign", (NaignConfig, lambda *_: {"reconstruction": torch.zeros(())}))
    f, x, z, _ = setting()
    with refused("the loss of objective.name=naign returns no total: see docs/extend.md"):
        losses(NaignConfig(name="naign", denoising=0.0), f, x, z)


def test_ign_is_the_weighted_sum_of_its_terms_with_the_clamp():
    f, x, z, _ = setting()
    config = IgnConfig(
        reconstruction=20.0,
        idempotence=20.0,
        tightness=2.5,
        clamp=1.5,
    )
    terms = losses(
        config,
        f,
        x,
        z,
        frozen=f,
    )
    reconstruction = l1(f(x), x)
    residual = l1(f(f(z)), f(z))
    clamped = torch.tanh(residual / (1.5 * reconstruction)) * 1.5 * reconstruction
    assert_close(terms["total"], 20 * reconstruction + 20 * residual - 2.5 * clamped)


def test_ign_gradients_go_where_the_paper_says():
    f, x, z, _ = setting()
    # Idempotence: through the inner f only, the outer one held.
    only = IgnConfig(reconstruction=0.0, idempotence=1.0, tightness=0.0)
    losses(
        only,
        f,
        x,
        z,
        frozen=f,
    )["total"].backward()
    inner = f(z)
    outer = inner @ f.weight.detach().T + f.bias.detach()
    expected = torch.autograd.grad(l1(outer, inner), f.weight)[0]
    assert_close(f.weight.grad, expected)
    # Tightness: through the outer f only, the inner one held, with the reconstruction's scale held too.
    f.zero_grad()
    only = IgnConfig(reconstruction=0.0, idempotence=0.0, tightness=1.0)
    losses(
        only,
        f,
        x,
        z,
        frozen=f,
    )["total"].backward()
    held = f(z).detach()
    limit = 1.5 * l1(f(x), x).detach()
    clamped = torch.tanh(l1(f(held), held) / limit) * limit
    expected = torch.autograd.grad(-clamped, f.weight)[0]
    assert_close(f.weight.grad, expected)


def test_nae_raises_the_energy_where_its_chains_end_and_lowers_it_on_data():
    f, x, z, noise = setting()
    config = NaeConfig(
        code_steps=0,
        steps=2,
        rate=0.1,
        noise=0.3,
        bound=0.5,
    )
    assert config.needs_latents
    assert not config.needs_match
    terms = losses(
        config,
        f,
        x,
        z,
        frozen=f,
        normals=lambda step: noise * (step + 1),
    )
    chain = f(z).detach()
    for step in range(2):
        residual = f(chain) - chain  # of a linear f the slope of its mean square is 2 / 3 of (W - 1)' residual
        slope = 2 / 3 * (residual @ f.weight - residual)
        moved = chain - 0.1 * slope + 0.3 * noise * (step + 1)
        chain = moved.clamp(-1, 1).detach()
    data = (f(x) - x).square().mean(1)
    other = (f(chain) - chain).square().mean(1)
    expected = data.mean() - other.mean() + 0.5 * other.square().mean()
    assert_close(terms["total"], expected)
    (ours,) = torch.autograd.grad(terms["total"], f.weight)
    assert_close(ours, torch.autograd.grad(expected, f.weight)[0])


class Coded(nn.Module):
    """Three values from a code of two, by linear maps."""

    code = (2,)

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 2)
        self.decode = nn.Linear(2, 3)

    def forward(self, x):
        return self.decode(self.encode(x))


def test_nae_starts_its_chains_from_codes_that_went_down_the_energy():
    _, x, _, noise = setting()
    f = Coded()
    config = NaeConfig(
        code_steps=1,
        code_rate=0.2,
        code_noise=0.1,
        steps=0,
    )
    assert not config.needs_latents
    terms = losses(
        config,
        f,
        x,
        None,
        frozen=f,
        normals=lambda step: noise * (step + 1),
    )
    codes = f.encode(x)
    drawn = noise[:, :2].requires_grad_()

    def energy_of(whitened):
        made = f.decode(codes.mean(0) + codes.std(0) * whitened)
        return (f(made) - made).square().mean(1)

    (slope,) = torch.autograd.grad(energy_of(drawn).sum(), drawn)
    ends = drawn - 0.2 * slope + 0.1 * 2 * noise[:, :2]
    assert_close(terms["samples"], energy_of(ends).mean())


def test_terms_without_weight_are_not_computed():
    f, x, z, _ = setting()
    seen = []

    def network(inputs):
        seen.append(len(inputs))
        return f(inputs)

    plain = NaignConfig(imle=0.0, third="none", denoising=0.0)
    assert not plain.needs_latents
    assert not plain.needs_match
    terms = losses(plain, network, x, None)
    assert_close(terms["total"], l1(f(x), x))
    denoising = NaignConfig(imle=0.0, third="none", reconstruction=0.0, denoising=2.0)
    terms = losses(
        denoising,
        network,
        x,
        None,
        damaged=x + 1,
    )
    assert_close(terms["total"], 2 * l1(f(x + 1), x))
    assert set(terms) == {"total", "denoising"}
    only = NaignConfig(reconstruction=0.0, third="none", denoising=0.0)
    assert only.needs_match
    assert_close(losses(only, network, x, z)["total"], l1(f(z), x))
    assert seen == [5, 5, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"imle": -1},
        {"third": "both"},
        {"damage": "fire"},
        {"reconstruction": 0, "imle": 0, "third": "none", "denoising": 0},
        {"name": "ign", "clamp": 0},
    ],
)
def test_nonsense_is_refused(wrong):
    with refused("objective."):
        from_dict({"objective": wrong}, where="here")
