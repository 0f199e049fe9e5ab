"""The energy tells noise, constants and foreign images from data; it is not a density. AUROC by kind of outlier.

    pip install -e benchmarks/baselines
    python benchmarks/density.py --to benchmarks/results/density

Compared in the same run: energies and densities of codes of f, of f without IMLE, and of baselines at about equal
processor time; energy-based models for longer, too; and the nearest training code and image. An AUROC is the chance
that an outlier scores above a test image: 1 is perfect, 0.5 chance. Outliers: the other data set, constants of every
shade, uniform noise, test images upside down, and with a patch of another image pasted in. One more network learns
without one class, whose test images are outliers too. Runs are kept under runs/tables as table.py's are, and
projector.py has the same ones; docs/evaluation.md discusses the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import tyro
from output import ROOT, number, table, write_tables
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.nn.functional import interpolate
from trained import Task, packed

from naign.data.format.manifest import INDEX
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.data.sources.catalog import load
from naign.data.sources.published import IDX
from naign.data.sources.source import Made
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.coverage import nearest
from naign.model.bank import REFERENCES, VALUES, Bank, disturbed, rounded, unit
from naign.model.naign import NAIGN
from naign.model.prior import Mixture, Prior
from naign.model.prior.flow import Flow

PATCH = 10
"""Pixels a side of a pasted patch."""
DRAWS = 8
"""Codes an image that the VAE's bound is averaged over."""
TIMES = 5
"""Applications of f in the second energy."""
BATCH = 500
Score = Callable[[Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1] and returns (n,), high for outliers."""
Row = dict[str, float]
"""AUROC by name of the outliers, and for a network the cost of its training."""
COST = "training, processor s"
NEAREST = "nearest training image"


@dataclass(frozen=True, slots=True)
class Data:
    """A data set, what it is told from, and its recipe."""

    title: str
    other: str
    left_out: str
    recipe: str


RECIPE = "configs/mnist.yaml"
SETS = {
    "mnist": Data("MNIST", "fashion_mnist", "9", RECIPE),
    "fashion_mnist": Data("Fashion-MNIST", "mnist", "Bag", "configs/fashion_mnist.yaml"),
    "cifar10": Data("CIFAR-10", "mnist", "", "configs/cifar10_cpu.yaml"),
}
ALONE = ("--objective.imle=0", "--objective.third=none", "--prior.name=none")
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "NAIGN": (RECIPE, ()),
    "without IMLE": (RECIPE, (*ALONE, "--train.images=700_000")),
    "IGN": ("configs/mnist_ign.yaml", ("--train.images=520_000",)),
    "VAE": ("configs/mnist_vae.yaml", ()),
    "normalised autoencoder": ("configs/mnist_nae.yaml", ("--train.images=128_000",)),
}
"""Configurations and options of about one processor time, of networks with an f."""
WITHOUT = "NAIGN without {}"
"""The title of one that learns without a class."""
ENERGIES = {
    "energy-based model": ("configs/mnist_ebm.yaml", ("--train.images=165_000",)),
    "normalised autoencoder, longer": ("configs/mnist_nae.yaml", ()),
    "energy-based model, longer": ("configs/mnist_ebm.yaml", ()),
}
"""Those that are compared by their energy alone: without an f that an image goes through once, or trained longer."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/density")
    """Where to write, without an ending."""
    train: bool = True
    """Train what is missing; otherwise show what exists."""
    sets: tuple[str, ...] = tuple(SETS)
    """Data sets."""
    count: int = 1000
    """Test images, and outliers of each kind."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def place(name: str, left_out: str = "") -> str:
    """The packed data set, or one whose training split lacks a class."""
    if not left_out:
        return packed(f"data/{name}", name)
    path = ROOT / f"data/{name}_without_{left_out.lower()}"
    if not (path / INDEX).exists():
        source = load(name)
        train = source.splits["train"]
        label = source.labels.index(left_out)
        rows = [row for row in range(len(train)) if train[row][2] != label]
        few = Made(length=len(rows), make=lambda number: train[rows[number]])
        pack(replace(source, splits={**source.splits, "train": few}), str(path))
    return str(path.relative_to(ROOT))


def examples(
    name: str,
    data: Data,
    count: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Test images (count, C, H, W) in [-1, 1] of the classes that were not left out, and outliers by name."""
    generator = torch.Generator().manual_seed(0)
    test, labels = read_split(place(name), "test")
    order = torch.randperm(len(test), generator=generator)
    images = scaled(test[order])
    out = torch.zeros_like(labels, dtype=torch.bool)
    if data.left_out:
        out = labels[order] == IDX[name][2].index(data.left_out)
    kept = images[~out]
    real = kept[:count]
    donors = kept[count : 2 * count]
    found, _ = read_split(place(data.other), "test", limit=count)
    other = interpolate(scaled(found), size=real.shape[2:], mode="bilinear")
    shades = torch.linspace(-1, 1, 256)[1:]
    shades = shades.view(-1, 1, 1, 1)
    outliers = {
        SETS[data.other].title: other.expand_as(real),
        "black": torch.full_like(real[:1], -1.0),
        "other constants": shades.expand(-1, *real.shape[1:]),
        "uniform noise": torch.rand(real.shape, generator=generator) * 2 - 1,
        "upside down": real.flip(2),
        "pasted patch": pasted(real, donors, generator),
    }
    if data.left_out:
        outliers[f"{data.left_out}, left out"] = images[out][:count]
    return real, outliers


