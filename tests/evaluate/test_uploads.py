"""Pictures are refused before they are decoded, and damage grows with its strength."""

import io

import pytest
import torch
from PIL import Image

from naign.data.damage import KINDS, degrade
from naign.errors import InputError
from naign.evaluate.recorded import read_image
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network

SHAPE = (3, 8, 12)


def test_an_upload_is_brought_to_the_models_size():
    metadata = {
        "shape": list(SHAPE),
        "latents": {"name": "gaussian"},
        "prior": {"name": "none"},
    }
    config = ConvConfig(width=4, depth=0, code=6)
    model = NAIGN(build_network(config, SHAPE), metadata)
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
