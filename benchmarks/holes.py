"""Filling holes: f beside other fillers, by the error in the hole and the Frechet distance of the filled images.

    pip install scikit-image opencv-python-headless
    python benchmarks/holes.py --to benchmarks/results/holes

MNIST, Fashion-MNIST and CIFAR-10, test split. Three kinds of holes: *centre*, a box of half the height and half the
width; *boxes*, two of up to 3/4 of the sides; *strokes*, one of three lines, up to a fifth of the image wide. Boxes and
strokes are drawn as `objective.damage=holes` draws them, HOLES of each kind, which the images have in turn. A filler is
given what is known of an image and where the hole is; only what it says of the hole is used.

Error: mean absolute difference from the image, in [-1, 1], over all values in holes. FD: Frechet distance of the filled
images to the same images with nothing missing, 0 where every pixel is guessed, on the encoder and in multiples of the
floor of `naign evaluate`: the distance of 10,000 training images to all test images.

f is trained by the recipe of its data set, shorter, without a prior of codes, with `objective.damage=holes` and
`objective.reconstruction=0`: by d(f(damaged x), x) alone, of which the holes leave some x whole. It is a denoising
autoencoder, then, and its row *once* is how one is used. The rows with d(f(x), x) are of the same network, trained for
the same processor time with that term as well. On CIFAR-10 f begins with the weights of the whole recipe, and the
seconds are those of what it learned of holes. Runs are kept under runs/tables as table.py's are.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import tyro
from torch import Tensor
from trained import FAILED, Task, check_place, packed, page, spread, table, write

from naign.data.damage import boxes, known_mean, stroke
from naign.data.dataset import DataConfig
from naign.data.loader import read_split
from naign.data.mixing import DataSets
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.frechet import frechet_distance
from naign.evaluate.measures import FLOORS
from naign.model.encoders import choose_encoder
from naign.model.naign import FILLING, NAIGN
from naign.model.scale import scaled
from naign.storage.local import write_atomically

HOLES = 250
"""Of each kind but the centre."""
RADIUS = 3
"""Pixels around a point that Telea's method looks at: OpenCV's own example."""
Fill = Callable[[Tensor, Tensor], Tensor]
"""Takes images (n, C, H, W) in [-1, 1] and a mask (m, 1, H, W), true in holes: image i has hole i mod m. Returns filled
images, of which what is in holes counts. What is in holes of the given images is not looked at."""


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
    """Options of f where it begins with what the whole recipe has made."""


SETS = {
    "mnist": Data("MNIST", "configs/mnist.yaml", 655_360, 376_832),
    "fashion_mnist": Data("Fashion-MNIST", "configs/fashion_mnist.yaml", 118_784),
    "cifar10": Data(
        "CIFAR-10",
        "configs/cifar10_cpu.yaml",
        5_120,
        further=("--match.round=1024", "--train.lr=1e-3", "--train.warmup=640"),
    ),
}
OPTIONS = ("--objective.damage=holes", "--objective.reconstruction=0", "--prior.name=gaussian")


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/holes")
    """Where to write, without an ending."""
    train: bool = True
    """Train what is missing; otherwise the table is of what is there."""
    count: int = 2500
    """Test images to fill."""
    images: int = 0
    """Train every network on so many images; 0: as the table has it."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


def draw_holes(kind: str, size: torch.Size) -> Tensor:
    """Masks (m, 1, H, W) of a kind of holes, true in them: the same ones in every call."""
    height, width = size
    if kind == "centre":
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        return mask
    numbers = torch.rand(HOLES, 9, generator=torch.Generator().manual_seed(0))
    mask = stroke(numbers, size) if kind == "strokes" else boxes(numbers[:, :8].view(-1, 2, 4), size)
    return mask[mask.flatten(1).any(1)]  # a small one may lie between pixels


def in_turn(mask: Tensor, count: int) -> Tensor:
    """Masks (count, 1, H, W): image i has hole i mod m of masks (m, 1, H, W)."""
    return mask[torch.arange(count) % len(mask)]


def biharmonic(images: Tensor, mask: Tensor) -> Tensor:
    """scikit-image's, as it is; images that share a hole are its channels, which it fills one by one."""
    from skimage.restoration import inpaint_biharmonic

    filled = images.clone()
    for number, hole in enumerate(mask[: len(images)]):
        part = images[number :: len(mask)]
        channels = inpaint_biharmonic(part.flatten(0, 1).double().numpy(), hole[0].numpy(), channel_axis=0)
        filled[number :: len(mask)] = torch.from_numpy(channels).view_as(part).float()
    return filled


def telea(images: Tensor, mask: Tensor) -> Tensor:
    """OpenCV's, of 8-bit images."""
    import cv2

    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    holes = mask[:, 0].byte().numpy()
    filled = [
        cv2.inpaint(image, holes[number % len(holes)], RADIUS, cv2.INPAINT_TELEA) for number, image in enumerate(pixels)
    ]
    return scaled(torch.from_numpy(np.stack(filled).reshape(pixels.shape)).permute(0, 3, 1, 2))


