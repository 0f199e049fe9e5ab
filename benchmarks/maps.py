"""Where is a picture wrong? Pixel AUROC of the map of |f(x) - x|, by kind of defect, beside other maps.

    python benchmarks/maps.py --to benchmarks/results/maps

Test images of MNIST, Fashion-MNIST and CIFAR-10 get defects at known places. An AUROC is the chance that a changed
pixel of any image scores above an unchanged pixel of any image: 1 is perfect and 0.5 chance. A pixel is changed if a
channel differs by more than CHANGED, so that black pasted on black is no defect. f is that of the recipe and, with a
dense code, that of density.py, whose runs are shared. Runs are kept under runs/tables; docs/energy.md discusses the
result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from density import ALONE, COST, NETWORKS, PATCH, SETS, Data, pasted, place
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor
from trained import FAILED, Task, check_place, page, table, write

from naign.data.damage import degrade
from naign.data.loader import read_split
from naign.data.sources.published import IDX
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.coverage import nearest
from naign.evaluate.density import auroc
from naign.model.naign import NAIGN
from naign.model.scale import scaled

CHANGED = 0.1  # of the range of 2: 13 of 255 levels
SIGMA = 1.0  # pixels: of the Gaussian that smooths a map
RADIUS = 0.75  # pixels: half the width of a scratch
FITTED = 10_000  # training images that the PCA is of
NEAREST = "nearest training image"
COMPONENTS = (4, 8, 16, 32, 64, 128, 256)  # of the PCA
Map = Callable[[Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1] and returns (n, H, W), high for defects."""
Defects = dict[str, tuple[Tensor, Tensor]]
"""Images (n, C, H, W) by kind of defect, and where they are changed, bool (n, H, W)."""
Row = dict[str, list[float]]
"""By kind of defect the AUROC of the map and of the smoothed map; under COST what the training cost."""
ALL = SETS | {"cifar10": Data("CIFAR-10", "fashion_mnist", "", "configs/cifar10_cpu.yaml")}
PLAIN = {"fashion_mnist": 163_840, "cifar10": 57_344}
"""Images that an autoencoder of the recipe's network learns from, where density.py has none; f learns from more."""
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
    """Train what is missing; otherwise the table is of what is there."""
    count: int = 500
    """Test images."""
    images: int = 0
    """Train every network on so many images; 0: as the table has it."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


def scratched(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with a straight scratch of one shade between two random points of the image, at least
    half its side apart.
    """
    count, _, height, width = images.shape
    ends = torch.rand(16, count, 2, 2, generator=generator)
    far = (ends[:, :, 0] - ends[:, :, 1]).norm(dim=2) > 0.5
    ends = ends[far.int().argmax(0), torch.arange(count)] * torch.tensor([height, width])  # the first pair that is
    shade = torch.rand(count, 1, 1, 1, generator=generator) * 2 - 1
    axes = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack(axes, 2).view(1, -1, 2)
    start, along = ends[:, :1], ends[:, 1:] - ends[:, :1]
    share = (((pixels - start) * along).sum(2, keepdim=True) / along.square().sum(2, keepdim=True)).clamp(0, 1)
    distance = (pixels - start - share * along).norm(dim=2).view(count, 1, height, width)
    return torch.where(distance < RADIUS, shade, images)


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with a random square of PATCH pixels a side blurred."""
    corners = torch.randint(images.shape[-1] - PATCH + 1, (len(images), 2, 1), generator=generator)
    distance = torch.arange(images.shape[-1]) - corners
    rows, columns = ((distance >= 0) & (distance < PATCH)).unbind(1)
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], degrade(images, "blur"), images)


def defects(images: Tensor, donors: Tensor, others: Tensor, *, seed: int) -> Defects:
    """Of images (n, C, H, W), with patches of as many others of their set, and of another set."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "patch of another image": pasted(images, donors, generator),
        "patch of another set": pasted(images, others, generator),
        "blurred square": blurred(images, generator),
        "scratch": scratched(images, generator),
        "dead rows": degrade(images, "rows", seed=seed),
    }
    return {kind: (damaged, (damaged - images).abs().amax(1) > CHANGED) for kind, damaged in made.items()}


def measured(score: Map, made: Defects) -> Row:
    """Pixel AUROCs by kind, and their mean over kinds."""
    row = Row()
    for kind, (images, changed) in made.items():
        values = score(images)
        smooth = torch.from_numpy(gaussian_filter(values.numpy(), (0, SIGMA, SIGMA)))
        row[kind] = [auroc(scores[~changed], scores[changed]) for scores in (values, smooth)]
    return row | {"mean": [sum(both) / len(row) for both in zip(*row.values(), strict=True)]}


def pca_map(pca: PCA, count: int) -> Map:
    """Squared difference from the image that the first `count` components keep."""
    mean, basis = torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_[:count])

    def score(images: Tensor) -> Tensor:
        flat = images.flatten(1) - mean
        return (flat - flat @ basis.T @ basis).view_as(images).square().mean(1)

    return score


