"""What `naign restore` and `naign score` do with pictures, at the model's size or their own."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from naign.cli.files import FORMATS, IMAGES, MAP, find_files, read_images, refuse_overwriting, save
from naign.errors import require
from naign.evaluate.recorded import sees_wholes
from naign.model.naign import NAIGN
from naign.model.photos import colour_profile, filled, mapped, read_hole, read_picture, shown, to_values
from naign.observe.pictures import to_image
from naign.terminal import counted


def restore_files(
    model: NAIGN,
    files: Sequence[Path],
    *,
    to: Path,
    times: int | None,
    mask: Path | None,
    size: str | None,
) -> None:
    """Repair files, with the options of `naign restore`. All are decoded before the first is written."""
    found = find_files(files, model)
    resized = size == "model"
    if not (size or mask):
        resized = sees_wholes(model)
    require((not (resized and mask), "--mask is for pictures at their own size: leave out --size model"))
    paths = [path for path, _ in found]
    outputs = [to / name.with_suffix(".png") for _, name in found]
    place = f"{to}/"
    if to.suffix.lower() in IMAGES and not to.is_dir():
        remedy = "give a folder; only one picture may go to a file, .png or .jpg"
        require((len(found) == 1 and to.suffix.lower() in FORMATS, f"--to {to} ends like a file: {remedy}"))
        outputs = [to]
        place = str(to)
    refuse_overwriting(paths, outputs, [mask] if mask else [])
    if resized:
        images = read_images(paths, model)
        first = images[0]
        if 2 * model.energy(-first) < model.energy(first):  # of dark ink on white a seventieth, for the f of MNIST
            unlike = "its negative is more like the training data: invert it if its ink is dark"
            print(f"warning: {paths[0]}: {unlike}", file=sys.stderr)
    else:
        _check_pictures(paths, mask)
    for number, output in enumerate(counted("restoring", outputs, unit="file")):
        if resized:
            save(to_image(model.project(images[number], times=times)[0].cpu()), output)
            continue
        picture = read_picture(paths[number])
        if mask:
            hole = read_hole(mask, picture.size)
            made = filled(picture, hole, model, times=times)
        else:
            made = shown(model.project(to_values(picture, model), times=times))
        save(made, output, colour_profile(picture, model))
    print(f"{len(paths)} restored: {place}")
    if resized and size is None:
        _, height, width = model.shape
        print(f"each is {width} x {height}, as f has one code for a picture; --size picture: in tiles")
    if size == "picture" and sees_wholes(model):
        print("each was repaired in tiles, though f has one code for a picture; --size model: as a whole")


def _check_pictures(paths: Sequence[Path], mask: Path | None = None) -> None:
    """Decode all pictures, so that none is refused once others are written."""
    for path in counted("reading", paths, unit="image"):
        picture = read_picture(path)
        if mask:
            read_hole(mask, picture.size)


def score_files(
    model: NAIGN,
    files: Sequence[Path],
    *,
    times: int,
    map: bool,
    refused: float,
) -> list[tuple[str, ...]]:
    """The rows of the table that `naign score` prints, with its head."""
    paths = [path for path, _ in find_files(files, model)]
    if map:
        return _energy_rows(paths, _map_photos(model, paths, times))
    images = torch.cat(read_images(paths, model))
    with counted("scoring", total=len(paths), unit="image") as bar:
        if not model.has_bank:
            energies = model.energy(images, times=times, advance=bar.update)
            return _energy_rows(paths, energies.tolist())
        scores = model.score(images, times=times, advance=bar.update)
    rows: list[tuple[str, ...]] = [("file", *scores._fields, "unlike")]
    for path, *values, rank in zip(paths, *(part.tolist() for part in scores), strict=True):
        unlike = "yes" if rank > 1 - refused else "no"
        rows.append((str(path), *(f"{value:.6g}" for value in values), f"{rank:.4f}", unlike))
    return rows


def _energy_rows(paths: Sequence[Path], energies: Sequence[float]) -> list[tuple[str, ...]]:
    rows = [(str(path), f"{energy:.6g}") for path, energy in zip(paths, energies, strict=True)]
    return [("file", "energy"), *rows]


def _map_photos(model: NAIGN, paths: Sequence[Path], times: int) -> list[float]:
    """The energy of each picture at its own size. The map of |f(x) - x| is written beside it."""
    maps = [path.with_name(path.name + MAP) for path in paths]
    refuse_overwriting(paths, maps)
    _check_pictures(paths)
    energies = []
    with counted("scoring", paths, unit="image") as bar:
        for path, place in zip(bar, maps, strict=True):
            values = to_values(read_picture(path), model)
            made = model.project(values, times=times, advance=lambda _: bar.update(0))
            save(mapped(values, made), place)
            energies.append(float((made - values).double().square().mean()))
    return energies
