"""Pack patches of 64 x 64 in colour, cut from photographs: data for match.py and few_shot.yaml.

    mkdir photos && cd photos && apt-get download budgie-backgrounds mate-backgrounds lomiri-wallpapers-16.04
    for package in *.deb; do dpkg-deb -x "$package" .; done; cd ..
    python benchmarks/patches.py photos --to data/photos64

Debian's packages hold some forty photographs: budgie-backgrounds CC0, lomiri-wallpapers-16.04 CC-BY, CC-BY-SA and CC0,
mate-backgrounds GPL-2+. Every fifth photograph gives the test split, so no test patch overlaps a training patch. A
patch is a square of any size and place of its photograph, mirrored or not; which one is a function of its number.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageOps

from naign.data.format.writer import pack
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError, exit_on_input_error

SIDE = 64
SHORTER = 1024
"""Pixels to which a photograph's shorter side is reduced first."""
DRAWN = ("abstract", "desktop", "ocean-waves", "valley-midnight", "waves-midnight", "analogpattern", "umang")
"""Folders and beginnings of names in those packages that are not photographs."""


def photographs(root: Path) -> list[Path]:
    """The photographs under `root`. Raises InputError if there are less than five."""
    found = []
    for path in sorted(root.rglob("*")):
        drawn = path.name.startswith(DRAWN) or path.parent.name in DRAWN
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not drawn:
            found.append(path)
    if len(found) < 5:
        raise InputError(f"{root}: {len(found)} photographs found, at least 5 are needed: see the head of this script")
    return found


@lru_cache(maxsize=64)
def reduced(path: Path) -> Image.Image:
    """The photograph upright, in colour, its shorter side SHORTER pixels or fewer."""
    with Image.open(path) as opened:
        opened.draft("RGB", (SHORTER, SHORTER))
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    scale = min(1.0, SHORTER / min(picture.size))
    width = round(picture.width * scale)
    height = round(picture.height * scale)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def window_of(picture: Image.Image, side: int, least: int, draws: Sequence[float]) -> Image.Image:
    """A square of a picture, at least `least` pixels a side, resized to `side`: `draws` are its size, left and top."""
    extent = least * (min(picture.size) / least) ** draws[0]
    left = draws[1] * (picture.width - extent)
    top = draws[2] * (picture.height - extent)
    box = (left, top, left + extent, top + extent)
    return picture.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def patches(
    files: list[Path],
    count: int,
    key: int,
) -> Made:
    """`count` patches, dealt evenly to the photographs; `key` keeps the splits' draws apart."""

    def make(number: int) -> Example:
        picture = reduced(files[number % len(files)])
        generator = np.random.Generator(np.random.Philox(key=key, counter=number))
        draws = generator.random(4)
        patch = window_of(picture, SIDE, SIDE, draws)
        if draws[3] < 0.5:
            patch = ImageOps.mirror(patch)
        pixels = np.asarray(patch).transpose(2, 0, 1)
        return f"patch-{number:06d}", np.ascontiguousarray(pixels), -1

    return Made(length=count, make=make)


def main(
    photos: tyro.conf.Positional[Path],
    /,
    *,
    to: str,
    train: int = 60_000,
    test: int = 12_000,
    force: bool = False,
) -> None:
    """Pack patches of photographs.

    Args:
        photos: Folder of photographs.
        to: Folder or s3://bucket/prefix to write.
        train: Patches of the training split.
        test: Patches of the test split, of other photographs.
        force: Replace a data set that is there.
    """
    files = photographs(photos)
    training = [path for number, path in enumerate(files) if number % 5]
    source = Source(
        name="photos64",
        kind="image",
        shape=(3, SIDE, SIDE),
        labels=(),
        splits={
            "train": patches(training, train, 0),
            "test": patches(files[::5], test, 1),
        },
    )
    pack(source, to, force=force)


if __name__ == "__main__":
    with exit_on_input_error("patches"):
        tyro.cli(main)
