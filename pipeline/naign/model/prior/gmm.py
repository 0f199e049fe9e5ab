"""A Gaussian mixture that follows the codes of f from round to round.

Stepwise expectation maximisation (Cappé and Moulines, arXiv 0712.4273): each round moves the expected counts, sums and
outer products of the components towards those of its codes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from naign.data.mixing import shares as share_out
from naign.errors import require
from naign.model.prior.base import WINDOW, CodesConfig, CodesPrior, Device, Examples, Shape
from naign.philox import SCALE, normal, uniform
from naign.settings.constraints import between

LARGEST = 2**26  # values of all covariances at most
FEW = 20  # codes a component, at least, that a mixture is fitted to or starts from
FOLLOWED = 3  # codes a dimension and component that are followed at least, if that is more than WINDOW rounds
SHRINKAGE = 0.5  # codes a dimension: how much the mean covariance of all components weighs in that of each
FLOOR = 1e-3  # of the mean variance, added to each
LEAST = 1e-4  # of a code in a component: less does not count


@dataclass(kw_only=True, slots=True)
class GmmConfig(CodesConfig):
    name: str = "gmm"
    components: int = field(default=100, metadata=between(1, 10**4))
    """Gaussians of the mixture."""
    begin: float = field(default=0.84, metadata=between(0, 0.99))
    """Share of train.images before which codes come from one Gaussian. Use 0 if matched latents are to move f."""
    alone: float = field(default=0.16, metadata=between(0, 0.99))
    """As for flow: share of train.images, at the end, over which f is frozen and only the prior learns."""

    def check_rounds(self, rounds: int, images: int) -> None:
        CodesConfig.check_rounds(self, rounds, images)
        few = f"prior.components={self.components} with match.round={images}: fewer than {FEW} codes a component"
        least = self.components * FEW
        require((least <= images, f"{few}: ask for fewer components, or raise match.round to {least}"))


class Gmm(CodesPrior):
    """The mixture. Before `begin` it is one Gaussian; at `begin` k-means of a round's codes parts it. With classes each
    component is of one class from then on, so that the components of a class are the mixture of its codes.

    Statistics are float64, and a function of the codes and the seed, whatever the number of ranks.
    """

    weights: Tensor  # (k,)
    means: Tensor  # (k, values)
    factors: Tensor  # (k, values, directions): covariances are factor @ factor.T, of all directions where it is learned
    owners: Tensor  # (k,) int64, with classes: the class of each component; -1 is any

    def __init__(self, config: GmmConfig, shape: Shape, *, seed: int = 0, labels: Sequence[str] = ()) -> None:
        super().__init__(config, shape, seed=seed, labels=labels)
        number, values = config.components, math.prod(shape)
        few = f"prior.components={number} for {len(labels)} classes: each needs at least one"
        require((number >= len(labels), few))
        large, size = f"prior.components={number} with codes of {values} values", number * values**2
        require((size <= LARGEST, f"{large}: over {LARGEST} values in covariances: ask for fewer components"))
        self.followed, self.seen = 0, 0.0  # rounds since it started anew, and how many codes the statistics stand for
        self.parted = False  # whether it has more than one component
        self.register_buffer("weights", torch.zeros(number))
        self.register_buffer("means", torch.zeros(number, values))
        self.register_buffer("factors", torch.zeros(number, values, values))
        if labels:
            self.register_buffer("owners", torch.full((number,), -1))

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """Counts (k,), sums (k, values) and outer products (k, values, values) of the codes of each component."""
        like = {"counts": self.weights, "sums": self.means, "outers": self.factors}
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}

    def draw(self, seed: int, round: int, ids: Tensor, device: Device, labels: Tensor | None = None) -> Tensor:
        labels = self.choose(seed, round, ids, device) if labels is None else labels
        which, last = uniform(seed, round, ids, (1,), device, stream=SCALE), len(self.weights) - 1
        if labels is None:
            chosen = torch.searchsorted(self.weights.cumsum(0), which.flatten().contiguous()).clamp(max=last)
        else:
            sums = self.weights.clamp(min=1e-30).where(self._may_be(labels), 0).cumsum(1)
            chosen = torch.searchsorted(sums / sums[:, -1:], which.contiguous()).flatten().clamp(max=last)
        noise = normal(seed, round, ids, (self.factors.shape[2],), device)
        codes = self.means[chosen] + torch.einsum("nij,nj->ni", self.factors[chosen], noise)
        return codes.view(-1, *self.shape)

    def _may_be(self, labels: Tensor) -> Tensor:
        """Whether rows of those classes may be of each component: (n, k)."""
        return (self.owners < 0) | (self.owners == labels[:, None])

    def learn(self, examples: Examples) -> Iterator[float]:
        """Learn from the codes of a round at once: there are no steps to yield between."""
        if not self.parted and examples.progress >= self.config.begin:
            self.parted, self.followed = True, 0
        codes = examples.codes(1 if self.parted else examples.stride).flatten(1).float()
        labels = self.read_labels(examples, count=True)
        if labels is not None and not self.parted:
            self.owners.fill_(-1)  # they may be another run's: `model.init`
        number = self.config.components if self.parted else 1
        window = max(WINDOW, FOLLOWED * number * codes.shape[1] / len(codes))
        keep = max(1 / (self.followed + 1), 1 / (window + examples.settled))
        gaussian = self.parted and self.followed >= window
        shares = self._shares(codes, labels) if gaussian else self._clustered(codes, number, labels)
        for component, share in enumerate(shares.T):
            rows = share > LEAST
            weights, values = share[rows].double() / len(codes), codes[rows].double()
            weighted = weights[:, None] * values
            parts = weights.sum(), weighted.sum(0), weighted.T @ values
            for statistic, part in zip(self.statistics.values(), parts, strict=True):
                statistic[component].lerp_(part, keep)
        seen = (1 - keep) ** 2 / self.seen if self.followed else 0.0
        self.seen = 1 / (seen + keep**2 / len(codes))
        self._maximise()
        self.followed += 1
        yield from ()

    def _clustered(self, codes: Tensor, number: int, labels: Tensor | None) -> Tensor:
        """Which of so many clusters each code is in: (n, k) of zeros and ones.

        By k-means at first, then by the nearest mean until there are enough codes: the covariance of few codes is
        narrow, and such a component keeps the codes it has. Clusters are shared out over the classes at first.
        """
        if number == 1:
            which = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        elif self.followed:
            apart = torch.cdist(codes, self.means)
            which = (apart if labels is None else apart.where(self._may_be(labels), math.inf)).argmin(1)
        elif labels is None:
            which = self._k_means(codes, number)
        else:
            counts = torch.bincount(labels, minlength=len(self.labels)).tolist()
            each = [1 + more for more in share_out(counts, number - len(counts))]
            self.owners.copy_(torch.arange(len(each)).repeat_interleave(torch.tensor(each)))
            which = torch.empty_like(labels, device="cpu")
            for label in labels.unique().tolist():
                rows = (labels == label).cpu()
                which[rows] = sum(each[:label]) + self._k_means(codes[rows], each[label])
        return one_hot(which, self.config.components).to(codes)

    def _k_means(self, codes: Tensor, number: int) -> Tensor:
        """Which of so many clusters each code is in: (n,)."""
        from sklearn.cluster import KMeans  # slow to import

        means = KMeans(min(number, len(codes)), n_init=1, max_iter=20, random_state=self.seed % 2**32)
        return torch.from_numpy(means.fit_predict(codes.cpu().numpy())).long()

    def _shares(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """How probable each component is for each code: (n, k), rows of sum 1."""
        inverse = torch.linalg.inv(self.factors.double())
        turned = torch.einsum("kij,kj->ki", inverse, self.means.double()).float()
        apart = codes @ inverse.float().flatten(0, 1).T - turned.flatten()
        squares = apart.view(len(codes), *self.means.shape).square().sum(2)
        sizes = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        logarithms = self.weights.clamp(min=1e-30).log() - sizes - squares / 2
        return torch.softmax(logarithms if labels is None else logarithms.where(self._may_be(labels), -math.inf), dim=1)

    def _maximise(self) -> None:
        counts, sums, outers = self.statistics.values()
        some, shrinkage = counts.clamp(min=1e-12), SHRINKAGE * sums.shape[1]
        means, weights = sums / some[:, None], counts / counts.sum()
        covariances = outers / some[:, None, None] - torch.einsum("ki,kj->kij", means, means)
        within = torch.einsum("k,kij->ij", weights, covariances)
        covariances.lerp_(within.expand_as(covariances), (shrinkage / (self.seen * some + shrinkage))[:, None, None])
        covariances.diagonal(dim1=1, dim2=2).add_((FLOOR * within.diagonal().mean()).clamp(min=1e-12))
        self.weights.copy_(weights)
        self.means.copy_(means)
        self.factors.copy_(torch.linalg.cholesky(covariances))

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load a mixture of any number of directions: one that was fitted afterwards has fewer than values."""
        if "factors" in state:
            sizes = *self.means.shape, *state["factors"].shape[-1:]
            self.factors = torch.empty(sizes, device=self.factors.device)
        loaded = super().load_state_dict(state, strict, assign)
        self.begun = int(self.weights.count_nonzero()) >= min(2, len(self.weights))
        return loaded

    def training_state(self) -> dict[str, Tensor]:
        progress = torch.tensor([self.followed, self.parted, self.seen], dtype=torch.float64)
        return self.state_dict() | self.statistics | {"progress": progress}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_training_state(state)
        for name, statistic in self.statistics.items():
            statistic.copy_(state[name])
        followed, parted, self.seen = state["progress"].tolist()
        self.followed, self.parted = int(followed), bool(parted)
