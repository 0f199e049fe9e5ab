"""The latents of training: noise that f learns to map to the data. Each kind is chosen by name, as `latents.name`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from naign.errors import require
from naign.model.prior.base import Device, Prior, Shape
from naign.philox import IMAGINARY, normal
from naign.settings.constraints import SHARE, between
from naign.settings.registry import lookup


@dataclass(kw_only=True, slots=True)
class LatentsConfig:
    """Base of the settings of all latents."""

    name: str = ""
    """Noise that f maps to the data: `smooth` (few normals, enlarged to an image), `gaussian` (N(0, I)), or one that
    another package registers, such as IGN's `fourier`."""

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""


class Latents(Prior):
    """A distribution of noise (n, *shape). Its buffers, if it has any, are measured once before the first round."""

    def measure(self, images: Tensor, add: Callable[[Tensor], Tensor], world: int) -> None:
        """Adapt to the images (n, *shape) of the first round, equally many on each rank; `add` sums over ranks."""

    def buried(
        self,
        latents: Tensor,  # (n, *shape), matched with the images of these rows
        seed: int,
        round: int,
        numbers: Tensor,  # (n,) int64: the rows of the round
    ) -> Tensor:
        """The latents (n, *shape) that f is trained on in place of these; by default the same.

        Other latents teach f to map other noise to the same images.
        """
        return latents


class Gaussian(Latents):
    """N(0, I)."""

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor:
        return normal(
            seed,
            round,
            ids,
            self.shape,
            device,
        )


@dataclass(kw_only=True, slots=True)
class SmoothConfig(LatentsConfig):
    name: str = "smooth"
    grid: int = field(default=4, metadata=between(1, 64))
    """Normals per side and channel, which bicubic interpolation enlarges to the image."""
    white: float = field(default=0.5, metadata=SHARE)
    """Share of the steps' latents that are buried in white noise, so that f brings N(0, I) to the data as well."""


class Smooth(Latents):
    """Normals on a grid of each channel, enlarged to the image by bicubic interpolation.

    Noise of few dimensions: a pool of some thousand samples is dense enough in it that near images share near latents.
    N(0, I) too has a smooth part, a fainter one, and a rest. A buried latent is made fainter and gets as much of a
    rest, so that f learns to find the smooth part of what it is given.
    """

    over_rows: Tensor  # (height, height) float32: projects an image's columns on smooth ones
    over_columns: Tensor  # (width, width) float32: its rows
    faint: Tensor  # () float32: the deviation of the grid's normals in N(0, I)

    def __init__(self, config: SmoothConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        require((len(shape) == 3, "latents.name=smooth is for images, these are points: choose gaussian"))
        over_rows, faint_rows = _smooth_part(config.grid, shape[1])
        over_columns, faint_columns = _smooth_part(config.grid, shape[2])
        self.register_buffer("over_rows", over_rows, persistent=False)
        self.register_buffer("over_columns", over_columns, persistent=False)
        self.register_buffer("faint", faint_rows * faint_columns, persistent=False)

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor:
        grid = self.config.grid
        coarse = normal(
            seed,
            round,
            ids,
            (self.shape[0], grid, grid),
            device,
        )
        return F.interpolate(coarse, size=self.shape[1:], mode="bicubic")

    def buried(
        self,
        latents: Tensor,
        seed: int,
        round: int,
        numbers: Tensor,
    ) -> Tensor:
        if not self.config.white:
            return latents
        size = math.prod(self.shape)
        drawn = normal(
            seed,
            round,
            numbers,
            (size + 3,),
            latents.device,
            stream=IMAGINARY,
        )
        noise = drawn[:, :size].view_as(latents)
        chosen, depth, scale = torch.special.ndtr(drawn[:, size:]).view(-1, 3, 1, 1, 1).unbind(1)  # uniform
        rest = noise - self.over_rows @ noise @ self.over_columns
        left = 1 - depth * (1 - self.faint)
        buried = left * latents + depth * rest
        fainter = 1 - depth * scale / 2  # the deviation of uniform noise in [-1, 1] is about half of that of N(0, I)
        return torch.where(chosen < self.config.white, fainter * buried, latents)


def _smooth_part(grid: int, size: int) -> tuple[Tensor, Tensor]:
    """The projection (size, size) of a line of pixels on what `grid` normals are enlarged to, and the deviation that
    these normals have in a line of N(0, I).
    """
    lines = torch.eye(grid, device="cpu")[None, None]
    enlarge = F.interpolate(lines, size=(size, grid), mode="bicubic")[0, 0].double()
    reduce = torch.linalg.pinv(enlarge)
    return (enlarge @ reduce).float(), reduce.norm(dim=1).mean().float()


LATENTS: dict[str, tuple[type[LatentsConfig], type[Latents]]] = {
    "smooth": (SmoothConfig, Smooth),
    "gaussian": (LatentsConfig, Gaussian),
}
"""Settings and latents by name; other packages add theirs as entry points of the group `naign.latents`."""


def find_latents(name: str) -> tuple[type[LatentsConfig], type[Latents]]:
    """The settings and the class of the latents of that name; InputError for an unknown one."""
    return lookup("latents.name", name, LATENTS, "naign.latents")


def build_latents(config: LatentsConfig, shape: Shape) -> Latents:
    """The latents (n, *shape) of the settings; InputError where they do not fit such data."""
    kind = find_latents(config.name)[1]
    return kind(config, shape).requires_grad_(False)
