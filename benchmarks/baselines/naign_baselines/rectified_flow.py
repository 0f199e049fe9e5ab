"""A rectified flow (arXiv 2209.03003) on pixels, as network and objective.

    accelerate launch pipeline/train.py --config configs/mnist_flow.yaml

f(z) follows the velocity from the latent z (t = 0) to an image (t = 1) in `model.evaluations` evaluations, of which
`python -m naign_baselines.solver` gives a trained one another number. f is not meant for images: it does not repair.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.errors import InputError
from naign.model.losses import Batch, Network, ObjectiveConfig
from naign.model.networks import NetworkConfig
from naign.model.prior.velocity import SpatialVelocity
from naign.settings.constraints import between, one_of

SIDE = 8  # the U-Net halves to at most this side, where it attends


@dataclass(kw_only=True, slots=True)
class FlowNetworkConfig(NetworkConfig):
    name: str = "rectified_flow"
    patch: int = field(default=2, metadata=between(1, 64))
    """The U-Net works on squares of so many pixels a side, as channels: a quarter of the arithmetic at 2."""
    width: int = field(default=64, metadata=between(8, 2**13))
    """Channels at the first resolution; doubled at each of the first two halvings."""
    depth: int = field(default=2, metadata=between(1, 64))
    """Residual blocks a resolution, on each side of the U-Net."""
    evaluations: int = field(default=10, metadata=between(1, 10**4))
    """How often a sample evaluates the velocity."""
    solver: str = field(default="heun", metadata=one_of(("heun", "euler")))
    """heun: two evaluations a step, an odd last one is Euler's; euler: one evaluation a step."""

    only_with = "rectified_flow"


class RectifiedFlow(nn.Module):
    """The U-Net of the velocity, with GroupNorm, SiLU and attention at SIDE, and the solver that samples with it."""

    generates_only = True

    def __init__(self, config: FlowNetworkConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = shape
        self.channels = channels
        self.patch = config.patch
        inner = (
            channels * self.patch**2,
            height // self.patch,
            width // self.patch,
        )
        self.velocity = SpatialVelocity(inner, config.width, config.depth, smallest=SIDE)
        self.evaluations = config.evaluations
        self.solver = config.solver

    def forward(self, x: Tensor) -> Tensor:
        """f(x) for latents (n, C, H, W), clamped to [-1, 1].

        For training, (n, C + 1, H, W), whose last channel holds the time: the velocity (n, C, H, W) there.
        """
        if x.shape[1] > self.channels:
            time = x[:, -1, 0, 0]
            return self._velocity(x[:, :-1], time)
        heun = self.solver == "heun"
        steps = self.evaluations
        if heun:
            steps = math.ceil(self.evaluations / 2)
        for step in range(steps):
            slope = self._at(x, step / steps)
            last = step + 1 == steps and self.evaluations % 2
            if heun and not last:
                end = x + slope / steps
                slope = (slope + self._at(end, (step + 1) / steps)) / 2
            x = x + slope / steps
        return x.clamp(-1, 1)

    def _at(self, x: Tensor, time: float) -> Tensor:
        return self._velocity(x, x.new_full((x.shape[0],), time))

    def _velocity(self, x: Tensor, time: Tensor) -> Tensor:
        squares = F.pixel_unshuffle(x, self.patch)
        return F.pixel_shuffle(self.velocity(squares, time), self.patch)


def _build(
    config: FlowNetworkConfig,
    shape: tuple[int, ...],
    *,
    recompute: bool,
) -> nn.Module:
    if len(shape) != 3:
        raise InputError(f"model.name=rectified_flow takes images, the data has {shape}")
    if shape[1] % config.patch or shape[2] % config.patch:
        raise InputError(f"model.patch={config.patch} does not divide images of {shape}: set --model.patch=1")
    if recompute:
        raise InputError("model.name=rectified_flow keeps all activations: leave out train.recompute")
    return RectifiedFlow(config, shape)


NETWORK = (FlowNetworkConfig, _build)


@dataclass(kw_only=True, slots=True)
class FlowConfig(ObjectiveConfig):
    name: str = "rectified_flow"

    only_with = "rectified_flow"

    @property
    def needs_match(self) -> bool:
        return False


def rectified_flow(config: FlowConfig, network: Network, batch: Batch) -> dict[str, Tensor]:
    """Squared error of the velocity on straight paths from a latent to an image, at times of a logistic normal."""
    assert batch.latents is not None
    normals = batch.normals(0)[:, :1, :1, :1]
    time = normals.sigmoid()  # arXiv 2403.03206, as the flow of codes has it
    along = time * batch.images + (1 - time) * batch.latents
    times = time.expand_as(along[:, :1])
    velocity = network(torch.cat([along, times], dim=1))
    straight = batch.images - batch.latents
    error = (velocity - straight).square().mean()
    return {"total": error, "velocity": error}


FLOW = (FlowConfig, rectified_flow)
