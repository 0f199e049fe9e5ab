"""A Gaussian mixture of the codes of the data (arXiv 1903.12436), fitted by expectation maximisation.

Codes are whitened on their principal directions first, at most DIRECTIONS of them; the others stay at the mean. The fit
begins at clusters of some of the codes, by k-means.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from naign.data.order import shares as share_out
from naign.errors import InputError, require
from naign.model.prior.base import KEPT, Codes, CodesConfig, CodesPrior, Device, Shape, labels_of
from naign.philox import SCALE, normal, uniform
from naign.settings.constraints import between

DIRECTIONS = 96  # principal directions of the codes that the mixture models, at most
LARGEST = 2**27  # values of the covariance of all codes, at most
FEW = 20  # codes a component, at least
STARTED = 20_000  # codes that are clustered, about
CLUSTERED = 10  # iterations of k-means
SPREAD = 0.7  # deviation of the first Gaussians; that of all codes is 1
ITERATIONS = 20  # of expectation maximisation, on all codes
SHRINKAGE = 0.5  # weight of the mean covariance in that of each component, in codes a direction
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: its multiples fill a circle of 2**32 most evenly
FLOOR = 1e-3  # added to each variance; that of all codes is 1
BLOCK = 1024  # codes whose densities are computed at once
TINY = 1e-30  # shares of a code below it are zero: products of denormal numbers take a hundred times as long


@dataclass(kw_only=True, slots=True)
class MixtureConfig(CodesConfig):
    name: str = "gmm"
    components: int = field(default=200, metadata=between(1, 10**4))
    """Gaussians of the mixture."""

    def check_codes(self, count: int, shape: Shape) -> None:
        least = self.components * FEW
        few = f"prior.components={self.components} with prior.images={count}: fewer than {FEW} codes a component"
        values = math.prod(shape)
        many = f"prior.images={count} with codes of {values} values: over {KEPT} values in all"
        large = f"codes of {values} values: over {LARGEST} values in their covariance"
        require(
            (least <= count, f"{few}: ask for fewer components, or for {least} images, if there are as many"),
            (count * values <= KEPT, f"{many}: fit the mixture to fewer images, or choose a flow"),
            (values**2 <= LARGEST, f"{large}: ask for a smaller code, or choose a flow"),
        )


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
    means: Tensor  # (k, d), of whitened directions
    factors: Tensor  # (k, d, d): covariances are factor @ factor.T
    back: Tensor  # (d, values): carries whitened directions to codes, around `mean`
    mean: Tensor  # (values,)
    owners: Tensor  # (k,) int64, with classes: the class of each component

    def __init__(
        self,
        config: MixtureConfig,
        shape: Shape,
        **options: Any,  # seed and labels
    ) -> None:
        super().__init__(config, shape, **options)
        number = config.components
        values = math.prod(shape)
        classes = len(self.labels)
        require((number >= classes, f"prior.components={number} for {classes} classes: each needs at least one"))
        self.likelihood = 0.0  # in nats per code, before the newest iteration
        directions = min(DIRECTIONS, values)
        self.register_buffer("weights", torch.zeros(number))
        self.register_buffer("means", torch.zeros(number, directions))
        self.register_buffer("factors", torch.zeros(number, directions, directions))
        self.register_buffer("back", torch.zeros(directions, values))
        self.register_buffer("mean", torch.zeros(values))
        if classes:
            self.register_buffer("owners", torch.zeros(number, dtype=torch.int64))

    def draw(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
        labels: Tensor | None = None,
    ) -> Tensor:
        if labels is None:
            labels = self.choose(seed, round, ids, device)
        which = self._spread(seed, round, ids, device)
        weights = self.weights.double().expand(len(ids), -1)
        if labels is not None:
            weights = weights.clamp(min=1e-30).where(self.owners == labels[:, None], 0)
        sums = weights.cumsum(1)
        chosen = torch.searchsorted(sums / sums[:, -1:], which).flatten()
        chosen = chosen.clamp(max=len(self.weights) - 1)
        noise = normal(
            seed,
            round,
            ids,
            (self.means.shape[1],),
            device,
        )
        white = self.means[chosen] + torch.einsum("nij,nj->ni", self.factors[chosen], noise)
        drawn: Tensor = white @ self.back + self.mean
        return drawn.view(-1, *self.shape)

    def _spread(
        self,
        seed: int,
        round: int,
        ids: Tensor,
        device: Device,
    ) -> Tensor:
        """(n, 1) float64 in [0, 1): uniform for each id, and evenly spread over any ids in a row, so that these have
        each component as often as its weight says. Chosen apart, the distance of 10,000 samples varies by a seventh.
        """
        first = uniform(
            seed,
            round,
            torch.zeros_like(ids[:1]),
            (1,),
            device,
            stream=SCALE,
        )
        turned = (ids.to(device) * GOLDEN) % 2**32
        return (first.double() + turned[:, None].double() / 2**32) % 1

    @torch.no_grad()
    def fit(self, codes: Codes) -> Iterator[float]:
        """Fit by ITERATIONS of expectation maximisation; the metric prior/likelihood is in nats per code.

        A fit that was stopped begins again: it takes a minute.
        """
        (chunk, *_), labels = codes.read(0)
        rows = chunk.flatten(1)
        self.count_classes(labels)
        white, back, mean = _whitened(rows, codes.of_first)
        found = white.shape[1]
        self.back.zero_()
        self.back[:found] = back
        self.mean.copy_(mean)
        gaussians = self._start(white, labels, codes)
        mine = codes.part(white)
        owned = None
        if labels is not None:
            owned = codes.part(labels)
        for iteration in range(ITERATIONS):
            moments, likelihood = self._expect(mine, owned, gaussians)
            gaussians = _maximise(codes.add(moments))
            self.likelihood = float(codes.add(likelihood)) / len(rows)
            self.weights.copy_(gaussians.weights)
            self.means[:, :found] = gaussians.means
            self.factors[:, :found, :found] = gaussians.factors
            yield (iteration + 1) / ITERATIONS

    def _start(self, white: Tensor, labels: Tensor | None, codes: Codes) -> Gaussians:
        """Clusters of some codes, rank 0's on every rank."""
        chosen = torch.arange(0, len(white), math.ceil(len(white) / STARTED))
        found = self._cluster(white[chosen], labels_of(labels, chosen))
        return Gaussians(
            weights=codes.of_first(found.weights),
            means=codes.of_first(found.means),
            factors=codes.of_first(found.factors),
        )

    def _cluster(self, rows: Tensor, labels: Tensor | None) -> Gaussians:
        """Round Gaussians of equal weights at the clusters that k-means finds; with classes, those of each class share
        the components.
        """
        groups = [rows]
        sizes = [self.config.components]
        if labels is not None:
            groups = [rows[labels == label] for label in range(len(self.labels))]
            shared = share_out(self.class_counts.tolist(), self.config.components - len(groups))
            sizes = [size + 1 for size in shared]
            owners = torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes))
            self.owners.copy_(owners)
        means = []
        for group, size in zip(groups, sizes, strict=True):
            centers = torch.zeros(size, rows.shape[1], dtype=torch.float64)
            if len(group):
                found, _ = kmeans2(
                    group.cpu().double().numpy(),
                    min(size, len(group)),
                    iter=CLUSTERED,
                    minit="++",
                    seed=self.seed % 2**32,
                )
                centers[: len(found)] = torch.from_numpy(found)
            means.append(centers)
        found_here = torch.cat(means).to(rows.device)
        number, directions = found_here.shape
        factor = SPREAD * torch.eye(directions).to(found_here)
        return Gaussians(
            weights=torch.full_like(found_here[:, 0], 1 / number),
            means=found_here,
            factors=factor.expand(number, -1, -1),
        )

    def _expect(self, rows: Tensor, labels: Tensor | None, gaussians: Gaussians) -> tuple[Tensor, Tensor]:
        """The expected moments (features, k) of each component, sums of the features of rows (n, d) in float64, and the
        log-likelihood (). With labels (n,) rows count in components of their class alone.
        """
        density = _log_density(gaussians).float()
        moments = torch.zeros_like(density, dtype=torch.float64)
        likelihood = moments.new_zeros(())
        for first in range(0, len(rows), BLOCK):
            features = _features(rows[first : first + BLOCK])
            logarithms = density.T @ features  # (k, n)
            if labels is not None:
                may_be = self.owners[:, None] == labels[first : first + BLOCK]
                logarithms = logarithms.where(may_be, -math.inf)
            sums = logarithms.logsumexp(0)
            likelihood += sums.double().sum()
            shares = (logarithms - sums).exp()
            shares = shares.where(shares > TINY, 0.0)
            moments += (features @ shares.T).double()
        return moments, likelihood

    def read_metrics(self) -> dict[str, float]:
        return {"prior/likelihood": self.likelihood}


