"""A distance between images that sees strokes and textures rather than values: in the layers of a frozen classifier."""

import torch
from torch import Tensor, nn

from pipeline.model.losses import Distance

FAINT = 1e-2  # square of the length below which a position's features count for less than their direction


def perceptual(layers: nn.Sequential) -> Distance:
    """The mean over ReLUs and positions of the squared difference of features of unit length; LPIPS (arXiv 1801.03924)
    without its learned weights. Takes (n, C, H, W) in [-1, 1] twice; 0 for equal images, of the order of 1 for others.
    """
    last = max(index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        found = []
        both = torch.cat([a, b])
        for layer in list(layers)[: last + 1]:
            both = layer(both)
            if isinstance(layer, nn.ReLU):
                unit = both * torch.rsqrt(both.float().square().sum(1, keepdim=True) + FAINT)
                mine, other = unit.split(len(a))
                found.append((mine - other).square().sum(1).mean())
        return torch.stack(found).mean()

    return distance
