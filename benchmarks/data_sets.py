"""What goes into data.py and comes out: its data sets, on disk and in a bucket, and its tables.

The sets are functions of their numbers, so the same options give the same bytes. Where MNIST or CIFAR-10 are not given,
they are made: scikit-learn's digits of 8x8 pixels enlarged, turned and moved; windows of its two sample photographs,
of any size, place, brightness and colour. Photographs of 256x256 are always such windows.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from data_peers import Job, Record, run
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images  # type: ignore[import-untyped]

from pipeline.data.examples import Example, Made, Source
from pipeline.data.manifest import Manifest
from pipeline.data.shards import pack
from pipeline.data.stream import read_split
from pipeline.errors import InputError

Name = Literal["grey28", "colour32", "photos256"]
SHARDS = 16


@dataclass(kw_only=True, slots=True, frozen=True)
class Kind:
    """One of the sets."""

    title: str
    shape: tuple[int, int, int]
    encoding: str
    images: int
    round: int
    """Images that ours gives at once."""


SETS: dict[Name, Kind] = {
    "grey28": Kind(title="28x28 grey PNG", shape=(1, 28, 28), encoding="png", images=60_000, round=2_000),
    "colour32": Kind(title="32x32 colour JPEG", shape=(3, 32, 32), encoding="jpg", images=50_000, round=2_000),
    "photos256": Kind(title="256x256 colour JPEG", shape=(3, 256, 256), encoding="jpg", images=6_000, round=500),
}
LARGE = {"64 MB": 330, "1 GB": 5_500}
"""Images of one shard of raw 256x256 pixels, by the size that it has about."""
LARGE_ROUND = 55

Make = Callable[[int], Example]


def prepare(name: Name, scratch: Path, *, share: float, given: Path | None) -> tuple[Path, str]:
    """The packed set, of that share of its images, made where it is not there yet; and what it is, in words."""
    kind = SETS[name]
    count = round(share * kind.images)
    folder = scratch / f"{name}-{count}-{given.resolve().name if given else 'made'}"
    if given:
        found = Manifest.load(str(given))
        samples = found.split("train").samples
        if found.shape != kind.shape or samples < count:
            raise InputError(f"{given}: {samples} of {found.shape}: {count} images of {kind.shape} are needed")
        source = f"the first {count:,} training images of {found.name}"
        make: Make = lambda index: _read(str(given), count)[index]  # noqa: E731
        if kind.encoding == "jpg":
            source += ", quality 95"
    elif name == "grey28":
        make, source = digit, "digits of 8x8, enlarged"
    else:
        make, source = window(kind.shape[1]), "windows of two photographs, quality 95"
    pack(
        Source(name=name, kind="image", shape=kind.shape, labels=(), splits={"train": Made(length=count, make=make)}),
        str(folder),
        shards=SHARDS,
        encoding=kind.encoding,
    ) if not (folder / "index.json").exists() else None
    _read.cache_clear()
    return folder, source


def prepare_large(images: int, scratch: Path) -> Path:
    """One shard of that many raw images."""
    folder, shape = scratch / f"large-{images}", SETS["photos256"].shape
    if not (folder / "index.json").exists():
        base, count = window(shape[1]), 64

        def make(index: int) -> Example:
            _, pixels, label = cached(index % count)
            return f"{index:06d}", pixels ^ np.uint8(index // count), label

        cached = lru_cache(maxsize=count)(base)
        source = Source(
            name="large", kind="image", shape=shape, labels=(), splits={"train": Made(length=images, make=make)}
        )
        pack(source, str(folder), shards=1, encoding="npy")
    return folder


@lru_cache(maxsize=1)
def _read(path: str, count: int) -> list[Example]:
    images, labels = read_split(path, "train", limit=count, progress=True)
    return [(f"{row:06d}", images[row].numpy(), max(0, int(labels[row]))) for row in range(count)]


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


def digit(index: int) -> Example:
    """A digit of 28x28, about as large as a PNG as MNIST's are."""
    images, labels = _digits()
    draws = np.random.Generator(np.random.Philox(key=0, counter=index)).random(5)
    row = int(draws[0] * len(images))
    glyph = Image.fromarray(images[row]).resize((20, 20), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(30 * draws[1] - 15, Image.Resampling.BILINEAR)
    glyph = glyph.point([int(min(255, max(0, 2.2 * (value - 90)))) for value in range(256)])
    canvas = Image.new("L", (28, 28))
    canvas.paste(glyph, (2 + int(5 * draws[2]), 2 + int(5 * draws[3])))
    return f"{index:06d}", np.asarray(canvas)[None], int(labels[row])


def window(side: int) -> Make:
    """Makes images of so many pixels a side, each a window of a photograph."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]

    def make(index: int) -> Example:
        draws = np.random.Generator(np.random.Philox(key=side, counter=index)).random(7)
        label = int(draws[0] * len(photographs))
        picture = photographs[label]
        least = min(side, 160)
        extent = least * (min(picture.size) / least) ** draws[1]
        left, top = draws[2] * (picture.width - extent), draws[3] * (picture.height - extent)
        box = (left, top, left + extent, top + extent)
        patch = picture.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        for enhance, draw in ((ImageEnhance.Brightness, draws[4]), (ImageEnhance.Color, draws[5])):
            patch = enhance(patch).enhance(0.75 + draw / 2)
        pixels = np.asarray(patch)[:, :: 1 if draws[6] < 0.5 else -1]
        return f"{index:06d}", np.ascontiguousarray(pixels.transpose(2, 0, 1)), label

    return make


def job_of(folder: Path, round: int) -> Job:
    """Reads a packed set in a folder."""
    manifest = Manifest.load(str(folder))
    split = manifest.split("train")
    suffix = "png" if manifest.shape[0] == 1 else "jpg"
    return Job(
        path=str(folder),
        local=str(folder),
        shards=tuple(shard.name for shard in split.shards),
        bytes=sum(shard.bytes for shard in split.shards),
        images=split.samples,
        round=round,
        suffix=suffix,
        grey=manifest.shape[0] == 1,
    )
