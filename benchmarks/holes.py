"""f fills holes: error in the hole, and Frechet distance of the filled images, beside other fillers.

    pip install scikit-image opencv-python-headless
    python benchmarks/holes.py --to benchmarks/results/holes

Compared in the same run, on test images of MNIST, Fashion-MNIST and CIFAR-10: f applied eight times and once, and
trained with d(f(x), x) as well; biharmonic filling (scikit-image), Telea's method (OpenCV), and the mean of what is
known. Three kinds of holes: *centre*, a box of half the height and width; *boxes*, two of up to 3/4 of the sides;
*strokes*, one of three lines, up to a fifth of the image wide, as `objective.damage=holes` draws them. A filler gets
what is known of an image and where the hole is; only what it puts into the hole is used.

Error: mean absolute difference in [-1, 1], over all values in holes. FD: Frechet distance of the filled images to the
same images with nothing missing, in multiples of the floor of `naign evaluate`.

f is trained by the recipe of its data set, shorter, without a prior of codes, with `objective.damage=holes` and
`objective.reconstruction=0`. The row with d(f(x), x) is the same network, trained for the same processor time with that
term. On CIFAR-10 f begins with the weights of the whole recipe, and the seconds are those of what it learned of holes.
Runs are kept under runs/tables as table.py's are.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import tyro
from output import spread, table, write_tables
from torch import Tensor
from trained import Task, packed

from naign.data.damage import boxes, known_mean, stroke
from naign.data.dataset import DataConfig
from naign.data.loader import read_split
from naign.data.reader import DataSet
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.frechet import frechet_distance
from naign.evaluate.measures import FLOORS
from naign.model.encoders import choose_encoder
from naign.model.naign import FILLING, NAIGN

HOLES = 250
"""Of each kind but the centre."""
RADIUS = 3
"""Pixels around a point that Telea's method looks at: OpenCV's own example."""
Fill = Callable[[Tensor, Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1], -1 in holes, and masks (m, 1, H, W), true in holes: image i has hole i mod m.

Returns filled images, of which only holes are used.
"""
Row = dict[str, float]
"""Of a filler: "error KIND", "FD KIND" as a multiple of the floor, and for a network the cost of its training."""
KINDS = ("centre", "boxes", "strokes")
COST = "training, processor s"


@dataclass(frozen=True, slots=True)
class Data:
    """A data set and what is trained on it."""

    title: str
    config: str
    images: int
    """That f is trained on."""
    both: int = 0
    """That f is trained on in the same time with d(f(x), x) as a further term; 0: it is not."""
    further: tuple[str, ...] = ()
    """Options of f where it begins with the weights of the whole recipe."""


SETS = {
    "mnist": Data("MNIST", "configs/mnist.yaml", 655_360, both=376_832),
    "fashion_mnist": Data("Fashion-MNIST", "configs/fashion_mnist.yaml", 118_784),
    "cifar10": Data(
        "CIFAR-10",
        "configs/cifar10_cpu.yaml",
        5_120,
        further=("--match.round=1024", "--train.lr=1e-3", "--train.warmup=640"),
    ),
}
OPTIONS = ("--objective.damage=holes", "--objective.reconstruction=0", "--latents.name=gaussian")


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/holes")
    """Where to write, without an ending."""
    train: bool = True
    """Train what is missing; otherwise show what exists."""
    count: int = 2500
    """Test images to fill."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def draw_holes(kind: str, size: torch.Size) -> Tensor:
    """Masks (m, 1, H, W) of a kind of holes, true in them: the same ones in every call."""
    height, width = size
    if kind == "centre":
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        top = height // 4
        left = width // 4
        mask[..., top : height - top, left : width - left] = True
        return mask
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(HOLES, 9, generator=generator)
    mask = stroke(numbers, size)
    if kind == "boxes":
        corners = numbers[:, :8].view(-1, 2, 4)
        mask = boxes(corners, size)
    some = mask.flatten(1).any(1)  # a small one may lie between pixels
    return mask[some]


def in_turn(mask: Tensor, count: int) -> Tensor:
    """Masks (count, 1, H, W): image i has hole i mod m of masks (m, 1, H, W)."""
    return mask[torch.arange(count) % len(mask)]


def biharmonic(images: Tensor, mask: Tensor) -> Tensor:
    """scikit-image's; images that share a hole are its channels, which it fills one by one."""
    from skimage.restoration import inpaint_biharmonic

    filled = images.clone()
    for number, hole in enumerate(mask[: len(images)]):
        part = images[number :: len(mask)]
        channels = inpaint_biharmonic(
            part.flatten(0, 1).double().numpy(),
            hole[0].numpy(),
            channel_axis=0,
        )
        made = torch.from_numpy(channels).view_as(part)
        filled[number :: len(mask)] = made.float()
    return filled


