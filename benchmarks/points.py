"""Sets of points in the plane, where truth is known: modes, density and the distance to the data.

    python benchmarks/points.py --to benchmarks/results/points

One network a set and seed, from configs/toy2d.yaml, and with some of its settings changed. Of 10,000 samples: the
modes, or arms, that have at least a fifth of their share, which samples all over the plane would have as well; so
beside it the share of samples, and of f of them, near the data (four deviations of a Gaussian; 0.08 from a spiral, 0.02
from the ring). Spearman's correlation of -E with the log density, for the Gaussians: on a grid within [-1.2, 1.2]^2,
most of which is off the data, and on draws of the law itself, where a residual is not bound to know dense from sparse.
The root of the energy (the sum over both coordinates) against the true distance to the curve, on points within 0.3 of
it: the rank correlation, and the error as a share of the distance where that is above 0.05.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from trained import Task, check_place, measure_all, packed, page, seeds_of, spread, write

from naign.cli.files import save
from naign.errors import InputError, exit_on_input_error
from naign.model.naign import NAIGN

CONFIG = "configs/toy2d.yaml"
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
    images: int = 0
    """Train on so many points; 0: as the configuration says."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


def shares(places: Callable[[Tensor], tuple[Tensor, Tensor]], model: NAIGN, parts: int) -> Numbers:
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
        squares = torch.cdist(points.double(), self.centres.double()).square()
        return torch.logsumexp(-squares / (2 * self.deviation**2), dim=1)

    def places(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each point is near the data, and its part of the data."""
        away, mode = torch.cdist(points, self.centres).min(1)
        return away < 4 * self.deviation, mode

    def judge(self, model: NAIGN) -> Numbers:
        axis = torch.linspace(-1.2, 1.2, 121)
        grid = torch.cartesian_prod(axis, axis)
        generator = torch.Generator().manual_seed(0)
        spot = self.centres[torch.randint(len(self.centres), (SAMPLES,), generator=generator)]
        data = spot + self.deviation * torch.randn(SAMPLES, 2, generator=generator)
        ranks = {name: self.rank(model, points) for name, points in {"log p": grid, "log p, data": data}.items()}
        return shares(self.places, model, len(self.centres)) | ranks

    def rank(self, model: NAIGN, points: Tensor) -> float:
        """Spearman's correlation of -E with the log density."""
        return float(spearmanr(-model.energy(points).numpy(), self.log_density(points).numpy())[0])


@dataclass(frozen=True, slots=True)
class Curves:
    """One curve a part."""

    parts: Tensor
    """(parts, n, 2): points so dense that the nearest is as good as the curve."""
    near: float

    def places(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each point is near the data, and its part of the data."""
        away, part = torch.stack([torch.cdist(points, part).min(1).values for part in self.parts]).min(0)
        return away < self.near, part

    def judge(self, model: NAIGN) -> Numbers:
        generator = torch.Generator().manual_seed(0)
        flat = self.parts.flatten(0, 1)
        start = flat[torch.randint(len(flat), (4000,), generator=generator)]
        angle = 2 * math.pi * torch.rand(4000, generator=generator)
        away = 0.3 * torch.rand(4000, generator=generator)
        points = start + away[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        truth = torch.cdist(points, flat).min(1).values
        found = (model.energy(points) * 2).sqrt()
        off = truth > 0.05
        error = ((found - truth).abs() / truth)[off].mean()
        rank = float(spearmanr(found.numpy(), truth.numpy())[0])
        return shares(self.places, model, len(self.parts)) | {"rank": rank, "error": float(error)}


def ring() -> Curves:
    angle = torch.linspace(0, 2 * math.pi, 4001)[:-1]
    return Curves(0.7 * torch.stack([angle.cos(), angle.sin()], dim=1)[None], 0.02)


def spirals() -> Curves:
    root = torch.linspace(0, 1, 2000)
    arms = [3 * math.pi * root + math.pi * arm for arm in range(2)]
    return Curves(torch.stack([0.9 * root[:, None] * torch.stack([a.cos(), a.sin()], dim=1) for a in arms]), 0.08)


def grid() -> Mixture:
    axis = torch.arange(5) * 0.4 - 0.8
    return Mixture(torch.cartesian_prod(axis, axis), 0.03)


def wheel() -> Mixture:
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(0.8 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.06)


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
    "ring, nearest of a pool x 4": ("--match.assignment=free", "--match.ratio=4"),
}
"""With the options in which they differ; the first word is the set."""


def montage(folders: list[Path]) -> Image.Image:
    """One row an evaluation: how far f moves a point of the plane, the test data, f(z) and f(f(z))."""
    lines = list[Image.Image]()
    for folder in folders:
        parts = [Image.open(folder / f"{name}.png").convert("RGB") for name in ("distance", "samples")]
        height = max(part.height for part in parts)
        line = Image.new("RGB", (sum(part.width for part in parts), height), "white")
        for number, part in enumerate(parts):
            line.paste(part, (parts[0].width * number, height - part.height))
        lines.append(line)
    whole = Image.new("RGB", (max(line.width for line in lines), sum(line.height for line in lines)), "white")
    top = 0
    for line in lines:
        whole.paste(line, (0, top))
        top += line.height
    return whole


def main(settings: Settings) -> None:
    if settings.seeds < 1 or settings.jobs < 1:
        raise InputError(f"--seeds {settings.seeds} and --jobs {settings.jobs} must be at least 1")
    check_place(settings.to)
    tasks, owners = dict[str, Task](), dict[str, str]()
    for seed in range(settings.seeds):
        for name, own in ROWS.items():
            law = name.split(",")[0]
            path = packed(f"data/toy2d_{law}", f"toy2d:{law}")
            options = [f"--data.path={path}", *own, *([f"--train.images={settings.images}"] * bool(settings.images))]
            task = Task.of(settings.runs, CONFIG, options, seed)
            tasks[task.folder.name], owners[task.folder.name] = task, name
    found: dict[str, list[Numbers]] = {name: [] for name in ROWS}
    lost = Counter[str]()
    for key, record in measure_all(tasks, settings.jobs):
        if "failed" in record:
            lost[owners[key]] += 1
        else:
            model = NAIGN.from_pretrained(tasks[key].folder)
            found[owners[key]].append(TRUTHS[owners[key].split(",")[0]]().judge(model))
    titles = {"modes": 1, "near": 3, "twice": 3, "log p": 3, "log p, data": 3, "rank": 3, "error": 3}
    rows = []
    for name, records in found.items():
        cells = [spread([record[t] for record in records if t in record], digits) for t, digits in titles.items()]
        cells[0] += f" of {records[0]['of']:.0f}" * bool(records)
        rows.append([name + seeds_of(len(records), lost[name]), *cells])
    head = [
        "",
        "modes covered",
        "f(z) near the data",
        "f(f(z))",
        "rank of -E with log p, in the plane",
        "on the data",
        "rank of √E with distance",
        "error of √E, × distance",
    ]
    text = page("Points in the plane", head, rows)
    write(settings.to, text, found)
    first = [key for key, name in owners.items() if name in TRUTHS and tasks[key].measured][: len(TRUTHS)]
    if first:
        save(montage([settings.runs / key / "evaluation" for key in first]), settings.to.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("points"):
        main(tyro.cli(Settings))
