"""Half standard normals, half flat images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.prior.base import Device, Prior, PriorConfig
from pipeline.philox import SCALE, normal, uniform


@dataclass(kw_only=True, slots=True)
class HalvesConfig(PriorConfig):
    name: str = "halves"


class Halves(Prior):
    """N(0, I) for odd ids; for even ids an offset U(-1, 1) a row plus a scale U(0, 1/2) times N(0, I).

    With flat latents in the pool f also learns to carry flat images to the data; a residual autoencoder leaves black
    where it is.
    """

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        noise = normal(seed, round, ids, self.shape, device)
        rows = (len(ids),) + (1,) * len(self.shape)
        offset, scale = uniform(seed, round, ids, (2,), device, stream=SCALE).unbind(1)
        flat = (2 * offset - 1).view(rows) + (scale / 2).view(rows) * noise
        return torch.where((ids.to(noise.device) % 2 == 0).view(rows), flat, noise)