def telea(images: Tensor, mask: Tensor) -> Tensor:
    """OpenCV's, of 8-bit images."""
    import cv2

    pixels = ((images + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).contiguous()
    holes = in_turn(mask, len(images))[:, 0].byte()
    filled = torch.empty_like(pixels)
    for number, image in enumerate(pixels):
        made = cv2.inpaint(
            image.numpy(),
            holes[number].numpy(),
            RADIUS,
            cv2.INPAINT_TELEA,
        )
        filled[number] = torch.from_numpy(made).view_as(image)
    return scaled(filled.permute(0, 3, 1, 2))


def mean(images: Tensor, mask: Tensor) -> Tensor:
    """The mean of what is known of each channel."""
    known = ~in_turn(mask, len(images))
    return known_mean(images, known).expand_as(images)


def network(
    model: NAIGN,
    times: int,
    images: Tensor,
    mask: Tensor,
) -> Tensor:
    """f applied so many times, and what is known put back after each."""
    holes = in_turn(mask, len(images))
    return model.project(images, mask=holes, times=times)


FILLERS: dict[str, Fill] = {
    "biharmonic (scikit-image)": biharmonic,
    "Telea (OpenCV)": telea,
    "mean of what is known": mean,
}


class Examples:
    """Test images (n, C, H, W) in [-1, 1], their features, and the floor of Frechet distances."""

    def __init__(self, path: str, count: int) -> None:
        self.encoder = choose_encoder(DataSet(DataConfig(path=path)).manifest)
        test = scaled(read_split(path, "test")[0])
        train = read_split(path, "train")[0]
        features = self.encoder.features(test)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(train), generator=generator)
        floors = []
        for chosen in order.split(len(test))[:FLOORS]:
            others = self.encoder.features(scaled(train[chosen]))
            floors.append(frechet_distance(others, features))
        self.floor = fmean(floors)
        self.images = test[:count]
        self.features = features[:count]

    def measure(self, fill: Fill) -> Row:
        row: Row = {}
        for kind in KINDS:
            mask = draw_holes(kind, self.images.shape[2:])
            hole = in_turn(mask, len(self.images))
            given = self.images.masked_fill(hole, -1.0)
            filled = torch.where(hole, fill(given, mask), self.images)
            distance = frechet_distance(self.encoder.features(filled), self.features)
            error = (filled - self.images).abs().double().sum()
            missing = hole.sum() * self.images.shape[1]
            row[f"FD {kind}"] = distance / self.floor
            row[f"error {kind}"] = float(error / missing)
        return row


def networks(
    name: str,
    data: Data,
    settings: Settings,
) -> dict[str, list[str]]:
    """Options of the networks that fill holes, by title."""
    path = f"--data.path={packed(f'data/{name}', name)}"
    asked = {"f": [path, *OPTIONS, f"--train.images={data.images}", *data.further]}
    if data.further:
        recipe = Task.of(settings.runs, data.config, [path], 0)
        if settings.train:
            recipe.train()
        asked["f"].append(f"--model.init={recipe.trained.absolute()}")
    if data.both:
        options = [f"--train.images={data.both}", "--objective.reconstruction=1"]
        asked["f with d(f(x), x)"] = [path, *OPTIONS, *options]
    return asked


def rows_of(
    name: str,
    data: Data,
    settings: Settings,
) -> dict[str, Row]:
    """The rows of a table, by title."""
    examples = Examples(packed(f"data/{name}", name), settings.count)
    rows: dict[str, Row] = {}
    for title, options in networks(name, data, settings).items():
        task = Task.of(settings.runs, data.config, options, 0)
        if settings.train:
            task.train()
        if not task.ended or task.diverged:
            continue
        model = NAIGN.from_pretrained(task.folder)
        for way, times in ((f"applied {FILLING} times", FILLING), ("once", 1)):
            row = examples.measure(partial(network, model, times))
            row[COST] = model.metadata["cpu_seconds"]
            rows[f"{title}, {way}"] = row
    for title, fill in FILLERS.items():
        rows[title] = examples.measure(fill)
    return rows


def table_of(rows: dict[str, Row]) -> str:
    columns = [f"{measure} {kind}" for measure in ("FD", "error") for kind in KINDS]
    lines = []
    for title, row in rows.items():
        cells = [spread([row[column]], 3) for column in columns]
        cost = spread([row.get(COST)], 0)
        lines.append([title, *cells, cost])
    titles = [f"{column}, × floor" if column.startswith("FD") else column for column in columns]
    return table(["", *titles, COST], lines)


def main(settings: Settings) -> None:
    if not 100 <= settings.count <= 10_000:
        raise InputError(f"--count is {settings.count}: give 100 to 10,000, as many as there are test images")
    if not all(map(importlib.util.find_spec, ("skimage", "cv2"))):
        raise InputError("other fillers are not installed: pip install scikit-image opencv-python-headless")
    write_tables(
        settings.to,
        "Holes, {}",
        {name: data.title for name, data in SETS.items()},
        lambda name: rows_of(name, SETS[name], settings),
        table_of,
    )


if __name__ == "__main__":
    with exit_on_input_error("holes"):
        main(tyro.cli(Settings))
