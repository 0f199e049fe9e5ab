"""The current round: its images, its random numbers and its match."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import Config
from pipeline.data import damage
from pipeline.model.prior import Prior
from pipeline.training.state import PartialRound


@dataclass(slots=True)
class RoundRandom:
    """Random numbers of one round: each row is a function of (seed, round, its number), on any device."""

    config: Config
    round: int
    shape: tuple[int, ...]
    device: torch.device
    prior: Prior
    decode: Callable[[Tensor], Tensor] = lambda drawn: drawn  # by f, of codes, where the prior draws codes

    def latents(self, ids: Tensor) -> Tensor:
        """Latents (len(ids), *shape) from the prior."""
        drawn = self.prior.draw(self.config.seed, self.round, ids, self.device)
        return self.decode(drawn) if self.prior.decodes else drawn

    def damaged(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (n, *shape) with objective.damage applied; independent of the latents."""
        kind = damage.find_damage(self.config.objective.damage)
        key = self.config.seed, self.round, numbers, (kind.uniforms(self.shape),), self.device
        uniform = philox.uniform(*key, stream=philox.DAMAGE)
        return kind.damage(images, self.normals(numbers), uniform, self.config.objective.noise)

    def normals(self, numbers: Tensor, step: int = 0) -> Tensor:
        """Standard normals (len(numbers), *shape), other ones for each `step`; independent of the latents."""
        key = self.config.seed, self.round, numbers + step * 2**40, self.shape, self.device
        return philox.normal(*key, stream=philox.NOISE)


@dataclass(kw_only=True, slots=True)
class RoundState(PartialRound):
    """The current round on this rank: the match is that of `images`, and the sums include the number of `steps`."""

    number: int
    random: RoundRandom
    images: Tensor  # (n, *shape): this rank's share, or the whole round if it was started with another world size
    first: int = 0  # row of the round that images[0] is
