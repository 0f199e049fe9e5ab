"""Encoders: frozen networks in whose features images are compared. Ours are small classifiers with a 64-d layer;
`efficientnet-lite2` (ImageNet), `fid-inception` and `timm:NAME` are in pretrained.py.

Frechet distances compare on the same features only, so ours are named, fixed and shipped (encoder_weights/). They are
the *linear* layer before its ReLU, since a Gaussian fits mass at zero badly; dropout behind it, weight decay and light
augmentation keep single features from carrying a class, so that train and test images have the same features.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from naign.data.format.manifest import Manifest
from naign.errors import InputError, one_line
from naign.model.pretrained import Pretrained, open_inception, open_lite, open_timm
from naign.settings.registry import lookup

FOLDER = Path(__file__).parent / "encoder_weights"
FEATURES = 64  # width of the feature layer of every shipped encoder


class Classifier(nn.Module):
    """Three convolutions, the linear feature layer, and a linear layer to the classes. About 120,000 parameters."""

    def __init__(self, *, channels: int, size: int, classes: int, width: int = 16, dropout: float = 0.3) -> None:
        super().__init__()
        first = 2 if size >= 24 else 1  # 8x8 digits are too small to be reduced in the first layer
        side = math.ceil(math.ceil(size / first) / 2)
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 5, stride=first, padding=2), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(2 * width * side * side, FEATURES)),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) in [-1, 1] -> (n, 64)."""
        return self.body(images)

    def stages(self, images: Tensor) -> list[Tensor]:
        """(n, channels, size, size) in [-1, 1] -> what comes out of each ReLU, (n, c, h, w)."""
        outputs = []
        for layer in list(self.body)[:6]:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                outputs.append(images)
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) in [-1, 1] -> (n, classes) logits."""
        return self.head(self.dropout(F.relu(self.features(images))))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen map from data to features; without a network the features are the data itself ('pixels')."""

    name: str
    network: Classifier | Pretrained | None = None  # None: pooled pixels, or points as they are
    accuracy: float | None = None  # share of test images classified correctly when it was made; None without classes
    labels: tuple[str, ...] = ()  # names of the classes; empty where there are none
    shape: tuple[int, ...] | None = None  # (C, H, W) it expects; None: any
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The name by which a copy of it in another file is recognised."""
        return self.metadata.get("name", self.name)

    def features(self, data: Tensor, *, batch: int = 1000) -> Tensor:
        """(n, C, H, W) in [-1, 1], or (n, D) points -> (n, d) float32, d 64 for ours; 'pixels': at most C*8*8, or D."""
        if self.network is not None:
            return self._apply(self.network.features, data, batch).to(data.device)
        if data.ndim == 2:
            return data.float()
        height, width = data.shape[2:]
        return F.adaptive_avg_pool2d(data.float(), (min(8, height), min(8, width))).flatten(1)

    def logits(self, data: Tensor, *, batch: int = 1000) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, classes) float32, of an encoder with labels."""
        assert self.network is not None
        return self._apply(self.network, data, batch)

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why it cannot read samples of that shape, '' if it can. A pretrained network is tried."""
        if isinstance(self.network, Pretrained):
            return self.network.unfit(shape)
        return "" if self.shape in (None, shape) else f"reads {self.shape}, these images are {shape}"

    def _apply(self, function: Callable[[Tensor], Tensor], data: Tensor, batch: int) -> Tensor:
        assert self.network is not None
        assert self.shape in (None, tuple(data.shape[1:])), self.unfit(tuple(data.shape[1:]))
        device = next(chain(self.network.parameters(), self.network.buffers()), data).device
        with torch.inference_mode(not data.requires_grad):
            parts = [function(part.to(device).float()) for part in data.split(batch)]
        return torch.cat(parts)


def shipped() -> dict[str, Callable[[], Encoder]]:
    """The function that opens each encoder of this package, by name. Others are entry points of `naign.encoders`."""
    files = {name: partial(read_encoder, FOLDER / f"{name}.safetensors", name) for name in names()}
    lites = {f"efficientnet-lite{number}": partial(open_lite, number) for number in range(3)}
    theirs: dict[str, Callable[[], Pretrained]] = {**lites, "fid-inception": open_inception}
    opened = {name: lambda name=name: Encoder(name=name, network=theirs[name]()) for name in theirs}
    return {**files, **opened, "pixels": lambda: Encoder(name="pixels")}


def names() -> list[str]:
    """Names of the encoders that are shipped as a file, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def load_encoder(name: str) -> Encoder:
    """The encoder of that name, `timm:NAME`, or the one in a .safetensors file of ours; InputError for any other."""
    if name.startswith("timm:"):
        return Encoder(name=name, network=open_timm(name))
    if name.endswith(".safetensors"):
        return read_encoder(Path(name), name)
    remedies = {name: "or give timm:NAME, or the path of a .safetensors file"}
    return lookup("encoder", name, shipped(), "naign.encoders", remedies=remedies)()


def open_encoder(setting: str, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Encoder:
    """The encoder that `setting` names, on the device; InputError where it does not fit samples of that shape."""
    encoder = load_encoder(name)
    if encoder.network:
        encoder.network.to(device)
    if unfit := encoder.unfit(shape):
        raise InputError(f"{setting} '{name}' {unfit}")
    return encoder


def read_encoder(path: Path, name: str) -> Encoder:
    """The encoder in a safetensors file, as benchmarks/train_encoder.py writes it; InputError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (not a dict)
        channels, size, _ = shape = tuple(json.loads(metadata["shape"]))
        labels = tuple(json.loads(metadata["labels"]))
        with torch.device("meta"):  # nothing is allocated for what the header claims, only for what the file holds
            network = Classifier(channels=channels, size=size, classes=len(labels), width=int(metadata["width"]))
        network.load_state_dict(weights, assign=True)
        if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
            raise ValueError("it has weights that are not finite")
        accuracy = float(metadata["accuracy"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} is no encoder as `python benchmarks/train_encoder.py` writes them ({what})") from None
    network.eval().requires_grad_(False)
    return Encoder(name=name, network=network, accuracy=accuracy, labels=labels, shape=shape, metadata=metadata)


def choose_encoder(manifest: Manifest) -> Encoder:
    """The shipped encoder for data of that name, shape and number of labels; 'pixels' for any other data."""
    name = f"{manifest.name}-cnn{FEATURES}"
    if manifest.kind == "image" and name in names():
        encoder = load_encoder(name)
        if encoder.shape == tuple(manifest.shape) and len(encoder.labels) == len(manifest.labels):
            return encoder
    return load_encoder("pixels")
