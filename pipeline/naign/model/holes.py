"""Holes in images: what is known is put back after f, and continued smoothly into them."""

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 10  # of smoothing at each scale


def put_back(known: Tensor, made: Tensor, hole: Tensor) -> Tensor:
    """What f made of images (n, C, H, W), with their known values outside of holes (bool, the same shape) put back bit
    for bit. What f changed there is taken back smoothly in holes as well, so that no seam remains.
    """
    filled = made + continued(known - made, hole)
    return torch.where(hole, filled.clamp(-1, 1), known)


def continued(values: Tensor, hole: Tensor) -> Tensor:
    """Images (n, C, H, W) with what lies in holes (bool, the same shape) replaced: nearly the harmonic function of the
    values around, which is their mean in each pixel. Values in holes are not read. 0 where all is a hole.

    Coarse to fine: each scale begins with what was found at half of it, and is smoothed.
    """
    values = values.where(~hole, 0)
    if max(values.shape[2:]) == 1 or not hole.any():
        return values
    total = F.avg_pool2d(values, 2, ceil_mode=True)
    known = F.avg_pool2d((~hole).to(values), 2, ceil_mode=True)
    coarse = continued(total / known.clamp(min=1e-6), known == 0)
    finer = F.interpolate(coarse, size=hole.shape[2:], mode="bilinear")
    values = torch.where(hole, finer, values)
    for _ in range(STEPS):
        padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
        values = torch.where(hole, F.avg_pool2d(padded, 3, 1), values)
    return values
