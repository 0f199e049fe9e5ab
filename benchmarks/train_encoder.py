"""Train one of the encoders that ship in `pipeline/naign/model/encoder_weights`.

    python benchmarks/train_encoder.py --data data/mnist --name mnist-cnn64
    python benchmarks/train_encoder.py --data data/cifar10 --name cifar10-simclr64 --unlabelled --flip --width 32

With `--unlabelled` it sees no label: it learns to tell which two views are of one image (SimCLR, arXiv 2002.05709).

One to two minutes on one core for MNIST with labels. The result is a function of the images, the options and the seed:
training order starts from the images' own hashes, so it does not matter how the data set was cut into shards. (Another
processor or number of threads may still round differently in the last bits.)
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from naign.data.format.manifest import Manifest
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.model.encoders import FEATURES, FOLDER, Classifier

BATCH = 128
PAIRS = 512  # images per step without labels: each is told from all the others
TEMPERATURE = 0.2
SMALLEST = 0.2  # part of an image that a view shows
PROJECTED = 128  # units between features and what is compared


def content_order(images: Tensor) -> Tensor:
    """(n, C, H, W) uint8 -> (n,) int64: the order of the images by the SHA-256 of their pixels."""
    digests = []
    for image in images.numpy():
        digests.append(hashlib.sha256(image.tobytes()).digest())
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return torch.tensor(order)


def augment(
    images: Tensor,
    *,
    flip: bool,
    generator: torch.Generator,
) -> Tensor:
    """(n, C, H, W) in [-1, 1], the same shape: up to 9 degrees, 10 % of scale, 7 % of shift, and a mirror if `flip`."""
    count = len(images)
    draws = torch.rand(4, count, generator=generator) * 2 - 1
    angle = draws[0] * math.pi / 20
    scale = 1 + 0.1 * draws[1]
    right = 0.14 * draws[2]  # in half images
    down = 0.14 * draws[3]
    mirror = torch.ones(count)
    if flip:
        mirror[torch.rand(count, generator=generator) < 0.5] = -1.0
    cosine = scale * angle.cos()
    sine = scale * angle.sin()
    first = [cosine * mirror, -sine, right]
    second = [sine * mirror, cosine, down]
    theta = torch.stack(first + second, dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False)
    return moved - 1  # + 1 before: what is moved in from outside is black


def view(
    images: Tensor,
    *,
    flip: bool,
    generator: torch.Generator,
) -> Tensor:
    """(n, C, H, W) in [-1, 1], the same shape: each a part of its image, enlarged, its colours and contrast changed."""
    count, channels, height, width = images.shape
    area, right, down, mirror, gain, shift, grey = torch.rand(7, count, generator=generator)
    side = (SMALLEST + (1 - SMALLEST) * area).sqrt()
    signed = side
    if flip:
        signed = torch.where(mirror < 0.5, -side, side)
    none = torch.zeros(count)
    first = [signed, none, (1 - side) * (2 * right - 1)]
    second = [none, side, (1 - side) * (2 * down - 1)]
    theta = torch.stack(first + second, dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, [count, channels, height, width], align_corners=False)
    made = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    tint = 0.6 + 0.8 * torch.rand(count, channels, generator=generator)
    if channels > 1:
        mean = made.mean(1, keepdim=True)
        made = torch.where((grey < 0.2)[:, None, None, None], mean, made * tint[:, :, None, None])
    contrast = (0.6 + 0.8 * gain)[:, None, None, None]
    brightness = (0.8 * shift - 0.4)[:, None, None, None]
    return (contrast * made + brightness).clamp(-1, 1)


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent of two views (n, d) each: the row of one image is to be found among all others, by its cosine."""
    both = F.normalize(torch.cat([first, second]))
    likeness = both @ both.T / TEMPERATURE
    likeness.fill_diagonal_(-torch.inf)
    partners = torch.arange(len(both)).roll(len(first))
    return F.cross_entropy(likeness, partners)


