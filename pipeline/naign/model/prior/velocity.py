"""Networks of the velocity of a rectified flow (arXiv 2209.03003), on vectors and on images.

Both give (n, d, ...) at points of that shape and times (n,). A condition may follow: with `classes` labels (n,) int64,
of which the number of classes is the label of no class; with `features` vectors (n, features), of which zeros are none.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.model.networks import Attention, Norm, norm_act_conv, zeroed

_WAVES = 32  # sines, and as many cosines, of the time


class DenseVelocity(nn.Module):
    """A residual perceptron on (n, c)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        depth: int,
        *,
        classes: int = 0,
        features: int = 0,
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(shape[0] + 2 * _WAVES, width)
        self.outer = zeroed(nn.Linear(width, shape[0]))  # no velocity at first: noise is a whitened code, of a Gaussian
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(
                nn.Sequential(
                    nn.LayerNorm(width),
                    nn.Linear(width, 2 * width),
                    nn.SiLU(),
                    nn.Linear(2 * width, width),
                )
            )
        self.norm = nn.LayerNorm(width)
        self.label = _embedding(classes, features, width)

    def forward(self, codes: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.inner(torch.cat([codes, waves(time)], dim=1))
        if condition is not None:
            hidden = hidden + self.label(condition)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.outer(self.norm(hidden))


class TimedBlock(nn.Module):
    """A pre-activation residual block that also sees the time, and from which attention follows where it is asked."""

    def __init__(
        self,
        before: int,
        after: int,
        timed: int,
        *,
        attends: bool,
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(*norm_act_conv(before, after))
        self.time = nn.Linear(timed, after)
        self.second = nn.Sequential(*norm_act_conv(after, after))
        self.skip: nn.Module = nn.Identity()
        if before != after:
            self.skip = nn.Conv2d(before, after, 1)
        self.attention: nn.Module = nn.Identity()
        if attends:
            self.attention = Attention(after)
        nn.init.zeros_(self.second[-1].weight)  # type: ignore[arg-type]  # each block starts as its skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(time)[:, :, None, None]
        return self.attention(self.skip(x) + self.second(hidden))


class SpatialVelocity(nn.Module):
    """A U-Net on (n, c, h, w) that halves h to at most `smallest`; `depth` blocks a resolution on each side."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        depth: int,
        *,
        classes: int = 0,
        features: int = 0,
        smallest: int = 4,
    ) -> None:
        super().__init__()
        side = max(shape[1:])
        halvings = max(1, math.ceil(math.log2(side / smallest)))
        widths = [width * min(2**level, 4) for level in range(halvings + 1)]
        timed = 4 * width
        self.multiple = 2**halvings  # of the sides it works on
        self.time = nn.Sequential(
            nn.Linear(2 * _WAVES, timed),
            nn.SiLU(),
            nn.Linear(timed, timed),
            nn.SiLU(),
        )
        self.inner = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.enlarge = nn.ModuleList()
        for level, channels in enumerate(widths):
            attends = side <= 4 * 2**level  # at 8 x 8 it costs a fifth of the time, for nothing measured
            block = partial(
                TimedBlock,
                after=channels,
                timed=timed,
                attends=attends,
            )
            self.down.append(nn.ModuleList(block(channels) for _ in range(depth)))
            if level < halvings:
                self.shrink.append(nn.Conv2d(channels, widths[level + 1], 2, stride=2))
                self.enlarge.append(nn.Conv2d(widths[level + 1], 4 * channels, 1))
                blocks = nn.ModuleList([block(2 * channels)])
                for _ in range(depth - 1):
                    blocks.append(block(channels))
                self.up.append(blocks)
        self.norm = Norm(width)
        self.outer = zeroed(nn.Conv2d(width, shape[0], 3, padding=1))
        self.label = _embedding(classes, features, timed)

    def forward(self, codes: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        height, width = codes.shape[2:]
        seen = self.time[0](waves(time))
        if condition is not None:
            seen = seen + self.label(condition)
        seen = self.time[1:](seen)
        right = -width % self.multiple
        below = -height % self.multiple
        hidden = self.inner(F.pad(codes, (0, right, 0, below)))
        skips = list[Tensor]()
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(hidden)
                hidden = self.shrink[level - 1](hidden)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, seen)
        for enlarge, blocks in zip(reversed(self.enlarge), reversed(self.up), strict=True):
            larger = F.pixel_shuffle(enlarge(hidden), 2)
            hidden = torch.cat([larger, skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, seen)
        made = self.outer(F.silu(self.norm(hidden)))
        return made[:, :, :height, :width]


def _embedding(classes: int, features: int, width: int) -> nn.Module:
    """Of a condition, added to that of the time. Made last: without one no other weight is drawn otherwise."""
    if classes:
        return nn.Embedding(classes + 1, width)
    if features:
        return nn.Linear(features, width)
    return nn.Identity()


def waves(time: Tensor) -> Tensor:
    """(n,) -> (n, 2 * _WAVES): sines and cosines of multiples of a quarter turn."""
    multiples = torch.arange(1, _WAVES + 1, device=time.device)
    angles = time[:, None] * multiples * (torch.pi / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
