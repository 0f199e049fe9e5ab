"""Images of any size through a network of one size: overlapping tiles, blended so that no border is seen.

Tiles begin every quarter of their side. Each is weighted by a raised cosine along both sides, divided by the sum of all
weights at a pixel. At this step the sum of squared weights is constant, and so is the sum of every other tile's. The
step is odd, so that patterns of a network, whose strides are even, lie the other way round in every other tile, and
cancel alike everywhere. At a third of the side sharpness varied by a fifth. A smaller image is reflected.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

STEP = 1 / 4  # of a tile's side, between the starts of tiles
PIXELS = 1 << 19  # of the tiles that are computed at once

Read = Callable[[int, int], Tensor]
"""Takes (first, last); returns these rows of an image as (n, C, last - first, W)."""


def blended(
    f: Callable[[Tensor], Tensor],
    read: Read,
    size: tuple[int, ...],
    tile: tuple[int, ...],
) -> Iterator[Tensor]:
    """f of images of `size` (height, width), as bands of rows (n, C, r, W) from top to bottom.

    f takes and returns tiles (m, C, *tile). Of the images one row of tiles is in memory at a time.
    """
    height, width = size
    high, wide = tile
    tops, down = _windows(height, high)
    lefts, across = _windows(width, wide)
    overlap: Tensor | None = None  # rows of the tiles above that lie in this row of tiles as well
    for number, top in enumerate(tops):
        band = read(top, min(top + high, height))
        band = _reflected(_reflected(band, high, dim=2), wide, dim=3)
        tiles = torch.stack([band[..., left : left + wide] for left in lefts], dim=1)
        answers = f(tiles.flatten(0, 1)).view(tiles.shape)
        rows = torch.zeros_like(band)
        windows = across.to(band)
        for turn, left in enumerate(lefts):
            rows[..., left : left + wide] += windows[turn] * answers[:, turn]
        rows *= down[number].to(band)[:, None]
        if overlap is not None:
            rows[:, :, : overlap.shape[2]] += overlap
        end = high
        if number + 1 < len(tops):
            end = tops[number + 1] - top
        overlap = rows[:, :, end:]
        done = _middle(rows[:, :, :end], height, dim=2)
        yield _middle(done, width, dim=3)


def _windows(length: int, side: int) -> tuple[list[int], Tensor]:
    """Where tiles of `side` pixels start along `length`, and their windows (tiles, side), which sum to 1."""
    last = max(0, length - side)
    step = min(side, round(STEP * side) | 1)
    starts = np.array([*range(0, last, step), last])
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    places = starts[:, None] + np.arange(side)
    total = np.bincount(places.ravel(), np.tile(window, len(starts)))
    return starts.tolist(), torch.from_numpy(window / total[places])


def _reflected(band: Tensor, side: int, *, dim: int) -> Tensor:
    """The band, continued at both ends of a dimension to `side` pixels if it is shorter."""
    missing = side - band.shape[dim]
    if missing <= 0:
        return band
    before = missing // 2
    index = np.pad(np.arange(band.shape[dim]), (before, missing - before), "reflect")
    return band.index_select(dim, torch.from_numpy(index).to(band.device))


def _middle(rows: Tensor, length: int, *, dim: int) -> Tensor:
    """Rows without what _reflected added to the image."""
    added = max(0, rows.shape[dim] - length)
    return rows.narrow(dim, added // 2, rows.shape[dim] - added)
