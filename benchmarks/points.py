"""Sets of points in the plane, where truth is known: modes, density and the distance to the data.

    python benchmarks/points.py --to benchmarks/results/points

Compared in the same run: configs/toy2d.yaml on four sets, and with some of its settings changed. Of 10,000 samples: the
modes, or arms, that have at least a fifth of their share; and the share of samples, and of f of them, near the data
(four deviations of a Gaussian; 0.08 from a spiral, 0.02 from the ring). Spearman's correlation of -E with the log
density, for the Gaussians: on a grid within [-1.2, 1.2]^2, most of which is off the data, and on the data. The root of
the energy (the sum over both coordinates) against the true distance to the curve, on points within 0.3 of it: the rank
correlation, and the error as a share of the distance where that is above 0.05.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from output import ROOT, check_place, page, seeds_of, spread, write
from scipy.stats import spearmanr
from torch import Tensor
from trained import Task, measure_all

from naign.data.format.writer import pack
from naign.data.sources import toys
from naign.data.sources.source import Source, numbered
from naign.errors import InputError, exit_on_input_error
from naign.model.naign import NAIGN

CONFIG = "configs/toy2d.yaml"
Points = npt.NDArray[Any]  # (count, 2) float64
Labels = npt.NDArray[np.int64]  # (count,)
SAMPLES = 10_000
Numbers = dict[str, float]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the table."""

    to: Path = Path("benchmarks/results/points")
    """Where to write, without an ending."""
    seeds: int = 5
    """Seeds of each set."""
    jobs: int = 2
    """Runs at a time."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def shares(
    places: Callable[[Tensor], tuple[Tensor, Tensor]],
    model: NAIGN,
    parts: int,
) -> Numbers:
    """Parts that samples cover, and how many samples are near the data after f is applied once and twice."""
    samples = model.sample(SAMPLES)
    good, part = places(samples)
    share = torch.bincount(part[good], minlength=parts) / len(samples)
    twice, _ = places(model.project(samples))
    return {
        "modes": float((share > 0.2 / parts).sum()),
        "of": parts,
        "near": float(good.float().mean()),
        "twice": float(twice.float().mean()),
    }


@dataclass(frozen=True, slots=True)
class Mixture:
    """Normals alike in weight and deviation."""

    centres: Tensor
    deviation: float

    def log_density(self, points: Tensor) -> Tensor:
        distances = torch.cdist(points.double(), self.centres.double())
        exponents = -distances.square() / (2 * self.deviation**2)
        return torch.logsumexp(exponents, dim=1)

    def places(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each point is near the data, and its part of the data."""
        away, mode = torch.cdist(points, self.centres).min(1)
        return away < 4 * self.deviation, mode

    def judge(self, model: NAIGN) -> Numbers:
        axis = torch.linspace(-1.2, 1.2, 121)
        generator = torch.Generator().manual_seed(0)
        modes = torch.randint(len(self.centres), [SAMPLES], generator=generator)
        noise = torch.randn(SAMPLES, 2, generator=generator)
        data = self.centres[modes] + self.deviation * noise
        return {
            **shares(self.places, model, len(self.centres)),
            "log p": self.rank(model, torch.cartesian_prod(axis, axis)),
            "log p, data": self.rank(model, data),
        }

    def rank(self, model: NAIGN, points: Tensor) -> float:
        """Spearman's correlation of -E with the log density."""
        energies = model.energy(points)
        return correlation(-energies, self.log_density(points))


