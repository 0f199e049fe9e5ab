"""Does the energy tell data from what is not data? AUROC by kind of outlier, beside other scores.

    pip install -e benchmarks/baselines
    python benchmarks/density.py --to benchmarks/results/density

MNIST and Fashion-MNIST, each as the data. An AUROC is the chance that an outlier scores above a test image: 1 is
perfect, 0.5 chance, and 0 takes every outlier for more like the data than any image of it. Networks with a dense code
of 64 values are trained on one thread at equal processor time, without one class, whose test images are outliers too;
the recipe of the data, trained on all classes, stands above them. Other outliers: the other data set, constants of
every shade, uniform noise, test images upside down, and test images with a patch of another image pasted in. Runs are
kept under runs/tables as table.py's are; docs/energy.md discusses the result.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from trained import FAILED, ROOT, Task, check_place, packed, page, seeds_of, spread, table, write

from naign.data.format.manifest import INDEX
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.data.sources.published import IDX
from naign.data.sources.source import Made
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.coverage import nearest
from naign.evaluate.density import auroc
from naign.model.naign import NAIGN
from naign.model.prior import Gmm, Prior
from naign.model.prior.flow import Flow
from naign.model.scale import scaled
from naign.storage.local import write_atomically

PATCH = 10  # pixels a side of a pasted patch
DRAWS = 8  # codes an image that the VAE's bound is averaged over
TIMES = 5  # applications of f in the second energy
BATCH = 500
Score = Callable[[Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1] and returns (n,), high for outliers."""


@dataclass(frozen=True, slots=True)
class Data:
    """A data set, what it is told from, and its recipe."""

    title: str
    other: str
    left_out: str
    recipe: str

    @property
    def held_out(self) -> str:
        return f"{self.left_out}, left out"


SETS = {
    "mnist": Data("MNIST", "fashion_mnist", "9", "configs/mnist.yaml"),
    "fashion_mnist": Data("Fashion-MNIST", "mnist", "Bag", "configs/fashion_mnist.yaml"),
}
WHOLE = "NAIGN, whole recipe, all classes"
DENSE, ALONE = "configs/mnist.yaml", ("--objective.imle=0", "--prior.name=gaussian")
IMLE = ("--objective.imle=0.3", "--prior.components=50", "--prior.begin=0.225", "--prior.alone=0.04")
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "NAIGN, with IMLE": (DENSE, (*IMLE, "--train.images=83968")),
    "denoising autoencoder": (DENSE, (*ALONE, "--train.images=172032")),
    "VAE": ("configs/mnist_vae.yaml", ("--train.images=294912",)),
    "normalised autoencoder": ("configs/mnist_nae.yaml", ("--model.code=64", "--train.images=38912")),
    "autoencoder": (DENSE, (*ALONE, "--objective.denoising=0", "--train.images=325632")),
}
"""Configurations and options; all have a dense code of 64 values."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/density")
    """Where to write, without an ending."""
    train: bool = True
    """Train what is missing; otherwise the table is of what is there."""
    seeds: int = 2
    """Seeds of NAIGN; the other networks have one."""
    count: int = 1000
    """Test images, and outliers of each kind."""
    images: int = 0
    """Train every network on so many images; 0: as the table has it."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


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
        few = Made(length=len(rows), make=lambda index: train[rows[index]])
        pack(replace(source, splits={**source.splits, "train": few}), str(path))
    return str(path.relative_to(ROOT))


