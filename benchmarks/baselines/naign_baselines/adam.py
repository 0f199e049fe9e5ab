"""AdamW with the moments' decays of other papers."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer


def _adam(
    parameters: Iterable[Tensor],
    *,
    betas: tuple[float, float],
    fused: bool,
    **settings: Any,  # lr and weight_decay
) -> Optimizer:
    return AdamW(parameters, betas=betas, **settings, fused=fused or None)


ign = partial(_adam, betas=(0.5, 0.999))
"""That of IGN (arXiv 2311.01462)."""

ebm = partial(_adam, betas=(0.0, 0.999))
"""That of energy-based models (arXiv 1903.08689), without momentum, which would chase the samples in circles."""
