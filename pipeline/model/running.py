"""A Gaussian mixture that follows the codes of f from round to round: the law of latents `codes` without a flow.

Stepwise expectation maximisation (Cappé and Moulines, arXiv 0712.4273): each round moves the expected counts, sums and
outer products of the components towards those of its codes.
"""

import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.errors import require
from pipeline.model.codes import WINDOW, CodeLaw, CodesConfig

LARGEST = 2**26  # values of all covariances at most
FEW = 8  # codes a component, in the round whose clusters it starts from
FOLLOWED = 3  # codes a dimension and component that are followed at least, if that is more than WINDOW rounds
PRIOR = 0.5  # codes a dimension: how much the mean covariance of all components weighs in that of each
RIDGE = 1e-3  # of the mean variance, added to each
LEAST = 1e-4  # of a code in a component: less does not count
STATISTICS = ("counts", "sums", "outers")


class MixtureLaw:
    """The mixture while it learns. Before `begin` it is one Gaussian; at `begin` k-means of a round's codes parts it.

    Statistics are float64. A function of the codes and the seed, whatever the number of ranks.
    """

    done, loss = 0, math.nan  # it makes no steps within a round

    def __init__(self, shape: tuple[int, ...], config: CodesConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.shape = config, seed, shape
        self.rounds = 0  # learned from
        self.followed, self.seen = 0, 0.0  # rounds since it started anew, and how many codes the statistics stand for
        self.parted = False  # whether it has more than one component
        number, values = config.components, math.prod(shape)
        sizes = ((number,), (number, values), (number, values, values))
        self.statistics = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
        self.weights, self.means, self.factors = (torch.zeros(size, device=device) for size in sizes)

    def begun(self, share: float) -> bool:
        """Whether there is a loss to report after a round before which that share of the run lies: there is none."""
        return False

    def learn(self, codes: Tensor, share: float, settled: int = 0, **_how: object) -> Iterator[None]:
        """Learn from the next round's codes (n, *shape) of all ranks, at once: there are no steps to yield between.

        `share` is that of the run that lies behind, `settled` the rounds since which f has not changed.
        """
        codes = codes.flatten(1).float()
        if not self.parted and share >= self.config.begin:
            self.parted, self.followed = True, 0
        number = self.config.components if self.parted else 1
        window = max(WINDOW, FOLLOWED * number * codes.shape[1] / len(codes))
        keep = max(1 / (self.followed + 1), 1 / (window + settled))
        gaussian = self.parted and self.followed >= window
        shares = self._shares(codes) if gaussian else self._clustered(codes, number)
        for component, share_of in enumerate(shares.T):
            rows = share_of > LEAST
            weights, values = share_of[rows].double() / len(codes), codes[rows].double()
            weighted = weights[:, None] * values
            for whole, part in zip(self.statistics, (weights.sum(), weighted.sum(0), weighted.T @ values), strict=True):
                whole[component].lerp_(part, keep)
        seen = (1 - keep) ** 2 / self.seen if self.followed else 0.0
        self.seen = 1 / (seen + keep**2 / len(codes))
        self._maximise()
        self.rounds, self.followed = self.rounds + 1, self.followed + 1
        yield from ()

    def _clustered(self, codes: Tensor, number: int) -> Tensor:
        """Which of so many clusters each code is in: (n, k) of zeros and ones.

        By k-means at first, then by the nearest mean until there are enough codes: the covariance of few codes is
        narrow, and such a component keeps the codes it has.
        """
        which = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        if number > 1 and self.followed:
            which = torch.cdist(codes, self.means).argmin(1)
        elif number > 1:
            from sklearn.cluster import KMeans  # slow to import
            from sklearn.exceptions import ConvergenceWarning

            means = KMeans(min(number, len(codes)), n_init=1, max_iter=20, random_state=self.seed % 2**32)
            with warnings.catch_warnings():  # of fewer different codes than components
                warnings.simplefilter("ignore", ConvergenceWarning)
                which = torch.from_numpy(means.fit(codes.cpu().numpy()).labels_).long()
        return one_hot(which, self.config.components).to(codes)

    def _shares(self, codes: Tensor) -> Tensor:
        """How probable each component is for each code: (n, k), rows of sum 1."""
        inverse = torch.linalg.inv(self.factors.double())
        turned = torch.einsum("kij,kj->ki", inverse, self.means.double()).float()
        apart = codes @ inverse.float().flatten(0, 1).T - turned.flatten()
        squares = apart.view(len(codes), *self.means.shape).square().sum(2)
        sizes = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return torch.softmax(self.weights.clamp(min=1e-30).log() - sizes - squares / 2, dim=1)

    def _maximise(self) -> None:
        counts, sums, outers = self.statistics
        some, prior = counts.clamp(min=1e-12), PRIOR * sums.shape[1]
        means, weights = sums / some[:, None], counts / counts.sum()
        covariances = outers / some[:, None, None] - torch.einsum("ki,kj->kij", means, means)
        within = torch.einsum("k,kij->ij", weights, covariances)
        covariances.lerp_(within.expand_as(covariances), (prior / (self.seen * some + prior))[:, None, None])
        covariances.diagonal(dim1=1, dim2=2).add_((RIDGE * within.diagonal().mean()).clamp(min=1e-12))
        self.weights.copy_(weights)
        self.means.copy_(means)
        self.factors.copy_(torch.linalg.cholesky(covariances))

    def state(self) -> dict[str, Tensor]:
        """The state that draws codes, as `draw_mixture` takes it."""
        values = self.means.shape[1]
        whole = {"basis": torch.eye(values, device=self.means.device), "mean": torch.zeros_like(self.means[0])}
        return {"shape": torch.tensor(self.shape, device=self.means.device)} | self._components() | whole

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Begin from the state of another run's law: a mixture needs none, the first round is enough."""

    def _components(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "means": self.means, "factors": self.factors}

    def _tensors(self) -> dict[str, Tensor]:
        return dict(zip(STATISTICS, self.statistics, strict=True)) | self._components()

    def dump(self) -> dict[str, Tensor]:
        """The state from which learning resumes, on the CPU."""
        found = self._tensors()
        progress = [self.rounds, self.followed, self.parted, self.seen]
        found["progress"] = torch.tensor(progress, dtype=torch.float64)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Resume from what `dump` returned. Raises KeyError or ValueError for another law's."""
        for name, value in self._tensors().items():
            require((saved[name].shape == value.shape, f"{name} of the mixture have another shape"))
            value.copy_(saved[name])
        rounds, followed, parted, self.seen = saved["progress"].tolist()
        self.rounds, self.followed, self.parted = int(rounds), int(followed), bool(parted)


LearnedLaw = CodeLaw | MixtureLaw


def build(shape: tuple[int, ...], config: CodesConfig, round: int, seed: int, device: torch.device) -> LearnedLaw:
    """The law of codes of that shape, learned in rounds of so many images.

    Raises InputError where the covariances of a mixture would be too large, or its clusters too small.
    """
    if not config.components:
        return CodeLaw(shape, config, seed, device)
    values, fewer = config.components * math.prod(shape) ** 2, "Ask for fewer components"
    what = f"match.codes.components={config.components} with"
    large = f"{what} codes of {math.prod(shape)} values: {values} values in covariances, at most {LARGEST}. {fewer}"
    small = (
        f"{what} match.round={round}: fewer than {FEW} codes a component to start from. {fewer}, or raise match.round"
    )
    require((values <= LARGEST, large), (config.components * FEW <= round, small))
    return MixtureLaw(shape, config, seed, device)
