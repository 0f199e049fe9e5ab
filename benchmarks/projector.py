"""f brings any point to the data: what networks make of noise, damaged images, and images of another set.

    pip install -e benchmarks/baselines
    python benchmarks/projector.py --to benchmarks/results/projector

Compared in the same run are density.py's networks that have an f, of about equal processor time. FD is the Frechet
distance to test images, over that of as many training images. *Sure* is the share of f(x) that the encoder's
classifier gives a class with more than 99 %. *Moved again* is the mean of |f(f(x)) - f(x)|. *Moved*, that of |f(x) -
x|, stands beside the same for the nearest training image. *Noise of its training* is what a network learned to map to
the data, where it did. Runs are kept under runs/tables, as table.py's are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from density import NETWORKS, SETS, place
from output import number, table, write_tables
from torch import Tensor
from trained import Task

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.coverage import coverage, nearest
from naign.evaluate.frechet import frechet_distance
from naign.model.encoders import Encoder, load_encoder
from naign.model.naign import NAIGN

FROM_NOISE = ("NAIGN", "IGN")
"""Those that learn to map noise to the data."""
PATCH = 7
SURE = 0.99
COMPARED = 1000
"""Images whose nearest training image is looked for."""
TITLES = ("FD of f(x)", "recall", "FD of f(f(x))", "sure", "moved again", "moved", "nearest image moved")
Row = list[float]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    to: Path = Path("benchmarks/results/projector")
    """Where to write, without an ending."""
    sets: tuple[str, ...] = ("mnist", "fashion_mnist")
    """Data sets of 28 x 28 pixels."""
    count: int = 5000
    """Points of each kind, at most 10,000."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def points(name: str, count: int) -> dict[str, Tensor]:
    """Points (count, 1, 28, 28) by kind."""
    generator = torch.Generator().manual_seed(0)
    images, _ = read_split(place(name), "test", limit=count)
    real = scaled(images)
    other, _ = read_split(place(SETS[name].other), "test", limit=count)
    noise = torch.randn(real.shape, generator=generator)
    patches = real.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    order = torch.randperm(16, generator=generator)
    shuffled = patches.reshape(count, 16, PATCH, PATCH)[:, order]
    shuffled = shuffled.view(count, 4, 4, PATCH, PATCH).transpose(2, 3)
    shades = torch.linspace(-1, 1, count).view(-1, 1, 1, 1)
    return {
        "standard normal noise": noise,
        "uniform noise": torch.rand(real.shape, generator=generator) * 2 - 1,
        "test images + noise of 0.5": real + 0.5 * noise,
        "test images + noise of 1": real + noise,
        "test images + noise of 2": real + 2 * noise,
        SETS[SETS[name].other].title: scaled(other),
        "patches in another order": shuffled.reshape(real.shape),
        "constants": shades.expand_as(real),
    }


def applied(
    model: NAIGN,
    x: Tensor,
    real: Tensor,  # features of test images
    floor: float,
    encoder: Encoder,
) -> tuple[Tensor, Row]:
    """f(x), and of it: FD, recall, the FD of f(f(x)), and the mean of |f(f(x)) - f(x)|."""
    once = model.project(x)
    twice = model.project(once)
    features = encoder.features(once)
    again = encoder.features(twice)
    row = [
        frechet_distance(features, real) / floor,
        coverage(real, features)["recall"],
        frechet_distance(again, real) / floor,
        float((twice - once).abs().mean()),
    ]
    return once, row


def measured(
    model: NAIGN,
    x: Tensor,
    train: Tensor,
    real: Tensor,  # features of test images
    floor: float,
    encoder: Encoder,
) -> Row:
    """A number for each of TITLES."""
    once, (distance, recall, second, again) = applied(
        model,
        x,
        real,
        floor,
        encoder,
    )
    sure = encoder.logits(once).softmax(1).amax(1) > SURE
    few = x[:: len(x) // COMPARED]
    _, places = nearest(few, train)
    return [
        distance,
        recall,
        second,
        float(sure.float().mean()),
        again,
        float((once - x).abs().mean()),
        float((train[places] - few).abs().mean()),
    ]


def rows_of(name: str, settings: Settings) -> dict[str, Row]:
    """The numbers by network and kind of point."""
    encoder = load_encoder(f"{name}-cnn64")
    images, _ = read_split(place(name), "train")
    train = scaled(images)
    test, _ = read_split(place(name), "test", limit=settings.count)
    real = encoder.features(scaled(test))
    floor = frechet_distance(encoder.features(train[: settings.count]), real)
    found = {}
    kinds = points(name, settings.count)
    for title, (config, options) in NETWORKS.items():
        task = Task.of(settings.runs, config, [*options, f"--data.path={place(name)}"], 0)
        task.train()
        if task.diverged:
            continue
        model = NAIGN.from_pretrained(task.folder)
        cost = f"{title}, {model.metadata['cpu_seconds']:,.0f} s"
        own = {}
        if title in FROM_NOISE:
            own["noise of its training"] = model.latent(torch.arange(settings.count), latents="noise")
        for kind, x in (own | kinds).items():
            found[f"{cost}: {kind}"] = measured(
                model,
                x,
                train,
                real,
                floor,
                encoder,
            )
    return found


def table_of(rows: dict[str, Row]) -> str:
    lines = [[title, *map(number, row)] for title, row in rows.items()]
    return table(["network, processor s: x", *TITLES], lines)


def main(settings: Settings) -> None:
    if not COMPARED <= settings.count <= 10_000 or not {*settings.sets} <= {"mnist", "fashion_mnist"}:
        raise InputError(f"--count must be {COMPARED} to 10000, and --sets of mnist, fashion_mnist")
    write_tables(
        settings.to,
        "f as a projector, {}",
        {name: SETS[name].title for name in settings.sets},
        lambda name: rows_of(name, settings),
        table_of,
    )


if __name__ == "__main__":
    with exit_on_input_error("projector"):
        main(tyro.cli(Settings))
