"""IGN's prior (arXiv 2311.01462): noise with the spectrum of the data."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from naign.model.prior.base import Device, Examples, Prior, PriorConfig, Shape
from naign.philox import IMAGINARY, normal


@dataclass(kw_only=True, slots=True)
class FourierConfig(PriorConfig):
    name: str = "fourier"


class Fourier(Prior):
    """Each frequency is normal with the data's mean and variance there, as measured on the first round."""

    learns = True
    spectrum: Tensor  # (2, 2, *shape): mean and deviation, each of the real and the imaginary part

    def __init__(self, config: FourierConfig, shape: Shape, *, seed: int = 0) -> None:
        super().__init__(config, shape, seed=seed)
        self.register_buffer("spectrum", torch.zeros(2, 2, *shape))

    def draw(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        real = normal(seed, round, ids, self.shape, device)
        mean, deviation = self.spectrum
        imaginary = normal(seed, round, ids, self.shape, device, stream=IMAGINARY)
        waves = torch.complex(mean[0] + deviation[0] * real, mean[1] + deviation[1] * imaginary)
        field: Tensor = torch.fft.ifft2(waves) if len(self.shape) == 3 else torch.fft.ifft(waves)
        return field.real

    def learn(self, examples: Examples) -> Iterator[float]:
        if examples.round:
            return
        images = examples.images
        waves = torch.fft.fft2(images) if images.ndim == 4 else torch.fft.fft(images)
        parts = torch.stack([waves.real, waves.imag], dim=1).double()
        moments = torch.stack([parts.mean(0), parts.square().mean(0)])
        mean, square = examples.add(moments) / examples.world
        self.spectrum.copy_(torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]))
        yield from ()


PRIOR = (FourierConfig, Fourier)
