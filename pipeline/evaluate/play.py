"""What a person tries on a trained model of images, as the page of `naign demo` shows it: uploads, damage, repair,
nearest training images, samples and what lies between two of them."""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from pipeline.data.decode import decoding
from pipeline.data.degrade import KINDS, Kind, degrade
from pipeline.data.loader import read_split
from pipeline.errors import InputError, require
from pipeline.evaluate.recorded import read_image, recorded
from pipeline.match import Blocks, search
from pipeline.model.naign import NAIGN
from pipeline.model.scale import scaled

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
UPLOAD = 20_000_000  # bytes of an uploaded file at most
PIXELS = 25_000_000  # of an uploaded picture at most
STRENGTH = 2.0  # of a damage at most
TIMES = 5  # applications of f at most
SAMPLES = 64  # at once at most
STEPS = 16  # images between two samples at most
SEEDS = 2**31
NEAREST = 6  # training images that are shown
TRAINING = 10_000  # training images that are searched at most
TRAINING_BYTES = 2**28  # of them in memory at most


def check_picture(data: bytes) -> None:
    """InputError unless these are the bytes of a picture of a known format and size; nothing of it is decoded."""
    require((len(data) <= UPLOAD, f"the file has {len(data):,} bytes: give one of at most {UPLOAD:,}"))
    try:
        with decoding(), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
    except InputError as error:
        bomb = isinstance(error.__context__, Image.DecompressionBombError)  # Pillow's own limit
        if not bomb:
            raise InputError(f"the file cannot be read as a picture ({error}): give {', '.join(FORMATS)}") from None
        pixels = PIXELS + 1
    most = f"{PIXELS / 1e6:.0f} megapixels"
    require((pixels <= PIXELS, f"the picture has more than {most}: give a smaller one"))


@contextmanager
def decoded() -> Iterator[None]:
    """InputError that says so where a picture cannot be decoded after all."""
    try:
        with decoding():
            yield
    except InputError as error:
        raise InputError(f"the picture cannot be decoded ({error}): is the file damaged?") from None


def read_upload(data: bytes, model: NAIGN) -> Tensor:
    """An uploaded file as (1, C, H, W) float32 in [-1, 1] for the model. Raises InputError for what is refused."""
    check_picture(data)
    with decoded():
        return read_image(data, model)


def damage(images: Tensor, strengths: Mapping[Kind, float], *, seed: int = 0) -> Tensor:
    """Images (n, C, H, W) with each kind of damage of that strength, one after another in the order of KINDS."""
    check(seed=seed)
    for kind in KINDS:
        strength = strengths.get(kind, 0.0)
        require((0 <= strength <= STRENGTH, f"the strength of {kind} is {strength}: it must be 0 to {STRENGTH:g}"))
        images = degrade(images, kind, seed=seed, strength=strength)
    return images


class Repair(NamedTuple):
    answers: list[Tensor]  # f(x), f(f(x)), ..., each (1, C, H, W)
    energies: list[float]  # of x, f(x), f(f(x)), ...: the mean squared residual of one application more
    moved: Tensor  # (H, W): |f(x) - x|, the mean over channels


def repair(model: NAIGN, given: Tensor, *, times: int = 1) -> Repair:
    """f applied up to `times` times to one image (1, C, H, W)."""
    check(times=times)
    chain = [given]
    for _ in range(times + 1):
        chain.append(model.project(chain[-1]))
    energies = [float((after - before).square().mean()) for before, after in zip(chain, chain[1:], strict=False)]
    return Repair(chain[1:-1], energies, (chain[1] - given).abs().mean(1)[0])


def training_images(model: NAIGN, run: str, data: str | None = None) -> Tensor:
    """Training images of the run (n, C, H, W) uint8: all, or as many as TRAINING and TRAINING_BYTES allow.

    Raises InputError or Unavailable where the data set cannot be read.
    """
    config, _, _ = recorded(model, run, data)
    images, _ = read_split(config, config.split, limit=min(TRAINING, max(1, TRAINING_BYTES // math.prod(model.shape))))
    return images


def nearest(training: Tensor, image: Tensor) -> tuple[Tensor, list[float]]:
    """The NEAREST training images (k, C, H, W) float32 of one image (1, C, H, W), and their L2 distances, ascending."""
    blocks = Blocks(rows=len(training), make=lambda low, high: scaled(training[low:high]).flatten(1))
    found = search(image.flatten(1).float(), blocks, 0, neighbours=min(NEAREST, len(training)))
    return scaled(training[found.ids[0]]), found.distances[0].sqrt().tolist()


def sample(model: NAIGN, *, n: int, seed: int = 0, times: int = 1) -> Tensor:
    """n samples (n, C, H, W) on the CPU."""
    check(n=n, seed=seed, times=times)
    return model.sample(n, seed=seed, times=times).cpu()


def between(model: NAIGN, first: int, last: int, *, steps: int, times: int = 1) -> Tensor:
    """f of latents on the way from that of one seed to that of another: (steps, C, H, W) on the CPU."""
    check(first=first, last=last, steps=steps, times=times)
    return model.project(model.between(first, last, steps=steps), times=times).cpu()


_RANGES = {"times": (1, TIMES), "n": (1, SAMPLES), "steps": (2, STEPS)} | dict.fromkeys(
    ("seed", "first", "last"), (0, SEEDS - 1)
)


def check(**values: int) -> None:
    """InputError for a value that is not a whole number in its range."""
    for name, value in values.items():
        low, high = _RANGES[name]
        whole = isinstance(value, int) and low <= value <= high
        require((whole, f"{name} is {value}: it must be a whole number from {low} to {high}"))