def _whitened(rows: Tensor, of_first: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, values) on their principal directions, at most DIRECTIONS, in which their covariance is the identity:
    (n, d) float32. And what carries such points back, float64: a factor (d, values), and the mean (values,) to add.

    Raises InputError for codes that are all the same.
    """
    values = rows.double()
    mean = of_first(values.mean(0))
    centred = values - mean
    covariance = centred.T @ centred / len(rows)
    spread, directions = map(of_first, torch.linalg.eigh(covariance))
    if spread[-1] <= 0:
        raise InputError("the codes of all images are the same: there is nothing to fit a mixture to")
    kept = min(DIRECTIONS, int((spread > 1e-12 * spread[-1]).sum()))
    deviations = spread[-kept:].sqrt()
    leading = directions[:, -kept:]
    white = centred @ (leading / deviations)
    return white.float(), (leading * deviations).T, mean


def _features(rows: Tensor) -> Tensor:
    """(n, d) -> (d (d + 1) / 2 + d + 1, n): the products of two directions, the directions and 1. A log-density is
    linear in them, and so is the sum of what a component expects: each is one matrix product.
    """
    count, directions = rows.shape
    first, second = torch.triu_indices(directions, directions, device=rows.device)
    turned = rows.T.contiguous()
    features = rows.new_ones(len(first) + directions + 1, count)
    products = features[: len(first)]
    torch.index_select(turned, 0, first, out=products)
    products *= turned[second]
    features[len(first) : -1] = turned
    return features


def _log_density(gaussians: Gaussians) -> Tensor:
    """The coefficients (features, k) of each weighted component's log-density."""
    directions = gaussians.means.shape[1]
    first, second = torch.triu_indices(directions, directions, device=gaussians.means.device)
    inverse = torch.linalg.inv(gaussians.factors)
    precision = inverse.transpose(1, 2) @ inverse
    pulled = torch.einsum("kij,kj->ki", precision, gaussians.means)
    square = (pulled * gaussians.means).sum(1)
    twice = torch.where(first == second, 1.0, 2.0)  # a pair stands for both of its orders
    sizes = gaussians.factors.diagonal(dim1=1, dim2=2).log().sum(1)
    logarithms = gaussians.weights.clamp(min=1e-30).log()
    constant = logarithms - sizes - directions / 2 * math.log(2 * math.pi) - square / 2
    quadratic = -precision[:, first, second] * twice / 2
    return torch.cat([quadratic, pulled, constant[:, None]], dim=1).T


def _maximise(moments: Tensor) -> Gaussians:
    """The components with these moments (features, k); each covariance is drawn to the mean of all."""
    directions = math.isqrt(2 * len(moments)) - 1  # of d (d + 3) / 2 + 1 features
    first, second = torch.triu_indices(directions, directions, device=moments.device)
    counts = moments[-1]
    some = counts.clamp(min=1e-12)
    moments = (moments / some).T
    means = moments[:, -directions - 1 : -1]
    weights = counts / counts.sum()
    covariances = moments.new_zeros(len(counts), directions, directions)
    covariances[:, first, second] = moments[:, : len(first)]
    covariances[:, second, first] = moments[:, : len(first)]
    covariances -= torch.einsum("ki,kj->kij", means, means)
    within = torch.einsum("k,kij->ij", weights, covariances)
    shrinkage = SHRINKAGE * directions
    drawn = shrinkage / (some + shrinkage)
    covariances = torch.lerp(covariances, within.expand_as(covariances), drawn[:, None, None])
    covariances.diagonal(dim1=1, dim2=2).add_(FLOOR)
    return Gaussians(weights, means, torch.linalg.cholesky(covariances))
