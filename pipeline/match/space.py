"""The space of the match: pixels, features of a frozen encoder, or a weighted sum of both.

For images of D values the squared distance is

    D x (sum over the parts of weight x mean squared difference of that part's values)

so pixels alone at weight 1 give the plain sum of squared differences, and parts with equal weights and equal mean
squared differences count equally. An embedding is the concatenation of the parts, each times the root of its factor,
so that the search itself computes plain squared distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.settings.constraints import check_fields

WEIGHT = {"holds": lambda it: not it or 1e-12 <= it <= 1e12, "must": "a weight is 0, or between 1e-12 and 1e12"}
ROWS = 256  # images embedded at once, always as many


@dataclass(kw_only=True, slots=True)
class SpaceConfig:
    pixels: float = field(default=1.0, metadata=WEIGHT)
    """Weight of the pixels, or of the coordinates of points."""
    features: float = field(default=0.0, metadata=WEIGHT)
    """Weight of the encoder's features; 0.006 makes those of mnist-cnn64 count as much as MNIST's pixels."""
    encoder: str = ""
    """Frozen encoder: mnist-cnn64, efficientnet-lite0, timm:NAME, or the path of a .safetensors file."""

    def __post_init__(self) -> None:
        check_fields(self, "match.space")
        if not (self.pixels or self.features):
            raise InputError("match.space.pixels and .features are both 0: no distance is left")
        if bool(self.features) != bool(self.encoder):
            given = f"match.space.features is {self.features} and match.space.encoder '{self.encoder}'"
            raise InputError(f"{given}: give a weight above 0 and the name of an encoder, or neither")


def check_space(config: SpaceConfig, shape: tuple[int, ...]) -> None:
    """InputError unless samples of that shape have every part that is given a weight."""
    if config.features and len(shape) != 3:
        raise InputError("match.space.features is for images, these are points: leave it 0")


def embed(
    images: Tensor, config: SpaceConfig, features: Callable[[Tensor], Tensor] | None = None, *, number: int = 0
) -> Tensor:
    """Embeddings (n, d) float32 of images (n, *shape), whose squared L2 distances are those of the space; `features` of
    images (b, *shape) are (b, e). A row does not depend on the rows beside it: a matrix product may round a row by its
    place and the product's size, so image i, the first being `number`, is computed at row i % ROWS of ROWS.
    """
    if not config.features:
        return _embed_batch(images, config)
    first, last = number % ROWS, number % ROWS + len(images)
    padded = images.new_zeros(max(1, -(-last // ROWS)) * ROWS, *images.shape[1:])
    padded[first:last] = images
    return torch.cat([_embed_batch(batch, config, features) for batch in padded.split(ROWS)])[first:last]


def _embed_batch(images: Tensor, config: SpaceConfig, features: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """As `embed`, but all rows at once: the batch may change their rounding."""
    images = images.float()
    parts = [(config.pixels, images.flatten(1))] if config.pixels else []
    if config.features:
        assert features is not None, "a weight for features needs an encoder"
        parts.append((config.features, features(images).float()))
    factors = [math.sqrt(weight * images.shape[1:].numel() / part.shape[1]) for weight, part in parts]
    scaled = [part if factor == 1 else part * factor for factor, (_, part) in zip(factors, parts, strict=True)]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)
