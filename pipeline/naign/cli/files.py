"""Files of commands: reading images, writing samples."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from naign.errors import InputError, require
from naign.evaluate.recorded import read_image
from naign.model.naign import NAIGN
from naign.observe.pictures import grid, to_image
from naign.storage.local import walk, write_atomically
from naign.terminal import counted

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of repaired pictures, by the suffix of --to
MAP = ".map.png"  # ends the names of the maps that `naign score --map` writes


def find_files(files: Sequence[Path], model: NAIGN) -> list[tuple[Path, Path]]:
    """(path, name) of each input file; of those in folders, which are searched for images, the name is the path below
    the folder; maps are passed over. InputError if there is none, and for a model of points.
    """
    require((len(model.shape) == 3, f"this command is for images, and the model takes points of {model.shape}"))
    found = []
    for file in files:
        if not file.is_dir():
            require((file.is_file() or not file.exists(), f"{file} is a pipe or a device: give a file"))
            found.append((file, Path(file.name)))
            continue
        for path in sorted(Path(folder, name) for folder, _, names in walk(file) for name in names):
            if path.suffix.lower() in IMAGES and path.is_file() and not path.name.endswith(MAP):
                found.append((path, path.relative_to(file)))
    require((found, f"no images ({', '.join(IMAGES)}) given: name files, or folders that hold some"))
    return found


def refuse_overwriting(
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    also: Sequence[Path] = (),
) -> None:
    """Raise InputError if two outputs are the same file, or if an output is an input, one of `also`, or a folder."""
    source_of: dict[Path, Path] = {}
    sources = {os.path.realpath(path) for path in (*inputs, *also)}
    for source, output in zip(inputs, outputs, strict=True):
        other = source_of.setdefault(output, source)
        place = os.path.realpath(output)
        require(
            (place not in sources, f"the output would overwrite the input {output}: choose another place"),
            (not output.is_dir(), f"{output} would be written for {source}, but is a folder: choose another place"),
            (other == source, f"{other} and {source} would both be written to {output}: rename one of them"),
        )


def read_images(paths: Sequence[Path], model: NAIGN) -> list[Tensor]:
    """Each image (1, C, H, W) float32 in [-1, 1], at the model's size. Raises InputError for a file that holds none."""
    images = []
    for path in counted("reading", paths, unit="image"):
        try:
            images.append(read_image(path.read_bytes(), model))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return images


def write_samples(samples: Tensor, to: Path) -> str:
    """Write samples to a .png grid, as one PNG each into a folder, or points to a .csv file. Returns the place."""
    suffix = to.suffix.lower()
    if samples.ndim != 4:
        require((suffix == ".csv", f"--to {to}: points go to a file that ends in .csv"))
        content = io.StringIO()
        np.savetxt(content, samples.numpy(), fmt="%.9g", delimiter=",")
        write_atomically(to, content.getvalue())
        return str(to)
    require((suffix in (".png", ""), f"--to {to}: images go to a file that ends in .png, or into a folder"))
    if suffix:
        save(grid(samples, columns=math.ceil(math.sqrt(len(samples)))), to)
        return str(to)
    for number, image in enumerate(counted("writing", samples, unit="image")):
        save(to_image(image), to / f"{number:06d}.png")
    return f"{to}/"


def save(
    picture: Image.Image,
    to: Path,
    profile: bytes | None = None,
) -> None:
    """Write a picture atomically, not synced, in the format of its suffix; one with alpha only as PNG."""
    kind = FORMATS[to.suffix.lower()]
    content = io.BytesIO()
    picture.save(content, kind, quality=95, icc_profile=profile)
    write_atomically(to, content.getvalue(), sync=False)
