"""Latents of noise, or of the spectrum of a round; what all distributions share; and how one is chosen."""

import pytest
import torch
from naign_baselines.fourier import FourierConfig
from torch.testing import assert_close

from naign.model.networks import ConvConfig, build_network
from naign.model.prior import (
    FlowConfig,
    Latents,
    LatentsConfig,
    MixtureConfig,
    SmoothConfig,
    build_latents,
    build_prior,
    find_latents,
    find_prior,
)
from naign.settings.constraints import check_fields
from tests.match.problems import draw
from tests.model.prior.ranks import in_memory
from tests.refused import refused

NOISE = [
    LatentsConfig(name="gaussian"),
    SmoothConfig(),
    FourierConfig(),
]
PRIORS = [
    FlowConfig(
        width=8,
        depth=1,
        passes=1,
        steps=3,
    ),
    MixtureConfig(components=3),
]
NETWORK = build_network(ConvConfig(width=4, code=6), (1, 8, 8)).requires_grad_(False)


def build(config, shape=(1, 8, 8)):
    if isinstance(config, LatentsConfig):
        return build_latents(config, shape)
    return build_prior(config, shape, NETWORK)


@pytest.fixture(scope="module", params=[*NOISE, *PRIORS], ids=lambda config: config.name)
def prior(request):
    """Each of them, fitted to a round."""
    built = build(request.param)
    images = draw(
        0,
        256,
        1,
        8,
        8,
    ).sigmoid()
    if isinstance(built, Latents):
        built.measure(images, lambda moments: moments, 1)
    else:
        list(built.fit(in_memory(NETWORK.encode(images))))
    return built


def test_a_row_depends_on_its_id_alone(prior):
    ids = torch.tensor([5, 2**40 + 3, 0, 71, 2**62 - 1])
    together = prior.draw(7, 3, ids, "cpu")
    assert together.shape == (5, *prior.shape)
    assert together.dtype == torch.float32
    tolerance = 1e-5 if prior.decodes else 0.0  # sums of products round by batch
    for row, number in enumerate(ids):
        alone = prior.draw(7, 3, number[None], "cpu")[0]
        assert_close(alone, together[row], atol=tolerance, rtol=0)
    for seed, round, others in (
        (8, 3, ids),
        (7, 4, ids),
        (7, 3, ids ^ 1),
    ):
        other = prior.draw(seed, round, others, "cpu")
        assert not torch.isclose(other, together).flatten(1).all(1).any()


def test_its_state_is_all_that_it_draws_from(prior):
    with torch.device("meta"):  # as the model of a file is built
        again = build(prior.config)
        ids = torch.arange(5)
    assert again.draw(1, 0, ids, "meta").shape == (5, *prior.shape)  # without waiting for a value of a device
    again.load_state_dict(prior.state_dict(), assign=True)
    ids = torch.arange(5)
    drawn = prior.draw(1, 0, ids, "cpu")
    assert torch.equal(again.draw(1, 0, ids, "cpu"), drawn)


def test_smooth_noise_has_few_dimensions():
    latents = build(SmoothConfig(grid=3), (1, 24, 24))
    drawn = latents.draw(0, 0, torch.arange(500), "cpu").flatten(1)
    assert int(torch.linalg.matrix_rank(drawn)) == 9
    assert float(drawn.mean()) == pytest.approx(0, abs=0.05)


def test_a_buried_latent_keeps_its_smooth_part_fainter_in_white_noise():
    latents = build(SmoothConfig(white=0.4), (2, 24, 16))
    ids = torch.arange(3000)
    drawn = latents.draw(0, 0, ids, "cpu")
    buried = latents.buried(drawn, 0, 0, ids)
    changed = (buried != drawn).flatten(1).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.4, abs=0.03)
    basis = latents.draw(1, 0, torch.arange(60), "cpu")[:, 0].flatten(1)
    directions = torch.linalg.svd(basis, full_matrices=False).Vh[:16]
    before = drawn[changed].flatten(2) @ directions.T
    after = buried[changed].flatten(2) @ directions.T
    left = (after * before).sum((1, 2)) / before.square().sum((1, 2))
    assert_close(after, left[:, None, None] * before, atol=1e-4, rtol=1e-3)
    amplitude = 4 / (24 * 16) ** 0.5  # of 4 x 4 normals in N(0, I), which is lowered by up to a half
    assert amplitude / 2 < float(left.min()) < amplitude
    assert 0.99 < float(left.max()) <= 1
    rest = buried[changed].flatten(2) - after @ directions
    deviations = rest.std((1, 2))
    assert 0.9 < float(deviations.max()) < 1.1
    assert float(deviations.min()) < 0.02
    assert torch.equal(latents.buried(drawn[7:9], 0, 0, ids[7:9]), buried[7:9])
    assert torch.equal(build(SmoothConfig(white=0), (2, 24, 16)).buried(drawn, 0, 0, ids), drawn)


def test_fourier_noise_has_the_spectrum_of_the_first_round():
    grid = torch.arange(16) / 16 * 2 * torch.pi
    phase = 9 * draw(
        0,
        4000,
        1,
        1,
        1,
    )
    images = torch.cos(3 * grid + phase) * torch.cos(2 * grid)[:, None] + 0.2
    prior = build(FourierConfig(), (1, 16, 16))
    prior.measure(images, lambda moments: moments, 1)
    drawn = prior.draw(0, 0, torch.arange(4000), "cpu")
    assert float(drawn.mean()) == pytest.approx(float(images.mean()), abs=0.02)
    power = torch.fft.fft2(drawn).abs().square().mean(0)[0]
    top = power.flatten().topk(9).indices.tolist()
    assert {16 * 2 + 3, 16 * 2 + 13, 16 * 14 + 3, 16 * 14 + 13, 0} <= set(top)


def test_the_spectrum_of_all_ranks_is_that_of_the_whole_round():
    images = draw(
        0,
        64,
        3,
        8,
        8,
    )
    moments = []

    def add(part):
        moments.append(part)
        return torch.stack(moments).sum(0)

    whole = build(FourierConfig(), (3, 8, 8))
    whole.measure(images, lambda part: part, 1)
    last = build(FourierConfig(), (3, 8, 8))
    for part in images.chunk(2):
        last.measure(part, add, 2)
    assert_close(last.spectrum, whole.spectrum)


def test_what_does_not_fit_is_refused():
    with refused("prior.name is 'cauchy': choose one of none, gmm, flow"):
        find_prior("cauchy")
    with refused("latents.name is 'cauchy': choose one of smooth, gaussian"):
        find_latents("cauchy")
    with refused("prior.name is 'smooth': choose one of none, gmm, flow"):
        find_prior("smooth")
    with refused("smooth is for images"):
        build(SmoothConfig(), (2,))
    with refused("latents.grid is 65"):
        check_fields(SmoothConfig(grid=65), "latents")
    for config in PRIORS:
        with refused(f"prior.name={config.name}: this network has no code"):
            build_prior(config, (2,), torch.nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same(prior):
    ids = torch.arange(1000)
    drawn = prior.draw(3, 2, ids, "cpu")
    there = prior.to("cuda").draw(3, 2, ids, "cuda")
    assert_close(there.cpu(), drawn, rtol=1e-4, atol=1e-4)
    prior.to("cpu")
