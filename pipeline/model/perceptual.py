"""A distance between images in the layers of a frozen network: it compares strokes and textures rather than values."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.model.losses import Distance

FAINT = 1e-2  # square of the length below which a position's features count for less than their direction


def perceptual(stages: Callable[[Tensor], list[Tensor]]) -> Distance:
    """The mean over stages and positions of the squared difference of features of unit length; LPIPS (arXiv 1801.03924)
    without its learned weights. Takes (n, C, H, W) in [-1, 1] twice; 0 for equal images, of the order of 1 for others.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(map(_unit, stages(a)), map(_unit, stages(b)), strict=True)  # apart: no backward through real images
        return torch.stack([(mine - other).square().sum(1).mean() for mine, other in pairs]).mean()

    return distance


def _unit(maps: Tensor) -> Tensor:
    return maps * torch.rsqrt(maps.float().square().sum(1, keepdim=True) + FAINT)
