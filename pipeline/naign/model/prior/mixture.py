"""A Gaussian mixture of the codes of the data (arXiv 1903.12436), fitted by expectation maximisation.

Codes are whitened on their principal directions first, at most DIRECTIONS of them; the others stay at the mean. Of
several k-means starts on some of the codes, the one under which held-out codes are most likely is fitted to all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from naign.data.mixing import shares as share_out
from naign.errors import InputError, require
from naign.model.prior.base import KEPT, Codes, CodesConfig, CodesPrior, Device, Shape
from naign.philox import SCALE, normal, uniform
from naign.settings.constraints import between

DIRECTIONS = 64  # principal directions of the codes that the mixture models, at most
LARGEST = 2**26  # values of all covariances, at most
FEW = 20  # codes a component, at least
STARTS = 3
STARTED = 20_000  # codes that starts are compared on, at most
HELD_OUT = 10  # of these, one in so many is held out
TRIED = 6  # iterations of each start
ITERATIONS = 15  # of the best one, on all codes
CLUSTERED = 10  # iterations of k-means
SHRINKAGE = 0.5  # weight of the mean covariance in that of each component, in codes a direction
FLOOR = 1e-3  # added to each variance; that of all codes is 1
BLOCK = 4096  # codes whose densities are computed at once


@dataclass(kw_only=True, slots=True)
class MixtureConfig(CodesConfig):
    name: str = "gmm"
    components: int = field(default=100, metadata=between(1, 10**4))
    """Gaussians of the mixture."""

    def check_codes(self, count: int, shape: Shape) -> None:
        least = self.components * FEW
        few = f"prior.components={self.components} with prior.images={count}: fewer than {FEW} codes a component"
        require((least <= count, f"{few}: ask for fewer components, or for {least} images"))
        values = math.prod(shape)
        many = f"prior.images={count} with codes of {values} values: over {KEPT} values in all"
        require((count * values <= KEPT, f"{many}: fit the mixture to fewer images, or choose a flow"))
        directions = min(DIRECTIONS, math.prod(shape))
        if self.components * math.prod(shape) * directions > LARGEST:
            large = f"prior.components={self.components} with codes of {math.prod(shape)} values"
            raise InputError(f"{large}: over {LARGEST} values in covariances: ask for fewer components")


@dataclass(slots=True)
class Gaussians:
    """Components in whitened directions, float64."""

    weights: Tensor  # (k,)
    means: Tensor  # (k, d)
    factors: Tensor  # (k, d, d), lower triangular: covariances are factor @ factor.T


class Mixture(CodesPrior):
    """The mixture. With classes each component is of one class: those of a class are the mixture of its codes."""

    config: MixtureConfig
    weights: Tensor  # (k,)
    means: Tensor  # (k, values)
    factors: Tensor  # (k, values, d): covariances are factor @ factor.T
    owners: Tensor  # (k,) int64, with classes: the class of each component

    def __init__(self, config: MixtureConfig, shape: Shape, *, seed: int = 0, labels: Sequence[str] = ()) -> None:
        super().__init__(config, shape, seed=seed, labels=labels)
        number = config.components
        values = math.prod(shape)
        few = f"prior.components={number} for {len(labels)} classes: each needs at least one"
        require((number >= len(labels), few))
        self.iteration = 0  # made of ITERATIONS
        self.likelihood = 0.0  # in nats per code, before the newest iteration
        self.register_buffer("weights", torch.zeros(number))
        self.register_buffer("means", torch.zeros(number, values))
        self.register_buffer("factors", torch.zeros(number, values, min(DIRECTIONS, values)))
        if labels:
            self.register_buffer("owners", torch.zeros(number, dtype=torch.int64))

    def draw(self, seed: int, round: int, ids: Tensor, device: Device, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = self.choose(seed, round, ids, device)
        which = uniform(seed, round, ids, (1,), device, stream=SCALE).contiguous()
        if labels is None:
            chosen = torch.searchsorted(self.weights.cumsum(0), which.flatten())
        else:
            weights = self.weights.clamp(min=1e-30).where(self.owners == labels[:, None], 0)
            sums = weights.cumsum(1)
            chosen = torch.searchsorted(sums / sums[:, -1:], which).flatten()
        chosen = chosen.clamp(max=len(self.weights) - 1)
        noise = normal(seed, round, ids, (self.factors.shape[2],), device)
        drawn = self.means[chosen] + torch.einsum("nij,nj->ni", self.factors[chosen], noise)
        return drawn.view(-1, *self.shape)

    @torch.no_grad()
    def fit(self, codes: Codes) -> Iterator[float]:
        """Fit by ITERATIONS of expectation maximisation; the metric prior/likelihood is in nats per code."""
        chunk, labels = codes.read(0)
        rows = chunk.flatten(1).float()
        self.count_classes(labels)
        space = Whitening(rows)
        white = space.inward(rows)
        if self.iteration == 0:
            self._keep(self._start(white, labels, codes), space)
        mine = codes.part(white)
        owned = None if labels is None or not self.labels else codes.part(labels)
        while self.iteration < ITERATIONS:
            gaussians = self._kept(space)
            counts, sums, outers, likelihood = self._expect(mine, owned, gaussians)
            parts = (counts, sums, outers, likelihood.view(1))
            total = codes.add(torch.cat([part.flatten() for part in parts]))
            sizes = [part.numel() for part in parts]
            counts, sums, outers, likelihood = (
                part.view_as(like) for part, like in zip(total.split(sizes), parts, strict=True)
            )
            self._keep(_maximise(counts, sums, outers), space)
            self.iteration += 1
            self.likelihood = float(likelihood) / len(rows)
            yield self.iteration / ITERATIONS

    def _start(self, white: Tensor, labels: Tensor | None, codes: Codes) -> Gaussians:
        """The best of STARTS mixtures of some codes, each after TRIED iterations; rank 0's on every rank."""
        chosen = _some(len(white), STARTED, self.seed)
        held = chosen[::HELD_OUT]
        tried = chosen[torch.arange(len(chosen)) % HELD_OUT != 0]
        if len(tried) < FEW * self.config.components:  # few codes: none can be spared
            tried = chosen
        owned = labels if self.labels else None
        best = None
        highest = -math.inf
        for start in range(STARTS):
            gaussians = self._cluster(white[tried], None if owned is None else owned[tried], self.seed + start)
            for _ in range(TRIED):
                counts, sums, outers, _ = self._expect(white[tried], None if owned is None else owned[tried], gaussians)
                gaussians = _maximise(counts, sums, outers)
            *_, likelihood = self._expect(white[held], None if owned is None else owned[held], gaussians)
            if best is None or float(likelihood) > highest:
                best = gaussians
                highest = float(likelihood)
        assert best is not None
        if codes.rank:  # other machines may round, and so cluster, otherwise
            best = Gaussians(*(torch.zeros_like(part) for part in (best.weights, best.means, best.factors)))
        return Gaussians(codes.add(best.weights), codes.add(best.means), codes.add(best.factors))

    def _cluster(self, rows: Tensor, labels: Tensor | None, seed: int) -> Gaussians:
        """A mixture of the clusters that k-means finds; with classes, those of each class share its components."""
        number = self.config.components
        if labels is None:
            which = k_means(rows, number, seed)
        else:
            counts = torch.bincount(labels, minlength=len(self.labels)).tolist()
            each = [1 + more for more in share_out(counts, number - len(counts))]
            self.owners.copy_(torch.arange(len(each)).repeat_interleave(torch.tensor(each)))
            which = torch.empty_like(labels)
            first = 0
            for label, size in enumerate(each):
                of_class = labels == label
                if bool(of_class.any()):
                    which[of_class] = first + k_means(rows[of_class], size, seed)
                first += size
        shares = torch.nn.functional.one_hot(which, number).double()
        values = rows.double()
        outers = torch.stack([(values * share[:, None]).T @ values for share in shares.T])
        return _maximise(shares.sum(0), shares.T @ values, outers)

    def _expect(
        self,
        rows: Tensor,  # (n, d) float32, whitened
        labels: Tensor | None,  # (n,) int64: rows count in components of their class alone
        gaussians: Gaussians,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Expected counts (k,), sums (k, d) and outer products (k, d, d) of each component, and the log-likelihood."""
        number, directions = gaussians.means.shape
        pairs = torch.triu_indices(directions, directions, device=rows.device)
        density = _log_density(gaussians, pairs).float()
        moments = rows.new_zeros(density.shape, dtype=torch.float64)
        likelihood = rows.new_zeros((), dtype=torch.float64)
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            products = block[:, pairs[0]] * block[:, pairs[1]]
            features = torch.cat([products, block, torch.ones_like(block[:, :1])], dim=1)
            logarithms = features @ density
            if labels is not None:
                may_be = self.owners == labels[first : first + BLOCK, None]
                logarithms = logarithms.where(may_be, -math.inf)
            sums_of_rows = logarithms.logsumexp(1)
            likelihood += sums_of_rows.double().sum()
            shares = (logarithms - sums_of_rows[:, None]).exp()
            moments += (features.T @ shares).double()
        products, sums, counts = moments.split([pairs.shape[1], directions, 1])
        outers = moments.new_zeros(number, directions, directions)
        outers[:, pairs[0], pairs[1]] = products.T
        outers[:, pairs[1], pairs[0]] = products.T
        return counts.flatten(), sums.T, outers, likelihood

    def _keep(self, gaussians: Gaussians, space: "Whitening") -> None:
        """Set the state, in the directions of codes."""
        self.weights.copy_(gaussians.weights)
        self.means.copy_(space.outward(gaussians.means))
        factors = torch.zeros_like(self.factors)
        directions = gaussians.means.shape[1]
        factors[:, :, :directions] = (space.back.T @ gaussians.factors).to(factors)
        self.factors.copy_(factors)

    def _kept(self, space: "Whitening") -> Gaussians:
        """The state, in whitened directions."""
        directions = len(space.back)
        factors = space.forth.T @ self.factors.double()[:, :, :directions]
        means = (self.means.double() - space.mean) @ space.forth
        covariances = factors @ factors.transpose(1, 2)
        return Gaussians(self.weights.double(), means, torch.linalg.cholesky(covariances))

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load a mixture of any number of directions."""
        if "factors" in state:
            sizes = (*self.means.shape, *state["factors"].shape[-1:])
            self.factors = torch.empty(sizes, device=self.factors.device)
        return super().load_state_dict(state, strict, assign)

    def read_metrics(self) -> dict[str, float]:
        return {"prior/likelihood": self.likelihood}

    def training_state(self) -> dict[str, Tensor]:
        return self.state_dict() | {"progress": torch.tensor([self.iteration])}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        self.iteration = int(state["progress"])


class Whitening:
    """The principal directions of rows (n, values), at most DIRECTIONS, in which their covariance is the identity."""

    def __init__(self, rows: Tensor) -> None:
        """Raises InputError for rows that are all the same."""
        values = rows.double()
        self.mean = values.mean(0)
        spread, directions = torch.linalg.eigh((values - self.mean).T @ (values - self.mean) / len(rows))
        kept = min(DIRECTIONS, int((spread > 1e-12 * spread[-1].clamp(min=1e-30)).sum()))
        if float(spread[-1]) <= 0:
            raise InputError("the codes of all images are the same: there is nothing to fit a mixture to")
        deviations = spread[-kept:].sqrt()
        self.forth = directions[:, -kept:] / deviations  # (values, d)
        self.back = (directions[:, -kept:] * deviations).T  # (d, values)

    def inward(self, rows: Tensor) -> Tensor:
        """Codes (n, values) to whitened ones (n, d), float32."""
        return ((rows.double() - self.mean) @ self.forth).float()

    def outward(self, means: Tensor) -> Tensor:
        """Whitened points (k, d) to codes (k, values), float64."""
        return means @ self.back + self.mean


def _log_density(gaussians: Gaussians, pairs: Tensor) -> Tensor:
    """The coefficients (pairs + d + 1, k) of each weighted component's log-density in the products of two directions,
    the directions and 1: both steps of an iteration are one matrix product each.
    """
    directions = gaussians.means.shape[1]
    inverse = torch.linalg.inv(gaussians.factors)
    precision = inverse.transpose(1, 2) @ inverse
    pulled = torch.einsum("kij,kj->ki", precision, gaussians.means)
    square = (pulled * gaussians.means).sum(1)
    twice = torch.where(pairs[0] == pairs[1], 1.0, 2.0)  # a pair stands for both of its orders
    sizes = gaussians.factors.diagonal(dim1=1, dim2=2).log().sum(1)
    scale = gaussians.weights.clamp(min=1e-30).log() - sizes - directions / 2 * math.log(2 * math.pi)
    quadratic = -precision[:, pairs[0], pairs[1]] * twice / 2
    return torch.cat([quadratic, pulled, (scale - square / 2)[:, None]], dim=1).T


def _maximise(counts: Tensor, sums: Tensor, outers: Tensor) -> Gaussians:
    """The components of expected counts, sums and outer products; each covariance is drawn to the mean of all."""
    some = counts.clamp(min=1e-12)
    means = sums / some[:, None]
    weights = counts / counts.sum()
    covariances = outers / some[:, None, None] - torch.einsum("ki,kj->kij", means, means)
    within = torch.einsum("k,kij->ij", weights, covariances)
    shrinkage = SHRINKAGE * sums.shape[1]
    drawn = shrinkage / (some + shrinkage)
    covariances = torch.lerp(covariances, within.expand_as(covariances), drawn[:, None, None])
    covariances.diagonal(dim1=1, dim2=2).add_(FLOOR)
    return Gaussians(weights, means, torch.linalg.cholesky(covariances))


def k_means(rows: Tensor, number: int, seed: int) -> Tensor:
    """The cluster (n,) int64 of each row (n, d), of at most `number`: k-means++ (Arthur and Vassilvitskii, 2007)."""
    random = np.random.RandomState(seed % 2**32)
    centers = rows[random.randint(len(rows))][None]
    nearest = (rows - centers[0]).square().sum(1)
    while len(centers) < min(number, len(rows)):
        sums = nearest.double().cumsum(0)
        drawn = random.random_sample() * float(sums[-1])
        chosen = min(int(torch.searchsorted(sums, drawn)), len(rows) - 1)
        centers = torch.cat([centers, rows[chosen][None]])
        nearest = torch.minimum(nearest, (rows - rows[chosen]).square().sum(1))
    for _ in range(CLUSTERED):
        which = torch.cdist(rows, centers).argmin(1)
        counts = torch.bincount(which, minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, which, rows)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
    return torch.cdist(rows, centers).argmin(1)


def _some(count: int, most: int, seed: int) -> Tensor:
    """Numbers of at most `most` of `count` rows, in order, drawn at random."""
    chosen = np.random.RandomState(seed % 2**32).permutation(count)[:most]
    return torch.from_numpy(np.sort(chosen))
