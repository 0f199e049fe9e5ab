"""The drift and the moments: against their definitions, their limits, and what moves along them."""

import math

import pytest
import torch

from pipeline.errors import InputError
from pipeline.model.losses import NaignConfig, losses
from pipeline.model.networks import ConvConfig, build_network
from pipeline.model.population import Population, drift_field, moments_loss, stopped_code


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(images):
    return images.flatten(1)


def by_loops(samples, images, temperature, repulsion):
    """The field as arXiv 2602.04770 has it, pair by pair in float64, before it is scaled."""
    samples, images = samples.double(), images.double()
    n, m = len(samples), len(images)
    far = torch.full((n, m + n), math.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            far[i, j] = (samples[i] - images[j]).norm()
        for j in range(n):
            if i != j:
                far[i, m + j] = (samples[i] - samples[j]).norm()
    mean = far[far.isfinite()].mean()
    kernel = (-far / (mean * temperature)).exp()
    weights = (kernel / kernel.sum(1, keepdim=True) * kernel / kernel.sum(0, keepdim=True)).sqrt()
    field = torch.zeros_like(samples)
    for i in range(n):
        for j in range(m):
            for k in range(n):
                pull, push = images[j] - samples[i], samples[k] - samples[i]
                field[i] += weights[i, j] * weights[i, m + k] * (pull - repulsion * push)
    return field / field.square().mean().sqrt()


@pytest.mark.parametrize("repulsion", [1.0, 0.5])
def test_the_field_is_the_papers(repulsion):
    samples, images = draw(0, 6, 3), draw(1, 9, 3) + 1
    expected = sum(by_loops(samples, images, temperature, repulsion) for temperature in (0.1, 0.5))
    field, scale = drift_field(samples, images, [0.1, 0.5], repulsion)
    torch.testing.assert_close(field, expected.float(), rtol=1e-4, atol=1e-5)
    again, larger = drift_field(10 * samples, 10 * images, [0.1, 0.5], repulsion)
    torch.testing.assert_close(again, field, rtol=1e-4, atol=1e-5)
    assert float(larger) == pytest.approx(10 * float(scale))


def test_without_repulsion_the_limit_of_low_temperatures_is_the_nearest_image():
    images = 4 * draw(2, 8, 5)
    samples = (images + 0.3 * draw(3, 8, 5))[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    nearest = images[torch.cdist(samples, images).argmin(1)]
    field, scale = drift_field(samples, images, [1e-4], repulsion=0.0)
    pull = (nearest - samples) / scale
    torch.testing.assert_close(field, pull / pull.square().mean().sqrt(), rtol=1e-4, atol=1e-5)


def test_samples_drift_to_the_law_of_the_images():
    """From one place to two clusters and their shares, where the nearest image alone would do for every sample."""
    images = torch.cat([draw(4, 192, 2) * 0.2 + 3, draw(5, 64, 2) * 0.2 - 3])
    samples = draw(6, 128, 2) * 0.1
    for _ in range(300):
        field, scale = drift_field(samples, images, [0.05, 0.2, 0.5])
        samples = samples + 0.05 * scale * field
    right = samples[:, 0] > 0
    assert 0.65 < float(right.float().mean()) < 0.85
    torch.testing.assert_close(samples[right].mean(0), torch.tensor([3.0, 3.0]), atol=0.3, rtol=0)
    torch.testing.assert_close(samples[~right].mean(0), torch.tensor([-3.0, -3.0]), atol=0.3, rtol=0)


@pytest.mark.parametrize("temperature", [1e-9, 1e-12])
def test_temperatures_that_leave_no_weight_are_refused(temperature):
    with pytest.raises(InputError, match=r"objective.temperatures: at 1e-\d+ of the mean distance no sample is moved"):
        drift_field(draw(7, 8, 3), draw(8, 8, 3), [0.1, temperature])
    samples = draw(7, 8, 3)
    samples[0, 0] = math.nan  # a step to skip, not a wrong setting
    assert not torch.isfinite(drift_field(samples, draw(8, 8, 3), [0.1])[0]).any()


@pytest.mark.parametrize("text", ["", "0.1,", "0.1,x", "0", "-1", "nan", "inf"])
def test_what_is_no_list_of_temperatures_is_refused(text):
    with pytest.raises(InputError, match="objective.temperatures is"):
        NaignConfig(drift=1.0, temperatures=text)


def test_moments_of_few_samples_are_unbiased():
    mixing, ranks = draw(9, 4, 4), Population(embed=flat)
    found = {}
    for name, factor, shift in (("equal", 1.0, 0.0), ("other", 0.5, 1.0)):
        values = []
        for seed in range(2000):
            samples, images = factor * (draw(seed, 8, 4) @ mixing) + shift, draw(10**6 + seed, 64, 4) @ mixing
            gaps = [samples[half::2].mean(0) - images[half::2].mean(0) for half in (0, 1)]
            scale = images.var(0).sum()
            values.append([float(moments_loss(samples, samples, images, ranks)), float(gaps[0] @ gaps[1] / scale)])
        found[name] = torch.tensor(values).mean(0)
    assert found["equal"].abs().max() < 0.05 and found["other"][1] > 0.1
    assert found["other"][0] > found["other"][1] + 0.1  # the covariances differ as well


def test_moments_are_those_of_the_covariance_matrices():
    samples, images = draw(11, 40, 3) + 1, draw(12, 60, 3) * torch.tensor([1.0, 2.0, 3.0])
    (a, b), (c, d) = ([rows[half::2] for half in (0, 1)] for rows in (samples, images))
    means = ((a.mean(0) - c.mean(0)) @ (b.mean(0) - d.mean(0))) / images.T.cov().trace()
    spread = ((a.T.cov() - c.T.cov()) * (b.T.cov() - d.T.cov())).sum() / images.T.cov().square().sum()
    torch.testing.assert_close(moments_loss(samples, samples, images, Population(embed=flat)), means + spread)


def test_the_terms_join_the_objective_and_reach_the_weights():
    f, x, z = torch.nn.Linear(3, 3), draw(13, 8, 3), draw(14, 8, 3)
    config = NaignConfig(imle=0.0, third="idempotence", drift=0.5, moments=0.25, positives=2)
    assert config.needs_fresh and not config.needs_latents and not config.needs_match and config.forwards == 3
    given = {"fresh": z, "further": draw(15, 8, 3), "population": Population(embed=flat)}
    terms = losses(config, f, x, None, **given)
    assert set(terms) == {"total", "reconstruction", "third", "drift", "moments"}
    expected = terms["reconstruction"] + terms["third"] + 0.5 * terms["drift"] + 0.25 * terms["moments"]
    torch.testing.assert_close(terms["total"], expected)
    terms["drift"].backward()
    field, scale = drift_field(f(z).detach(), torch.cat([x, given["further"]]), [0.02, 0.05, 0.2])
    torch.testing.assert_close(f.bias.grad, (-2 * field / scale / field.numel()).sum(0))


def test_gradients_of_a_code_pass_to_the_images_alone():
    network, images = build_network(ConvConfig(width=8, code=16), (1, 8, 8)), draw(16, 5, 1, 8, 8).requires_grad_()
    code = stopped_code(network)(images)
    assert torch.equal(code, network.encode(images))
    code.square().sum().backward()
    assert images.grad.abs().sum() > 0 and all(value.grad is None for value in network.parameters())
