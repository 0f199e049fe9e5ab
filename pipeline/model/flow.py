"""A rectified flow (arXiv 2209.03003) from noise to the codes of f, small beside f.

Codes are (n, c), of a network with a dense code, or (n, c, h, w), of one with a spatial code. They are whitened over
their c channels first, so that no direction is lost in the noise, but for those of little spread, which stay small; and
of many channels only the directions of most spread are modelled: the others stay at their mean.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.networks import Attention, norm

RIDGE = 0.3  # of the mean variance, added to each: whitened fully, directions of little spread cost the others' law
MOST_STEPS = 10**4
_WAVES = 32  # sines, and as many cosines, of the time


class DenseVelocity(nn.Module):
    """A residual perceptron on (n, c)."""

    def __init__(self, shape: tuple[int, ...], width: int, depth: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(shape[0] + 2 * _WAVES, width), nn.Linear(width, shape[0])
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        still(self.outer)

    def forward(self, codes: Tensor, time: Tensor) -> Tensor:
        hidden = self.inner(torch.cat([codes, waves(time)], dim=1))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        velocity: Tensor = self.outer(self.norm(hidden))
        return velocity


class TimedBlock(nn.Module):
    """A pre-activation residual block that also sees the time, and from which attention follows where it is asked."""

    def __init__(self, before: int, after: int, timed: int, *, attends: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.time = nn.Linear(timed, after)
        self.second = nn.Sequential(norm(after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.attention = Attention(after) if attends else nn.Identity()
        nn.init.zeros_(self.second[-1].weight)  # type: ignore[arg-type]  # each block starts as its skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(time)[:, :, None, None]
        out: Tensor = self.attention(self.skip(x) + self.second(hidden))
        return out


class SpatialVelocity(nn.Module):
    """A U-Net on (n, c, h, w) that halves h to at most `smallest`; `depth` blocks a resolution on each side."""

    def __init__(self, shape: tuple[int, ...], width: int, depth: int, *, smallest: int = 2) -> None:
        super().__init__()
        halvings = max(1, math.ceil(math.log2(max(shape[1:]) / smallest)))
        self.multiple = 2**halvings  # of the sides it works on
        widths, timed = [width * min(2**level, 4) for level in range(halvings + 1)], 4 * width
        self.time = nn.Sequential(nn.Linear(2 * _WAVES, timed), nn.SiLU(), nn.Linear(timed, timed), nn.SiLU())
        self.inner = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            attends = max(shape[1:]) <= 4 * 2**level  # at 8 x 8 it costs a fifth of the time, for nothing measured
            side = [TimedBlock(channels, channels, timed, attends=attends) for _ in range(depth)]
            self.down.append(nn.ModuleList(side))
            if level < halvings:
                self.shrink.append(nn.Conv2d(channels, widths[level + 1], 2, stride=2))
                self.enlarge.append(nn.Conv2d(widths[level + 1], 4 * channels, 1))
                back = [TimedBlock(2 * channels, channels, timed, attends=attends)]
                back += [TimedBlock(channels, channels, timed, attends=attends) for _ in range(depth - 1)]
                self.up.append(nn.ModuleList(back))
        self.outer = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, shape[0], 3, padding=1))
        still(self.outer[-1])

    def forward(self, codes: Tensor, time: Tensor) -> Tensor:
        height, width = codes.shape[2:]
        hidden, seen = F.pad(codes, (0, -width % self.multiple, 0, -height % self.multiple)), self.time(waves(time))
        hidden, skips = self.inner(hidden), list[Tensor]()
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(hidden)
                hidden = self.shrink[level - 1](hidden)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, seen)
        for enlarge, blocks in zip(reversed(self.enlarge), reversed(self.up), strict=True):
            hidden = torch.cat([F.pixel_shuffle(enlarge(hidden), 2), skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, seen)
        velocity: Tensor = self.outer(hidden)[:, :, :height, :width]
        return velocity


class CodeFlow(nn.Module):
    """The velocity of whitened codes on straight paths from noise (t = 0) to the data (t = 1).

    Whitened codes, and noise, are (n, d, ...), of at most `directions` channels.
    """

    mean: Tensor  # (c,) of the channels, over positions
    covariance: Tensor  # (c, c)
    inward: Tensor  # (d, c): from codes, less their mean, to whitened ones
    outward: Tensor  # (c, d), and back
    shape: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, ...], width: int, depth: int, steps: int, directions: int = 2**13) -> None:
        super().__init__()
        channels, number = shape[0], min(directions, shape[0])
        self.velocity = (DenseVelocity if len(shape) == 1 else SpatialVelocity)((number, *shape[1:]), width, depth)
        for name, value in (
            ("mean", torch.zeros(channels)),
            ("covariance", torch.eye(channels)),
            ("inward", torch.eye(number, channels)),
            ("outward", torch.eye(channels, number)),
            ("shape", torch.tensor(shape)),
            ("steps", torch.tensor(steps)),
        ):
            self.register_buffer(name, value)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "CodeFlow":
        """The flow of that state. Raises KeyError, ValueError or RuntimeError for what is none."""
        shape, dense = tuple(state["shape"].tolist()), "velocity.norm.weight" in state
        blocks = "velocity.layers." if dense else "velocity.down.0."
        depth = len({name.split(".")[blocks.count(".")] for name in state if name.startswith(blocks)})
        width, directions = len(state["velocity.inner.weight"]), len(state["inward"])
        if not 1 <= (steps := int(state["steps"])) <= MOST_STEPS:
            raise ValueError(f"{steps} steps from noise to a code")
        with torch.device("meta"):
            flow = cls(shape, width, depth, steps, directions)
        flow.load_state_dict(state, assign=True)
        return flow.requires_grad_(False)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of one code's noise."""
        return (len(self.inward), *self.shape.tolist()[1:])

    def forward(self, codes: Tensor, time: Tensor) -> Tensor:
        """Velocity (n, d, ...) at whitened codes (n, d, ...) and times (n,)."""
        velocity: Tensor = self.velocity(codes, time)
        return velocity

    def follow(self, mean: Tensor, covariance: Tensor, keep: float) -> None:
        """Move the mean and the covariance towards these by the share `keep`, and whiten by them.

        Of all whitening matrices it takes the one that changes whitened codes least, since the velocity goes on
        learning.
        """
        self.mean.lerp_(mean, keep)
        self.covariance.lerp_(covariance, keep)
        values, directions = torch.linalg.eigh(self.covariance.double())
        directions = directions[:, -len(self.inward) :]
        spread = (values[-len(self.inward) :].clamp(min=0) + RIDGE * values.mean()).clamp(min=1e-30).sqrt()
        left, _, right = torch.linalg.svd(self.inward.double() @ (directions * spread))
        turn = left @ right
        self.inward.copy_(turn @ (directions / spread).T)
        self.outward.copy_((directions * spread) @ turn.T)

    def whiten(self, codes: Tensor) -> Tensor:
        """(n, c, ...) -> (n, d, ...)"""
        return torch.einsum("ij,nj...->ni...", self.inward, codes - _rows(self.mean, codes))

    def draw(self, noise: Tensor) -> Tensor:
        """The codes (n, c, ...) at the ends of the paths that begin at standard normals (n, d, ...).

        Before the flow has learned, paths stand still, and cost nothing.
        """
        moves = any(bool(value.any()) for value in self.velocity.outer.parameters())
        codes, times = noise, torch.linspace(0, 1, int(self.steps) + 1 if moves else 1).tolist()
        for now, then in zip(times, times[1:], strict=False):  # Heun's method; the last step is Euler's
            step, velocity = then - now, self(codes, noise.new_full((len(noise),), now))
            if then < 1:
                ahead = self(codes + step * velocity, noise.new_full((len(noise),), then))
                velocity = (velocity + ahead) / 2
            codes = codes + step * velocity
        return torch.einsum("ij,nj...->ni...", self.outward, codes) + _rows(self.mean, codes)


def still(layer: nn.Module) -> None:
    """A velocity of zero at first: noise is a whitened code, of a Gaussian."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def waves(time: Tensor) -> Tensor:
    """(n,) -> (n, 2 * _WAVES): sines and cosines of multiples of a quarter turn."""
    angles = time[:, None] * torch.arange(1, _WAVES + 1, device=time.device) * (torch.pi / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _rows(mean: Tensor, codes: Tensor) -> Tensor:
    return mean.view(1, -1, *(1,) * (codes.ndim - 2))
