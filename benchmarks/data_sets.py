"""The data sets of data.py: functions of their numbers, so the same options give the same bytes.

MNIST and CIFAR-10 are given as `naign pack` wrote them. Without them there are scikit-learn's digits, enlarged, turned
and moved, and windows of its two photographs. Larger pictures are always such windows.
"""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from patches import window_of
from PIL import Image
from readers import Job
from sklearn.datasets import load_digits, load_sample_images

from naign.data.format.indexing import index
from naign.data.format.manifest import INDEX, Manifest
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError

SHARDS = 16


@dataclass(kw_only=True, slots=True, frozen=True)
class Kind:
    """One of the sets."""

    title: str
    shape: tuple[int, int, int] | None
    """None: pictures of about 500 x 400, which are read as random windows."""
    encoding: str
    images: int
    round: int
    """Images that ours returns at once."""


SETS = {
    "grey28": Kind(
        title="28x28 grey PNG",
        shape=(1, 28, 28),
        encoding="png",
        images=60_000,
        round=2_000,
    ),
    "colour32": Kind(
        title="32x32 colour JPEG",
        shape=(3, 32, 32),
        encoding="jpg",
        images=50_000,
        round=2_000,
    ),
    "photos256": Kind(
        title="256x256 colour JPEG",
        shape=(3, 256, 256),
        encoding="jpg",
        images=6_000,
        round=500,
    ),
    "photos500": Kind(
        title="JPEG of about 500x400, to 64x64",
        shape=None,
        encoding="jpg",
        images=16_000,
        round=500,
    ),
}


def prepare(
    name: str,
    scratch: Path,
    *,
    quick: bool,
    given: Path | None,
) -> Job:
    """A job that reads the set in a folder of `scratch`; of `given`, a packed set, instead of made images."""
    kind = SETS[name]
    count = kind.images // 10 if quick else kind.images
    folder = scratch / f"{name}-{count}-{given.resolve().name if given else 'made'}"
    if not (folder / INDEX).exists():
        if kind.shape is None:
            write_tars(folder, count)
            index(str(folder))
        else:
            make = first_images(given, count, kind) if given else made_images(kind)
            images = Made(length=count, make=make)
            source = Source(
                name=name,
                kind="image",
                shape=kind.shape,
                labels=(),
                splits={"train": images},
            )
            pack(source, str(folder), shards=SHARDS, encoding=kind.encoding)
    split = Manifest.load(str(folder)).split("train")
    return Job(
        path=str(folder),
        local=str(folder),
        shards=[shard.name for shard in split.shards],
        images=split.samples,
        round=kind.round // 10 if quick else kind.round,
        suffix=kind.encoding,
        grey=kind.shape is not None and kind.shape[0] == 1,
        crop=kind.shape is None,
    )


def first_images(
    packed: Path,
    count: int,
    kind: Kind,
) -> Callable[[int], Example]:
    """The first training images of a packed set. Raises InputError if it has too few or others."""
    found = Manifest.load(str(packed))
    samples = found.split("train").samples
    if found.shape != kind.shape or samples < count:
        raise InputError(f"{packed}: {samples} images of {found.shape}: {count} of {kind.shape} are needed")
    images, labels = read_split(str(packed), "train", limit=count)

    def make(number: int) -> Example:
        label = max(0, int(labels[number]))
        return f"{number:06d}", images[number].numpy(), label

    return make


def made_images(kind: Kind) -> Callable[[int], Example]:
    if kind.encoding == "png":
        return digit
    assert kind.shape is not None
    return window(kind.shape[1])


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target


def draws_of(key: int, number: int) -> Any:
    """Five numbers in [0, 1) that belong to an image."""
    philox = np.random.Philox(key=key, counter=number)
    return np.random.Generator(philox).random(5)


def digit(number: int) -> Example:
    """A digit of 28x28, about as large as a PNG as MNIST's are."""
    images, labels = _digits()
    draws = draws_of(key=0, number=number)
    row = int(draws[0] * len(images))
    glyph = Image.fromarray(images[row])
    glyph = glyph.resize((20, 20), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(30 * draws[1] - 15, Image.Resampling.BILINEAR)
    glyph = glyph.point(lambda value: 2.2 * (value - 90))
    canvas = Image.new("L", (28, 28))
    left = 2 + int(5 * draws[2])
    top = 2 + int(5 * draws[3])
    canvas.paste(glyph, (left, top))
    return f"{number:06d}", np.asarray(canvas)[None], int(labels[row])


def window(side: int) -> Callable[[int], Example]:
    """Makes images of so many pixels a side: windows of a photograph, of any size and place, mirrored or not."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]

    def make(number: int) -> Example:
        draws = draws_of(key=side, number=number)
        label = int(draws[0] * len(photographs))
        picture = photographs[label]
        patch = window_of(picture, side, min(side, 160), draws[1:])
        pixels = np.asarray(patch).transpose(2, 0, 1)
        if draws[4] < 0.5:
            pixels = pixels[:, :, ::-1]
        return f"{number:06d}", np.ascontiguousarray(pixels), label

    return make


@lru_cache(maxsize=1)
def jpegs() -> list[bytes]:
    """Forty windows of two photographs, about 500 x 400, as JPEGs of about 38 kB."""
    found = []
    draw = np.random.default_rng(0)
    for pixels in load_sample_images().images:
        for _ in range(20):
            width = int(draw.integers(420, 580))
            height = int(draw.integers(340, 420))
            left = int(draw.integers(641 - width))
            top = int(draw.integers(428 - height))
            stream = io.BytesIO()
            window = pixels[top : top + height, left : left + width]
            picture = Image.fromarray(window)
            picture.save(stream, "JPEG", quality=80)
            found.append(stream.getvalue())
    return found


def add_sample(tar: tarfile.TarFile, key: str, data: bytes) -> None:
    """A JPEG with a caption and JSON, as img2dataset writes them."""
    members = {"jpg": data, "txt": b"a photograph", "json": b'{"url": "https://"}'}
    for suffix, member in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(member)
        tar.addfile(info, io.BytesIO(member))


def write_tars(folder: Path, count: int) -> None:
    """Tars of pictures of many sizes."""
    folder.mkdir(parents=True)
    pictures = jpegs()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, count, SHARDS):
                add_sample(tar, f"{number:06d}", pictures[number % len(pictures)])
