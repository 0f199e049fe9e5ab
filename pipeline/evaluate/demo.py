"""The computations of `naign demo`: damage, repair, nearest training images."""

import math
from collections.abc import Mapping

from torch import Tensor

from pipeline.data.degrade import KINDS, Kind, degrade
from pipeline.data.loader import read_split
from pipeline.evaluate.recorded import recorded
from pipeline.match import Blocks, search
from pipeline.model.naign import NAIGN
from pipeline.model.scale import scaled

NEAREST = 6  # training images that are shown
TRAINING = 10_000  # training images that are searched at most
TRAINING_BYTES = 2**28  # of them in memory at most


def damage(images: Tensor, strengths: Mapping[Kind, float], *, seed: int = 0) -> Tensor:
    """Images (n, C, H, W), each kind of damage applied at its strength, in the order of KINDS."""
    for kind in KINDS:
        images = degrade(images, kind, seed=seed, strength=strengths.get(kind, 0.0))
    return images


def repair(model: NAIGN, image: Tensor, *, times: int = 1) -> tuple[list[Tensor], list[float]]:
    """f(x), f(f(x)), ... of one image x (1, C, H, W), `times` of them, and the energies of x and of each."""
    chain = [image]
    for _ in range(times + 1):
        chain.append(model.project(chain[-1]))
    energies = [float((after - before).square().mean()) for before, after in zip(chain, chain[1:], strict=False)]
    return chain[1:-1], energies


def training_images(model: NAIGN, run: str, data: str | None = None) -> Tensor:
    """Training images of the run (n, C, H, W) uint8, limited by TRAINING and TRAINING_BYTES.

    Raises InputError or Unavailable where the data set cannot be read.
    """
    config, _, _ = recorded(model, run, data)
    images, _ = read_split(config, config.split, limit=min(TRAINING, max(1, TRAINING_BYTES // math.prod(model.shape))))
    return images


def nearest(training: Tensor, image: Tensor) -> tuple[Tensor, list[float]]:
    """The NEAREST training images (k, C, H, W) float32 of one image (1, C, H, W), and their L2 distances, ascending."""
    blocks = Blocks(rows=len(training), make=lambda low, high: scaled(training[low:high]).flatten(1))
    matched = search(image.flatten(1).float(), blocks, 0, neighbours=min(NEAREST, len(training)))
    return scaled(training[matched.ids[0]]), matched.distances[0].sqrt().tolist()
