"""Between images as they are stored and the scale that networks are trained in."""

import torch
from torch import Tensor


def scaled(data: Tensor) -> Tensor:
    """Stored images (uint8) in the model's scale: float32 in [-1, 1]; points as they are."""
    values = data.to(torch.float32, memory_format=torch.contiguous_format)
    if data.dtype == torch.uint8:
        values.div_(127.5).sub_(1.0)
    return values


def eight_bits(image: Tensor) -> Tensor:
    """Values in [-1, 1], to which they are clipped, as uint8."""
    levels = (image.clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8)
