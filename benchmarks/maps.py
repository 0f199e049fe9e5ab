"""|f(x) - x| shows where a picture is wrong. Pixel AUROC by kind of defect, beside other maps.

    python benchmarks/maps.py --to benchmarks/results/maps

Test images of MNIST, Fashion-MNIST and CIFAR-10 get defects at known places. An AUROC is the chance that a changed
pixel of any image scores above an unchanged pixel of any image: 1 is perfect, 0.5 chance. A pixel is changed if a
channel differs by more than CHANGED, so black pasted on black is not a defect. Compared in the same run: f of the
recipe; trained on holes; with a dense code; an autoencoder; and the nearest training image. Runs are shared with
density.py. docs/evaluation.md discusses the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import tyro
from density import ALONE, COST, NEAREST, PATCH, RECIPE, SETS, Data, auroc, pasted, place
from output import table, write_tables
from scipy.ndimage import gaussian_filter
from torch import Tensor
from trained import Task

from naign.data.damage import degrade
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.coverage import nearest
from naign.model.naign import NAIGN

CHANGED = 0.1
"""Of the range of 2: 13 of 255 levels."""
SIGMA = 1.0
"""Pixels: of the Gaussian that smooths a map."""
RADIUS = 0.75
"""Pixels: half the width of a scratch."""
Map = Callable[[Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1] and returns (n, H, W), high for defects."""
Defects = dict[str, tuple[Tensor, Tensor]]
"""Images (n, C, H, W) by kind of defect, and where they are changed, bool (n, H, W)."""
Row = dict[str, list[float]]
"""By kind of defect the AUROC of the map and of the smoothed map; under COST the cost of the training."""
ALL = SETS | {"cifar10": Data("CIFAR-10", "fashion_mnist", "", "configs/cifar10_cpu.yaml")}
HOLES = {"mnist": 655_360, "fashion_mnist": 118_784, "cifar10": 57_344}
"""Images that f learns from with damage=holes, and without a prior of codes."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/maps")
    """Where to write, without an ending."""
    sets: tuple[str, ...] = tuple(ALL)
    """Data sets."""
    train: bool = True
    """Train what is missing; otherwise show what exists."""
    count: int = 500
    """Test images."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def scratched(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with a straight scratch of one shade between two points half its side or more apart."""
    count, _, height, width = images.shape
    ends = torch.rand(16, count, 2, 2, generator=generator)
    between = ends[:, :, 0] - ends[:, :, 1]
    apart = between.norm(dim=2)
    first = (apart > 0.5).int().argmax(0)
    ends = ends[first, torch.arange(count)]
    ends = ends * torch.tensor([height, width])
    shade = torch.rand(count, 1, 1, 1, generator=generator)
    rows = torch.arange(height) + 0.5
    columns = torch.arange(width) + 0.5
    pixels = torch.cartesian_prod(rows, columns)[None]
    start = ends[:, :1]
    along = ends[:, 1:] - start
    product = ((pixels - start) * along).sum(2, keepdim=True)
    share = product / along.square().sum(2, keepdim=True)
    nearest_point = start + share.clamp(0, 1) * along
    distance = (pixels - nearest_point).norm(dim=2)
    inside = (distance < RADIUS).view(count, 1, height, width)
    return torch.where(inside, shade * 2 - 1, images)


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with a random square of PATCH pixels a side blurred."""
    side = images.shape[-1]
    corners = torch.randint(side - PATCH + 1, (len(images), 2, 1), generator=generator)
    distance = torch.arange(side) - corners
    within = (distance >= 0) & (distance < PATCH)
    rows, columns = within.unbind(1)
    square = rows[:, :, None] & columns[:, None]
    blurry = degrade(images, "blur")
    return torch.where(square[:, None], blurry, images)


def defects(
    images: Tensor,
    donors: Tensor,
    others: Tensor,
    *,
    seed: int,
) -> Defects:
    """Of images (n, C, H, W), with patches of as many others of their set, and of another set."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "patch of another image": pasted(images, donors, generator),
        "patch of another set": pasted(images, others, generator),
        "blurred square": blurred(images, generator),
        "scratch": scratched(images, generator),
        "dead rows": degrade(images, "rows", seed=seed),
    }
    found = {}
    for kind, damaged in made.items():
        difference = (damaged - images).abs().amax(1)
        found[kind] = (damaged, difference > CHANGED)
    return found


