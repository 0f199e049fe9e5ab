"""A U-Net (arXiv 1505.04597) that repairs: it has skip connections and no code, and gives what to add to an image."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from naign.errors import InputError
from naign.model.networks import NetworkConfig, ResidualBlock, norm_act_conv, zeroed
from naign.settings.constraints import between


@dataclass(kw_only=True, slots=True)
class UnetConfig(NetworkConfig):
    name: str = "unet"
    width: int = field(default=32, metadata=between(1, 2**12))
    """Channels at full resolution; doubled at each halving."""
    halvings: int = field(default=2, metadata=between(1, 8))
    """How often the resolution is halved."""


class Unet(nn.Module):
    def __init__(self, channels: int, widths: list[int]) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.before = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.after = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.enlarge = nn.ModuleList()
        self.join = nn.ModuleList()
        for fine, coarse in pairwise(widths):
            self.shrink.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * fine, coarse, 1)))
            self.enlarge.append(nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2)))
            self.join.append(nn.Conv2d(2 * fine, fine, 1))
            self.after.append(ResidualBlock(fine))
        self.outer = nn.Sequential(*norm_act_conv(widths[0], channels))
        zeroed(self.outer[-1])  # it starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before[0](self.inner(x))
        skips = []
        for shrink, block in zip(self.shrink, self.before[1:], strict=True):
            skips.append(hidden)
            hidden = block(shrink(hidden))
        for level in reversed(range(len(self.after))):
            larger = self.enlarge[level](hidden)
            joined = self.join[level](torch.cat([larger, skips[level]], dim=1))
            hidden = self.after[level](joined)
        return x + self.outer(hidden)


def _build(config: UnetConfig, shape: tuple[int, ...], *, recompute: bool) -> nn.Module:
    if recompute:
        raise InputError("model.name=unet keeps all activations: leave out train.recompute")
    multiple = 2**config.halvings
    if len(shape) != 3 or shape[1] % multiple or shape[2] % multiple:
        raise InputError(f"model.name=unet takes images whose sides are multiples of {multiple}, not {tuple(shape)}")
    widths = [config.width * 2**level for level in range(config.halvings + 1)]
    return Unet(shape[0], widths)


NETWORK = (UnetConfig, _build)
"""For `naign.networks`."""
