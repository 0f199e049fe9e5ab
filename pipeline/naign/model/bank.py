"""A bank of the codes of training images, which tells images that are unlike them from the data.

The energy misses images that consist of the data's parts, since f keeps them: MNIST's digits for a model of clothes.
Their codes are far from those of all training images. On photographs it is the other way round (docs/evaluation.md).
So an image has the larger of two ranks among training images, that of its energy and that of the distance of its code.
Which counts more is found by training images that are made unlike the data: a patch of another one, or upside down.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from naign.match.exchange import Ranks
from naign.match.index import search

VALUES = 2**23  # of the codes in a bank, at most: 8 MB
CODES = 2**16  # in a bank, at most
REFERENCES = 2048  # training images whose energies and distances are kept
WEIGHTS = [2.0**power for power in range(-5, 6)]
SIDE = 3  # a pasted patch has a third of an image's sides


class Scores(NamedTuple):
    """How unlike the data some images are, (n,) each. A rank is the share of training images with less."""

    energy: Tensor
    energy_rank: Tensor
    distance: Tensor
    """From the direction of an image's code to the nearest one of the bank, L2."""
    distance_rank: Tensor
    rank: Tensor
    """Of both together: images beyond 0.95 are as one training image in twenty."""


class Bank(nn.Module):
    """Directions of codes, and what energies and distances training images have. Empty until it is filled."""

    codes: Tensor  # (n, values) int8: directions, each times what makes its largest value 127
    energies: Tensor  # (r,) float32: of the references
    distances: Tensor  # (r,) float32: from each reference to the nearest other code of the bank
    weight: Tensor  # () float32: how many times as rare an energy must be as a distance to count as much

    def __init__(self, codes: int = 0, references: int = 0, *, values: int = 0) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(codes, values, dtype=torch.int8))
        self.register_buffer("energies", torch.zeros(references))
        self.register_buffer("distances", torch.zeros(references))
        self.register_buffer("weight", torch.ones(()))

    @property
    def filled(self) -> bool:
        return len(self.energies) > 0

    def check(self) -> None:
        """Raises ValueError for what no training fills a bank with."""
        kinds = [tensor.dtype for tensor in self.state_dict().values()]
        sound = kinds == [torch.int8, torch.float32, torch.float32, torch.float32]
        if not sound or 0 in self.sizes or self.weight not in WEIGHTS:
            raise ValueError("its bank is damaged")

    @property
    def sizes(self) -> list[int]:
        """Codes and references."""
        return [len(self.codes), len(self.energies)]

    def distance(self, codes: Tensor) -> Tensor:
        """(n, ...) float32 -> (n,): from the direction of each code to the nearest one of the bank."""
        found = search(unit(rounded(codes)), unit(self.codes), 0, group=Ranks())  # of this process alone
        return found.distances[:, 0].sqrt().float()

    def score(self, energy: Tensor, distance: Tensor) -> Scores:
        """The scores of images with these energies and distances (n,)."""
        energy_rank = _rank(energy, self.energies)
        distance_rank = _rank(distance, self.distances)
        references = self._larger(_rank(self.energies, self.energies), _rank(self.distances, self.distances))
        return Scores(
            energy=energy,
            energy_rank=energy_rank,
            distance=distance,
            distance_rank=distance_rank,
            rank=_rank(self._larger(energy_rank, distance_rank), references),
        )

    def weigh(self, energy: Tensor, distance: Tensor) -> None:
        """Choose the weight by which images that are unlike the data, with these energies and distances (n,), have the
        highest ranks.
        """
        found = []
        for weight in WEIGHTS:
            self.weight.fill_(weight)
            found.append(float(self.score(energy, distance).rank.mean()))
        self.weight.fill_(WEIGHTS[found.index(max(found))])

    def _larger(self, energy_rank: Tensor, distance_rank: Tensor) -> Tensor:
        weight = self.weight.to(energy_rank)
        energy = 1 - (1 - energy_rank) * weight.clamp(min=1)
        distance = 1 - (1 - distance_rank) / weight.clamp(max=1)
        return torch.maximum(energy, distance)


def rounded(codes: Tensor) -> Tensor:
    """Codes (n, ...) float32 as a bank keeps their directions, (n, values) int8."""
    rows = codes.flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (rows * (127 / largest)).round().to(torch.int8)


def unit(codes: Tensor) -> Tensor:
    """Rounded codes (n, values) as rows of length one, float32."""
    return nn.functional.normalize(codes.float())


def disturbed(images: Tensor) -> Tensor:
    """Images (n, C, H, W), every second one upside down, the others with a patch of the one before, at a random place
    that is always the same.
    """
    generator = torch.Generator().manual_seed(0)
    inside = images.new_ones((), dtype=torch.bool)
    for axis in (2, 3):
        size = images.shape[axis]
        length = max(1, size // SIDE)
        first = torch.randint(size - length + 1, (len(images), 1, 1, 1), generator=generator).to(images.device)
        places = torch.arange(size, device=images.device).view((size, 1) if axis == 2 else (1, size))
        inside = inside & (places >= first) & (places < first + length)
    made = torch.where(inside, images.roll(1, 0), images)
    made[1::2] = images[1::2].flip(2, 3)
    return made


def _rank(values: Tensor, references: Tensor) -> Tensor:
    """The share of the references (r,) that are less than each value (n,)."""
    ordered = references.sort().values
    below = torch.searchsorted(ordered, values.to(ordered).contiguous())
    return below.to(values.device) / max(1, len(ordered))