def examples(name: str, data: Data, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Test images (count, C, H, W) in [-1, 1] of the classes that were not left out, and outliers by name."""
    generator = torch.Generator().manual_seed(0)
    test, labels = read_split(place(name), "test")
    order = torch.randperm(len(test), generator=generator)
    images, out = scaled(test[order]), labels[order] == IDX[name][2].index(data.left_out)
    real, donors = images[~out][: 2 * count].split(count)
    other, _ = read_split(place(data.other), "test", limit=count)
    return real, {
        SETS[data.other].title: scaled(other),
        "black": torch.full_like(real[:1], -1.0),
        "other constants": torch.linspace(-1, 1, 256)[1:].view(-1, 1, 1, 1).expand(-1, *real.shape[1:]),
        "uniform noise": torch.rand(real.shape, generator=generator) * 2 - 1,
        "upside down": real.flip(2),
        "pasted patch": pasted(real, donors, generator),
        data.held_out: images[out][:count],
    }


def pasted(images: Tensor, donors: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with the middle PATCH x PATCH pixels of the donor of its row pasted at a random place
    within the image.
    """
    first, last = (images.shape[-1] - PATCH) // 2, (images.shape[-1] + PATCH) // 2
    patches, made = donors[..., first:last, first:last], images.clone()
    corners = torch.randint(images.shape[-1] - PATCH + 1, (len(images), 2), generator=generator).tolist()
    for image, patch, (row, column) in zip(made, patches, corners, strict=True):
        image[:, row : row + PATCH, column : column + PATCH] = patch
    return made


def codes_of(model: NAIGN, images: Tensor) -> Tensor:
    return torch.cat([model.network.encode(part) for part in images.split(BATCH)])


def code_distance(model: NAIGN, train: Tensor) -> Score:
    """Of an image's code to the nearest code of the images `train`, by angle."""

    def directions(batch: Tensor) -> Tensor:
        return torch.nn.functional.normalize(codes_of(model, batch).flatten(1))

    reference = directions(train)
    return lambda batch: nearest(directions(batch), reference)[0]


def code_density(prior: Prior, codes: Tensor) -> Tensor:
    """Minus the log-density, in nats up to a constant, of codes (n, ...) under a mixture or a flow: (n,)."""
    if isinstance(prior, Gmm):
        components = MultivariateNormal(prior.means, scale_tril=prior.factors)
        return -MixtureSameFamily(Categorical(prior.weights), components).log_prob(codes.flatten(1))
    assert isinstance(prior, Flow)
    generator = torch.Generator().manual_seed(0)
    return torch.cat([_flow_density(prior, part, generator) for part in codes.split(BATCH)])


def _flow_density(flow: Flow, codes: Tensor, generator: torch.Generator) -> Tensor:
    """By the midpoint method from the code (t = 1) back to noise, in as many steps as the flow draws in; the trace of
    the velocity's Jacobian by one random sign vector a step (Hutchinson, as in arXiv 1810.01367).
    """
    steps = flow.config.steps
    place, trace = flow.whiten(codes), codes.new_zeros(len(codes))
    for step in reversed(range(steps)):
        time = codes.new_full((len(codes),), (step + 1) / steps)
        middle = place - flow.velocity(place, time) / (2 * steps)
        signs = torch.randint(2, place.shape, generator=generator) * 2.0 - 1
        with torch.enable_grad():
            middle.requires_grad_(True)
            velocity = flow.velocity(middle, time - 1 / (2 * steps))
            (slope,) = torch.autograd.grad((velocity * signs).sum(), middle)
        trace += (slope * signs).flatten(1).sum(1) / steps
        place = place - velocity.detach() / steps
    return place.square().flatten(1).sum(1) / 2 + trace


def bound(model: NAIGN, train: Tensor) -> Score:
    """Minus a VAE's bound on the log-likelihood, in nats up to a constant: the mean over DRAWS codes, with the variance
    of pixels that is best for the images `train`.
    """
    width = math.prod(model.network.code)

    def terms(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the whole image, the mean over draws, and divergence of the code: (n,) each."""
        generator, errors, flat = torch.Generator().manual_seed(0), batch.new_zeros(len(batch)), batch.flatten(1)
        for _ in range(DRAWS):
            noise = torch.randn(len(batch), width, generator=generator)
            drawn, mean, log_variance = model.network(torch.cat([flat, noise], 1)).split(
                [flat.shape[1], width, width], 1
            )
            errors += (drawn - flat).square().sum(1) / DRAWS
        return errors, (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2

    variance = terms(train[:1000])[0].mean() / train[0].numel()

    def score(batch: Tensor) -> Tensor:
        errors, divergences = terms(batch)
        return errors / (2 * variance) + divergences

    return score


def scores_of(model: NAIGN, train: Tensor) -> dict[str, Score]:
    """What a network can be scored by, of training images (n, C, H, W) in [-1, 1]."""
    vae = model.metadata["model"]["name"] == "vae"
    scores: dict[str, Score] = {"bound": bound(model, train)} if vae else {"energy": model.energy}
    scores["nearest training code"] = code_distance(model, train)
    if isinstance(model.prior, (Gmm, Flow)):
        scores[f"energy, f applied {TIMES} times"] = partial(model.energy, times=TIMES)
        scores[f"density of the code ({model.prior.config.name})"] = lambda images: code_density(
            model.prior, codes_of(model, images)
        )
    return scores


def image_distance(train: Tensor) -> Score:
    """Distance to the nearest of the images `train`."""
    return lambda batch: nearest(batch, train)[0]


def brightness(train: Tensor) -> Score:
    """How far the mean brightness is from that of the images `train`."""
    typical = float(train.mean())
    return lambda batch: (batch.flatten(1).mean(1) - typical).abs()


Row = dict[str, float]
"""AUROC by name of the outliers, and of a network what its training cost."""
COST = "training, processor s"


def measured(score: Score, real: Tensor, others: dict[str, Tensor]) -> Row:
    inside = score(real)
    return {title: auroc(inside, score(outliers)) for title, outliers in others.items()}


def of_network(task: Task, train: Tensor, real: Tensor, others: dict[str, Tensor]) -> dict[str, Row]:
    """A row a score; {"diverged": {}} of a run that did. They are kept beside the run."""
    if (task.trained / FAILED).exists():
        return {"diverged": {}}
    file = task.folder / f"auroc-{len(real)}.json"
    if not file.exists():
        model = NAIGN.from_pretrained(task.folder)
        cost = {COST: model.metadata["cpu_seconds"]}
        made = {name: cost | measured(score, real, others) for name, score in scores_of(model, train).items()}
        write_atomically(file, json.dumps(made, indent=1) + "\n")
    rows: dict[str, Row] = json.loads(file.read_text())
    return rows


def rows_of(name: str, data: Data, settings: Settings) -> dict[str, list[Row]]:
    """Of a table, by title, each with what was measured of every seed."""
    real, others = examples(name, data, settings.count)
    train, rows = scaled(read_split(place(name, data.left_out), "train")[0]), dict[str, list[Row]]()
    asked = [(WHOLE, data.recipe, [f"--data.path={place(name)}"], 0)]
    for title, (config, options) in NETWORKS.items():
        options = [*options, f"--data.path={place(name, data.left_out)}"]
        asked += [(title, config, options, seed) for seed in range(settings.seeds if title.startswith("NAIGN") else 1)]
    for title, config, options, seed in asked:
        images = [f"--train.images={settings.images}"] * bool(settings.images)
        task = Task.of(settings.runs, config, [*options, *images], seed)
        if settings.train:
            task.train()
        for score, row in of_network(task, train, real, others).items() if task.ended else ():
            if title == WHOLE:
                row.pop(data.held_out, None)  # it has learned from that class
            rows.setdefault(f"{title}: {score}", []).append(row)
    for title, measure in {"nearest training image": image_distance(train), "brightness": brightness(train)}.items():
        rows[title] = [measured(measure, real, others)]
    return rows


def main(settings: Settings) -> None:
    if not 2 <= settings.count <= 4000 or settings.seeds < 1:
        raise InputError("--count must be 2 to 4000, for which there are test images, and --seeds at least 1")
    check_place(settings.to)
    text, tables = "", dict[str, dict[str, list[Row]]]()
    for name, data in SETS.items():
        rows = tables[data.title] = rows_of(name, data, settings)
        titles = [*rows["brightness"][0], COST]
        lines = [
            [
                title + (seeds_of(len(seeds)) if ":" in title else ""),
                *(spread([row.get(key) for row in seeds], 3 if key != COST else 0) for key in titles),
            ]
            for title, seeds in rows.items()
        ]
        heading = f"AUROC, {data.title}"
        text += page(heading, ["", *titles], lines) if not text else f"\n{heading}\n\n{table(['', *titles], lines)}\n"
    write(settings.to, text, tables)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("density"):
        main(tyro.cli(Settings))
