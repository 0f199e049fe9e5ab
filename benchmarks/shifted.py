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
from naign.data.loader import DataSets, read_split
from naign.errors import exit_on_input_error
from naign.evaluate.coverage import coverage, nearest
from naign.evaluate.frechet import frechet_distance
from naign.model.encoders import choose_encoder
from naign.model.scale import scaled


def shifted(images: Tensor, count: int, most: int, *, flip: bool, seed: int = 0) -> Tensor:
    """`count` of images (n, C, H, W), moved by up to `most` pixels with the edge repeated, and flipped by chance."""
    draw = torch.Generator().manual_seed(seed)
    chosen = images[torch.randint(len(images), (count,), generator=draw)]
    padded, (height, width) = F.pad(chosen, (most,) * 4, mode="replicate"), images.shape[2:]
    moves = torch.randint(2 * most + 1, (count, 2), generator=draw).tolist()
    moved = [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, moves, strict=True)]
    turned = (torch.rand(count, generator=draw) < 0.5).tolist()
    return torch.stack([one.flip(2) if flip and turn else one for one, turn in zip(moved, turned, strict=True)])


def main(paths: tyro.conf.Positional[list[Path]], most: int = 2, count: int = 10_000) -> None:
    """Measure flipped and shifted training images as if they were samples."""
    for path in paths:
        manifest = DataSets(DataConfig(path=str(path))).manifest
        train, test = (scaled(read_split(str(path), split)[0]) for split in ("train", "test"))
        encoder = choose_encoder(manifest)
        samples = shifted(train, count, most, flip="mnist" not in path.name or "fashion" in path.name)
        features = encoder.features(samples), encoder.features(test)
        overlap, far = coverage(features[1], features[0]), nearest(test[:1000], train)[0].double().mean()
        ratio = float(nearest(samples[:1000], train)[0].double().mean() / far)
        numbers = f"precision {overlap['precision']:.2f}, recall {overlap['recall']:.2f}, copying {ratio:.2f}"
        print(f"{path}: FD {frechet_distance(*features):.0f}, {numbers}")


if __name__ == "__main__":
    with exit_on_input_error("shifted"):
        tyro.cli(main)