def pasted(
    images: Tensor,
    donors: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Images (n, C, H, W), each with the middle PATCH x PATCH pixels of its donor pasted at a random place."""
    side = images.shape[-1]
    first = (side - PATCH) // 2
    patches = donors[..., first : first + PATCH, first : first + PATCH]
    corners = torch.randint(side - PATCH + 1, (len(images), 2), generator=generator)
    made = images.clone()
    for image, patch, (row, column) in zip(made, patches, corners.tolist(), strict=True):
        image[:, row : row + PATCH, column : column + PATCH] = patch
    return made


def codes_of(model: NAIGN, images: Tensor) -> Tensor:
    parts = images.split(BATCH)
    return torch.cat([model.network.encode(part) for part in parts])


def bank_of(model: NAIGN, train: Tensor) -> Bank:
    """The model's bank or, if it has none, one of the images `train`; the last of them are its references."""
    if model.has_bank:
        return model.bank
    bank = Bank()
    codes = rounded(codes_of(model, train))
    bank.codes = codes[: min(len(codes) - REFERENCES, VALUES // codes.shape[1])]
    bank.distances, _ = nearest(unit(codes[-REFERENCES:]), unit(bank.codes))
    references = train[-REFERENCES:]
    bank.energies = model.energy(references)
    unlike = disturbed(references)
    bank.weigh(model.energy(unlike), bank.distance(codes_of(model, unlike)))
    return bank


def auroc(inlier: Tensor, outlier: Tensor) -> float:
    """Area under the ROC curve of scores (n,) of data against scores (m,) of outliers, higher meaning outlier."""
    scores = torch.cat([inlier, outlier])
    most = torch.finfo(scores.dtype).max
    finite = scores.nan_to_num(nan=most, posinf=most)
    is_outlier = torch.arange(len(scores)) >= len(inlier)
    return float(roc_auc_score(is_outlier.numpy(), finite.numpy()))


def code_density(prior: Prior, codes: Tensor) -> Tensor:
    """Minus the log-density (n,), in nats up to a constant, of codes (n, ...) under a mixture or a flow."""
    if isinstance(prior, Mixture):
        factors = (prior.back.T @ prior.factors).double()
        covariances = factors @ factors.transpose(1, 2)
        covariances.diagonal(dim1=1, dim2=2).add_(1e-6)  # directions that the mixture leaves out
        means = prior.means @ prior.back + prior.mean
        components = MultivariateNormal(means.double(), covariances)
        mixture = MixtureSameFamily(Categorical(prior.weights.double()), components)
        return -mixture.log_prob(codes.flatten(1).double())
    assert isinstance(prior, Flow)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in codes.split(BATCH):
        parts.append(_flow_density(prior, part, generator))
    return torch.cat(parts)


def _flow_density(flow: Flow, codes: Tensor, generator: torch.Generator) -> Tensor:
    """By the midpoint method from the code (t = 1) back to noise, in as many steps as the flow draws in.

    The trace of the velocity's Jacobian is that of one random sign vector a step (Hutchinson, arXiv 1810.01367).
    """
    steps = flow.config.steps
    at = flow.whiten(codes)
    trace = codes.new_zeros(len(codes))
    for step in reversed(range(steps)):
        time = codes.new_full((len(codes),), (step + 1) / steps)
        middle = at - flow.velocity(at, time) / (2 * steps)
        bits = torch.randint(2, at.shape, generator=generator)
        signs = bits * 2.0 - 1
        with torch.enable_grad():
            middle.requires_grad_(True)
            velocity = flow.velocity(middle, time - 1 / (2 * steps))
            along = (velocity * signs).sum()
            (slope,) = torch.autograd.grad(along, middle)
        trace += (slope * signs).flatten(1).sum(1) / steps
        at = at - velocity.detach() / steps
    squares = at.square().flatten(1).sum(1)
    return squares / 2 + trace


def bound(model: NAIGN, train: Tensor) -> Score:
    """Minus a VAE's bound on the log-likelihood, in nats up to a constant: the mean over DRAWS codes.

    The variance of pixels is the best one for the images `train`.
    """
    width = math.prod(model.network.code)

    def terms(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the whole image, the mean over draws, and divergence of the code: (n,) each."""
        generator = torch.Generator().manual_seed(0)
        flat = batch.flatten(1)
        errors = batch.new_zeros(len(batch))
        for _ in range(DRAWS):
            noise = torch.randn(len(batch), width, generator=generator)
            made = model.network(torch.cat([flat, noise], 1))
            sizes = [flat.shape[1], width, width]
            drawn, mean, log_variance = made.split(sizes, 1)
            errors += (drawn - flat).square().sum(1) / DRAWS
        divergences = mean.square() + log_variance.exp() - 1 - log_variance
        return errors, divergences.sum(1) / 2

    errors, _ = terms(train[:1000])
    variance = errors.mean() / train[0].numel()

    def score(batch: Tensor) -> Tensor:
        errors, divergences = terms(batch)
        return errors / (2 * variance) + divergences

    return score


def scores_of(model: NAIGN, train: Tensor) -> dict[str, Score]:
    """What a network can be scored by; `train` are training images (n, C, H, W) in [-1, 1]."""
    name = model.metadata["model"]["name"]
    if name == "ebm":
        return {"energy": model.network.energy}
    scores: dict[str, Score] = {"energy": model.energy}
    if name == "vae":
        scores = {"bound": bound(model, train)}
    bank = bank_of(model, train)

    def distance(images: Tensor) -> Tensor:
        return bank.distance(codes_of(model, images))

    scores["nearest code"] = distance
    if model.has_bank:
        scores["both, as `naign score`"] = lambda images: bank.score(model.energy(images), distance(images)).rank
    if isinstance(model.prior, (Mixture, Flow)):
        scores[f"energy, f applied {TIMES} times"] = partial(model.energy, times=TIMES)

        def density(images: Tensor) -> Tensor:
            return code_density(model.prior, codes_of(model, images))

        scores[f"density of the code ({model.prior.config.name})"] = density
    return scores


def image_distance(train: Tensor) -> Score:
    """Distance to the nearest of the images `train`."""
    return lambda batch: nearest(batch, train)[0]


def measured(
    score: Score,
    real: Tensor,
    others: dict[str, Tensor],
) -> Row:
    inside = score(real)
    row = {}
    for title, outliers in others.items():
        row[title] = auroc(inside, score(outliers))
    return row


def networks(name: str, data: Data) -> dict[str, tuple[str, list[str]]]:
    """Configuration and options of every network, by title."""
    asked = dict[str, tuple[str, list[str]]]()
    whole = f"--data.path={place(name)}"
    if data.recipe != RECIPE:
        asked[f"recipe, {Path(data.recipe).name}"] = (data.recipe, [whole])
    if not data.left_out:
        return asked
    for title, (config, options) in (NETWORKS | ENERGIES).items():
        asked[title] = (config, [*options, whole])
    asked[WITHOUT.format(data.left_out)] = (RECIPE, [f"--data.path={place(name, data.left_out)}"])
    return asked


def rows_of(
    name: str,
    data: Data,
    settings: Settings,
) -> dict[str, Row]:
    """The rows of a table by title."""
    real, others = examples(name, data, settings.count)
    images, _ = read_split(place(name), "train")
    train = scaled(images)
    unseen = f"{data.left_out}, left out"
    rows: dict[str, Row] = {}
    for title, (config, options) in networks(name, data).items():
        task = Task.of(settings.runs, config, options, 0)
        if settings.train:
            task.train()
        if not task.ended or task.diverged:
            continue
        model = NAIGN.from_pretrained(task.folder)
        kinds = dict(others)
        if title != WITHOUT.format(data.left_out):
            kinds.pop(unseen, None)  # it has learned that class
        for score_name, score in scores_of(model, train).items():
            row = measured(score, real, kinds)
            row[COST] = model.metadata["cpu_seconds"]
            rows[f"{title}: {score_name}"] = row
    others.pop(unseen, None)
    rows[NEAREST] = measured(image_distance(train), real, others)
    return rows


def table_of(rows: dict[str, Row]) -> str:
    kinds = list(rows[NEAREST])
    titles = list(kinds)
    titles.append("mean")
    for row in rows.values():
        for kind in row:
            if kind not in titles and kind != COST:
                titles.append(kind)  # of a class that was left out
    titles.append(COST)
    lines = []
    for name, row in rows.items():
        mean = fmean(row[kind] for kind in kinds)
        numbers = {"mean": mean, **row}
        cells = [name]
        for title in titles:
            if title not in numbers:
                cells.append("-")
            elif title == COST:
                cells.append(number(numbers[title]))
            else:
                cells.append(f"{numbers[title]:.3f}")
        lines.append(cells)
    return table(["", *titles], lines)


def main(settings: Settings) -> None:
    if not 2 <= settings.count <= 4000 or not {*settings.sets} <= {*SETS}:
        raise InputError(f"--count must be 2 to 4000, for which there are test images, and --sets of {', '.join(SETS)}")
    write_tables(
        settings.to,
        "AUROC, {}",
        {name: SETS[name].title for name in settings.sets},
        lambda name: rows_of(name, SETS[name], settings),
        table_of,
    )


if __name__ == "__main__":
    with exit_on_input_error("density"):
        main(tyro.cli(Settings))
