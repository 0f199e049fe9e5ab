"""How f of noise changes while a run trains: a row for each of its checkpoints.

    pip install -e benchmarks/baselines
    naign train --config mnist_ign_dcgan --checkpoint.keep 0 --checkpoint.rounds 12
    python benchmarks/curve.py --runs runs/mnist_ign_dcgan --to benchmarks/results/curve

FD is the Frechet distance of 10,000 samples to test images, over that of as many training images. *Rarest* is the share
of the class that fewest samples belong to, as the encoder's classifier sees them. *Moved again* is the mean of
|f(f(z)) - f(z)|.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from output import number, table, write_tables
from projector import applied

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.frechet import frechet_distance
from naign.model.encoders import open_encoder
from naign.model.naign import NAIGN

TITLES = (
    "processor s",
    "images, 10³",
    "FD of f(z)",
    "FD of f(f(z))",
    "recall",
    "rarest, %",
    "moved again",
    "FD of f(N(0, I))",
)


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the tables."""

    runs: tuple[Path, ...]
    """Folders of runs whose checkpoints were kept."""
    to: Path = Path("benchmarks/results/curve")
    """Where to write, without an ending."""
    data: str = "data/mnist"
    """The packed data set of all of them."""
    encoder: str = "mnist-cnn64"
    """Its encoder."""
    count: int = 10_000
    """Samples, and test images, where there are as many."""


def rows_of(run: Path, settings: Settings) -> list[list[float]]:
    """The numbers of TITLES of each checkpoint, the oldest first."""
    found = {}
    for folder in run.glob("checkpoints/step-*"):
        step = folder.name.removeprefix("step-")
        if step.isdecimal() and (folder / "model.safetensors").is_file():
            found[int(step)] = folder
    if not found:
        raise InputError(f"{run} has no checkpoints: train it with --checkpoint.keep 0")
    test, _ = read_split(settings.data, "test", limit=settings.count)
    train, _ = read_split(settings.data, "train", limit=len(test))
    encoder = open_encoder(
        "--encoder",
        settings.encoder,
        tuple(test.shape[1:]),
        "cpu",
    )
    real = encoder.features(scaled(test))
    likewise = encoder.features(scaled(train))
    floor = frechet_distance(likewise, real)
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(
        settings.count,
        *test.shape[1:],
        generator=generator,
    )
    rows = []
    ids = torch.arange(settings.count)
    for step in sorted(found):
        model = NAIGN.from_pretrained(found[step])
        if model.shape != test.shape[1:]:
            raise InputError(f"{run} is of images {model.shape}, {settings.data} of others: name its --data")
        once, (distance, recall, second, again) = applied(
            model,
            model.latent(ids, latents="noise"),
            real,
            floor,
            encoder,
        )
        classes = encoder.logits(once).argmax(1)
        shares = torch.bincount(classes, minlength=10) / settings.count
        other = encoder.features(model.project(white))
        row = [
            model.metadata["cpu_seconds"],
            model.metadata["images_seen"] / 1000,
            distance,
            second,
            recall,
            100 * float(shares.min()),
            again,
            frechet_distance(other, real) / floor,
        ]
        rows.append(row)
    return rows


def table_of(rows: list[list[float]]) -> str:
    return table(list(TITLES), [[number(value) for value in row] for row in rows])


def main(settings: Settings) -> None:
    if settings.count < 100:
        raise InputError("--count must be at least 100")
    write_tables(
        settings.to,
        "f of noise by time, {}",
        {str(run): run.name for run in settings.runs},
        lambda run: rows_of(Path(run), settings),
        table_of,
    )


if __name__ == "__main__":
    with exit_on_input_error("curve"):
        main(tyro.cli(Settings))