def image_map(train: Tensor) -> Map:
    """Squared difference from the nearest of the images `train`."""
    return lambda images: (images - train[nearest(images, train)[1]]).square().mean(1)


def best_pca(train: Tensor, held_out: Defects) -> tuple[PCA, int]:
    """A PCA of training images (n, C, H, W), and how many components are best for `held_out`, smoothed or not."""
    pca = PCA(max(COMPONENTS), svd_solver="covariance_eigh").fit(train[:FITTED].flatten(1).numpy())

    def quality(count: int) -> float:
        return max(measured(pca_map(pca, count), held_out)["mean"])

    return pca, max(COMPONENTS, key=quality)


def networks(name: str, data: Data) -> dict[str, tuple[str, list[str]]]:
    """Configuration and options by title."""
    whole, part = f"--data.path={place(name)}", f"--data.path={place(name, data.left_out)}"
    asked = {f"f of {data.recipe}": (data.recipe, [whole])}
    holes = ["--objective.damage=holes", "--objective.reconstruction=0", "--prior.name=gaussian"]
    asked["f of that network, damage=holes"] = (data.recipe, [*holes, f"--train.images={HOLES[name]}", whole])
    if name in PLAIN:
        options = [*ALONE, "--objective.denoising=0", "--objective.reconstruction=1", f"--train.images={PLAIN[name]}"]
        asked["autoencoder of that network"] = (data.recipe, [*options, whole])
    if data.left_out:
        for title, kept in (("f", "denoising autoencoder"), ("autoencoder", "autoencoder")):
            config, chosen = NETWORKS[kept]
            asked[f"{title} with a dense code"] = (config, [*chosen, part])
    return asked


def shuffled(path: str, split: str, *, without: int = -1) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] of a split, in random order, without those of a class."""
    images, labels = read_split(path, split)
    images = images[labels != without]
    return scaled(images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))])


def rows_of(name: str, data: Data, settings: Settings) -> dict[str, Row]:
    """Of a table, by title."""
    count, left_out = settings.count, IDX[name][2].index(data.left_out) if data.left_out else -1
    images, donors, *_ = shuffled(place(name), "test", without=left_out).split(count)
    others, more_others, *_ = shuffled(place(data.other), "test").split(count)
    train = shuffled(place(name, data.left_out), "train")
    made = defects(images, donors, others, seed=0)
    held_out = defects(train[:count], train[count : 2 * count], more_others, seed=1)
    near, rows = image_map(train[2 * count :]), dict[str, Row]()
    changed = [f"--train.images={settings.images}"] * bool(settings.images)
    for title, (config, options) in networks(name, data).items():
        task = Task.of(settings.runs, config, [*options, *changed], 0)
        if settings.train:
            task.train()
        if not task.ended or (task.trained / FAILED).exists():
            continue
        model = NAIGN.from_pretrained(task.folder)
        for named, score in maps_of(title, model, near).items():
            rows[named] = measured(score, made) | {COST: [model.metadata["cpu_seconds"]]}
    pca, best = best_pca(train[2 * count :], held_out)
    plain = {"mean training image": pca_map(pca, 0), f"PCA, {best} components": pca_map(pca, best), NEAREST: near}
    return rows | {title: measured(score, made) for title, score in plain.items()}


def maps_of(title: str, model: NAIGN, near: Map) -> dict[str, Map]:
    """The maps that a network gives, by title; `near` is that of the nearest training image."""
    once = partial(model.energy, map=True)
    if not title.startswith("f "):
        return {title: once}
    maps: dict[str, Map] = {title: once, f"{title}, applied twice": partial(model.energy, map=True, times=2)}
    return maps | ({f"{title} + {NEAREST}": lambda x: once(x) + near(x)} if title.startswith("f of") else {})


def text_of(tables: dict[str, dict[str, Row]]) -> str:
    """In Markdown, of each data set a table."""
    text = ""
    for title, rows in tables.items():
        kinds = [*next(reversed(rows.values())), COST]
        lines = [
            [
                name,
                *(" / ".join(f"{value:.{0 if kind == COST else 3}f}" for value in row.get(kind, ())) for kind in kinds),
            ]
            for name, row in rows.items()
        ]
        heading = f"Pixel AUROC, {title}: of the map / of the smoothed map"
        text += page(heading, ["", *kinds], lines) if not text else f"\n{heading}\n\n{table(['', *kinds], lines)}\n"
    return text


def main(settings: Settings) -> None:
    if not 2 <= settings.count <= 4000 or not {*settings.sets} <= {*ALL}:
        raise InputError(f"--count must be 2 to 4000, for which there are test images, and --sets of {', '.join(ALL)}")
    check_place(settings.to)
    tables = {ALL[name].title: rows_of(name, ALL[name], settings) for name in settings.sets}
    text = text_of(tables)
    write(settings.to, text, tables)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("maps"):
        main(tyro.cli(Settings))
