"""Images of any size through a network of one size: overlapping tiles, blended so that no border is seen.

Tiles begin every quarter of their side. Each is weighted by a raised cosine along both sides, divided by the sum of all
weights at a pixel. At this step the sum of squared weights is constant, and so is the sum of every other tile's. The
step is odd, so that patterns of a network, whose strides are even, lie the other way round in every other tile, and
cancel alike everywhere. At a third of the side sharpness varied by a fifth. A smaller image is reflected.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

STEP = 1 / 4  # of a tile's side, between the starts of tiles
PIXELS = 1 << 19  # of the tiles that are computed at once


def blended(
    f: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: tuple[int, ...],
) -> Tensor:
    """f of images (n, C, H, W); f takes and returns tiles (m, C, *tile), one row of them at a time."""
    height, width = images.shape[2:]
    high, wide = tile
    rows, above = _reflected(height, high)
    columns, before = _reflected(width, wide)
    images = images[:, :, rows][..., columns]
    tops, down = _windows(len(rows), high)
    lefts, across = _windows(len(columns), wide)
    made = torch.zeros_like(images)
    for top, weights in zip(tops, down, strict=True):
        band = slice(top, top + high)
        seen = images[:, :, band]
        cut = [seen[..., left : left + wide] for left in lefts]
        tiles = torch.stack(cut, dim=1)
        answers = f(tiles.flatten(0, 1)).view(tiles.shape)
        for number, left in enumerate(lefts):
            window = weights[:, None] * across[number]
            window = window.to(made)
            made[:, :, band, left : left + wide] += window * answers[:, number]
    return made[:, :, above : above + height, before : before + width]


def _windows(length: int, side: int) -> tuple[list[int], Tensor]:
    """Where tiles of `side` pixels start along `length`, and their windows (tiles, side), which sum to 1."""
    last = length - side
    step = min(side, round(STEP * side) | 1)
    starts = np.array([*range(0, last, step), last])
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    places = starts[:, None] + np.arange(side)
    total = np.bincount(places.ravel(), np.tile(window, len(starts)))
    return starts.tolist(), torch.from_numpy(window / total[places])


def _reflected(length: int, side: int) -> tuple[Tensor, int]:
    """The pixels along `length`, continued at both ends to `side` if there are fewer, and how many begin them."""
    missing = max(0, side - length)
    before = missing // 2
    index = np.pad(np.arange(length), (before, missing - before), "reflect")
    return torch.from_numpy(index), before
