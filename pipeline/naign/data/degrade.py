"""Damage of known kind and strength, for measuring repair.

Of images in [-1, 1] (black is -1):
    blur          9x9 Gaussian kernel, sigma 2, edges reflected
    noise         Gaussian noise, sigma 0.5, clamped to [-1, 1]
    salt_pepper   20 % of the pixels replaced, half by white, half by black; all channels of a pixel together
    rows          five random rows set black
Images less than 28 pixels high are damaged in proportion: blur has sigma 2 * H / 28, and round(5 * H / 28) rows, at
least one, are blackened. Sigmas, the share of pixels and the number of rows are multiplied by the strength.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["blur", "noise", "salt_pepper", "rows"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REFERENCE_HEIGHT = 28  # height in pixels for which the damages are defined; lower images get proportionally less


def gaussian_kernel(*, size: int = 9, sigma: float = 2.0) -> Tensor:
    """(size, size) float32 Gaussian kernel that sums to 1; sigma in pixels."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(weights, weights)
    return (kernel / kernel.sum()).float()


def _shrink(height: int) -> float:
    return min(1.0, height / REFERENCE_HEIGHT)


def blackened_rows(height: int, strength: float = 1.0) -> int:
    """How many rows the damage 'rows' takes from an image of that height in pixels."""
    return max(1, round(5 * _shrink(height) * strength))


def degrade(images: Tensor, kind: Kind, *, seed: int = 0, strength: float = 1.0) -> Tensor:
    """(n, C, H, W) float32 in [-1, 1] -> damaged images of the same shape and range; a function of the arguments."""
    if strength == 0:
        return images
    count, channels, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "blur":
            kernel = gaussian_kernel(sigma=2.0 * _shrink(height) * strength).expand(channels, 1, 9, 9)
            padded = F.pad(images, (4, 4, 4, 4), mode="reflect" if min(height, width) > 4 else "replicate")
            return F.conv2d(padded, kernel, groups=channels).clamp(-1, 1)
        case "noise":
            return (images + 0.5 * strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
        case "salt_pepper":
            chance = torch.rand(count, 1, height, width, generator=generator)
            salted = torch.where(chance < 0.1 * strength, 1.0, images)
            return torch.where(chance >= 1 - 0.1 * strength, -1.0, salted)
        case "rows":
            order = torch.rand(count, height, generator=generator).argsort(1)[:, : blackened_rows(height, strength)]
            rows = torch.zeros(count, height, dtype=torch.bool).scatter_(1, order, True)
            return images.masked_fill(rows[:, None, :, None], -1.0)
