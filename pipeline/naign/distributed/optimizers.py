"""The optimizers of f by name. Each is a function `build(parameters, *, lr, weight_decay, fused)`.

The state of an optimizer is what it keeps by parameter, in tensors, besides the number of its steps as `step`: a
checkpoint holds no more. Another package adds one as an entry point of the group `naign.optimizers`.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from naign.errors import InputError, one_line, require
from naign.settings.registry import lookup

BETAS = (0.9, 0.99)  # decay of the moments; a short memory of the second follows the falling loss


def adamw(parameters: list[Tensor], *, fused: bool, **settings: Any) -> Optimizer:
    return AdamW(parameters, betas=BETAS, **settings, fused=fused or None)


def adafactor(
    parameters: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    **_: Any,
) -> Optimizer:
    """torch's: `lr` is relative to the RMS of each weight, and at most 1 / sqrt(step). arXiv 1804.04235."""
    return Adafactor(parameters, lr=lr, weight_decay=weight_decay)


class Muon(Optimizer):
    """torch's Muon for matrices and, flattened to (out, in x height x width) as its author does, for the kernels of
    convolutions; AdamW for vectors. Updates have AdamW's RMS, so that `lr` and `weight_decay` are those of AdamW
    (arXiv 2502.16982). Weights must be contiguous.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        lr: float,
        weight_decay: float,
        **_: Any,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._views: dict[Tensor, Tensor] = {}  # of each matrix or kernel, as a matrix
        vectors = []
        for value in parameters:
            if value.ndim > 1:
                self._views[value] = value.detach().flatten(1)
            else:
                vectors.append(value)
        self._parts: list[Optimizer] = []
        if self._views:
            matrices: Any = self._views.values()
            self._parts.append(
                torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            )
        if vectors:
            self._parts.append(AdamW(vectors, betas=BETAS, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for value, view in self._views.items():
            if value.grad is not None:
                view.grad = value.grad.flatten(1)
            else:
                view.grad = None
        states: dict[Tensor, Any] = {}
        for part in self._parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
            states |= part.state
        for value in self.param_groups[0]["params"]:
            kept = states.get(self._views.get(value, value))
            if kept is not None:
                self.state[value] = kept


Build = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Build] = {"adamw": adamw, "muon": Muon, "adafactor": adafactor}


@cache  # the trial is made once
def find_optimizer(name: str) -> Build:
    """The function that builds the optimizer of that name; InputError for an unknown one, or if a trial of it fails."""
    build = lookup("train.optimizer", name, OPTIMIZERS, "naign.optimizers")
    weights = []
    for dimensions in (1, 2, 4):
        weights.append(nn.Parameter(torch.zeros([2] * dimensions)))
    try:
        made: object = build(
            weights,
            lr=1e-3,
            weight_decay=0.0,
            fused=False,
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
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip or math.inf).detach())
    if ahead:
        optimizer.grad_scale = None
        optimizer.found_inf = (~norm.isfinite()).float()  # 1 skips
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
    known = float(norm)
    if math.isfinite(known):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return known


def whole(value: Tensor) -> Tensor:
    """A tensor, whole also where its rows are on different ranks; then collective."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value
