"""What the chains of energy-based models share."""

from collections.abc import Callable

import torch
from torch import Tensor


def slope_of(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The slope of the energies (n,) of samples (n, ...) at each of them, without a gradient of its own."""
    x = x.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    return slope
