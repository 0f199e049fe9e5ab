"""Encoders: frozen networks in whose features images are compared. Ours are small classifiers with a 64-d layer;
`efficientnet-lite2` (ImageNet) and `timm:NAME` are in pretrained.py.

Frechet distances compare on the same features only, so ours are named, fixed and shipped (encoder_weights/). They are
the *linear* layer before its ReLU, since a Gaussian fits mass at zero badly; dropout behind it, weight decay and light
augmentation keep single features from carrying a class, so that train and test images have the same features.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.data.format.manifest import Manifest
from naign.errors import InputError, one_line
from naign.model.files import read_tensors
from naign.model.pretrained import LITES, open_lite, open_timm
from naign.settings.registry import lookup

FOLDER = Path(__file__).parent / "encoder_weights"
FEATURES = 64  # width of the feature layer of every shipped encoder
BATCH = 1000  # samples encoded at once
POOLED = 8  # height and width to which the encoder `pixels` reduces images


class Classifier(nn.Module):
    """Three convolutions, the linear feature layer, and a linear layer to the classes. About 120,000 parameters."""

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        classes: int,
        width: int = 16,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        first = 2 if size >= 24 else 1  # 8x8 digits are too small to be reduced in the first layer
        side = math.ceil(math.ceil(size / first) / 2)
        self.body = nn.Sequential(
            nn.Conv2d(
                channels,
                width,
                5,
                stride=first,
                padding=2,
            ),
            nn.ReLU(),
            nn.Conv2d(
                width,
                2 * width,
                3,
                stride=2,
                padding=1,
            ),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * side * side, FEATURES),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) in [-1, 1] -> (n, 64)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) in [-1, 1] -> (n, classes) logits."""
        return self.head(self.dropout(F.relu(self.features(images))))


class Pixels(nn.Module):
    """Not a network: pooled pixels, or points as they are."""

    def features(self, data: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, C * 8 * 8), fewer of smaller images; points (n, D) -> (n, D)."""
        if data.ndim == 2:
            return data
        height, width = data.shape[2:]
        pooled = F.adaptive_avg_pool2d(data, (min(POOLED, height), min(POOLED, width)))
        return pooled.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen network, whose method `features` maps data to features, and what is known of it."""

    name: str
    network: Any
    accuracy: float | None = None  # share of test images classified correctly when it was made; None without classes
    labels: tuple[str, ...] = ()  # names of the classes, of which its forward returns logits; empty: it has none
    shape: tuple[int, ...] | None = None  # (C, H, W) it expects; None: any

    def features(self, data: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1], or (n, D) points -> (n, d) float32, d 64 for ours."""
        return self._apply(self.network.features, data)

    def logits(self, data: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, classes) float32, of an encoder with labels."""
        return self._apply(self.network, data)

    def _apply(self, function: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
        weights = chain(self.network.parameters(), self.network.buffers())
        device = next(weights, data).device
        parts = []
        with torch.inference_mode(not data.requires_grad):
            for part in data.split(BATCH):
                parts.append(function(part.to(device).float()))
        return torch.cat(parts).to(data.device)


def names() -> list[str]:
    """Names of the encoders that are shipped as a file, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def builtin_encoders() -> dict[str, Callable[[], Encoder]]:
    """The function that opens each encoder of this package, by name. Others are entry points of `naign.encoders`."""
    found: dict[str, Callable[[], Encoder]] = {}
    for name in names():
        found[name] = partial(read_encoder, FOLDER / f"{name}.safetensors", name)
    for name in LITES:
        found[name] = partial(_read_lite, name)
    found["pixels"] = partial(Encoder, name="pixels", network=Pixels())
    return found


def _read_lite(name: str) -> Encoder:
    return Encoder(name=name, network=open_lite(name))


def load_encoder(name: str) -> Encoder:
    """The encoder of that name, `timm:NAME`, or the one in a .safetensors file of ours; InputError for any other."""
    if name.startswith("timm:"):
        return Encoder(name=name, network=open_timm(name))
    if name.endswith(".safetensors"):
        return read_encoder(Path(name), name)
    setting = "encoder, which may also be timm:NAME or the path of a .safetensors file,"
    return lookup(setting, name, builtin_encoders(), "naign.encoders")()


def open_encoder(
    setting: str,
    name: str,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Encoder:
    """The encoder that `setting` names, on the device, after a trial with two samples of that shape.

    Raises InputError where it is missing, does not fit these samples, or finds no memory.
    """
    encoder = load_encoder(name)
    if encoder.shape not in (None, shape):
        raise InputError(f"{setting} '{name}' reads {encoder.shape}, these samples are {shape}")
    values = torch.linspace(-1, 1, 2 * math.prod(shape)).view(2, *shape)
    try:
        encoder.network.to(device)
        finite = bool(encoder.features(values).isfinite().all())
    except Exception as error:  # the network may raise anything
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{setting} '{name}' cannot read samples of shape {shape} ({why})") from None
    if not finite:
        raise InputError(f"{setting} '{name}' returns values that are not finite")
    return encoder


def read_encoder(path: Path, name: str) -> Encoder:
    """The encoder in a safetensors file, as benchmarks/train_encoder.py writes it; InputError for anything else."""
    try:
        metadata, weights = read_tensors(path)
        shape = tuple(json.loads(metadata["shape"]))
        labels = tuple(json.loads(metadata["labels"]))
        channels, size, _ = shape
        with torch.device("meta"):  # nothing is allocated for what the header claims, only for what the file holds
            network = Classifier(
                channels=channels,
                size=size,
                classes=len(labels),
                width=int(metadata["width"]),
            )
        network.load_state_dict(weights, assign=True)
        accuracy = float(metadata["accuracy"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} is no encoder as `python benchmarks/train_encoder.py` writes them ({why})") from None
    return Encoder(
        name=name,
        network=network.eval().requires_grad_(False),
        accuracy=accuracy,
        labels=labels,
        shape=shape,
    )


def choose_encoder(manifest: Manifest) -> Encoder:
    """The shipped encoder for data of that name, shape and number of labels; 'pixels' for any other data."""
    name = f"{manifest.name}-cnn{FEATURES}"
    if name in names():
        encoder = load_encoder(name)
        if encoder.shape == manifest.shape and len(encoder.labels) == len(manifest.labels):
            return encoder
    return load_encoder("pixels")