def mean(images: Tensor, mask: Tensor) -> Tensor:
    """The mean of what is known of each channel."""
    return known_mean(images, ~in_turn(mask, len(images))).expand_as(images)


def network(model: NAIGN, times: int) -> Fill:
    """f applied so many times, and what is known put back after each."""
    return lambda images, mask: model.project(images, mask=in_turn(mask, len(images)), times=times)


FILLERS: dict[str, Fill] = {
    "biharmonic (scikit-image)": biharmonic,
    "Telea (OpenCV)": telea,
    "mean of what is known": mean,
}
Row = dict[str, float]
"""Of a filler: "error KIND", "FD KIND" as a multiple of the floor, and of a network what its training cost."""
KINDS = ("centre", "boxes", "strokes")
COLUMNS = [f"{measure} {kind}" for measure in ("FD", "error") for kind in KINDS]
COST = "training, processor s"


class Examples:
    """Test images (n, C, H, W) in [-1, 1], their features, and the floor of Frechet distances."""

    def __init__(self, path: str, count: int) -> None:
        self.encoder = choose_encoder(DataSets(DataConfig(path=path)).manifest)
        test = scaled(read_split(path, "test")[0])
        train, features = read_split(path, "train")[0], self.encoder.features(test)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        draws = (scaled(train[chosen]) for chosen in order.split(len(test))[:FLOORS])
        self.floor = fmean(frechet_distance(self.encoder.features(part), features) for part in draws)
        self.images, self.features = test[:count], features[:count]

    def measure(self, fill: Fill) -> Row:
        row = Row()
        for kind in KINDS:
            mask = draw_holes(kind, self.images.shape[2:])
            hole = in_turn(mask, len(self.images))
            filled = torch.where(hole, fill(self.images.masked_fill(hole, -1.0), mask), self.images)
            missing = hole.sum() * self.images.shape[1]
            row[f"FD {kind}"] = frechet_distance(self.encoder.features(filled), self.features) / self.floor
            row[f"error {kind}"] = float((filled - self.images).abs().double().sum() / missing)
        return row


def of_network(task: Task, times: int, examples: Examples) -> Row:
    """Its row, which is kept beside the run; {} of one that diverged."""
    if (task.trained / FAILED).exists():
        return {}
    file = task.folder / f"holes-{len(examples.images)}-{times}.json"
    if not file.exists():
        model = NAIGN.from_pretrained(task.folder)
        row = {COST: model.metadata["cpu_seconds"]} | examples.measure(network(model, times))
        write_atomically(file, json.dumps(row, indent=1) + "\n")
    kept: Row = json.loads(file.read_text())
    return kept


def rows_of(name: str, data: Data, settings: Settings) -> dict[str, Row]:
    """Of a table, by title."""
    path = packed(f"data/{name}", name)
    examples, rows = Examples(path, settings.count), dict[str, Row]()
    asked = {"f": [f"--train.images={settings.images or data.images}", *data.further]}
    if data.further:
        recipe = Task.of(settings.runs, data.config, [f"--data.path={path}"], 0)
        if settings.train:
            recipe.train()
        asked["f"].append(f"--model.init={recipe.trained.absolute()}")
    if data.both:
        asked["f with d(f(x), x)"] = [f"--train.images={settings.images or data.both}", "--objective.reconstruction=1"]
    for title, options in asked.items():
        task = Task.of(settings.runs, data.config, [*OPTIONS, f"--data.path={path}", *options], 0)
        if settings.train:
            task.train()
        if task.ended:
            for times, way in ((FILLING, f"applied {FILLING} times"), (1, "once: a denoising autoencoder")):
                rows[f"{title}, {way}"] = of_network(task, times, examples)
    return rows | {title: examples.measure(fill) for title, fill in FILLERS.items()}


def main(settings: Settings) -> None:
    if not 100 <= settings.count <= 10_000:
        raise InputError(f"--count is {settings.count}: give 100 to 10,000, as many as there are test images")
    if not all(map(importlib.util.find_spec, ("skimage", "cv2"))):
        raise InputError("other fillers are not installed: pip install scikit-image opencv-python-headless")
    check_place(settings.to)
    text, tables = "", dict[str, dict[str, Row]]()
    for name, data in SETS.items():
        rows = tables[data.title] = rows_of(name, data, settings)
        titles = ["", *(f"{column}, × floor" if column.startswith("FD") else column for column in COLUMNS), COST]
        lines = [
            [title, *(spread([row.get(key)], 0 if key == COST else 3) for key in (*COLUMNS, COST))]
            for title, row in rows.items()
        ]
        heading = f"Holes, {data.title}"
        text += page(heading, titles, lines) if not text else f"\n{heading}\n\n{table(titles, lines)}\n"
    write(settings.to, text, tables)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("holes"):
        main(tyro.cli(Settings))
