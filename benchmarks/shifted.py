"""A hundred images, flipped and shifted, as samples: the row beside those of few_shot.yaml that learns nothing.

    python benchmarks/shifted.py data/mnist_100 data/fashion_mnist_100 data/cifar10_100 data/photos64_100

Of each packed set it draws 10,000 training images, moves each by up to `most` pixels along both axes, flips half of
them but digits, and prints what `naign evaluate` measures of samples: Frechet distance, precision, recall, and the mean
distance to the nearest training image over that of test images.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.loader import read_split
from naign.data.reader import DataSet
from naign.data.scale import scaled
from naign.errors import exit_on_input_error
from naign.evaluate.coverage import coverage, nearest
from naign.evaluate.frechet import frechet_distance
from naign.model.encoders import choose_encoder


def shifted(
    images: Tensor,
    count: int,
    most: int,
    *,
    flip: bool,
) -> Tensor:
    """`count` of images (n, C, H, W), moved by up to `most` pixels with the edge repeated, and flipped by chance."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(len(images), [count], generator=draw)
    chosen = images[rows]
    padded = F.pad(chosen, (most,) * 4, mode="replicate")
    moves = torch.randint(2 * most + 1, (count, 2), generator=draw)
    turns = torch.rand(count, generator=draw) < 0.5
    height, width = images.shape[2:]
    made = torch.empty_like(chosen)
    for number, (top, left) in enumerate(moves.tolist()):
        moved = padded[number, :, top : top + height, left : left + width]
        if flip and turns[number]:
            moved = moved.flip(2)
        made[number] = moved
    return made


def mean_distance(images: Tensor, train: Tensor) -> float:
    """From images to the nearest training images."""
    distances, _ = nearest(images, train)
    return float(distances.double().mean())


def main(
    paths: tyro.conf.Positional[list[Path]],
    most: int = 2,
    count: int = 10_000,
) -> None:
    """Measure flipped and shifted training images as if they were samples."""
    for path in paths:
        encoder = choose_encoder(DataSet(DataConfig(path=str(path))).manifest)
        train = scaled(read_split(str(path), "train")[0])
        test = scaled(read_split(str(path), "test")[0])
        digits = "mnist" in path.name and "fashion" not in path.name
        samples = shifted(train, count, most, flip=not digits)
        ours = encoder.features(samples)
        theirs = encoder.features(test)
        overlap = coverage(theirs, ours)
        far = mean_distance(test[:1000], train)
        copying = mean_distance(samples[:1000], train) / far
        print(f"{path}: FD {frechet_distance(ours, theirs):.0f}, precision {overlap['precision']:.2f},", end=" ")
        print(f"recall {overlap['recall']:.2f}, copying {copying:.2f}")


if __name__ == "__main__":
    with exit_on_input_error("shifted"):
        tyro.cli(main)
