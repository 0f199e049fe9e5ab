"""The optimizers of f by name. Each is a function `build(parameters, *, lr, weight_decay, fused)`, of which `fused` is
True or None.

The state of an optimizer is what it keeps by parameter, in tensors, besides the number of its steps as `step`: a
checkpoint holds no more. Another package adds one as an entry point of the group `naign.optimizers`.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from naign.distributed.muon import Muon, whole
from naign.errors import InputError, one_line, require
from naign.settings.registry import lookup

BETAS = (0.9, 0.99)  # decay of the moments; a short memory of the second follows the falling loss


Build = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "adamw": partial(AdamW, betas=BETAS),
    "muon": partial(Muon, betas=BETAS),
}


@cache  # the trial is made once
def find_optimizer(name: str) -> Build:
    """The function that builds the optimizer of that name; InputError for an unknown one, or if a trial of it fails."""
    build = lookup("train.optimizer", name, OPTIMIZERS, "naign.optimizers")
    weights = [nn.Parameter(torch.zeros([2] * dimensions)) for dimensions in (1, 2, 4)]
    try:
        made: object = build(
            weights,
            lr=1e-3,
            weight_decay=0.0,
            fused=None,
        )
        require((isinstance(made, Optimizer), f"it returns a {type(made).__name__}"))
    except Exception as error:  # whatever another package's function may raise
        raise InputError(f"train.optimizer '{name}' cannot be built: {one_line(error)}: fix its package") from None
    return build


def clip_and_step(
    optimizer: Any,
    parameters: Iterable[Tensor],  # with gradients
    clip: float,  # largest norm of the gradient; 0 does not clip
    *,
    ahead: bool,  # a fused optimizer, which skips on the device
) -> float | Tensor:
    """Clip the gradient's norm, make a step, which is skipped if the norm is not finite, and drop the gradients.

    Returns the norm before clipping, with `ahead` on the device.
    """
    norm: float | Tensor = whole(nn.utils.clip_grad_norm_(parameters, clip or math.inf).detach())
    if not ahead:
        norm = float(norm)
    if isinstance(norm, Tensor):
        optimizer.grad_scale = None
        optimizer.found_inf = (~norm.isfinite()).float()  # 1 skips
    if ahead or math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
