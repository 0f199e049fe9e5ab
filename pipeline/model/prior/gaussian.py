"""Standard normal latents."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.model.prior.base import Device, Prior, PriorConfig
from pipeline.philox import normal


@dataclass(kw_only=True, slots=True)
class GaussianConfig(PriorConfig):
    name: str = "gaussian"


class Gaussian(Prior):
    """N(0, I)."""

    arc = True

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        return normal(seed, round, ids, self.shape, device)
