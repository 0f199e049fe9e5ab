"""Priors of noise: standard normals, and few normals that are enlarged to an image."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError
from pipeline.model.prior.base import Device, Prior, PriorConfig, Shape
from pipeline.philox import normal
from pipeline.settings.constraints import between


@dataclass(kw_only=True, slots=True)
class GaussianConfig(PriorConfig):
    name: str = "gaussian"


class Gaussian(Prior):
    """N(0, I)."""

    arc = True

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        return normal(seed, round, ids, self.shape, device)


@dataclass(kw_only=True, slots=True)
class SmoothConfig(PriorConfig):
    name: str = "smooth"
    grid: int = field(default=4, metadata=between(1, 64))
    """Normals per side and channel, which bicubic interpolation enlarges to the image."""


class Smooth(Prior):
    """Normals on a grid of each channel, enlarged to the image by bicubic interpolation.

    Noise of few dimensions: a pool of some thousand samples is dense enough in it that near images share near latents.
    """

    arc = True

    def __init__(self, config: SmoothConfig, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(config, shape, seed=seed)
        if len(shape) != 3:
            raise InputError("prior.name=smooth is for images, these are points: choose gaussian")

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        coarse = normal(seed, round, ids, (self.shape[0], self.config.grid, self.config.grid), device)
        return F.interpolate(coarse, size=self.shape[1:], mode="bicubic")