@dataclass(frozen=True, slots=True)
class Curves:
    """One curve a part."""

    parts: Tensor
    """(parts, n, 2): points so dense that the nearest is as good as the curve."""
    near: float

    def places(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each point is near the data, and its part of the data."""
        distances = [torch.cdist(points, part).min(1).values for part in self.parts]
        away, part = torch.stack(distances).min(0)
        return away < self.near, part

    def judge(self, model: NAIGN) -> Numbers:
        generator = torch.Generator().manual_seed(0)
        flat = self.parts.flatten(0, 1)
        rows = torch.randint(len(flat), [4000], generator=generator)
        angle = 2 * math.pi * torch.rand(4000, generator=generator)
        away = 0.3 * torch.rand(4000, generator=generator)
        points = flat[rows] + away[:, None] * on_circle(angle)
        truth = torch.cdist(points, flat).min(1).values
        found = (model.energy(points) * 2).sqrt()
        off = truth > 0.05
        errors = (found - truth).abs() / truth
        return {
            **shares(self.places, model, len(self.parts)),
            "rank": correlation(found, truth),
            "error": float(errors[off].mean()),
        }


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    return float(spearmanr(one.numpy(), other.numpy())[0])


def on_circle(angle: Tensor) -> Tensor:
    """Points (n, 2) of the unit circle at angles (n,)."""
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def ring() -> Curves:
    angle = torch.linspace(0, 2 * math.pi, 4001)[:-1]
    return Curves(0.7 * on_circle(angle)[None], 0.02)


def spirals() -> Curves:
    root = torch.linspace(0, 1, 2000)
    radius = 0.9 * root[:, None]
    angle = 3 * math.pi * root
    arms = [radius * on_circle(angle), radius * on_circle(angle + math.pi)]
    return Curves(torch.stack(arms), 0.08)


def grid() -> Mixture:
    axis = torch.arange(5) * 0.4 - 0.8
    return Mixture(torch.cartesian_prod(axis, axis), 0.03)


def wheel() -> Mixture:
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(0.8 * on_circle(angle), 0.06)


TRUTHS: dict[str, Callable[[], Mixture | Curves]] = {
    "gaussians": wheel,
    "gaussians25": grid,
    "spirals": spirals,
    "ring": ring,
}
ROWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TRUTHS, ()),
    "gaussians25, 4 octaves": ("--model.octaves=4",),
    "spirals, 5 octaves": ("--model.octaves=5",),
    "ring, noise up to 0.1": ("--objective.noise=0.1",),
}
"""With the options in which they differ; the first word is the set."""
COLUMNS = {
    "modes": ("modes covered", 1),
    "near": ("f(z) near the data", 3),
    "twice": ("f(f(z))", 3),
    "log p": ("rank of -E with log p, in the plane", 3),
    "log p, data": ("on the data", 3),
    "rank": ("rank of √E with distance", 3),
    "error": ("error of √E, × distance", 3),
}
"""Title and digits of a number."""


def _spirals(label: Labels, random: np.random.Generator) -> Points:
    """Two arms, r = 0.9 sqrt(u), angle 3 pi sqrt(u) (+ pi), u uniform."""
    root = np.sqrt(random.uniform(0, 1, len(label)))
    radius = 0.9 * root[:, None]
    angle = 3 * np.pi * root + np.pi * label
    return _circle(radius, angle)


def _gaussians(label: Labels, random: np.random.Generator) -> Points:
    """Eight centres evenly on the circle of radius 0.8."""
    return _circle(0.8, 2 * np.pi * label / 8)


def _gaussians25(label: Labels, random: np.random.Generator) -> Points:
    """25 centres on a grid of 5 x 5 that reaches from -0.8 to 0.8."""
    cells = np.stack([label % 5, label // 5], axis=1)
    return 0.4 * cells - 0.8


def _ring(label: Labels, random: np.random.Generator) -> Points:
    """The circle of radius 0.7 itself, angle uniform: a manifold whose distance is known everywhere."""
    angle = random.uniform(0, 2 * np.pi, len(label))
    return _circle(0.7, angle)


def _circle(radius: float | Points, angle: Points) -> Points:
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points: Points = radius * directions
    return points


Place = Callable[[Labels, np.random.Generator], Points]

DISTRIBUTIONS: dict[str, tuple[int, float, Place]] = {
    "spirals": (2, 0.02, _spirals),
    "gaussians": (8, 0.06, _gaussians),
    "gaussians25": (25, 0.03, _gaussians25),
    "ring": (1, 0.0, _ring),
}
"""Number of labels (parts, alike in weight), deviation of the normal noise that is added, and where points lie."""


def draw(name: str, count: int, *, seed: int) -> tuple[npt.NDArray[np.float32], Labels]:
    """`count` points (count, 2) float32 and the part each came from, (count,) int64."""
    parts, deviation, place = DISTRIBUTIONS[name]
    key = np.array([seed % 2**64, toys.STREAM], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    labels = random.integers(parts, size=count)
    points = place(labels, random)
    points = points + random.normal(0, deviation, (count, 2))
    return points.astype(np.float32), labels


def pack_points(name: str) -> str:
    """The folder, in the repository, of 50,000 points to train and 10,000 to test."""
    points, labels = draw(name, toys.TRAIN + toys.TEST, seed=0)
    splits = {}
    for split, part in (("train", slice(toys.TRAIN)), ("test", slice(toys.TRAIN, None))):
        splits[split] = numbered(split, points[part], labels[part])
    parts = DISTRIBUTIONS[name][0]
    source = Source(
        name=f"toy2d:{name}",
        kind="point",
        shape=(2,),
        labels=tuple(f"part {number}" for number in range(parts)),
        splits=splits,
    )
    path = f"data/toy2d_{name}"
    pack(source, str(ROOT / path))
    return path


def main(settings: Settings) -> None:
    if settings.seeds < 1 or settings.jobs < 1:
        raise InputError(f"--seeds {settings.seeds} and --jobs {settings.jobs} must be at least 1")
    check_place(settings.to)
    tasks: dict[str, Task] = {}
    owners: dict[str, str] = {}
    for seed in range(settings.seeds):
        for name, options in ROWS.items():
            law = name.split(",")[0]
            given = [f"--data.path={pack_points(law)}", *options]
            task = Task.of(settings.runs, CONFIG, given, seed)
            tasks[task.folder.name] = task
            owners[task.folder.name] = name
    found: dict[str, list[Numbers]] = {name: [] for name in ROWS}
    lost: Counter[str] = Counter()
    for key, record in measure_all(tasks, settings.jobs):
        name = owners[key]
        if "failed" in record:
            lost[name] += 1
            continue
        model = NAIGN.from_pretrained(tasks[key].folder)
        truth = TRUTHS[name.split(",")[0]]()
        found[name].append(truth.judge(model))
    text = page_of(found, lost)
    write(settings.to, text, found)
    print(text)


def page_of(found: dict[str, list[Numbers]], lost: Counter[str]) -> str:
    rows = []
    for name, records in found.items():
        cells = []
        for key, (_, digits) in COLUMNS.items():
            cells.append(spread([record.get(key) for record in records], digits))
        if records:
            cells[0] += f" of {records[0]['of']:.0f}"
        title = name + seeds_of(len(records), lost[name])
        rows.append([title, *cells])
    titles = [title for title, _ in COLUMNS.values()]
    return page("Points in the plane", ["", *titles], rows)


if __name__ == "__main__":
    with exit_on_input_error("points"):
        main(tyro.cli(Settings))
