"""Muon (Jordan and others 2024): steps of a matrix are turned until all its singular values are about one.

AdamW scales each number of a gradient by itself. Muon treats the weights of a layer as a matrix: with the momentum
M = U S V' the step is close to U V', so that directions which few samples ask for are learned as fast as the others.
Five steps of a Newton-Schulz iteration find it with matrix products alone. A kernel of a convolution is the matrix
(out, in * height * width). AdamW updates biases and other vectors.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of a step of rate 1, about that of AdamW's (arXiv 2502.16982), so that one rate serves both."""
STEPS = 5  # of the iteration
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by which vectors are updated; matrices have the first alone
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic, which grows small singular values fast and leaves all between 0.7 and 1.2."""


class Muon(AdamW):
    """Muon for weights of two and more dimensions, AdamW for the others. Collective where weights are distributed."""

    def __init__(self, parameters: Iterable[Tensor], **settings: Any) -> None:
        """Parameters, not in groups; settings are AdamW's."""
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for weight in parameters:
            kind = matrices if weight.ndim > 1 else vectors
            kind.append(weight)
        groups = [{"params": matrices, "turned": True}, {"params": vectors, "turned": False}]
        super().__init__([group for group in groups if group["params"]], **settings)
        self.turn: Callable[[list[Tensor], list[Tensor]], list[Tensor]] = turn_here
        """The step, of rate 1, of each weight by its momentum, both of which lie as the engine distributes them."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        moved: float | Tensor = 1.0
        if hasattr(self, "found_inf"):  # 1 on the device where a fused optimizer is to skip this step
            moved = 1 - self.found_inf
        gradients = []
        for group in self.param_groups:
            if not group["turned"]:
                continue
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = [self._direction(weight, moved) for weight in weights]
            rate = group["lr"] * moved
            for weight, change in zip(weights, self.turn(weights, directions), strict=True):
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(rate * change)
                gradients.append((weight, weight.grad))
                weight.grad = None  # so that AdamW leaves it
        super().step()
        for weight, gradient in gradients:  # DeepSpeed uses their memory again
            weight.grad = gradient

    def _direction(self, weight: Tensor, moved: float | Tensor) -> Tensor:
        """Nesterov's momentum of a weight after its present gradient."""
        gradient = weight.grad
        assert gradient is not None
        state = self.state[weight]
        if not state:
            device = "cpu" if isinstance(moved, float) else weight.device
            state["step"] = torch.zeros((), device=device)
            state["exp_avg"] = torch.zeros_like(weight)
        if isinstance(moved, Tensor):
            gradient = gradient.where(moved > 0, 0.0)
        state["step"] += moved
        average: Tensor = state["exp_avg"]
        average.lerp_(gradient, (1 - MOMENTUM) * moved)
        return gradient.lerp(average, MOMENTUM)


def turn_here(weights: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Every rank computes all steps, of which it keeps its part where the weights are cut up."""
    pairs = zip(weights, directions, strict=True)
    return [like(orthogonal(whole(direction)), weight) for weight, direction in pairs]


def turn_shared(weights: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Collective, where every rank has all weights: each rank computes some steps and sends them to the others, so that
    all have the same bits.
    """
    world = dist.get_world_size()
    changes = []
    sent = []
    for place, direction in enumerate(directions):
        owner = place % world
        change = torch.empty_like(direction)
        if owner == dist.get_rank():
            change = orthogonal(direction)
        changes.append(change)
        sent.append(dist.broadcast(change, owner, async_op=True))
    for work in sent:
        work.wait()
    return changes


def orthogonal(direction: Tensor) -> Tensor:
    """A step, of root mean square RMS: `direction`, as a matrix, with all singular values about equal.

    The iteration multiplies a matrix X by polynomials of X X', which commute: it is done on X X', the smaller square,
    and X is multiplied once. In float32, so that steps are the same wherever they are computed, up to rounding.
    """
    matrix = direction.flatten(1).float()
    rows, columns = matrix.shape
    if rows > columns:
        matrix = matrix.T
    matrix = matrix / (matrix.norm() + 1e-7)
    first, third, fifth = _NEWTON_SCHULZ
    square = matrix @ matrix.T
    powers = square.addmm(square, square, beta=third, alpha=fifth)
    factor = powers.clone()
    factor.diagonal().add_(first)
    for _ in range(STEPS - 1):
        half = square.addmm(square, powers, beta=first)
        square = half.addmm(powers, half, beta=first)
        powers = square.addmm(square, square, beta=third, alpha=fifth)
        factor = factor.addmm(powers, factor, beta=first)
    scale = RMS * math.sqrt(max(rows, columns))
    turned = torch.addmm(matrix, factor, matrix, beta=0, alpha=scale)
    if rows > columns:
        turned = turned.T
    return turned.reshape(direction.shape).contiguous()


def whole(value: Tensor) -> Tensor:
    """A tensor, whole also where its rows are on different ranks; then collective."""
    if not hasattr(value, "full_tensor"):
        return value
    gathered: Tensor = value.full_tensor()
    return gathered


def like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor distributed as `other` is; then collective."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: Tensor = distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return spread