def probe(network: Classifier, images: Tensor, labels: Tensor, count: int) -> Classifier:
    """The network with a linear layer to the classes, fitted to its features, which stay as they are."""
    network.eval()
    with torch.inference_mode():
        parts = []
        for part in images.split(1000):
            parts.append(network.features(scaled(part)))
    features = torch.cat(parts).relu().clone()
    network.head = torch.nn.Linear(features.shape[1], count)
    optimizer = torch.optim.LBFGS(network.head.parameters(), max_iter=200)

    def error() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network.head(features), labels)
        loss.backward()
        return loss

    optimizer.step(error)
    return network


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of (n, C, H, W) uint8 images classified as labelled."""
    network.eval()
    hits = 0
    with torch.inference_mode():
        for part, right in zip(images.split(1000), labels.split(1000), strict=True):
            found = network(scaled(part)).argmax(1)
            hits += int((found == right).sum())
    return hits / len(labels)


def train(
    images: Tensor,  # (n, C, H, W) uint8
    labels: Tensor,  # (n,) int64
    *,
    classes: int,
    width: int = 16,  # channels of the first convolution
    epochs: int = 10,
    batch: int = BATCH,
    rate: float = 3e-3,  # peak learning rate
    decay: float = 5e-2,  # AdamW weight decay
    flip: bool = False,  # mirror images at random
    unlabelled: bool = False,  # learn from views, not from labels
    seed: int = 0,
) -> Classifier:
    """A network trained with AdamW, one warm-up epoch and a cosine to zero."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = content_order(images)
    images = images[order]
    labels = labels[order]
    network = Classifier(
        channels=images.shape[1],
        size=images.shape[2],
        classes=classes,
        width=width,
    )
    learned = list(network.parameters())
    if unlabelled:
        project = torch.nn.Sequential(
            torch.nn.ReLU(),
            torch.nn.Linear(FEATURES, PROJECTED),
            torch.nn.ReLU(),
            torch.nn.Linear(PROJECTED, FEATURES),
        )
        learned += project.parameters()
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=decay)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rate,
        total_steps=steps * epochs,
        pct_start=1 / max(2, epochs),
    )
    for epoch in range(epochs):
        network.train()
        shuffled = torch.randperm(len(images), generator=generator)[: steps * batch]
        for part in tqdm(shuffled.split(batch), desc=f"epoch {epoch + 1}/{epochs}", leave=False, disable=None):
            inputs = scaled(images[part])
            if unlabelled:
                seen = []
                for _ in range(2):
                    part_of = view(inputs, flip=flip, generator=generator)
                    seen.append(project(network.features(part_of)))
                loss = contrast_loss(*seen)
            else:
                inputs = augment(inputs, flip=flip, generator=generator)
                loss = F.cross_entropy(network(inputs), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def save(
    network: Classifier,
    path: Path,
    metadata: dict[str, str],
) -> None:
    """One safetensors file; what it is, how good and how made stands in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {}
    for key, value in network.state_dict().items():
        weights[key] = value.contiguous()
    save_file(weights, path, metadata=metadata)
    path.chmod(0o644)  # safetensors writes for the owner only


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an encoder for the Frechet distance.")
    parser.add_argument("--data", required=True, help="packed data set with labels: a folder or s3://")
    parser.add_argument("--name", required=True, help="name of the encoder: <data set>-cnn64")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder to write <name>.safetensors into")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
    parser.add_argument("--flip", action="store_true", help="mirror images at random (photographs)")
    parser.add_argument("--unlabelled", action="store_true", help="learn from two views of each image, not from labels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line: read shards, train, print the test accuracy, save."""
    options = parse(argv)
    with exit_on_input_error("train_encoder"):
        manifest = Manifest.load(options.data)
        unfit = len(manifest.shape) != 3 or len(manifest.labels) < 2
        if unfit or min(options.epochs, options.width) < 1:
            raise InputError(
                f"{options.data} holds examples {manifest.shape} of {len(manifest.labels)} classes: an encoder takes "
                "images with labels of two classes or more, and --epochs and --width of at least 1"
            )
        images, labels = read_split(options.data, "train")
        test_images, test_labels = read_split(options.data, "test")
        if len(images) < BATCH or not len(test_images):
            raise InputError(f"{options.data}: {len(images)} images and {len(test_images)} to test on: too few")
    network = train(
        images,
        labels,
        classes=len(manifest.labels),
        width=options.width,
        epochs=options.epochs,
        batch=PAIRS if options.unlabelled else BATCH,
        flip=options.flip,
        unlabelled=options.unlabelled,
        seed=options.seed,
    )
    if options.unlabelled:
        probe(network, images, labels, len(manifest.labels))
    score = accuracy(network, test_images, test_labels)
    command = f"python benchmarks/train_encoder.py --data {options.data} --name {options.name}"
    command += f" --epochs {options.epochs} --width {options.width} --seed {options.seed}"
    if options.flip:
        command += " --flip"
    names = manifest.labels
    if options.unlabelled:
        command += " --unlabelled"
        network.head = torch.nn.Linear(FEATURES, 0)  # what it is for are its features
        names = ()
    metadata = {
        "name": options.name,
        "dataset": manifest.name,
        "shape": json.dumps(list(manifest.shape)),
        "labels": json.dumps(list(names)),
        "width": str(options.width),
        "accuracy": f"{score:.4f}",
        "seed": str(options.seed),
        "command": command,
    }
    save(network, options.to / f"{options.name}.safetensors", metadata)
    print(f"{options.name}: test accuracy {score:.4f} on {len(test_labels):,} images -> {options.to}")


if __name__ == "__main__":
    main()
