"""Data are read as in the training that a model's header records."""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError
from naign.evaluate.recorded import read_image
from tests.refused import refused


def test_a_picture_is_cropped_as_evaluation_crops_it(digits):
    metadata = {"config": {"data": {"path": "x", "crop": 4}}}
    model = SimpleNamespace(metadata=metadata, shape=(1, 4, 4))
    whole, _ = read_split(DataConfig(path=digits), "test", limit=1)
    cropped, _ = read_split(DataConfig(path=digits, crop=4), "test", limit=1)
    for picture in (whole[0], cropped[0]):
        file = encode(picture.numpy(), "png")
        assert torch.equal(read_image(file, model), scaled(cropped))
    narrow = encode(whole[0, :, :, :3].numpy(), "png")
    with refused("3x8 is less than data.crop=4"):
        read_image(narrow, model)


def test_files_that_are_not_pictures_are_refused_before_they_are_decoded():
    model = SimpleNamespace(metadata={}, shape=(3, 8, 12))
    content = io.BytesIO()
    Image.new("L", (60, 50), 255).save(content, "TIFF")
    assert torch.equal(read_image(content.getvalue(), model), torch.ones(1, 3, 8, 12))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would start Ghostscript
    for wrong in (b"hello", postscript, content.getvalue()[:90]):
        with pytest.raises(InputError):
            read_image(wrong, model)
