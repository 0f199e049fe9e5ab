"""Files of commands: reading images and points, writing samples."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from naign.data.decode import in_mode
from naign.errors import InputError, printable
from naign.evaluate.recorded import read_image
from naign.model.files import shipped_model
from naign.model.naign import NAIGN
from naign.observe.pictures import grid, to_image
from naign.storage.local import write_atomically
from naign.terminal import counted

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of repaired pictures, by the suffix of --to
MAP = ".map.png"  # ends the names of the maps that `naign score --map` writes


def find_files(files: Sequence[Path], shape: tuple[int, ...]) -> list[tuple[Path, Path]]:
    """(path, name) of each input file; of those in folders, which are searched for images or, where `shape` is that of
    points, .csv files, the name is the path below the folder; maps are passed over. InputError if there is none.
    """
    suffixes = IMAGES if len(shape) == 3 else (".csv",)
    named = []
    for file in files:
        if not file.is_dir():
            named.append((file, Path(file.name)))
            continue
        for path in sorted(file.rglob("*")):
            if path.suffix.lower() in suffixes and path.is_file() and not path.name.endswith(MAP):
                named.append((path, path.relative_to(file)))
    if not named:
        what = "images" if len(shape) == 3 else ".csv files of points"
        where = f" in {', '.join(map(str, files))}" if files else ""
        raise InputError(f"no {what} given{where}: name files, or folders that hold some")
    return named


def refuse_overwriting(inputs: Sequence[Path], outputs: Sequence[Path], also: Sequence[Path] = ()) -> None:
    """Raise InputError if two outputs are the same file, or if an output is an input, one of `also`, or a folder."""
    source_of: dict[Path, Path] = {}
    sources = {path.resolve() for path in (*inputs, *also)}
    for source, output in zip(inputs, outputs, strict=True):
        if output.resolve() in sources:
            raise InputError(f"the output would overwrite the input {output}: choose another place")
        if output.is_dir():
            raise InputError(f"{output} would be written for {source}, but is a folder: choose another place")
        other = source_of.setdefault(output, source)
        if other != source:
            raise InputError(f"{other} and {source} would both be written to {output}: rename one of them")


def read_samples(paths: Sequence[Path], model: NAIGN) -> list[Tensor]:
    """The content of each file, float32: an image (1, C, H, W) in [-1, 1] at the model's size, or points (n, D) of the
    lines of a .csv file. Raises InputError for a file that holds neither, OSError for one that cannot be read.
    """
    if len(model.shape) != 3:
        return [_read_points(path, model.shape) for path in counted("reading", paths, unit="file")]
    images = []
    for path in counted("reading", paths, unit="image"):
        try:
            images.append(read_image(path.read_bytes(), model))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return images


def _read_points(path: Path, shape: tuple[int, ...]) -> Tensor:
    wanted = math.prod(shape)
    takes = f"this model takes points, {wanted} finite numbers a line with commas between them and no header"
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeError:
        raise InputError(f"{path}: no text; {takes}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = torch.tensor([float(cell) for cell in line.split(",")])
        except ValueError:
            row = torch.empty(0)
        if len(row) != wanted or not row.isfinite().all():
            raise InputError(f"{path}:{number}: '{printable(line, 60)}': {takes}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: empty; {takes}")
    return torch.stack(rows)


def check_hidden(to: Path) -> None:
    """InputError if what is written at `to` would hide the model that comes with naign."""
    if shipped_model(os.path.relpath(to).partition(os.sep)[0]):
        raise InputError(f"--to {to} hides naign's model of that name: choose another place")


def write_samples(samples: Tensor, to: Path) -> str:
    """Write samples to a .png grid, a .csv file, or as one PNG each into a folder. Returns the place, for a message."""
    if to == Path():
        raise InputError("--to is the current folder: choose another place")
    check_hidden(to)
    suffixes = (".png", "") if samples.ndim == 4 else (".csv",)
    suffix = to.suffix.lower()
    if suffix not in suffixes:
        wanted = ".png, or a folder's name" if samples.ndim == 4 else ".csv"
        raise InputError(f"--to {to}: samples of shape {tuple(samples.shape[1:])} go to a file that ends in {wanted}")
    if suffix == ".csv":
        write_one(samples, to)
    elif suffix == ".png":
        save(grid(samples, columns=math.ceil(math.sqrt(len(samples)))), to)
    else:
        for number, image in enumerate(counted("writing", samples, unit="image")):
            write_one(image[None], to / f"{number:06d}.png")
        return f"{to}/"
    return str(to)


def write_one(samples: Tensor, to: Path) -> None:
    """Write one image (1, C, H, W) as a PNG file, or points (n, D) as a .csv file."""
    if samples.ndim == 4:
        save(to_image(samples[0]), to)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(repr, row)) for row in samples.tolist()]
    write_atomically(to, "".join(f"{line}\r\n" for line in lines))


def save(picture: Image.Image, to: Path, profile: bytes | None = None) -> None:
    """Write a picture atomically, not synced, in the format of its suffix; as JPEG on white, without alpha."""
    kind = FORMATS[to.suffix.lower()]
    if kind == "JPEG":
        picture = in_mode(picture, "L" if picture.mode in ("L", "LA") else "RGB")
    content = io.BytesIO()
    picture.save(content, kind, quality=95, icc_profile=profile)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, content.getvalue(), sync=False)