def measured(score: Map, made: Defects) -> Row:
    """Pixel AUROCs by kind, and their mean over kinds."""
    row: Row = {}
    for kind, (images, changed) in made.items():
        values = score(images)
        smoothed = gaussian_filter(values.numpy(), (0, SIGMA, SIGMA))
        row[kind] = []
        for scores in (values, torch.from_numpy(smoothed)):
            row[kind].append(auroc(scores[~changed], scores[changed]))
    plain, smooth = zip(*row.values(), strict=True)
    row["mean"] = [fmean(plain), fmean(smooth)]
    return row


def image_map(train: Tensor) -> Map:
    """Squared difference from the nearest of the images `train`."""

    def score(images: Tensor) -> Tensor:
        _, rows = nearest(images, train)
        return (images - train[rows]).square().mean(1)

    return score


def networks(name: str, data: Data) -> dict[str, tuple[str, list[str]]]:
    """Configuration and options by title."""
    whole = f"--data.path={place(name)}"
    holes = ["--objective.damage=holes", "--objective.reconstruction=0", "--latents.name=gaussian"]
    asked = {f"f of {data.recipe}": (data.recipe, [whole])}
    asked["f of that network, damage=holes"] = (data.recipe, [*holes, f"--train.images={HOLES[name]}", whole])
    if data.left_out:
        if data.recipe != RECIPE:
            asked["f with a dense code"] = (RECIPE, [whole])
        plain = [*ALONE, "--objective.denoising=0", "--objective.reconstruction=1", "--train.images=325_632"]
        asked["autoencoder with a dense code"] = (RECIPE, [*plain, whole])
    return asked


def maps_of(
    title: str,
    model: NAIGN,
    near: Map,
) -> dict[str, Map]:
    """The maps that a network gives, by title; `near` is that of the nearest training image."""
    once = partial(model.energy, map=True)
    maps: dict[str, Map] = {title: once}
    if title.startswith("f "):
        maps[f"{title}, applied twice"] = partial(model.energy, map=True, times=2)
    if title.startswith("f of"):
        maps[f"{title} + {NEAREST}"] = lambda images: once(images) + near(images)
    return maps


def shuffled(path: str, split: str) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] of a split, in random order."""
    images, _ = read_split(path, split)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    return scaled(images[order])


def rows_of(
    name: str,
    data: Data,
    settings: Settings,
) -> dict[str, Row]:
    """The rows of a table, by title."""
    count = settings.count
    test = shuffled(place(name), "test")
    images = test[:count]
    donors = test[count : 2 * count]
    others = shuffled(place(data.other), "test")[:count]
    train = shuffled(place(name), "train")
    made = defects(images, donors, others, seed=0)
    near = image_map(train)
    rows: dict[str, Row] = {}
    for title, (config, options) in networks(name, data).items():
        task = Task.of(settings.runs, config, options, 0)
        if settings.train:
            task.train()
        if not task.ended or task.diverged:
            continue
        model = NAIGN.from_pretrained(task.folder)
        for map_title, score in maps_of(title, model, near).items():
            rows[map_title] = measured(score, made)
            rows[map_title][COST] = [model.metadata["cpu_seconds"]]
    rows[NEAREST] = measured(near, made)
    return rows


def table_of(rows: dict[str, Row]) -> str:
    kinds = [*rows[NEAREST], COST]
    lines = []
    for name, row in rows.items():
        cells = []
        for kind in kinds:
            digits = 0 if kind == COST else 3
            both = [f"{value:.{digits}f}" for value in row.get(kind, ())]
            cells.append(" / ".join(both))
        lines.append([name, *cells])
    return table(["", *kinds], lines)


def main(settings: Settings) -> None:
    if not 2 <= settings.count <= 4000 or not {*settings.sets} <= {*ALL}:
        raise InputError(f"--count must be 2 to 4000, for which there are test images, and --sets of {', '.join(ALL)}")
    write_tables(
        settings.to,
        "Pixel AUROC, {}: of the map / of the smoothed map",
        {name: ALL[name].title for name in settings.sets},
        lambda name: rows_of(name, ALL[name], settings),
        table_of,
    )


if __name__ == "__main__":
    with exit_on_input_error("maps"):
        main(tyro.cli(Settings))
