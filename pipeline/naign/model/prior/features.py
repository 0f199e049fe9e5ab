"""Features of codes, which condition a flow where images have no labels (arXiv 2312.03701).

Patches of a spatial code are whitened, multiplied with prototypes of patches, rectified and averaged over quarters
(arXiv 2101.07528). What remains are the directions of most spread, of which a code's features are the angle alone.
Where images are mirrored at random, an image and its mirror image have the same features, the mean of both: samples are
then at less than two thirds of the distance (benchmarks/results/searches.md).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naign.errors import InputError
from naign.model.prior.base import Codes, Device, Shape, by_chance
from naign.philox import LEARN, normal

SIDE = 3  # positions of a patch
PROTOTYPES = 200
PATCHES = 60_000  # from which prototypes are learned, about
TURNS = 8  # of learning them
RIDGE = 0.1  # share of the mean variance that is added to each before patches are whitened
QUARTERS = 2  # averages per side
DIRECTIONS = 128  # of features, at most
MEASURED = 20_000  # codes whose directions are found, about
LEAST = 1000  # images, for these
BATCH = 500  # codes at once
KEPT = 2**15  # features of training images from which samples draw
TABLE = 2**31 - 1  # "round" of the noise of these


class Features(nn.Module):
    """Finds features (n, size) of whitened codes (n, d, ...), and keeps some of them. Its buffers are its state."""

    mean: Tensor  # (p,) of patches; empty for dense codes, which are features themselves
    filters: Tensor  # (p, PROTOTYPES): from patches, less their mean
    offset: Tensor  # (values,)
    directions: Tensor  # (values, size), of most spread
    table: Tensor  # (KEPT, size) float16: features of training images, with noise

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        patch = 0
        values = shape[0]
        self.side = 0
        if len(shape) > 1:
            self.side = min(SIDE, *shape[1:])
            patch = shape[0] * self.side**2
            values = 2 * PROTOTYPES * QUARTERS**2
        self.size = min(DIRECTIONS, values)
        self.register_buffer("mean", torch.zeros(patch))
        self.register_buffer("filters", torch.zeros(patch, PROTOTYPES))
        self.register_buffer("offset", torch.zeros(values))
        self.register_buffer("directions", torch.zeros(values, self.size))
        self.register_buffer("table", torch.zeros(KEPT, self.size, dtype=torch.float16))

    def forward(self, *views: Tensor) -> Tensor:
        """(n, d, ...) each -> (n, size), with a mean square of 1; the same in whichever order the views are."""
        directed = [(self._values(view) - self.offset) @ self.directions for view in views]
        return F.normalize(torch.stack(directed).sum(0)) * math.sqrt(self.size)

    def choose(self, seed: int, round: int, ids: Tensor, device: Device) -> Tensor:
        """Features (n, size) of training images, with noise, by (seed, round, id)."""
        drawn = by_chance(seed, round, ids, device)
        rows = (drawn * KEPT).long() % KEPT  # they may be 1
        return self.table[rows].float()

    def fit(
        self,
        views: Sequence[Tensor],  # whitened codes, and those of the mirrored images if they are mirrored at random
        codes: Codes,
        seed: int,
        deviation: float,  # of the noise of the table
    ) -> None:
        """Find the features of these codes, as rank 0 finds them. Collective; InputError if all codes are alike."""
        whitened = views[0]
        some = whitened[:: math.ceil(len(whitened) / MEASURED)]
        if self.side:
            self._learn_filters(some)
        values = self._values(some)
        self.offset.copy_(values.mean(0))
        centred = values - self.offset
        spread, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        largest = spread[-1]
        if not largest > 0:
            raise InputError("prior.features is set, but the codes of all images are the same: leave it out")
        scale = spread[-self.size :].clamp(min=1e-12 * largest) ** 0.25  # half whitened
        self.directions.copy_(directions[:, -self.size :] / scale)
        numbers = torch.arange(KEPT)
        rows = numbers * len(whitened) // KEPT
        noise = normal(
            seed,
            TABLE,
            numbers,
            (self.size,),
            whitened.device,
            stream=LEARN,
        )
        self.table.copy_(self(*[view[rows] for view in views]) + deviation * noise)
        for value in self.buffers():
            value.copy_(codes.of_first(value.float()))

    def _learn_filters(self, whitened: Tensor) -> None:
        """Learn prototypes of patches: directions of which each patch is near to one or to its opposite."""
        rows = whitened.shape[2] - self.side + 1
        columns = whitened.shape[3] - self.side + 1
        wanted = math.ceil(PATCHES / (rows * columns))
        some = whitened[:: math.ceil(len(whitened) / wanted)]
        patches = self._patches(some).flatten(0, 1)
        self.mean.copy_(patches.mean(0))
        centred = patches - self.mean
        spread, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        variances = spread.clamp(min=0) + RIDGE * spread.mean()
        deviations = variances.clamp(min=1e-30).sqrt()
        whiten = directions / deviations @ directions.T
        white = centred @ whiten
        every = len(white) // PROTOTYPES
        prototypes = F.normalize(white[::every][:PROTOTYPES])
        for _ in range(TURNS):
            along = white @ prototypes.T
            nearest = along.abs().argmax(1)
            signed = white * along.gather(1, nearest[:, None])
            summed = torch.zeros_like(prototypes).index_add_(0, nearest, signed)
            prototypes = F.normalize(summed)  # zeros, and so a feature of zeros, where no patch is near
        self.filters.copy_(whiten @ prototypes.T)

    def _patches(self, whitened: Tensor) -> Tensor:
        """(n, d, h, w) -> (n, positions, p)"""
        return F.unfold(whitened, self.side).transpose(1, 2)

    def _values(self, whitened: Tensor) -> Tensor:
        """(n, d, ...) -> (n, values)"""
        if not self.side:
            return whitened
        height = whitened.shape[2] - self.side + 1
        parts = []
        for part in whitened.split(BATCH):
            along = (self._patches(part) - self.mean) @ self.filters
            both = torch.cat([along.relu(), (-along).relu()], dim=2)
            maps = both.transpose(1, 2).unflatten(2, (height, -1))
            pooled = F.adaptive_avg_pool2d(maps, QUARTERS)
            parts.append(pooled.flatten(1))
        return torch.cat(parts)
