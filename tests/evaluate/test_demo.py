"""Pictures are refused before they are decoded, damage grows with its strength, and the way between two latents begins
and ends at them.
"""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from naign.data.damage import KINDS, degrade
from naign.errors import InputError
from naign.evaluate.recorded import read_image
from naign.evaluate.report import STEPS, _between
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from naign.model.prior import Codes, Mixture, MixtureConfig

SHAPE = (3, 8, 12)
FIRST = torch.zeros(1, dtype=torch.int64)  # the id of a seed's first latent


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    metadata = {"shape": list(SHAPE), "latents": {"name": "gaussian"}, "prior": {"name": "none"}}
    return NAIGN(build_network(ConvConfig(width=4, depth=0, code=6), SHAPE), metadata)


@pytest.fixture(scope="module")
def mixed(model):
    """The same f with a mixture of codes."""
    codes = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    prior = Mixture(MixtureConfig(components=3), (6,))
    list(prior.fit(Codes.of(codes)))
    metadata = model.metadata | {"prior": {"name": "gmm", "components": 3}}
    return NAIGN(model.network, metadata, {f"prior.{name}": value for name, value in prior.state_dict().items()})


def test_an_upload_is_brought_to_the_models_size(model):
    content = io.BytesIO()
    Image.new("L", (60, 50), 255).save(content, "TIFF")
    assert torch.equal(read_image(content.getvalue(), model), torch.ones(1, *SHAPE))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would start Ghostscript
    for wrong in (b"hello", postscript, content.getvalue()[:90]):
        with pytest.raises(InputError):
            read_image(wrong, model)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_its_strength(kind):
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = 0.0
    assert torch.equal(degrade(images, kind, seed=5, strength=0.0), images)
    for strength in (0.5, 1.0, 2.0):
        damaged = degrade(images, kind, seed=5, strength=strength)
        change = float((damaged - images).abs().mean())
        assert change > before
        assert damaged.abs().max() <= 1
        before = change


def assert_ends_at(way, model, first, last):
    """The way begins with the first latent of one seed, and ends with that of the other."""
    torch.testing.assert_close(way[:1], model.latent(FIRST, seed=first))
    torch.testing.assert_close(way[-1:], model.latent(FIRST, seed=last))


def test_the_way_between_gaussian_latents_keeps_their_law():
    metadata = {"shape": [1, 64, 64], "latents": {"name": "gaussian"}, "prior": {"name": "none"}}
    large = NAIGN(torch.nn.Conv2d(1, 1, 1), metadata)
    way = large.between(3, 4, steps=9)
    assert_ends_at(way, large, 3, 4)
    assert (way.flatten(1).std(1) - 1).abs().max() < 0.05  # in the middle of a line it would be 0.7
    assert large.between(3, 3, steps=4).diff(dim=0).abs().max() < 1e-5


def test_the_way_between_codes_is_decoded(mixed):
    way = mixed.between(1, 2, steps=3)
    assert_ends_at(way, mixed, 1, 2)
    ends = torch.cat([mixed.prior.draw(seed, 2**32 - 1, FIRST, "cpu") for seed in (1, 2)])
    torch.testing.assert_close(way[1:2], mixed.network.decode(ends.mean(0, keepdim=True)))


def test_the_report_interpolates_between_samples(mixed):
    drawn = _between(SimpleNamespace(model=mixed, seed=4))
    samples = torch.cat([mixed.sample(1, seed=seed) for seed in range(4, 11)])
    assert drawn.shape == (6 * STEPS, *SHAPE)
    torch.testing.assert_close(drawn[::STEPS], samples[:-1])
    torch.testing.assert_close(drawn[STEPS - 1 :: STEPS], samples[1:])
