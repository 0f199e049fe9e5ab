"""Priors of noise: standard normals, flat images among them, and few normals that are enlarged to an image."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from naign.errors import require
from naign.model.prior.base import Device, Prior, PriorConfig, Shape
from naign.philox import SCALE, normal, uniform
from naign.settings.constraints import between


class Gaussian(Prior):
    """N(0, I)."""

    arc = True

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        return normal(seed, round, ids, self.shape, device)


class Halves(Prior):
    """N(0, I) for odd ids; for even ids an offset U(-1, 1) a row plus a scale U(0, 1/2) times N(0, I).

    Flat latents teach f to carry flat images to the data, too: a residual autoencoder leaves black where it is.
    """

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        noise = normal(seed, round, ids, self.shape, device)
        rows = (len(ids),) + (1,) * len(self.shape)
        offset, scale = uniform(seed, round, ids, (2,), device, stream=SCALE).unbind(1)
        flat = (2 * offset - 1).view(rows) + (scale / 2).view(rows) * noise
        return torch.where((ids.to(noise.device) % 2 == 0).view(rows), flat, noise)


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
        require((len(shape) == 3, "prior.name=smooth is for images, these are points: choose gaussian"))

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        coarse = normal(seed, round, ids, (self.shape[0], self.config.grid, self.config.grid), device)
        return F.interpolate(coarse, size=self.shape[1:], mode="bicubic")
