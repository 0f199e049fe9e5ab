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
from naign.evaluate.refit import fit_mixture
from naign.evaluate.report import STEPS, _between
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network

SHAPE = (3, 8, 12)


@pytest.fixture(scope="module")
def model() -> NAIGN:
    torch.manual_seed(0)
    metadata = {"shape": list(SHAPE), "prior": {"name": "gaussian"}}
    return NAIGN(build_network(ConvConfig(width=4, depth=0, code=6), SHAPE), metadata)


def test_an_upload_is_brought_to_the_models_size(model: NAIGN) -> None:
    content = io.BytesIO()
    Image.new("L", (60, 50), 255).save(content, "TIFF")
    assert torch.equal(read_image(content.getvalue(), model), torch.ones(1, *SHAPE))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would start Ghostscript
    for wrong in (b"hello", postscript, content.getvalue()[:90]):
        with pytest.raises(InputError):
            read_image(wrong, model)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_its_strength(kind) -> None:
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    done = [degrade(images, kind, seed=5, strength=strength) for strength in (0.0, 0.5, 1.0, 2.0)]
    changes = [float((damaged - images).abs().mean()) for damaged in done]
    assert changes[0] == 0 < changes[1] < changes[2] < changes[3]
    assert torch.equal(done[2], degrade(images, kind, seed=5)) and float(done[3].abs().max()) <= 1


def test_the_way_between_gaussian_latents_keeps_their_law() -> None:
    shape = (1, 64, 64)
    large = NAIGN(torch.nn.Conv2d(1, 1, 1), {"shape": list(shape), "prior": {"name": "gaussian"}})
    way, ids = large.between(3, 4, steps=9), torch.zeros(1, dtype=torch.int64)
    for end, seed in ((way[:1], 3), (way[-1:], 4)):
        torch.testing.assert_close(end, large.latent(ids, seed=seed))
    assert (way.flatten(1).std(1) - 1).abs().max() < 0.05  # in the middle of a line it would be 0.7
    assert large.between(3, 3, steps=4).diff(dim=0).abs().max() < 1e-5


def test_the_way_between_codes_is_decoded(model: NAIGN) -> None:
    codes = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    state = fit_mixture(codes, 3)
    mixed = NAIGN(model.network, model.metadata | {"prior": {"name": "gmm", "components": 3}}, state)
    way, ids = mixed.between(1, 2, steps=3), torch.zeros(1, dtype=torch.int64)
    for end, seed in ((way[:1], 1), (way[-1:], 2)):
        torch.testing.assert_close(end, mixed.latent(ids, seed=seed))
    ends = torch.cat([mixed.prior.draw(seed, 2**32 - 1, ids, "cpu") for seed in (1, 2)])
    torch.testing.assert_close(way[1:2], model.network.decode(ends.mean(0, keepdim=True)))  # type: ignore[operator]


def test_the_report_interpolates_between_samples(model: NAIGN) -> None:
    state = fit_mixture(torch.randn(300, 6, generator=torch.Generator().manual_seed(3)), 3)
    mixed = NAIGN(model.network, model.metadata | {"prior": {"name": "gmm", "components": 3}}, state)
    drawn = _between(SimpleNamespace(model=mixed, seed=4))  # type: ignore[arg-type]
    first = [mixed.sample(1, seed=seed) for seed in range(4, 11)]
    assert drawn.shape == (6 * STEPS, *SHAPE)
    torch.testing.assert_close(drawn[::STEPS], torch.cat(first[:-1]))
    torch.testing.assert_close(drawn[STEPS - 1 :: STEPS], torch.cat(first[1:]))
