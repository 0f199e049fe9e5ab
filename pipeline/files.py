"""Images that commands are given, and samples that they write."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.folder import square
from pipeline.data.samples import UNDECODABLE, scaled
from pipeline.errors import InputError
from pipeline.pictures import grid, to_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(path, name) of each image given: a file's name is its own, one found in a folder keeps its path in there."""
    found = []
    for file in files:
        if file.is_dir():
            inside = sorted(path for path in file.rglob("*") if path.suffix.lower() in IMAGES)
            found += [(path, path.relative_to(file)) for path in inside]
        else:
            found.append((file, Path(file.name)))
    if not found:
        raise InputError("no images given: name files, or folders that hold some")
    return found


def refuse_overwriting(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """InputError if two outputs are one file, or one is an input."""
    writer: dict[Path, Path] = {}
    sources = {path.resolve() for path in inputs}
    for source, output in zip(inputs, outputs, strict=True):
        if output.resolve() in sources:
            raise InputError(f"--to would overwrite the input {output}: choose another folder")
        if output in writer:
            raise InputError(f"{writer[output]} and {source} would both be written to {output}: rename one of them")
        writer[output] = source


def read_images(paths: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
    """Images (n, C, S, S) float32 in [-1, 1], resized and cropped to the model's square as `pack` does."""
    if len(shape) != 3:
        raise InputError(f"this model takes points of {shape[0]} values, not images")
    rows = []
    for path in paths:
        try:
            pixels = np.asarray(square(path.read_bytes(), shape[1], shape[0]))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except UNDECODABLE as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else "no picture that can be read"
            raise InputError(f"{path}: {what}") from None
        rows.append(torch.from_numpy(pixels.copy()).view(*shape[1:], shape[0]).permute(2, 0, 1))
    return scaled(torch.stack(rows))


def write_samples(made: Tensor, to: Path) -> str:
    """Write samples as `sample` promises; where they are."""
    points, suffix = made.ndim != 4, to.suffix.lower()
    if points != (suffix == ".csv") or suffix not in (".png", ".csv", ""):
        wanted = ".csv" if points else ".png, or a folder's name"
        raise InputError(f"--to {to}: samples of shape {tuple(made.shape[1:])} go to a file that ends in {wanted}")
    (to if not to.suffix else to.parent).mkdir(parents=True, exist_ok=True)
    if points:
        with to.open("w", newline="") as file:
            csv.writer(file).writerows(made.tolist())
    elif to.suffix:
        grid(made, columns=math.ceil(math.sqrt(len(made)))).save(to)
    else:
        for number, image in enumerate(made):
            to_image(image).save(to / f"{number:06d}.png")
    return f"{to}/" if not to.suffix else str(to)
