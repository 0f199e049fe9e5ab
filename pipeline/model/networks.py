"""The networks f : R^D -> R^D. Input and output have one shape; images are NCHW in [-1, 1]."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import InputError


@dataclass(kw_only=True, slots=True)
class NetworkConfig:
    kind: str = "conv"
    """`conv` for images (C, S, S), `mlp` for points (D,)."""

    width: int = 32
    """Channels at half resolution (conv; doubled at each further halving) or hidden units (mlp)."""

    depth: int = 0
    """Residual blocks a resolution (conv) or further hidden layers (mlp)."""

    code: int = 128
    """Conv: dimensions of the bottleneck between encoder and decoder."""

    max_width: int = 512
    """Conv: the channels stop doubling here."""

    octaves: int = 0
    """Mlp: sines and cosines of 1, 2, 4, ... times each coordinate, so many, beside it, for data of fine structure."""

    def __post_init__(self) -> None:
        if self.kind not in ("conv", "mlp"):
            raise InputError(f"model.kind is '{self.kind}': choose conv (images) or mlp (points)")
        for name, least, most in (
            ("width", 1, 2**14),
            ("depth", 0, 256),
            ("code", 1, 2**16),
            ("max_width", 1, 2**14),
            ("octaves", 0, 16),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must lie between {least} and {most}")
        if self.octaves and self.kind != "mlp":
            raise InputError(f"model.octaves is {self.octaves}: it is for model.kind=mlp, leave it 0")


def build_network(
    config: NetworkConfig,
    shape: tuple[int, ...],
    *,
    recompute: bool = False,  # activation checkpointing: less memory for a third more arithmetic
) -> nn.Module:
    """The untrained network for samples of `shape`; InputError where the two do not fit."""
    if config.kind == "mlp":
        return PointNetwork(math.prod(shape), config.width, config.depth, octaves=config.octaves)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 4:
        raise InputError(
            f"model.kind=conv takes square images (C, S, S) with S a multiple of 4, the data has {tuple(shape)}: "
            "pack with another --size, or set model.kind=mlp and match.latents=gaussian for points"
        )
    return ImageNetwork(config, channels=shape[0], size=shape[1], recompute=recompute)


class PointNetwork(nn.Module):
    """A multilayer perceptron on (n, D) float32; any further dimensions are flattened.

    With octaves it is also given sines and cosines of the coordinates (Fourier features, arXiv 2006.10739): a smooth
    network is slow to learn structure that is much finer than the data's extent.
    """

    def __init__(self, dims: int, width: int, depth: int, *, octaves: int = 0) -> None:
        super().__init__()
        self.octaves = octaves
        layers: list[nn.Module] = [nn.Linear((1 + 2 * octaves) * dims, width), nn.SiLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dims))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        waves = [
            wave for octave in range(self.octaves) for wave in ((2**octave * flat).sin(), (2**octave * flat).cos())
        ]
        moved: Tensor = self.layers(torch.cat([flat, *waves], dim=1))
        return moved.view_as(x)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), pre-activation (arXiv 1603.05027) with GroupNorm (1803.08494)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]  # each block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ImageNetwork(nn.Module):
    """A convolutional autoencoder: halve until at most 8 x 8 (or odd), one dense code, and back.

    The dense code is what makes f a projector rather than a filter: every output pixel sees every input pixel, and
    there is no skip connection through which noise could pass unchanged.
    """

    def __init__(self, config: NetworkConfig, *, channels: int, size: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        sizes = [size // 2]
        while sizes[-1] > 8 and sizes[-1] % 2 == 0:
            sizes.append(sizes[-1] // 2)
        widths = [min(config.width * 2**level, max(config.max_width, config.width)) for level in range(len(sizes))]
        inner = (widths[-1], sizes[-1], sizes[-1])

        down: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths, strict=False):
            down.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            down += [ResidualBlock(after) for _ in range(config.depth)]
        up: list[nn.Module] = []
        for before, after in zip(reversed(widths), [*reversed(widths[:-1]), channels], strict=True):
            up += [ResidualBlock(before) for _ in range(config.depth)]
            up += [_norm(before), nn.SiLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]

        self.encoder = nn.Sequential(*down, _norm(widths[-1]), nn.SiLU(), nn.Flatten())
        self.bottleneck = nn.Sequential(
            nn.Linear(math.prod(inner), config.code), nn.SiLU(), nn.Linear(config.code, math.prod(inner))
        )
        self.decoder = nn.Sequential(nn.Unflatten(1, inner), *up, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            for layer in (*self.encoder, *self.bottleneck, *self.decoder):
                x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, ResidualBlock) else layer(x)
            return x
        out: Tensor = self.decoder(self.bottleneck(self.encoder(x)))
        return out


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)
